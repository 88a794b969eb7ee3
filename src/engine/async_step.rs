//! Steps that begin before the tokens of the one before are known.
//!
//! A device that feeds its choices to its own next pass need not wait for the host: while it
//! computes a step, the host takes the tokens of the step before and makes texts of them. What only
//! the host can know (a text that ends a sequence, a phrase that is taken back) comes a step late:
//! that step's result for the sequence is dropped, and the position that it wrote is written again
//! if the sequence goes on.

use super::request::Sink;
use super::sampling_job::{InFlightStep, SamplingJob, sampling_rows};
use super::sequence::{Sequence, SequenceId};
use super::{Engine, SamplingRow};
use crate::error::Result;
use crate::ops::{Batch, DecodeBackend};
use std::collections::{HashMap, HashSet};

impl<B: DecodeBackend> Engine<'_, B> {
    /// Whether the next step can be launched without knowing the tokens of these rows, one for each
    /// running sequence.
    pub(super) fn can_launch_next(&self, rows: &[SamplingRow]) -> bool {
        let plain = |s: &Sequence| {
            let sampling = &s.request.sampling;
            s.forced.is_empty()
                && sampling.presence_penalty == 0.0
                && sampling.frequency_penalty == 0.0
        };
        self.options.draft_tokens == 0
            && rows.len() == self.running.len()
            && self.running.iter().all(plain)
            && rows.iter().all(|r| self.backend.samples_on_device(r))
    }

    /// Where each running sequence is.
    pub(super) fn places(&self) -> HashMap<SequenceId, usize> {
        self.running.iter().enumerate().map(|(at, s)| (s.id(), at)).collect()
    }

    /// Launches the step after `current` with the tokens that are being sampled. Does nothing if
    /// others are to be admitted first, if there is no room, or nothing to go on with.
    pub(super) fn launch_next(
        &mut self,
        current: &InFlightStep<B>,
        places: &HashMap<SequenceId, usize>,
    ) -> Result<Option<InFlightStep<B>>> {
        let wanted: Vec<(usize, usize)> = current
            .targets
            .iter()
            .enumerate()
            .filter_map(|(job, target)| Some((*places.get(target.as_ref()?)?, job)))
            .collect();
        let admits = !self.waiting.is_empty()
            && (self.running.len() < self.options.sequences || self.over_its_share().is_some());
        if admits || wanted.len() < self.running.len() {
            return Ok(None);
        }
        let (mut batch, mut jobs): (Batch, Vec<SamplingJob>) = Default::default();
        for (at, pending_token) in wanted {
            let s = &self.running[at];
            if s.outputs() + 1 >= s.request.max_new {
                continue; // the token that is being sampled is its last
            }
            if !self.take_blocks(at, 1) {
                return Ok(None);
            }
            let s = &self.running[at];
            let row = batch.ids.len();
            batch.push(&[0], s.computed, &s.blocks);
            batch.pending.push((row, pending_token));
            jobs.push(SamplingJob::new((at, s), &[], Some(pending_token), row));
        }
        if jobs.is_empty() {
            return Ok(None);
        }
        self.forward(&batch);
        let rows = sampling_rows(&self.running, &jobs);
        let pending = self.model.sample_async(self.backend, &rows, &mut self.activations)?;
        jobs.iter().for_each(|job| self.running[job.at].computed += 1);
        Ok(Some(InFlightStep::new(pending, &self.running, &jobs)))
    }

    /// Takes the tokens of `current`, behind which another step may have been launched.
    pub(super) fn complete(
        &mut self,
        current: InFlightStep<B>,
        places: &HashMap<SequenceId, usize>,
        sink: Sink,
    ) -> Result<()> {
        let sampled = self.backend.wait(current.pending)?;
        let mut ended = HashSet::new();
        for (target, token) in current.targets.into_iter().zip(sampled) {
            let Some((id, &at)) = target.and_then(|id| Some((id, places.get(&id)?))) else {
                continue;
            };
            if !self.accept(at, &[], &mut [token], sink) {
                ended.insert(id);
            }
            if self.options.prefix_cache {
                self.register(at);
            }
        }
        // what the next step samples for them follows a token that they do not have
        if let Some(next) = &mut self.in_flight {
            for target in &mut next.targets {
                *target = target.filter(|id| !ended.contains(id));
            }
        }
        self.retire();
        Ok(())
    }
}
