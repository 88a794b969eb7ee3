//! `/v1/rewrite`: plain prompts into rich ones that keep their meaning; and the routes of the
//! existing web-UI extension.

use super::body::{Json, RequestBody};
use super::engine::{Generation, Owner, Reply};
use super::errors::{ApiError, ErrorBody};
use super::layers::RequestId;
use super::openai::{OneOrMany, PromptTokensDetails, SamplingParams, Usage, bans, keeps, now};
use super::sse;
use super::state::{Shared, StateArc};
use crate::generate::{Completed, GenerateOptions};
use crate::random::prompt_seed;
use crate::rewrite::{
    Additions, Candidate, DEFAULT_MIN_KEPT, GuardOptions, Prompter, Rewrite, Rewriting, Style,
    whole_characters,
};
use crate::text::template::Template;
use axum::extract::State;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use utoipa::ToSchema;

/// Maximum prompts of one request, and how many of them are worked on at once.
const MAX_PROMPTS: usize = 256;
const AT_ONCE: usize = 32;

/// Maximum parts between BREAKs of a prompt.
const MAX_PARTS: usize = 64;

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
    #[schema(max_items = 256)]
    pub keep: Option<Vec<String>>,
    /// Phrases that no candidate may hold.
    #[schema(max_items = 10000)]
    pub ban: Option<Vec<String>>,
    /// Least part of the prompt's meaning that a candidate keeps; others fall back on the prompt
    /// itself. 0.9 if not given; 0 takes what the model says.
    #[schema(minimum = 0, maximum = 1)]
    pub min_kept: Option<f64>,
    /// How often to generate for it; 3 if not given.
    #[schema(minimum = 1, maximum = 16)]
    pub rounds: Option<u32>,
    /// Maximum tokens as CLIP counts them; 77 fill Stable Diffusion's text encoder.
    #[schema(minimum = 3)]
    pub max_clip_tokens: Option<usize>,
    /// A built-in style, such as "photo", "product" or "anime".
    pub style: Option<String>,
    /// Adds no names of artists.
    pub no_artists: Option<bool>,
    /// Also adds media that exclude the one that a prompt names.
    pub any_medium: Option<bool>,
    /// Part of the common style phrases that each prompt does without, drawn by its seed.
    #[schema(minimum = 0, maximum = 1)]
    pub variety: Option<f32>,
    /// Server-sent events: pieces of text (`RewritePiece`), then each result (`RewriteResult`).
    pub stream: Option<bool>,
    #[serde(flatten)]
    pub sampling: SamplingParams,
}

impl RequestBody for RewriteRequest {
    fn check(body: &Value) -> Result<(), ApiError> {
        super::openai::check(body)
    }
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
    RewriteResult {
        index,
        prompt: r.prompt,
        seed: r.seed,
        rounds: r.rounds,
        candidates: r.candidates,
    }
}

fn count(usage: &mut Usage, r: &Rewrite) {
    usage.prompt_tokens += r.prompt_tokens;
    usage.completion_tokens += r.output_tokens;
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
    let cached_tokens = usage.prompt_tokens_details.cached_tokens + r.cached_tokens;
    usage.prompt_tokens_details = PromptTokensDetails { cached_tokens };
}

/// What a request's prompts are worked on with.
#[derive(Clone)]
struct Job {
    shared: Arc<Shared>,
    owner: Owner,
    /// Where pieces of text go, if anybody wants them.
    pieces: Option<mpsc::Sender<Event>>,
}

impl Job {
    /// Works until a rewrite is done. If it is the `first` of a request, a full queue refuses it.
    async fn drive(
        &self,
        rewriting: Rewriting,
        index: usize,
        first: bool,
    ) -> Result<Rewrite, ApiError> {
        let texts = &self.shared.texts;
        let cost = rewriting.text_bytes();
        let mut rewriting = rewriting;
        let mut round = 0;
        loop {
            let mut owned = rewriting;
            let (work, owned) = texts.run(cost, move || (owned.work(), owned)).await?;
            rewriting = owned;
            let work = work.map_err(|e| ApiError::field("prompt", e.to_string()))?;
            if work.is_empty() {
                return texts.run(cost, move || rewriting.finish()).await;
            }
            let generations = match first && round == 0 {
                true => self.shared.engine.submit(work, &self.owner).await?,
                false => self.shared.engine.submit_in_turn(work, &self.owner).await?,
            };
            let parts = generations
                .into_iter()
                .enumerate()
                .map(|(part, g)| self.part(g, index, round, part));
            let completed = stream::iter(parts).buffered(AT_ONCE).try_collect::<Vec<_>>().await?;
            let mut owned = rewriting;
            let take = move || {
                owned.take(&completed);
                owned
            };
            rewriting = texts.run(cost, take).await?;
            round += 1;
        }
    }

