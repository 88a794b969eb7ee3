//! Losses at the LM head that are sums over labels: functions of each label's log-probability and
//! of the entropy of the distribution that it is drawn from.

use super::train::TrainBackend;
use super::{Backend, Tensor};
use crate::tensor::DType;

/// Largest absolute difference of log-probabilities that an exponential is taken of.
pub const MAX_LOG_RATIO: f32 = 20.0;

/// A loss that is a sum over labels. Tensors have a number for each label: `[labels, 1]` in f32.
pub enum TokenLoss<'a, B: Backend> {
    /// `-log_prob`.
    CrossEntropy {
        /// Factor of the gradients; losses are summed without it.
        scale: f32,
    },
    /// The policy's loss in PPO.
    ClippedPpo(ClippedPpo<'a, B>),
    /// A loss that the caller has differentiated, such as one of sums over sequences. Nothing is
    /// added to the sum of losses, which is the caller's too.
    Given {
        /// Gradient of the loss with respect to each log-probability.
        log_probs: &'a Tensor<B>,
        /// Gradient with respect to each entropy, if the loss has one.
        entropies: Option<&'a Tensor<B>>,
    },
}

/// The clipped surrogate objective of PPO, to be minimized, with its penalties. With the ratio
/// `r = exp(log_prob - old)` and `d = log_prob - reference`, a label adds
///
/// `-min(r A, clip(r, 1 - clip, 1 + clip) A) + kl (exp(-d) - 1 + d) - entropy H`.
///
/// Both differences of log-probabilities are clamped to ±[`MAX_LOG_RATIO`] if they are finite, and
/// have no gradient beyond.
pub struct ClippedPpo<'a, B: Backend> {
    /// Of the policy that sampled the labels.
    pub old_log_probs: &'a Tensor<B>,
    /// `A`.
    pub advantages: &'a Tensor<B>,
    /// Of the policy from which this one is not to move away, unless there is no such penalty.
    pub reference_log_probs: Option<&'a Tensor<B>>,
    /// How far the ratio may be from 1 before a label has no more influence.
    pub clip: f32,
    /// Factor of the estimate (k3) of the KL divergence from the reference policy.
    pub kl: f32,
    /// Factor of the entropy, a bonus.
    pub entropy: f32,
    /// Factor of the gradients; losses are summed without it.
    pub scale: f32,
}

/// What is known of each label, `[labels, 1]` in f32.
pub struct TokenStats<B: Backend> {
    /// Log-probability.
    pub log_probs: Tensor<B>,
    /// Entropy of its row's distribution, in nats.
    pub entropies: Tensor<B>,
}

impl<B: Backend> Default for TokenStats<B> {
    fn default() -> Self {
        TokenStats { log_probs: Tensor::default(), entropies: Tensor::default() }
    }
}

/// Where the gradients of a loss at the LM head go.
pub struct LossGradients<'a, B: TrainBackend> {
    /// Of the hidden states: written.
    pub dx: &'a mut Tensor<B>,
    /// Of the parameters: added to, unless the LM head is not trained.
    pub grads: Option<&'a mut B::Flat>,
}

/// What is wanted of a loss, with gradients going to a `G`.
pub struct LossOutput<'a, B: TrainBackend, G> {
    /// What the sum of losses is added to.
    pub sums: &'a mut B::Sums,
    /// What is known of each label, written if it is wanted.
    pub stats: Option<&'a mut TokenStats<B>>,
    /// Without, there is no backward pass.
    pub gradients: Option<G>,
}

impl<B: Backend> TokenLoss<'_, B> {
    /// Panics if a tensor has not one number for each of so many labels.
    pub(super) fn expect(&self, labels: usize) {
        let check = |x: &Tensor<B>, what| x.expect(what, [labels, 1], DType::F32);
        match self {
            TokenLoss::CrossEntropy { .. } => {}
            TokenLoss::ClippedPpo(ppo) => {
                check(ppo.old_log_probs, "PPO's old log-probabilities");
                check(ppo.advantages, "PPO's advantages");
                if let Some(reference) = ppo.reference_log_probs {
                    check(reference, "PPO's reference log-probabilities");
                }
            }
            TokenLoss::Given { log_probs, entropies } => {
                check(log_probs, "given gradients of log-probabilities");
                if let Some(entropies) = entropies {
                    check(entropies, "given gradients of entropies");
                }
            }
        }
    }
}
