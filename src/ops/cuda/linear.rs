//! Products and their epilogues.

use super::{Buffer, Cuda, Matrix, Pass, Vector, Written};
use crate::device::{Args, Launcher, Memory, Shape};
use crate::error::Result;
use crate::ops::{Epilogue, Heads, Linear, Norm};
use bytemuck::{Pod, Zeroable};

/// As in `kernels/linear_skinny.cu`.
const THREADS: u32 = 256;
const WARPS: usize = 8;
const OUTPUTS: usize = 16;
/// As in `kernels/linear_large.cu`.
const TILE: usize = 128;
const SLICE: usize = 64;
const STAGES: usize = 3;
/// As in `kernels/linear_hopper.cu`: tokens and outputs of a tile, threads, shared memory of four stages, of their barriers, and of
/// eight warps' results.
const HOPPER_M: usize = 128;
const HOPPER_N: usize = 256;
const HOPPER_THREADS: u32 = 384;
const HOPPER_SHARED: usize = 4 * (HOPPER_M + HOPPER_N) * SLICE * 2 + 4 * 2 * 8 + 8 * 16 * (64 * 2 + 16);
/// As in `kernels/include/tiles_hopper.cuh`.
const TILE_THREADS: u32 = 288;
/// Most blocks of a cluster that every Hopper GPU has.
const CLUSTER: usize = 8;
/// Most tokens of one launch of the skinny kernels; more go to the tiles.
const TOKENS: usize = 64;
/// Most tokens that every block normalizes for itself; beyond, a launch of its own costs less. On Hopper also the most tokens of the
/// skinny kernels: they read activations once for 16 outputs, which beyond is more than the weights.
const FEW_TOKENS: usize = 16;

/// `Input` of `kernels/include/linear.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Input {
    x: u64,
    weight: u64,
    bias: u64,
    normed: u64,
    eps: f32,
    tokens: u32,
    inputs: u32,
    unused: u32,
}

/// `Epilogue` of `kernels/include/epilogue.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Finish {
    out: u64,
    bias: u64,
    residual: u64,
    keys: u64,
    values: u64,
    slots: u64,
    mode: u32,
    width: u32,
    narrow_residual: u32,
    heads: u32,
    head_size: u32,
    unused: u32,
}

/// `NextNorm` of `kernels/linear_cluster.cu`; zeros if there is none.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NextNorm {
    weight: u64,
    bias: u64,
    normed: u64,
    counters: u64,
    eps: f32,
    unused: u32,
}

const BIAS: u32 = 0;
const GELU: u32 = 1;
const RESIDUAL: u32 = 2;
const QKV: u32 = 3;

/// The kernel of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    /// Up to [`TOKENS`] at a time, weights once for each time.
    Skinny,
    /// Tiles of [`TILE`] by [`TILE`].
    Large,
    /// Hopper's tiles of so many tokens by [`TILE`] outputs, each by a cluster of so many blocks.
    Cluster { tokens: usize, blocks: usize },
    /// Hopper's tiles of [`HOPPER_M`] by [`HOPPER_N`].
    Hopper,
}

/// Shared memory of `kernels/include/tiles_hopper.cuh`: the ring and its barriers.
fn tile_shared(tokens: usize) -> usize {
    let stages = if tokens == 64 { 4 } else { 3 };
    stages * ((tokens + TILE) * SLICE * 2 + 2 * 8)
}

/// Kernel instances by tokens, in tiles of 16.
fn tiles(tokens: usize) -> usize {
    match tokens.div_ceil(16) {
        0 | 1 => 1,
        2 => 2,
        _ => 4,
    }
}

impl<L: Launcher> Cuda<L> {
    /// `linear` with its epilogue, of `x` in 16 bits or of the normalized rows of `x` in f32; with the norm that comes `next` if that
    /// is a launch less.
    pub(super) fn product(
        &self,
        x: &Buffer<L>,
        norm: Option<Norm<Self>>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
        next: Option<Norm<Self>>,
    ) -> Result<()> {
        let finish = self.result(x.rows, linear, epilogue, out)?;
        let next = next.map_or(Ok(NextNorm::zeroed()), |next| self.next_norm(x.rows, linear, out.written(), next))?;
        self.run(x, norm, &linear.weight, finish, next)
    }

