//! What a round of rollouts has taught: packed for training, with a number for each token.

use super::estimates::explained_variance;
use super::rollout::{PolicyPrompt, Rollout};
use crate::error::Result;
use crate::ops::Tensor;
use crate::ops::token_loss::TokenStats;
use crate::ops::train::{PackedBatch, TrainBackend};

/// What the policy, its value head and the reference policy say of a rollout's tokens.
#[derive(Clone, Debug, Default)]
pub struct TokenNumbers {
    /// Log-probabilities by the weights that training begins the round with.
    pub log_probs: Vec<f32>,
    /// Of the distributions that the tokens were drawn from.
    pub entropies: Vec<f32>,
    /// Values of the states before the tokens; none without a value head.
    pub values: Vec<f32>,
    /// Log-probabilities by the reference policy.
    pub reference: Vec<f32>,
}

/// Some rollouts of one forward and backward pass.
pub struct MicroBatch<B: TrainBackend> {
    /// Which of the round's rollouts, in the order of the labels.
    pub rollouts: Vec<usize>,
    /// Their tokens; the labels are those of the responses.
    pub packed: PackedBatch,
    /// The frozen layers' output, once it is known.
    pub trunk: Option<Tensor<B>>,
    /// What the losses compare with.
    pub targets: Targets<B>,
    /// What the last pass found.
    pub stats: TokenStats<B>,
    /// What the last pass found of values.
    pub values: Tensor<B>,
}

/// Numbers on the device that losses compare with, one for each label.
pub struct Targets<B: TrainBackend> {
    /// Log-probabilities as the round began.
    pub old_log_probs: Tensor<B>,
    /// Advantages.
    pub advantages: Tensor<B>,
    /// Log-probabilities by the reference policy.
    pub reference: Tensor<B>,
    /// Values as the round began.
    pub old_values: Tensor<B>,
    /// What values should be.
    pub returns: Tensor<B>,
}

impl<B: TrainBackend> Default for Targets<B> {
    fn default() -> Self {
        let (old_log_probs, advantages, reference, old_values, returns) = Default::default();
        Targets { old_log_probs, advantages, reference, old_values, returns }
    }
}

/// Packs rollouts, the longest first, into passes of at most `budget` tokens; one may exceed it
/// alone.
pub fn pack<B: TrainBackend>(
    (prompts, rollouts): (&[PolicyPrompt], &[Rollout]),
    chosen: &[usize],
    budget: usize,
) -> Vec<MicroBatch<B>> {
    let length = |i: &usize| prompts[rollouts[*i].prompt].ids.len() + rollouts[*i].response.len();
    let mut chosen = chosen.to_vec();
    chosen.sort_by_key(|i| std::cmp::Reverse(length(i)));
    let mut batches: Vec<MicroBatch<B>> = Vec::new();
    for i in chosen {
        if batches.last().is_none_or(|b| b.packed.ids.len() + length(&i) > budget) {
            batches.push(MicroBatch {
                rollouts: Vec::new(),
                packed: PackedBatch::default(),
                trunk: None,
                targets: Targets::default(),
                stats: TokenStats::default(),
                values: Tensor::default(),
            });
        }
        let batch = batches.last_mut().expect("one was pushed");
        let prompt = &prompts[rollouts[i].prompt].ids;
        let ids = [&prompt[..], &rollouts[i].response].concat();
        batch.packed.push(&ids, prompt.len());
        batch.rollouts.push(i);
    }
    batches
}

impl<B: TrainBackend> MicroBatch<B> {
    /// Writes numbers of the rollouts' tokens, in the order of the labels, to a column.
    ///
    /// # Errors
    /// If the device fails.
    pub fn upload<'l>(
        b: &B,
        rollouts: &[usize],
        to: &mut Tensor<B>,
        numbers: impl Fn(usize) -> &'l [f32],
    ) -> Result<()> {
        let column: Vec<f32> = rollouts.iter().flat_map(|&i| numbers(i)).copied().collect();
        b.upload_column(to, &column)
    }

    /// Gives the numbers of a column, rollout by rollout, to `take`.
    ///
    /// # Errors
    /// What has failed on the device.
    pub fn download(
        &self,
        b: &B,
        column: &Tensor<B>,
        rollouts: &[Rollout],
        mut take: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let numbers = b.download_column(column)?;
        let mut rest = &numbers[..];
        for &i in &self.rollouts {
            let (own, others) = rest.split_at(rollouts[i].response.len());
            take(i, own);
            rest = others;
        }
        Ok(())
    }
}

/// What the passes of an update found, added up over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossStats {
    /// Tokens.
    pub tokens: f64,
    /// The policy's clipped loss.
    pub policy_loss: f64,
    /// The clipped loss of values, with its half.
    pub value_loss: f64,
    /// Tokens whose ratio was clipped.
    pub clipped: f64,
    /// Tokens whose value was clipped.
    pub values_clipped: f64,
    /// Half the squared difference of log-probabilities.
    pub approximate_kl: f64,
    /// Entropies.
    pub entropy: f64,
    /// Ratios, and their squares.
    pub ratio: f64,
    /// Squares of the ratios.
    pub ratio_squares: f64,
}

/// A token as a loss sees it.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenTerms {
    /// Log-probability now.
    pub log_prob: f64,
    /// Log-probability as it was sampled.
    pub old_log_prob: f64,
    /// Advantage.
    pub advantage: f64,
    /// Entropy now.
    pub entropy: f64,
    /// Value now, value as it was sampled, and return; if there are values.
    pub value: Option<[f64; 3]>,
}

impl LossStats {
    /// Takes up a token under these limits of ratio and value.
    pub fn add(&mut self, t: &TokenTerms, (clip, value_clip): (f64, f64)) {
        let moved = t.log_prob - t.old_log_prob;
        let limit = crate::ops::token_loss::MAX_LOG_RATIO as f64;
        let ratio = moved.clamp(-limit, limit).exp();
        let plain = -ratio * t.advantage;
        let clipped = -ratio.clamp(1.0 - clip, 1.0 + clip) * t.advantage;
        self.tokens += 1.0;
        self.policy_loss += plain.max(clipped);
        self.clipped += f64::from(clipped > plain);
        self.approximate_kl += 0.5 * moved * moved;
        self.entropy += t.entropy;
        self.ratio += ratio;
        self.ratio_squares += ratio * ratio;
        if let Some([value, old, target]) = t.value {
            let plain = (value - target).powi(2);
            let clipped = (value.clamp(old - value_clip, old + value_clip) - target).powi(2);
            self.value_loss += 0.5 * plain.max(clipped);
            self.values_clipped += f64::from(clipped > plain);
        }
    }

    /// The mean over tokens of one of the sums.
    pub fn mean(&self, of: impl Fn(&LossStats) -> f64) -> f64 {
        of(self) / self.tokens.max(1.0)
    }

    /// The variance of the ratios.
    pub fn ratio_variance(&self) -> f64 {
        (self.mean(|s| s.ratio_squares) - self.mean(|s| s.ratio).powi(2)).max(0.0)
    }
}

/// The part of the returns' variance that the values explain, over all tokens.
pub fn explained(numbers: &[TokenNumbers], returns: &[Vec<f64>]) -> f64 {
    let values: Vec<f64> = numbers.iter().flat_map(|n| &n.values).map(|v| *v as f64).collect();
    let returns: Vec<f64> = returns.iter().flatten().copied().collect();
    if values.len() == returns.len() { explained_variance(&values, &returns) } else { 0.0 }
}
