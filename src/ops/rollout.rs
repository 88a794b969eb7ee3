//! What reinforcement learning needs of a backend: generation by the parameters in training.

use super::DecodeBackend;
use super::train::TrainBackend;
use crate::error::Result;
use crate::tensor::DType;
use std::ops::Range;

/// A backend that generates by the very parameters that it trains.
pub trait RolloutBackend: TrainBackend + DecodeBackend {
    /// Whether weights of this type are the parameters themselves, and thus always as they are;
    /// others have to be made anew after a step.
    fn shares_weights(&self, dtype: DType) -> bool;

    /// A matrix `[rows, cols]` of the parameters for linear operations, in `dtype`.
    ///
    /// # Errors
    /// If an element is not finite, or there is no memory for it.
    fn weight_of(
        &self,
        flat: &Self::Flat,
        at: Range<usize>,
        shape: [usize; 2],
        dtype: DType,
    ) -> Result<Self::Weight>;

    /// A vector of the parameters, in f32.
    ///
    /// # Errors
    /// As for [`RolloutBackend::weight_of`].
    fn vector_of(&self, flat: &Self::Flat, at: Range<usize>) -> Result<Self::Vector>;
}
