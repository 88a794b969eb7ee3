//! Operations on rows and elements: embedding, layer norm, GELU, gathering.

use super::super::{Cuda, ROW_THREADS, ROWS_PER_BLOCK, abi};
use super::{Flat, words};
use crate::device::{Args, Launcher};
use crate::error::Result;
use crate::ops::train::{NormBackward, NormOutput, ParamsAt};
use crate::ops::{Affine, Tensor};
use crate::tensor::DType;
use std::ops::Range;

const THREADS: u32 = abi::TRAIN_THREADS as u32;
/// Rows of a block whose warps take one each.
const WARP_ROWS: usize = abi::TRAIN_THREADS / 32;

impl<L: Launcher> Cuda<L> {
    /// Launches a kernel that takes `count` elements from the second address to the first.
    pub(super) fn elementwise(&self, kernel: &str, at: (u64, u64), count: usize) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let args = Args::new().with(at.0).with(at.1).with(count as u64);
        let grid = [count.div_ceil(abi::ELEMENTWISE_BLOCK), 1, 1];
        self.launch(&format!("{kernel}_bf16"), grid, THREADS, 0, args)
    }

    /// Writes rows of `x` to `y`, and zeros where `rows` has [`abi::ABSENT`].
    pub(super) fn select_rows(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: &[u32],
    ) -> Result<()> {
        let width = x.shape()[1];
        x.expect("gather_rows", [x.shape()[0], width], self.half);
        self.reserve(y, [rows.len(), width], self.half)?;
        let mut scratch = self.train.borrow_mut();
        let from = self.send(&mut scratch.rows, bytemuck::cast_slice(rows))?;
        let args = Args::new().with(y.at()).with(x.at()).with(from);
        let args = args.with(rows.len() as u32).with(width as u32);
        self.launch("select_rows_bf16", [rows.len().div_ceil(WARP_ROWS), 1, 1], THREADS, 0, args)
    }

    /// Writes the rows for `ids` of a table in 16 bits to `y`, in f32.
    pub(super) fn launch_embedding(
        &self,
        y: &mut Tensor<Self>,
        ids: &[u32],
        width: usize,
        table: u64,
    ) -> Result<()> {
        self.reserve(y, [ids.len(), width], DType::F32)?;
        let mut scratch = self.train.borrow_mut();
        let at = self.send(&mut scratch.ids, bytemuck::cast_slice(ids))?;
        let args = Args::new().with(y.at()).with(at).with(table);
        let args = args.with(ids.len() as u32).with(width as u32);
        self.launch("embedding_bf16", [ids.len().div_ceil(WARP_ROWS), 1, 1], THREADS, 0, args)
    }

    /// Adds the rows of `dx` to those of the table's gradient at `table`.
    pub(super) fn launch_embedding_backward(
        &self,
        table: u64,
        dx: &Tensor<Self>,
        ids: &[u32],
    ) -> Result<()> {
        let width = dx.shape()[1];
        dx.expect("embedding_backward", [ids.len(), width], DType::F32);
        let mut tokens: Vec<usize> = (0..ids.len()).collect();
        tokens.sort_by_key(|&t| ids[t]); // keeps the order of the tokens of an id
        let starts: Vec<usize> =
            (0..ids.len()).filter(|&i| i == 0 || ids[tokens[i]] != ids[tokens[i - 1]]).collect();
        let mut list: Vec<u32> = starts.iter().map(|&i| ids[tokens[i]]).collect();
        list.extend(words(starts.iter().copied().chain([ids.len()])));
        list.extend(words(tokens));
        let mut scratch = self.train.borrow_mut();
        let at = self.send(&mut scratch.groups, bytemuck::cast_slice(&list))?;
        let (groups, word) = (starts.len(), |i: usize| at + 4 * i as u64);
        let args = Args::new().with(table).with(dx.at()).with(at);
        let args = args.with(word(groups)).with(word(2 * groups + 1)).with(width as u32);
        self.launch("embedding_backward", [groups, 1, 1], THREADS, 0, args)
    }

    /// Normalized rows of `x` in the type `dtype`, and their statistics.
    pub(super) fn launch_norm_train(
        &self,
        y: &mut NormOutput<Self>,
        x: &Tensor<Self>,
        (p, at): ParamsAt<Self, Affine<Range<usize>>>,
        eps: f32,
        dtype: DType,
    ) -> Result<()> {
        let ([tokens, _], width) = (x.shape(), at.weight.len());
        x.expect("layer_norm_forward", [tokens, width], DType::F32);
        self.reserve(&mut y.y, [tokens, width], dtype)?;
        self.reserve(&mut y.mean, [tokens, 1], DType::F32)?;
        self.reserve(&mut y.rstd, [tokens, 1], DType::F32)?;
        let args = Args::new().with(y.y.at()).with(y.mean.at()).with(y.rstd.at()).with(x.at());
        let args = args.with(p.values.at(at.weight.start)).with(p.values.at(at.bias.start));
        let args = args.with(tokens as u32).with(width as u32).with(eps);
        let kernel = format!("layer_norm_train_{}", dtype.name());
        self.launch(&kernel, [tokens.div_ceil(ROWS_PER_BLOCK), 1, 1], ROW_THREADS, 0, args)
    }

    pub(super) fn launch_norm_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        NormBackward { dy, x, output, residual }: NormBackward<Self>,
        (p, at): ParamsAt<Self, Affine<Range<usize>>>,
    ) -> Result<()> {
        let ([tokens, _], width) = (x.shape(), at.weight.len());
        x.expect("layer_norm_backward's input", [tokens, width], DType::F32);
        dy.expect("layer_norm_backward", [tokens, width], dy.dtype());
        if let Some(residual) = residual {
            residual.expect("layer_norm_backward's residual", [tokens, width], DType::F32);
        }
        self.reserve(dx, [tokens, width], DType::F32)?;
        let blocks = tokens.div_ceil(abi::NORM_BACKWARD_ROWS);
        let mut scratch = self.train.borrow_mut();
        let partials = self.place(&mut scratch.partials, blocks * 2 * width * 4)?;
        let args = abi::NormBackwardArgs {
            dx: dx.at(),
            partials,
            dy: dy.at(),
            x: x.at(),
            residual: residual.map_or(0, Tensor::at),
            weight: p.values.at(at.weight.start),
            mean: output.mean.at(),
            rstd: output.rstd.at(),
            tokens: tokens as u32,
            width: width as u32,
        };
        let kernel = format!("layer_norm_backward_{}", dy.dtype().name());
        self.launch(&kernel, [blocks, 1, 1], THREADS, 0, Args::new().with(args))?;
        let (weight, bias) = (grads.at(at.weight.start), grads.at(at.bias.start));
        let args = Args::new().with(weight).with(bias).with(partials);
        let args = args.with(blocks as u32).with(width as u32);
        let grid = [(2 * width).div_ceil(abi::NORM_GRADIENT_COLUMNS), 1, 1];
        self.launch("norm_gradients", grid, THREADS, 4 * abi::TRAIN_THREADS, args)
    }
}
