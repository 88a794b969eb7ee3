//! Linear layers, their epilogues, and the layer norms that are done along with them.

use super::abi::{
    EPILOGUE_BIAS, EPILOGUE_GELU, EPILOGUE_HALF, EPILOGUE_QKV, EPILOGUE_RESIDUAL, EpilogueArgs,
    LinearArgs,
};
use super::gemm_select::{
    DEEP, FEW_TOKENS, HOPPER_M, HOPPER_N, HOPPER_SHARED, HOPPER_THREADS, LinearKernel, OUTPUTS,
    SHALLOW, SLICE, THREADS, TILE, TILE_THREADS, TOKENS, WARPS, large_shared, skinny_shared,
    stages_rows, tile_shared, tiles,
};
use super::{Cache, Cuda, DeviceBatch, DeviceWeight};
use crate::device::{Args, LaunchConfig, Launcher, TensorMapConfig};
use crate::error::Result;
use crate::ops::{Epilogue, LayerNorm, Linear, NormInput, Tensor, Weight as _};
use crate::tensor::DType;
use bytemuck::Zeroable;

/// Whether the results of an epilogue have 16 bits.
fn is_half(mode: u32) -> bool {
    matches!(mode, EPILOGUE_GELU | EPILOGUE_HALF | EPILOGUE_QKV)
}

impl LinearArgs {
    /// Rows in 16 bits at `x`.
    pub fn rows(x: u64, tokens: usize, inputs: usize) -> LinearArgs {
        LinearArgs { x, tokens: tokens as u32, inputs: inputs as u32, ..LinearArgs::zeroed() }
    }
}

/// What a linear layer multiplies.
pub(crate) enum LinearInput<'a, L: Launcher> {
    /// Rows in 16 bits.
    Rows(&'a Tensor<Cuda<L>>),
    /// The normalized rows of `x`, which is f32. They are in `normed` afterwards if `keep` says so,
    /// and may be otherwise.
    Normalized {
        x: &'a Tensor<Cuda<L>>,
        norm: &'a LayerNorm<Cuda<L>>,
        normed: &'a mut Tensor<Cuda<L>>,
        keep: bool,
    },
}

impl<'a, L: Launcher> From<NormInput<'a, Cuda<L>>> for LinearInput<'a, L> {
    fn from(NormInput { x, norm, normed }: NormInput<'a, Cuda<L>>) -> Self {
        LinearInput::Normalized { x, norm, normed, keep: false }
    }
}

impl<L: Launcher> LinearInput<'_, L> {
    fn tokens(&self) -> usize {
        match self {
            LinearInput::Rows(x) | LinearInput::Normalized { x, .. } => x.shape()[0],
        }
    }
}

impl<L: Launcher> Cuda<L> {
    /// A linear layer with its epilogue.
    pub(crate) fn launch_linear(
        &self,
        y: &mut Tensor<Self>,
        input: LinearInput<L>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) -> Result<()> {
        let finish = self.epilogue_args(y, input.tokens(), linear, epilogue)?;
        self.run(input, &linear.weight, finish)
    }

    /// A linear layer of 16-bit rows by a given kernel.
    pub(super) fn launch_linear_by(
        &self,
        by: LinearKernel,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) -> Result<()> {
        let tokens = x.shape()[0];
        let finish = self.epilogue_args(y, tokens, linear, epilogue)?;
        let input = LinearArgs::rows(x.at(), tokens, linear.weight.cols());
        self.run_by(by, input, &linear.weight, finish)
    }

    /// Where the results of an epilogue go; makes room for them.
    fn epilogue_args(
        &self,
        y: &mut Tensor<Self>,
        tokens: usize,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) -> Result<EpilogueArgs> {
        let width = linear.weight.rows();
        let mut finish =
            EpilogueArgs { bias: linear.bias.at, width: width as u32, ..EpilogueArgs::zeroed() };
        finish.mode = match epilogue {
            Epilogue::Bias => EPILOGUE_BIAS,
            Epilogue::BiasHalf => EPILOGUE_HALF,
            Epilogue::BiasGelu => EPILOGUE_GELU,
            Epilogue::BiasResidual(r) => {
                r.expect("linear's residual", [tokens, width], r.dtype());
                (finish.residual, finish.half_residual) = (r.at(), r.is_half() as u32);
                EPILOGUE_RESIDUAL
            }
        };
        let dtype = if is_half(finish.mode) { self.half } else { DType::F32 };
        self.reserve(y, [tokens, width], dtype)?;
        finish.out = y.at();
        Ok(finish)
    }

