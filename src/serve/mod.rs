//! The HTTP server: OpenAI's API, rewriting, metrics, a page.

mod body;
mod connection;
pub mod engine;
pub mod errors;
mod info;
mod layers;
pub mod metrics;
mod openai;
pub mod pool;
mod rewrite;
mod sse;
mod state;
pub mod worker;

pub use state::Shared;

use axum::body::Body;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Request, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use axum::{Json, Router};
use connection::Wire;
use errors::ApiError;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use std::future::Future;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// How the server behaves towards its clients.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Maximum bytes of a request's body.
    pub body_limit: usize,
    /// Longest time for a request's head, and between requests of a connection.
    pub header_timeout: Duration,
    /// Longest time for a request's body.
    pub body_timeout: Duration,
    /// Longest time for which a client may take nothing of its answer.
    pub write_timeout: Option<Duration>,
    /// Origins whose pages may call; `*` for all.
    pub cors_origins: Vec<String>,
    /// How long `/ready` fails before the server stops accepting connections.
    pub shutdown_delay: Duration,
    /// How long requests may take once the server has stopped accepting connections.
    pub shutdown_timeout: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            body_limit: 1 << 20,
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            write_timeout: Some(Duration::from_secs(60)),
            cors_origins: vec![],
            shutdown_delay: Duration::ZERO,
            shutdown_timeout: Duration::from_secs(30),
        }
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "beautiful-prompt",
        description = "Rewrites plain text-to-image prompts into rich ones. Where an API key is \
            set, requests bring it as a bearer token."
    ),
    components(schemas(rewrite::RewritePiece, rewrite::RewriteResult))
)]
struct Document;

/// All routes.
pub fn app(shared: Arc<Shared>, options: &HttpOptions) -> anyhow::Result<Router> {
    let guarded = OpenApiRouter::new()
        .routes(routes!(openai::completions::completions))
        .routes(routes!(openai::chat::chat_completions))
        .routes(routes!(openai::models::models))
        .routes(routes!(openai::models::model_by_name))
        .routes(routes!(rewrite::rewrite))
        .routes(routes!(rewrite::generate_prompt))
        .routes(routes!(rewrite::model_list))
        .routes(routes!(info::tokenize))
        .routes(routes!(info::detokenize))
        // a name with slashes, as Hugging Face has them
        .route("/v1/models/{model}/{*rest}", get(openai::models::model_by_path))
        .route_layer(from_fn_with_state(shared.clone(), layers::authorize));
    let open = OpenApiRouter::new()
        .routes(routes!(info::health))
        .routes(routes!(info::ready))
        .routes(routes!(info::version))
        .routes(routes!(info::metrics));
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(guarded)
        .merge(open)
        .split_for_parts();
    let body_limits = layers::BodyLimits { bytes: options.body_limit, time: options.body_timeout };
    let mut router = router
        .route("/", get(info::page))
        .route("/ping", get(info::health))
        .route("/openapi.json", get(move || std::future::ready(Json(document))))
        .fallback(
            |request: Request<Body>| async move { ApiError::no_such_path(request.uri().path()) },
        )
        .method_not_allowed_fallback(|request: Request<Body>| async move {
            ApiError::wrong_method(request.uri().path())
        })
        .layer(DefaultBodyLimit::max(options.body_limit))
        .layer(from_fn_with_state(body_limits, layers::limit_body));
    if !options.cors_origins.is_empty() {
        router = router.layer(cors(&options.cors_origins)?);
    }
    let panicked = |_: Box<dyn std::any::Any + Send>| {
        use axum::response::IntoResponse;
        ApiError::internal("the server made a mistake; its log says more").into_response()
    };
    Ok(router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(shared.clone(), layers::observe))
        .layer(from_fn(layers::request_id))
        .with_state(shared))
}

fn cors(origins: &[String]) -> anyhow::Result<CorsLayer> {
    use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, Any};
    // `*` would not cover Authorization, so that what is asked for is allowed by name
    let layer = CorsLayer::new()
        .allow_methods(AllowMethods::list([Method::GET, Method::POST]))
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([layers::REQUEST_ID, header::RETRY_AFTER]);
    if origins.iter().any(|o| o == "*") {
        return Ok(layer.allow_origin(Any));
    }
    let list = origins
        .iter()
        .map(|o| o.parse().map_err(|_| anyhow::anyhow!("--cors-origin {o}: not an origin")));
    Ok(layer.allow_origin(AllowOrigin::list(list.collect::<anyhow::Result<Vec<_>>>()?)))
}

/// Serves until `stop` resolves, then drains: `/ready` fails first, then no connection is accepted
/// any more, and what was accepted is answered. Returns how many requests the time was too short
/// for.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shared: Arc<Shared>,
    options: HttpOptions,
    stop: impl Future<Output = ()>,
) -> usize {
    let graceful = GracefulShutdown::new();
    let accept = |stream| accept(stream, router.clone(), &options, &graceful);
    let mut stop = std::pin::pin!(stop);
    let mut leaving = std::pin::pin!(None::<Sleep>);
    loop {
        tokio::select! {
            connection = listener.accept() => match connection {
                Ok((stream, _)) => accept(stream),
                Err(e) => {
                    // most likely out of file descriptors, which others give back
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = &mut stop, if leaving.is_none() => {
                shared.draining.store(true, Ordering::Relaxed);
                tracing::info!("shutting down; {} requests in flight", shared.engine.in_flight());
                leaving.set(Some(tokio::time::sleep(options.shutdown_delay)));
            }
            () = async { leaving.as_mut().as_pin_mut().expect("checked").await },
                if leaving.is_some() => break,
        }
    }
    let now = tokio::time::Instant::now();
    let end = now + options.shutdown_timeout;
    // who has connected already is served; who goes on connecting must not keep the server from
    // ending
    let last = end.min(now + Duration::from_millis(200));
    let soon = || last.min(tokio::time::Instant::now() + Duration::from_millis(20));
    while let Ok(Ok((stream, _))) = tokio::time::timeout_at(soon(), listener.accept()).await {
        accept(stream);
    }
    drop(listener);
    match tokio::time::timeout_at(end, graceful.shutdown()).await {
        Ok(()) => 0,
        Err(_) => shared.engine.in_flight().max(1),
    }
}

/// Serves a connection on a task of its own. A client that leaves before its answer begins ends the
/// work for it.
fn accept(stream: TcpStream, router: Router, options: &HttpOptions, graceful: &GracefulShutdown) {
    // a token is a small packet that somebody waits for
    let _ = stream.set_nodelay(true);
    let wire = Wire::new(stream, options.write_timeout);
    let client = wire.client();
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, client) = (router.clone(), client.clone());
        async move {
            tokio::select! {
                answer = router.oneshot(request.map(Body::new)) => {
                    let answer = answer.unwrap_or_else(|e| match e {});
                    let kind = answer.headers().get(header::CONTENT_TYPE);
                    Ok(match kind.is_some_and(|t| t == "text/event-stream") {
                        true => answer.map(|body| client.clone().watched(body)),
                        false => answer,
                    })
                }
                () = client.left() => Err(std::io::Error::from(ErrorKind::ConnectionAborted)),
            }
        }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(options.header_timeout).half_close(true);
    let connection = graceful.watch(builder.serve_connection(TokioIo::new(wire), service));
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!("connection: {e}");
        }
    });
}
