//! Products and their epilogues.

use super::{Buffer, Cuda, Matrix, Pass, Vector};
use crate::device::{Args, Launcher};
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
/// Most tokens of one launch of the skinny kernels; more go to the tiles.
const TOKENS: usize = 64;
/// Most tokens that every block normalizes for itself; beyond, a launch of its own costs less.
const NORM_TOKENS: usize = 16;

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

const BIAS: u32 = 0;
const GELU: u32 = 1;
const RESIDUAL: u32 = 2;
const QKV: u32 = 3;

/// Kernel instances by tokens, in tiles of 16.
fn tiles(tokens: usize) -> usize {
    match tokens.div_ceil(16) {
        0 | 1 => 1,
        2 => 2,
        _ => 4,
    }
}

impl<L: Launcher> Cuda<L> {
    /// `linear` with its epilogue, of `x` in 16 bits or of the normalized rows of `x` in f32.
    pub(super) fn product(
        &self,
        x: &Buffer<L>,
        norm: Option<Norm<Self>>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
    ) -> Result<()> {
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
        self.reserve(out, x.rows, width, finish.mode == GELU)?;
        finish.out = out.at();
        self.run(x, norm, &linear.weight, finish)
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
        self.run(x, Some(norm), &linear.weight, finish)
    }

    fn run(&self, x: &Buffer<L>, norm: Option<Norm<Self>>, weight: &Matrix<L>, finish: Finish) -> Result<()> {
        let tokens = x.rows;
        let mut input = Input { x: x.at(), inputs: weight.cols as u32, ..Input::zeroed() };
        let mut narrow = x.narrow;
        if let Some(n) = norm {
            let fits = shared_bytes(tokens, weight.cols, true) <= self.launcher.limits().shared_bytes as usize;
            if tokens <= NORM_TOKENS && fits {
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
        let limits = self.launcher.limits();
        if tokens > TOKENS && !self.batch_invariant && limits.hopper && !weight.int8() {
            let map = |at, rows, tile_rows| self.launcher.tensor_map(at, rows, weight.cols, tile_rows);
            let args =
                Args::new().with(map(input.x, tokens, HOPPER_M)?).with(map(weight.data.at, weight.rows, HOPPER_N)?);
            let args = args.with(tokens as u32).with(weight.cols as u32).with(finish);
            let tiles = tokens.div_ceil(HOPPER_M) * weight.rows.div_ceil(HOPPER_N);
            let grid = [tiles.min(limits.processors as usize), 1, 1];
            return self.launch(&format!("linear_hopper_{}", self.suffix()), grid, HOPPER_THREADS, HOPPER_SHARED, args);
        }
        if tokens > TOKENS && !self.batch_invariant {
            let int8 = if weight.int8() { "_int8" } else { "" };
            let row_bytes = if weight.int8() { SLICE + 16 } else { 2 * SLICE };
            let shared = STAGES * TILE * (2 * SLICE + row_bytes);
            let grid = [weight.rows.div_ceil(TILE), tokens.div_ceil(TILE), 1];
            let part = Input { tokens: tokens as u32, ..input };
            let args = Args::new().with(part).with(weight.data.at).with(weight.scales()).with(finish);
            return self.launch(&format!("linear_large_{}{int8}", self.suffix()), grid, THREADS, shared, args);
        }
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
            let args = Args::new().with(part).with(weight.data.at).with(weight.scales()).with(finish);
            self.skinny("linear_skinny", weight, count, input.weight != 0, args)?;
        }
        Ok(())
    }

    /// Launches a kernel of the skinny family over all outputs of `weight`.
    fn skinny(&self, family: &str, weight: &Matrix<L>, tokens: usize, norm: bool, args: Args) -> Result<()> {
        let int8 = if weight.int8() { "_int8" } else { "" };
        let kernel = format!("{family}_{}{int8}_{}", self.suffix(), tiles(tokens));
        let shared = shared_bytes(tokens, weight.cols, norm);
        self.launch(&kernel, [weight.rows.div_ceil(OUTPUTS), 1, 1], THREADS, shared, args)
    }

    /// A skinny kernel for the head: `x` is `[tokens, width]` in 16 bits, `rest` follows the weights.
    pub(super) fn head(
        &self,
        family: &str,
        x: &Buffer<L>,
        rows: std::ops::Range<usize>,
        head: &Matrix<L>,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let input = Input {
            x: x.at() + (rows.start * head.cols * 2) as u64,
            tokens: rows.len() as u32,
            inputs: head.cols as u32,
            ..Input::zeroed()
        };
        let args = rest(Args::new().with(input).with(head.data.at).with(head.scales()));
        self.skinny(family, head, rows.len(), false, args.with(head.rows as u32))
    }
}

/// Blocks of a launch over a head's outputs.
pub(super) fn head_blocks(head_rows: usize) -> usize {
    head_rows.div_ceil(OUTPUTS)
}

/// Rows of one launch over the head.
pub(super) const HEAD_ROWS: usize = TOKENS;

/// The warps' sums, and the normalized rows if there is a norm.
fn shared_bytes(tokens: usize, inputs: usize, norm: bool) -> usize {
    let sums = WARPS * 16 * tiles(tokens) * OUTPUTS * 4;
    sums + if norm { tokens * (inputs + 8) * 2 } else { 0 }
}
