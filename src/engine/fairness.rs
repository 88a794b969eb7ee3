//! Who runs when not all can: each owner of requests has a share of the places, so that one with a
//! hundred candidates or prompts does not keep others waiting until all of those are done.
//!
//! A waiting sequence's turn comes by how many of its owner's run already, then by its place in the
//! queue. Where all places are taken, or all memory, and an owner has none, one that has more than
//! its share gives up the newest of its own.

use super::Engine;
use crate::ops::{BLOCK, DecodeBackend};
use std::collections::{HashMap, HashSet};

impl<B: DecodeBackend> Engine<'_, B> {
    /// Sequences that run, by owner.
    pub(super) fn running_by_owner(&self) -> HashMap<u64, usize> {
        let mut counts = HashMap::new();
        self.running.iter().for_each(|s| *counts.entry(s.request.owner).or_default() += 1);
        counts
    }

    /// Places for each owner that there is, at least one.
    pub(super) fn share(&self) -> usize {
        // more owners than places have one each, however many more
        let places = self.options.sequences;
        let mut owners = HashSet::new();
        for s in self.running.iter().chain(&self.waiting) {
            owners.insert(s.request.owner);
            if owners.len() > places / 2 {
                return 1;
            }
        }
        (places / owners.len().max(1)).max(1)
    }

    /// The waiting sequence whose turn it is, where so many run for each owner.
    pub(super) fn next_waiting(&self, counts: &HashMap<u64, usize>) -> Option<usize> {
        let mut best: Option<(usize, usize)> = None;
        for (at, s) in self.waiting.iter().enumerate() {
            let running = counts.get(&s.request.owner).copied().unwrap_or(0);
            if running == 0 {
                return Some(at);
            }
            if best.is_none_or(|(_, least)| running < least) {
                best = Some((at, running));
            }
        }
        best.map(|(at, _)| at)
    }

    /// The running sequence to give up for an owner that has none and for which there is no room.
    pub(super) fn over_its_share(&self) -> Option<usize> {
        if self.waiting.is_empty() {
            return None;
        }
        let counts = self.running_by_owner();
        // each has the least share there is
        if counts.values().all(|count| *count == 1) {
            return None;
        }
        let newcomer = self.waiting.iter().find(|s| !counts.contains_key(&s.request.owner))?;
        let fits = self.running.len() < self.options.sequences
            && self.blocks.available() >= newcomer.tokens.len().div_ceil(BLOCK);
        if fits {
            return None;
        }
        let share = self.share();
        let (&owner, _) = counts.iter().filter(|c| *c.1 > share).max_by_key(|c| (*c.1, *c.0))?;
        // one that has not been split yet holds the prompt of all its candidates
        self.running.iter().rposition(|s| s.request.owner == owner && s.fork == 0)
    }

    /// Has sequences wait that hold more than their owner's share of what a waiting one needs.
    pub(super) fn make_room(&mut self) {
        while let Some(at) = self.over_its_share() {
            self.preempt(at);
        }
    }
}
