//! BLOOM for inference, over any [`DecodeBackend`].

use super::{BloomCheckpoint, BloomConfig, BloomLayerParameters};
use crate::error::{Error, Result};
use crate::ops::cpu::finite;
use crate::ops::cpu::simd::Isa;
use crate::ops::sampling::{SampledToken, SamplingRow};
use crate::ops::{
    Affine, Batch, DecodeBackend, Decoder, DecoderActivations, DecoderLayer, LayerNorm, Linear,
};
use crate::tensor::{DType, HostTensor};
use std::path::Path;

/// A model's weights on a backend.
pub struct Bloom<B: DecodeBackend> {
    /// Sizes and switches.
    pub config: BloomConfig,
    decoder: Decoder<B>,
    /// Of reward models.
    score: Option<B::Weight>,
    /// What keys and values are cached in.
    cache_dtype: DType,
}

/// A parameter that was taken from a checkpoint, and its name.
type Taken = (String, HostTensor);

/// Makes a backend's weights of tensors.
struct Loader<'a, B: DecodeBackend> {
    backend: &'a B,
    dtype: Option<DType>,
    eps: f32,
    /// What errors name.
    path: &'a Path,
}

impl<B: DecodeBackend> Loader<'_, B> {
    fn weight(&self, (name, tensor): Taken) -> Result<B::Weight> {
        self.backend.weight(tensor, self.dtype).map_err(|e| e.of_tensor(self.path, &name))
    }

    fn vector(&self, (name, tensor): Taken) -> Result<B::Vector> {
        finite::check(Isa::detect(), &tensor)
            .and_then(|()| self.backend.vector(&tensor))
            .map_err(|e| e.of_tensor(self.path, &name))
    }

    fn layer_norm(&self, p: Affine<Taken>) -> Result<LayerNorm<B>> {
        Ok(LayerNorm { weight: self.vector(p.weight)?, bias: self.vector(p.bias)?, eps: self.eps })
    }

    fn linear(&self, p: Affine<Taken>) -> Result<Linear<B>> {
        Ok(Linear { weight: self.weight(p.weight)?, bias: self.vector(p.bias)? })
    }

    fn layer(&self, p: BloomLayerParameters<Taken>) -> Result<DecoderLayer<B>> {
        Ok(DecoderLayer {
            input_norm: self.layer_norm(p.input_norm)?,
            qkv: self.linear(p.qkv)?,
            dense: self.linear(p.dense)?,
            post_norm: self.layer_norm(p.post_norm)?,
            up: self.linear(p.up)?,
            down: self.linear(p.down)?,
        })
    }
}

impl<B: DecodeBackend> Bloom<B> {
    /// Prepares the weights of a checkpoint in `dtype`; `None` keeps what is stored.
    ///
    /// # Errors
    /// A tensor that holds NaN or infinity, or does so after its conversion, is named.
    pub fn load(
        backend: &B,
        checkpoint: BloomCheckpoint,
        dtype: Option<DType>,
    ) -> Result<Bloom<B>> {
        let BloomCheckpoint { config, mut weights } = checkpoint;
        let p =
            config.parameter_tree(|p| Ok::<Taken, Error>((p.name.clone(), weights.take(&p)?)))?;
        let stored = p.embedding.1.dtype;
        let eps = config.layer_norm_epsilon;
        let loader = Loader { backend, dtype, eps, path: &weights.path };
        let embedding = loader.weight(p.embedding)?;
        Ok(Bloom {
            decoder: Decoder {
                id: Default::default(),
                embedding,
                embedding_norm: loader.layer_norm(p.embedding_norm)?,
                layers: p.layers.into_iter().map(|l| loader.layer(l)).collect::<Result<_>>()?,
                heads: config.attention_heads(),
                residual_post_norm: config.residual_post_layer_norm,
                final_norm: loader.layer_norm(p.final_norm)?,
                lm_head: p.lm_head.map(|h| loader.weight(h)).transpose()?,
            },
            score: p.score.map(|s| loader.weight(s)).transpose()?,
            cache_dtype: match dtype.unwrap_or(stored) {
                DType::Int8 => DType::Bf16,
                plain => plain,
            },
            config,
        })
    }

