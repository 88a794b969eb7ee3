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
mod sampling;
mod speculation;

pub use request::{Event, Finish, Request, Verdict};
pub use sampling::{Chosen, SampleRow, Sampling, Top, choose, log_sum_exp};

use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::models::bloom::{Bloom, Scratch};
use crate::ops::{BLOCK, Backend, Batch};
use async_step::Flight;
use kv_blocks::Blocks;
use request::Sequence;
use speculation::Drafter;
use std::collections::VecDeque;
use std::time::Instant;

#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Positions that the KV cache holds; rounded up to whole blocks.
    pub cache_tokens: usize,
    /// Most tokens of one forward pass.
    pub batch_tokens: usize,
    /// Most sequences that run at once. Requests that wait have a share of them: one with many
    /// candidates gives some of its places up.
    pub sequences: usize,
    /// Whether prompts start behind what earlier ones have in common with them.
    pub prefix_cache: bool,
    /// Most tokens guessed ahead of a sequence; 0 for none.
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
    /// Forward passes, and their tokens: prompts, outputs, and drafts.
    pub steps: u64,
    pub computed_tokens: u64,
    /// Tokens of prompts that were looked up, and those that were found computed.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    /// Sequences that gave up their blocks.
    pub preemptions: u64,
    pub drafts: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
}

pub struct Engine<'a, B: Backend> {
    backend: &'a B,
    model: &'a Bloom<B>,
    cache: B::Cache,
    blocks: Blocks,
    options: EngineOptions,
    waiting: VecDeque<Sequence>,
    /// The oldest first.
    running: Vec<Sequence>,
    drafter: Drafter,
    scratch: Scratch<B>,
    logits: Vec<f32>,
    /// A step whose tokens are not known yet.
    flight: Option<Flight<B>>,
    pub counters: Counters,
}

/// A running sequence's part of a step.
struct Planned {
    /// Among the running ones.
    at: usize,
    /// First token in the batch, known tokens from there, and guesses or forced tokens after those.
    start: usize,
    known: usize,
    ahead: Vec<u32>,
}

/// A choice to make, with what it is made from.
struct Choice {
    /// Running sequence, and how many guesses and unknown tokens come before the choice.
    at: usize,
    ahead: usize,
    /// Token of the batch.
    row: usize,
    /// Tokens that count as seen, if they are not just the sequence's.
    seen: Option<Vec<u32>>,
    /// The choice of the step before whose token comes first, and is not known yet.
    fed: Option<usize>,
    bias: Vec<(u32, f32)>,
}

/// The choices as a backend takes them.
fn sample_rows<'c>(running: &'c [Sequence], choices: &'c [Choice]) -> Vec<SampleRow<'c>> {
    let row = |c: &'c Choice| {
        let s = &running[c.at];
        SampleRow {
            row: c.row,
            sampling: &s.request.sampling,
            seen: c.seen.as_deref().unwrap_or(&s.seen),
            fed: c.fed.filter(|_| s.request.sampling.repetition_penalty != 1.0),
            bias: &c.bias,
            forced: s.forced.get(c.ahead).copied(),
            top: s.request.top_logprobs,
            candidate: s.candidate,
            position: (s.tokens.len() + c.ahead) as u32,
        }
    };
    choices.iter().map(row).collect()
}

