//! `/v1/rewrite`: plain prompts into rich ones that keep their meaning; and the routes of the existing web-UI extension.

use super::errors::{ApiError, ErrorBody, Json};
use super::openai::{OneOrMany, PromptTokensDetails, SamplingParams, Usage, now};
use super::sse;
use super::state::{Shared, StateArc};
use super::worker::Reply;
use crate::engine::session::{Completed, GenerateOptions};
use crate::rewrite::{Candidate, DEFAULT_MIN_KEPT, GuardOptions, Prompter, Rewrite, Rewriting, whole_characters};
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use crate::text::template::Template;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::mpsc;
use utoipa::ToSchema;

/// Most prompts of one request, and how many of them are worked on at once.
const MOST_PROMPTS: usize = 256;
const AT_ONCE: usize = 32;

#[derive(Debug, Deserialize, ToSchema)]
pub struct RewriteRequest {
    /// The served model's name, or nothing.
    pub model: Option<String>,
    /// One plain prompt, or up to 256.
    pub prompt: OneOrMany,
    /// "v1", "v2", or a text with {raw} in it; the model's own if not given.
    pub template: Option<String>,
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// Phrases that every candidate must hold.
    pub keep: Option<Vec<String>>,
    /// Phrases that no candidate may hold.
    pub ban: Option<Vec<String>>,
    /// Least part of the prompt's meaning that a candidate keeps; others fall back on the prompt itself. 0.9 if not given; 0 takes
    /// what the model says.
    #[schema(minimum = 0, maximum = 1)]
    pub min_kept: Option<f64>,
    /// How often to generate for it; 3 if not given.
    #[schema(minimum = 1, maximum = 16)]
    pub rounds: Option<u32>,
    /// Most tokens as CLIP counts them; 77 fill Stable Diffusion's text encoder.
    #[schema(minimum = 3)]
    pub max_clip_tokens: Option<usize>,
    /// Server-sent events: pieces of text (`RewritePiece`), then each result (`RewriteResult`).
    pub stream: Option<bool>,
    #[serde(flatten)]
    pub sampling: SamplingParams,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct RewriteResponse {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    /// In the order of the prompts.
    pub results: Vec<RewriteResult>,
    pub usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct RewriteResult {
    /// Which of the prompts.
    pub index: usize,
    pub prompt: String,
    /// The seed that gives these candidates again.
    pub seed: u64,
    /// How often was generated.
    pub rounds: u32,
    /// Those that satisfy what was demanded first.
    pub candidates: Vec<Candidate>,
}

/// New text of a candidate.
#[derive(Debug, Serialize, ToSchema)]
pub struct RewritePiece {
    pub index: usize,
    pub candidate: u32,
    pub round: u32,
    /// Which of the parts between BREAKs.
    pub part: usize,
    pub text: String,
    /// Tokens of this candidate so far.
    pub tokens: usize,
}

fn result(index: usize, r: Rewrite) -> RewriteResult {
    RewriteResult { index, prompt: r.prompt, seed: r.seed, rounds: r.rounds, candidates: r.candidates }
}

fn count(usage: &mut Usage, r: &Rewrite) {
    usage.prompt_tokens += r.prompt_tokens;
    usage.completion_tokens += r.output_tokens;
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
    let cached_tokens = usage.prompt_tokens_details.cached_tokens + r.cached_tokens;
    usage.prompt_tokens_details = PromptTokensDetails { cached_tokens };
}

/// Works until a rewrite is done. If it is the `first` of a request, a full queue refuses it.
async fn drive(
    shared: &Shared,
    mut rewriting: Rewriting,
    index: usize,
    pieces: Option<&mpsc::UnboundedSender<Event>>,
    first: bool,
) -> Result<Rewrite, ApiError> {
    let mut round = 0;
    loop {
        let work = rewriting.work().map_err(|e| ApiError::field("prompt", e.to_string()))?;
        if work.is_empty() {
            return Ok(rewriting.finish());
        }
        let generations = match first && round == 0 {
            true => shared.engine.submit(work).await?,
            false => shared.engine.submit_in_turn(work).await?,
        };
        let completed = stream::iter(generations.into_iter().enumerate().map(|(part, mut generation)| async move {
            let mut counts: Vec<usize> = vec![];
            while let Some(reply) = generation.next().await {
                match reply? {
                    Reply::Done(completed) => return Ok::<Completed, ApiError>(*completed),
                    Reply::Text { candidate, text, tokens, .. } => {
                        let Some(pieces) = pieces else { continue };
                        counts.resize(counts.len().max(candidate as usize + 1), 0);
                        counts[candidate as usize] += tokens.len();
                        let tokens = counts[candidate as usize];
                        let text = whole_characters(&text).into_owned();
                        // nobody may be listening any more
                        let _ = pieces.send(sse::data(&RewritePiece { index, candidate, round, part, text, tokens }));
                    }
                    Reply::Accepted | Reply::Refused(_) | Reply::Failed(_) => {}
                }
            }
            Err(ApiError::internal("the engine has stopped"))
        }))
        .buffered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
        rewriting.take(&completed);
        round += 1;
    }
}

/// Rewrite plain prompts.
#[utoipa::path(
    post,
    path = "/v1/rewrite",
    tag = "Rewriting",
    request_body = RewriteRequest,
    responses(
        (status = 200, description = "The rewrites, or with `stream` server-sent events", content(
            (RewriteResponse = "application/json"), (sse::StreamEvent = "text/event-stream")
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorBody),
        (status = "5XX", description = "The server cannot serve", body = ErrorBody),
    )
)]
pub async fn rewrite(State(shared): StateArc, Json(r): Json<RewriteRequest>) -> Result<Response, ApiError> {
    shared.check_model(r.model.as_deref())?;
    let template = match r.template.as_deref() {
        None => shared.prompter.template.clone(),
        Some(name @ ("v1" | "v2")) => Template::named(name).map_err(|e| ApiError::field("template", e.to_string()))?,
        Some(text) => Template::parse(text).map_err(|e| ApiError::field("template", format!("the template {e}")))?,
    };
    let prompter = Prompter { tokenizer: shared.tokenizer.clone(), template };
    let mut options = r.sampling.options(&shared.defaults, r.max_tokens, &shared)?;
    options.keep = Arc::new(Literals::new(r.keep.unwrap_or_default()));
    if let Some(ban) = r.ban {
        options.ban = Arc::new(Phrases::new(ban));
    }
    if let Some(kept) = r.min_kept.filter(|k| !(0.0..=1.0).contains(k)) {
        return Err(ApiError::field("min_kept", format!("min_kept is {kept}, expected 0 to 1")));
    }
    let rounds = r.rounds.unwrap_or(3);
    if !(1..=16).contains(&rounds) {
        return Err(ApiError::field("rounds", format!("rounds is {rounds}, expected 1 to 16")));
    }
    if let Some(n) = r.max_clip_tokens.filter(|n| *n < 3) {
        return Err(ApiError::field("max_clip_tokens", format!("max_clip_tokens is {n}, expected at least 3")));
    }
    let min_kept = Some(r.min_kept.unwrap_or(DEFAULT_MIN_KEPT)).filter(|least| *least > 0.0);
    let guard = GuardOptions { min_kept, rounds, max_clip_tokens: r.max_clip_tokens, count_clip_tokens: true };
    let prompts = r.prompt.list();
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        let message = format!("there are {} prompts; expected 1 to {MOST_PROMPTS}", prompts.len());
        return Err(ApiError::field("prompt", message));
    }
    let rewritings = prompts
        .iter()
        .map(|p| Rewriting::new(prompter.clone(), p, options.clone(), guard.clone()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| ApiError::field("prompt", e.to_string()))?;
    let id = format!("rewrite-{}", uuid::Uuid::new_v4().simple());
    if r.stream.unwrap_or(false) {
        return Ok(streamed(shared, rewritings));
    }
    let mut usage = Usage::default();
    let mut results = Vec::new();
    let rewrites = all(&shared, rewritings, None).try_collect::<Vec<_>>().await?;
    for (index, rewrite) in rewrites {
        count(&mut usage, &rewrite);
        results.push(result(index, rewrite));
    }
    let model = shared.name.clone();
    Ok(axum::Json(RewriteResponse { id, object: "rewrite", created: now(), model, results, usage }).into_response())
}

/// Rewrites in the order of their prompts. A full queue refuses the first; the others wait for their turn.
fn all<'a>(
    shared: &'a Shared,
    rewritings: Vec<Rewriting>,
    pieces: Option<&'a mpsc::UnboundedSender<Event>>,
) -> impl stream::Stream<Item = Result<(usize, Rewrite), ApiError>> + 'a {
    let drive = move |(index, rewriting)| async move {
        Ok((index, drive(shared, rewriting, index, pieces, index == 0).await?))
    };
    stream::iter(rewritings.into_iter().enumerate()).map(drive).buffered(AT_ONCE)
}

