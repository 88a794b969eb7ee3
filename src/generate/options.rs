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
    pub candidates: u32,
    pub sampling: Sampling,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    pub length: Length,
    /// No end before so many tokens.
    pub min_new: usize,
    pub ignore_eos: bool,
    /// Texts and tokens that end a continuation, and are left out unless `include_stop` says
    /// otherwise. They do not count before `min_new` tokens, nor within what has to be kept.
    pub stops: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop: bool,
    /// What a continuation must not hold, and what it must.
    pub ban: Arc<Phrases>,
    pub keep: Arc<Literals>,
    pub prompt_logprobs: bool,
    pub top_logprobs: usize,
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
