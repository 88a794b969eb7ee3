//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// The body of a response that says what went wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, for people and for programs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What went wrong, in words.
    pub message: String,
    /// The kind of error, such as `invalid_request_error`.
    pub r#type: &'static str,
    /// The field that is wrong, where it is one.
    pub param: Option<String>,
    /// A fixed name of the error, where it has one, such as `model_not_found`.
    pub code: Option<&'static str>,
}

/// An error as handlers return it.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// Status of the response.
    pub status: StatusCode,
    /// What its body says.
    pub detail: ErrorDetail,
    retry_after: Option<u32>,
}

impl ApiError {
    pub(super) fn new(
        status: StatusCode,
        kind: &'static str,
        message: impl Into<String>,
    ) -> ApiError {
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

    /// 404: a request asks for another model than is served.
    pub fn model_not_found(asked: &str, served: &str) -> ApiError {
        let message = format!("the model \"{asked}\" does not exist; this server has \"{served}\"");
        let mut e = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        e.detail.param = Some("model".into());
        e.detail.code = Some("model_not_found");
        e
    }

    /// 404: no route has this path.
    pub fn no_such_path(path: &str) -> ApiError {
        let message = format!("there is nothing at {path}; /openapi.json lists what there is");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// 405: the path's route does not take the request's method.
    pub fn wrong_method(path: &str) -> ApiError {
        let message =
            format!("{path} does not take this method; the Allow header lists those it takes");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 401: the request has no valid API key.
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

    /// 503: the server is shutting down.
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

    /// 500: something went wrong that is not the client's fault.
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