    /// What a product needs to know of the norm that comes next, if it is to do it.
    fn next_norm(
        &self,
        tokens: usize,
        linear: &Linear<Matrix<L>, Vector<L>>,
        out: Written,
        next: Norm<Self>,
    ) -> Result<NextNorm> {
        match self.way(tokens, &linear.weight) {
            // a cluster has enough warps for the rows
            Way::Cluster { tokens: tile, blocks } if tile <= 4 * blocks * TILE_THREADS as usize / 32 => {
                self.reserve(next.normed, tokens, linear.weight.rows, true)?;
                next.normed.normed_of = Some(out);
                let mut counters = self.tile_counters.borrow_mut();
                let tiles = tokens.div_ceil(tile);
                if counters.as_ref().is_none_or(|m| m.bytes < tiles * 4) {
                    *counters = Some(Memory::zeroed(&self.launcher, tiles.next_power_of_two().max(64) * 4)?);
                }
                Ok(NextNorm {
                    weight: next.norm.weight.at,
                    bias: next.norm.bias.at,
                    normed: next.normed.at(),
                    counters: counters.as_ref().map_or(0, |m| m.at),
                    eps: next.eps,
                    unused: 0,
                })
            }
            _ => Ok(NextNorm::zeroed()),
        }
    }

    /// The product of 16-bit rows, in a given way.
    pub(super) fn product_as(
        &self,
        way: Way,
        x: &Buffer<L>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
    ) -> Result<()> {
        let finish = self.result(x.rows, linear, epilogue, out)?;
        let (tokens, inputs) = (x.rows as u32, linear.weight.cols as u32);
        let input = Input { x: x.at(), tokens, inputs, ..Input::zeroed() };
        self.run_as(way, input, &linear.weight, finish, NextNorm::zeroed())
    }

    /// Where the results of an epilogue go; makes room for them.
    fn result(
        &self,
        tokens: usize,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
    ) -> Result<Finish> {
        let width = linear.weight.rows;
        let mut finish = Finish { bias: linear.bias.at, width: width as u32, ..Finish::zeroed() };
        finish.mode = match epilogue {
            Epilogue::Bias => BIAS,
            Epilogue::BiasGelu => GELU,
            Epilogue::BiasResidual(r) => {
                (finish.residual, finish.narrow_residual) = (r.at(), r.narrow as u32);
                RESIDUAL
            }
        };
        self.reserve(out, tokens, width, finish.mode == GELU)?;
        finish.out = out.at();
        Ok(finish)
    }

    /// Queries to `out`, keys and values to the cache's layer, which begins at `(keys, values)`.
    #[allow(clippy::too_many_arguments)] // see `Backend::norm_qkv`
    pub(super) fn qkv(
        &self,
        pass: &Pass<L>,
        x: &Buffer<L>,
        norm: Norm<Self>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        heads: &Heads,
        (keys, values): (u64, u64),
        out: &mut Buffer<L>,
    ) -> Result<()> {
        self.reserve(out, x.rows, heads.count * heads.size, true)?;
        let finish = Finish {
            out: out.at(),
            bias: linear.bias.at,
            keys,
            values,
            slots: pass.slots,
            mode: QKV,
            width: linear.weight.rows as u32,
            heads: heads.count as u32,
            head_size: heads.size as u32,
            ..Finish::zeroed()
        };
        self.run(x, Some(norm), &linear.weight, finish, NextNorm::zeroed())
    }

    fn run(
        &self,
        x: &Buffer<L>,
        norm: Option<Norm<Self>>,
        weight: &Matrix<L>,
        finish: Finish,
        next: NextNorm,
    ) -> Result<()> {
        let tokens = x.rows;
        let (count, inputs) = (tokens as u32, weight.cols as u32);
        let mut input = Input { x: x.at(), tokens: count, inputs, ..Input::zeroed() };
        let mut narrow = x.narrow;
        if let Some(n) = norm {
            let fits = shared_bytes(tokens, weight.cols, true) <= self.launcher.limits().shared_bytes as usize;
            if n.normed.normed_of.take() == Some(x.written()) {
                // done along with the product before
                (input.x, narrow) = (n.normed.at(), true);
            } else if tokens <= FEW_TOKENS && fits {
                (input.weight, input.bias, input.eps) = (n.norm.weight.at, n.norm.bias.at, n.eps);
                if n.keep {
                    self.reserve(n.normed, tokens, weight.cols, true)?;
                    input.normed = n.normed.at();
                }
            } else {
                self.layer_norm(x, 0, tokens, n.norm, n.eps, n.normed)?;
                (input.x, narrow) = (n.normed.at(), true);
            }
        }
        assert_eq!(narrow, input.weight == 0, "products read 16-bit rows, or normalize f32 rows");
        self.run_as(self.way(tokens, weight), input, weight, finish, next)
    }

