//! OpenAI's API: what its endpoints have in common.

pub mod chat;
pub mod completions;
pub mod models;
mod unsupported;

use super::body::read;
use super::errors::ApiError;
use super::state::Shared;
use crate::engine::Sampling;
use crate::generate::generation_config::GenerationDefaults;
use crate::generate::text::Token;
use crate::generate::{Completed, GenerateOptions, Length};
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use utoipa::ToSchema;

/// Maximum candidates of a prompt, and likely tokens reported with each.
const MAX_CANDIDATES: u32 = 128;
const MAX_LOGPROBS: usize = 20;

/// Maximum texts and tokens that end a candidate, phrases to ban and to keep, tokens with
/// a bias. Each costs time with every token.
const MAX_STOPS: usize = 16;
const MAX_STOP_TOKENS: usize = 256;
const MAX_BANS: usize = 10_000;
const MAX_KEEPS: usize = 256;
const MAX_BIASES: usize = 1024;

/// Maximum bytes of a stop text, and of a phrase.
const MAX_PHRASE_BYTES: usize = 1024;

/// Below this temperature the likeliest token is as good as certain, and logits divided by it could
/// overflow.
const GREEDY: f32 = 1e-5;

/// One text or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn list(self) -> Vec<String> {
        match self {
            OneOrMany::One(s) => vec![s],
            OneOrMany::Many(l) => l,
        }
    }
}

/// How to sample: OpenAI's parameters and vLLM's additions.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct SamplingParams {
    /// Candidates for each prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
    /// 0, and what is below 0.00001, always takes the most likely token.
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// 0 or -1 for all tokens.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repetition_penalty: Option<f64>,
    /// Whether the repetition penalty counts the prompt's tokens too, as in transformers.
    pub penalize_prompt: Option<bool>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by id; -100 to 100, for at most 1,024 tokens.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed gives the same texts, whatever else the server does.
    pub seed: Option<i64>,
    /// Texts that end a candidate, and are left out; at most 16.
    pub stop: Option<OneOrMany>,
    /// Tokens that end a candidate, by id, besides the end of sequence.
    #[schema(max_items = 256)]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Whether the stop text or token that ended a candidate is part of its text.
    pub include_stop_str_in_output: Option<bool>,
    /// Phrases that a candidate must not hold, however they are cut into tokens.
    #[schema(max_items = 10000)]
    pub bad_words: Option<Vec<String>>,
    #[schema(minimum = 0)]
    pub min_tokens: Option<u32>,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: Option<bool>,
    /// Seconds until the request ends with what there is by then.
    #[schema(exclusive_minimum = 0, maximum = 86400)]
    pub timeout: Option<f64>,
}

fn above_zero(name: &str, v: Option<f64>, default: f32, to: f64) -> Result<f32, ApiError> {
    match v {
        None => Ok(default),
        // a double's least numbers are none for the engine
        Some(v) if v > 0.0 && v <= to => Ok((v as f32).max(f32::MIN_POSITIVE)),
        Some(v) => {
            Err(ApiError::field(name, format!("{name} is {v}, expected above 0, at most {to}")))
        }
    }
}
fn within<T: PartialOrd + std::fmt::Display>(
    name: &str,
    v: T,
    from: T,
    to: T,
) -> Result<T, ApiError> {
    if v >= from && v <= to {
        return Ok(v);
    }
    Err(ApiError::field(name, format!("{name} is {v}, expected {from} to {to}")))
}

/// How long a candidate gets, at least `min_new` tokens.
fn length(max_tokens: Option<u32>, min_new: usize, default: Length) -> Result<Length, ApiError> {
    let length = match max_tokens {
        Some(0) => {
            return Err(ApiError::field("max_tokens", "max_tokens is 0, expected at least 1"));
        }
        Some(n) => Length::New(n as usize),
        None => default,
    };
    if let (Some(most), true) = (max_tokens, matches!(length, Length::New(n) if n < min_new)) {
        let message = format!("min_tokens is {min_new}, more than the max_tokens of {most}");
        return Err(ApiError::field("min_tokens", message));
    }
    Ok(length)
}

impl SamplingParams {
    /// How tokens are drawn; `d` holds where the request says nothing.
    fn sampling(&self, d: Sampling) -> Result<Sampling, ApiError> {
        let top_k = within("top_k", self.top_k.unwrap_or(d.top_k as i64), -1, i64::MAX)?;
        let temperature =
            within("temperature", self.temperature.unwrap_or(d.temperature), 0.0, 100.0)?;
        Ok(Sampling {
            temperature: if temperature < GREEDY { 0.0 } else { temperature },
            top_k: top_k.max(0) as usize,
            top_p: above_zero("top_p", self.top_p, d.top_p, 1.0)?,
            min_p: within("min_p", self.min_p.unwrap_or(d.min_p), 0.0, 1.0)?,
            repetition_penalty: above_zero(
                "repetition_penalty",
                self.repetition_penalty,
                d.repetition_penalty,
                100.0,
            )?,
            penalize_prompt: self.penalize_prompt.unwrap_or(d.penalize_prompt),
            presence_penalty: within(
                "presence_penalty",
                self.presence_penalty.unwrap_or(0.0),
                -2.0,
                2.0,
            )?,
            frequency_penalty: within(
                "frequency_penalty",
                self.frequency_penalty.unwrap_or(0.0),
                -2.0,
                2.0,
            )?,
            seed: self.seed.map_or_else(crate::random::seed, |s| s as u64),
        })
    }

