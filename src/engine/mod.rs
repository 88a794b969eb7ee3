//! Requests in, tokens out.
//!
//! There are no phases: every sequence has computed positions chasing its known ones, and each step hands out one
//! token budget, running sequences first, then waiting requests. A request is admitted when the blocks it may ever
//! need are free, so a running sequence never waits for memory. Candidates share their prompt's full blocks.

mod blocks;
mod request;
mod sampling;
pub mod session;
pub mod text;

pub use request::{Event, Finish, Request};
pub use sampling::{Chosen, SampleRow, Sampling, choose};

use crate::error::{Error, Result};
use crate::models::bloom::{Bloom, Scratch};
use crate::ops::{BLOCK, Backend, Batch};
use blocks::Blocks;
use request::{Group, Sequence};
use std::collections::{HashMap, VecDeque};

#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Positions that the KV cache holds; rounded up to whole blocks.
    pub cache_tokens: usize,
    /// Most tokens of one forward pass.
    pub batch_tokens: usize,
    /// Most sequences that run at once.
    pub sequences: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { cache_tokens: 32 * 512, batch_tokens: 512, sequences: 32 }
    }
}

pub struct Engine<'a, B: Backend> {
    backend: &'a B,
    model: &'a Bloom<B>,
    cache: B::Cache,
    blocks: Blocks,
    options: EngineOptions,
    waiting: VecDeque<Request>,
    running: Vec<Sequence>,
    groups: HashMap<u64, Group>,
    scratch: Scratch<B>,
    logits: Vec<f32>,
    /// Tokens computed so far, prompts included.
    pub computed_tokens: u64,
}

