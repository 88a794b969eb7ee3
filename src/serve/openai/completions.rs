//! `/v1/completions`: continues texts as they are.

use super::{SamplingParams, StreamOptions, Usage, finite, now, token_text, top_logprobs, with_top};
use crate::engine::session::{Candidate, Completed};
use crate::engine::{Finish, Sampling};
use crate::models::generation_config::GenerationDefaults;
use crate::serve::errors::{ApiError, ErrorBody, Json};
use crate::serve::sse::{self, Item};
use crate::serve::state::{Shared, StateArc};
use crate::serve::worker::Generation;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use utoipa::ToSchema;

#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// The served model's name, or nothing.
    pub model: Option<String>,
    pub prompt: Prompt,
    /// 16 if not given.
    #[schema(minimum = 0)]
    pub max_tokens: Option<u32>,
    /// Log-probabilities of the tokens, with so many likely ones beside each.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<u32>,
    /// The prompt comes first in the text.
    pub echo: Option<bool>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    pub sampling: SamplingParams,
}

/// A text, texts, token ids, or lists of those.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub text: String,
    pub index: usize,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<Finish>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
    /// In characters, from the beginning of the choice's text.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    fn push(
        &mut self,
        shared: &Shared,
        id: u32,
        logprob: Option<f32>,
        top: &[(u32, f32)],
        wanted: usize,
        offset: &mut usize,
    ) {
        let text = token_text(shared, id);
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        if wanted > 0 {
            let top = logprob.map(|own| {
                let mut map: BTreeMap<String, f32> =
                    top.iter().map(|&(id, l)| (token_text(shared, id), finite(l))).collect();
                map.insert(text.clone(), finite(own));
                map
            });
            self.top_logprobs.get_or_insert_default().push(top);
        }
        self.tokens.push(text);
        self.token_logprobs.push(logprob.map(finite));
    }
}

/// What the answer's form depends on.
#[derive(Clone)]
struct Form {
    echo: bool,
    /// Likely tokens with each, if log-probabilities are wanted.
    logprobs: Option<usize>,
    /// Nothing but the prompt is wanted.
    only_prompt: bool,
}

/// Continue texts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The completion, or with `stream` server-sent events of pieces", content(
            (Completion = "application/json"), (sse::StreamEvent = "text/event-stream")
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorBody),
        (status = "5XX", description = "The server cannot serve", body = ErrorBody),
    )
)]
pub async fn completions(State(shared): StateArc, Json(r): Json<CompletionRequest>) -> Result<Response, ApiError> {
    shared.check_model(r.model.as_deref())?;
    let wanted = r.logprobs.map(|n| top_logprobs(Some(n), "logprobs")).transpose()?;
    let echo = r.echo.unwrap_or(false);
    let only_prompt = r.max_tokens == Some(0);
    if only_prompt && !echo {
        return Err(ApiError::field("max_tokens", "max_tokens is 0, which makes sense with echo alone"));
    }
    // a plain interface: the model's distribution as it is
    let defaults = GenerationDefaults {
        sampling: Sampling { temperature: 1.0, ..Sampling::default() },
        length: crate::engine::session::Length::New(16),
    };
    let max_tokens = if only_prompt { Some(1) } else { r.max_tokens };
    let mut options = r.sampling.options(&defaults, max_tokens, &shared)?;
    options.top_logprobs = wanted.unwrap_or(0);
    options.prompt_logprobs = echo && wanted.is_some();
    let form = Form { echo, logprobs: wanted, only_prompt };
    let prompts = prompts(&shared, r.prompt)?;
    let work = prompts.iter().map(|ids| (ids.clone(), options.clone())).collect();
    let generations = shared.engine.submit(work).await?;
    let id = format!("cmpl-{}", uuid::Uuid::new_v4().simple());
    if !r.stream.unwrap_or(false) {
        let mut usage = Usage::default();
        let mut choices = Vec::new();
        for generation in generations {
            let completed = generation.complete().await?;
            usage.add(&completed);
            for c in &completed.candidates {
                choices.push(whole_choice(&shared, &completed, c, choices.len(), &form)?);
            }
        }
        let answer = Completion {
            id,
            object: "text_completion",
            created: now(),
            model: shared.name.clone(),
            choices,
            usage: Some(usage),
        };
        return Ok(axum::Json(answer).into_response());
    }
    let include_usage = r.stream_options.and_then(|o| o.include_usage).unwrap_or(false);
    Ok(stream(shared, id, generations, prompts, options.candidates as usize, form, include_usage))
}