    /// What is added to the logits of which tokens.
    fn bias(&self, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let mut bias = Vec::new();
        most("logit_bias", self.logit_bias.as_ref().map_or(0, BTreeMap::len), MAX_BIASES)?;
        for (token, value) in self.logit_bias.iter().flatten() {
            let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocabulary);
            let id = id.ok_or_else(|| {
                ApiError::field(
                    "logit_bias",
                    format!("logit_bias names \"{token}\", which is no token id of this model"),
                )
            })?;
            bias.push((id, within("logit_bias", *value, -100.0, 100.0)?));
        }
        Ok(bias)
    }

    /// How long the request may take, where the server has a limit or not.
    fn timeout(&self, limit: Option<Duration>) -> Result<Option<Duration>, ApiError> {
        let own =
            self.timeout.map(|t| above_zero("timeout", Some(t), 0.0, 86_400.0)).transpose()?;
        Ok(own
            .map(Duration::from_secs_f32)
            .map_or(limit, |own| Some(limit.map_or(own, |l| own.min(l)))))
    }

    /// What an engine needs to know; `defaults` hold where the request says nothing.
    pub fn options(
        mut self,
        defaults: &GenerationDefaults,
        max_tokens: Option<u32>,
        shared: &Shared,
    ) -> Result<GenerateOptions, ApiError> {
        let sampling = self.sampling(defaults.sampling)?;
        let bias = self.bias(shared.config.vocab_size)?;
        let stops = self.stop.take().map(OneOrMany::list).unwrap_or_default();
        check_phrases("stop", &stops, MAX_STOPS)?;
        let ban = banned("bad_words", self.bad_words.take().unwrap_or_default())?;
        let stop_token_ids = self.stop_token_ids.take().unwrap_or_default();
        most("stop_token_ids", stop_token_ids.len(), MAX_STOP_TOKENS)?;
        if let Some(id) = stop_token_ids.iter().find(|id| **id as usize >= shared.config.vocab_size)
        {
            let message = format!("stop_token_ids names {id}, which is no token id of this model");
            return Err(ApiError::field("stop_token_ids", message));
        }
        let timeout = self.timeout(shared.request_timeout)?;
        let min_new = self.min_tokens.unwrap_or(0) as usize;
        let length = length(max_tokens, min_new, defaults.length)?;
        Ok(GenerateOptions {
            candidates: within("n", self.n.unwrap_or(1), 1, MAX_CANDIDATES)?,
            sampling,
            bias,
            length,
            min_new,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stops,
            stop_token_ids,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ban,
            deadline: timeout.map(|t| Instant::now() + t),
            ..GenerateOptions::default()
        })
    }
}

/// Reads the sampling parameters of a body on their own, so that an error names the field, and
/// refuses what is not supported.
pub fn check(body: &Value) -> Result<(), ApiError> {
    read::<SamplingParams>(body)?;
    unsupported::check(body)
}

/// Fails if a list is too long.
fn most(field: &str, count: usize, limit: usize) -> Result<(), ApiError> {
    match count <= limit {
        true => Ok(()),
        false => {
            Err(ApiError::field(field, format!("{field} has {count} entries; {limit} at most")))
        }
    }
}

/// Fails if there are too many phrases, or one is too long.
fn check_phrases(field: &str, phrases: &[String], limit: usize) -> Result<(), ApiError> {
    most(field, phrases.len(), limit)?;
    match phrases.iter().find(|p| p.len() > MAX_PHRASE_BYTES) {
        None => Ok(()),
        Some(long) => {
            let message =
                format!("{field} has an entry of {} bytes; {MAX_PHRASE_BYTES} at most", long.len());
            Err(ApiError::field(field, message))
        }
    }
}

/// The phrases of a field that no candidate may hold.
fn banned(field: &str, list: Vec<String>) -> Result<Arc<Phrases>, ApiError> {
    check_phrases(field, &list, MAX_BANS)?;
    let phrases =
        Phrases::checked(list).map_err(|e| ApiError::field(field, format!("{field} {e}")))?;
    Ok(Arc::new(phrases))
}

/// Phrases that a request asks to hold.
pub fn keeps(list: Option<Vec<String>>) -> Result<Arc<Literals>, ApiError> {
    let list = list.unwrap_or_default();
    check_phrases("keep", &list, MAX_KEEPS)?;
    Ok(Arc::new(Literals::new(list)))
}

/// Phrases that a request asks to lack.
pub fn bans(list: Vec<String>) -> Result<Arc<Phrases>, ApiError> {
    banned("ban", list)
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: usize,
}

impl Usage {
    pub fn add(&mut self, completed: &Completed) {
        self.prompt_tokens += completed.prompt_ids.len();
        self.completion_tokens +=
            completed.candidates.iter().map(|c| c.tokens.len()).sum::<usize>();
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
        self.prompt_tokens_details.cached_tokens += completed.cached;
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// How many likely tokens to report.
fn top_logprobs(asked: Option<u32>, name: &str) -> Result<usize, ApiError> {
    match asked.unwrap_or(0) as usize {
        n if n <= MAX_LOGPROBS => Ok(n),
        n => Err(ApiError::field(name, format!("{name} is {n}; {MAX_LOGPROBS} at most"))),
    }
}

/// Log-probabilities that JSON can hold.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// What a token alone says.
fn token_text(shared: &Shared, id: u32) -> String {
    String::from_utf8_lossy(&shared.tokenizer.token_bytes(id)).into_owned()
}

/// Tokens with the likely ones beside each.
fn with_top(tokens: &[Token]) -> impl Iterator<Item = (u32, f32, &[(u32, f32)])> {
    tokens.iter().map(|t| (t.id, t.logprob, t.top.as_slice()))
}
