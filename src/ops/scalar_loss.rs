//! Losses of one number a row: what a reward model says of a text, or a value head of a token.

use super::{Backend, Tensor};
use crate::tensor::DType;

/// A loss that is a sum over rows, or over pairs of neighbouring ones. Tensors are `[rows, 1]` in
/// f32. `scale` is the factor of the gradients; losses are summed without it.
pub enum ScalarLoss<'a, B: Backend> {
    /// `(y - target)^2`.
    Squared {
        /// What each row should say.
        targets: &'a Tensor<B>,
        /// Factor of the gradients.
        scale: f32,
    },
    /// Bradley and Terry's loss of preferences: rows `2i` are preferred to rows `2i + 1`, and each
    /// pair adds `-log sigmoid(y[2i] - y[2i + 1])`.
    Pairwise {
        /// Factor of the gradients.
        scale: f32,
    },
    /// The value head's loss in PPO.
    ClippedValue(ClippedValue<'a, B>),
}

/// The clipped loss of values in PPO. A row adds
///
/// `coefficient / 2 max((y - R)^2, (clip(y, old - clip, old + clip) - R)^2)`.
pub struct ClippedValue<'a, B: Backend> {
    /// What the value head said as the rows were sampled.
    pub old_values: &'a Tensor<B>,
    /// `R`.
    pub returns: &'a Tensor<B>,
    /// How far a value may move before a row has no more influence.
    pub clip: f32,
    /// Factor of the loss beside that of the policy.
    pub coefficient: f32,
    /// Factor of the gradients.
    pub scale: f32,
}

impl<B: Backend> ScalarLoss<'_, B> {
    /// Panics if a tensor has not one number for each of so many rows.
    pub(super) fn expect(&self, rows: usize) {
        let check = |x: &Tensor<B>, what| x.expect(what, [rows, 1], DType::F32);
        match self {
            ScalarLoss::Squared { targets, .. } => check(targets, "targets of a squared loss"),
            ScalarLoss::Pairwise { .. } => {
                assert!(rows.is_multiple_of(2), "a loss of preferences takes pairs of rows");
            }
            ScalarLoss::ClippedValue(loss) => {
                check(loss.old_values, "PPO's old values");
                check(loss.returns, "PPO's returns");
            }
        }
    }
}
