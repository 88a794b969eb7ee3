//! Bodies of requests in JSON, read off the threads that answer everybody.

use super::errors::ApiError;
use super::state::Shared;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::ErrorKind;
use std::sync::Arc;

/// A request's body in JSON, and how many bytes it had. What is wrong with one is reported like any
/// other error. Whole numbers may be written with a fraction of zero, as JSON Schema has it.
pub struct Json<T>(pub T, pub usize);

/// What a body can hold.
pub trait RequestBody: DeserializeOwned + Send + 'static {
    /// Looks for what reading the body into the type would not find, or not name.
    fn check(_body: &Value) -> Result<(), ApiError> {
        Ok(())
    }
}

impl<T: RequestBody> FromRequest<Arc<Shared>> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Json<T>, ApiError> {
        if !is_json(&request) {
            let message = "expected the header Content-Type: application/json";
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid_request_error",
                message,
            ));
        }
        let body = Bytes::from_request(request, shared).await.map_err(unreadable)?;
        let bytes = body.len();
        let value = shared.texts.admit(bytes, move || parse(&body)).await??;
        Ok(Json(value, bytes))
    }
}

fn is_json(request: &Request) -> bool {
    let kind = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json")
}

fn unreadable(e: BytesRejection) -> ApiError {
    let status = e.status();
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&e);
    while let Some(cause) = source {
        if cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::TimedOut) {
            let message = "the body took too long to come; --body-timeout allows for more";
            return ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message);
        }
        source = cause.source();
    }
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(None),
        _ => ApiError::new(status, "invalid_request_error", "the body ended before it was whole"),
    }
}

fn parse<T: RequestBody>(body: &[u8]) -> Result<T, ApiError> {
    let mut value: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid(format!("the body is not JSON: {e}")))?;
    if !value.is_object() {
        return Err(ApiError::invalid("the body is no JSON object"));
    }
    whole_numbers(&mut value);
    T::check(&value)?;
    read(&value)
}

/// A value as a type; the error names the field that is wrong.
pub fn read<'v, T: Deserialize<'v>>(value: &'v Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let path = e.path().to_string();
        match path.as_str() {
            "." => ApiError::invalid(e.inner().to_string()),
            _ => ApiError::field(&path, format!("{path}: {}", e.inner())),
        }
    })
}

fn whole_numbers(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        Value::Number(n) if n.is_f64() => {
            // up to where doubles hold every whole number
            let v = n.as_f64().filter(|v| v.fract() == 0.0 && v.abs() < 9e15);
            if let Some(v) = v {
                *value = Value::from(v as i64);
            }
        }
        _ => {}
    }
}
