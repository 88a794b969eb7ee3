//! The head's products: what is chosen from them, or they themselves, leaves the kernel.

use super::linear::Input;
use super::ways::{
    OUTPUTS, SLICE, THREADS, TILE, TILE_THREADS, TOKENS, Way, large_shared, tile_shared,
    tile_tokens,
};
use super::{Buffer, Cuda, Matrix};
use crate::device::{Args, Launcher};
use crate::error::Result;
use std::ops::Range;

impl<L: Launcher> Cuda<L> {
    /// Most rows of one launch over the head.
    pub(super) fn head_rows(&self) -> usize {
        if self.batch_invariant { TOKENS } else { 2 * TILE }
    }

    /// Blocks of a launch over the head's outputs with so many rows.
    pub(super) fn head_blocks(&self, rows: usize, head: &Matrix<L>) -> usize {
        let outputs = if self.way(rows, head) == Way::Skinny { OUTPUTS } else { TILE };
        head.rows.div_ceil(outputs)
    }

    /// A kernel of the head, `lm_head_sample` or `lm_head_logits`: `x` is `[tokens, width]` in 16
    /// bits, `rest` follows the weights.
    pub(super) fn head(
        &self,
        family: &str,
        x: &Buffer<L>,
        rows: Range<usize>,
        head: &Matrix<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        self.head_as(self.way(rows.len(), head), family, x, rows, head, rest)
    }

    /// [`Cuda::head`] in a given way.
    pub(super) fn head_as(
        &self,
        way: Way,
        family: &str,
        x: &Buffer<L>,
        rows: Range<usize>,
        head: &Matrix<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let tokens = rows.len();
        let x = x.at() + (rows.start * head.cols * 2) as u64;
        let input = Input::rows(x, tokens, head.cols);
        let rest = |args| rest(args).with(head.rows as u32);
        let grid = |tile: usize| [tokens.div_ceil(tile), head.rows.div_ceil(TILE), 1];
        match way {
            Way::Skinny => self.skinny(family, head, input, rest),
            Way::Large => {
                let kernel = self.kernel(&format!("{family}_large"), head);
                self.launch(
                    &kernel,
                    grid(TILE),
                    THREADS,
                    large_shared(head),
                    rest(self.plain_args(input, head)),
                )
            }
            Way::Cluster { .. } | Way::Hopper => {
                let tile = tile_tokens(tokens);
                let args = self
                    .tile_args(x, tokens, head, tile, TILE)?
                    .with(head.cols.div_ceil(SLICE) as u32);
                let kernel = format!("{family}_hopper_{}_{tile}", self.suffix());
                self.launch(&kernel, grid(tile), TILE_THREADS, tile_shared(tile), rest(args))
            }
        }
    }
}

/// Blocks of the head for each of which there are `Moments` of the logits.
pub(super) fn moments_blocks(head_rows: usize) -> usize {
    head_rows.div_ceil(OUTPUTS)
}
