//! Heads that give one number a row, and the losses of such numbers.

use super::super::{Cuda, abi};
use super::Flat;
use crate::device::{Args, Launcher};
use crate::error::Result;
use crate::ops::scalar_loss::ScalarLoss;
use crate::ops::train::{ParamsAt, ProjectionBackward};
use crate::ops::{Projection, Tensor};
use crate::tensor::DType;
use abi::ClippedValueArgs;
use std::ops::Range;

const THREADS: u32 = abi::TRAIN_THREADS as u32;
/// Rows of a block whose warps take one each.
const WARP_ROWS: usize = abi::TRAIN_THREADS / 32;

impl<L: Launcher> Cuda<L> {
    pub(super) fn launch_projection(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        (p, at): ParamsAt<Self, Projection<Range<usize>>>,
    ) -> Result<()> {
        let ([rows, _], width) = (x.shape(), at.weight.len());
        x.expect("projection_forward", [rows, width], self.half);
        self.reserve(y, [rows, 1], DType::F32)?;
        let bias = at.bias.as_ref().map_or(0, |b| p.values.at(b.start));
        let args = Args::new().with(y.at()).with(x.at()).with(p.values.at(at.weight.start));
        let args = args.with(bias).with(rows as u32).with(width as u32);
        self.launch("projection_bf16", [rows.div_ceil(WARP_ROWS), 1, 1], THREADS, 0, args)
    }

    pub(super) fn launch_projection_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        ProjectionBackward { dy, x, after_relu }: ProjectionBackward<Self>,
        (p, at): ParamsAt<Self, Projection<Range<usize>>>,
    ) -> Result<()> {
        let ([rows, _], width) = (x.shape(), at.weight.len());
        x.expect("projection_backward's input", [rows, width], self.half);
        dy.expect("projection_backward", [rows, 1], DType::F32);
        self.reserve(dx, [rows, width], self.half)?;
        let args = Args::new().with(dx.at()).with(dy.at()).with(x.at());
        let args = args.with(p.values.at(at.weight.start)).with(rows as u32).with(width as u32);
        let args = args.with(after_relu as u32);
        let grid = [rows.div_ceil(WARP_ROWS), 1, 1];
        self.launch("projection_backward_bf16", grid, THREADS, 0, args)?;
        let bias = at.bias.as_ref().map_or(0, |b| grads.at(b.start));
        let args = Args::new().with(grads.at(at.weight.start)).with(bias).with(dy.at());
        let args = args.with(x.at()).with(rows as u32).with(width as u32);
        let grid = [width.div_ceil(abi::PROJECTION_COLUMNS), 1, 1];
        // four sums a thread
        self.launch("projection_gradients_bf16", grid, THREADS, 16 * abi::TRAIN_THREADS, args)
    }

    pub(super) fn launch_scalar_loss(
        &self,
        dy: Option<&mut Tensor<Self>>,
        y: &Tensor<Self>,
        loss: &ScalarLoss<Self>,
        sums: u64,
    ) -> Result<()> {
        let rows = y.shape()[0];
        y.expect("scalar_loss", [rows, 1], DType::F32);
        loss.expect(rows);
        let dy = match dy {
            Some(dy) => {
                self.reserve(dy, [rows, 1], DType::F32)?;
                dy.at()
            }
            None => 0,
        };
        let args = Args::new().with(sums).with(dy).with(y.at());
        let (kernel, args) = match loss {
            ScalarLoss::Squared { targets, scale } => {
                ("squared_loss", args.with(targets.at()).with(rows as u32).with(*scale))
            }
            ScalarLoss::Pairwise { scale } => {
                ("pairwise_loss", args.with(rows as u32).with(*scale))
            }
            ScalarLoss::ClippedValue(of) => {
                let args = ClippedValueArgs {
                    sums,
                    dy,
                    y: y.at(),
                    old_values: of.old_values.at(),
                    returns: of.returns.at(),
                    rows: rows as u32,
                    clip: of.clip,
                    coefficient: of.coefficient,
                    scale: of.scale,
                };
                ("clipped_value_loss", Args::new().with(args))
            }
        };
        self.launch(kernel, [1, 1, 1], THREADS, 8 * abi::TRAIN_THREADS, args)
    }
}