    /// One part of a prompt in one round, and its pieces on the way.
    async fn part(
        &self,
        mut generation: Generation,
        index: usize,
        round: u32,
        part: usize,
    ) -> Result<Completed, ApiError> {
        let mut counts: Vec<usize> = vec![];
        while let Some(reply) = generation.next().await {
            let (candidate, text, tokens) = match reply? {
                Reply::Done(completed) => return Ok(*completed),
                Reply::Text { candidate, text, tokens, .. } => (candidate, text, tokens),
                Reply::Accepted | Reply::Refused(_) | Reply::Failed(_) => continue,
            };
            counts.resize(counts.len().max(candidate as usize + 1), 0);
            counts[candidate as usize] += tokens.len();
            let tokens = counts[candidate as usize];
            if let Some(pieces) = self.pieces.as_ref().filter(|_| !text.is_empty()) {
                let text = whole_characters(&text).into_owned();
                // nobody may be listening any more
                let _ = pieces
                    .send(sse::data(&RewritePiece { index, candidate, round, part, text, tokens }))
                    .await;
            }
        }
        Err(ApiError::internal("the engine has stopped"))
    }

    /// Rewrites in the order of their prompts. A full queue refuses the first; the others wait for
    /// their turn.
    fn all(
        &self,
        rewritings: Vec<Rewriting>,
    ) -> impl stream::Stream<Item = Result<(usize, Rewrite), ApiError>> + '_ {
        let drive = move |(index, rewriting)| async move {
            Ok((index, self.drive(rewriting, index, index == 0).await?))
        };
        stream::iter(rewritings.into_iter().enumerate()).map(drive).buffered(AT_ONCE)
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
pub async fn rewrite(
    State(shared): StateArc,
    RequestId(request_id): RequestId,
    Json(r, bytes): Json<RewriteRequest>,
) -> Result<Response, ApiError> {
    shared.check_model(r.model.as_deref())?;
    let streams = r.stream.unwrap_or(false);
    let own = shared.clone();
    let rewritings = shared.texts.run(bytes, move || rewritings(&own, r)).await??;
    let job = Job { shared: shared.clone(), owner: shared.engine.owner(request_id), pieces: None };
    if streams {
        return streamed(job, rewritings).await;
    }
    let mut usage = Usage::default();
    let mut results = Vec::new();
    let rewrites = job.all(rewritings).try_collect::<Vec<_>>().await?;
    for (index, rewrite) in rewrites {
        count(&mut usage, &rewrite);
        results.push(result(index, rewrite));
    }
    let id = format!("rewrite-{}", uuid::Uuid::new_v4().simple());
    let model = shared.name.clone();
    Ok(axum::Json(RewriteResponse { id, object: "rewrite", created: now(), model, results, usage })
        .into_response())
}

/// A request's prompts, ready to be worked on. What cannot fit is refused before it is read.
fn rewritings(shared: &Shared, r: RewriteRequest) -> Result<Vec<Rewriting>, ApiError> {
    let prompts = r.prompt.list();
    if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
        let message = format!("there are {} prompts; expected 1 to {MAX_PROMPTS}", prompts.len());
        return Err(ApiError::field("prompt", message));
    }
    prompts.iter().try_for_each(|p| check_prompt(shared, "prompt", p))?;
    let template = match r.template.as_deref() {
        None => shared.prompter.template.clone(),
        Some(name @ ("v1" | "v2")) => {
            Template::named(name).map_err(|e| ApiError::field("template", e.to_string()))?
        }
        Some(text) => {
            shared.check_length("template", text)?;
            Template::parse(text)
                .map_err(|e| ApiError::field("template", format!("the template {e}")))?
        }
    };
    let prompter = Prompter { tokenizer: shared.tokenizer.clone(), template };
    let mut options = r.sampling.options(&shared.defaults, r.max_tokens, shared)?;
    options.keep = keeps(r.keep)?;
    if let Some(ban) = r.ban {
        options.ban = bans(ban)?;
    }
    if let Some(kept) = r.min_kept.filter(|k| !(0.0..=1.0).contains(k)) {
        return Err(ApiError::field("min_kept", format!("min_kept is {kept}, expected 0 to 1")));
    }
    let rounds = r.rounds.unwrap_or(3);
    if !(1..=16).contains(&rounds) {
        return Err(ApiError::field("rounds", format!("rounds is {rounds}, expected 1 to 16")));
    }
    if let Some(n) = r.max_clip_tokens.filter(|n| *n < 3) {
        return Err(ApiError::field(
            "max_clip_tokens",
            format!("max_clip_tokens is {n}, expected at least 3"),
        ));
    }
    let min_kept = Some(r.min_kept.unwrap_or(DEFAULT_MIN_KEPT)).filter(|least| *least > 0.0);
    let additions = additions(r.style.as_deref(), r.no_artists, r.any_medium, r.variety)?;
    let guard = GuardOptions {
        min_kept,
        rounds,
        max_clip_tokens: r.max_clip_tokens,
        count_clip_tokens: true,
        additions,
    };
    let make = |(i, p): (usize, &String)| {
        let mut options = options.clone();
        options.sampling.seed = prompt_seed(options.sampling.seed, i, prompts.len());
        Rewriting::new(prompter.clone(), p, options, guard.clone())
    };
    let made = prompts.iter().enumerate().map(make).collect::<Result<Vec<_>, _>>();
    made.map_err(|e| ApiError::field("prompt", e.to_string()))
}

