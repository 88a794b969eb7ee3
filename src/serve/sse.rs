//! Server-sent events from generations.

use super::engine::{Generation, Reply};
use super::errors::{ApiError, ErrorBody};
use crate::engine::FinishReason;
use crate::generate::Completed;
use crate::generate::text::Token;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;

/// A server-sent event, for the API's description.
#[derive(utoipa::ToSchema)]
#[allow(dead_code)] // events are written by axum
pub struct StreamEvent {
    /// A piece as JSON, or `[DONE]`.
    data: String,
}

/// What happened, in which of the generations.
pub enum Item {
    Text {
        at: usize,
        candidate: u32,
        text: String,
        tokens: Vec<Token>,
        finish: Option<FinishReason>,
    },
    Done(Box<Completed>),
    /// All generations are done.
    End,
}

/// Streams what `render` makes of generations, and `[DONE]` at the end. The first failure ends it.
pub fn respond(
    generations: Vec<Generation>,
    mut render: impl FnMut(Item) -> Result<Vec<Event>, ApiError> + Send + 'static,
) -> Response {
    let replies =
        stream::select_all(generations.into_iter().enumerate().map(|(at, generation)| {
            Box::pin(stream::unfold(generation, move |mut g| async move {
                let reply = g.next().await?;
                Some(((at, reply), g))
            }))
        }));
    let items = replies.map(|(at, reply)| match reply? {
        Reply::Text { candidate, text, tokens, finish } => {
            Ok(Some(Item::Text { at, candidate, text, tokens, finish }))
        }
        Reply::Done(completed) => Ok(Some(Item::Done(completed))),
        Reply::Accepted | Reply::Refused(_) | Reply::Failed(_) => Ok(None),
    });
    let end = stream::iter([Ok(Some(Item::End))]);
    let mut failed = false;
    let events = items.chain(end).flat_map(move |item: Result<Option<Item>, ApiError>| {
        let rendered = match item {
            _ if failed => Ok(vec![]),
            Ok(Some(item)) => render(item),
            Ok(None) => Ok(vec![]),
            Err(e) => Err(e),
        };
        let rendered = rendered.unwrap_or_else(|e| {
            failed = true;
            vec![data(&ErrorBody { error: e.detail })]
        });
        stream::iter(rendered)
    });
    let done = stream::iter([Event::default().data("[DONE]")]);
    Sse::new(events.chain(done).map(Ok::<Event, Infallible>))
        .keep_alive(keep_alive())
        .into_response()
}

/// Comments while there is nothing to tell, often enough that a client that has gone away is soon
/// noticed.
pub fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(Duration::from_secs(2))
}

/// About how many bytes an answer comes to, with so many likely tokens beside each.
pub fn cost(completed: &Completed, top: usize) -> usize {
    let tokens: usize = completed.candidates.iter().map(|c| c.tokens.len()).sum();
    (tokens + completed.prompt_scores.len()) * 8 * (top + 1)
}

/// An event that holds `value` as JSON.
pub fn data(value: &impl Serialize) -> Event {
    Event::default().json_data(value).expect("answers are plain data")
}
