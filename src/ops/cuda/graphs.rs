//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as
//! the GPU needs for the work. Steps of one shape differ in nothing but what lies in device memory:
//! the second one is recorded (a CUDA graph), the others repeat the recording with a single launch.
//! A recording holds addresses, so any change of the device's memory ends all of them. Where a pass
//! can be one kernel as well (`persistent.rs`), both ways are timed then, their results compared,
//! and the faster one is taken.

use super::decoder::ForwardPass;
use super::{Cuda, Persistent, attention};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::ObjectId;
use std::collections::HashMap;

/// Most tokens of a pass that is recorded; longer ones are not bound by their launches.
const TOKENS: usize = 256;
/// Most recordings that are kept.
const MOST: usize = 128;

/// What the launches of a pass depend on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    /// The decoder, the cache and the activations.
    objects: [ObjectId; 3],
    /// Where the batch's arrays begin and end says how long they are; and where tokens are taken
    /// from.
    arrays: [u64; 3],
    tokens: usize,
    table_width: usize,
    singles: usize,
    splits: usize,
}

/// How passes of a shape are done.
enum ForwardKind<R> {
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
    known: HashMap<Key, ForwardKind<L::Recording>>,
    /// Whether one kernel was faster, by decoder, tokens, and splits of the longest sequence.
    faster: HashMap<(ObjectId, usize, usize), bool>,
    comparisons: Vec<Comparison>,
    /// Whether recording has failed here.
    off: bool,
}

/// A pass that was done both ways: the best of a few times each, by the device's clock.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Duration as a recording of launches, in microseconds.
    pub launches_microseconds: f64,
    /// Duration as one kernel, in microseconds; `None` if it failed, or had other results.
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
    /// Does a forward pass in the best way that is known for its shape.
    pub(super) fn replay_or_capture(&self, mut f: ForwardPass<L>) {
        let mut graphs = self.graphs.borrow_mut();
        if self.failed.borrow().is_some() {
            return;
        }
        if self.persistent == Persistent::Always && self.can_persist(&f) {
            return self.defer_error(|| self.persist(&mut f));
        }
        let batch = &f.a.batch;
        if !self.records || graphs.off || batch.tile_count > 0 || batch.tokens > TOKENS {
            return self.defer_error(|| self.launch_decoder(&mut f));
        }
        if graphs.changes != self.launcher.changes() || graphs.known.len() >= MOST {
            graphs.known.clear();
        }
        let key = Key {
            objects: [f.decoder.id, f.cache.id, f.a.id],
            arrays: [batch.ids, batch.singles, batch.sampled],
            tokens: batch.tokens,
            table_width: batch.table_width,
            singles: batch.single_count,
            splits: attention::splits(batch.longest_single),
        };
        match graphs.known.get(&key) {
            Some(ForwardKind::Recorded(recording)) => {
                return self.defer_error(|| self.launcher.replay(recording));
            }
            Some(ForwardKind::Persistent) => return self.defer_error(|| self.persist(&mut f)),
            Some(ForwardKind::Once) => {
                let class = (key.objects[0], key.tokens, key.splits);
                let way = match graphs.faster.get(&class).copied().filter(|_| self.can_persist(&f))
                {
                    Some(true) => {
                        self.defer_error(|| self.persist(&mut f));
                        ForwardKind::Persistent
                    }
                    known => {
                        let compare = known.is_none() && self.can_persist(&f);
                        match self.record(&mut f, compare) {
                            Ok((recording, comparison)) => {
                                let faster = comparison.map(|c| c.one_kernel());
                                graphs.comparisons.extend(comparison);
                                faster.map(|f| graphs.faster.insert(class, f));
                                self.defer_error(|| self.launcher.replay(&recording));
                                // the next pass takes the faster way
                                if faster == Some(true) {
                                    ForwardKind::Persistent
                                } else {
                                    ForwardKind::Recorded(recording)
                                }
                            }
                            Err(e) => {
                                tracing::warn!("steps are launched kernel by kernel: {e}");
                                graphs.off = true;
                                return self.defer_error(|| self.launch_decoder(&mut f));
                            }
                        }
                    }
                };
                graphs.known.insert(key, way);
            }
            None => {
                // buffers grow to this shape's size; from then on they stay where they are
                self.defer_error(|| self.launch_decoder(&mut f));
                if self.can_persist(&f) {
                    self.defer_error(|| self.prepare_persistent(&mut f).map(drop));
                }
                graphs.known.insert(key, ForwardKind::Once);
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
        f: &mut ForwardPass<L>,
        compare: bool,
    ) -> Result<(L::Recording, Option<Comparison>)> {
        let recording = self.launcher.record(&mut || self.launch_decoder(f))?;
        if !compare {
            return Ok((recording, None));
        }
        let (mut launches, mut one) = (f64::INFINITY, f64::INFINITY);
        let mut results = [vec![], vec![]];
        for _ in 0..TRIES {
            launches = launches.min(self.launcher.timed(&mut || self.launcher.replay(&recording))?);
            results[0] = self.download(&f.a.x)?;
            match self.launcher.timed(&mut || self.persist(f)) {
                Ok(seconds) => one = one.min(seconds),
                Err(e) => {
                    tracing::warn!("steps are not done in one kernel: {e}");
                    one = f64::INFINITY;
                    break;
                }
            }
            results[1] = self.download(&f.a.x)?;
        }
        let most = results[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        // written so that what is no number is off
        let close =
            results[0].iter().zip(&results[1]).all(|(a, b)| (a - b).abs() <= TOLERANCE * most);
        if !close {
            tracing::warn!("steps are not done in one kernel: its results are off");
        }
        let tokens = f.a.batch.tokens;
        let comparison = Comparison {
            tokens,
            launches_microseconds: launches * 1e6,
            one_kernel_microseconds: Some(one * 1e6).filter(|t| close && t.is_finite()),
        };
        tracing::debug!("{comparison:?}");
        Ok((recording, Some(comparison)))
    }
}