impl<'a, B: Backend> Engine<'a, B> {
    pub fn new(backend: &'a B, model: &'a Bloom<B>, options: EngineOptions) -> Result<Engine<'a, B>> {
        let blocks = options.cache_tokens.div_ceil(BLOCK).max(1);
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
            groups: HashMap::new(),
            scratch: Scratch::default(),
            logits: Vec::new(),
            computed_tokens: 0,
        })
    }

    /// Queues a request, or says why it can never run.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(Error::invalid("the prompt has no tokens; expected at least one"));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.model.config.vocab_size) {
            return Err(Error::invalid(format!("token id {id} is outside the model's vocabulary")));
        }
        let context = self.model.config.context;
        if prompt > context {
            return Err(Error::invalid(format!(
                "the prompt has {prompt} tokens, the model's context is {context}; shorten the prompt"
            )));
        }
        if request.blocks() > self.blocks.total() {
            return Err(Error::invalid(format!(
                "the prompt of {prompt} tokens with {} candidates of up to {} needs a KV cache of {} tokens, there are {}; \
                 lower --max-tokens or -n",
                request.candidates,
                request.max_new,
                request.blocks() * BLOCK,
                self.blocks.total() * BLOCK
            )));
        }
        self.waiting.push_back(request);
        Ok(())
    }

    /// Requests that have not started.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Blocks of the KV cache that sequences hold.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.in_use()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One forward pass. `sink` receives what happened; returning `false` for a token ends its candidate.
    pub fn step(&mut self, sink: &mut dyn FnMut(Event) -> bool) -> Result<()> {
        self.admit();
        let mut batch = Batch::default();
        // (running sequence, first token in the batch, tokens)
        let mut spans: Vec<(usize, usize, usize)> = Vec::new();
        let mut budget = self.options.batch_tokens;
        for (i, s) in self.running.iter_mut().enumerate() {
            let n = (s.tokens.len() - s.computed).min(budget);
            if n == 0 {
                continue;
            }
            budget -= n;
            let needed = (s.computed + n).div_ceil(BLOCK);
            while s.blocks.len() < needed {
                s.blocks.push(self.blocks.allocate());
            }
            spans.push((i, batch.ids.len(), n));
            batch.push(&s.tokens[s.computed..s.computed + n], s.computed, &s.blocks);
        }
        if spans.is_empty() {
            return Ok(());
        }
        self.model.forward(self.backend, &batch, &mut self.cache, &mut self.scratch);
        self.computed_tokens += batch.ids.len() as u64;
        for &(i, start, n) in &spans {
            self.score_prompt(i, start, n, sink)?;
            self.running[i].computed += n;
        }
        let ready: Vec<(usize, usize)> = spans
            .iter()
            .filter(|&&(i, _, _)| self.running[i].computed == self.running[i].tokens.len())
            .map(|&(i, start, n)| (i, start + n - 1))
            .collect();
        self.sample(&ready, sink)?;
        self.retire();
        Ok(())
    }

    fn admit(&mut self) {
        let mut running: usize = self.running.iter().map(|s| s.fork.max(1) as usize).sum();
        while let Some(request) = self.waiting.front() {
            let fits = running == 0 || running + request.candidates as usize <= self.options.sequences;
            if !fits || !self.blocks.reserve(request.blocks()) {
                return;
            }
            running += request.candidates as usize;
            let request = self.waiting.pop_front().expect("looked at above");
            let group = Group { left: request.candidates.max(1), reserved: request.blocks() };
            self.groups.insert(request.id, group);
            self.running.push(Sequence::new(request));
        }
    }

    /// Log-probabilities of the prompt's own tokens, where the request asks for them.
    fn score_prompt(&mut self, i: usize, start: usize, n: usize, sink: &mut dyn FnMut(Event) -> bool) -> Result<()> {
        /// Rows of logits in memory at once.
        const ROWS: usize = 16;
        let s = &self.running[i];
        if !s.request.prompt_logprobs || s.computed >= s.prompt {
            return Ok(());
        }
        // position p predicts token p + 1
        let positions: Vec<usize> = (s.computed..s.computed + n).filter(|p| p + 1 < s.prompt).collect();
        let mut logprobs = Vec::with_capacity(positions.len());
        for part in positions.chunks(ROWS) {
            let rows: Vec<usize> = part.iter().map(|p| start + p - s.computed).collect();
            self.model.logits(self.backend, &rows, &mut self.scratch, &mut self.logits)?;
            let vocab = self.logits.len() / rows.len();
            for (row, p) in self.logits.chunks_exact(vocab).zip(part) {
                logprobs.push(sampling::logprob(row, s.tokens[p + 1]));
            }
        }
        let request = s.request.id;
        if s.computed + n >= s.prompt || !logprobs.is_empty() {
            sink(Event::Prompt { request, logprobs });
        }
        Ok(())
    }

    /// Chooses the next token of each `(sequence, row)`; a fresh prompt splits into its candidates.
    fn sample(&mut self, ready: &[(usize, usize)], sink: &mut dyn FnMut(Event) -> bool) -> Result<()> {
        let mut forked = Vec::new();
        for &(i, row) in ready {
            let count = std::mem::replace(&mut self.running[i].fork, 0).max(1);
            for candidate in 1..count {
                let copy = self.fork(i, candidate);
                forked.push((copy, row));
            }
        }
        let mut targets: Vec<(usize, usize)> = ready.to_vec();
        for (s, row) in forked {
            targets.push((self.running.len(), row));
            self.running.push(s);
        }
        let rows: Vec<SampleRow> = targets
            .iter()
            .map(|&(i, row)| {
                let s = &self.running[i];
                SampleRow {
                    row,
                    sampling: &s.request.sampling,
                    seen: &s.seen,
                    candidate: s.candidate,
                    position: s.tokens.len() as u32,
                }
            })
            .collect();
        let chosen = self.model.sample(self.backend, &rows, &mut self.scratch, &mut self.logits)?;
        for (&(i, _), c) in targets.iter().zip(chosen) {
            let s = &mut self.running[i];
            s.push(c.token);
            let finish = if c.token == s.request.eos && !s.request.ignore_eos {
                Some(Finish::Stop)
            } else if s.tokens.len() - s.prompt >= s.request.max_new {
                Some(Finish::Length)
            } else {
                None
            };
            let goes_on = sink(Event::Token {
                request: s.request.id,
                candidate: s.candidate,
                token: c.token,
                logprob: c.logprob,
                finish,
            });
            s.done = finish.is_some() || !goes_on;
        }
        Ok(())
    }

    /// A sequence that shares the full blocks of sequence `i` and has a copy of the last one.
    fn fork(&mut self, i: usize, candidate: u32) -> Sequence {
        let s = &self.running[i];
        let full = s.computed / BLOCK;
        let mut blocks = s.blocks[..full].to_vec();
        blocks.iter().for_each(|&b| self.blocks.share(b));
        if full < s.blocks.len() {
            let copy = self.blocks.allocate();
            self.backend.copy_block(&mut self.cache, s.blocks[full], copy);
            blocks.push(copy);
        }
        s.forked(candidate, blocks)
    }

    fn retire(&mut self) {
        let blocks = &mut self.blocks;
        let groups = &mut self.groups;
        self.running.retain(|s| {
            if s.done {
                s.blocks.iter().for_each(|&b| blocks.release(b));
                let group = groups.get_mut(&s.request.id).expect("every sequence has its group");
                group.left -= 1;
                if group.left == 0 {
                    blocks.unreserve(group.reserved);
                    groups.remove(&s.request.id);
                }
            }
            !s.done
        });
    }
}
