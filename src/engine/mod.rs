//! Requests in, tokens out.
//!
//! There are no phases: every sequence has computed positions chasing its known ones, and each step
//! hands out one token budget, running sequences first, then waiting ones. Full blocks stay
//! findable by what they hold, so that a prompt that begins as an earlier one starts behind it.
//! When blocks run out the newest sequence gives up its own and waits; later it computes them
//! again. Where a device feeds itself the tokens it chooses, a step begins before those of the one
//! before are known (`async_step.rs`). None of this changes a token.

mod async_step;
mod fairness;
mod kv_blocks;
mod request;
mod sampling_job;
mod scheduler;
mod sequence;
mod speculation;
mod step;
mod verify;

pub use crate::ops::sampling::{SampledToken, Sampling, SamplingRow, TopTokens};
pub use request::{Event, FinishReason, Request, Verdict};

use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::models::bloom::Bloom;
use crate::ops::{BLOCK, DecodeBackend, DecoderActivations};
use kv_blocks::Blocks;
use sampling_job::InFlightStep;
use sequence::Sequence;
use speculation::Drafter;
use std::collections::{HashSet, VecDeque};

/// Sizes and switches of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Positions that the KV cache holds; rounded up to whole blocks.
    pub cache_tokens: usize,
    /// Maximum tokens of one forward pass.
    pub batch_tokens: usize,
    /// Maximum sequences that run at once. Requests that wait have a share of them: one with many
    /// candidates gives some of its places up.
    pub sequences: usize,
    /// Whether prompts start behind what earlier ones have in common with them.
    pub prefix_cache: bool,
    /// Maximum tokens guessed ahead of a sequence; 0 for none.
    pub draft_tokens: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            cache_tokens: 32 * 512,
            batch_tokens: 512,
            sequences: 32,
            prefix_cache: true,
            draft_tokens: 0,
        }
    }
}

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Forward passes.
    pub steps: u64,
    /// Tokens of all forward passes: prompts, outputs and drafts.
    pub computed_tokens: u64,
    /// Tokens of prompts that were looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens of looked-up prompts that the prefix cache held already.
    pub prefix_hits: u64,
    /// Sequences that gave up their blocks.
    pub preemptions: u64,
    /// Times that drafted tokens of a sequence were verified.
    pub drafts: u64,
    /// Tokens that the drafter guessed and the model verified.
    pub drafted_tokens: u64,
    /// Drafted tokens that the model chose too.
    pub accepted_tokens: u64,
}

/// Runs requests on a model with continuous batching over a paged KV cache.
pub struct Engine<'a, B: DecodeBackend> {
    backend: &'a B,
    model: &'a Bloom<B>,
    cache: B::Cache,
    blocks: Blocks,
    options: EngineOptions,
    waiting: VecDeque<Sequence>,
    /// The oldest first.
    running: Vec<Sequence>,
    drafter: Drafter,
    activations: DecoderActivations<B>,
    logits: Vec<f32>,
    /// A step whose tokens are not known yet.
    in_flight: Option<InFlightStep<B>>,
    counters: Counters,
}

/// What an engine with these options takes besides the weights.
pub fn memory_plan<B: DecodeBackend>(model: &Bloom<B>, options: &EngineOptions) -> MemoryPlan {
    let positions = options.cache_tokens as f64;
    // a pass never has more tokens than the cache has positions, nor rows of logits than there are
    // tokens
    let tokens = positions.min(options.batch_tokens as f64);
    let rows = tokens.min(options.sequences as f64 * (options.draft_tokens as f64 + 1.0));
    let config = &model.config;
    // activations in f32, and a GEMM's inputs in the type that they are multiplied in
    let activation = (11 * 4 + 4 * 4) * config.hidden_size;
    MemoryPlan::new()
        .with(
            "KV cache",
            positions * model.cache_bytes_per_token() as f64,
            "--cache-tokens, --sequences or -n",
        )
        .with(
            "the cache's table of blocks",
            positions * Blocks::BYTES as f64 / BLOCK as f64,
            "--cache-tokens, --sequences or -n",
        )
        .with("activations", tokens * activation as f64, "--batch-tokens")
        .with("logits", rows * 4.0 * config.vocab_size as f64, "--sequences or --draft-tokens")
}

