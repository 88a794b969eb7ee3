//! The arithmetic of policy-gradient methods on ragged responses: penalties, advantages, whitening,
//! controllers. All in f64; a list has one list for each response, with a number for each token.
//!
//! Formulas: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438), the adaptive coefficient of Ziegler et
//! al. (arXiv 1909.08593), the estimators of Schulman's "Approximating KL Divergence", GRPO (arXiv
//! 2402.03300), RLOO (arXiv 2402.14740).

use crate::ops::token_loss::MAX_LOG_RATIO;
use crate::rewards::RunningMoments;
use serde::{Deserialize, Serialize};

/// How the KL divergence from the reference policy is estimated from one sampled token, whose
/// log-probabilities differ by `d` = policy - reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KlEstimator {
    /// `d`: without bias, and negative for some tokens
    K1,
    /// `d^2 / 2`
    K2,
    /// `exp(-d) - 1 + d`: without bias, and never negative
    K3,
    /// `|d|`
    Abs,
}

impl KlEstimator {
    /// The estimate of one token. Differences are clamped before an exponential is taken of them.
    pub fn of(self, difference: f64) -> f64 {
        let d = difference.clamp(-MAX_LOG_RATIO as f64, MAX_LOG_RATIO as f64);
        match self {
            KlEstimator::K1 => difference,
            KlEstimator::K2 => 0.5 * difference * difference,
            KlEstimator::K3 => (-d).exp_m1() + d,
            KlEstimator::Abs => difference.abs(),
        }
    }
}

/// Rewards of a response's tokens: a penalty for each, and the score at the last one.
pub fn token_rewards(kl: &[f64], coefficient: f64, score: f64) -> Vec<f64> {
    let mut rewards: Vec<f64> = kl.iter().map(|kl| -coefficient * kl).collect();
    if let Some(last) = rewards.last_mut() {
        *last += score;
    }
    rewards
}

/// Advantages of a response's tokens by GAE, and the returns that values should be.
pub fn gae(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> (Vec<f64>, Vec<f64>) {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        advantages[t] = next_advantage;
        next_value = values[t];
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// Over what advantages are brought to mean 0 and standard deviation 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Whitening {
    /// Nothing: they stay as they are
    None,
    /// All tokens of all responses
    Masked,
    /// The same with the zeros that would pad the responses to one length, as trlX has it
    Padded,
}

impl Whitening {
    /// Whitens the numbers of all responses together. A single number stays as it is.
    pub fn apply(self, lists: &mut [Vec<f64>]) {
        let count = match self {
            Whitening::None => return,
            Whitening::Masked => lists.iter().map(Vec::len).sum(),
            Whitening::Padded => lists.len() * lists.iter().map(Vec::len).max().unwrap_or(0),
        };
        if count < 2 {
            return;
        }
        let numbers = || lists.iter().flatten();
        let mean = numbers().sum::<f64>() / count as f64;
        let zeros = (count - numbers().count()) as f64;
        let squares = numbers().map(|x| (x - mean).powi(2)).sum::<f64>() + zeros * mean * mean;
        let std = (squares / (count - 1) as f64 + 1e-8).sqrt();
        lists.iter_mut().flatten().for_each(|x| *x = (*x - mean) / std);
    }
}

/// The factor of the penalty for moving away from the reference policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlController {
    /// The factor.
    pub coefficient: f64,
    /// The divergence of a response that it steers towards, unless it is fixed.
    pub target: Option<f64>,
    /// Responses over which a whole error moves the factor once.
    pub horizon: f64,
}

impl KlController {
    /// Takes up the mean divergence of so many responses.
    pub fn update(&mut self, kl: f64, responses: usize) {
        let Some(target) = self.target else { return };
        if kl.is_finite() {
            let error = (kl / target - 1.0).clamp(-0.2, 0.2);
            self.coefficient *= 1.0 + error * responses as f64 / self.horizon;
        }
    }
}

/// What scores become before they are rewards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScoreScaling {
    /// Largest absolute score.
    pub clip: Option<f64>,
    /// Whether they are divided by the standard deviation of all scores so far.
    pub running: bool,
    /// All scores so far.
    pub moments: RunningMoments,
}

impl ScoreScaling {
    /// Clips the scores of a batch, then scales them; their mean stays.
    pub fn apply(&mut self, scores: &mut [f64]) {
        if let Some(clip) = self.clip {
            scores.iter_mut().for_each(|s| *s = s.clamp(-clip, clip));
        }
        if self.running {
            scores.iter().for_each(|s| self.moments.push(*s));
            // scores that have never differed have nothing to be scaled by
            let std = self.moments.std();
            scores.iter_mut().for_each(|s| *s /= if std > 0.0 { std } else { 1.0 });
        }
    }
}

/// Advantages of a group's responses: how much better each is than the mean of the others.
///
/// # Panics
/// If there is only one.
pub fn rloo(scores: &[f64]) -> Vec<f64> {
    assert!(scores.len() > 1, "a group of one has no others");
    let (sum, others) = (scores.iter().sum::<f64>(), (scores.len() - 1) as f64);
    scores.iter().map(|s| s - (sum - s) / others).collect()
}

/// Advantages of a group's responses: their scores with mean 0 and standard deviation 1.
///
/// # Panics
/// If there is only one.
pub fn grpo(scores: &[f64]) -> Vec<f64> {
    assert!(scores.len() > 1, "a group of one has no deviation");
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let std = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    scores.iter().map(|s| (s - mean) / (std + 1e-4)).collect()
}

/// The part of the returns' variance that the values explain; 0 where returns do not vary.
pub fn explained_variance(values: &[f64], returns: &[f64]) -> f64 {
    let variance = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len().max(1) as f64;
        x.iter().map(|x| (x - mean).powi(2)).sum::<f64>()
    };
    let errors: Vec<f64> = returns.iter().zip(values).map(|(r, v)| r - v).collect();
    let of = variance(returns);
    if of > 0.0 { 1.0 - variance(&errors) / of } else { 0.0 }
}
