//! Settings of a policy-gradient run.

use super::estimates::{KlEstimator, Whitening};
use super::rollout::RolloutOptions;
use crate::engine::Sampling;
use crate::error::{Error, Result};
use crate::models::bloom::training::Recompute;
use crate::ops::train::Precision;
use crate::tensor::DType;
use crate::train::monitors::MonitorLimits;
use crate::train::optimizer::AdamWOptions;
use crate::train::schedule::Schedule;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where advantages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// A value head, by generalized advantage estimation
    Ppo,
    /// The scores of a prompt's candidates, each reward with mean 0 and standard deviation 1
    Grpo,
    /// How much better a candidate is than the prompt's others
    Rloo,
}

impl Algorithm {
    /// Its name, as users know it.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Ppo => "PPO",
            Algorithm::Grpo => "GRPO",
            Algorithm::Rloo => "RLOO",
        }
    }
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct PpoOptions {
    /// Where advantages come from.
    pub algorithm: Algorithm,
    /// Rounds of rollouts and training.
    pub rounds: u64,
    /// Rollouts of a round.
    pub rollouts: usize,
    /// Candidates of one prompt: 1 for PPO, at least 2 for the others.
    pub group: usize,
    /// How prompts are continued.
    pub sampling: RolloutOptions,
    /// Type of the weights that rollouts read.
    pub rollout_dtype: DType,
    /// Largest weight of a token that other weights have sampled than those in training.
    pub importance_cap: f64,
    /// Passes over a round's rollouts.
    pub epochs: usize,
    /// Rollouts of an optimizer step.
    pub minibatch: usize,
    /// Whether all passes over a minibatch follow each other, as trlX has it, instead of all
    /// minibatches once a pass.
    pub repeat_minibatch: bool,
    /// Maximum tokens of one forward and backward pass.
    pub micro_tokens: usize,
    /// Settings of AdamW.
    pub optimizer: AdamWOptions,
    /// Learning rate at the end of the warm-up.
    pub learning_rate: f64,
    /// How the learning rate goes on from there, by rounds.
    pub schedule: Schedule,
    /// Part of the rounds that warms up.
    pub warmup: f64,
    /// Largest norm of the gradient.
    pub clip_norm: f32,
    /// Discount of later rewards.
    pub gamma: f64,
    /// Of generalized advantage estimation.
    pub lambda: f64,
    /// How far a ratio of probabilities may be from 1.
    pub clip: f32,
    /// How far a value may be from the old one.
    pub value_clip: f32,
    /// Factor of the values' loss.
    pub value_coefficient: f32,
    /// Factor of the entropy, a bonus.
    pub entropy_coefficient: f32,
    /// Factor of the penalty for moving away from the reference policy, at first.
    pub kl_coefficient: f64,
    /// Divergence of a response that the factor is steered towards; none leaves it.
    pub kl_target: Option<f64>,
    /// Responses over which a whole error moves the factor once.
    pub kl_horizon: f64,
    /// How the divergence is estimated.
    pub kl_estimator: KlEstimator,
    /// Whether the penalty is part of the loss, by the k3 estimate, instead of the rewards.
    pub kl_in_loss: bool,
    /// Of advantages.
    pub whitening: Whitening,
    /// Largest absolute score.
    pub reward_clip: Option<f64>,
    /// Whether scores are divided by the standard deviation of all so far.
    pub scale_reward: bool,
    /// Whether a score is that of the output minus that of the data's own rewrite.
    pub delta_reward: bool,
    /// Whether outputs are scored as the reference does, whose two mistakes in scoring are
    /// [`super::reference_text`] and a constant.
    pub reference_quirks: bool,
    /// Precision of the matrix products.
    pub precision: Precision,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Seed of the order of the prompts and of the noise.
    pub seed: u64,
    /// Rounds between checkpoints; 0 for none but at the end.
    pub save_every: u64,
    /// Newest checkpoints that are kept, at least one.
    pub keep: usize,
    /// Rounds between samples; 0 for those before and after alone.
    pub sample_every: u64,
    /// When the run is warned of or stopped.
    pub monitors: MonitorLimits,
    /// Folder of the run.
    pub output: PathBuf,
    /// Settings that a resumed run must share.
    pub settings: serde_json::Value,
}

impl PpoOptions {
    /// The reference's settings for a policy whose texts end with `eos`, with TRL's habits, for a
    /// run in the folder `output`.
    pub fn recipe(eos: u32, output: PathBuf) -> PpoOptions {
        PpoOptions {
            algorithm: Algorithm::Ppo,
            rounds: 312,
            rollouts: 64,
            group: 1,
            sampling: RolloutOptions {
                sampling: Sampling { temperature: 1.0, seed: 42, ..Sampling::default() },
                max_new: 256,
                min_new: 0,
                eos,
                ignore_eos: false,
            },
            rollout_dtype: DType::Bf16,
            importance_cap: 2.0,
            epochs: 4,
            minibatch: 32,
            repeat_minibatch: false,
            micro_tokens: 8192,
            optimizer: AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 1e-6 },
            learning_rate: 5e-6,
            schedule: Schedule::Constant,
            warmup: 0.0,
            clip_norm: 1.0,
            gamma: 1.0,
            lambda: 0.95,
            clip: 0.2,
            value_clip: 0.2,
            value_coefficient: 0.5,
            entropy_coefficient: 0.0,
            kl_coefficient: 0.05,
            kl_target: Some(6.0),
            kl_horizon: 10_000.0,
            kl_estimator: KlEstimator::K1,
            kl_in_loss: false,
            whitening: Whitening::Masked,
            reward_clip: Some(10.0),
            scale_reward: true,
            delta_reward: false,
            reference_quirks: false,
            precision: Precision::Bf16,
            recompute: Recompute::None,
            seed: 42,
            save_every: 20,
            keep: 2,
            sample_every: 20,
            monitors: MonitorLimits::default(),
            output,
            settings: serde_json::Value::Null,
        }
    }

    /// Prompts of a round.
    pub fn prompts_per_round(&self) -> usize {
        self.rollouts / self.group
    }

    /// Fails if the settings contradict each other.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(Error::invalid(what));
        if self.algorithm != Algorithm::Ppo && self.group < 2 {
            return fail(format!(
                "{} compares the candidates of a prompt with each other; --group {} is too few, \
                expected at least 2",
                self.algorithm.name(),
                self.group
            ));
        }
        if self.group == 0 || self.rollouts == 0 || !self.rollouts.is_multiple_of(self.group) {
            return fail(format!(
                "--rollouts {} is no multiple of --group {}",
                self.rollouts, self.group
            ));
        }
        if self.epochs == 0 || self.minibatch == 0 {
            return fail("--ppo-epochs and --minibatch are at least 1".into());
        }
        self.monitors.check()
    }
}
