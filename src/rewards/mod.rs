//! Scores of rewrites, which a policy is trained to raise.
//!
//! A [`Reward`] is one scorer: one of the built-in ones, a command or an HTTP endpoint of the
//! user's, or a reward model. [`RewardSpec`] says which and with what weight, and
//! [`CombinedReward`] adds several up.

mod answers;
mod built_in;
mod combine;
mod command;
mod http;
mod spec;
mod text_model;

pub use built_in::{ClipTokensReward, FidelityReward, RepetitionReward};
pub use combine::{CombinedReward, CombinedScores, CombinedState, PartState, RunningMoments};
pub use command::CommandReward;
pub use http::HttpReward;
pub use spec::{RewardKind, RewardSpec};
pub use text_model::{
    RewardTokens, TextRewardModel, TextRewardOptions, TextRewardParts, reward_tokens,
};

use crate::error::{Error, Result};
use std::time::Duration;

/// A plain prompt and the text that a policy made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ScoredText<'a> {
    /// The plain prompt.
    pub raw_prompt: &'a str,
    /// What the policy made of it.
    pub output: &'a str,
}

/// Scores rewrites; the higher, the better.
pub trait Reward {
    /// What errors and reports call it: its specification without the weight.
    fn name(&self) -> &str;

    /// One finite score for each rewrite, in order.
    ///
    /// # Errors
    /// If a scorer outside of this process dies, hangs or answers what it should not.
    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>>;
}

/// How scorers outside of this process are waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExternalOptions {
    /// Time without an answer after which a command counts as hung, and time for a whole answer
    /// of an endpoint.
    pub timeout: Duration,
    /// How often an endpoint is asked again if it cannot be reached or has an error of its own.
    pub retries: u32,
    /// Time before the first of these; it doubles each time.
    pub backoff: Duration,
}

impl Default for ExternalOptions {
    fn default() -> Self {
        ExternalOptions {
            timeout: Duration::from_secs(600),
            retries: 3,
            backoff: Duration::from_millis(500),
        }
    }
}

/// The error of a reward.
fn failed(name: &str, message: impl std::fmt::Display) -> Error {
    Error::invalid(format!("reward {}: {message}", one_line(name)))
}

/// The beginning of a text, on one line.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 200;
    let line: String =
        text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect();
    if text.trim().chars().nth(LONGEST).is_some() { line + "..." } else { line }
}

/// Refuses scores that are not one finite number for each of `count` rewrites.
fn check_scores(name: &str, scores: &[f64], count: usize) -> Result<()> {
    if scores.len() != count {
        let given = scores.len();
        return Err(failed(name, format_args!("gave {given} scores, expected {count}")));
    }
    match scores.iter().position(|s| !s.is_finite()) {
        Some(i) => Err(failed(
            name,
            format_args!("score {} of {count} is {}, expected a finite number", i + 1, scores[i]),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_of_bounded_length() {
        let error = failed("cmd:a\nb", one_line(&"x\r\n".repeat(500))).to_string();
        assert!(error.starts_with("reward cmd:a b: x  x") && error.ends_with("..."), "{error}");
        assert!(!error.contains('\n') && error.len() < 300);
        assert_eq!(one_line("  short \n"), "short");
    }

    #[test]
    fn scores_are_checked() {
        assert!(check_scores("r", &[1.0, -2.0], 2).is_ok());
        let error = |scores: &[f64]| check_scores("r", scores, 2).unwrap_err().to_string();
        assert_eq!(error(&[1.0]), "reward r: gave 1 scores, expected 2");
        assert_eq!(
            error(&[1.0, f64::NAN]),
            "reward r: score 2 of 2 is NaN, expected a finite number"
        );
    }
}
