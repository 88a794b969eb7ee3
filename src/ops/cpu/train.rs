//! Training on the CPU: [`TrainBackend`] over flat f32 buffers.

use super::attention_train::{AttentionBackward, PackedAttention};
use super::linear_train::LinearParams;
use super::norm_train::{NormBackward, NormParams};
use super::threads::Disjoint;
use super::{Cpu, embedding_train, linear_train, loss, norm_train, optimizer};
use crate::ops::train::{
    AdamWBuffers, AdamWStep, AttentionOutput, LossGradients, NormOutput, Params, ParamsAt,
    TrainBackend,
};
use crate::ops::{Affine, Heads, Tensor};
use crate::tensor::DType;
use std::ops::Range;

/// Columns that one task sums over all tokens.
pub(super) const COLUMNS: usize = 64;

/// Two mutable ranges of a buffer, the first before the second.
fn pair_mut<'a>(v: &'a mut [f32], at: &Affine<Range<usize>>) -> (&'a mut [f32], &'a mut [f32]) {
    let (low, high) = v.split_at_mut(at.bias.start);
    (&mut low[at.weight.clone()], &mut high[..at.bias.len()])
}

fn linear_params<'a>((p, at): (Params<'a, Vec<f32>>, &Affine<Range<usize>>)) -> LinearParams<'a> {
    LinearParams {
        precision: p.precision,
        weight: &p.values[at.weight.clone()],
        bias: &p.values[at.bias.clone()],
    }
}

impl TrainBackend for Cpu {
    type Flat = Vec<f32>;

    fn embedding_forward(
        &self,
        y: &mut Tensor<Cpu>,
        ids: &[u32],
        width: usize,
        (p, table): ParamsAt<Cpu, Range<usize>>,
    ) {
        let out = self.room(y, [ids.len(), width]);
        embedding_train::embed(self, ids, &p.values[table.clone()], out);
    }

    fn embedding_backward(
        &self,
        grads: &mut Vec<f32>,
        dx: &Tensor<Cpu>,
        ids: &[u32],
        table: &Range<usize>,
    ) {
        embedding_train::embed_backward(self, ids, dx.buffer(), &mut grads[table.clone()]);
    }

    fn layer_norm_forward(
        &self,
        y: &mut NormOutput<Cpu>,
        x: &Tensor<Cpu>,
        (p, at): ParamsAt<Cpu, Affine<Range<usize>>>,
        eps: f32,
    ) {
        let norm = NormParams {
            weight: &p.values[at.weight.clone()],
            bias: &p.values[at.bias.clone()],
            eps,
        };
        let [tokens, width] = x.shape();
        x.expect("layer_norm_forward", [tokens, norm.weight.len()], DType::F32);
        let stats = (self.room(&mut y.mean, [tokens, 1]), self.room(&mut y.rstd, [tokens, 1]));
        let out = self.room(&mut y.y, [tokens, width]);
        norm_train::layer_norm(self, x.buffer(), &norm, out, (&mut stats.0[..], &mut stats.1[..]));
    }

    fn layer_norm_backward(
        &self,
        dx: &mut Tensor<Cpu>,
        grads: &mut Vec<f32>,
        dy: &Tensor<Cpu>,
        (x, n): (&Tensor<Cpu>, &NormOutput<Cpu>),
        (p, at): ParamsAt<Cpu, Affine<Range<usize>>>,
    ) {
        dy.expect("layer_norm_backward", x.shape(), DType::F32);
        dx.expect("layer_norm_backward's residual", x.shape(), DType::F32);
        let backward = NormBackward {
            dy: dy.buffer(),
            x: x.buffer(),
            weight: &p.values[at.weight.clone()],
            mean: n.mean.buffer(),
            rstd: n.rstd.buffer(),
        };
        norm_train::layer_norm_backward(self, &backward, &mut dx.buffer, pair_mut(grads, at));
    }

    fn linear_forward(
        &self,
        y: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        linear: ParamsAt<Cpu, Affine<Range<usize>>>,
        residual: Option<&Tensor<Cpu>>,
    ) {
        let linear = linear_params(linear);
        let shape = [x.shape()[0], linear.bias.len()];
        if let Some(residual) = residual {
            residual.expect("linear_forward's residual", shape, DType::F32);
        }
        let residual = residual.map(|r| &r.buffer()[..]);
        linear_train::linear(self, x.buffer(), &linear, residual, self.room(y, shape));
    }

