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
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Continuations that share the prompt's computation.
    pub candidates: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    /// Fewest new tokens of a candidate.
    pub min_new: usize,
    /// Maximum new tokens of a candidate, at least 1.
    pub max_new: usize,
    /// The end-of-sequence token, which ends a candidate unless `ignore_eos` is set.
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

/// What happened to a request or to one of its candidates.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A request's first tokens are about to be computed, but for `cached` that are there already.
    Started {
        /// The request's id.
        request: u64,
        /// Tokens of the prompt that the prefix cache holds.
        cached: usize,
    },
    /// Some of the prompt's tokens, in order over all such events of a request: log-probability and
    /// likely tokens.
    Prompt {
        /// The request's id.
        request: u64,
        /// For each token, its log-probability in nats and the most likely tokens at its position.
        scores: Vec<(f32, TopTokens)>,
    },
    /// The next token of a candidate. `logprob` is that of the model, before penalties and
    /// temperature.
    Token {
        /// The request's id.
        request: u64,
        /// Which of the request's candidates, from 0.
        candidate: u32,
        /// Id of the token.
        token: u32,
        /// Log-probability of the token, in nats.
        logprob: f32,
        /// The most likely tokens at this position, as many as were asked for.
        top: TopTokens,
        /// Why the candidate ends with this token, if it does.
        finish: Option<FinishReason>,
    },
    /// A candidate ended without a token.
    Ended {
        /// The request's id.
        request: u64,
        /// Which of the request's candidates, from 0.
        candidate: u32,
        /// Why it ended.
        finish: FinishReason,
    },
}

/// What is to become of a candidate after an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The candidate goes on.
    Go,
    /// The candidate ends here.
    End,
    /// Takes back all but `keep` output tokens; at that place `ban` is not chosen again.
    Rewind {
        /// Output tokens that stay.
        keep: usize,
        /// Token that is not chosen again at the next position.
        ban: u32,
    },
    /// Keeps `keep` output tokens and goes on with these.
    Force {
        /// Output tokens that stay.
        keep: usize,
        /// Token ids that come next, whatever the model says.
        tokens: Vec<u32>,
    },
}

/// Who hears what happened to a candidate, and says what is to become of it.
pub(super) type Sink<'s> = &'s mut dyn FnMut(Event) -> Verdict;
