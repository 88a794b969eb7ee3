//! BLOOM for inference, over any [`DecodeBackend`].

use super::{BloomCheckpoint, BloomConfig, BloomLayerParameters, BloomParameters};
use crate::checkpoint::Parameter;
use crate::error::{Error, Result};
use crate::models::params::flat_ranges;
use crate::ops::cpu::finite;
use crate::ops::cpu::simd::Isa;
use crate::ops::sampling::{SampledToken, SamplingRow};
use crate::ops::{
    Affine, Batch, DecodeBackend, Decoder, DecoderActivations, DecoderLayer, LayerNorm, Linear,
    RolloutBackend,
};
use crate::tensor::{DType, HostTensor};
use std::convert::Infallible;
use std::ops::Range;
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

/// Makes a backend's weights of what stands for a model's parameters.
struct Loader<'a, B: DecodeBackend, T> {
    /// Of a matrix.
    weight: &'a dyn Fn(T) -> Result<B::Weight>,
    /// Of a vector.
    vector: &'a dyn Fn(T) -> Result<B::Vector>,
    eps: f32,
}

impl<B: DecodeBackend, T> Loader<'_, B, T> {
    fn layer_norm(&self, p: Affine<T>) -> Result<LayerNorm<B>> {
        let (weight, bias) = ((self.vector)(p.weight)?, (self.vector)(p.bias)?);
        Ok(LayerNorm { weight, bias, eps: self.eps })
    }

    fn linear(&self, p: Affine<T>) -> Result<Linear<B>> {
        Ok(Linear { weight: (self.weight)(p.weight)?, bias: (self.vector)(p.bias)? })
    }

    fn layer(&self, p: BloomLayerParameters<T>) -> Result<DecoderLayer<B>> {
        Ok(DecoderLayer {
            input_norm: self.layer_norm(p.input_norm)?,
            qkv: self.linear(p.qkv)?,
            dense: self.linear(p.dense)?,
            post_norm: self.layer_norm(p.post_norm)?,
            up: self.linear(p.up)?,
            down: self.linear(p.down)?,
        })
    }

    /// The whole model, with keys and values cached in `cache_dtype`.
    fn model(
        &self,
        config: BloomConfig,
        p: BloomParameters<T>,
        cache_dtype: DType,
    ) -> Result<Bloom<B>> {
        Ok(Bloom {
            decoder: Decoder {
                id: Default::default(),
                embedding: (self.weight)(p.embedding)?,
                embedding_norm: self.layer_norm(p.embedding_norm)?,
                layers: p.layers.into_iter().map(|l| self.layer(l)).collect::<Result<_>>()?,
                heads: config.attention_heads(),
                residual_post_norm: config.residual_post_layer_norm,
                final_norm: self.layer_norm(p.final_norm)?,
                lm_head: p.lm_head.map(self.weight).transpose()?,
            },
            score: p.score.map(self.weight).transpose()?,
            cache_dtype,
            config,
        })
    }
}

/// What keys and values are cached in beside weights of this type.
fn cache_dtype(weights: DType) -> DType {
    if weights == DType::Int8 { DType::Bf16 } else { weights }
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
        let take = |p: Parameter| Ok::<_, Error>((p.name.clone(), weights.take(&p)?));
        let p = config.parameter_tree(take)?;
        let stored = p.embedding.1.dtype;
        let path = weights.path.clone();
        let weight = |(name, tensor): (String, HostTensor)| {
            backend.weight(tensor, dtype).map_err(|e| e.of_tensor(&path, &name))
        };
        let vector = |(name, tensor): (String, HostTensor)| {
            finite::check(Isa::detect(), &tensor)
                .and_then(|()| backend.vector(&tensor))
                .map_err(|e| e.of_tensor(&path, &name))
        };
        let eps = config.layer_norm_epsilon;
        let loader = Loader { weight: &weight, vector: &vector, eps };
        loader.model(config, p, cache_dtype(dtype.unwrap_or(stored)))
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

/// A parameter, and where it is among flat ones.
type Placed = (Parameter, Range<usize>);

impl<B: RolloutBackend> Bloom<B> {
    /// A model that generates by parameters in training, as weights in `dtype`.
    ///
    /// # Errors
    /// A tensor that holds what is no number is named.
    pub fn of_parameters(
        backend: &B,
        config: &BloomConfig,
        flat: &B::Flat,
        dtype: DType,
    ) -> Result<Bloom<B>> {
        with_loader(backend, (config, flat, dtype), |loader, tree| {
            loader.model(config.clone(), tree, cache_dtype(dtype))
        })
    }

    /// Takes up the parameters of [`Bloom::of_parameters`] after they have changed; those of the
    /// embedding and of the first `frozen` layers have not.
    ///
    /// # Errors
    /// As for [`Bloom::of_parameters`].
    pub fn refresh(
        &mut self,
        backend: &B,
        flat: &B::Flat,
        (dtype, frozen): (DType, usize),
    ) -> Result<()> {
        if backend.shares_weights(dtype) {
            return Ok(());
        }
        let config = self.config.clone();
        if frozen == 0 {
            *self = Bloom::of_parameters(backend, &config, flat, dtype)?;
            return Ok(());
        }
        let decoder = &mut self.decoder;
        with_loader(backend, (&config, flat, dtype), |loader, tree| {
            let layers = decoder.layers.iter_mut().zip(tree.layers).skip(frozen);
            layers.into_iter().try_for_each(|(layer, p)| {
                *layer = loader.layer(p)?;
                Ok::<_, Error>(())
            })?;
            decoder.final_norm = loader.layer_norm(tree.final_norm)?;
            decoder.lm_head = tree.lm_head.map(loader.weight).transpose()?;
            decoder.id = Default::default();
            Ok(())
        })
    }
}

/// Does something with a loader of flat parameters, and where they are.
fn with_loader<B: RolloutBackend, R>(
    backend: &B,
    (config, flat, dtype): (&BloomConfig, &B::Flat, DType),
    work: impl FnOnce(&Loader<B, Placed>, BloomParameters<Placed>) -> Result<R>,
) -> Result<R> {
    let mut ranges = flat_ranges();
    let Ok(tree) = config.parameter_tree(|p| {
        let Ok(range) = ranges(p.clone());
        Ok::<Placed, Infallible>((p, range))
    });
    let of = Path::new("the parameters in training");
    let weight = |(p, at): Placed| {
        let shape = [p.shape[0], p.shape[1]];
        backend.weight_of(flat, at, shape, dtype).map_err(|e| e.of_tensor(of, &p.name))
    };
    let vector = |(_, at): Placed| backend.vector_of(flat, at);
    let eps = config.layer_norm_epsilon;
    work(&Loader { weight: &weight, vector: &vector, eps }, tree)
}
