//! The fused operations that models are written in.
//!
//! [`Backend`] is a list of what BLOOM needs, not a tensor library. A batch is ragged: the tokens
//! of all spans one after the other, without padding; prefill, chunked prefill, decoding and
//! scoring are the same calls.

pub mod cpu;
pub mod cuda;
mod forward;

pub use forward::{Forward, Layer, Scratch};

use crate::engine::{Chosen, SampleRow};
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::tensor::{DType, Tensor};

/// Positions of one block of the KV cache.
pub const BLOCK: usize = 16;

/// A sequence's part of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// First token of the span in the batch, and how many there are.
    pub start: usize,
    pub len: usize,
    /// Positions of the sequence that are in the KV cache already.
    pub past: usize,
    /// Blocks of the sequence, in order; they have room for `past + len` positions.
    pub blocks: Vec<u32>,
}

/// All tokens of one forward pass.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub ids: Vec<u32>,
    pub spans: Vec<Span>,
    /// Tokens whose ids the host does not know yet: token of the batch, and which of the last
    /// choices it is (see [`Backend::start_sample`]).
    pub fed: Vec<(usize, usize)>,
}

impl Batch {
    /// Adds a span of `ids` to a sequence that has `past` positions in `blocks`.
    pub fn push(&mut self, ids: &[u32], past: usize, blocks: &[u32]) {
        assert!(!ids.is_empty() && (past + ids.len()).div_ceil(BLOCK) <= blocks.len());
        self.spans.push(Span {
            start: self.ids.len(),
            len: ids.len(),
            past,
            blocks: blocks.to_vec(),
        });
        self.ids.extend_from_slice(ids);
    }
}

/// What a product does with its sums before it writes them.
#[derive(Clone, Copy)]
pub enum Epilogue<'a, Buffer> {
    /// y = x W^T + b
    Bias,
    /// y = gelu(x W^T + b), tanh form
    BiasGelu,
    /// y = x W^T + b + residual
    BiasResidual(&'a Buffer),
}

/// A layer norm before a product.
pub struct Norm<'a, B: Backend + ?Sized> {
    pub norm: &'a LayerNorm<B::Vector>,
    pub eps: f32,
    /// Whether the normalized rows are wanted too: they are in `normed` then, and may be otherwise.
    pub keep: bool,
    pub normed: &'a mut B::Buffer,
}

/// Gain and shift of a layer norm.
pub struct LayerNorm<V> {
    pub weight: V,
    pub bias: V,
}

/// A matrix `[outputs, inputs]` and its bias.
pub struct Linear<M, V> {
    pub weight: M,
    pub bias: V,
}

/// Sizes of attention.
#[derive(Clone, Debug)]
pub struct Heads {
    pub count: usize,
    pub size: usize,
    /// ALiBi slopes, one a head.
    pub slopes: Vec<f32>,
}

/// Where a model's memory lives and its operations run. Activations are `[tokens, width]`,
/// row-major. Devices work on while the host does other things: what fails is reported where
/// results are taken.
pub trait Backend {
    /// A matrix ready for products.
    type Matrix;
    /// A vector of parameters.
    type Vector;
    /// Activations; grows as needed.
    type Buffer: Default;
    /// What the device needs to know of a batch.
    type Pass: Default;
    /// Keys and values of all layers, in blocks of [`BLOCK`] positions: `[block, head, position,
    /// head size]`.
    type Cache;

    /// Prepares a weight; `None` keeps the stored type.
    fn matrix(&self, tensor: Tensor, dtype: Option<DType>) -> Result<Self::Matrix>;
    /// The type that a matrix is held in.
    fn stored(&self, matrix: &Self::Matrix) -> DType;
    fn vector(&self, tensor: &Tensor) -> Result<Self::Vector>;
    /// Fails if there is no memory for so much. Devices that reserve all of it at once say so
    /// themselves.
    fn fits(&self, _plan: &MemoryPlan) -> Result<()> {
        Ok(())
    }
    fn cache(
        &self,
        dtype: DType,
        layers: usize,
        heads: &Heads,
        blocks: usize,
    ) -> Result<Self::Cache>;
    /// Copies a block's keys and values in all layers.
    fn copy_block(&self, cache: &mut Self::Cache, from: u32, to: u32);

