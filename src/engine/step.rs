//! One forward pass: its tokens computed, prompts scored, the next tokens sampled.

use super::Engine;
use super::request::{Event, Sink, Verdict};
use super::sampling_job::{InFlightStep, SamplingJob, sampling_rows};
use super::scheduler::Planned;
use super::sequence::Sequence;
use crate::error::Result;
use crate::ops::cpu::sampling::{log_sum_exp, top_tokens};
use crate::ops::{BLOCK, Batch, DecodeBackend};
use std::time::Instant;

/// A running sequence's draft, and the first of the jobs that check it.
struct Check<'p> {
    at: usize,
    draft: &'p [u32],
    first: usize,
}

/// What is to be sampled in a step.
#[derive(Default)]
struct SamplingRound<'p> {
    jobs: Vec<SamplingJob>,
    checks: Vec<Check<'p>>,
    /// Candidates without a place or a block, in order.
    homeless: Vec<Sequence>,
    /// Places for each owner, once somebody asked; they stay the same within a step.
    share: Option<usize>,
}

impl<B: DecodeBackend> Engine<'_, B> {
    /// One forward pass. `sink` hears, at the latest when the next step has begun, what happened
    /// and says what is to become of the candidate.
    pub fn step(&mut self, sink: &mut dyn FnMut(Event) -> Verdict) -> Result<()> {
        self.expire(sink);
        if let Some(current) = self.in_flight.take() {
            let places = self.places();
            self.in_flight = self.launch_next(&current, &places)?;
            self.complete(current, &places, sink)?;
            if self.in_flight.is_some() {
                return Ok(());
            }
        }
        let started = Instant::now();
        let plan = self.schedule(sink);
        if plan.parts.is_empty() {
            return Ok(());
        }
        self.forward(&plan.batch);
        for part in &plan.parts {
            self.score_prompt(part, sink)?;
            self.running[part.at].computed += part.known;
        }
        let decodes = plan.parts.iter().all(|p| p.known == 1);
        self.sample(&plan.parts, sink)?;
        if decodes {
            self.drafter.timed(plan.batch.ids.len(), started.elapsed().as_secs_f64());
        }
        if self.options.prefix_cache {
            plan.parts.iter().for_each(|p| self.register(p.at));
        }
        self.retire();
        Ok(())
    }

    pub(super) fn forward(&mut self, batch: &Batch) {
        self.model.forward(self.backend, batch, &mut self.cache, &mut self.activations);
        self.counters.steps += 1;
        self.counters.computed_tokens += batch.ids.len() as u64;
    }

    /// Log-probabilities of the prompt's own tokens, where the request asks for them.
    fn score_prompt(&mut self, part: &Planned, sink: Sink) -> Result<()> {
        /// Rows of logits in memory at once.
        const ROWS: usize = 16;
        let s = &mut self.running[part.at];
        if !s.request.prompt_logprobs || s.computed >= s.prompt {
            return Ok(());
        }
        // position p predicts token p + 1
        let first = s.computed.max(s.scored);
        let positions: Vec<usize> =
            (first..s.computed + part.known).filter(|p| p + 1 < s.prompt).collect();
        s.scored = s.scored.max(s.computed + part.known);
        let mut scores = Vec::with_capacity(positions.len());
        for chunk in positions.chunks(ROWS) {
            let rows: Vec<usize> =
                chunk.iter().map(|position| part.start + position - s.computed).collect();
            self.model.logits(self.backend, &rows, &mut self.activations, &mut self.logits)?;
            let vocab = self.logits.len() / rows.len();
            for (row, p) in self.logits.chunks_exact(vocab).zip(chunk) {
                let lse = log_sum_exp(row);
                let top = top_tokens(row, lse, s.request.top_logprobs);
                scores.push((row[s.tokens[p + 1] as usize] - lse, top));
            }
        }
        if !scores.is_empty() {
            sink(Event::Prompt { request: s.request.id, scores });
        }
        Ok(())
    }

    /// Samples the next tokens of all planned sequences whose tokens are computed; a fresh prompt
    /// splits into its candidates.
    fn sample(&mut self, parts: &[Planned], sink: Sink) -> Result<()> {
        let mut round = SamplingRound::default();
        for part in parts {
            self.add_jobs(part, &mut round);
        }
        let SamplingRound { jobs, checks, homeless, .. } = round;
        // candidates without a block wait in order
        homeless.into_iter().rev().for_each(|s| self.waiting.push_front(s));
        let rows = sampling_rows(&self.running, &jobs);
        if checks.iter().all(|c| c.draft.is_empty()) && self.can_launch_next(&rows) {
            let pending = self.model.sample_async(self.backend, &rows, &mut self.activations)?;
            self.in_flight = Some(InFlightStep::new(pending, &self.running, &jobs));
            return Ok(());
        }
        let mut sampled =
            self.model.sample(self.backend, &rows, &mut self.activations, &mut self.logits)?;
        for Check { at, draft, first } in checks {
            self.accept(at, draft, &mut sampled[first..=first + draft.len()], sink);
        }
        Ok(())
    }

    /// Adds the jobs of one planned sequence, and of the candidates that it splits into.
    fn add_jobs<'p>(&mut self, part: &'p Planned, round: &mut SamplingRound<'p>) {
        let s = &mut self.running[part.at];
        if s.computed < s.tokens.len() {
            return;
        }
        let count = std::mem::replace(&mut s.fork, 0).max(1);
        let row = part.start + part.known - 1;
        // candidates beyond the request's share of places wait for theirs
        let at_once = match count {
            1 => 1,
            _ => *round.share.get_or_insert_with(|| self.share()),
        };
        round.checks.push(Check { at: part.at, draft: &part.draft, first: round.jobs.len() });
        let s = (part.at, &self.running[part.at]);
        round.jobs.extend(
            (0..=part.draft.len())
                .map(|ahead| SamplingJob::new(s, &part.draft[..ahead], None, row + ahead)),
        );
        for candidate in 1..count {
            let room =
                (candidate as usize) < at_once && self.running.len() < self.options.sequences;
            match room.then(|| self.fork(part.at, candidate)).flatten() {
                Some(copy) => {
                    let at = self.running.len();
                    round.checks.push(Check { at, draft: &[], first: round.jobs.len() });
                    round.jobs.push(SamplingJob::new((at, &copy), &[], None, row));
                    self.running.push(copy);
                }
                None => round.homeless.push(self.running[part.at].sibling(candidate)),
            }
        }
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
}
