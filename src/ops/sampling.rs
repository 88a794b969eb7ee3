//! What a backend is asked to sample, and what it answers.
//!
//! Order and meaning are transformers': repetition penalty, temperature, top-k (ties stay), top-p,
//! min-p; before the temperature come OpenAI's presence and frequency penalties and biases, all
//! added to the logits. The noise is a function of (seed, candidate, position, token) alone, so a
//! seed gives the same tokens in any company.

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// 0 for no limit.
    pub top_k: usize,
    /// 1 for no limit.
    pub top_p: f32,
    /// 0 for no limit.
    pub min_p: f32,
    /// 1 for none. Positive logits of seen tokens are divided by it, negative ones multiplied.
    pub repetition_penalty: f32,
    /// Whether the prompt's tokens count as seen, as in transformers.
    pub penalize_prompt: bool,
    /// Taken once from the logits of tokens that were put out.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens that were put out, for each time that they were.
    pub frequency_penalty: f32,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            penalize_prompt: true,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// The same, with a temperature that logits can be divided by: below this one they would
    /// overflow, and nothing but the most likely token is left in any case.
    pub fn effective(self) -> Sampling {
        const MIN_TEMPERATURE: f32 = 1e-5;
        Sampling {
            temperature: if self.temperature >= MIN_TEMPERATURE { self.temperature } else { 0.0 },
            ..self
        }
    }
}

/// One token to sample.
#[derive(Clone, Copy)]
pub struct SamplingRow<'a> {
    /// Token of the batch whose logits count.
    pub row: usize,
    /// How the token is chosen.
    pub sampling: &'a Sampling,
    /// Tokens that the repetition penalty counts, each once.
    pub seen: &'a [u32],
    /// Which of the last sampled tokens counts as seen too, and is not known yet.
    pub pending: Option<usize>,
    /// Added to the logits of tokens, each at most once.
    pub bias: &'a [(u32, f32)],
    /// The choice, if there is none: only its log-probability is wanted.
    pub forced: Option<u32>,
    /// Likely tokens to report.
    pub top: usize,
    /// Which of the request's candidates, from 0.
    pub candidate: u32,
    /// Position that the token will have.
    pub position: u32,
}

impl<'a> SamplingRow<'a> {
    /// A choice without anything that is special to it.
    pub fn new(
        row: usize,
        sampling: &'a Sampling,
        candidate: u32,
        position: u32,
    ) -> SamplingRow<'a> {
        SamplingRow {
            row,
            sampling,
            seen: &[],
            pending: None,
            bias: &[],
            forced: None,
            top: 0,
            candidate,
            position,
        }
    }
}

/// The most likely tokens with their log-probabilities, the likeliest first.
pub type TopTokens = Vec<(u32, f32)>;

/// A token that was sampled.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct SampledToken {
    /// Id of the token.
    pub token: u32,
    /// Log-probability in nats of the model itself, before penalties and temperature.
    pub logprob: f32,
    /// The most likely tokens at its position, as many as were asked for.
    pub top: TopTokens,
}