    /// Prepares what the operations below need to know of a batch.
    fn begin(&self, batch: &Batch, pass: &mut Self::Pass);
    /// Does a pass, which [`Backend::begin`] has prepared, up to the last layer. A device may have
    /// a better way than one operation after the other.
    fn forward(&self, mut pass: Forward<Self>)
    where
        Self: Sized,
    {
        pass.operations(self);
    }
    /// Layer norm of the rows of `table` for the batch's ids.
    fn embed_norm(
        &self,
        batch: &Batch,
        pass: &Self::Pass,
        table: &Self::Matrix,
        norm: &LayerNorm<Self::Vector>,
        eps: f32,
        out: &mut Self::Buffer,
    );
    fn linear(
        &self,
        x: &Self::Buffer,
        linear: &Linear<Self::Matrix, Self::Vector>,
        epilogue: Epilogue<Self::Buffer>,
        out: &mut Self::Buffer,
    );
    /// [`Backend::linear`] right before an operation that begins with `next`, the norm of its
    /// results: a device may do that norm along with the product.
    fn linear_before_norm(
        &self,
        x: &Self::Buffer,
        linear: &Linear<Self::Matrix, Self::Vector>,
        epilogue: Epilogue<Self::Buffer>,
        out: &mut Self::Buffer,
        _next: Norm<Self>,
    ) {
        self.linear(x, linear, epilogue, out);
    }
    /// [`Backend::linear`] of the normalized rows of `x`.
    fn norm_linear(
        &self,
        x: &Self::Buffer,
        norm: Norm<Self>,
        linear: &Linear<Self::Matrix, Self::Vector>,
        epilogue: Epilogue<Self::Buffer>,
        out: &mut Self::Buffer,
    );
    /// Queries, keys and values of the normalized rows of `x`; the linear's rows are `[head, 3,
    /// head size]`. Keys and values go to the cache; `out` is what [`Backend::attention`] takes as
    /// `queries`.
    #[allow(clippy::too_many_arguments)] // one fused operation
    fn norm_qkv(
        &self,
        batch: &Batch,
        pass: &Self::Pass,
        layer: usize,
        x: &Self::Buffer,
        norm: Norm<Self>,
        linear: &Linear<Self::Matrix, Self::Vector>,
        heads: &Heads,
        cache: &mut Self::Cache,
        out: &mut Self::Buffer,
    );
    /// Lets each query attend to its own and all earlier positions of its sequence in the cache.
    /// `out` is `[tokens, head, head size]`.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        batch: &Batch,
        pass: &Self::Pass,
        layer: usize,
        heads: &Heads,
        queries: &Self::Buffer,
        cache: &Self::Cache,
        out: &mut Self::Buffer,
    );
    /// Layer norm of the chosen rows of `x`.
    fn gather_norm(
        &self,
        x: &Self::Buffer,
        rows: &[usize],
        norm: &LayerNorm<Self::Vector>,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// Products with every row of the head: `[rows, vocabulary]`, on the host. Reports what failed
    /// since the last call.
    fn logits(&self, x: &Self::Buffer, head: &Self::Matrix, out: &mut Vec<f32>) -> Result<()>;
    /// Chooses tokens from the head's products: for each `(row of x, what to choose)` one, in
    /// order. `scratch` may hold logits. Reports what failed since the last call.
    fn sample(
        &self,
        x: &Self::Buffer,
        head: &Self::Matrix,
        rows: &[(usize, &SampleRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>>;

    /// Choices that are being made.
    type Choosing;
    /// Whether the device makes a choice like this one by itself, so that the next pass can begin
    /// with a token which the host does not know yet.
    fn chooses_alone(&self, row: &SampleRow) -> bool;
    /// [`Backend::sample`] that waits for nothing, of rows that [`Backend::chooses_alone`] is true
    /// of.
    fn start_sample(
        &self,
        x: &Self::Buffer,
        head: &Self::Matrix,
        rows: &[(usize, &SampleRow)],
    ) -> Result<Self::Choosing>;
    /// Waits for choices.
    fn finish_sample(&self, choosing: Self::Choosing) -> Result<Vec<Chosen>>;
}
