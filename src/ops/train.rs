//! What training needs of a backend.
//!
//! Parameters, gradients and the optimizer's moments are flat f32 buffers, one after the other in
//! the order of the model's parameter tree. Gradients of parameters are added to (`+=`), all other
//! gradients are written (`=`) unless said otherwise. Sums run in an order that depends on the
//! shapes alone, so that runs repeat bit for bit.

use super::{Affine, Backend, Heads, Tensor};
use std::ops::Range;

/// How the GEMMs of training are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In f32.
    F32,
    /// Operands rounded to bf16, sums in f32. Without BF16 dot products this is the same as `F32`.
    Bf16,
}

/// Packed sequences and what to predict.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// All tokens of all sequences.
    pub ids: Vec<u32>,
    /// Start of each sequence, and the total at the end.
    pub cu_seqlens: Vec<usize>,
    /// `(position in ids, token that follows)` for every position with a label, in order.
    pub labels: Vec<(usize, u32)>,
}

impl Default for PackedBatch {
    fn default() -> Self {
        PackedBatch { ids: Vec::new(), cu_seqlens: vec![0], labels: Vec::new() }
    }
}

impl PackedBatch {
    /// Adds a sequence of which the tokens from `loss_from` on are to be predicted.
    pub fn push(&mut self, ids: &[u32], loss_from: usize) {
        let start = self.ids.len();
        for (t, &id) in ids.iter().enumerate().skip(loss_from.max(1)) {
            self.labels.push((start + t - 1, id));
        }
        self.ids.extend_from_slice(ids);
        self.cu_seqlens.push(self.ids.len());
    }
}

/// The parameters that a pass reads.
pub struct Params<'a, F> {
    /// All of them.
    pub values: &'a F,
    /// How GEMMs with them are computed.
    pub precision: Precision,
}

impl<F> Clone for Params<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Params<'_, F> {}

/// Parameters, and which of them an operation takes.
pub type ParamsAt<'a, B, T> = (Params<'a, <B as TrainBackend>::Flat>, &'a T);

/// Normalized rows, and what the backward pass needs of them.
pub struct NormOutput<B: Backend> {
    /// `[tokens, width]`.
    pub y: Tensor<B>,
    /// Mean of each row, `[tokens, 1]`.
    pub mean: Tensor<B>,
    /// One over the root of each row's variance, `[tokens, 1]`.
    pub rstd: Tensor<B>,
}

impl<B: Backend> Default for NormOutput<B> {
    fn default() -> Self {
        NormOutput { y: Tensor::default(), mean: Tensor::default(), rstd: Tensor::default() }
    }
}

/// What attention gives, and what its backward pass needs.
pub struct AttentionOutput<B: Backend> {
    /// `[tokens, head, head size]`.
    pub y: Tensor<B>,
    /// Log-sum-exp of the scores, `[tokens, heads]`.
    pub lse: Tensor<B>,
}

impl<B: Backend> Default for AttentionOutput<B> {
    fn default() -> Self {
        AttentionOutput { y: Tensor::default(), lse: Tensor::default() }
    }
}

/// Where the gradients of a loss go.
pub struct LossGradients<'a, B: TrainBackend> {
    /// Factor of all of them.
    pub scale: f32,
    /// Of the hidden states: written.
    pub dx: &'a mut Tensor<B>,
    /// Of the parameters: added to.
    pub grads: &'a mut B::Flat,
}

/// What AdamW does in one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added outside the root.
    pub epsilon: f32,
    /// The learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// Root of the second moment's bias correction.
    pub root: f32,
}

/// The flat buffers of an optimizer's step.
pub struct AdamWBuffers<'a, F> {
    /// Parameters, updated.
    pub values: &'a mut F,
    /// Read.
    pub grads: &'a F,
    /// First moments, updated.
    pub first: &'a mut F,
    /// Second moments, updated.
    pub second: &'a mut F,
}

/// A backend that trains.
pub trait TrainBackend: Backend {
    /// Parameters, gradients or moments of a whole model, in f32.
    type Flat;

