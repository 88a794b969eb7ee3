//! `/v1/completions`: continues texts as they are.

use super::{SamplingParams, StreamOptions, Usage, finite, now, token_text, top_logprobs};
use crate::engine::{FinishReason, Sampling};
use crate::generate::generation_config::GenerationDefaults;
use crate::generate::{Completed, Continuation, GenerateOptions};
use crate::serve::body::{Json, RequestBody};
use crate::serve::engine::Generation;
use crate::serve::errors::{ApiError, ErrorBody};
use crate::serve::layers::RequestId;
use crate::serve::sse::{self, Item};
use crate::serve::state::{Shared, StateArc};
use crate::text::Decoder;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
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

impl RequestBody for CompletionRequest {
    fn check(body: &Value) -> Result<(), ApiError> {
        super::check(body)
    }
}

/// A text, texts, token ids, or lists of those.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, a list of token ids, or a list of such lists"
)]
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
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
    /// Where each token's text begins, in characters (Unicode scalar values) of the choice's text.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// A token that begins at the `offset`-th character, with `wanted` likely ones beside it.
    fn push(
        &mut self,
        shared: &Shared,
        token: (u32, Option<f32>, &[(u32, f32)]),
        wanted: usize,
        offset: usize,
    ) {
        let (id, logprob, top) = token;
        let text = token_text(shared, id);
        self.text_offset.push(offset);
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

/// Turns the bytes at which a choice's tokens end into the characters at which they begin. A token
/// that only begins a character, and one that is no text, end where they begin.
#[derive(Default)]
struct Offsets {
    text: String,
    /// The same place in bytes and in characters: where the next token begins.
    byte: usize,
    character: usize,
}

impl Offsets {
    /// Where the next token begins, which ends at a byte of the text so far.
    fn next(&mut self, end: usize) -> usize {
        let begin = self.character;
        // a stop text that was left out takes tokens' ends with it
        let end =
            (self.byte..=end.min(self.text.len())).rev().find(|b| self.text.is_char_boundary(*b));
        if let Some(end) = end {
            self.character += self.text[self.byte..end].chars().count();
            self.byte = end;
        }
        begin
    }
}

/// What the answer's form depends on.
#[derive(Clone)]
struct Form {
    id: String,
    created: u64,
    echo: bool,
    /// Likely tokens with each, if log-probabilities are wanted.
    logprobs: Option<usize>,
    /// Nothing but the prompt is wanted.
    only_prompt: bool,
}

impl Form {
    fn usage(&self, usage: &mut Usage, completed: &Completed) {
        usage.add(completed);
        if self.only_prompt {
            // the token that was computed with the prompt is no part of the answer
            usage.completion_tokens = 0;
            usage.total_tokens = usage.prompt_tokens;
        }
    }

    fn finish(&self, finish: FinishReason) -> FinishReason {
        if self.only_prompt { FinishReason::Length } else { finish }
    }
}

/// Continue texts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The completion, or with `stream` server-sent events of \
            pieces", content(
            (Completion = "application/json"), (sse::StreamEvent = "text/event-stream")
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorBody),
        (status = "5XX", description = "The server cannot serve", body = ErrorBody),
    )
)]
pub async fn completions(
    State(shared): StateArc,
    RequestId(request_id): RequestId,
    Json(r, bytes): Json<CompletionRequest>,
) -> Result<Response, ApiError> {
    shared.check_model(r.model.as_deref())?;
    let form = Form {
        id: format!("cmpl-{}", uuid::Uuid::new_v4().simple()),
        created: now(),
        echo: r.echo.unwrap_or(false),
        logprobs: r.logprobs.map(|n| top_logprobs(Some(n), "logprobs")).transpose()?,
        only_prompt: r.max_tokens == Some(0),
    };
    if form.only_prompt && !form.echo {
        return Err(ApiError::field(
            "max_tokens",
            "max_tokens is 0, which makes sense with echo alone",
        ));
    }
    let streams = r.stream.unwrap_or(false);
    let include_usage = r.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
    let (own, own_form) = (shared.clone(), form.clone());
    let (prompts, options) = shared.texts.run(bytes, move || prepare(&own, r, &own_form)).await??;
    let work = prompts.iter().map(|ids| (ids.clone(), options.clone())).collect();
    let generations = shared.engine.submit(work, &shared.engine.owner(request_id)).await?;
    if streams {
        return Ok(stream(
            shared,
            generations,
            prompts,
            options.candidates as usize,
            form,
            include_usage,
        ));
    }
    let mut all = Vec::with_capacity(generations.len());
    for generation in generations {
        all.push(generation.complete().await?);
    }
    let cost = all.iter().map(|c| sse::cost(c, form.logprobs.unwrap_or(0))).sum();
    let own = shared.clone();
    shared.texts.run(cost, move || Ok(axum::Json(whole(&own, &all, form)?).into_response())).await?
}

