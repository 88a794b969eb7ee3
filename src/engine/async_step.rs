//! Steps that begin before the tokens of the one before are known.
//!
//! A device that feeds its choices to its own next pass need not wait for the host: while it
//! computes a step, the host takes the tokens of the step before and makes texts of them. What only
//! the host can know (a text that ends a sequence, a phrase that is taken back) comes a step late:
//! that step's result for the sequence is dropped, and the position that it wrote is written again
//! if the sequence goes on.

use super::{Choice, Engine, Sequence, Sink, sample_rows};
use crate::engine::SampleRow;
use crate::error::Result;
use crate::ops::{Backend, Batch};

/// A step whose tokens are being chosen.
pub(super) struct Flight<B: Backend> {
    choosing: B::Choosing,
    /// Request and candidate of each choice; `None` if it is not wanted any more.
    targets: Vec<Option<(u64, u32)>>,
}

impl<B: Backend> Flight<B> {
    pub fn new<'s>(
        choosing: B::Choosing,
        sequences: impl Iterator<Item = &'s Sequence>,
    ) -> Flight<B> {
        Flight { choosing, targets: sequences.map(|s| Some((s.request.id, s.candidate))).collect() }
    }
}

impl<B: Backend> Engine<'_, B> {
    /// Whether the next step can do without knowing what these choices, one for each running
    /// sequence, come to.
    pub(super) fn may_fly(&self, rows: &[SampleRow]) -> bool {
        let plain = |s: &Sequence| {
            let sampling = &s.request.sampling;
            s.forced.is_empty()
                && sampling.presence_penalty == 0.0
                && sampling.frequency_penalty == 0.0
        };
        self.options.draft_tokens == 0
            && rows.len() == self.running.len()
            && self.running.iter().all(plain)
            && rows.iter().all(|r| self.backend.chooses_alone(r))
    }

    fn find(&self, target: Option<(u64, u32)>) -> Option<usize> {
        let (request, candidate) = target?;
        self.running
            .iter()
            .position(|s| s.request.id == request && s.candidate == candidate && !s.done)
    }

    /// Begins the step after `flight` with the tokens that it chooses. Does nothing if others are
    /// to be admitted first, if there is no room, or nothing to go on with.
    pub(super) fn fly_on(&mut self, flight: &Flight<B>) -> Result<Option<Flight<B>>> {
        let places: Vec<(usize, usize)> = flight
            .targets
            .iter()
            .enumerate()
            .filter_map(|(choice, t)| Some((self.find(*t)?, choice)))
            .collect();
        let admits = !self.waiting.is_empty()
            && (self.running.len() < self.options.sequences || self.over_its_share().is_some());
        if admits || places.len() < self.running.len() {
            return Ok(None);
        }
        let (mut batch, mut choices): (Batch, Vec<Choice>) = Default::default();
        for (at, choice) in places {
            let s = &self.running[at];
            if s.outputs() + 1 >= s.request.max_new {
                continue; // the token that is being chosen is its last
            }
            if !self.take_blocks(at, 1) {
                return Ok(None);
            }
            let s = &self.running[at];
            let row = batch.ids.len();
            batch.push(&[0], s.computed, &s.blocks);
            batch.fed.push((row, choice));
            choices.push(self.choice(at, &[], Some(choice), row));
        }
        if choices.is_empty() {
            return Ok(None);
        }
        self.model.forward(self.backend, &batch, &mut self.cache, &mut self.scratch);
        self.counters.steps += 1;
        self.counters.computed_tokens += batch.ids.len() as u64;
        let rows = sample_rows(&self.running, &choices);
        let choosing = self.model.start_sample(self.backend, &rows, &mut self.scratch)?;
        choices.iter().for_each(|c| self.running[c.at].computed += 1);
        Ok(Some(Flight::new(choosing, choices.iter().map(|c| &self.running[c.at]))))
    }

    /// Takes the tokens of `flight`, behind which another one may have begun.
    pub(super) fn land(&mut self, flight: Flight<B>, sink: Sink) -> Result<()> {
        let chosen = self.backend.finish_sample(flight.choosing)?;
        for (target, chosen) in flight.targets.into_iter().zip(chosen) {
            let Some(at) = self.find(target) else { continue };
            let goes_on = self.take(at, &[], &mut [chosen], sink);
            if !goes_on && let Some(next) = &mut self.flight {
                next.targets.iter_mut().filter(|t| **t == target).for_each(|t| *t = None);
            }
            if self.options.prefix_cache {
                self.register(at);
            }
        }
        self.retire();
        Ok(())
    }
}
