//! What training needs of a backend.
//!
//! Parameters, gradients and the optimizer's moments are flat f32 buffers, one after the other in
//! the order of the model's parameter tree. Gradients of parameters are added to (`+=`), all other
//! gradients are written (`=`) unless said otherwise. Sums run in an order that depends on the
//! shapes alone, so that runs repeat bit for bit.

use super::scalar_loss::ScalarLoss;
use super::token_loss::{LossGradients, LossOutput, TokenLoss};
use super::{Affine, Backend, Heads, Projection, Tensor};
use crate::error::{Error, Result};
use std::borrow::Cow;
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

/// What the backward pass of a linear layer reads.
pub struct LinearBackward<'a, B: Backend> {
    /// Gradient of the output, `[tokens, outputs]`.
    pub dy: &'a Tensor<B>,
    /// The input, `[tokens, inputs]`.
    pub x: &'a Tensor<B>,
    /// If the input is `gelu(u)`: `u`, whose gradient is then written instead of the input's.
    pub before_gelu: Option<&'a Tensor<B>>,
}

/// What the backward pass of a projection to one number a row reads.
pub struct ProjectionBackward<'a, B: Backend> {
    /// Gradient of the output, `[rows, 1]`.
    pub dy: &'a Tensor<B>,
    /// The input, `[rows, width]`.
    pub x: &'a Tensor<B>,
    /// Whether the input is a `max(u, 0)`: the gradient of `u` is then written instead of the
    /// input's.
    pub after_relu: bool,
}

/// What the backward pass of a layer norm reads.
pub struct NormBackward<'a, B: Backend> {
    /// Gradient of the output.
    pub dy: &'a Tensor<B>,
    /// The input.
    pub x: &'a Tensor<B>,
    /// The output, and the statistics of the rows.
    pub output: &'a NormOutput<B>,
    /// What else is part of the input's gradient: what comes along the residual branch.
    pub residual: Option<&'a Tensor<B>>,
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
    /// What parameters that decay are multiplied by first: one minus learning rate times weight
    /// decay.
    pub keep: f32,
    /// The gradient is scaled down to this norm if its norm is larger.
    pub max_norm: f32,
}

/// The flat buffers of an optimizer's step.
pub struct AdamWBuffers<'a, F> {
    /// Parameters, updated.
    pub values: &'a mut F,
    /// Read.
    pub grads: &'a F,
    /// First moments, updated; like the second ones, maybe of a part of the parameters only.
    pub first: &'a mut F,
    /// Second moments, updated.
    pub second: &'a mut F,
}

/// Neighbouring parameters of the flat buffers that an optimizer treats alike.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerGroup {
    /// Which parameters.
    pub range: Range<usize>,
    /// Where in their buffers the moments of the first of them are.
    pub moments: usize,
    /// Whether weight decay is applied to them.
    pub decays: bool,
}

/// What a step of training adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepSums {
    /// Losses, summed over all labels.
    pub loss: f64,
    /// Squares of the gradient's elements.
    pub squared_norm: f64,
}

impl StepSums {
    /// Norm of the gradient before it is clipped.
    pub fn norm(&self) -> f64 {
        self.squared_norm.sqrt()
    }

    /// Whether both are numbers: a step is taken only then.
    pub fn finite(&self) -> bool {
        self.loss.is_finite() && self.squared_norm.is_finite()
    }

    /// What the gradient is multiplied by so that its norm is at most `max`.
    pub fn clip_factor(&self, max: f32) -> f32 {
        let (norm, max) = (self.norm(), max as f64);
        if norm > max { (max / (norm + 1e-6)) as f32 } else { 1.0 }
    }
}

