//! Causal attention over packed sequences, forward and backward.

use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use crate::ops::cuda::abi::{self, AttentionTrainArgs, AttentionTrainTile};
use crate::ops::cuda::{CachedUpload, Cuda};
use crate::ops::train::AttentionOutput;
use crate::ops::{Heads, Tensor};
use crate::tensor::DType;
use bytemuck::Zeroable;

/// Tokens of a tile, and tokens on the other side of the scores in a step of the backward pass. A
/// step of the forward pass has as many as a tile.
const TILE: usize = abi::ATTENTION_TRAIN_TILE;
const STEP: usize = abi::ATTENTION_TRAIN_STEP;
const THREADS: u32 = 32 * abi::ATTENTION_TRAIN_WARPS as u32;
/// Maximum tiles of one launch: a grid's second dimension ends at 65,535.
const MAX_TILES: usize = 32768;
const TILE_BYTES: usize = size_of::<AttentionTrainTile>();

/// What the attention kernels of training have to know of packed sequences, on the device.
pub struct TrainSequences<L: Launcher> {
    /// Tiles of queries, those with the most keys first, and then the same tiles as keys, those
    /// with the most queries first.
    tiles: CachedUpload<L>,
    /// ALiBi's, one a head.
    slopes: CachedUpload<L>,
    /// `[tokens, head]` in f32: dot products of outputs and their gradients, which one kernel of
    /// the backward pass leaves to the other.
    dots: Option<Memory<L>>,
    /// Addresses of the above.
    queries: u64,
    keys: u64,
    slopes_at: u64,
    dots_at: u64,
    tile_count: usize,
    tokens: usize,
    heads: usize,
}

impl<L: Launcher> Default for TrainSequences<L> {
    fn default() -> Self {
        TrainSequences {
            tiles: CachedUpload::default(),
            slopes: CachedUpload::default(),
            dots: None,
            queries: 0,
            keys: 0,
            slopes_at: 0,
            dots_at: 0,
            tile_count: 0,
            tokens: 0,
            heads: 0,
        }
    }
}

/// Cuts sequences into tiles.
fn tiles(cu_seqlens: &[usize]) -> Vec<AttentionTrainTile> {
    let mut tiles = Vec::new();
    for sequence in cu_seqlens.windows(2) {
        let (sequence_start, sequence_end) = (sequence[0] as u32, sequence[1] as u32);
        for first in (sequence[0]..sequence[1]).step_by(TILE) {
            let count = TILE.min(sequence[1] - first) as u32;
            let first = first as u32;
            tiles.push(AttentionTrainTile { first, count, sequence_start, sequence_end });
        }
    }
    tiles
}

/// Bytes of so many rows of a head in shared memory.
fn rows_bytes(rows: usize, size: usize) -> usize {
    rows * (2 * size + 16)
}

impl<L: Launcher> Cuda<L> {
    /// Tells the device of packed sequences, given by their starts and the end of the last one,
    /// and of ALiBi's slopes; what it was told before is not sent again.
    ///
    /// # Errors
    /// If there is no memory or a copy fails.
    pub fn upload_train_sequences(
        &self,
        to: &mut TrainSequences<L>,
        heads: &Heads,
        cu_seqlens: &[usize],
    ) -> Result<()> {
        assert!(cu_seqlens.is_sorted(), "sequences follow each other");
        assert_eq!(heads.slopes.len(), heads.count, "each head has a slope");
        // Blocks begin in the order of their numbers: a tile with much work that began last would
        // leave most multiprocessors idle at the end. The order of tiles decides no sum.
        let mut queries = tiles(cu_seqlens);
        let mut keys = queries.clone();
        queries.sort_by_key(|t| std::cmp::Reverse(t.first + t.count - t.sequence_start));
        keys.sort_by_key(|t| std::cmp::Reverse(t.sequence_end - t.first));
        let tokens = cu_seqlens.last().copied().unwrap_or(0);
        to.tile_count = 0; // nothing is launched if an upload fails
        queries.extend_from_slice(&keys);
        to.queries = self.send(&mut to.tiles, bytemuck::cast_slice(&queries))?;
        to.keys = to.queries + (keys.len() * TILE_BYTES) as u64;
        to.slopes_at = self.send(&mut to.slopes, bytemuck::cast_slice(&heads.slopes))?;
        to.dots_at = self.place(&mut to.dots, tokens * heads.count * 4)?;
        (to.tile_count, to.tokens, to.heads) = (keys.len(), tokens, heads.count);
        Ok(())
    }

