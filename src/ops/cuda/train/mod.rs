//! Training: [`TrainBackend`] by kernels of its own.
//!
//! The residual stream, its gradient, statistics and all parameters with their gradients and
//! moments are f32; what GEMMs and attention read and write is bf16, and so is a copy of the
//! parameters, which AdamW refreshes. Nothing in a step waits for the device: losses, the
//! gradient's norm and the decision whether the step is taken stay there.

mod attention;
mod gemm;
mod loss;
mod optimizer;
mod rows;
mod scalar_head;

use super::abi::TrainSums;
use super::{CachedUpload, Cuda, DeviceWeight, LinearInput};
use crate::device::{Args, Launcher, Memory};
use crate::error::{Error, Result};
use crate::ops::scalar_loss::ScalarLoss;
use crate::ops::token_loss::{LossGradients, LossOutput, TokenLoss};
use crate::ops::train::{
    AdamWBuffers, AdamWStep, AttentionOutput, LinearBackward, NormBackward, NormOutput,
    OptimizerGroup, ParamsAt, Precision, ProjectionBackward, StepSums, TrainBackend,
};
use crate::ops::{Affine, Backend, Epilogue, Heads, Linear, Projection, RolloutBackend, Tensor};
use crate::tensor::{DType, HostTensor};
pub use attention::TrainSequences;
use gemm::Matrix;
use std::borrow::Cow;
use std::ops::Range;

/// Parameters, gradients or moments of a model on the device.
pub struct Flat<L: Launcher> {
    /// In f32.
    values: Memory<L>,
    /// In bf16, of parameters only.
    half: Option<Memory<L>>,
    count: usize,
}

impl<L: Launcher> Flat<L> {
    /// Where parameter `i` is in f32.
    pub(crate) fn at(&self, i: usize) -> u64 {
        self.values.at + 4 * i as u64
    }

    /// Where parameter `i` is in bf16.
    fn half_at(&self, i: usize) -> u64 {
        let half = self.half.as_ref().expect("parameters have a copy in 16 bits");
        half.at + 2 * i as u64
    }
}

/// Memory of training's operations, kept from step to step.
pub(super) struct TrainScratch<L: Launcher> {
    ids: CachedUpload<L>,
    rows: CachedUpload<L>,
    groups: CachedUpload<L>,
    chunks: CachedUpload<L>,
    sequences: TrainSequences<L>,
    /// Gradients in 16 bits of what is f32.
    narrowed: Option<Memory<L>>,
    /// What is known of each label, and the gradients of the loss with respect to that.
    logit_rows: Option<Memory<L>>,
    partials: Option<Memory<L>>,
}

impl<L: Launcher> Default for TrainScratch<L> {
    fn default() -> Self {
        TrainScratch {
            ids: CachedUpload::default(),
            rows: CachedUpload::default(),
            groups: CachedUpload::default(),
            chunks: CachedUpload::default(),
            sequences: TrainSequences::default(),
            narrowed: None,
            logit_rows: None,
            partials: None,
        }
    }
}

impl<L: Launcher> Cuda<L> {
    /// A linear layer's parameters, as the operations of inference take them.
    fn linear_of(
        &self,
        (p, at): &ParamsAt<Self, Affine<Range<usize>>>,
        inputs: usize,
    ) -> Linear<Self> {
        let outputs = at.bias.len();
        let weight = p.values.half_at(at.weight.start);
        Linear {
            weight: DeviceWeight::view(&self.launcher, weight, [outputs, inputs], self.half),
            bias: Memory::view(&self.launcher, p.values.at(at.bias.start), 4 * outputs),
        }
    }

    /// Writes some parameters in 16 bits, as they are in f32; gradients and moments have no such
    /// copy.
    pub(crate) fn refresh_half(&self, flat: &Flat<L>, range: Range<usize>) -> Result<()> {
        if flat.half.is_none() {
            return Ok(());
        }
        let (half, values) = (flat.half_at(range.start), flat.at(range.start));
        self.elementwise("narrow", (half, values), range.len())
    }

    /// Waits until nothing writes parameters any more: GEMMs ask for weights before they wait for
    /// the kernels before them. After a step, reading its sums is such a wait.
    fn settle(&self, flat: &Flat<L>) -> Result<()> {
        if flat.half.is_none() {
            return Ok(());
        }
        self.launcher.read(flat.values.at, &mut [0; 4])
    }

