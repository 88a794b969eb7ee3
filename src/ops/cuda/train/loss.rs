//! Losses at the LM head, whose logits never leave a chunk.

use super::super::{Cuda, abi};
use super::gemm::Matrix;
use crate::device::{Args, Launcher};
use crate::error::Result;
use crate::ops::Tensor;
use crate::ops::token_loss::{LossGradients, LossOutput, TokenLoss};
use crate::ops::train::ParamsAt;
use crate::tensor::DType;
use abi::{ClippedPpoArgs, LogitRows};
use std::ops::Range;

const THREADS: u32 = abi::TRAIN_THREADS as u32;
/// Maximum rows of a chunk of logits.
pub(super) const CHUNK: usize = 1024;
/// Numbers that are kept of each row: the target, log-sum-exp, log-probability, entropy, and the
/// gradients of the last two.
const KEPT: usize = 6;

/// Where a chunk's gradients of each row's log-probability and, unless 0, entropy are.
type Coefficients = (u64, u64);

impl<L: Launcher> Cuda<L> {
    /// See [`crate::ops::train::TrainBackend::lm_head_loss`].
    pub(super) fn launch_lm_head_loss(
        &self,
        (x, logits): (&Tensor<Self>, &mut Tensor<Self>),
        targets: &[u32],
        (p, lm_head): ParamsAt<Self, Range<usize>>,
        loss: &TokenLoss<Self>,
        to: LossOutput<Self, LossGradients<Self>>,
    ) -> Result<()> {
        let (rows, width) = (targets.len(), x.shape()[1]);
        x.expect("lm_head_loss", [rows, width], self.half);
        loss.expect(rows);
        let LossOutput { sums, stats, mut gradients } = to;
        let vocabulary = lm_head.len() / width;
        let stride = vocabulary.next_multiple_of(8);
        self.reserve(logits, [CHUNK.min(rows), stride], self.half)?;
        let kept = self.logit_rows(targets)?;
        let kept = |i: usize| kept + 4 * (i * rows) as u64;
        let (mut log_probs, mut entropies) = (kept(2), kept(3));
        if let Some(stats) = stats {
            self.reserve(&mut stats.log_probs, [rows, 1], DType::F32)?;
            self.reserve(&mut stats.entropies, [rows, 1], DType::F32)?;
            (log_probs, entropies) = (stats.log_probs.at(), stats.entropies.at());
        }
        let weight = Matrix::new(p.values.half_at(lm_head.start), vocabulary, width);
        if let Some(g) = &mut gradients {
            self.reserve(g.dx, [rows, width], self.half)?;
        }
        for first in (0..rows).step_by(CHUNK) {
            let count = CHUNK.min(rows - first);
            let row = |at: u64| Matrix::new(at + 2 * (first * width) as u64, count, width);
            let z = Matrix { at: logits.at(), rows: count, cols: vocabulary, stride };
            self.gemm_nt(z, row(x.at()), weight)?;
            let from = |at: u64| at + 4 * first as u64;
            let chunk = LogitRows {
                logits: logits.at(),
                targets: from(kept(0)),
                lse: from(kept(1)),
                log_probs: from(log_probs),
                entropies: from(entropies),
                rows: count as u32,
                vocabulary: vocabulary as u32,
                stride: stride as u32,
                unused: 0,
            };
            let grid = [count, 1, 1];
            let shared = abi::TRAIN_THREADS * 12;
            self.launch("logit_stats_bf16", grid, THREADS, shared, Args::new().with(chunk))?;
            let room = (from(kept(4)), from(kept(5)));
            let coefficients = self.launch_token_loss(loss, (chunk, first), sums.at, room)?;
            let Some(g) = &mut gradients else { continue };
            self.launch_logit_gradients(chunk, coefficients)?;
            self.gemm_nn(row(g.dx.at()), z, weight, None)?;
            if let Some(grads) = &g.grads {
                self.gemm_tn_add(grads.at(lm_head.start), z, row(x.at()), 0)?;
            }
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

    /// Adds the loss of a chunk that begins with label `first` to the step's. Returns where its
    /// gradients are: `room`, unless somebody else has them already.
    fn launch_token_loss(
        &self,
        loss: &TokenLoss<Self>,
        (chunk, first): (LogitRows, usize),
        sums: u64,
        room: Coefficients,
    ) -> Result<Coefficients> {
        let at = |x: &Tensor<Self>| x.at() + 4 * first as u64;
        let (kernel, args, coefficients) = match loss {
            TokenLoss::Given { log_probs, entropies } => {
                return Ok((at(log_probs), entropies.map_or(0, at)));
            }
            TokenLoss::CrossEntropy { scale } => {
                let args = Args::new().with(sums).with(room.0).with(chunk.log_probs);
                ("cross_entropy", args.with(chunk.rows).with(*scale), (room.0, 0))
            }
            TokenLoss::ClippedPpo(ppo) => {
                let args = ClippedPpoArgs {
                    sums,
                    log_prob_gradients: room.0,
                    entropy_gradients: room.1,
                    log_probs: chunk.log_probs,
                    entropies: chunk.entropies,
                    old_log_probs: at(ppo.old_log_probs),
                    advantages: at(ppo.advantages),
                    reference_log_probs: ppo.reference_log_probs.map_or(0, at),
                    labels: chunk.rows,
                    clip: ppo.clip,
                    kl: ppo.kl,
                    entropy: ppo.entropy,
                    scale: ppo.scale,
                    unused: 0,
                };
                ("clipped_ppo", Args::new().with(args), room)
            }
        };
        self.launch(kernel, [1, 1, 1], THREADS, 8 * abi::TRAIN_THREADS, args)?;
        Ok(coefficients)
    }

    /// Turns logits into their gradients.
    fn launch_logit_gradients(
        &self,
        chunk: LogitRows,
        (log_probs, entropies): Coefficients,
    ) -> Result<()> {
        let grid =
            [(chunk.stride as usize).div_ceil(abi::ELEMENTWISE_BLOCK), chunk.rows as usize, 1];
        let args = Args::new().with(chunk).with(log_probs).with(entropies);
        self.launch("logit_gradients_bf16", grid, THREADS, 0, args)
    }
}
