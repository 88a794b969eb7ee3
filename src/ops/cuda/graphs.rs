//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as the GPU needs for the work.
//! Steps of one shape differ in nothing but what lies in device memory: the second one is recorded (a CUDA graph), the
//! others repeat the recording with a single launch. A recording holds addresses, so any change of the device's memory
//! ends all of them. Where a pass can be one kernel as well (`persistent.rs`), both ways are timed then, their results
//! compared, and the faster one is taken.

use super::{Cuda, Persistent, attention};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::Forward;
use std::collections::HashMap;

/// Most tokens of a pass that is recorded; longer ones are not bound by their launches.
const TOKENS: usize = 256;
/// Most recordings that are kept.
const MOST: usize = 128;

/// What the launches of a pass depend on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    /// See [`Forward::owners`].
    owners: [usize; 3],
    /// Where the batch's arrays begin and end says how long they are; and where tokens are taken from.
    arrays: [u64; 3],
    tokens: usize,
    table_width: usize,
    singles: usize,
    splits: usize,
}

/// How passes of a shape are done.
enum Way<R> {
    /// Not known: there was one so far.
    Once,
    Recorded(R),
    /// As one kernel.
    Persistent,
}

/// What was found out about passes, by shape.
pub(super) struct Graphs<L: Launcher> {
    /// [`Launcher::changes`] when recordings were made.
    changes: u64,
    known: HashMap<Key, Way<L::Recording>>,
    /// Whether one kernel was faster, by layers, tokens, and splits of the longest sequence.
    faster: HashMap<(usize, usize, usize), bool>,
    /// Whether recording has failed here.
    off: bool,
}

impl<L: Launcher> Default for Graphs<L> {
    fn default() -> Self {
        Graphs { changes: 0, known: HashMap::new(), faster: HashMap::new(), off: false }
    }
}

/// Times that each of two ways is tried.
const TRIES: usize = 3;
/// Largest difference of two ways' results, over the largest magnitude: both round to 16 bits on the way, in other places.
const TOLERANCE: f32 = 0.1;

impl<L: Launcher> Cuda<L> {
    /// See [`crate::ops::Backend::forward`].
    pub(super) fn repeat(&self, mut f: Forward<Self>) {
        let mut graphs = self.graphs.borrow_mut();
        if self.failed.borrow().is_some() {
            return;
        }
        if self.persistent == Persistent::Always && self.can_persist(&f) {
            return self.attempt(|| self.persist(&mut f));
        }
        let pass = &f.scratch.pass;
        if !self.records || graphs.off || pass.tile_count > 0 || pass.tokens > TOKENS {
            return f.operations(self);
        }
        if graphs.changes != self.launcher.changes() || graphs.known.len() >= MOST {
            graphs.known.clear();
        }
        let key = Key {
            owners: f.owners(),
            arrays: [pass.ids, pass.singles, pass.choices],
            tokens: pass.tokens,
            table_width: pass.table_width,
            singles: pass.single_count,
            splits: attention::splits(pass.longest_single),
        };
        match graphs.known.get(&key) {
            Some(Way::Recorded(recording)) => return self.attempt(|| self.launcher.replay(recording)),
            Some(Way::Persistent) => return self.attempt(|| self.persist(&mut f)),
            Some(Way::Once) => {
                let class = (key.owners[0], key.tokens, key.splits);
                let way = match graphs.faster.get(&class).copied().filter(|_| self.can_persist(&f)) {
                    Some(true) => {
                        self.attempt(|| self.persist(&mut f));
                        Way::Persistent
                    }
                    known => {
                        let compare = known.is_none() && self.can_persist(&f);
                        match self.record(&mut f, compare) {
                            Ok((recording, faster)) => {
                                faster.map(|f| graphs.faster.insert(class, f));
                                self.attempt(|| self.launcher.replay(&recording));
                                // the next pass takes the faster way
                                if faster == Some(true) { Way::Persistent } else { Way::Recorded(recording) }
                            }
                            Err(e) => {
                                tracing::warn!("steps are launched kernel by kernel: {e}");
                                graphs.off = true;
                                return f.operations(self);
                            }
                        }
                    }
                };
                graphs.known.insert(key, way);
            }
            None => {
                // buffers grow to this shape's size; from then on they stay where they are
                f.operations(self);
                if self.can_persist(&f) {
                    self.attempt(|| self.prepare_persistent(&mut f).map(drop));
                }
                graphs.known.insert(key, Way::Once);
            }
        }
        graphs.changes = self.launcher.changes();
    }

    /// Records a pass. If it is to be compared, also does it as one kernel, and says whether that was faster.
    fn record(&self, f: &mut Forward<Self>, compare: bool) -> Result<(L::Recording, Option<bool>)> {
        let recording = self.launcher.record(&mut || {
            f.operations(self);
            self.check()
        })?;
        if !compare {
            return Ok((recording, None));
        }
        let width = f.embedding.cols;
        let mut best = [f64::INFINITY; 2];
        let mut results = [vec![], vec![]];
        for _ in 0..TRIES {
            best[0] = best[0].min(self.launcher.timed(&mut || self.launcher.replay(&recording))?);
            if results[0].is_empty() {
                results[0] = self.download(&f.scratch.x, width)?;
            }
            let done = self.launcher.timed(&mut || self.persist(f));
            match done {
                Ok(seconds) => best[1] = best[1].min(seconds),
                Err(e) => {
                    tracing::warn!("steps are not done in one kernel: {e}");
                    return Ok((recording, Some(false)));
                }
            }
            if results[1].is_empty() {
                results[1] = self.download(&f.scratch.x, width)?;
            }
        }
        let most = results[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        let off = results[0].iter().zip(&results[1]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let right = off <= TOLERANCE * most && results[1].iter().all(|v| v.is_finite());
        if !right {
            tracing::warn!("steps are not done in one kernel: its results are off by {off} of {most}");
        }
        let [launches, one] = best.map(|s| s * 1e6);
        tracing::debug!(
            "a step of {} tokens: {launches:.0} us in launches, {one:.0} us in one kernel",
            f.scratch.pass.tokens
        );
        Ok((recording, Some(right && one < launches)))
    }
}