    /// Where the elements of `x` are in 16 bits, for which `narrowed` is room if they are f32.
    fn narrow(&self, x: &Tensor<Self>, narrowed: &mut Option<Memory<L>>) -> Result<u64> {
        if x.is_half() {
            return Ok(x.at());
        }
        let [rows, width] = x.shape();
        let at = self.place(narrowed, rows * width * 2)?;
        self.elementwise("narrow", (at, x.at()), rows * width)?;
        Ok(at)
    }

    fn launch_linear_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        backward: LinearBackward<Self>,
        (p, at): ParamsAt<Self, Affine<Range<usize>>>,
    ) -> Result<()> {
        let LinearBackward { dy, x, before_gelu } = backward;
        let ([tokens, inputs], outputs) = (x.shape(), at.bias.len());
        x.expect("linear_backward's input", [tokens, inputs], self.half);
        dy.expect("linear_backward", [tokens, outputs], dy.dtype());
        let mut scratch = self.train.borrow_mut();
        let dy = Matrix::new(self.narrow(dy, &mut scratch.narrowed)?, tokens, outputs);
        let weight = Matrix::new(p.values.half_at(at.weight.start), outputs, inputs);
        self.reserve(dx, [tokens, inputs], self.half)?;
        if let Some(u) = before_gelu {
            u.expect("linear_backward's input of the GELU", [tokens, inputs], self.half);
        }
        let out = Matrix::new(dx.at(), tokens, inputs);
        self.gemm_nn(out, dy, weight, before_gelu.map(|u| u.at()))?;
        let x = Matrix::new(x.at(), tokens, inputs);
        let (dw, db) = (grads.at(at.weight.start), grads.at(at.bias.start));
        self.gemm_tn_add(dw, dy, x, db)
    }

    /// Does `work` with what attention needs to know of the packed sequences.
    fn with_sequences(
        &self,
        heads: &Heads,
        cu_seqlens: &[usize],
        work: impl FnOnce(&TrainSequences<L>) -> Result<()>,
    ) -> Result<()> {
        let mut scratch = self.train.borrow_mut();
        self.upload_train_sequences(&mut scratch.sequences, heads, cu_seqlens)?;
        work(&scratch.sequences)
    }
}

/// Elements that there is memory for: kernels take eight at a time.
fn padded(count: usize) -> usize {
    count.next_multiple_of(8)
}

/// Words as the device reads them.
fn words(numbers: impl IntoIterator<Item = usize>) -> Vec<u32> {
    numbers.into_iter().map(|n| n as u32).collect()
}

impl<L: Launcher> TrainBackend for Cuda<L> {
    type Flat = Flat<L>;
    type Sums = Memory<L>;
    const PARAMETER_BYTES: usize = 4 + 2;
    const ACTIVATION_BYTES: usize = 2;

    fn free_memory(&self) -> Option<u64> {
        self.launcher.free_memory()
    }

    fn logit_bytes(&self, labels: usize, vocabulary: usize) -> usize {
        2 * loss::CHUNK.min(labels) * vocabulary
    }

    fn supports(&self, precision: Precision) -> Result<()> {
        if precision == Precision::Bf16 && self.half == DType::Bf16 {
            return Ok(());
        }
        Err(Error::Unsupported(
            "the CUDA kernels train with bf16 operands and f32 sums; use --precision bf16, or \
            --device cpu"
                .into(),
        ))
    }

    fn parameters(&self, values: Vec<f32>) -> Result<Flat<L>> {
        let half = Some(Memory::zeroed(&self.launcher, padded(values.len()) * 2)?);
        let memory = Memory::zeroed(&self.launcher, padded(values.len()) * 4)?;
        let mut flat = Flat { values: memory, half, count: values.len() };
        self.write(&mut flat, 0, &values)?;
        Ok(flat)
    }

    fn zeros(&self, count: usize) -> Result<Flat<L>> {
        Ok(Flat { values: Memory::zeroed(&self.launcher, padded(count) * 4)?, half: None, count })
    }

    fn clear(&self, flat: &mut Flat<L>) {
        self.defer_error(|| self.launcher.zero(flat.values.at, flat.count * 4));
    }

    fn count(&self, flat: &Flat<L>) -> usize {
        flat.count
    }

    fn write(&self, flat: &mut Flat<L>, first: usize, values: &[f32]) -> Result<()> {
        assert!(first + values.len() <= flat.count, "values are written within the buffer");
        self.launcher.write(flat.at(first), bytemuck::cast_slice(values))?;
        self.refresh_half(flat, first..first + values.len())?;
        self.settle(flat)
    }

