//! How well a rewriter does: what it keeps, adds and repeats.

pub mod facts;
pub mod variety;

use crate::text::content_words::{ContentWords, most_repeated, words};
use facts::KindOfFact;
use serde::Serialize;
use variety::{Variety, variety};

/// One prompt and its rewrite.
pub struct EvaluatedRewrite {
    /// The plain prompt.
    pub input: String,
    /// The rewrite.
    pub output: String,
    /// Time that the rewrite took.
    pub seconds: f64,
    /// Of all rounds.
    pub tokens: usize,
    /// Part of the input's meaning that the output keeps.
    pub kept: f64,
    /// Whether it is not made of the input.
    pub from_model: bool,
}

/// Measures of a list of rewrites. A part is between 0 and 1.
#[derive(Debug, Serialize)]
pub struct RewriteReport {
    /// Number of rewrites.
    pub prompts: usize,
    /// Mean part of the input's content words that the output has.
    pub kept_content_words: f64,
    /// Mean part of the input's meaning that the output keeps, numbers, places and negations
    /// included.
    pub kept_meaning: f64,
    /// Part of the outputs that had to be made of their inputs.
    pub fallbacks: f64,
    /// Part of the outputs with all content words of their inputs.
    pub kept_all: f64,
    /// Part of the outputs with at least eight words more than their inputs.
    pub adds_eight_words: f64,
    /// Part of the outputs in which some run of four words occurs three times or more.
    pub repeats_four_words: f64,
    /// Mean number of words of the inputs.
    pub mean_words_in: f64,
    /// Mean number of words of the outputs.
    pub mean_words_out: f64,
    /// Mean number of tokens generated for a rewrite, in all rounds.
    pub mean_tokens: f64,
    /// Mean number of tokens that a forward pass brought.
    pub tokens_per_step: f64,
    /// Part of the drafted tokens that was accepted.
    pub drafts_accepted: f64,
    /// Median time of a rewrite.
    pub median_seconds: f64,
    /// Longest time of a rewrite.
    pub slowest_seconds: f64,
    /// What survives of single facts, by kind, if they are known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<KindOfFact>,
    /// How much the rewrites differ from each other.
    #[serde(flatten)]
    pub variety: Variety,
}

/// Sums up rewrites; facts, tokens of a step and accepted drafts are left for the caller.
pub fn report(rewrites: &[EvaluatedRewrite]) -> RewriteReport {
    let content = ContentWords::default();
    let n = rewrites.len().max(1) as f64;
    let mean = |f: &dyn Fn(&EvaluatedRewrite) -> f64| rewrites.iter().map(f).sum::<f64>() / n;
    let share =
        |f: &dyn Fn(&EvaluatedRewrite) -> bool| rewrites.iter().filter(|r| f(r)).count() as f64 / n;
    let mut seconds: Vec<f64> = rewrites.iter().map(|r| r.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    RewriteReport {
        prompts: rewrites.len(),
        kept_content_words: mean(&|r| content.kept(&r.input, &r.output)),
        kept_meaning: mean(&|r| r.kept),
        fallbacks: share(&|r| !r.from_model),
        kept_all: share(&|r| content.kept(&r.input, &r.output) == 1.0),
        adds_eight_words: share(&|r| words(&r.output).len() >= words(&r.input).len() + 8),
        repeats_four_words: share(&|r| most_repeated(&r.output, 4) >= 3),
        mean_words_in: mean(&|r| words(&r.input).len() as f64),
        mean_words_out: mean(&|r| words(&r.output).len() as f64),
        mean_tokens: mean(&|r| r.tokens as f64),
        tokens_per_step: 1.0,
        drafts_accepted: 0.0,
        median_seconds: seconds.get(seconds.len() / 2).copied().unwrap_or(0.0),
        slowest_seconds: seconds.last().copied().unwrap_or(0.0),
        facts: vec![],
        variety: variety(rewrites.iter().map(|r| (r.input.as_str(), r.output.as_str()))),
    }
}
