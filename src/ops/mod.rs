//! The operations that models are written in.
//!
//! [`Backend`] has what every model needs, [`DecodeBackend`] what generation needs,
//! [`train::TrainBackend`] what training needs, and [`RolloutBackend`] both of these at once.
//! Fusion is the backend's affair: a model calls whole operations, and a backend does several of
//! them in one kernel where that is faster. There is no tape and no graph of operations.

mod batch;
pub mod cpu;
pub mod cuda;
mod decode;
mod layers;
mod rollout;
pub mod sampling;
pub mod scalar_loss;
pub mod token_loss;
pub mod train;

pub use batch::{BLOCK, Batch, Span};
pub use decode::{DecodeBackend, DecoderActivations};
pub use layers::{
    Affine, Decoder, DecoderLayer, Epilogue, Heads, LayerNorm, Linear, NormInput, ObjectId,
    Projection,
};

pub use rollout::RolloutBackend;

use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::tensor::{DType, HostTensor};

/// A matrix as a backend holds it.
pub trait Weight {
    /// Rows: outputs of a linear layer, or token ids.
    fn rows(&self) -> usize;
    /// Columns: inputs of a linear layer.
    fn cols(&self) -> usize;
    /// The type of its elements.
    fn dtype(&self) -> DType;
}

/// Activations on a backend's device: `[rows, width]`, row-major, without padding.
///
/// Memory grows as needed and is kept, so that a tensor which lives as long as a model's
/// activations costs no allocation a step. The operation that writes a tensor decides its shape and
/// dtype; every operation checks those that it reads.
pub struct Tensor<B: Backend> {
    buffer: B::Buffer,
    rows: usize,
    width: usize,
    dtype: DType,
}

impl<B: Backend> Default for Tensor<B> {
    fn default() -> Self {
        Tensor { buffer: B::Buffer::default(), rows: 0, width: 0, dtype: DType::F32 }
    }
}

impl<B: Backend> Tensor<B> {
    /// `[rows, width]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.width]
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the elements are.
    pub fn buffer(&self) -> &B::Buffer {
        &self.buffer
    }

    /// Says what an operation is about to write; whoever calls this makes room for it in the
    /// buffer that is returned.
    fn set(&mut self, [rows, width]: [usize; 2], dtype: DType) -> &mut B::Buffer {
        (self.rows, self.width, self.dtype) = (rows, width, dtype);
        &mut self.buffer
    }

    /// Panics if an operation is handed a tensor of another shape or dtype than it takes: a mistake
    /// in a model's code, never in a user's input.
    fn expect(&self, operation: &str, shape: [usize; 2], dtype: DType) {
        let found = ([self.rows, self.width], self.dtype);
        assert!(
            found == (shape, dtype),
            "{operation}: a tensor is {:?} {}, expected {shape:?} {}",
            found.0,
            self.dtype.name(),
            dtype.name()
        );
    }
}

/// Where a model's memory lives and its operations run.
///
/// Devices work on while the host does other things: what fails is reported where results are
/// taken ([`DecodeBackend::logits`], [`DecodeBackend::sample`]).
pub trait Backend: Sized {
    /// Memory of activations; grows as needed.
    type Buffer: Default;
    /// A matrix ready for linear operations, in a layout of the backend's own.
    type Weight: Weight;
    /// A vector of parameters in f32.
    type Vector;

    /// Prepares a matrix; `None` keeps the stored type.
    ///
    /// # Errors
    /// If it is no matrix, holds NaN or infinity (before or after its conversion), or if there is
    /// no memory for it.
    fn weight(&self, tensor: HostTensor, dtype: Option<DType>) -> Result<Self::Weight>;

    /// Prepares a vector, in f32.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn vector(&self, tensor: &HostTensor) -> Result<Self::Vector>;

    /// Fails if there is no memory for so much. Devices that reserve all of it at once say so
    /// themselves.
    ///
    /// # Errors
    /// [`crate::error::Error::OutOfMemory`] with the sizes and the flag to lower.
    fn fits(&self, _plan: &MemoryPlan) -> Result<()> {
        Ok(())
    }

    /// Writes `epilogue(x W^T)` = `[rows of x, outputs]` to `y`; `x` is `[rows, inputs]`.
    fn linear(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    );

    /// Writes the normalized rows of `x` to `y`, in the type that linear layers read.
    fn layer_norm(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, norm: &LayerNorm<Self>);

    /// [`Backend::linear`] of normalized rows. A backend may do both at once.
    fn layer_norm_linear(
        &self,
        y: &mut Tensor<Self>,
        input: NormInput<Self>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) {
        self.layer_norm(input.normed, input.x, input.norm);
        self.linear(y, input.normed, linear, epilogue);
    }

    /// [`Backend::layer_norm`] of chosen rows of `x`, in this order.
    fn layer_norm_rows(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: &[usize],
        norm: &LayerNorm<Self>,
    );
}