    fn read<'a>(&self, flat: &'a Flat<L>, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        self.check()?;
        assert!(range.end <= flat.count, "values are read within the buffer");
        let mut values = vec![0f32; range.len()];
        self.launcher.read(flat.at(range.start), bytemuck::cast_slice_mut(&mut values))?;
        Ok(Cow::Owned(values))
    }

    fn swap(&self, flat: &mut Flat<L>, first: usize, other: &mut Flat<L>) {
        self.defer_error(|| {
            let count = other.count;
            assert!(first + count <= flat.count, "values are exchanged within the buffer");
            let args = Args::new().with(flat.at(first)).with(other.at(0)).with(count as u64);
            let grid = [count.div_ceil(super::abi::ELEMENTWISE_BLOCK), 1, 1];
            self.launch("swap", grid, super::abi::TRAIN_THREADS as u32, 0, args)?;
            self.refresh_half(flat, first..first + count)?;
            self.settle(flat)
        });
    }

    fn new_sums(&self) -> Result<Memory<L>> {
        Memory::zeroed(&self.launcher, size_of::<TrainSums>())
    }

    fn clear_sums(&self, sums: &mut Memory<L>) {
        self.defer_error(|| self.launcher.zero(sums.at, sums.bytes));
    }

    fn sums(&self, sums: &Memory<L>) -> Result<StepSums> {
        self.check()?;
        let mut bytes = [0; size_of::<TrainSums>()];
        self.launcher.read(sums.at, &mut bytes)?;
        let TrainSums { loss, squared_norm, .. } = bytemuck::pod_read_unaligned(&bytes);
        Ok(StepSums { loss, squared_norm })
    }

    fn set_sums(&self, sums: &mut Memory<L>, values: StepSums) -> Result<()> {
        let StepSums { loss, squared_norm } = values;
        let sums_of = TrainSums { loss, squared_norm, factor: 0.0, finite: 0 };
        self.launcher.write(sums.at, bytemuck::bytes_of(&sums_of))
    }

    fn embedding_norm_forward(
        &self,
        (y, embedded): (&mut NormOutput<Self>, &mut Tensor<Self>),
        ids: &[u32],
        (p, table): ParamsAt<Self, Range<usize>>,
        norm: &Affine<Range<usize>>,
        eps: f32,
    ) {
        self.defer_error(|| {
            self.launch_embedding(embedded, ids, norm.weight.len(), p.values.half_at(table.start))?;
            self.launch_norm_train(y, embedded, (p, norm), eps, DType::F32)
        });
    }

    fn embedding_backward(
        &self,
        grads: &mut Flat<L>,
        dx: &Tensor<Self>,
        ids: &[u32],
        table: &Range<usize>,
    ) {
        self.defer_error(|| self.launch_embedding_backward(grads.at(table.start), dx, ids));
    }

    fn layer_norm_forward(
        &self,
        y: &mut NormOutput<Self>,
        x: &Tensor<Self>,
        norm: ParamsAt<Self, Affine<Range<usize>>>,
        eps: f32,
    ) {
        self.defer_error(|| self.launch_norm_train(y, x, norm, eps, self.half));
    }

    fn layer_norm_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        backward: NormBackward<Self>,
        norm: ParamsAt<Self, Affine<Range<usize>>>,
    ) {
        self.defer_error(|| self.launch_norm_backward(dx, grads, backward, norm));
    }

    fn linear_forward(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
        residual: Option<&Tensor<Self>>,
    ) {
        let epilogue = residual.map_or(Epilogue::BiasHalf, Epilogue::BiasResidual);
        let linear = self.linear_of(&linear, x.shape()[1]);
        self.defer_error(|| self.launch_linear(y, LinearInput::Rows(x), &linear, epilogue));
    }

    fn linear_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        backward: LinearBackward<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
    ) {
        self.defer_error(|| self.launch_linear_backward(dx, grads, backward, linear));
    }

    fn gelu_forward(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) {
        self.defer_error(|| {
            let [tokens, width] = x.shape();
            x.expect("gelu_forward", [tokens, width], self.half);
            self.reserve(y, [tokens, width], self.half)?;
            self.elementwise("gelu", (y.at(), x.at()), tokens * width)
        });
    }

    fn relu(&self, x: &mut Tensor<Self>) {
        self.defer_error(|| {
            let [rows, width] = x.shape();
            x.expect("relu", [rows, width], self.half);
            self.elementwise("relu", (x.at(), x.at()), rows * width)
        });
    }

    fn projection_forward(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        projection: ParamsAt<Self, Projection<Range<usize>>>,
    ) {
        self.defer_error(|| self.launch_projection(y, x, projection));
    }

    fn projection_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Flat<L>,
        backward: ProjectionBackward<Self>,
        projection: ParamsAt<Self, Projection<Range<usize>>>,
    ) {
        self.defer_error(|| self.launch_projection_backward(dx, grads, backward, projection));
    }

    fn scalar_loss(
        &self,
        dy: Option<&mut Tensor<Self>>,
        y: &Tensor<Self>,
        loss: &ScalarLoss<Self>,
        sums: &mut Memory<L>,
    ) {
        self.defer_error(|| self.launch_scalar_loss(dy, y, loss, sums.at));
    }

    fn attention_forward(
        &self,
        y: &mut AttentionOutput<Self>,
        qkv: &Tensor<Self>,
        heads: &Heads,
        cu_seqlens: &[usize],
    ) {
        self.defer_error(|| {
            self.with_sequences(heads, cu_seqlens, |s| {
                self.attention_train_forward(y, qkv, heads, s)
            })
        });
    }

    fn attention_backward(
        &self,
        dqkv: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        forward: (&Tensor<Self>, &AttentionOutput<Self>),
        heads: &Heads,
        cu_seqlens: &[usize],
    ) {
        self.defer_error(|| {
            self.with_sequences(heads, cu_seqlens, |s| {
                self.attention_train_backward(dqkv, dy, forward, heads, s)
            })
        });
    }

    fn lm_head_loss(
        &self,
        x: (&Tensor<Self>, &mut Tensor<Self>),
        targets: &[u32],
        lm_head: ParamsAt<Self, Range<usize>>,
        loss: &TokenLoss<Self>,
        to: LossOutput<Self, LossGradients<Self>>,
    ) {
        self.defer_error(|| self.launch_lm_head_loss(x, targets, lm_head, loss, to));
    }

    fn upload_column(&self, y: &mut Tensor<Self>, values: &[f32]) -> Result<()> {
        self.reserve(y, [values.len(), 1], DType::F32)?;
        if values.is_empty() {
            return Ok(());
        }
        self.launcher.write(y.at(), bytemuck::cast_slice(values))
    }

    fn download_column(&self, x: &Tensor<Self>) -> Result<Vec<f32>> {
        self.download(x)
    }

    fn gather_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize]) {
        self.defer_error(|| self.select_rows(y, x, &words(rows.iter().copied())));
    }

    fn scatter_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize], count: usize) {
        self.defer_error(|| {
            let mut from = vec![super::abi::ABSENT; count];
            rows.iter().enumerate().for_each(|(i, &row)| from[row] = i as u32);
            self.select_rows(y, x, &from)
        });
    }

    fn add(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) {
        self.defer_error(|| {
            let [rows, width] = y.shape();
            x.expect("add", [rows, width], x.dtype());
            y.expect("add's sum", [rows, width], self.half);
            let kernel = if x.is_half() { "add_half" } else { "add" };
            self.elementwise(kernel, (y.at(), x.at()), rows * width)
        });
    }

    fn squared_norm(&self, grads: &Flat<L>, groups: &[OptimizerGroup], sums: &mut Memory<L>) {
        self.defer_error(|| self.launch_squared_norm(grads, groups, sums));
    }

    fn adamw(
        &self,
        buffers: &mut AdamWBuffers<Flat<L>>,
        groups: &[OptimizerGroup],
        step: &AdamWStep,
        sums: &Memory<L>,
    ) {
        self.defer_error(|| self.launch_adamw(buffers, groups, step, sums));
    }
}

impl<L: Launcher> RolloutBackend for Cuda<L> {
    /// The 16-bit copy of the parameters that AdamW refreshes serves training and generation.
    fn shares_weights(&self, dtype: DType) -> bool {
        dtype == self.half
    }

    fn weight_of(
        &self,
        flat: &Flat<L>,
        at: Range<usize>,
        shape: [usize; 2],
        dtype: DType,
    ) -> Result<DeviceWeight<L>> {
        if self.shares_weights(dtype) {
            return Ok(DeviceWeight::view(
                &self.launcher,
                flat.half_at(at.start),
                shape,
                self.half,
            ));
        }
        let bytes = bytemuck::cast_slice(&self.read(flat, at)?).to_vec().into();
        let tensor = HostTensor { dtype: DType::F32, shape: shape.to_vec(), bytes };
        self.weight(tensor, Some(dtype))
    }

    fn vector_of(&self, flat: &Flat<L>, at: Range<usize>) -> Result<Memory<L>> {
        Ok(Memory::view(&self.launcher, flat.at(at.start), 4 * at.len()))
    }
}
