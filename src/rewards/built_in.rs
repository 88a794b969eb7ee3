//! Rewards that need nothing but the texts.

use super::{Reward, ScoredText};
use crate::error::Result;
use crate::rewrite::Fidelity;
use crate::text::clip::clip_tokens;
use crate::text::content_words::repeated_share;

/// What CLIP's tokenizer puts around every input.
const SPECIAL_TOKENS: usize = 2;

/// Words of the runs that should not repeat.
const REPEATED_WORDS: usize = 3;

/// The part of the plain prompt's meaning that the output keeps, from 0 to 1.
#[derive(Default)]
pub struct FidelityReward {
    fidelity: Fidelity,
}

impl Reward for FidelityReward {
    fn name(&self) -> &str {
        "fidelity"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        Ok(rewrites.iter().map(|r| self.fidelity.score(r.raw_prompt, r.output).0).collect())
    }
}

/// The share of the output's CLIP tokens that fit into what a text encoder reads at once: 1 for
/// every output that fits as a whole, an empty one too.
pub struct ClipTokensReward {
    name: String,
    budget: usize,
}

impl ClipTokensReward {
    /// Tokens that a text encoder reads at once, its first and last one not counted.
    pub const CHUNK: usize = 75;

    /// A reward for outputs of at most `budget` tokens.
    pub fn new(budget: usize) -> ClipTokensReward {
        let name = match budget {
            Self::CHUNK => "clip-tokens".into(),
            other => format!("clip-tokens={other}"),
        };
        ClipTokensReward { name, budget }
    }
}

impl Reward for ClipTokensReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        let share = |r: &ScoredText| {
            let tokens = clip_tokens(r.output) - SPECIAL_TOKENS;
            (self.budget as f64 / tokens.max(1) as f64).min(1.0)
        };
        Ok(rewrites.iter().map(share).collect())
    }
}

/// Minus the share of the output's runs of three words that occurred in it before.
#[derive(Default)]
pub struct RepetitionReward;

impl Reward for RepetitionReward {
    fn name(&self) -> &str {
        "repetition"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        Ok(rewrites.iter().map(|r| 0.0 - repeated_share(r.output, REPEATED_WORDS)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(reward: &mut dyn Reward, outputs: &[&str]) -> Vec<f64> {
        let rewrites: Vec<ScoredText> = outputs
            .iter()
            .map(|output| ScoredText { raw_prompt: "two cats in the rain", output })
            .collect();
        reward.score(&rewrites).unwrap()
    }

    #[test]
    fn fidelity_is_the_kept_part() {
        let scores =
            scores(&mut FidelityReward::default(), &["2 cats, rain, 8k", "cats in the rain", ""]);
        assert_eq!(scores, [1.0, 2.0 / 3.0, 0.0]);
    }

    #[test]
    fn clip_tokens_pay_for_what_fits() {
        let long = "cat ".repeat(100);
        let outputs = ["a cat", &"cat ".repeat(75), &long, ""];
        assert_eq!(scores(&mut ClipTokensReward::new(75), &outputs), [1.0, 1.0, 0.75, 1.0]);
        assert_eq!(scores(&mut ClipTokensReward::new(25), &[&long]), [0.25]);
        let name = |budget| ClipTokensReward::new(budget).name().to_owned();
        assert_eq!((name(75), name(60)), ("clip-tokens".into(), "clip-tokens=60".into()));
    }

    #[test]
    fn repetition_is_minus_the_repeated_share() {
        let given = scores(&mut RepetitionReward, &["a b c a b c a", "a cat in the rain", "a"]);
        assert_eq!(given, [-0.4, 0.0, 0.0]);
        assert!(given[1].is_sign_positive(), "zero has no sign that a report would show");
    }
}
