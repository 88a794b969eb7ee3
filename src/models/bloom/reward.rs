//! Reward models for inference: a score of each text, over any [`DecodeBackend`].

use super::{Architecture, Bloom, BloomCheckpoint};
use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::ops::{BLOCK, Batch, DecodeBackend, DecoderActivations};
use crate::tensor::DType;

/// A reward model's weights on a backend, and room for its passes.
pub struct RewardModel<B: DecodeBackend> {
    bloom: Bloom<B>,
    cache: B::Cache,
    /// Blocks of the cache.
    blocks: usize,
    activations: DecoderActivations<B>,
    scores: Vec<f32>,
}

impl<B: DecodeBackend> RewardModel<B> {
    /// Prepares the weights of a checkpoint in `dtype`, `None` for what is stored, for passes of at
    /// most `tokens` tokens.
    ///
    /// # Errors
    /// If it is no reward model, a tensor holds NaN or infinity, or there is no memory.
    pub fn load(
        backend: &B,
        checkpoint: BloomCheckpoint,
        dtype: Option<DType>,
        tokens: usize,
    ) -> Result<RewardModel<B>> {
        checkpoint.config.expect(Architecture::SequenceClassification, &checkpoint.weights.path)?;
        let bloom = Bloom::load(backend, checkpoint, dtype)?;
        let blocks = tokens.div_ceil(BLOCK).max(1);
        // the keys and values of a pass, and its activations in f32 with the inputs of GEMMs
        let activation = (11 * 4 + 4 * 4) * bloom.config.hidden_size;
        let positions = (blocks * BLOCK) as f64;
        backend.fits(
            &MemoryPlan::new()
                .with(
                    "KV cache",
                    positions * bloom.cache_bytes_per_token() as f64,
                    "--batch-tokens",
                )
                .with("activations", positions * activation as f64, "--batch-tokens"),
        )?;
        let cache = bloom.cache(backend, blocks)?;
        Ok(RewardModel {
            bloom,
            cache,
            blocks,
            activations: DecoderActivations::default(),
            scores: Vec::new(),
        })
    }

    /// Maximum tokens of a text.
    pub fn max_tokens(&self) -> usize {
        self.blocks * BLOCK
    }

    /// The score of each text, which is that of its last token. It does not depend on the other
    /// texts.
    ///
    /// # Errors
    /// If a text is empty or too long, or the device fails.
    pub fn score(&mut self, backend: &B, texts: &[Vec<u32>]) -> Result<Vec<f32>> {
        let vocabulary = self.bloom.config.vocab_size;
        for (i, text) in texts.iter().enumerate() {
            let (tokens, most) = (text.len(), self.max_tokens());
            if tokens == 0 || tokens > most {
                return Err(Error::invalid(format!(
                    "text {i} has {tokens} tokens; expected from 1 to {most}"
                )));
            }
            if let Some(id) = text.iter().find(|&&id| id as usize >= vocabulary) {
                return Err(Error::invalid(format!(
                    "token id {id} of text {i} is outside the model's vocabulary"
                )));
            }
        }
        let mut all = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let (mut batch, mut rows, mut used) = (Batch::default(), Vec::new(), 0);
            for text in rest {
                let blocks = used..used + text.len().div_ceil(BLOCK);
                if blocks.end > self.blocks {
                    break;
                }
                used = blocks.end;
                batch.push(text, 0, &blocks.map(|b| b as u32).collect::<Vec<_>>());
                rows.push(batch.ids.len() - 1);
            }
            self.bloom.forward(backend, &batch, &mut self.cache, &mut self.activations);
            self.bloom.scores(backend, &rows, &mut self.activations, &mut self.scores)?;
            all.extend_from_slice(&self.scores);
            rest = &rest[rows.len()..];
        }
        Ok(all)
    }
}