/// A backend that trains.
///
/// Activations have the type that the backend's GEMMs multiply in; the residual stream and its
/// gradient are f32. Nothing waits for the device but what copies to or from the host, and
/// [`TrainBackend::swap`].
pub trait TrainBackend: Backend {
    /// Parameters or gradients of a whole model, or moments of it or of a part, in f32. Parameters
    /// may be there in the type of the activations too, which the operations that change them keep
    /// equal.
    type Flat;
    /// Where a step's sums are.
    type Sums;
    /// Bytes that the values of a parameter take.
    const PARAMETER_BYTES: usize;
    /// Bytes of an element of the activations, but for the residual stream.
    const ACTIVATION_BYTES: usize;

    /// Bytes of memory that are left, if that is known.
    fn free_memory(&self) -> Option<u64>;

    /// Bytes of the logits that are there at a time for so many labels.
    fn logit_bytes(&self, labels: usize, vocabulary: usize) -> usize;

    /// Fails if GEMMs cannot be computed so.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what can.
    fn supports(&self, precision: Precision) -> Result<()>;

    /// Parameters with these values.
    ///
    /// # Errors
    /// If there is no memory for them.
    fn parameters(&self, values: Vec<f32>) -> Result<Self::Flat>;

    /// Gradients or moments of `count` parameters, all zero.
    ///
    /// # Errors
    /// If there is no memory for them.
    fn zeros(&self, count: usize) -> Result<Self::Flat>;

    /// Writes zeros.
    fn clear(&self, flat: &mut Self::Flat);

    /// How many there are.
    fn count(&self, flat: &Self::Flat) -> usize;

    /// Writes values from the host to those from `first` on.
    ///
    /// # Errors
    /// If the device fails.
    fn write(&self, flat: &mut Self::Flat, first: usize, values: &[f32]) -> Result<()>;

    /// A range of the values, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn read<'a>(&self, flat: &'a Self::Flat, range: Range<usize>) -> Result<Cow<'a, [f32]>>;

    /// Exchanges the values from `first` on with all of `other`, and waits for it.
    fn swap(&self, flat: &mut Self::Flat, first: usize, other: &mut Self::Flat);

    /// Writes all values from the host.
    ///
    /// # Errors
    /// If they are not as many, or the device fails.
    fn set_values(&self, flat: &mut Self::Flat, values: &[f32]) -> Result<()> {
        let count = self.count(flat);
        if values.len() != count {
            let given = values.len();
            return Err(Error::invalid(format!(
                "{given} values were given, the model has {count}"
            )));
        }
        self.write(flat, 0, values)
    }

