//! Who computes what in a step: one token budget, running sequences first, then waiting ones.

use super::Engine;
use super::request::{Event, FinishReason, Sink};
use crate::ops::{BLOCK, Batch, DecodeBackend};
use std::collections::HashMap;
use std::time::Instant;

/// What a step computes: a batch, and each running sequence's part of it.
#[derive(Default)]
pub(super) struct StepPlan {
    pub batch: Batch,
    pub parts: Vec<Planned>,
}

/// A running sequence's part of a step.
pub(super) struct Planned {
    /// Among the running ones.
    pub at: usize,
    /// First token in the batch, known tokens from there, and guesses or forced tokens after those.
    pub start: usize,
    pub known: usize,
    pub draft: Vec<u32>,
}

impl<B: DecodeBackend> Engine<'_, B> {
    /// Hands out the step's tokens.
    pub(super) fn schedule(&mut self, sink: Sink) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = self.options.batch_tokens;
        self.make_room();
        let drafting = self.drafter.pays(self.running.len());
        let mut at = 0;
        while at < self.running.len() && budget > 0 {
            // guesses come after everybody's own tokens
            let spare = budget.saturating_sub(self.running.len() - at);
            if !self.plan(at, budget, if drafting { spare } else { 0 }, &mut plan) {
                self.preempt(at);
                return plan;
            }
            budget = self.options.batch_tokens - plan.batch.ids.len();
            at += 1;
        }
        if budget == 0 || self.waiting.is_empty() {
            return plan;
        }
        let mut counts = self.running_by_owner();
        while budget > 0 && self.admit(&mut counts, sink) {
            let planned = self.plan(self.running.len() - 1, budget, 0, &mut plan);
            debug_assert!(planned, "a sequence is admitted with all blocks for what it knows");
            budget = self.options.batch_tokens - plan.batch.ids.len();
        }
        plan
    }

    /// Gives a running sequence its part of a step; `false` if there are no blocks for it, nor a
    /// newer sequence to take them from.
    fn plan(&mut self, at: usize, budget: usize, guesses: usize, plan: &mut StepPlan) -> bool {
        let s = &self.running[at];
        let all = s.tokens.len() - s.computed;
        let known = all.min(budget);
        let mut draft = Vec::new();
        if known == all && !s.forced.is_empty() {
            draft = s.forced.iter().copied().take(budget - known).collect();
        } else if known == 1 && all == 1 && s.outputs() > 0 {
            let left = s.request.max_new - s.outputs();
            draft = self.drafter.propose(&s.tokens, guesses.min(s.draft).min(left - 1));
        }
        while !self.take_blocks(at, known + draft.len()) {
            if !draft.is_empty() {
                draft.clear();
            } else if self.running.len() - 1 > at {
                self.preempt(self.running.len() - 1);
            } else {
                return false;
            }
        }
        let s = &self.running[at];
        let start = plan.batch.ids.len();
        let ids = [&s.tokens[s.computed..s.computed + known], &draft].concat();
        plan.batch.push(&ids, s.computed, &s.blocks);
        plan.parts.push(Planned { at, start, known, draft });
        true
    }

    /// Makes room for `n` more positions.
    pub(super) fn take_blocks(&mut self, at: usize, n: usize) -> bool {
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
    pub(super) fn preempt(&mut self, at: usize) {
        let mut s = self.running.remove(at);
        self.blocks.release(&s.preempt());
        self.counters.preemptions += 1;
        self.waiting.push_front(s);
    }

    /// Starts the waiting sequence whose turn it is, if there is room for it. `counts` are the
    /// running sequences by owner.
    fn admit(&mut self, counts: &mut HashMap<u64, usize>, sink: Sink) -> bool {
        if self.running.len() >= self.options.sequences {
            return false;
        }
        let Some(next) = self.next_waiting(counts) else { return false };
        if self.options.prefix_cache {
            self.find_prefix(next);
        }
        let s = &mut self.waiting[next];
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
        *counts.entry(s.request.owner).or_default() += 1;
        self.running.push(s);
        true
    }

    /// Gives a waiting sequence the blocks that hold its beginning already.
    fn find_prefix(&mut self, waiting: usize) {
        let s = &mut self.waiting[waiting];
        let mut complete = (s.tokens.len() - 1) / BLOCK;
        if s.request.prompt_logprobs && s.scored < s.prompt {
            // positions whose log-probabilities are still to be told have to be computed
            complete = complete.min(s.scored / BLOCK);
        }
        for tokens in s.tokens.chunks_exact(BLOCK).take(complete) {
            let Some((block, node)) = self.blocks.find(s.node(), tokens) else { break };
            s.blocks.push(block);
            s.nodes.push(node);
        }
    }

    /// Makes a sequence's full blocks known.
    pub(super) fn register(&mut self, at: usize) {
        let s = &mut self.running[at];
        let known = s.computed.min(s.tokens.len());
        while (s.nodes.len() + 1) * BLOCK <= known {
            let n = s.nodes.len();
            let node =
                self.blocks.register(s.node(), &s.tokens[n * BLOCK..(n + 1) * BLOCK], s.blocks[n]);
            s.nodes.push(node);
        }
    }

    /// Ends what is past its deadline.
    pub(super) fn expire(&mut self, sink: Sink) {
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
                        finish: FinishReason::Deadline,
                    });
                }
                s.done = true;
            }
        }
        self.waiting.retain(|s| !s.done);
        self.retire();
    }

    /// Lets go of the running sequences that are done.
    pub(super) fn retire(&mut self) {
        let blocks = &mut self.blocks;
        self.running.retain(|s| {
            if s.done {
                blocks.release(&s.blocks);
            }
            !s.done
        });
    }
}