/// What a request allows to be added.
fn additions(
    style: Option<&str>,
    no_artists: Option<bool>,
    any_medium: Option<bool>,
    variety: Option<f32>,
) -> Result<Additions, ApiError> {
    // names alone: a client must not have the server read its files
    let style = match style {
        None => None,
        Some(name) => Some(Style::built_in(name).ok_or_else(|| {
            let known = Style::names().join(", ");
            ApiError::field("style", format!("there is no style \"{name}\"; styles are {known}"))
        })?),
    };
    let variety = variety.unwrap_or(0.0);
    if !(0.0..=1.0).contains(&variety) {
        return Err(ApiError::field("variety", format!("variety is {variety}, expected 0 to 1")));
    }
    let (no_artists, any_medium) = (no_artists.unwrap_or(false), any_medium.unwrap_or(false));
    Ok(Additions { style, no_artists, any_medium, variety })
}

/// Fails if a prompt is too long, or is cut into too many parts, each of which the model would be
/// asked for.
fn check_prompt(shared: &Shared, field: &str, prompt: &str) -> Result<(), ApiError> {
    shared.check_length(field, prompt)?;
    match prompt.matches("BREAK").count() {
        breaks if breaks < MAX_PARTS => Ok(()),
        breaks => Err(ApiError::field(
            field,
            format!("{field} has {breaks} BREAKs; {} at most", MAX_PARTS - 1),
        )),
    }
}

/// Answers in pieces from the first one on; what fails before it is the answer itself.
async fn streamed(job: Job, rewritings: Vec<Rewriting>) -> Result<Response, ApiError> {
    // a listener who is slow holds up the reading of pieces, not the engine
    let (events, mut receiver) = mpsc::channel(256);
    let (refusal, mut refused) = oneshot::channel();
    let mut refusal = Some(refusal);
    tokio::spawn(async move {
        let job = Job { pieces: Some(events.clone()), ..job };
        let mut usage = Usage::default();
        let work = async {
            let mut rewrites = std::pin::pin!(job.all(rewritings));
            let last = loop {
                match rewrites.next().await {
                    Some(Ok((index, rewrite))) => {
                        count(&mut usage, &rewrite);
                        let _ = events.send(sse::data(&result(index, rewrite))).await;
                    }
                    Some(Err(e)) => {
                        let unsent = match refusal.take() {
                            Some(refusal) => refusal.send(e),
                            None => Err(e),
                        };
                        match unsent {
                            Ok(()) => return,
                            Err(e) => break sse::data(&ErrorBody { error: e.detail }),
                        }
                    }
                    None => break sse::data(&serde_json::json!({ "usage": usage })),
                }
            };
            let _ = events.send(last).await;
            let _ = events.send(Event::default().data("[DONE]")).await;
        };
        // who stops listening stops the work
        tokio::select! {
            () = work => {}
            () = events.closed() => {}
        }
    });
    let first = tokio::select! {
        biased;
        Ok(e) = &mut refused => return Err(e),
        first = receiver.recv() => first,
    };
    // from here on there is an answer, and a failure is a part of it
    drop(refused);
    let rest = stream::unfold(receiver, |mut r| async move { Some((r.recv().await?, r)) });
    let events = stream::iter(first).chain(rest).map(Ok::<_, Infallible>);
    Ok(Sse::new(events).keep_alive(sse::keep_alive()).into_response())
}

/// A request of the BeautifulPrompt extension for Stable Diffusion's web UI. Its `model_name` is
/// not looked at: there is one model.
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

impl RequestBody for GeneratePromptRequest {}

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
    RequestId(request_id): RequestId,
    Json(r, bytes): Json<GeneratePromptRequest>,
) -> Result<axum::Json<GeneratePromptResponse>, ApiError> {
    let n = r.num_return_sequences.unwrap_or(5);
    if n > 50 {
        return Err(ApiError::field(
            "num_return_sequences",
            format!("num_return_sequences is {n}; 50 at most"),
        ));
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
        options.length = crate::generate::Length::Total(length.max(1));
    }
    let own = shared.clone();
    let make = move || {
        check_prompt(&own, "raw_prompt", &r.raw_prompt)?;
        Rewriting::new(own.prompter.clone(), &r.raw_prompt, options, GuardOptions::default())
            .map_err(|e| ApiError::field("raw_prompt", e.to_string()))
    };
    let rewriting = shared.texts.run(bytes, make).await??;
    let job = Job { owner: shared.engine.owner(request_id), shared, pieces: None };
    let rewrite = job.drive(rewriting, 0, true).await?;
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