    fn linear_backward(
        &self,
        dx: &mut Tensor<Cpu>,
        grads: &mut Vec<f32>,
        dy: &Tensor<Cpu>,
        x: &Tensor<Cpu>,
        linear: ParamsAt<Cpu, Affine<Range<usize>>>,
    ) {
        let at = linear.1;
        let linear = linear_params(linear);
        dy.expect("linear_backward", [x.shape()[0], linear.bias.len()], DType::F32);
        let (forward, out) = ((&dy.buffer()[..], &x.buffer()[..]), self.room(dx, x.shape()));
        linear_train::linear_backward(self, forward, &linear, out, pair_mut(grads, at));
    }

    fn gelu_forward(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        linear_train::gelu(self, x.buffer(), self.room(y, x.shape()));
    }

    fn gelu_backward(&self, dy: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        dy.expect("gelu_backward", x.shape(), DType::F32);
        linear_train::gelu_backward(self, x.buffer(), &mut dy.buffer);
    }

    fn attention_forward(
        &self,
        y: &mut AttentionOutput<Cpu>,
        qkv: &Tensor<Cpu>,
        heads: &Heads,
        cu_seqlens: &[usize],
    ) {
        let tokens = qkv.shape()[0];
        qkv.expect("attention_forward", [tokens, 3 * heads.width()], DType::F32);
        let lse = self.room(&mut y.lse, [tokens, heads.count]);
        let out = self.room(&mut y.y, [tokens, heads.width()]);
        PackedAttention::new(heads, cu_seqlens).forward(self, qkv.buffer(), out, lse);
    }

    fn attention_backward(
        &self,
        dqkv: &mut Tensor<Cpu>,
        dy: &Tensor<Cpu>,
        (qkv, a): (&Tensor<Cpu>, &AttentionOutput<Cpu>),
        heads: &Heads,
        cu_seqlens: &[usize],
    ) {
        dy.expect("attention_backward", a.y.shape(), DType::F32);
        let backward = AttentionBackward {
            qkv: qkv.buffer(),
            out: a.y.buffer(),
            lse: a.lse.buffer(),
            dout: dy.buffer(),
        };
        let out = self.room(dqkv, qkv.shape());
        PackedAttention::new(heads, cu_seqlens).backward(self, &backward, out);
    }

    fn lm_head_loss(
        &self,
        x: &Tensor<Cpu>,
        targets: &[u32],
        (p, at): ParamsAt<Cpu, Range<usize>>,
        logits: &mut Tensor<Cpu>,
        gradients: Option<LossGradients<Cpu>>,
    ) -> f64 {
        x.expect("lm_head_loss", [targets.len(), x.shape()[1]], DType::F32);
        let lm_head = (p.precision, &p.values[at.clone()]);
        let gradients = gradients.map(|g| {
            let dx = self.room(g.dx, x.shape());
            (g.scale, &mut dx[..], &mut g.grads[at.clone()])
        });
        let logits = &mut logits.buffer;
        loss::cross_entropy(self, x.buffer(), lm_head, targets, logits, gradients)
    }

    fn gather_rows(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>, rows: &[usize]) {
        let width = x.shape()[1];
        let out = self.room(y, [rows.len(), width]);
        for (out, row) in out.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&x.buffer()[row * width..(row + 1) * width]);
        }
    }

    fn scatter_rows(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>, rows: &[usize], count: usize) {
        let width = x.shape()[1];
        x.expect("scatter_rows", [rows.len(), width], DType::F32);
        let out = self.room(y, [count, width]);
        out.fill(0.0);
        for (x, row) in x.buffer().chunks_exact(width).zip(rows) {
            out[row * width..(row + 1) * width].copy_from_slice(x);
        }
    }

    fn zero(&self, y: &mut Tensor<Cpu>, like: &Tensor<Cpu>) {
        self.room(y, like.shape()).fill(0.0);
    }

    fn copy(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        self.room(y, x.shape()).copy_from_slice(x.buffer());
    }

    fn add(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        y.expect("add", x.shape(), DType::F32);
        y.buffer.iter_mut().zip(x.buffer()).for_each(|(y, x)| *y += x);
    }

    fn adamw(
        &self,
        buffers: &mut AdamWBuffers<Vec<f32>>,
        range: Range<usize>,
        keep: f32,
        step: &AdamWStep,
    ) {
        optimizer::adamw(self, buffers, range, keep, step);
    }

    fn squared_norm(&self, x: &Vec<f32>) -> f64 {
        optimizer::squared_norm(self, x)
    }

    fn scale(&self, x: &mut Vec<f32>, factor: f32) {
        let out = Disjoint::new(x);
        self.threads.run_ranges(out.len(), optimizer::GRAIN, |r| {
            // SAFETY: ranges are disjoint.
            unsafe { out.slice(r) }.iter_mut().for_each(|v| *v *= factor);
        });
    }
}
