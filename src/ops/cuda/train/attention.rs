//! Causal attention over packed sequences, forward and backward.

use crate::device::{Args, Launcher, Memory, TensorMapConfig};
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
/// On Hopper: stages in shared memory, and columns of a tile there.
const HOPPER_STAGES: usize = abi::ATTENTION_TRAIN_HOPPER_STAGES;
const HOPPER_COLUMNS: usize = abi::ATTENTION_HOPPER_COLUMNS;
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

/// A kernel of the forward or the backward pass.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    /// Gradients of queries.
    Dq,
    /// Gradients of keys and values.
    Dkv,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Dq => "dq",
            Pass::Dkv => "dkv",
        }
    }

    /// Bytes of shared memory of a block.
    fn shared_bytes(self, size: usize, hopper: bool) -> usize {
        if hopper {
            let rows = size.div_ceil(HOPPER_COLUMNS) * TILE * HOPPER_COLUMNS * 2;
            let stages = HOPPER_STAGES * (2 * rows + 8);
            let own = 2 * rows + HOPPER_STAGES * 2 * TILE * 4;
            return if self == Pass::Dkv { own + stages } else { stages };
        }
        let rows = |tokens: usize| 2 * tokens * (2 * size + 16);
        match self {
            Pass::Forward => 2 * rows(TILE),
            Pass::Dq => 2 * rows(STEP),
            Pass::Dkv => rows(TILE) + 2 * (rows(STEP) + 2 * STEP * 4),
        }
    }
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
        self.launch_attention_train(Pass::Forward, args, heads, sequences)
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
        self.launch_attention_train(Pass::Dq, args, heads, sequences)?;
        let args = AttentionTrainArgs { tiles: sequences.keys, ..args };
        self.launch_attention_train(Pass::Dkv, args, heads, sequences)
    }

    /// Launches a kernel over all tiles of `args` and all heads.
    fn launch_attention_train(
        &self,
        pass: Pass,
        args: AttentionTrainArgs,
        heads: &Heads,
        sequences: &TrainSequences<L>,
    ) -> Result<()> {
        assert_eq!(sequences.heads, heads.count, "the heads that were uploaded");
        let (hopper, tokens) = (self.hopper(), sequences.tokens);
        let infix = if hopper { "hopper_" } else { "" };
        let kernel =
            format!("attention_train_{infix}{}_{}_{}", pass.name(), self.suffix(), heads.size);
        let shared = pass.shared_bytes(heads.size, hopper);
        for first in (0..sequences.tile_count).step_by(MAX_TILES) {
            let map = |at: u64, width: usize| {
                self.launcher.tensor_map(&TensorMapConfig::tiles(at, tokens, width, TILE))
            };
            let mut all = Args::new();
            if hopper {
                all = all.with(map(args.qkv, 3 * heads.width())?);
            }
            if hopper && pass == Pass::Dkv {
                all = all.with(map(args.dy, heads.width())?);
            }
            let args = AttentionTrainArgs {
                tiles: args.tiles + (first * TILE_BYTES) as u64,
                slopes: sequences.slopes_at,
                heads: heads.count as u32,
                ..args
            };
            let grid = [heads.count, MAX_TILES.min(sequences.tile_count - first), 1];
            self.launch(&kernel, grid, THREADS, shared, all.with(args))?;
        }
        Ok(())
    }
}
