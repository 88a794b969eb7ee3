//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
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
        let message = format!("{path} does not take this method; the Allow header lists those it takes");
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
        let mut e = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is shutting down");
        e.retry_after = Some(5);
        e
    }

    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(ErrorBody { error: self.detail })).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A JSON body; what is wrong with one is reported like any other error. Whole numbers may be written with a fraction of zero,
/// as JSON Schema has it.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Json<T>, ApiError> {
        let mut value = match axum::Json::<Value>::from_request(request, state).await {
            Ok(axum::Json(value)) => value,
            Err(JsonRejection::MissingJsonContentType(_)) => {
                return Err(ApiError::new(
                    StatusCode::UNSUPPORTED_MEDIA_TYPE,
                    "invalid_request_error",
                    "expected the header Content-Type: application/json",
                ));
            }
            Err(JsonRejection::JsonSyntaxError(e)) => {
                let text = e.body_text();
                // the cause comes after axum's introduction
                let cause = text.split_once(": ").map_or(text.as_str(), |t| t.1);
                return Err(ApiError::invalid(format!("the body is not JSON: {cause}")));
            }
            Err(e) => return Err(ApiError::new(e.status(), "invalid_request_error", e.body_text())),
        };
        whole_numbers(&mut value);
        serde_path_to_error::deserialize(value).map(Json).map_err(|e| {
            let path = e.path().to_string();
            match path.as_str() {
                "." => ApiError::invalid(e.inner().to_string()),
                _ => ApiError::field(&path, format!("{path}: {}", e.inner())),
            }
        })
    }
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
