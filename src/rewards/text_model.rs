//! Text reward models as rewards: a folder that `bprompt train reward` made.

use super::{Reward, ScoredText};
use crate::error::Result;
use crate::models::bloom::{Architecture, BloomCheckpoint, RewardModel};
use crate::ops::DecodeBackend;
use crate::tensor::DType;
use crate::text::Tokenizer;
use crate::text::template::RewardTemplate;
use std::path::Path;

/// What a reward model's folder holds, checked, on no device yet.
pub struct TextRewardParts {
    name: String,
    /// The weights and their configuration.
    pub checkpoint: BloomCheckpoint,
    tokenizer: Tokenizer,
    /// What the model reads of a text.
    pub template: RewardTemplate,
}

impl TextRewardParts {
    /// Opens a folder, with the template in it, or the given one.
    ///
    /// # Errors
    /// If the folder holds no reward model, or one that is not whole.
    pub fn open(folder: &Path, template: Option<RewardTemplate>) -> Result<TextRewardParts> {
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
        let name = folder.display().to_string();
        Ok(TextRewardParts { name, checkpoint, tokenizer, template })
    }
}

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

/// A text as a reward model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewardTokens {
    /// At least one.
    pub ids: Vec<u32>,
    /// Whether the text's beginning was cut, because there are too many.
    pub cut: bool,
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
        TextRewardModel::load(backend, TextRewardParts::open(folder, template)?, options)
    }

    /// Prepares what a folder holds on a backend.
    ///
    /// # Errors
    /// If a tensor holds NaN or infinity, or there is no memory.
    pub fn load(
        backend: &'a B,
        parts: TextRewardParts,
        options: TextRewardOptions,
    ) -> Result<TextRewardModel<'a, B>> {
        let TextRewardParts { name, checkpoint, tokenizer, template } = parts;
        let eos = checkpoint.config.eos_token_id;
        let max_tokens = options.max_tokens.clamp(1, checkpoint.config.context);
        let tokens = options.batch_tokens.max(max_tokens);
        let model = RewardModel::load(backend, checkpoint, options.dtype, tokens)?;
        Ok(TextRewardModel { name, backend, model, tokenizer, template, eos, max_tokens })
    }

    /// Maximum tokens of a text.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// A text in the template, as the model reads it.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn encode(&self, text: ScoredText) -> Result<RewardTokens> {
        let text = self.template.apply(text.raw_prompt, text.output);
        reward_tokens((&self.tokenizer, self.eos), &text, self.max_tokens)
    }

    /// The score of each text that was encoded.
    ///
    /// # Errors
    /// If the device fails.
    pub fn score_ids(&mut self, texts: &[Vec<u32>]) -> Result<Vec<f32>> {
        self.model.score(self.backend, texts)
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
pub fn reward_tokens(
    (tokenizer, eos): (&Tokenizer, u32),
    text: &str,
    max_tokens: usize,
) -> Result<RewardTokens> {
    let mut ids = tokenizer.encode_literal(text)?;
    ids.push(eos);
    let excess = ids.len().saturating_sub(max_tokens);
    ids.drain(..excess);
    Ok(RewardTokens { ids, cut: excess > 0 })
}

impl<B: DecodeBackend> Reward for TextRewardModel<'_, B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        let texts =
            rewrites.iter().map(|r| Ok(self.encode(*r)?.ids)).collect::<Result<Vec<_>>>()?;
        let scores = self.score_ids(&texts)?;
        Ok(scores.into_iter().map(f64::from).collect())
    }
}
