//! Requests, and what the engine tells about them.

use super::{Sampling, TopTokens};
use crate::ops::BLOCK;
use std::time::Instant;

/// One prompt and how to continue it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's name for it; unique among requests in flight.
    pub id: u64,
    /// Whose request it is; those of one owner share one share of the places. Its own id if nobody
    /// says.
    pub owner: u64,
    pub prompt: Vec<u32>,
    /// Continuations that share the prompt's computation.
    pub candidates: u32,
    pub sampling: Sampling,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    /// Fewest and most new tokens of a candidate; the most is at least 1.
    pub min_new: usize,
    pub max_new: usize,
    pub eos: u32,
    /// Goes on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Tokens that end a candidate too.
    pub stop_token_ids: Vec<u32>,
    /// Also reports the log-probabilities of the prompt's tokens but the first.
    pub prompt_logprobs: bool,
    /// Likely tokens to report with each.
    pub top_logprobs: usize,
    /// Ends the candidates that are not done then.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A greedy request for `max_new` tokens.
    pub fn new(id: u64, prompt: Vec<u32>, max_new: usize, eos: u32) -> Request {
        Request {
            id,
            owner: id,
            prompt,
            candidates: 1,
            sampling: Sampling::default(),
            bias: Vec::new(),
            min_new: 0,
            max_new,
            eos,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            prompt_logprobs: false,
            top_logprobs: 0,
            deadline: None,
        }
    }

    /// Whether the token ends a candidate.
    pub fn is_stop(&self, token: u32) -> bool {
        (token == self.eos && !self.ignore_eos) || self.stop_token_ids.contains(&token)
    }

    /// Blocks that one candidate may come to use.
    pub fn blocks(&self) -> usize {
        // the last token chosen is never computed
        (self.prompt.len() + self.max_new.max(1) - 1).div_ceil(BLOCK)
    }
}

/// Why a candidate ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The end-of-sequence token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The request's time was over.
    #[serde(rename = "abort")]
    Deadline,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A request's first tokens are about to be computed, but for `cached` that are there already.
    Started { request: u64, cached: usize },
    /// Some of the prompt's tokens, in order over all such events of a request: log-probability and
    /// likely tokens.
    Prompt { request: u64, scores: Vec<(f32, TopTokens)> },
    /// The next token of a candidate. `logprob` is that of the model, before penalties and
    /// temperature.
    Token {
        request: u64,
        candidate: u32,
        token: u32,
        logprob: f32,
        top: TopTokens,
        finish: Option<FinishReason>,
    },
    /// A candidate ended without a token.
    Ended { request: u64, candidate: u32, finish: FinishReason },
}

/// What is to become of a candidate after an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Go,
    End,
    /// Takes back all but `keep` output tokens; at that place `ban` is not chosen again.
    Rewind {
        keep: usize,
        ban: u32,
    },
    /// Keeps `keep` output tokens and goes on with these.
    Force {
        keep: usize,
        tokens: Vec<u32>,
    },
}

/// Who hears what happened to a candidate, and says what is to become of it.
pub(super) type Sink<'s> = &'s mut dyn FnMut(Event) -> Verdict;