    /// All values, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn values<'a>(&self, flat: &'a Self::Flat) -> Result<Cow<'a, [f32]>> {
        self.read(flat, 0..self.count(flat))
    }

    /// Room for a step's sums, all zero.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn new_sums(&self) -> Result<Self::Sums>;

    /// Writes zeros.
    fn clear_sums(&self, sums: &mut Self::Sums);

    /// The sums, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn sums(&self, sums: &Self::Sums) -> Result<StepSums>;

    /// Writes sums from the host.
    ///
    /// # Errors
    /// If the device fails.
    fn set_sums(&self, sums: &mut Self::Sums, values: StepSums) -> Result<()>;

    /// Writes `table[ids]` = `[tokens, width]` to the second of `out`, and its normalized rows, as
    /// residual stream, with their statistics to the first.
    fn embedding_norm_forward(
        &self,
        out: (&mut NormOutput<Self>, &mut Tensor<Self>),
        ids: &[u32],
        table: ParamsAt<Self, Range<usize>>,
        norm: &Affine<Range<usize>>,
        eps: f32,
    );

    /// Adds each token's gradient `[tokens, width]` to its row of the table's gradient.
    fn embedding_backward(
        &self,
        grads: &mut Self::Flat,
        dx: &Tensor<Self>,
        ids: &[u32],
        table: &Range<usize>,
    );

    /// Writes the normalized rows of `x`, as linear layers read them, and their statistics to `y`.
    fn layer_norm_forward(
        &self,
        y: &mut NormOutput<Self>,
        x: &Tensor<Self>,
        norm: ParamsAt<Self, Affine<Range<usize>>>,
        eps: f32,
    );

    /// Writes the gradient of the input, with what comes along the residual branch, to `dx`; adds
    /// those of the norm to `grads`.
    fn layer_norm_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Self::Flat,
        backward: NormBackward<Self>,
        norm: ParamsAt<Self, Affine<Range<usize>>>,
    );

    /// Writes `x W^T + bias` to `y` = `[tokens, outputs]`; if `residual` is given, with it and as
    /// residual stream.
    fn linear_forward(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
        residual: Option<&Tensor<Self>>,
    );

    /// Writes `dy W`, or what it is before a GELU, to `dx`; adds `dy^T x` and the sum of the rows
    /// of `dy` to `grads`.
    fn linear_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Self::Flat,
        backward: LinearBackward<Self>,
        linear: ParamsAt<Self, Affine<Range<usize>>>,
    );

    /// Writes `gelu(x)`, tanh form, to `y`.
    fn gelu_forward(&self, y: &mut Tensor<Self>, x: &Tensor<Self>);

    /// Turns `x` into `max(x, 0)`.
    fn relu(&self, x: &mut Tensor<Self>);

    /// Writes `x w + bias`, one number for each row of `x`, to `y` = `[rows, 1]` in f32.
    fn projection_forward(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        projection: ParamsAt<Self, Projection<Range<usize>>>,
    );

    /// Writes the gradient of the input, or of what it is the ReLU of, to `dx`, in the type of
    /// activations; adds those of the parameters to `grads`.
    fn projection_backward(
        &self,
        dx: &mut Tensor<Self>,
        grads: &mut Self::Flat,
        backward: ProjectionBackward<Self>,
        projection: ParamsAt<Self, Projection<Range<usize>>>,
    );

    /// Adds the loss of the rows of `y` = `[rows, 1]` to that of `sums`; writes its gradient to
    /// `dy`, if that is wanted.
    fn scalar_loss(
        &self,
        dy: Option<&mut Tensor<Self>>,
        y: &Tensor<Self>,
        loss: &ScalarLoss<Self>,
        sums: &mut Self::Sums,
    );

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

    /// A loss of the rows of `x` = `[labels, width]` with `targets` as labels, through the LM head
    /// `[vocabulary, width]`. The logits never leave a chunk, for which the second of `x` is room.
    fn lm_head_loss(
        &self,
        x: (&Tensor<Self>, &mut Tensor<Self>),
        targets: &[u32],
        lm_head: ParamsAt<Self, Range<usize>>,
        loss: &TokenLoss<Self>,
        to: LossOutput<Self, LossGradients<Self>>,
    );

    /// Writes a number for each label, `[labels, 1]`, to `y`.
    ///
    /// # Errors
    /// If there is no memory for them, or the device fails.
    fn upload_column(&self, y: &mut Tensor<Self>, values: &[f32]) -> Result<()>;

    /// The number of each label, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn download_column(&self, x: &Tensor<Self>) -> Result<Vec<f32>>;

    /// Writes chosen rows of `x`, in this order, to `y`.
    fn gather_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize]);

    /// Writes the rows of `x` to these of the `count` rows of `y`, and zeros to the others.
    fn scatter_rows(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &[usize], count: usize);

    /// Adds `x`, a residual stream's gradient or activations, to the activations `y`.
    fn add(&self, y: &mut Tensor<Self>, x: &Tensor<Self>);

    /// Adds the squares of these parameters' gradients, in a fixed order, to the squared norm of
    /// `sums`.
    fn squared_norm(&self, grads: &Self::Flat, groups: &[OptimizerGroup], sums: &mut Self::Sums);

    /// One step of AdamW by gradients whose squared norm is in `sums` and is clipped; none if it or
    /// the loss is no number.
    fn adamw(
        &self,
        buffers: &mut AdamWBuffers<Self::Flat>,
        groups: &[OptimizerGroup],
        step: &AdamWStep,
        sums: &Self::Sums,
    );
}
