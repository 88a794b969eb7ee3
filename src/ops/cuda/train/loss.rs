//! Losses at the LM head, whose logits never leave a chunk.

use super::super::{Cuda, abi};
use super::gemm::Matrix;
use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use crate::ops::Tensor;
use crate::ops::train::{LossGradients, ParamsAt};
use abi::LogitRows;
use std::ops::Range;

const THREADS: u32 = abi::TRAIN_THREADS as u32;
/// Maximum rows of a chunk of logits.
pub(super) const CHUNK: usize = 1024;
/// Numbers that are kept of each row: the target, log-sum-exp, log-probability, entropy,
/// and the gradient of the log-probability.
const KEPT: usize = 5;

impl<L: Launcher> Cuda<L> {
    /// See [`crate::ops::train::TrainBackend::lm_head_loss`].
    pub(super) fn launch_lm_head_loss(
        &self,
        (x, logits): (&Tensor<Self>, &mut Tensor<Self>),
        targets: &[u32],
        (p, lm_head): ParamsAt<Self, Range<usize>>,
        gradients: Option<LossGradients<Self>>,
        sums: &mut Memory<L>,
    ) -> Result<()> {
        let (rows, width) = (targets.len(), x.shape()[1]);
        x.expect("lm_head_loss", [rows, width], self.half);
        let vocabulary = lm_head.len() / width;
        let stride = vocabulary.next_multiple_of(8);
        self.reserve(logits, [CHUNK.min(rows), stride], self.half)?;
        let targets = self.logit_rows(targets)?;
        let weight = Matrix::new(p.values.half_at(lm_head.start), vocabulary, width);
        let mut gradients = gradients;
        if let Some(g) = &mut gradients {
            self.reserve(g.dx, [rows, width], self.half)?;
        }
        for first in (0..rows).step_by(CHUNK) {
            let count = CHUNK.min(rows - first);
            let row = |at: u64| Matrix::new(at + 2 * (first * width) as u64, count, width);
            let z = Matrix { at: logits.at(), rows: count, cols: vocabulary, stride };
            self.gemm_nt(z, row(x.at()), weight)?;
            let number = |i: usize| targets + 4 * (i * rows + first) as u64;
            let chunk = LogitRows {
                logits: logits.at(),
                targets: number(0),
                lse: number(1),
                log_probs: number(2),
                entropies: number(3),
                rows: count as u32,
                vocabulary: vocabulary as u32,
                stride: stride as u32,
                unused: 0,
            };
            let scale = gradients.as_ref().map_or(0.0, |g| g.scale);
            self.launch_cross_entropy(chunk, number(4), (sums.at, scale))?;
            let Some(g) = &gradients else { continue };
            self.launch_logit_gradients(chunk, number(4), 0)?;
            self.gemm_nn(row(g.dx.at()), z, weight, None)?;
            self.gemm_tn_add(g.grads.at(lm_head.start), z, row(x.at()), 0)?;
        }
        Ok(())
    }

    /// Room for what is kept of each row, which begins with the targets.
    fn logit_rows(&self, targets: &[u32]) -> Result<u64> {
        let mut scratch = self.train.borrow_mut();
        let at = self.place(&mut scratch.logit_rows, KEPT * 4 * targets.len())?;
        self.launcher.write(at, bytemuck::cast_slice(targets))?;
        Ok(at)
    }

    /// Statistics of a chunk's rows, and its share of the loss.
    fn launch_cross_entropy(
        &self,
        chunk: LogitRows,
        gradients: u64,
        (sums, scale): (u64, f32),
    ) -> Result<()> {
        let grid = [chunk.rows as usize, 1, 1];
        let shared = abi::TRAIN_THREADS * 12;
        self.launch("logit_stats_bf16", grid, THREADS, shared, Args::new().with(chunk))?;
        let args = Args::new().with(sums).with(gradients).with(chunk.log_probs);
        let args = args.with(chunk.rows).with(scale);
        self.launch("cross_entropy", [1, 1, 1], THREADS, 8 * abi::TRAIN_THREADS, args)
    }

    /// Turns logits into their gradients, given those of each row's log-probability and, unless 0,
    /// entropy.
    fn launch_logit_gradients(
        &self,
        chunk: LogitRows,
        log_probs: u64,
        entropies: u64,
    ) -> Result<()> {
        let grid =
            [(chunk.stride as usize).div_ceil(abi::ELEMENTWISE_BLOCK), chunk.rows as usize, 1];
        let args = Args::new().with(chunk).with(log_probs).with(entropies);
        self.launch("logit_gradients_bf16", grid, THREADS, 0, args)
    }
}
