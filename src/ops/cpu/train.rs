//! Training on the CPU: [`TrainBackend`] over flat f32 buffers.

use super::attention_train::{AttentionBackward, PackedAttention};
use super::linear::CpuWeight;
use super::linear_train::LinearParams;
use super::norm_train::NormParams;
use super::{Cpu, embedding_train, linear_train, loss, norm_train, optimizer, scalar_train};
use crate::error::Result;
use crate::memory;
use crate::ops::scalar_loss::ScalarLoss;
use crate::ops::token_loss::{LossGradients, LossOutput, TokenLoss};
use crate::ops::train::{
    AdamWBuffers, AdamWStep, AttentionOutput, LinearBackward, NormBackward, NormOutput,
    OptimizerGroup, Params, ParamsAt, Precision, ProjectionBackward, StepSums, TrainBackend,
};
use crate::ops::{Affine, Backend, Heads, Projection, RolloutBackend, Tensor};
use crate::tensor::{DType, HostTensor};
use std::borrow::Cow;
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
    type Sums = StepSums;
    const PARAMETER_BYTES: usize = 4;
    const ACTIVATION_BYTES: usize = 4;

    fn free_memory(&self) -> Option<u64> {
        memory::available()
    }

    fn logit_bytes(&self, labels: usize, vocabulary: usize) -> usize {
        4 * loss::chunk_rows(labels, vocabulary) * vocabulary
    }

    fn supports(&self, _: Precision) -> Result<()> {
        Ok(())
    }

    fn parameters(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn zeros(&self, count: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; count])
    }

    fn clear(&self, flat: &mut Vec<f32>) {
        flat.fill(0.0);
    }

    fn count(&self, flat: &Vec<f32>) -> usize {
        flat.len()
    }

    fn write(&self, flat: &mut Vec<f32>, first: usize, values: &[f32]) -> Result<()> {
        flat[first..first + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read<'a>(&self, flat: &'a Vec<f32>, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(&flat[range]))
    }

    fn swap(&self, flat: &mut Vec<f32>, first: usize, other: &mut Vec<f32>) {
        flat[first..first + other.len()].swap_with_slice(other);
    }

    fn new_sums(&self) -> Result<StepSums> {
        Ok(StepSums::default())
    }

    fn clear_sums(&self, sums: &mut StepSums) {
        *sums = StepSums::default();
    }

    fn sums(&self, sums: &StepSums) -> Result<StepSums> {
        Ok(*sums)
    }

    fn set_sums(&self, sums: &mut StepSums, values: StepSums) -> Result<()> {
        *sums = values;
        Ok(())
    }

    fn embedding_norm_forward(
        &self,
        (y, embedded): (&mut NormOutput<Cpu>, &mut Tensor<Cpu>),
        ids: &[u32],
        (p, table): ParamsAt<Cpu, Range<usize>>,
        norm: &Affine<Range<usize>>,
        eps: f32,
    ) {
        let out = self.room(embedded, [ids.len(), norm.weight.len()]);
        embedding_train::embed(self, ids, &p.values[table.clone()], out);
        self.layer_norm_forward(y, embedded, (p, norm), eps);
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
        backward: NormBackward<Cpu>,
        (p, at): ParamsAt<Cpu, Affine<Range<usize>>>,
    ) {
        let NormBackward { dy, x, output, residual } = backward;
        dy.expect("layer_norm_backward", x.shape(), DType::F32);
        if let Some(residual) = residual {
            residual.expect("layer_norm_backward's residual", x.shape(), DType::F32);
        }
        let backward = norm_train::NormBackward {
            dy: dy.buffer(),
            x: x.buffer(),
            residual: residual.map(|r| &r.buffer()[..]),
            weight: &p.values[at.weight.clone()],
            mean: output.mean.buffer(),
            rstd: output.rstd.buffer(),
        };
        let out = self.room(dx, x.shape());
        norm_train::layer_norm_backward(self, &backward, out, pair_mut(grads, at));
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
        LinearBackward { dy, x, before_gelu }: LinearBackward<Cpu>,
        linear: ParamsAt<Cpu, Affine<Range<usize>>>,
    ) {
        let at = linear.1;
        let linear = linear_params(linear);
        dy.expect("linear_backward", [x.shape()[0], linear.bias.len()], DType::F32);
        let (forward, out) = ((&dy.buffer()[..], &x.buffer()[..]), self.room(dx, x.shape()));
        linear_train::linear_backward(self, forward, &linear, out, pair_mut(grads, at));
        if let Some(u) = before_gelu {
            u.expect("linear_backward's input of the GELU", x.shape(), DType::F32);
            linear_train::gelu_backward(self, u.buffer(), out);
        }
    }

    fn gelu_forward(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        linear_train::gelu(self, x.buffer(), self.room(y, x.shape()));
    }

    fn relu(&self, x: &mut Tensor<Cpu>) {
        scalar_train::relu(self, &mut x.buffer);
    }

    fn projection_forward(
        &self,
        y: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        (p, at): ParamsAt<Cpu, Projection<Range<usize>>>,
    ) {
        let rows = x.shape()[0];
        x.expect("projection_forward", [rows, at.weight.len()], DType::F32);
        let bias = at.bias.as_ref().map_or(0.0, |b| p.values[b.start]);
        let weight = &p.values[at.weight.clone()];
        scalar_train::project(self, x.buffer(), weight, bias, self.room(y, [rows, 1]));
    }

    fn projection_backward(
        &self,
        dx: &mut Tensor<Cpu>,
        grads: &mut Vec<f32>,
        ProjectionBackward { dy, x, after_relu }: ProjectionBackward<Cpu>,
        (p, at): ParamsAt<Cpu, Projection<Range<usize>>>,
    ) {
        let rows = x.shape()[0];
        x.expect("projection_backward's input", [rows, at.weight.len()], DType::F32);
        dy.expect("projection_backward", [rows, 1], DType::F32);
        let weight = &p.values[at.weight.clone()];
        let (out, dw) = (self.room(dx, x.shape()), &mut grads[at.weight.clone()]);
        let forward = (&dy.buffer()[..], &x.buffer()[..]);
        scalar_train::project_backward(self, forward, (weight, after_relu), out, dw);
        if let Some(bias) = &at.bias {
            grads[bias.start] += dy.buffer().iter().sum::<f32>();
        }
    }

    fn scalar_loss(
        &self,
        dy: Option<&mut Tensor<Cpu>>,
        y: &Tensor<Cpu>,
        loss: &ScalarLoss<Cpu>,
        sums: &mut StepSums,
    ) {
        let rows = y.shape()[0];
        y.expect("scalar_loss", [rows, 1], DType::F32);
        loss.expect(rows);
        let dy = dy.map(|dy| &mut self.room(dy, [rows, 1])[..]);
        sums.loss += scalar_train::scalar_loss(y.buffer(), loss, dy);
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
        (x, logits): (&Tensor<Cpu>, &mut Tensor<Cpu>),
        targets: &[u32],
        (p, at): ParamsAt<Cpu, Range<usize>>,
        loss: &TokenLoss<Cpu>,
        to: LossOutput<Cpu, LossGradients<Cpu>>,
    ) {
        x.expect("lm_head_loss", [targets.len(), x.shape()[1]], DType::F32);
        loss.expect(targets.len());
        let head = &p.values[at.clone()];
        let labels = loss::Labels { x: x.buffer(), head, precision: p.precision, targets };
        let stats = to.stats.map(|s| {
            let shape = [targets.len(), 1];
            (
                &mut self.room(&mut s.log_probs, shape)[..],
                &mut self.room(&mut s.entropies, shape)[..],
            )
        });
        let gradients = to.gradients.map(|g| {
            let dx = self.room(g.dx, x.shape());
            (&mut dx[..], g.grads.map(|grads| &mut grads[at.clone()]))
        });
        let logits = &mut logits.buffer;
        to.sums.loss += loss::token_loss(self, &labels, loss, logits, stats, gradients);
    }

    fn upload_column(&self, y: &mut Tensor<Cpu>, values: &[f32]) -> Result<()> {
        self.room(y, [values.len(), 1]).copy_from_slice(values);
        Ok(())
    }

    fn download_column(&self, x: &Tensor<Cpu>) -> Result<Vec<f32>> {
        Ok(x.buffer().clone())
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

    fn add(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>) {
        y.expect("add", x.shape(), DType::F32);
        y.buffer.iter_mut().zip(x.buffer()).for_each(|(y, x)| *y += x);
    }

    fn squared_norm(&self, grads: &Vec<f32>, groups: &[OptimizerGroup], sums: &mut StepSums) {
        // neighbours are one range, however many groups they are
        for neighbours in groups.chunk_by(|a, b| a.range.end == b.range.start) {
            let range = neighbours[0].range.start..neighbours[neighbours.len() - 1].range.end;
            sums.squared_norm += optimizer::squared_norm(self, &grads[range]);
        }
    }

    fn adamw(
        &self,
        buffers: &mut AdamWBuffers<Vec<f32>>,
        groups: &[OptimizerGroup],
        step: &AdamWStep,
        sums: &StepSums,
    ) {
        if sums.finite() {
            let factor = sums.clip_factor(step.max_norm);
            groups.iter().for_each(|group| optimizer::adamw(self, buffers, group, (step, factor)));
        }
    }
}

impl RolloutBackend for Cpu {
    /// Training multiplies by the f32 parameters themselves, generation by a packed copy.
    fn shares_weights(&self, _: DType) -> bool {
        false
    }

    fn weight_of(
        &self,
        flat: &Vec<f32>,
        at: Range<usize>,
        shape: [usize; 2],
        dtype: DType,
    ) -> Result<CpuWeight> {
        let bytes = bytemuck::cast_slice(&flat[at]).to_vec().into();
        let tensor = HostTensor { dtype: DType::F32, shape: shape.to_vec(), bytes };
        self.weight(tensor, Some(dtype))
    }

    fn vector_of(&self, flat: &Vec<f32>, at: Range<usize>) -> Result<Vec<f32>> {
        Ok(flat[at].to_vec())
    }
}
