//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as
//! the GPU needs for the work. Steps of one shape differ in nothing but what lies in device memory:
//! the second one is captured as a CUDA graph, which the others replay with a single launch.
//! A graph holds addresses, so any change of the device's memory ends all of them. Where a pass
//! can be one kernel as well (`persistent.rs`), both are timed then, their results compared by the
//! logits that they lead to, and the faster one is taken.

use super::compare::{largest, row_error};
use super::decoder::ForwardPass;
use super::{Cuda, Persistent, attention};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::{ObjectId, Tensor, Weight as _};
use crate::tensor::DType;
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

/// How passes are captured. Where it fails, the next one is tried.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum CaptureMode {
    /// With kernels that may begin while the ones before them end.
    #[default]
    Overlapping,
    /// With kernels one after the other: some drivers capture no others.
    InOrder,
    /// Not at all.
    Off,
}

impl CaptureMode {
    fn after_failure(self) -> CaptureMode {
        match self {
            CaptureMode::Overlapping => CaptureMode::InOrder,
            CaptureMode::InOrder | CaptureMode::Off => CaptureMode::Off,
        }
    }
}

/// What was found out about passes, by shape.
pub(super) struct Graphs<L: Launcher> {
    /// [`Launcher::allocation_epoch`] when graphs were captured.
    allocation_epoch: u64,
    known: HashMap<Key, ForwardKind<L::CapturedGraph>>,
    /// Whether one kernel was faster, by decoder, tokens, and splits of the longest sequence.
    faster: HashMap<(ObjectId, usize, usize), bool>,
    comparisons: Vec<Comparison>,
    /// What has not failed here.
    mode: CaptureMode,
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

impl<L: Launcher> Graphs<L> {
    /// Whether nothing is captured any more.
    fn off(&self) -> bool {
        self.mode == CaptureMode::Off
    }
}

impl<L: Launcher> Default for Graphs<L> {
    fn default() -> Self {
        Graphs {
            allocation_epoch: 0,
            known: HashMap::new(),
            faster: HashMap::new(),
            comparisons: vec![],
            mode: CaptureMode::default(),
        }
    }
}

/// Times that each of the two is tried.
const TRIES: usize = 3;
/// Largest RMS of the differences in a row after the final norm, over the row's RMS: both round to
/// 16 bits, in other places. The norm weighs the channels as the model does, so that an error is
/// not measured against a channel with much larger numbers than all others.
const ROWS: f32 = 0.02;
/// The largest logit of a row has to be the same token's where it is ahead of the second one by
/// this part of the RMS of the row's logits: several times what [`ROWS`] lets them move.
const CLEAR: f32 = 5.0 * ROWS;

/// What a pass leads to.
struct Outcome {
    /// Rows after the final norm, `[tokens, hidden]`.
    normed: Vec<f32>,
    /// `[tokens, vocabulary]`.
    logits: Vec<f32>,
}

/// What is wrong with `ours`, if anything; `theirs` is how it should be.
fn disagreement(ours: &Outcome, theirs: &Outcome, tokens: usize) -> Option<String> {
    let error = row_error(&ours.normed, &theirs.normed, theirs.normed.len() / tokens);
    if error > ROWS {
        return Some(format!(
            "a row after the final norm has a relative RMS difference of {error:.2e}, expected at \
            most {ROWS}"
        ));
    }
    let vocabulary = theirs.logits.len() / tokens;
    let rows = ours.logits.chunks(vocabulary).zip(theirs.logits.chunks(vocabulary));
    for (row, (ours, theirs)) in rows.enumerate() {
        let (expected, margin) = largest(theirs);
        let (found, _) = largest(ours);
        let squares: f32 = theirs.iter().map(|v| v * v).sum();
        let clear = CLEAR * (squares / vocabulary as f32).sqrt();
        if found != expected && margin > clear {
            return Some(format!(
                "the most likely token of row {row} is {found}, expected {expected}, whose logit \
                is {margin:.2e} ahead"
            ));
        }
    }
    None
}

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
        if !self.captures_graphs || graphs.off() || batch.tile_count > 0 || batch.tokens > TOKENS {
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
                        match self.capture(&mut f, compare, &mut graphs.mode) {
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
                                graphs.mode = CaptureMode::Off;
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
        mode: &mut CaptureMode,
    ) -> Result<(L::CapturedGraph, Option<Comparison>)> {
        let overlap = *mode == CaptureMode::Overlapping;
        let graph = match self.launcher.capture(&mut || self.launch_decoder(f), overlap) {
            Err(e) if overlap => {
                tracing::warn!("steps are captured without kernels that overlap: {e}");
                *mode = mode.after_failure();
                self.launcher.capture(&mut || self.launch_decoder(f), false)?
            }
            graph => graph?,
        };
        let comparison = if compare { Some(self.compare(f, &graph)?) } else { None };
        Ok((graph, comparison))
    }

    /// Does a pass as a graph and as one kernel, a few times each.
    fn compare(&self, f: &mut ForwardPass<L>, graph: &L::CapturedGraph) -> Result<Comparison> {
        let tokens = f.a.batch.tokens;
        let (mut launches, mut one) = (f64::INFINITY, f64::INFINITY);
        let mut results = [vec![], vec![]];
        let mut wrong = None;
        for _ in 0..TRIES {
            launches = launches.min(self.launcher.timed(&mut || self.launcher.replay(graph))?);
            results[0] = self.download(&f.a.x)?;
            match self.launcher.timed(&mut || self.persist(f)) {
                Ok(seconds) => one = one.min(seconds),
                Err(e) => {
                    wrong = Some(e.to_string());
                    break;
                }
            }
            results[1] = self.download(&f.a.x)?;
        }
        if wrong.is_none() {
            let [theirs, ours] = results.map(|x| self.outcome(f, &x));
            wrong = disagreement(&ours?, &theirs?, tokens);
        }
        if let Some(what) = &wrong {
            tracing::warn!("steps of {tokens} tokens are not done in one kernel: {what}");
        }
        let comparison = Comparison {
            tokens,
            launches_microseconds: launches * 1e6,
            one_kernel_microseconds: wrong.is_none().then_some(one * 1e6),
        };
        tracing::debug!("{comparison:?}");
        Ok(comparison)
    }

    /// What the last layer's output leads to.
    fn outcome(&self, f: &ForwardPass<L>, x: &[f32]) -> Result<Outcome> {
        let decoder = f.decoder;
        let x = self.upload(x, decoder.embedding.cols(), DType::F32)?;
        let (mut normed, mut logits) = (Tensor::default(), Vec::new());
        self.launch_layer_norm(&mut normed, &x, (0, x.shape()[0]), &decoder.final_norm)?;
        self.lm_head_logits(&normed, decoder.lm_head(), &mut logits)?;
        Ok(Outcome { normed: self.download(&normed)?, logits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_that_fails_is_tried_again_with_less() {
        let first = CaptureMode::default();
        assert_eq!(first, CaptureMode::Overlapping);
        assert_eq!(first.after_failure(), CaptureMode::InOrder);
        assert_eq!(CaptureMode::InOrder.after_failure(), CaptureMode::Off);
        assert_eq!(CaptureMode::Off.after_failure(), CaptureMode::Off);
    }

    /// Two rows of four channels, the first of which is 500 before the norm and weighs little
    /// behind it.
    fn outcome(change: f32) -> Outcome {
        let rows = [[500.0, 3.0, -2.0, 1.0f32], [500.0, -1.0, 2.0 + change, 4.0]];
        let gain = [0.002, 1.0, 1.0, 1.0];
        let normed = rows.iter().flat_map(|r| r.iter().zip(gain).map(|(x, g)| x * g)).collect();
        Outcome { normed, logits: vec![1.0, 2.0, 3.0, 3.0, 1.0, 2.0] }
    }

    #[test]
    fn an_error_beside_a_channel_of_large_numbers_is_found() {
        let right = outcome(0.0);
        // a tenth of the largest magnitude before the norm is 50
        let found = disagreement(&outcome(40.0), &right, 2).unwrap();
        assert!(found.contains("after the final norm") && found.contains("e0"), "{found}");
        assert!(disagreement(&outcome(f32::NAN), &right, 2).is_some());
        assert_eq!(disagreement(&outcome(0.05), &right, 2), None);
        assert_eq!(disagreement(&right, &right, 2), None);
    }

    #[test]
    fn the_most_likely_token_is_the_same_where_it_is_clear() {
        let right = outcome(0.0);
        let mut other = outcome(0.0);
        other.logits = vec![1.0, 2.0, 3.0, 2.0, 1.0, 3.0];
        let found = disagreement(&other, &right, 2).unwrap();
        assert!(found.contains("row 1 is 2, expected 0") && found.contains("1.00e0"), "{found}");
        // a near tie may go either way
        let close = Outcome { logits: vec![1.0, 2.0, 3.0, 3.0, 1.0, 2.9], ..outcome(0.0) };
        assert_eq!(disagreement(&other, &close, 2), None);
    }
}