    /// Writes causal attention with ALiBi of `qkv` = `[tokens, head, 3, head size]` in 16 bits to
    /// `y`: `[tokens, head, head size]` in 16 bits, and log-sum-exp of the scores in f32.
    ///
    /// # Errors
    /// If there is no memory or a launch fails.
    pub fn attention_train_forward(
        &self,
        y: &mut AttentionOutput<Self>,
        qkv: &Tensor<Self>,
        heads: &Heads,
        sequences: &TrainSequences<L>,
    ) -> Result<()> {
        let tokens = sequences.tokens;
        qkv.expect("attention_train_forward", [tokens, 3 * heads.width()], self.half);
        self.reserve(&mut y.y, [tokens, heads.width()], self.half)?;
        self.reserve(&mut y.lse, [tokens, heads.count], DType::F32)?;
        let args = AttentionTrainArgs {
            qkv: qkv.at(),
            y: y.y.at(),
            lse: y.lse.at(),
            tiles: sequences.queries,
            ..AttentionTrainArgs::zeroed()
        };
        let shared = 2 * rows_bytes(2 * TILE, heads.size);
        self.launch_attention_train("forward", shared, args, heads, sequences)
    }

    /// Writes the gradient of `qkv` to `dqkv`, in 16 bits as `dy`. `forward` is `qkv` and what
    /// came of it. No sum depends on the order in which blocks run.
    ///
    /// # Errors
    /// If there is no memory or a launch fails.
    pub fn attention_train_backward(
        &self,
        dqkv: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        (qkv, y): (&Tensor<Self>, &AttentionOutput<Self>),
        heads: &Heads,
        sequences: &TrainSequences<L>,
    ) -> Result<()> {
        let tokens = sequences.tokens;
        qkv.expect("attention_train_backward", [tokens, 3 * heads.width()], self.half);
        y.y.expect("attention_train_backward's output", [tokens, heads.width()], self.half);
        y.lse.expect("attention_train_backward's lse", [tokens, heads.count], DType::F32);
        dy.expect("attention_train_backward's gradient", [tokens, heads.width()], self.half);
        self.reserve(dqkv, [tokens, 3 * heads.width()], self.half)?;
        let args = AttentionTrainArgs {
            qkv: qkv.at(),
            y: y.y.at(),
            lse: y.lse.at(),
            dy: dy.at(),
            dot: sequences.dots_at,
            dqkv: dqkv.at(),
            tiles: sequences.queries,
            ..AttentionTrainArgs::zeroed()
        };
        let stages = 2 * rows_bytes(2 * STEP, heads.size);
        self.launch_attention_train("dq", stages, args, heads, sequences)?;
        let args = AttentionTrainArgs { tiles: sequences.keys, ..args };
        let shared = rows_bytes(2 * TILE, heads.size) + stages + 2 * 2 * STEP * 4;
        self.launch_attention_train("dkv", shared, args, heads, sequences)
    }

    /// Launches one of the kernels over all tiles of `args` and all heads.
    fn launch_attention_train(
        &self,
        pass: &str,
        shared: usize,
        args: AttentionTrainArgs,
        heads: &Heads,
        sequences: &TrainSequences<L>,
    ) -> Result<()> {
        assert_eq!(sequences.heads, heads.count, "the heads that were uploaded");
        let kernel = format!("attention_train_{pass}_{}_{}", self.suffix(), heads.size);
        for first in (0..sequences.tile_count).step_by(MAX_TILES) {
            let args = AttentionTrainArgs {
                tiles: args.tiles + (first * TILE_BYTES) as u64,
                slopes: sequences.slopes_at,
                heads: heads.count as u32,
                ..args
            };
            let grid = [heads.count, MAX_TILES.min(sequences.tile_count - first), 1];
            self.launch(&kernel, grid, THREADS, shared, Args::new().with(args))?;
        }
        Ok(())
    }
}