/// Token ids of the prompts, and how to continue them.
fn prepare(
    shared: &Shared,
    r: CompletionRequest,
    form: &Form,
) -> Result<(Vec<Vec<u32>>, GenerateOptions), ApiError> {
    // a plain interface: the model's distribution as it is
    let defaults = GenerationDefaults {
        sampling: Sampling { temperature: 1.0, ..Sampling::default() },
        length: crate::generate::Length::New(16),
    };
    let max_tokens = if form.only_prompt { Some(1) } else { r.max_tokens };
    let mut options = r.sampling.options(&defaults, max_tokens, shared)?;
    options.top_logprobs = form.logprobs.unwrap_or(0);
    options.prompt_logprobs = form.echo && form.logprobs.is_some();
    Ok((prompts(shared, r.prompt)?, options))
}

/// Token ids of the prompts. What cannot fit is refused before it is read.
fn prompts(shared: &Shared, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &String| {
        shared.check_length("prompt", text)?;
        shared.tokenizer.encode(text).map_err(|e| ApiError::field("prompt", e.to_string()))
    };
    let lists = match prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Texts(texts) => {
            shared.engine.check_count(texts.len())?;
            texts.iter().map(encode).collect::<Result<_, _>>()?
        }
        Prompt::Ids(ids) => vec![ids],
        Prompt::IdLists(lists) => lists,
    };
    shared.engine.check_count(lists.len())?;
    match lists.iter().all(|l| !l.is_empty()) && !lists.is_empty() {
        true => Ok(lists),
        false => Err(ApiError::field("prompt", "the prompt is empty")),
    }
}

/// A prompt's text, and the byte at which each of its tokens ends in it.
fn echoed(shared: &Shared, ids: &[u32]) -> Result<(String, Vec<usize>), ApiError> {
    let mut decoder = Decoder::new(&shared.tokenizer);
    let (mut text, mut ends) = (String::new(), Vec::with_capacity(ids.len()));
    let failed = |e: crate::error::Error| ApiError::internal(e.to_string());
    for &id in ids {
        text.push_str(&decoder.push(id).map_err(failed)?);
        ends.push(text.len());
    }
    text.push_str(&decoder.finish().map_err(failed)?);
    Ok((text, ends))
}

fn whole(shared: &Shared, all: &[Completed], form: Form) -> Result<Completion, ApiError> {
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for completed in all {
        form.usage(&mut usage, completed);
        let prompt =
            if form.echo { echoed(shared, &completed.prompt_ids)? } else { Default::default() };
        for c in &completed.candidates {
            choices.push(whole_choice(shared, completed, c, choices.len(), (&form, &prompt)));
        }
    }
    let (id, created, model) = (form.id, form.created, shared.name.clone());
    Ok(Completion { id, object: "text_completion", created, model, choices, usage: Some(usage) })
}

