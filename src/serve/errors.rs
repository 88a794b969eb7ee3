//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use super::state::Shared;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::ErrorKind;
use std::sync::Arc;
use utoipa::ToSchema;

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    pub message: String,
    pub r#type: &'static str,
    /// The field that is wrong, where it is one.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub detail: ErrorDetail,
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        let detail = ErrorDetail { message: message.into(), r#type: kind, param: None, code: None };
        ApiError { status, detail, retry_after: None }
    }

    /// The request cannot be served as it is.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// One field of the request is wrong.
    pub fn field(name: &str, message: impl Into<String>) -> ApiError {
        let mut e = ApiError::invalid(message);
        e.detail.param = Some(name.into());
        e
    }

    pub fn model_not_found(asked: &str, served: &str) -> ApiError {
        let message = format!("the model \"{asked}\" does not exist; this server has \"{served}\"");
        let mut e = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        e.detail.param = Some("model".into());
        e.detail.code = Some("model_not_found");
        e
    }

    pub fn no_such_path(path: &str) -> ApiError {
        let message = format!("there is nothing at {path}; /openapi.json lists what there is");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub fn wrong_method(path: &str) -> ApiError {
        let message =
            format!("{path} does not take this method; the Allow header lists those it takes");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    pub fn unauthorized() -> ApiError {
        let message = "a valid API key is needed: Authorization: Bearer KEY";
        let mut e = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        e.detail.code = Some("invalid_api_key");
        e
    }

    /// The queue is full.
    pub fn busy() -> ApiError {
        let message = "the queue is full; try again after the time in Retry-After";
        let mut e = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        e.detail.code = Some("queue_full");
        e.retry_after = Some(1);
        e
    }

    pub fn draining() -> ApiError {
        let mut e = ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "the server is shutting down",
        );
        e.retry_after = Some(5);
        e
    }

    /// The body is larger than the server takes: its size, if it says so, and the limit.
    pub fn too_large(sizes: Option<(u64, usize)>) -> ApiError {
        let message = match sizes {
            Some((size, limit)) => {
                format!("the body has {size} bytes, {limit} at most; --body-limit allows for more")
            }
            None => "the body has more bytes than --body-limit allows".into(),
        };
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// The server cannot work.
    pub fn unhealthy(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response =
            (self.status, axum::Json(ErrorBody { error: self.detail })).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

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
