//! The layers that models are made of, as backends hold them.

use super::{Backend, Tensor};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a linear layer does with its sums before it writes them.
pub enum Epilogue<'a, B: Backend> {
    /// y = x W^T + b
    Bias,
    /// The same in the type in which linear layers read rows, which may have fewer bits.
    BiasHalf,
    /// y = gelu(x W^T + b), tanh form.
    BiasGelu,
    /// y = x W^T + b + residual, which is `[rows, outputs]`.
    BiasResidual(&'a Tensor<B>),
}

/// Gain and shift of a layer norm, `[width]` each, and what is added to the variance.
pub struct LayerNorm<B: Backend> {
    /// The gain.
    pub weight: B::Vector,
    /// The shift.
    pub bias: B::Vector,
    /// Added to the variance before its root is taken.
    pub eps: f32,
}

/// A matrix `[outputs, inputs]` and its bias `[outputs]`.
pub struct Linear<B: Backend> {
    /// The matrix, laid out as the backend multiplies by it.
    pub weight: B::Weight,
    /// Added to each row of results.
    pub bias: B::Vector,
}

/// Rows that a linear layer takes after a layer norm.
pub struct NormInput<'a, B: Backend> {
    /// `[rows, inputs]`.
    pub x: &'a Tensor<B>,
    /// Normalizes the rows.
    pub norm: &'a LayerNorm<B>,
    /// Room for the normalized rows, which may be left there or not.
    pub normed: &'a mut Tensor<B>,
}

/// Weight and bias of a linear layer or a layer norm, as a `T`: a name and a shape, a range of a
/// flat buffer, or what a backend makes of them.
#[derive(Clone, Debug)]
pub struct Affine<T> {
    /// The matrix, or the norm's gain.
    pub weight: T,
    /// The bias, or the norm's shift.
    pub bias: T,
}

/// A linear layer with one output, as a `T`; a head that scores rows.
#[derive(Clone, Debug)]
pub struct Projection<T> {
    /// The vector `[1, inputs]`.
    pub weight: T,
    /// Added to each result, unless the layer has none.
    pub bias: Option<T>,
}

/// Sizes of attention.
#[derive(Clone, Debug)]
pub struct Heads {
    /// Heads of a layer.
    pub count: usize,
    /// Elements of a head's queries, keys and values.
    pub size: usize,
    /// ALiBi slopes, one a head.
    pub slopes: Vec<f32>,
}

impl Heads {
    /// Elements of all heads.
    pub fn width(&self) -> usize {
        self.count * self.size
    }
}

/// A pre-norm decoder layer: attention, then an MLP with the tanh GELU, each after a layer norm and
/// with a residual branch.
pub struct DecoderLayer<B: Backend> {
    /// Before attention.
    pub input_norm: LayerNorm<B>,
    /// Queries, keys and values; rows are `[head, 3, head size]`.
    pub qkv: Linear<B>,
    /// After attention.
    pub dense: Linear<B>,
    /// Before the MLP.
    pub post_norm: LayerNorm<B>,
    /// The MLP's first matrix.
    pub up: Linear<B>,
    /// The MLP's second matrix.
    pub down: Linear<B>,
}

/// A decoder from token ids to its last layer's output, and what makes logits of that.
pub struct Decoder<B: Backend> {
    /// Tells this decoder's weights from all others'.
    pub id: ObjectId,
    /// One row a token id.
    pub embedding: B::Weight,
    /// Normalizes the embedded tokens.
    pub embedding_norm: LayerNorm<B>,
    /// The layers, the first one first.
    pub layers: Vec<DecoderLayer<B>>,
    /// Of every layer.
    pub heads: Heads,
    /// Whether the residual branches off after the layer norms instead of before them.
    pub residual_post_norm: bool,
    /// Normalizes the last layer's output for the LM head.
    pub final_norm: LayerNorm<B>,
    /// `None` if the LM head is the embedding.
    pub lm_head: Option<B::Weight>,
}

impl<B: Backend> Decoder<B> {
    /// The LM head's matrix `[vocabulary, hidden]`.
    pub fn lm_head(&self) -> &B::Weight {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Tells long-lived objects apart: what a backend remembers about one (a captured graph, say) is
/// kept under its id, never under its address, which another object may have later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId(u64);

impl Default for ObjectId {
    /// An id that no other object of this process has.
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        ObjectId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