/// Token ids of the prompts.
fn prompts(shared: &Shared, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &String| match shared.tokenizer.encode(text) {
        Ok(ids) if ids.is_empty() => Err(ApiError::field("prompt", "the prompt is empty")),
        Ok(ids) => Ok(ids),
        Err(e) => Err(ApiError::field("prompt", e.to_string())),
    };
    let lists = match prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(ids) => vec![ids],
        Prompt::IdLists(lists) => lists,
    };
    match lists.iter().all(|l| !l.is_empty()) && !lists.is_empty() {
        true => Ok(lists),
        false => Err(ApiError::field("prompt", "the prompt is empty")),
    }
}

/// The prompt's text, and its log-probabilities if wanted.
fn echoed(
    shared: &Shared,
    ids: &[u32],
    scores: Option<&[(f32, crate::engine::Top)]>,
    form: &Form,
) -> Result<(String, Option<CompletionLogprobs>, usize), ApiError> {
    let text = shared.tokenizer.decode(ids).map_err(|e| ApiError::internal(e.to_string()))?;
    let mut offset = 0;
    let logprobs = form.logprobs.zip(scores).map(|(wanted, scores)| {
        let mut l = CompletionLogprobs::default();
        for (i, &id) in ids.iter().enumerate() {
            // nothing comes before the first
            let score = i.checked_sub(1).and_then(|i| scores.get(i));
            let top = score.map_or(&[][..], |s| s.1.as_slice());
            l.push(shared, id, score.map(|s| s.0), top, wanted, &mut offset);
        }
        l
    });
    Ok((text, logprobs, offset))
}

fn whole_choice(
    shared: &Shared,
    completed: &Completed,
    c: &Candidate,
    index: usize,
    form: &Form,
) -> Result<CompletionChoice, ApiError> {
    let (mut text, mut logprobs, mut offset) = match form.echo {
        true => echoed(shared, &completed.prompt_ids, Some(&completed.prompt_scores), form)?,
        false => (String::new(), form.logprobs.map(|_| CompletionLogprobs::default()), 0),
    };
    if !form.only_prompt {
        text.push_str(&c.text);
        if let (Some(l), Some(wanted)) = (&mut logprobs, form.logprobs) {
            with_top(&c.tokens).for_each(|(id, own, top)| l.push(shared, id, Some(own), top, wanted, &mut offset));
        }
    }
    Ok(CompletionChoice { text, index, logprobs, finish_reason: Some(c.finish) })
}

/// Pieces of all choices as they come.
fn stream(
    shared: Arc<Shared>,
    id: String,
    generations: Vec<Generation>,
    prompts: Vec<Vec<u32>>,
    candidates: usize,
    form: Form,
    include_usage: bool,
) -> Response {
    let created = now();
    let mut usage = Usage::default();
    // characters of each choice so far; none before its first piece
    let mut offsets: Vec<Option<usize>> = vec![None; candidates * generations.len()];
    let chunk = move |shared: &Shared, choices: Vec<CompletionChoice>, usage: Option<Usage>| {
        let model = shared.name.clone();
        sse::data(&Completion { id: id.clone(), object: "text_completion", created, model, choices, usage })
    };
    sse::respond(generations, move |item| {
        Ok(match item {
            Item::Text { at, candidate, mut text, tokens, finish } => {
                let index = at * candidates + candidate as usize;
                let mut events = Vec::new();
                if form.echo && offsets[index].is_none() {
                    // log-probabilities of the prompt come with a whole answer alone
                    let (text, ..) = echoed(&shared, &prompts[at], None, &form)?;
                    offsets[index] = Some(text.chars().count());
                    let choice = CompletionChoice { text, index, logprobs: None, finish_reason: None };
                    events.push(chunk(&shared, vec![choice], None));
                }
                let offset = offsets[index].get_or_insert(0);
                let logprobs = form.logprobs.filter(|_| !form.only_prompt).map(|wanted| {
                    let mut l = CompletionLogprobs::default();
                    with_top(&tokens).for_each(|(id, own, top)| l.push(&shared, id, Some(own), top, wanted, offset));
                    l
                });
                if form.only_prompt {
                    text.clear();
                }
                let choice = CompletionChoice { text, index, logprobs, finish_reason: finish };
                events.push(chunk(&shared, vec![choice], None));
                events
            }
            Item::Done(completed) => {
                usage.add(&completed);
                vec![]
            }
            Item::End if include_usage => vec![chunk(&shared, vec![], Some(usage))],
            Item::End => vec![],
        })
    })
}
