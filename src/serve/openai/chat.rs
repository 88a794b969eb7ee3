//! `/v1/chat/completions`: the last user message is a plain prompt, the answer its rewrite.

use super::{
    SamplingParams, StreamOptions, Usage, finite, now, token_text, top_logprobs, with_top,
};
use crate::engine::FinishReason;
use crate::generate::text::Token;
use crate::generate::{Completed, GenerateOptions};
use crate::serve::body::{Json, RequestBody};
use crate::serve::engine::Generation;
use crate::serve::errors::{ApiError, ErrorBody};
use crate::serve::layers::RequestId;
use crate::serve::sse::{self, Item};
use crate::serve::state::{Shared, StateArc};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use utoipa::ToSchema;

#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The served model's name, or nothing.
    pub model: Option<String>,
    /// The last message of the role "user" is rewritten.
    #[schema(min_items = 1)]
    pub messages: Vec<Message>,
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The newer name of `max_tokens`.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// Whether to report log-probabilities.
    pub logprobs: Option<bool>,
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    pub sampling: SamplingParams,
}

impl RequestBody for ChatRequest {
    fn check(body: &Value) -> Result<(), ApiError> {
        super::check(body)
    }
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct Message {
    pub role: String,
    pub content: Option<Content>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of parts")]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Part)]
pub struct ContentPart {
    /// "text"
    pub r#type: String,
    pub text: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: Answer,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: FinishReason,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

#[derive(Debug, Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Debug, Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Answer,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishReason>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

fn logprobs(shared: &Shared, tokens: &[Token]) -> ChatLogprobs {
    let one = |(id, own, top): (u32, f32, &[(u32, f32)])| TokenLogprob {
        token: token_text(shared, id),
        logprob: finite(own),
        bytes: shared.tokenizer.token_bytes(id),
        top_logprobs: top
            .iter()
            .map(|&(id, l)| TopLogprob {
                token: token_text(shared, id),
                logprob: finite(l),
                bytes: shared.tokenizer.token_bytes(id),
            })
            .collect(),
    };
    ChatLogprobs { content: with_top(tokens).map(one).collect() }
}

/// The plain prompt of a conversation.
fn plain_prompt(messages: &[Message]) -> Result<String, ApiError> {
    let last = messages.iter().rev().find(|m| m.role == "user");
    let last = last
        .ok_or_else(|| ApiError::field("messages", "there is no message of the role \"user\""))?;
    match &last.content {
        Some(Content::Text(text)) => Ok(text.clone()),
        Some(Content::Parts(parts)) => {
            if let Some(other) = parts.iter().find(|p| p.r#type != "text") {
                let message = format!(
                    "a part of the type \"{}\" cannot be read; expected \"text\"",
                    other.r#type
                );
                return Err(ApiError::field("messages", message));
            }
            Ok(parts.iter().filter_map(|p| p.text.as_deref()).collect::<Vec<_>>().join(" "))
        }
        None => Err(ApiError::field("messages", "the last message has no content")),
    }
}

/// Rewrite a plain prompt.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The rewrite, or with `stream` server-sent events of \
            pieces", content(
            (ChatCompletion = "application/json"), (sse::StreamEvent = "text/event-stream")
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorBody),
        (status = "5XX", description = "The server cannot serve", body = ErrorBody),
    )
)]
pub async fn chat_completions(
    State(shared): StateArc,
    RequestId(request_id): RequestId,
    Json(r, bytes): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    shared.check_model(r.model.as_deref())?;
    let wanted = r.logprobs.unwrap_or(false);
    if r.top_logprobs.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::field(
            "top_logprobs",
            "top_logprobs makes sense with logprobs alone",
        ));
    }
    let top = top_logprobs(r.top_logprobs, "top_logprobs")?;
    let streams = r.stream.unwrap_or(false);
    let include_usage = r.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
    let own = shared.clone();
    let (ids, mut options) = shared.texts.run(bytes, move || prepare(&own, r)).await??;
    options.top_logprobs = top;
    let candidates = options.candidates as usize;
    let mut generations =
        shared.engine.submit(vec![(ids, options)], &shared.engine.owner(request_id)).await?;
    let form = Form {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        created: now(),
        logprobs: wanted,
    };
    if streams {
        return Ok(streamed(shared, generations, candidates, form, include_usage));
    }
    let completed = generations.remove(0).complete().await?;
    let cost = sse::cost(&completed, top);
    let own = shared.clone();
    shared.texts.run(cost, move || axum::Json(whole(&own, &completed, form)).into_response()).await
}

/// What the answer's form depends on.
struct Form {
    id: String,
    created: u64,
    /// Whether log-probabilities are wanted.
    logprobs: bool,
}

/// Token ids of the plain prompt, and how to continue them.
fn prepare(shared: &Shared, r: ChatRequest) -> Result<(Vec<u32>, GenerateOptions), ApiError> {
    let prompt = plain_prompt(&r.messages)?;
    shared.check_length("messages", &prompt)?;
    let options =
        r.sampling.options(&shared.defaults, r.max_completion_tokens.or(r.max_tokens), shared)?;
    let ids = shared.encode(&prompt).map_err(|e| ApiError::field("messages", e))?;
    Ok((ids, options))
}

fn whole(shared: &Shared, completed: &Completed, form: Form) -> ChatCompletion {
    let choices = completed.candidates.iter().enumerate().map(|(index, c)| ChatChoice {
        index,
        message: Answer { role: Some("assistant"), content: Some(c.text.trim_start().to_owned()) },
        logprobs: form.logprobs.then(|| logprobs(shared, &c.tokens)),
        finish_reason: c.finish,
    });
    let mut usage = Usage::default();
    usage.add(completed);
    let choices = choices.collect();
    let (id, created, model) = (form.id, form.created, shared.name.clone());
    ChatCompletion { id, object: "chat.completion", created, model, choices, usage }
}

fn streamed(
    shared: Arc<Shared>,
    generations: Vec<Generation>,
    candidates: usize,
    form: Form,
    include_usage: bool,
) -> Response {
    let mut usage = Usage::default();
    let mut begun = vec![false; candidates];
    let mut role_given = begun.clone();
    sse::respond(generations, move |item| {
        let chunk = |choices, usage| {
            let (id, created, model) = (form.id.as_str(), form.created, shared.name.as_str());
            sse::data(&Chunk {
                id,
                object: "chat.completion.chunk",
                created,
                model,
                choices,
                usage,
            })
        };
        Ok(match item {
            Item::Text { candidate, text, tokens, finish, .. } => {
                let index = candidate as usize;
                // the space after the template is none of the answer's
                let text = if begun[index] { text } else { text.trim_start().to_owned() };
                begun[index] |= !text.is_empty();
                if text.is_empty() && finish.is_none() && !form.logprobs && role_given[index] {
                    return Ok(vec![]);
                }
                let role =
                    (!std::mem::replace(&mut role_given[index], true)).then_some("assistant");
                vec![chunk(
                    vec![ChunkChoice {
                        index,
                        delta: Answer { role, content: Some(text) },
                        logprobs: form.logprobs.then(|| logprobs(&shared, &tokens)),
                        finish_reason: finish,
                    }],
                    None,
                )]
            }
            Item::Done(completed) => {
                usage.add(&completed);
                vec![]
            }
            Item::End if include_usage => vec![chunk(vec![], Some(usage))],
            Item::End => vec![],
        })
    })
}