impl<'a, B: DecodeBackend> Engine<'a, B> {
    /// An engine without requests; reserves the memory of its KV cache.
    ///
    /// # Errors
    /// If the device has no memory for what the options ask for.
    pub fn new(
        backend: &'a B,
        model: &'a Bloom<B>,
        options: EngineOptions,
    ) -> Result<Engine<'a, B>> {
        let blocks = options.cache_tokens.div_ceil(BLOCK).max(1);
        backend.fits(&memory_plan(model, &options))?;
        Ok(Engine {
            backend,
            model,
            cache: model.cache(backend, blocks)?,
            blocks: Blocks::new(blocks),
            options: EngineOptions {
                batch_tokens: options.batch_tokens.max(1),
                sequences: options.sequences.max(1),
                ..options
            },
            waiting: VecDeque::new(),
            running: Vec::new(),
            drafter: Drafter::new(options.draft_tokens),
            activations: DecoderActivations::default(),
            logits: Vec::new(),
            in_flight: None,
            counters: Counters::default(),
        })
    }

    /// Queues a request, or says why it can never run.
    pub fn submit(&mut self, mut request: Request) -> Result<()> {
        request.sampling = request.sampling.effective();
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(Error::invalid("the prompt has no tokens; expected at least one"));
        }
        let named = request.bias.iter().map(|b| &b.0).chain(&request.stop_token_ids);
        if let Some(id) = request
            .prompt
            .iter()
            .chain(named)
            .find(|&&id| id as usize >= self.model.config.vocab_size)
        {
            return Err(Error::invalid(format!("token id {id} is outside the model's vocabulary")));
        }
        let context = self.model.config.context;
        if prompt > context {
            return Err(Error::invalid(format!(
                "the prompt has {prompt} tokens, the model's context is {context}; shorten the \
                prompt"
            )));
        }
        if request.blocks() > self.blocks.total() {
            return Err(Error::invalid(format!(
                "the prompt of {prompt} tokens and up to {} new ones need a KV cache of {} tokens, \
                there are {}; \
                 lower --max-tokens",
                request.max_new,
                request.blocks() * BLOCK,
                self.blocks.total() * BLOCK
            )));
        }
        self.waiting.push_back(Sequence::new(request));
        Ok(())
    }

    /// Ends requests, wherever they are; their blocks are free at once.
    pub fn cancel(&mut self, ids: &[u64]) {
        let ids: HashSet<u64> = ids.iter().copied().collect();
        for s in self.running.iter_mut().chain(&mut self.waiting) {
            s.done |= ids.contains(&s.request.id);
        }
        self.waiting.retain(|s| !s.done);
        self.retire();
    }

    /// What the engine has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Has the drafter expect runs of tokens that outputs often hold.
    pub fn expect_run(&mut self, tokens: &[u32]) {
        self.drafter.learn(tokens);
    }

    /// Sequences that wait, started ones without blocks among them.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Blocks of the KV cache that sequences hold.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.in_use()
    }

    /// Blocks of the whole KV cache.
    pub fn total_blocks(&self) -> usize {
        self.blocks.total()
    }

    /// Forgets all requests and what the cache holds, whatever state a failure left them in.
    pub fn reset(&mut self) {
        self.waiting.clear();
        self.running.clear();
        self.in_flight = None;
        self.blocks = Blocks::new(self.blocks.total());
    }

    /// Panics if the engine's books do not agree; for tests.
    #[doc(hidden)]
    pub fn check(&self) {
        let mut users = vec![0; self.blocks.total()];
        for s in &self.running {
            assert!(!s.done && s.computed < s.tokens.len() + usize::from(self.in_flight.is_some()));
            assert!(s.computed <= s.blocks.len() * BLOCK && s.nodes.len() <= s.blocks.len());
            assert!(s.outputs() <= s.request.max_new);
            s.blocks.iter().for_each(|&b| users[b as usize] += 1);
        }
        assert!(self.waiting.iter().all(|s| !s.done && s.blocks.is_empty() && s.computed == 0));
        assert!(self.running.len() <= self.options.sequences);
        self.blocks.check(&users);
    }

    /// Whether no sequence waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }
}