fn whole_choice(
    shared: &Shared,
    completed: &Completed,
    c: &Continuation,
    index: usize,
    (form, prompt): (&Form, &(String, Vec<usize>)),
) -> CompletionChoice {
    let mut offsets = Offsets { text: prompt.0.clone(), ..Offsets::default() };
    if !form.only_prompt {
        offsets.text.push_str(&c.text);
    }
    let logprobs = form.logprobs.map(|wanted| {
        let mut l = CompletionLogprobs::default();
        if form.echo {
            for (i, (&id, &end)) in completed.prompt_ids.iter().zip(&prompt.1).enumerate() {
                // nothing comes before the first
                let score = i.checked_sub(1).and_then(|i| completed.prompt_scores.get(i));
                let top = score.map_or(&[][..], |s| s.1.as_slice());
                l.push(shared, (id, score.map(|s| s.0), top), wanted, offsets.next(end));
            }
            offsets.next(prompt.0.len());
        }
        if !form.only_prompt {
            for t in &c.tokens {
                l.push(
                    shared,
                    (t.id, Some(t.logprob), &t.top),
                    wanted,
                    offsets.next(prompt.0.len() + t.end),
                );
            }
        }
        l
    });
    CompletionChoice {
        text: offsets.text,
        index,
        logprobs,
        finish_reason: Some(form.finish(c.finish)),
    }
}

/// Pieces of all choices as they come.
fn stream(
    shared: Arc<Shared>,
    generations: Vec<Generation>,
    prompts: Vec<Vec<u32>>,
    candidates: usize,
    form: Form,
    include_usage: bool,
) -> Response {
    let mut usage = Usage::default();
    // none before a choice's first piece
    let mut choices: Vec<Option<(Offsets, usize)>> = Vec::new();
    choices.resize_with(candidates * generations.len(), || None);
    sse::respond(generations, move |item| {
        let chunk = |choices: Vec<CompletionChoice>, usage: Option<Usage>| {
            let (id, created, model) = (form.id.clone(), form.created, shared.name.clone());
            sse::data(&Completion { id, object: "text_completion", created, model, choices, usage })
        };
        Ok(match item {
            Item::Text { at, candidate, mut text, tokens, finish } => {
                let index = at * candidates + candidate as usize;
                let mut events = Vec::new();
                if choices[index].is_none() {
                    let mut offsets = Offsets::default();
                    if form.echo {
                        // log-probabilities of the prompt come with a whole answer alone
                        let (text, _) = echoed(&shared, &prompts[at])?;
                        offsets.text.push_str(&text);
                        offsets.next(text.len());
                        let choice =
                            CompletionChoice { text, index, logprobs: None, finish_reason: None };
                        events.push(chunk(vec![choice], None));
                    }
                    let prompt = offsets.text.len();
                    choices[index] = Some((offsets, prompt));
                }
                if form.only_prompt {
                    text.clear();
                }
                let logprobs = match (&mut choices[index], form.logprobs) {
                    (Some((offsets, prompt)), Some(wanted)) if !form.only_prompt => {
                        offsets.text.push_str(&text);
                        let mut l = CompletionLogprobs::default();
                        for t in &tokens {
                            l.push(
                                &shared,
                                (t.id, Some(t.logprob), &t.top),
                                wanted,
                                offsets.next(*prompt + t.end),
                            );
                        }
                        Some(l)
                    }
                    _ => None,
                };
                if !text.is_empty()
                    || finish.is_some()
                    || logprobs.as_ref().is_some_and(|l| !l.tokens.is_empty())
                {
                    let finish_reason = finish.map(|f| form.finish(f));
                    events.push(chunk(
                        vec![CompletionChoice { text, index, logprobs, finish_reason }],
                        None,
                    ));
                }
                events
            }
            Item::Done(completed) => {
                form.usage(&mut usage, &completed);
                vec![]
            }
            Item::End if include_usage => vec![chunk(vec![], Some(usage))],
            Item::End => vec![],
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_count_characters_and_may_stand_still() {
        // two tokens for one character, one without text, an end behind the text and one within a
        // character
        let mut offsets = Offsets { text: "a東b京".into(), ..Offsets::default() };
        let starts: Vec<usize> = [1, 1, 4, 4, 5, 6, 8, 99].map(|end| offsets.next(end)).into();
        assert_eq!(starts, [0, 1, 1, 2, 2, 3, 3, 4]);
    }
}