    /// A KV cache of `blocks` blocks.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn cache(&self, backend: &B, blocks: usize) -> Result<B::Cache> {
        backend.cache(self.cache_dtype, self.config.layers, &self.decoder.heads, blocks)
    }

    /// Bytes of the KV cache that one token takes.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.config.kv_bytes_per_token(self.cache_dtype.size())
    }

    /// The layers, and what is before and behind them.
    pub fn decoder(&self) -> &Decoder<B> {
        &self.decoder
    }

    /// The LM head's matrix `[vocabulary, hidden]`.
    pub fn lm_head(&self) -> &B::Weight {
        self.decoder.lm_head()
    }

    /// Runs all tokens of `batch` through the layers and extends the cache. The final hidden states
    /// stay in `a` for [`Bloom::logits`] and [`Bloom::sample`].
    pub fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        cache: &mut B::Cache,
        a: &mut DecoderActivations<B>,
    ) {
        backend.upload_batch(batch, &mut a.batch);
        backend.decoder(&self.decoder, cache, a);
    }

    /// Logits `[rows.len(), vocabulary]` of chosen tokens of the last forward pass.
    ///
    /// # Errors
    /// What has failed on the device since results were last taken.
    pub fn logits(
        &self,
        backend: &B,
        rows: &[usize],
        a: &mut DecoderActivations<B>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        backend.layer_norm_rows(&mut a.normed, &a.x, rows, &self.decoder.final_norm);
        backend.logits(&a.normed, self.lm_head(), out)
    }

    /// The scores that a reward model gives chosen tokens of the last forward pass.
    ///
    /// # Errors
    /// If the model is none, or what has failed on the device since results were last taken.
    pub fn scores(
        &self,
        backend: &B,
        rows: &[usize],
        a: &mut DecoderActivations<B>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let score = self
            .score
            .as_ref()
            .ok_or_else(|| Error::Internal("a language model was asked for scores".into()))?;
        backend.layer_norm_rows(&mut a.normed, &a.x, rows, &self.decoder.final_norm);
        backend.logits(&a.normed, score, out)
    }

    /// Samples a token for each row of the last forward pass. `logits` is scratch.
    ///
    /// # Errors
    /// What has failed on the device since results were last taken.
    pub fn sample(
        &self,
        backend: &B,
        rows: &[SamplingRow],
        a: &mut DecoderActivations<B>,
        logits: &mut Vec<f32>,
    ) -> Result<Vec<SampledToken>> {
        if rows.is_empty() {
            return Ok(vec![]);
        }
        let rows = self.gather(backend, rows, a);
        backend.sample(&a.normed, self.lm_head(), &rows, logits)
    }

    /// [`Bloom::sample`] that does not wait; see [`DecodeBackend::sample_async`].
    ///
    /// # Errors
    /// What has failed on the device since results were last taken.
    pub fn sample_async(
        &self,
        backend: &B,
        rows: &[SamplingRow],
        a: &mut DecoderActivations<B>,
    ) -> Result<B::PendingSamples> {
        let rows = self.gather(backend, rows, a);
        backend.sample_async(&a.normed, self.lm_head(), &rows)
    }

    /// Normalizes the tokens that are sampled from, each once, and tells each row its place among
    /// them.
    fn gather<'r>(
        &self,
        backend: &B,
        rows: &'r [SamplingRow<'r>],
        a: &mut DecoderActivations<B>,
    ) -> Vec<(usize, &'r SamplingRow<'r>)> {
        // candidates of one prompt share a row
        let mut tokens: Vec<usize> = rows.iter().map(|r| r.row).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let at = |r: &SamplingRow| tokens.binary_search(&r.row).expect("taken from the rows above");
        backend.layer_norm_rows(&mut a.normed, &a.x, &tokens, &self.decoder.final_norm);
        rows.iter().map(|r| (at(r), r)).collect()
    }
}