    /// A product of 16-bit rows, or with [`Way::Skinny`] of few rows to normalize, in a given way.
    fn run_as(&self, way: Way, input: Input, weight: &Matrix<L>, finish: Finish, next: NextNorm) -> Result<()> {
        let tokens = input.tokens as usize;
        match way {
            Way::Skinny => self.skinny_parts(input, weight, finish),
            Way::Large => {
                let grid = [weight.rows.div_ceil(TILE), tokens.div_ceil(TILE), 1];
                let args = self.plain_args(input, weight).with(finish);
                self.launch(&self.kernel("linear_large", weight), grid, THREADS, large_shared(weight), args)
            }
            Way::Cluster { tokens: tile, blocks } => {
                let grid = [blocks * tokens.div_ceil(tile), weight.rows.div_ceil(TILE), 1];
                let args = self.tile_args(input.x, tokens, weight, tile, TILE)?;
                let args = args.with(weight.cols.div_ceil(SLICE) as u32).with(finish).with(next);
                let shape = Shape { cluster: blocks as u32, ..Shape::new(grid, TILE_THREADS, tile_shared(tile)) };
                self.launcher.launch(&format!("linear_cluster_{}_{tile}", self.suffix()), shape, &args)
            }
            Way::Hopper => {
                let rows = tokens.div_ceil(HOPPER_M);
                // two blocks share weights, unless much of the second one's work would be beyond the tokens
                let cluster = if rows.is_multiple_of(2) || rows > 8 { 2 } else { 1 };
                let tiles = rows.div_ceil(cluster) * weight.rows.div_ceil(HOPPER_N);
                let grid = [cluster * tiles.min(self.launcher.limits().processors as usize / cluster), 1, 1];
                let args = self.tile_args(input.x, tokens, weight, HOPPER_M, HOPPER_N / 2)?;
                let args = args.with(weight.cols as u32).with(finish);
                let shape = Shape { cluster: cluster as u32, ..Shape::new(grid, HOPPER_THREADS, HOPPER_SHARED) };
                self.launcher.launch(&format!("linear_hopper_{}", self.suffix()), shape, &args)
            }
        }
    }

    /// How a product with so many tokens is done.
    fn way(&self, tokens: usize, weight: &Matrix<L>) -> Way {
        let limits = self.launcher.limits();
        let hopper = self.hopper() && !weight.int8();
        if self.batch_invariant || tokens <= if hopper { FEW_TOKENS } else { TOKENS } {
            return Way::Skinny;
        }
        if !hopper {
            return Way::Large;
        }
        let processors = limits.processors as usize;
        let tile = tile_tokens(tokens);
        let tiles = tokens.div_ceil(tile) * weight.rows.div_ceil(TILE);
        // a power of two, with most multiprocessors at work
        let wanted = (processors * 7 / 10).div_ceil(tiles).next_power_of_two().min(CLUSTER);
        let most = weight.cols.div_ceil(SLICE);
        let blocks = if wanted > most { (most + 1).next_power_of_two() / 2 } else { wanted };
        // what the busiest multiprocessor has to do, in units of the smaller tile
        let large = 2 * (tokens.div_ceil(HOPPER_M) * weight.rows.div_ceil(HOPPER_N)).div_ceil(processors);
        if tokens > TOKENS && large * blocks <= (tiles * blocks).div_ceil(processors) {
            Way::Hopper
        } else {
            Way::Cluster { tokens: tile, blocks }
        }
    }

    /// A family's kernel for the weights' types.
    fn kernel(&self, family: &str, weight: &Matrix<L>) -> String {
        format!("{family}_{}{}", self.suffix(), if weight.int8() { "_int8" } else { "" })
    }

    /// The first arguments of the kernels that every GPU has.
    fn plain_args(&self, input: Input, weight: &Matrix<L>) -> Args {
        Args::new().with(input).with(weight.data.at).with(weight.scales())
    }

