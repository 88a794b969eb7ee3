//! What every request passes through: ids, logs, metrics, keys, limits.

use super::errors::ApiError;
use super::state::Shared;
use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use subtle::{Choice, ConstantTimeEq};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request's id, its own or the one that [`request_id`] gave it.
pub struct RequestId(pub Arc<str>);

impl<S: Send + Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<RequestId, Infallible> {
        let id = parts.headers.get(&REQUEST_ID).and_then(|v| v.to_str().ok()).unwrap_or_default();
        Ok(RequestId(id.into()))
    }
}

/// Gives a request an id, if it brings none, and its answer the same.
pub async fn request_id(mut request: Request, next: Next) -> Response {
    let own = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|v| v.len() <= 128 && v.to_str().is_ok())
        .cloned();
    let id = own.unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().simple().to_string())
            .expect("hexadecimal digits")
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Logs and measures a request, up to the head of its answer.
pub async fn observe(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    // paths that do not exist would each make a series of their own
    let handler = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none".to_owned(), |p| p.as_str().to_owned());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let elapsed = started.elapsed();
    shared.metrics.http(&handler, &method, status, elapsed.as_secs_f64());
    let milliseconds = elapsed.as_secs_f64() * 1e3;
    match status {
        500.. => tracing::error!(request_id = id, %method, path, status, milliseconds, "request"),
        _ => tracing::info!(request_id = id, %method, path, status, milliseconds, "request"),
    }
    response
}

/// Lets requests with a known key pass, or all if no key is set. How long a comparison takes says
/// nothing about the keys.
pub async fn authorize(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    if shared.api_keys.is_empty() {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION).map_or(&[][..], HeaderValue::as_bytes);
    // the scheme's name may be written in any case
    let given =
        given.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
    let given = given.map_or(&[][..], |(_, key)| key.trim_ascii());
    let known =
        shared.api_keys.iter().fold(Choice::from(0), |any, key| any | key.as_bytes().ct_eq(given));
    match bool::from(known) {
        true => next.run(request).await,
        false => ApiError::unauthorized().into_response(),
    }
}

/// Limits of a request's body.
#[derive(Clone, Copy)]
pub struct BodyLimits {
    pub bytes: usize,
    pub time: Duration,
}

/// Refuses a body that says it is too large before any of it is asked for, and one that takes too
/// long to come.
pub async fn limit_body(
    State(limits): State<BodyLimits>,
    request: Request,
    next: Next,
) -> Response {
    let deadline = tokio::time::Instant::now() + limits.time;
    let (head, body) = request.into_parts();
    let size =
        head.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if let Some(size) = size.filter(|n| *n > limits.bytes as u64) {
        // whoever sends without waiting for permission reads the answer only after that
        if !head.headers.contains_key(header::EXPECT) {
            let _ = tokio::time::timeout_at(deadline, discard(body)).await;
        }
        return ApiError::too_large(Some((size, limits.bytes))).into_response();
    }
    let timed = futures_util::stream::unfold(body, move |mut body| async move {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Ok(frame) => frame?.map_err(std::io::Error::other),
            Err(_) => {
                Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the body took too long"))
            }
        };
        let bytes = frame.map(|f| f.into_data().unwrap_or_default());
        Some((bytes, body))
    });
    next.run(Request::from_parts(head, Body::from_stream(timed))).await
}

/// Reads what is left of a body, up to a size that no mistake has.
async fn discard(mut body: Body) {
    const MAX_BYTES: usize = 64 << 20;
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, |d| d.len());
        if read > MAX_BYTES {
            return;
        }
    }
}
