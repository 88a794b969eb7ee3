//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as
//! the GPU needs for the work. Steps of one shape differ in nothing but what lies in device memory:
//! the second one is captured as a CUDA graph, which the others replay with a single launch.
//! A graph holds addresses, so any change of the device's memory ends all of them. Where a pass
//! can be one kernel as well (`persistent.rs`), both are timed then, their results compared,
//! and the faster one is taken.

use super::decoder::ForwardPass;
use super::{Cuda, Persistent, attention};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::ObjectId;
use std::collections::HashMap;

/// Maximum tokens of a pass that is captured; longer ones are not bound by their launches.
const TOKENS: usize = 256;
/// Maximum graphs that are kept.
const MAX_GRAPHS: usize = 128;

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
    Captured(R),
    /// As one kernel.
    Persistent,
}

/// What was found out about passes, by shape.
pub(super) struct Graphs<L: Launcher> {
    /// [`Launcher::allocation_epoch`] when graphs were captured.
    allocation_epoch: u64,
    known: HashMap<Key, ForwardKind<L::CapturedGraph>>,
    /// Whether one kernel was faster, by decoder, tokens, and splits of the longest sequence.
    faster: HashMap<(ObjectId, usize, usize), bool>,
    comparisons: Vec<Comparison>,
    /// Whether capture has failed here.
    off: bool,
}

/// A pass that was done as a graph and as one kernel: the best of a few times each, by the device's
/// clock.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Duration as a graph of launches, in microseconds.
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
            allocation_epoch: 0,
            known: HashMap::new(),
            faster: HashMap::new(),
            comparisons: vec![],
            off: false,
        }
    }
}

/// Times that each of the two is tried.
const TRIES: usize = 3;
/// Largest difference of the two results, over the largest magnitude: both round to 16 bits,
/// in other places.
const TOLERANCE: f32 = 0.1;

impl<L: Launcher> Cuda<L> {
    /// Does a forward pass as is known to be best for its shape.
    pub(super) fn replay_or_capture(&self, mut f: ForwardPass<L>) {
        let mut graphs = self.graphs.borrow_mut();
        if self.failed.borrow().is_some() {
            return;
        }
        if self.persistent == Persistent::Always && self.can_persist(&f) {
            return self.defer_error(|| self.persist(&mut f));
        }
        let batch = &f.a.batch;
        if !self.captures_graphs || graphs.off || batch.tile_count > 0 || batch.tokens > TOKENS {
            return self.defer_error(|| self.launch_decoder(&mut f));
        }
        if graphs.allocation_epoch != self.launcher.allocation_epoch()
            || graphs.known.len() >= MAX_GRAPHS
        {
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
            Some(ForwardKind::Captured(graph)) => {
                return self.defer_error(|| self.launcher.replay(graph));
            }
            Some(ForwardKind::Persistent) => return self.defer_error(|| self.persist(&mut f)),
            Some(ForwardKind::Once) => {
                let class = (key.objects[0], key.tokens, key.splits);
                let kind = match graphs.faster.get(&class).copied().filter(|_| self.can_persist(&f))
                {
                    Some(true) => {
                        self.defer_error(|| self.persist(&mut f));
                        ForwardKind::Persistent
                    }
                    known => {
                        let compare = known.is_none() && self.can_persist(&f);
                        match self.capture(&mut f, compare) {
                            Ok((graph, comparison)) => {
                                let faster = comparison.map(|c| c.one_kernel());
                                graphs.comparisons.extend(comparison);
                                faster.map(|f| graphs.faster.insert(class, f));
                                self.defer_error(|| self.launcher.replay(&graph));
                                // the next pass takes the faster one
                                if faster == Some(true) {
                                    ForwardKind::Persistent
                                } else {
                                    ForwardKind::Captured(graph)
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
                graphs.known.insert(key, kind);
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
        graphs.allocation_epoch = self.launcher.allocation_epoch();
    }

    /// Passes that were compared so far.
    pub fn comparisons(&self) -> Vec<Comparison> {
        self.graphs.borrow().comparisons.clone()
    }

    /// Captures a pass. If it is to be compared, also does it as one kernel.
    fn capture(
        &self,
        f: &mut ForwardPass<L>,
        compare: bool,
    ) -> Result<(L::CapturedGraph, Option<Comparison>)> {
        let graph = self.launcher.capture(&mut || self.launch_decoder(f))?;
        if !compare {
            return Ok((graph, None));
        }
        let (mut launches, mut one) = (f64::INFINITY, f64::INFINITY);
        let mut results = [vec![], vec![]];
        for _ in 0..TRIES {
            launches = launches.min(self.launcher.timed(&mut || self.launcher.replay(&graph))?);
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
        let max = results[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        // written so that what is no number is off
        let close =
            results[0].iter().zip(&results[1]).all(|(a, b)| (a - b).abs() <= TOLERANCE * max);
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
        Ok((graph, Some(comparison)))
    }
}
