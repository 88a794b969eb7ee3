//! How a prompt is to be continued.

use crate::engine::Sampling;
use crate::ops::BLOCK;
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use std::sync::Arc;
use std::time::Instant;

/// How to continue a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Continuations of the prompt; 0 counts as 1.
    pub candidates: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    /// Maximum tokens of a continuation.
    pub length: Length,
    /// No end before so many tokens.
    pub min_new: usize,
    /// Goes on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Texts that end a continuation, and are left out unless `include_stop` says otherwise. They
    /// do not count before `min_new` tokens, nor within what has to be kept.
    pub stops: Vec<String>,
    /// Tokens that end a continuation, as `stops` do.
    pub stop_token_ids: Vec<u32>,
    /// Whether the text that ends a continuation is part of it.
    pub include_stop: bool,
    /// Phrases that a continuation must not hold.
    pub ban: Arc<Phrases>,
    /// Texts that a continuation must hold.
    pub keep: Arc<Literals>,
    /// Also reports the log-probabilities of the prompt's tokens but the first.
    pub prompt_logprobs: bool,
    /// Likely tokens to report with each token.
    pub top_logprobs: usize,
    /// Ends the continuations that are not done then.
    pub deadline: Option<Instant>,
    /// Whose prompt it is: prompts of one owner share one share of the places; each has its own if
    /// not given.
    pub owner: Option<u64>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            candidates: 1,
            sampling: Sampling::default(),
            bias: Vec::new(),
            length: Length::New(128),
            min_new: 0,
            ignore_eos: false,
            stops: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop: false,
            ban: Arc::default(),
            keep: Arc::default(),
            prompt_logprobs: false,
            top_logprobs: 0,
            deadline: None,
            owner: None,
        }
    }
}

impl GenerateOptions {
    /// Positions of the KV cache that a prompt of so many tokens may take alone, with all its
    /// candidates, in a model of this `context`.
    pub fn cache_tokens(&self, prompt: usize, context: usize) -> usize {
        let new = match self.length {
            Length::New(n) => n,
            Length::Total(n) => n.saturating_sub(prompt).max(1),
        };
        let new = new.min(context.saturating_sub(prompt).max(1));
        // whole blocks: the last of the prompt and the last of the output may be begun ones
        (prompt + new + 2 * BLOCK) * self.candidates.max(1) as usize
    }
}

/// When a continuation is long enough.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// New tokens.
    New(usize),
    /// Tokens with the prompt's.
    Total(usize),
}
