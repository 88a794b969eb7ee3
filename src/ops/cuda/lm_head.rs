//! The LM head: the tokens sampled from its logits, or the logits themselves, leave the kernel.

use super::abi::LinearArgs;
use super::gemm_select::{
    LinearKernel, OUTPUTS, SLICE, THREADS, TILE, TILE_THREADS, TOKENS, large_shared, tile_shared,
    tile_tokens,
};
use super::{Cuda, DeviceWeight};
use crate::device::{Args, Launcher};
use crate::error::Result;
use crate::ops::{Tensor, Weight as _};
use std::ops::Range;

/// What a launch over the LM head reads.
pub(super) struct LmHead<'a, L: Launcher> {
    /// `[tokens, hidden]` in 16 bits, and which of its rows.
    pub x: &'a Tensor<Cuda<L>>,
    pub rows: Range<usize>,
    pub weight: &'a DeviceWeight<L>,
}

impl<L: Launcher> Cuda<L> {
    /// Maximum rows of one launch over the LM head.
    pub(super) fn lm_head_rows(&self) -> usize {
        if self.batch_invariant { TOKENS } else { 2 * TILE }
    }

    /// The kernel for so many rows. On Hopper tiles serve even a single one: with one they take as
    /// long as the skinny kernel, and with more less, because that one reads all rows again for
    /// every 16 outputs (a step of 16 tokens took 1.92 ms with it and 1.73 without, BLOOM-1b1 on an
    /// H100).
    fn lm_head_kernel(&self, rows: usize, weight: &DeviceWeight<L>) -> LinearKernel {
        match self.linear_kernel(rows, weight) {
            LinearKernel::Skinny if self.hopper() && !weight.int8() && !self.batch_invariant => {
                LinearKernel::Cluster { tokens: tile_tokens(rows), blocks: 1 }
            }
            kernel => kernel,
        }
    }

    /// Blocks of a launch over the LM head's outputs with so many rows.
    pub(super) fn lm_head_blocks(&self, rows: usize, lm_head: &DeviceWeight<L>) -> usize {
        let outputs =
            if self.lm_head_kernel(rows, lm_head) == LinearKernel::Skinny { OUTPUTS } else { TILE };
        lm_head.rows().div_ceil(outputs)
    }

    /// Launches a kernel of the LM head, `lm_head_sample` or `lm_head_logits`; `rest` follows the
    /// weights.
    pub(super) fn launch_lm_head(
        &self,
        family: &str,
        lm_head: LmHead<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        self.launch_lm_head_by(
            self.lm_head_kernel(lm_head.rows.len(), lm_head.weight),
            family,
            lm_head,
            rest,
        )
    }

    /// [`Cuda::launch_lm_head`] by a given kernel.
    pub(super) fn launch_lm_head_by(
        &self,
        by: LinearKernel,
        family: &str,
        lm_head: LmHead<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let LmHead { x, rows, weight } = lm_head;
        let tokens = rows.len();
        let x = x.at() + (rows.start * weight.cols() * 2) as u64;
        let input = LinearArgs::rows(x, tokens, weight.cols());
        let rest = |args| rest(args).with(weight.rows() as u32);
        let grid = |tile: usize| [tokens.div_ceil(tile), weight.rows().div_ceil(TILE), 1];
        match by {
            LinearKernel::Skinny => self.skinny(family, weight, input, rest),
            LinearKernel::Large => {
                let kernel = self.kernel(&format!("{family}_large"), weight);
                self.launch(
                    &kernel,
                    grid(TILE),
                    THREADS,
                    large_shared(weight),
                    rest(self.plain_args(input, weight)),
                )
            }
            LinearKernel::Cluster { .. } | LinearKernel::Hopper => {
                let tile = tile_tokens(tokens);
                let args = self
                    .tile_args(x, tokens, weight, tile, TILE)?
                    .with(weight.cols().div_ceil(SLICE) as u32);
                let kernel = format!("{family}_hopper_{}_{tile}", self.suffix());
                self.launch(&kernel, grid(tile), TILE_THREADS, tile_shared(tile), rest(args))
            }
        }
    }
}

/// Blocks of the LM head for each of which there are `SoftmaxStats` of the logits.
pub(super) fn moments_blocks(head_rows: usize) -> usize {
    head_rows.div_ceil(OUTPUTS)
}