    /// Queries to `queries`, keys and values to the cache's layer.
    pub(super) fn launch_qkv(
        &self,
        queries: &mut Tensor<Self>,
        input: LinearInput<L>,
        qkv: &Linear<Self>,
        batch: &DeviceBatch<L>,
        cache: (&Cache<L>, usize),
    ) -> Result<()> {
        let finish = self.qkv_args(queries, input.tokens(), qkv, batch, cache)?;
        self.run(input, &qkv.weight, finish)
    }

    /// [`Cuda::launch_qkv`] of 16-bit rows by a given kernel.
    pub(super) fn launch_qkv_by(
        &self,
        by: LinearKernel,
        queries: &mut Tensor<Self>,
        (x, qkv): (&Tensor<Self>, &Linear<Self>),
        batch: &DeviceBatch<L>,
        cache: (&Cache<L>, usize),
    ) -> Result<()> {
        let tokens = x.shape()[0];
        x.expect("linear", [tokens, qkv.weight.cols()], self.half);
        let finish = self.qkv_args(queries, tokens, qkv, batch, cache)?;
        let input = LinearArgs::rows(x.at(), tokens, qkv.weight.cols());
        self.run_by(by, input, &qkv.weight, finish)
    }

    /// Where queries, keys and values go; makes room for the queries.
    fn qkv_args(
        &self,
        queries: &mut Tensor<Self>,
        tokens: usize,
        qkv: &Linear<Self>,
        batch: &DeviceBatch<L>,
        (cache, layer): (&Cache<L>, usize),
    ) -> Result<EpilogueArgs> {
        let heads = cache.heads();
        self.reserve(queries, [tokens, heads.width()], self.half)?;
        let (keys, values) = cache.layer(layer);
        Ok(EpilogueArgs {
            out: queries.at(),
            bias: qkv.bias.at,
            keys,
            values,
            slots: batch.slots,
            mode: EPILOGUE_QKV,
            width: qkv.weight.rows() as u32,
            heads: heads.count as u32,
            head_size: heads.size as u32,
            ..EpilogueArgs::zeroed()
        })
    }

    fn run(
        &self,
        input: LinearInput<L>,
        weight: &DeviceWeight<L>,
        finish: EpilogueArgs,
    ) -> Result<()> {
        let (tokens, inputs) = (input.tokens(), weight.cols());
        let mut args = LinearArgs::rows(0, tokens, inputs);
        match input {
            LinearInput::Rows(x) => {
                x.expect("linear", [tokens, inputs], self.half);
                args.x = x.at();
            }
            LinearInput::Normalized { x, norm, normed, keep } => {
                x.expect("linear with a layer norm", [tokens, inputs], DType::F32);
                let needed = skinny_shared(SHALLOW, tokens, inputs, weight.int8(), true, true);
                let fits = needed <= self.launcher.limits().shared_bytes as usize;
                if tokens <= FEW_TOKENS && fits {
                    args.x = x.at();
                    (args.weight, args.bias, args.eps) = (norm.weight.at, norm.bias.at, norm.eps);
                    if keep {
                        self.reserve(normed, [tokens, inputs], self.half)?;
                        args.normed = normed.at();
                    }
                } else {
                    self.launch_layer_norm(normed, x, (0, tokens), norm)?;
                    args.x = normed.at();
                }
            }
        }
        self.run_by(self.linear_kernel(tokens, weight), args, weight, finish)
    }