    /// The first arguments of Hopper's: maps of tiles of so many rows of `x` and the weights, and the tokens.
    fn tile_args(&self, x: u64, tokens: usize, weight: &Matrix<L>, x_rows: usize, w_rows: usize) -> Result<Args> {
        let map = |at, rows, tile_rows| self.launcher.tensor_map(at, rows, weight.cols, tile_rows);
        let args = Args::new().with(map(x, tokens, x_rows)?).with(map(weight.data.at, weight.rows, w_rows)?);
        Ok(args.with(tokens as u32))
    }

    /// A product by the skinny kernels, however many tokens there are.
    fn skinny_parts(&self, input: Input, weight: &Matrix<L>, finish: Finish) -> Result<()> {
        let tokens = input.tokens as usize;
        for first in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - first);
            let (f, w) = (first as u64, finish.width as u64);
            let part = Input { x: input.x + f * input.inputs as u64 * 2, tokens: count as u32, ..input };
            let narrow_out = matches!(finish.mode, GELU | QKV);
            let row = if finish.mode == QKV { w / 3 } else { w };
            let finish = Finish {
                out: finish.out + f * row * if narrow_out { 2 } else { 4 },
                residual: finish.residual + f * w * if finish.narrow_residual == 1 { 2 } else { 4 },
                slots: finish.slots + f * 4,
                ..finish
            };
            let args = self.plain_args(part, weight).with(finish);
            self.skinny("linear_skinny", weight, count, input.weight != 0, args)?;
        }
        Ok(())
    }

    /// Launches a kernel of the skinny family over all outputs of `weight`.
    fn skinny(&self, family: &str, weight: &Matrix<L>, tokens: usize, norm: bool, args: Args) -> Result<()> {
        let grid = [weight.rows.div_ceil(OUTPUTS), 1, 1];
        let kernel = format!("{}_{}", self.kernel(family, weight), tiles(tokens));
        self.launch(&kernel, grid, THREADS, shared_bytes(tokens, weight.cols, norm), args)
    }

    /// Most rows of one launch over the head.
    pub(super) fn head_rows(&self) -> usize {
        if self.batch_invariant { TOKENS } else { 2 * TILE }
    }

    /// Blocks of a launch over the head's outputs with so many rows.
    pub(super) fn head_blocks(&self, rows: usize, head: &Matrix<L>) -> usize {
        let outputs = if self.way(rows, head) == Way::Skinny { OUTPUTS } else { TILE };
        head.rows.div_ceil(outputs)
    }

    /// A kernel of the head, `head_choice` or `head_logits`: `x` is `[tokens, width]` in 16 bits, `rest` follows the weights.
    pub(super) fn head(
        &self,
        family: &str,
        x: &Buffer<L>,
        rows: std::ops::Range<usize>,
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
        rows: std::ops::Range<usize>,
        head: &Matrix<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let tokens = rows.len();
        let (x, inputs) = (x.at() + (rows.start * head.cols * 2) as u64, head.cols as u32);
        let input = Input { x, tokens: tokens as u32, inputs, ..Input::zeroed() };
        let rest = |args| rest(args).with(head.rows as u32);
        let grid = |tile: usize| [tokens.div_ceil(tile), head.rows.div_ceil(TILE), 1];
        match way {
            Way::Skinny => self.skinny(family, head, tokens, false, rest(self.plain_args(input, head))),
            Way::Large => {
                let kernel = self.kernel(&format!("{family}_large"), head);
                self.launch(&kernel, grid(TILE), THREADS, large_shared(head), rest(self.plain_args(input, head)))
            }
            Way::Cluster { .. } | Way::Hopper => {
                let tile = tile_tokens(tokens);
                let args = self.tile_args(x, tokens, head, tile, TILE)?.with(head.cols.div_ceil(SLICE) as u32);
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

/// Tokens of a tile of Hopper's smaller ones.
fn tile_tokens(tokens: usize) -> usize {
    if tokens <= 64 { 64 } else { 128 }
}

/// Shared memory of `kernels/linear_large.cu`.
fn large_shared<L: Launcher>(weight: &Matrix<L>) -> usize {
    STAGES * TILE * (2 * SLICE + if weight.int8() { SLICE + 16 } else { 2 * SLICE })
}

/// The warps' sums, and the normalized rows if there is a norm.
fn shared_bytes(tokens: usize, inputs: usize, norm: bool) -> usize {
    let sums = WARPS * 16 * tiles(tokens) * OUTPUTS * 4;
    sums + if norm { tokens * (inputs + 8) * 2 } else { 0 }
}