/// What an engine with these options takes beside the weights.
pub fn plan<B: Backend>(model: &Bloom<B>, options: &EngineOptions) -> MemoryPlan {
    let positions = options.cache_tokens as f64;
    // a pass never has more tokens than the cache has positions, nor rows of logits than there are
    // tokens
    let tokens = positions.min(options.batch_tokens as f64);
    let rows = tokens.min(options.sequences as f64 * (options.draft_tokens as f64 + 1.0));
    let config = &model.config;
    // activations in f32, and a product's inputs in the type that they are multiplied in
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

type Sink<'s> = &'s mut dyn FnMut(Event) -> Verdict;

impl<'a, B: Backend> Engine<'a, B> {
    pub fn new(
        backend: &'a B,
        model: &'a Bloom<B>,
        options: EngineOptions,
    ) -> Result<Engine<'a, B>> {
        let blocks = options.cache_tokens.div_ceil(BLOCK).max(1);
        backend.fits(&plan(model, &options))?;
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
            scratch: Scratch::default(),
            logits: Vec::new(),
            flight: None,
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

    /// Ends a request, wherever it is; its blocks are free at once.
    pub fn cancel(&mut self, id: u64) {
        for s in self.running.iter_mut().chain(&mut self.waiting) {
            s.done |= s.request.id == id;
        }
        self.waiting.retain(|s| !s.done);
        self.retire();
    }

    /// Has the drafter expect runs of tokens that outputs often hold.
    pub fn expect_run(&mut self, tokens: &[u32]) {
        self.drafter.learn(tokens);
    }

    /// Sequences that wait, started ones without blocks among them.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Blocks of the KV cache that sequences hold.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.in_use()
    }

    pub fn total_blocks(&self) -> usize {
        self.blocks.total()
    }

    /// Forgets all requests and what the cache holds, whatever state a failure left them in.
    pub fn reset(&mut self) {
        self.waiting.clear();
        self.running.clear();
        self.flight = None;
        self.blocks = Blocks::new(self.blocks.total());
    }

    /// Panics if the engine's books do not agree; for tests.
    #[doc(hidden)]
    pub fn check(&self) {
        let mut users = vec![0; self.blocks.total()];
        for s in &self.running {
            assert!(!s.done && s.computed < s.tokens.len() + usize::from(self.flight.is_some()));
            assert!(s.computed <= s.blocks.len() * BLOCK && s.nodes.len() <= s.blocks.len());
            assert!(s.outputs() <= s.request.max_new);
            s.blocks.iter().for_each(|&b| users[b as usize] += 1);
        }
        assert!(self.waiting.iter().all(|s| !s.done && s.blocks.is_empty() && s.computed == 0));
        assert!(self.running.len() <= self.options.sequences);
        self.blocks.check(&users);
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One forward pass. `sink` hears, at the latest when the next step has begun, what happened
    /// and says what is to become of the candidate.
    pub fn step(&mut self, sink: Sink) -> Result<()> {
        self.expire(sink);
        if let Some(flight) = self.flight.take() {
            self.flight = self.fly_on(&flight)?;
            self.land(flight, sink)?;
            if self.flight.is_some() {
                return Ok(());
            }
        }
        let started = Instant::now();
        let (batch, plan) = self.schedule(sink);
        if plan.is_empty() {
            return Ok(());
        }
        self.model.forward(self.backend, &batch, &mut self.cache, &mut self.scratch);
        self.counters.steps += 1;
        self.counters.computed_tokens += batch.ids.len() as u64;
        for p in &plan {
            self.score_prompt(p, sink)?;
            self.running[p.at].computed += p.known;
        }
        let decodes = plan.iter().all(|p| p.known == 1);
        self.sample(&plan, sink)?;
        if decodes {
            self.drafter.timed(batch.ids.len(), started.elapsed().as_secs_f64());
        }
        if self.options.prefix_cache {
            plan.iter().for_each(|p| self.register(p.at));
        }
        self.retire();
        Ok(())
    }

    /// Ends what is past its deadline.
    fn expire(&mut self, sink: Sink) {
        if self.running.iter().chain(&self.waiting).all(|s| s.request.deadline.is_none()) {
            return;
        }
        let now = Instant::now();
        for s in self.running.iter_mut().chain(&mut self.waiting) {
            if s.request.deadline.is_some_and(|d| d <= now) {
                for candidate in s.candidate..s.candidate + s.fork.max(1) {
                    sink(Event::Ended {
                        request: s.request.id,
                        candidate,
                        finish: Finish::Deadline,
                    });
                }
                s.done = true;
            }
        }
        self.waiting.retain(|s| !s.done);
        self.retire();
    }

    /// Hands out the step's tokens.
    fn schedule(&mut self, sink: Sink) -> (Batch, Vec<Planned>) {
        let mut batch = Batch::default();
        let mut plan = Vec::new();
        let mut budget = self.options.batch_tokens;
        self.make_room();
        let drafting = self.drafter.pays(self.running.len());
        let mut at = 0;
        while at < self.running.len() && budget > 0 {
            // guesses come after everybody's own tokens
            let spare = budget.saturating_sub(self.running.len() - at);
            if !self.plan(at, budget, if drafting { spare } else { 0 }, &mut batch, &mut plan) {
                self.preempt(at);
                return (batch, plan);
            }
            budget = self.options.batch_tokens - batch.ids.len();
            at += 1;
        }
        while budget > 0 && self.admit(sink) {
            let planned = self.plan(self.running.len() - 1, budget, 0, &mut batch, &mut plan);
            debug_assert!(planned, "a sequence is admitted with all blocks for what it knows");
            budget = self.options.batch_tokens - batch.ids.len();
        }
        (batch, plan)
    }

    /// Gives a running sequence its part of a step; `false` if there are no blocks for it, nor a
    /// newer sequence to take them from.
    fn plan(
        &mut self,
        at: usize,
        budget: usize,
        guesses: usize,
        batch: &mut Batch,
        plan: &mut Vec<Planned>,
    ) -> bool {
        let s = &self.running[at];
        let all = s.tokens.len() - s.computed;
        let known = all.min(budget);
        let mut ahead = Vec::new();
        if known == all && !s.forced.is_empty() {
            ahead = s.forced[..s.forced.len().min(budget - known)].to_vec();
        } else if known == 1 && all == 1 && s.outputs() > 0 {
            let left = s.request.max_new - s.outputs();
            ahead = self.drafter.propose(&s.tokens, guesses.min(s.draft).min(left - 1));
        }
        while !self.take_blocks(at, known + ahead.len()) {
            if !ahead.is_empty() {
                ahead.clear();
            } else if self.running.len() - 1 > at {
                self.preempt(self.running.len() - 1);
            } else {
                return false;
            }
        }
        let s = &self.running[at];
        let start = batch.ids.len();
        let ids = [&s.tokens[s.computed..s.computed + known], &ahead].concat();
        batch.push(&ids, s.computed, &s.blocks);
        plan.push(Planned { at, start, known, ahead });
        true
    }

    /// Makes room for `n` more positions.
    fn take_blocks(&mut self, at: usize, n: usize) -> bool {
        let s = &mut self.running[at];
        let needed = (s.computed + n).div_ceil(BLOCK);
        while s.blocks.len() < needed {
            match self.blocks.allocate() {
                Some(block) => s.blocks.push(block),
                None => return false,
            }
        }
        true
    }

    /// Has a running sequence wait without blocks.
    fn preempt(&mut self, at: usize) {
        let mut s = self.running.remove(at);
        self.blocks.release(&s.preempt());
        self.counters.preemptions += 1;
        self.waiting.push_front(s);
    }

    /// Starts the waiting sequence whose turn it is, if there is room for it.
    fn admit(&mut self, sink: Sink) -> bool {
        if self.running.len() >= self.options.sequences {
            return false;
        }
        let Some(next) = self.next_waiting() else { return false };
        let s = &mut self.waiting[next];
        if self.options.prefix_cache {
            let mut most = (s.tokens.len() - 1) / BLOCK;
            if s.request.prompt_logprobs && s.scored < s.prompt {
                // positions whose log-probabilities are still to be told have to be computed
                most = most.min(s.scored / BLOCK);
            }
            for tokens in s.tokens.chunks_exact(BLOCK).take(most) {
                let Some((block, node)) = self.blocks.find(s.node(), tokens) else { break };
                s.blocks.push(block);
                s.nodes.push(node);
            }
        }
        s.computed = s.blocks.len() * BLOCK;
        if self.blocks.available() < s.tokens.len().div_ceil(BLOCK) - s.blocks.len() {
            self.blocks.release(&s.preempt());
            return false;
        }
        let Some(mut s) = self.waiting.remove(next) else { return false };
        if !s.started {
            s.started = true;
            if self.options.prefix_cache {
                self.counters.prefix_queries += s.prompt as u64;
                self.counters.prefix_hits += s.computed as u64;
            }
            sink(Event::Started { request: s.request.id, cached: s.computed });
        }
        self.running.push(s);
        true
    }

    /// Log-probabilities of the prompt's own tokens, where the request asks for them.
    fn score_prompt(&mut self, p: &Planned, sink: Sink) -> Result<()> {
        /// Rows of logits in memory at once.
        const ROWS: usize = 16;
        let s = &mut self.running[p.at];
        if !s.request.prompt_logprobs || s.computed >= s.prompt {
            return Ok(());
        }
        // position p predicts token p + 1
        let first = s.computed.max(s.scored);
        let positions: Vec<usize> =
            (first..s.computed + p.known).filter(|p| p + 1 < s.prompt).collect();
        s.scored = s.scored.max(s.computed + p.known);
        let mut scores = Vec::with_capacity(positions.len());
        for part in positions.chunks(ROWS) {
            let rows: Vec<usize> =
                part.iter().map(|position| p.start + position - s.computed).collect();
            self.model.logits(self.backend, &rows, &mut self.scratch, &mut self.logits)?;
            let vocab = self.logits.len() / rows.len();
            for (row, p) in self.logits.chunks_exact(vocab).zip(part) {
                let lse = log_sum_exp(row);
                let top = sampling::top(row, lse, s.request.top_logprobs);
                scores.push((row[s.tokens[p + 1] as usize] - lse, top));
            }
        }
        if !scores.is_empty() {
            sink(Event::Prompt { request: s.request.id, scores });
        }
        Ok(())
    }

    /// Chooses the next tokens of all planned sequences whose tokens are computed; a fresh prompt
    /// splits into its candidates.
    fn sample(&mut self, plan: &[Planned], sink: Sink) -> Result<()> {
        let mut choices = Vec::new();
        // guesses by running sequence, first choice of each, and how many
        let mut targets: Vec<(usize, &[u32], usize)> = Vec::new();
        let mut homeless = Vec::new();
        for p in plan.iter() {
            let s = &mut self.running[p.at];
            if s.computed < s.tokens.len() {
                continue;
            }
            let count = std::mem::replace(&mut s.fork, 0).max(1);
            let row = p.start + p.known - 1;
            // candidates beyond the request's share of places wait for theirs
            let at_once = if count > 1 { self.share() } else { 1 };
            targets.push((p.at, &p.ahead, choices.len()));
            choices.extend(
                (0..=p.ahead.len())
                    .map(|ahead| self.choice(p.at, &p.ahead[..ahead], None, row + ahead)),
            );
            for candidate in 1..count {
                let room =
                    (candidate as usize) < at_once && self.running.len() < self.options.sequences;
                match room.then(|| self.fork(p.at, candidate)).flatten() {
                    Some(copy) => {
                        self.running.push(copy);
                        let at = self.running.len() - 1;
                        targets.push((at, &[], choices.len()));
                        choices.push(self.choice(at, &[], None, row));
                    }
                    None => homeless.push(self.running[p.at].sibling(candidate)),
                }
            }
        }
        // candidates without a block wait in order
        homeless.into_iter().rev().for_each(|s| self.waiting.push_front(s));
        let rows = sample_rows(&self.running, &choices);
        if targets.iter().all(|t| t.1.is_empty()) && self.may_fly(&rows) {
            let choosing = self.model.start_sample(self.backend, &rows, &mut self.scratch)?;
            self.flight = Some(Flight::new(choosing, choices.iter().map(|c| &self.running[c.at])));
            return Ok(());
        }
        let mut chosen =
            self.model.sample(self.backend, &rows, &mut self.scratch, &mut self.logits)?;
        for (at, ahead, first) in targets {
            self.take(at, ahead, &mut chosen[first..=first + ahead.len()], sink);
        }
        Ok(())
    }

    /// What goes into the choice after a sequence's tokens and these guesses, or after a token that
    /// is not known yet.
    fn choice(&self, at: usize, ahead: &[u32], fed: Option<usize>, row: usize) -> Choice {
        let s = &self.running[at];
        let sampling = &s.request.sampling;
        let seen = (sampling.repetition_penalty != 1.0 && !ahead.is_empty()).then(|| {
            let mut seen = s.seen.clone();
            for t in ahead {
                if !seen.contains(t) {
                    seen.push(*t);
                }
            }
            seen
        });
        let mut bias = s.request.bias.clone();
        if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
            let mut counts = s.counts.clone();
            ahead.iter().for_each(|&t| *counts.entry(t).or_default() += 1);
            let penalty =
                |n: u32| sampling.presence_penalty + sampling.frequency_penalty * n as f32;
            bias.extend(counts.into_iter().map(|(t, n)| (t, -penalty(n))));
        }
        let more = ahead.len() + usize::from(fed.is_some());
        let position = s.tokens.len() + more;
        bias.extend(s.banned.iter().filter(|b| b.0 == position).map(|b| (b.1, f32::NEG_INFINITY)));
        if s.outputs() + more < s.request.min_new {
            let stops = s.request.stop_token_ids.iter().chain([&s.request.eos]);
            bias.extend(stops.map(|&t| (t, f32::NEG_INFINITY)));
        }
        bias.sort_by_key(|b| b.0);
        bias.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            kept.1 += if same { next.1 } else { 0.0 };
            same
        });
        Choice { at, ahead: more, row, seen, fed, bias }
    }

    /// Takes chosen tokens while they are what was guessed. Whether the sequence goes on behind the
    /// last of them.
    fn take(&mut self, at: usize, ahead: &[u32], chosen: &mut [Chosen], sink: Sink) -> bool {
        let s = &mut self.running[at];
        let guessed = if s.forced.is_empty() { ahead.len() } else { 0 };
        let mut accepted = 0;
        let mut goes_on = true;
        for (i, c) in chosen.iter_mut().enumerate() {
            s.push(c.token);
            let forced = !s.forced.is_empty();
            if forced {
                s.forced.remove(0);
            }
            let finish = if !forced && s.request.is_stop(c.token) {
                Some(Finish::Stop)
            } else if s.outputs() >= s.request.max_new {
                Some(Finish::Length)
            } else {
                None
            };
            let verdict = sink(Event::Token {
                request: s.request.id,
                candidate: s.candidate,
                token: c.token,
                logprob: c.logprob,
                top: std::mem::take(&mut c.top),
                finish,
            });
            let matches = ahead.get(i) == Some(&c.token);
            // a token that was guessed is in the cache already
            s.computed += usize::from(matches);
            accepted += usize::from(matches);
            goes_on = verdict == Verdict::Go && finish.is_none();
            match verdict {
                Verdict::Go => s.done = finish.is_some(),
                Verdict::End => s.done = true,
                Verdict::Rewind { keep, ban } => {
                    s.banned.push((s.prompt + keep, ban));
                    self.blocks.release(&s.truncate(keep));
                }
                Verdict::Force { keep, tokens } => {
                    self.blocks.release(&s.truncate(keep));
                    s.forced = tokens;
                }
            }
            if !goes_on || !matches {
                break;
            }
        }
        if s.done {
            self.drafter.learn(&s.tokens[s.prompt..]);
        }
        if guessed > 0 {
            s.draft = (accepted + 2).min(self.options.draft_tokens);
            self.drafter.checked(guessed, accepted);
            self.counters.drafts += 1;
            self.counters.drafted_tokens += guessed as u64;
            self.counters.accepted_tokens += accepted as u64;
        }
        goes_on
    }

    /// A candidate that shares the full blocks of sequence `at` and has a copy of the last one, if
    /// there is a block for that.
    fn fork(&mut self, at: usize, candidate: u32) -> Option<Sequence> {
        let s = &self.running[at];
        let mut copy = s.sibling(candidate);
        let full = s.computed / BLOCK;
        copy.blocks = s.blocks[..full].to_vec();
        if full * BLOCK < s.computed {
            let block = self.blocks.allocate()?;
            self.backend.copy_block(&mut self.cache, s.blocks[full], block);
            copy.blocks.push(block);
        }
        s.blocks[..full].iter().for_each(|&b| self.blocks.share(b));
        copy.nodes = s.nodes.clone();
        copy.computed = s.computed;
        Some(copy)
    }

    /// Makes a sequence's full blocks known.
    fn register(&mut self, at: usize) {
        let s = &mut self.running[at];
        let known = s.computed.min(s.tokens.len());
        while (s.nodes.len() + 1) * BLOCK <= known {
            let n = s.nodes.len();
            let node =
                self.blocks.register(s.node(), &s.tokens[n * BLOCK..(n + 1) * BLOCK], s.blocks[n]);
            s.nodes.push(node);
        }
    }

    fn retire(&mut self) {
        let blocks = &mut self.blocks;
        self.running.retain(|s| {
            if s.done {
                blocks.release(&s.blocks);
            }
            !s.done
        });
    }
}