    /// A linear layer of 16-bit rows, or with [`LinearKernel::Skinny`] of few rows to normalize, by
    /// a given kernel.
    fn run_by(
        &self,
        by: LinearKernel,
        input: LinearArgs,
        weight: &DeviceWeight<L>,
        finish: EpilogueArgs,
    ) -> Result<()> {
        let tokens = input.tokens as usize;
        match by {
            LinearKernel::Skinny => self.skinny_parts(input, weight, finish),
            LinearKernel::Large => {
                let grid = [weight.rows().div_ceil(TILE), tokens.div_ceil(TILE), 1];
                let args = self.plain_args(input, weight).with(finish);
                self.launch(
                    &self.kernel("linear_large", weight),
                    grid,
                    THREADS,
                    large_shared(weight),
                    args,
                )
            }
            LinearKernel::Cluster { tokens: tile, blocks } => {
                let grid = [blocks * tokens.div_ceil(tile), weight.rows().div_ceil(TILE), 1];
                let args = self.tile_args(input.x, tokens, weight, tile, TILE)?;
                let args = args.with(weight.cols().div_ceil(SLICE) as u32).with(finish);
                let config = LaunchConfig {
                    cluster: blocks as u32,
                    ..LaunchConfig::new(grid, TILE_THREADS, tile_shared(tile))
                };
                self.launcher.launch(
                    &format!("linear_cluster_{}_{tile}", self.suffix()),
                    config,
                    &args,
                )
            }
            LinearKernel::Hopper => {
                let rows = tokens.div_ceil(HOPPER_M);
                // two blocks share weights, unless much of the second one's work would be beyond
                // the tokens
                let cluster = if rows.is_multiple_of(2) || rows > 8 { 2 } else { 1 };
                let tiles = rows.div_ceil(cluster) * weight.rows().div_ceil(HOPPER_N);
                let grid = [
                    cluster * tiles.min(self.launcher.limits().processors as usize / cluster),
                    1,
                    1,
                ];
                let args = self.tile_args(input.x, tokens, weight, HOPPER_M, HOPPER_N / 2)?;
                let args = args.with(weight.cols() as u32).with(finish);
                let config = LaunchConfig {
                    cluster: cluster as u32,
                    ..LaunchConfig::new(grid, HOPPER_THREADS, HOPPER_SHARED)
                };
                self.launcher.launch(&format!("linear_hopper_{}", self.suffix()), config, &args)
            }
        }
    }

    /// A family's kernel for the weights' types.
    pub(super) fn kernel(&self, family: &str, weight: &DeviceWeight<L>) -> String {
        format!("{family}_{}{}", self.suffix(), if weight.int8() { "_int8" } else { "" })
    }

    /// The first arguments of the kernels that every GPU has.
    pub(super) fn plain_args(&self, input: LinearArgs, weight: &DeviceWeight<L>) -> Args {
        Args::new().with(input).with(weight.data.at).with(weight.scales())
    }

    /// The first arguments of Hopper's: maps of tiles of so many rows of `x` and the weights, and
    /// the tokens.
    pub(super) fn tile_args(
        &self,
        x: u64,
        tokens: usize,
        weight: &DeviceWeight<L>,
        x_rows: usize,
        w_rows: usize,
    ) -> Result<Args> {
        let map = |at, rows, tile_rows| {
            self.launcher.tensor_map(&TensorMapConfig::tiles(at, rows, weight.cols(), tile_rows))
        };
        let args = Args::new().with(map(x, tokens, x_rows)?).with(map(
            weight.data.at,
            weight.rows(),
            w_rows,
        )?);
        Ok(args.with(tokens as u32))
    }

    /// A GEMM by the skinny kernels, however many tokens there are.
    fn skinny_parts(
        &self,
        input: LinearArgs,
        weight: &DeviceWeight<L>,
        finish: EpilogueArgs,
    ) -> Result<()> {
        let tokens = input.tokens as usize;
        for first in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - first);
            let (f, w) = (first as u64, finish.width as u64);
            let part = LinearArgs {
                x: input.x + f * input.inputs as u64 * 2,
                tokens: count as u32,
                ..input
            };
            let row = if finish.mode == EPILOGUE_QKV { w / 3 } else { w };
            let finish = EpilogueArgs {
                out: finish.out + f * row * if is_half(finish.mode) { 2 } else { 4 },
                residual: finish.residual + f * w * if finish.half_residual == 1 { 2 } else { 4 },
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
        weight: &DeviceWeight<L>,
        input: LinearArgs,
        rest: impl FnOnce(Args) -> Args,
    ) -> Result<()> {
        let (tokens, inputs) = (input.tokens as usize, weight.cols());
        let staged = input.weight == 0 && stages_rows(tokens, inputs, weight.int8());
        let input = LinearArgs { staged: staged as u32, ..input };
        let blocks = weight.rows().div_ceil(OUTPUTS);
        let norm = input.weight != 0;
        let limits = self.launcher.limits();
        let shared =
            |depth| skinny_shared(depth, tokens, inputs, weight.int8(), norm, staged || norm);
        // few blocks with long rows have to keep as much in flight as many
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
