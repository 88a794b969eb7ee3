//! Text reward models as rewards: a folder that `bprompt train reward` made.

use super::{Reward, ScoredText};
use crate::error::Result;
use crate::models::bloom::{Architecture, BloomCheckpoint, RewardModel};
use crate::ops::DecodeBackend;
use crate::tensor::DType;
use crate::text::Tokenizer;
use crate::text::template::RewardTemplate;
use std::path::Path;

/// A reward model with its vocabulary and template.
pub struct TextRewardModel<'a, B: DecodeBackend> {
    name: String,
    backend: &'a B,
    model: RewardModel<B>,
    tokenizer: Tokenizer,
    template: RewardTemplate,
    eos: u32,
    max_tokens: usize,
}

/// How a reward model is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextRewardOptions {
    /// Type of the weights; none for what is stored.
    pub dtype: Option<DType>,
    /// Maximum tokens of a text; longer ones are cut on the left.
    pub max_tokens: usize,
    /// Maximum tokens of a pass.
    pub batch_tokens: usize,
}

impl<'a, B: DecodeBackend> TextRewardModel<'a, B> {
    /// Loads a folder, with the template in it, or the given one.
    ///
    /// # Errors
    /// If the folder holds no reward model, or one that is not whole.
    pub fn open(
        backend: &'a B,
        folder: &Path,
        template: Option<RewardTemplate>,
        options: TextRewardOptions,
    ) -> Result<TextRewardModel<'a, B>> {
        let checkpoint = BloomCheckpoint::open(folder)?;
        checkpoint.config.expect(Architecture::SequenceClassification, folder)?;
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::open(&path)?;
        tokenizer.check(checkpoint.config.vocab_size, &path)?;
        let own = folder.join("template.txt");
        let template = match template {
            Some(template) => template,
            None if own.exists() => RewardTemplate::read(&own)?,
            None => RewardTemplate::named("aesthetic")?,
        };
        let (eos, context) = (checkpoint.config.eos_token_id, checkpoint.config.context);
        let max_tokens = options.max_tokens.clamp(1, context);
        let tokens = options.batch_tokens.max(max_tokens);
        let model = RewardModel::load(backend, checkpoint, options.dtype, tokens)?;
        let name = folder.display().to_string();
        Ok(TextRewardModel { name, backend, model, tokenizer, template, eos, max_tokens })
    }

    /// Whether texts are scored together with their plain prompts.
    pub fn reads_raw_prompt(&self) -> bool {
        self.template.reads_raw_prompt()
    }
}

/// A text as a reward model reads it: token ids, ended by `eos` and cut on the left to
/// `max_tokens`.
///
/// # Errors
/// If the text cannot be encoded.
pub fn reward_ids(
    (tokenizer, eos): (&Tokenizer, u32),
    text: &str,
    max_tokens: usize,
) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode_literal(text)?;
    ids.push(eos);
    ids.drain(..ids.len().saturating_sub(max_tokens));
    Ok(ids)
}

impl<B: DecodeBackend> Reward for TextRewardModel<'_, B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        let vocabulary = (&self.tokenizer, self.eos);
        let ids = |r: &ScoredText| {
            let text = self.template.apply(r.raw_prompt, r.output);
            reward_ids(vocabulary, &text, self.max_tokens)
        };
        let texts = rewrites.iter().map(ids).collect::<Result<Vec<_>>>()?;
        let scores = self.model.score(self.backend, &texts)?;
        Ok(scores.into_iter().map(f64::from).collect())
    }
}
