//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as
//! the GPU needs for the work. Steps of one shape differ in nothing but what lies in device memory:
//! the second one is recorded (a CUDA graph), the others repeat the recording with a single launch.
//! A recording holds addresses, so any change of the device's memory ends all of them. Where a pass
//! can be one kernel as well (`persistent.rs`), both ways are timed then, their results compared,
//! and the faster one is taken.

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
    /// Where the batch's arrays begin and end says how long they are; and where tokens are taken
    /// from.
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
    comparisons: Vec<Comparison>,
    /// Whether recording has failed here.
    off: bool,
}

/// A pass that was done both ways: the best of a few times each, by the device's clock.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    pub tokens: usize,
    pub launches_microseconds: f64,
    /// `None` if it failed, or had other results.
    pub one_kernel_microseconds: Option<f64>,
}

impl Comparison {
    /// Whether one kernel was faster.
    pub fn one_kernel(&self) -> bool {
        self.one_kernel_microseconds.is_some_and(|t| t < self.launches_microseconds)
    }
}

impl<L: Launcher> Default for Graphs<L> {
    fn default() -> Self {
        Graphs {
            changes: 0,
            known: HashMap::new(),
            faster: HashMap::new(),
            comparisons: vec![],
            off: false,
        }
    }
}

/// Times that each of two ways is tried.
const TRIES: usize = 3;
/// Largest difference of two ways' results, over the largest magnitude: both round to 16 bits on
/// the way, in other places.
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
            Some(Way::Recorded(recording)) => {
                return self.attempt(|| self.launcher.replay(recording));
            }
            Some(Way::Persistent) => return self.attempt(|| self.persist(&mut f)),
            Some(Way::Once) => {
                let class = (key.owners[0], key.tokens, key.splits);
                let way = match graphs.faster.get(&class).copied().filter(|_| self.can_persist(&f))
                {
                    Some(true) => {
                        self.attempt(|| self.persist(&mut f));
                        Way::Persistent
                    }
                    known => {
                        let compare = known.is_none() && self.can_persist(&f);
                        match self.record(&mut f, compare) {
                            Ok((recording, comparison)) => {
                                let faster = comparison.map(|c| c.one_kernel());
                                graphs.comparisons.extend(comparison);
                                faster.map(|f| graphs.faster.insert(class, f));
                                self.attempt(|| self.launcher.replay(&recording));
                                // the next pass takes the faster way
                                if faster == Some(true) {
                                    Way::Persistent
                                } else {
                                    Way::Recorded(recording)
                                }
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

    /// Passes that were done both ways so far.
    pub fn comparisons(&self) -> Vec<Comparison> {
        self.graphs.borrow().comparisons.clone()
    }

    /// Records a pass. If it is to be compared, also does it as one kernel.
    fn record(
        &self,
        f: &mut Forward<Self>,
        compare: bool,
    ) -> Result<(L::Recording, Option<Comparison>)> {
        let recording = self.launcher.record(&mut || {
            f.operations(self);
            self.check()
        })?;
        if !compare {
            return Ok((recording, None));
        }
        let width = f.embedding.cols;
        let (mut launches, mut one) = (f64::INFINITY, f64::INFINITY);
        let mut results = [vec![], vec![]];
        for _ in 0..TRIES {
            launches = launches.min(self.launcher.timed(&mut || self.launcher.replay(&recording))?);
            results[0] = self.download(&f.scratch.x, width)?;
            match self.launcher.timed(&mut || self.persist(f)) {
                Ok(seconds) => one = one.min(seconds),
                Err(e) => {
                    tracing::warn!("steps are not done in one kernel: {e}");
                    one = f64::INFINITY;
                    break;
                }
            }
            results[1] = self.download(&f.scratch.x, width)?;
        }
        let most = results[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        // written so that what is no number is off
        let close =
            results[0].iter().zip(&results[1]).all(|(a, b)| (a - b).abs() <= TOLERANCE * most);
        if !close {
            tracing::warn!("steps are not done in one kernel: its results are off");
        }
        let tokens = f.scratch.pass.tokens;
        let comparison = Comparison {
            tokens,
            launches_microseconds: launches * 1e6,
            one_kernel_microseconds: Some(one * 1e6).filter(|t| close && t.is_finite()),
        };
        tracing::debug!("{comparison:?}");
        Ok((recording, Some(comparison)))
    }
}