fn streamed(shared: Arc<Shared>, rewritings: Vec<Rewriting>) -> Response {
    let (events, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut usage = Usage::default();
        let work = async {
            let rewrites = std::pin::pin!(all(&shared, rewritings, Some(&events)));
            let sent = rewrites.try_for_each(|(index, rewrite)| {
                count(&mut usage, &rewrite);
                let _ = events.send(sse::data(&result(index, rewrite)));
                std::future::ready(Ok(()))
            });
            let last = match sent.await {
                Ok(()) => sse::data(&serde_json::json!({ "usage": usage })),
                Err(e) => sse::data(&ErrorBody { error: e.detail }),
            };
            let _ = events.send(last);
            let _ = events.send(Event::default().data("[DONE]"));
        };
        // who stops listening stops the work
        tokio::select! {
            () = work => {}
            () = events.closed() => {}
        }
    });
    let events = stream::unfold(receiver, |mut r| async move { Some((Ok::<_, Infallible>(r.recv().await?), r)) });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// A request of the BeautifulPrompt extension for Stable Diffusion's web UI. Its `model_name` is not looked at: there is one model.
#[derive(Debug, Deserialize, ToSchema)]
pub struct GeneratePromptRequest {
    pub raw_prompt: String,
    /// Tokens with the prompt's; 384 if not given.
    #[schema(minimum = 1)]
    pub max_length: Option<usize>,
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repetition_penalty: Option<f64>,
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// 5 if not given.
    #[schema(minimum = 1, maximum = 50)]
    pub num_return_sequences: Option<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct GeneratePromptResponse {
    pub prompts: Vec<String>,
    pub success: bool,
}

/// Rewrite for the web-UI extension.
#[utoipa::path(
    post,
    path = "/beautifulprompt/generate_prompt",
    tag = "Web-UI extension",
    request_body = GeneratePromptRequest,
    responses(
        (status = 200, body = GeneratePromptResponse),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub async fn generate_prompt(
    State(shared): StateArc,
    Json(r): Json<GeneratePromptRequest>,
) -> Result<axum::Json<GeneratePromptResponse>, ApiError> {
    let n = r.num_return_sequences.unwrap_or(5);
    if n > 50 {
        return Err(ApiError::field("num_return_sequences", format!("num_return_sequences is {n}; 50 at most")));
    }
    let sampling = SamplingParams {
        n: Some(n),
        temperature: r.temperature,
        repetition_penalty: r.repetition_penalty,
        top_k: r.top_k,
        top_p: r.top_p,
        ..SamplingParams::default()
    };
    let mut options: GenerateOptions = sampling.options(&shared.defaults, None, &shared)?;
    if let Some(length) = r.max_length {
        options.length = crate::engine::session::Length::Total(length.max(1));
    }
    let rewriting = Rewriting::new(shared.prompter.clone(), &r.raw_prompt, options, GuardOptions::default())
        .map_err(|e| ApiError::field("raw_prompt", e.to_string()))?;
    let rewrite = drive(&shared, rewriting, 0, None, true).await?;
    let prompts = rewrite.candidates.into_iter().map(|c| c.text).collect();
    Ok(axum::Json(GeneratePromptResponse { prompts, success: true }))
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ExtensionModels {
    pub model_list: Vec<String>,
    pub success: bool,
}

/// The models that the web-UI extension can choose from.
#[utoipa::path(
    get,
    path = "/beautifulprompt/model_list",
    tag = "Web-UI extension",
    responses((status = 200, body = ExtensionModels), (status = "4XX", body = ErrorBody))
)]
pub async fn model_list(State(shared): StateArc) -> axum::Json<ExtensionModels> {
    axum::Json(ExtensionModels { model_list: vec![shared.name.clone()], success: true })
}
