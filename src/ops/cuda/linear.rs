//! Products and their epilogues.

use super::ways::{
    DEEP, FEW_TOKENS, HOPPER_M, HOPPER_N, HOPPER_SHARED, HOPPER_THREADS, OUTPUTS, SHALLOW, SLICE,
    THREADS, TILE, TILE_THREADS, TOKENS, WARPS, Way, large_shared, skinny_shared, stages_rows,
    tile_shared, tiles,
};
use super::{Buffer, Cuda, Matrix, Pass, Vector, Written};
use crate::device::{Args, Launcher, Memory, Shape};
use crate::error::Result;
use crate::ops::{Epilogue, Heads, Linear, Norm};
use bytemuck::{Pod, Zeroable};

/// `Input` of `kernels/include/linear.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Input {
    x: u64,
    weight: u64,
    bias: u64,
    normed: u64,
    eps: f32,
    tokens: u32,
    inputs: u32,
    staged: u32,
}

impl Input {
    /// Rows in 16 bits at `x`.
    pub fn rows(x: u64, tokens: usize, inputs: usize) -> Input {
        Input { x, tokens: tokens as u32, inputs: inputs as u32, ..Input::zeroed() }
    }
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

impl<L: Launcher> Cuda<L> {
    /// `linear` with its epilogue, of `x` in 16 bits or of the normalized rows of `x` in f32; with
    /// the norm that comes `next` if that is a launch less.
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
        let next = next.map_or(Ok(NextNorm::zeroed()), |next| {
            self.next_norm(x.rows, linear, out.written(), next)
        })?;
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
            Way::Cluster { tokens: tile, blocks }
                if tile <= 4 * blocks * TILE_THREADS as usize / 32 =>
            {
                self.reserve(next.normed, tokens, linear.weight.rows, true)?;
                next.normed.normed_of = Some(out);
                let mut counters = self.tile_counters.borrow_mut();
                let tiles = tokens.div_ceil(tile);
                if counters.as_ref().is_none_or(|m| m.bytes < tiles * 4) {
                    *counters = Some(Memory::zeroed(
                        &self.launcher,
                        tiles.next_power_of_two().max(64) * 4,
                    )?);
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
        let input = Input::rows(x.at(), x.rows, linear.weight.cols);
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
        let mut input = Input::rows(x.at(), tokens, weight.cols);
        let mut narrow = x.narrow;
        if let Some(n) = norm {
            let needed = skinny_shared(SHALLOW, tokens, weight.cols, weight.int8(), true, true);
            let fits = needed <= self.launcher.limits().shared_bytes as usize;
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
    fn run_as(
        &self,
        way: Way,
        input: Input,
        weight: &Matrix<L>,
        finish: Finish,
        next: NextNorm,
    ) -> Result<()> {
        let tokens = input.tokens as usize;
        match way {
            Way::Skinny => self.skinny_parts(input, weight, finish),
            Way::Large => {
                let grid = [weight.rows.div_ceil(TILE), tokens.div_ceil(TILE), 1];
                let args = self.plain_args(input, weight).with(finish);
                self.launch(
                    &self.kernel("linear_large", weight),
                    grid,
                    THREADS,
                    large_shared(weight),
                    args,
                )
            }
            Way::Cluster { tokens: tile, blocks } => {
                let grid = [blocks * tokens.div_ceil(tile), weight.rows.div_ceil(TILE), 1];
                let args = self.tile_args(input.x, tokens, weight, tile, TILE)?;
                let args = args.with(weight.cols.div_ceil(SLICE) as u32).with(finish).with(next);
                let shape = Shape {
                    cluster: blocks as u32,
                    ..Shape::new(grid, TILE_THREADS, tile_shared(tile))
                };
                self.launcher.launch(
                    &format!("linear_cluster_{}_{tile}", self.suffix()),
                    shape,
                    &args,
                )
            }
            Way::Hopper => {
                let rows = tokens.div_ceil(HOPPER_M);
                // two blocks share weights, unless much of the second one's work would be beyond
                // the tokens
                let cluster = if rows.is_multiple_of(2) || rows > 8 { 2 } else { 1 };
                let tiles = rows.div_ceil(cluster) * weight.rows.div_ceil(HOPPER_N);
                let grid = [
                    cluster * tiles.min(self.launcher.limits().processors as usize / cluster),
                    1,
                    1,
                ];
                let args = self.tile_args(input.x, tokens, weight, HOPPER_M, HOPPER_N / 2)?;
                let args = args.with(weight.cols as u32).with(finish);
                let shape = Shape {
                    cluster: cluster as u32,
                    ..Shape::new(grid, HOPPER_THREADS, HOPPER_SHARED)
                };
                self.launcher.launch(&format!("linear_hopper_{}", self.suffix()), shape, &args)
            }
        }
    }

    /// A family's kernel for the weights' types.
    pub(super) fn kernel(&self, family: &str, weight: &Matrix<L>) -> String {
        format!("{family}_{}{}", self.suffix(), if weight.int8() { "_int8" } else { "" })
    }

    /// The first arguments of the kernels that every GPU has.
    pub(super) fn plain_args(&self, input: Input, weight: &Matrix<L>) -> Args {
        Args::new().with(input).with(weight.data.at).with(weight.scales())
    }

    /// The first arguments of Hopper's: maps of tiles of so many rows of `x` and the weights, and
    /// the tokens.
    pub(super) fn tile_args(
        &self,
        x: u64,
        tokens: usize,
        weight: &Matrix<L>,
        x_rows: usize,
        w_rows: usize,
    ) -> Result<Args> {
        let map = |at, rows, tile_rows| self.launcher.tensor_map(at, rows, weight.cols, tile_rows);
        let args = Args::new().with(map(x, tokens, x_rows)?).with(map(
            weight.data.at,
            weight.rows,
            w_rows,
        )?);
        Ok(args.with(tokens as u32))
    }

    /// A product by the skinny kernels, however many tokens there are.
    fn skinny_parts(&self, input: Input, weight: &Matrix<L>, finish: Finish) -> Result<()> {
        let tokens = input.tokens as usize;
        for first in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - first);
            let (f, w) = (first as u64, finish.width as u64);
            let part =
                Input { x: input.x + f * input.inputs as u64 * 2, tokens: count as u32, ..input };
            let narrow_out = matches!(finish.mode, GELU | QKV);
            let row = if finish.mode == QKV { w / 3 } else { w };
            let finish = Finish {
                out: finish.out + f * row * if narrow_out { 2 } else { 4 },
                residual: finish.residual + f * w * if finish.narrow_residual == 1 { 2 } else { 4 },
                slots: finish.slots + f * 4,
                ..finish
            };
            self.skinny("linear_skinny", weight, part, |args| args.with(finish))?;
        }
        Ok(())
    }

    /// Launches a kernel of the skinny family over all outputs of `weight`; `rest` follows the
    /// weights.
    pub(super) fn skinny(
        &self,
        family: &str,
        weight: &Matrix<L>,
        input: Input,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let (tokens, inputs) = (input.tokens as usize, weight.cols);
        let staged = input.weight == 0 && stages_rows(tokens, inputs, weight.int8());
        let input = Input { staged: staged as u32, ..input };
        let blocks = weight.rows.div_ceil(OUTPUTS);
        let norm = input.weight != 0;
        let limits = self.launcher.limits();
        let shared =
            |depth| skinny_shared(depth, tokens, inputs, weight.int8(), norm, staged || norm);
        // few blocks with long rows have to keep as much on its way as many
        let round = WARPS * 64 / if weight.int8() { 1 } else { 2 };
        let deep = family == "linear_skinny"
            && tiles(tokens) == 1
            && blocks <= limits.processors as usize
            && inputs > SHALLOW * round
            && shared(DEEP) <= limits.shared_bytes as usize;
        let (depth, suffix) = if deep { (DEEP, "_deep") } else { (SHALLOW, "") };
        let kernel = format!("{}_{}{suffix}", self.kernel(family, weight), tiles(tokens));
        self.launch(
            &kernel,
            [blocks, 1, 1],
            THREADS,
            shared(depth),
            rest(self.plain_args(input, weight)),
        )
    }
}
