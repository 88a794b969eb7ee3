//! Who runs when not all can: each request has a share of the places, so that one with a hundred candidates does not keep
//! others waiting until all of those are done.
//!
//! A waiting sequence's turn comes by how many of its request run already, then by its place in the queue. Where all places are
//! taken, or all memory, and a request has none, one that has more than its share gives up the newest of its own.

use super::{BLOCK, Backend, Engine};
use std::collections::{HashMap, HashSet};

impl<B: Backend> Engine<'_, B> {
    /// Sequences that run, by request.
    fn running_by_request(&self) -> HashMap<u64, usize> {
        let mut counts = HashMap::new();
        self.running.iter().for_each(|s| *counts.entry(s.request.id).or_default() += 1);
        counts
    }

    /// Places for each request that there is, at least one.
    pub(super) fn share(&self) -> usize {
        let requests: HashSet<u64> = self.running.iter().chain(&self.waiting).map(|s| s.request.id).collect();
        (self.options.sequences / requests.len().max(1)).max(1)
    }

    /// The waiting sequence whose turn it is.
    pub(super) fn next_waiting(&self) -> Option<usize> {
        let counts = self.running_by_request();
        let running = |at: &usize| counts.get(&self.waiting[*at].request.id).copied().unwrap_or(0);
        (0..self.waiting.len()).min_by_key(running)
    }

    /// The running sequence to give up for a request that has none and for which there is no room.
    pub(super) fn over_its_share(&self) -> Option<usize> {
        let counts = self.running_by_request();
        let newcomer = self.waiting.iter().find(|s| !counts.contains_key(&s.request.id))?;
        let fits = self.running.len() < self.options.sequences
            && self.blocks.available() >= newcomer.tokens.len().div_ceil(BLOCK);
        if fits {
            return None;
        }
        let share = self.share();
        let (&request, _) = counts.iter().filter(|c| *c.1 > share).max_by_key(|c| (*c.1, *c.0))?;
        // one that has not been split yet holds the prompt of all its candidates
        self.running.iter().rposition(|s| s.request.id == request && s.fork == 0)
    }

    /// Has sequences wait that hold more than their request's share of what a waiting one needs.
    pub(super) fn make_room(&mut self) {
        while let Some(at) = self.over_its_share() {
            self.preempt(at);
        }
    }
}