    /// Writes `table[ids]` = `[tokens, width]` to `y`.
    fn embedding_forward(
        &self,
        y: &mut Tensor<Self>,
        ids: &[u32],
        width: usize,
        table: ParamsAt<Self, Range<usize>>,
    );

    /// Adds each token's gradient `[tokens, width]` to its row of the table's gradient.
    fn embedding_backward(
        &self,
        grads: &mut Self::Flat,
        dx: &Tensor<Self>,
        ids: &[u32],
        table: &Range<usize>,
    );

    /// Writes the normalized rows of `x` and their statistics to `y`.
    fn layer_norm_forward(
        &self,
        y: &mut NormOutput<Self>,
        x: &Tensor<Self>,
        norm: ParamsAt<Self, Affine<Range<usize>>>,
        eps: f32,
    );

    /// Adds the gradient of the input to `dx`, which holds what comes along the residual branch,
    /// and those of the norm to `grads`. `forward` is the input and what came of it.
    fn layer_norm_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Self::Flat,
        dy: &Tensor<Self>,
        forward: (&Tensor<Self>, &NormOutput<Self>),
        norm: ParamsAt<Self, Affine<Range<usize>>>,
    );

    /// Writes `x W^T + bias`, plus `residual` if given, to `y` = `[tokens, outputs]`.
    fn linear_forward(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
        residual: Option<&Tensor<Self>>,
    );

    /// Writes `dy W` to `dx`; adds `dy^T x` and the sum of the rows of `dy` to `grads`.
    fn linear_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Self::Flat,
        dy: &Tensor<Self>,
        x: &Tensor<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
    );

    /// Writes `gelu(x)`, tanh form, to `y`.
    fn gelu_forward(&self, y: &mut Tensor<Self>, x: &Tensor<Self>);

    /// Turns the gradient of `gelu(x)` in `dy` into that of `x`.
    fn gelu_backward(&self, dy: &mut Tensor<Self>, x: &Tensor<Self>);

    /// Causal attention with ALiBi inside each sequence of `qkv` = `[tokens, head, 3, head size]`.
    fn attention_forward(
        &self,
        y: &mut AttentionOutput<Self>,
        qkv: &Tensor<Self>,
        heads: &Heads,
        cu_seqlens: &[usize],
    );

    /// Writes the gradient of `qkv` to `dqkv`. `forward` is `qkv` and what came of it.
    fn attention_backward(
        &self,
        dqkv: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        forward: (&Tensor<Self>, &AttentionOutput<Self>),
        heads: &Heads,
        cu_seqlens: &[usize],
    );

    /// Cross-entropy of the rows of `x` = `[labels, width]` against `targets`, through the LM head
    /// `[vocabulary, width]`, whose logits never leave a chunk. Returns the sum over the rows.
    fn lm_head_loss(
        &self,
        x: &Tensor<Self>,
        targets: &[u32],
        lm_head: ParamsAt<Self, Range<usize>>,
        logits: &mut Tensor<Self>,
        gradients: Option<LossGradients<Self>>,
    ) -> f64;

    /// Writes chosen rows of `x`, in this order, to `y`.
    fn gather_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize]);

    /// Writes the rows of `x` to these of the `count` rows of `y`, and zeros to the others.
    fn scatter_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize], count: usize);

    /// Writes zeros, in the shape of `like`.
    fn zero(&self, y: &mut Tensor<Self>, like: &Tensor<Self>);

    /// Writes `x` to `y`.
    fn copy(&self, y: &mut Tensor<Self>, x: &Tensor<Self>);

    /// Adds `x` to `y`.
    fn add(&self, y: &mut Tensor<Self>, x: &Tensor<Self>);

    /// One step of AdamW over a range of the flat buffers, whose parameters are multiplied by
    /// `keep` first (one minus learning rate times weight decay).
    fn adamw(
        &self,
        buffers: &mut AdamWBuffers<Self::Flat>,
        range: Range<usize>,
        keep: f32,
        step: &AdamWStep,
    );

    /// The sum of squares, in a fixed order.
    fn squared_norm(&self, x: &Self::Flat) -> f64;

    /// Multiplies all elements.
    fn scale(&self, x: &mut Self::Flat, factor: f32);
}
