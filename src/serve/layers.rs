//! What every request passes through: ids, logs, metrics, keys, limits.

use super::errors::ApiError;
use super::state::Shared;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use subtle::{Choice, ConstantTimeEq};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives a request an id, if it brings none, and its answer the same.
pub async fn request_id(mut request: Request, next: Next) -> Response {
    let own = request.headers().get(&REQUEST_ID).filter(|v| v.len() <= 128 && v.to_str().is_ok()).cloned();
    let id = own.unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().simple().to_string()).expect("hexadecimal digits")
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
    let id = request.headers().get(&REQUEST_ID).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    // paths that do not exist would each make a series of their own
    let handler = request.extensions().get::<MatchedPath>().map_or("none".to_owned(), |p| p.as_str().to_owned());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let elapsed = started.elapsed();
    shared.metrics.http(&handler, method.as_str(), status, elapsed.as_secs_f64());
    let milliseconds = elapsed.as_secs_f64() * 1e3;
    match status {
        500.. => tracing::error!(request_id = id, %method, path, status, milliseconds, "request"),
        _ => tracing::info!(request_id = id, %method, path, status, milliseconds, "request"),
    }
    response
}

/// Lets requests with a known key pass, or all if no key is set. How long a comparison takes says nothing about the keys.
pub async fn authorize(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if shared.api_keys.is_empty() {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION).map_or(&[][..], HeaderValue::as_bytes);
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    let known = shared.api_keys.iter().fold(Choice::from(0), |any, key| any | key.as_bytes().ct_eq(given));
    match bool::from(known) {
        true => next.run(request).await,
        false => ApiError::unauthorized().into_response(),
    }
}

/// Refuses a body that takes too long to come.
pub async fn limit_body_time(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    let deadline = tokio::time::Instant::now() + limit;
    let (head, body) = request.into_parts();
    let timed = futures_util::stream::unfold(body, move |mut body| async move {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Ok(frame) => frame?.map_err(std::io::Error::other),
            Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the body took too long")),
        };
        let bytes = frame.map(|f| f.into_data().unwrap_or_default());
        Some((bytes, body))
    });
    next.run(Request::from_parts(head, Body::from_stream(timed))).await
}
