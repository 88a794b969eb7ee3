//! Tokens, health, versions and metrics.

use super::body::{Json, RequestBody};
use super::errors::{ApiError, ErrorBody};
use super::state::StateArc;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use utoipa::ToSchema;

#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    pub prompt: String,
    /// Whether to tell what each token says.
    pub return_token_strs: Option<bool>,
}

impl RequestBody for TokenizeRequest {}

#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    pub count: usize,
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

/// Token ids of a text.
#[utoipa::path(
    post,
    path = "/tokenize",
    tag = "Tokens",
    request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = "4XX", body = ErrorBody))
)]
pub async fn tokenize(
    State(shared): StateArc,
    Json(r, bytes): Json<TokenizeRequest>,
) -> Result<axum::Json<TokenizeResponse>, ApiError> {
    let max_model_len = shared.config.context;
    let tokenizer = shared.tokenizer.clone();
    let work = move || {
        let tokens =
            tokenizer.encode(&r.prompt).map_err(|e| ApiError::field("prompt", e.to_string()))?;
        let text = |id: &u32| String::from_utf8_lossy(&tokenizer.token_bytes(*id)).into_owned();
        let token_strs =
            r.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(text).collect());
        Ok(axum::Json(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs }))
    };
    shared.texts.run(bytes, work).await?
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    pub tokens: Vec<u32>,
}

impl RequestBody for DetokenizeRequest {}

#[derive(Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    pub prompt: String,
}

/// The text of token ids.
#[utoipa::path(
    post,
    path = "/detokenize",
    tag = "Tokens",
    request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = "4XX", body = ErrorBody))
)]
pub async fn detokenize(
    State(shared): StateArc,
    Json(r, bytes): Json<DetokenizeRequest>,
) -> Result<axum::Json<DetokenizeResponse>, ApiError> {
    let known = |id: &&u32| (**id as usize) < shared.config.vocab_size;
    if let Some(id) = r.tokens.iter().find(|id| !known(id)) {
        return Err(ApiError::field("tokens", format!("{id} is no token id of this model")));
    }
    let tokenizer = shared.tokenizer.clone();
    let work = move || {
        let prompt =
            tokenizer.decode(&r.tokens).map_err(|e| ApiError::field("tokens", e.to_string()))?;
        Ok(axum::Json(DetokenizeResponse { prompt }))
    };
    shared.texts.run(bytes, work).await?
}

/// Whether the engine works: it has not stopped and does not stand still.
#[utoipa::path(
    get, path = "/health", tag = "Operation",
    responses((status = 200), (status = 503, body = ErrorBody)),
)]
pub async fn health(State(shared): StateArc) -> Result<StatusCode, ApiError> {
    match shared.trouble() {
        Some(trouble) => Err(ApiError::unhealthy(trouble)),
        None => Ok(StatusCode::OK),
    }
}

/// Whether to send requests here; no longer once the server is shutting down.
#[utoipa::path(
    get, path = "/ready", tag = "Operation",
    responses((status = 200), (status = 503, body = ErrorBody)),
)]
pub async fn ready(state: StateArc) -> Result<StatusCode, ApiError> {
    match state.draining.load(Ordering::Relaxed) {
        true => Err(ApiError::draining()),
        false => health(state).await,
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    pub version: &'static str,
}

/// The program's version.
#[utoipa::path(
    get, path = "/version", tag = "Operation",
    responses((status = 200, body = Version)),
)]
pub async fn version() -> axum::Json<Version> {
    axum::Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Prometheus metrics, under vLLM's names.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "Operation",
    responses((status = 200, content((String = "text/plain"))))
)]
pub async fn metrics(State(shared): StateArc) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.text())
        .into_response()
}

/// The page.
pub async fn page() -> Response {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
        connect-src 'self'; img-src data:";
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("../../assets/page.html")))
        .into_response()
}
