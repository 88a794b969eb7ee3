//! BLOOM for inference, over any [`Backend`].

use super::BloomConfig;
use crate::checkpoint::Checkpoint;
use crate::engine::{Chosen, SampleRow};
use crate::error::Result;
use crate::models::bloom::Parameter;
use crate::ops::cpu::finite;
use crate::ops::cpu::simd::Isa;
use crate::ops::{Backend, Batch, Forward, Heads, Layer, LayerNorm, Linear, Scratch};
use crate::tensor::{DType, Tensor};
use std::cell::RefCell;

pub struct Bloom<B: Backend> {
    pub config: BloomConfig,
    heads: Heads,
    embedding: B::Matrix,
    embedding_norm: LayerNorm<B::Vector>,
    layers: Vec<Layer<B>>,
    final_norm: LayerNorm<B::Vector>,
    /// `None` if the head is the embedding.
    head: Option<B::Matrix>,
    /// What keys and values are cached in.
    cache_dtype: DType,
}

impl<B: Backend> Bloom<B> {
    /// Prepares the weights of a checkpoint in `dtype`; `None` keeps what is stored. A tensor that
    /// holds NaN or infinity, or does so after its conversion, is named.
    pub fn load(backend: &B, checkpoint: Checkpoint, dtype: Option<DType>) -> Result<Bloom<B>> {
        let config = checkpoint.config.clone();
        let checkpoint = RefCell::new(checkpoint);
        let tensor = |name: &str, shape: &[usize]| {
            checkpoint
                .borrow_mut()
                .take(&Parameter { name: name.to_owned(), shape: shape.to_vec() })
        };
        let h = config.hidden_size;
        let path = checkpoint.borrow().path.clone();
        let vector = |name: String, len: usize| {
            let tensor = tensor(&name, &[len])?;
            let checked =
                finite::check(Isa::detect(), &tensor).and_then(|()| backend.vector(&tensor));
            checked.map_err(|e| e.of_tensor(&path, &name))
        };
        let matrix = |name: &str, tensor: Tensor| {
            backend.matrix(tensor, dtype).map_err(|e| e.of_tensor(&path, name))
        };
        let norm = |name: &str| -> Result<_> {
            Ok(LayerNorm {
                weight: vector(format!("{name}.weight"), h)?,
                bias: vector(format!("{name}.bias"), h)?,
            })
        };
        let linear = |name: String, rows: usize, cols: usize| -> Result<_> {
            let weight = format!("{name}.weight");
            let weight = matrix(&weight, tensor(&weight, &[rows, cols])?)?;
            Ok(Linear { weight, bias: vector(format!("{name}.bias"), rows)? })
        };
        let table = "transformer.word_embeddings.weight";
        let embedding = tensor(table, &[config.vocab_size, h])?;
        let cache_dtype = match dtype.unwrap_or(embedding.dtype) {
            DType::Int8 => DType::Bf16,
            plain => plain,
        };
        let layers = (0..config.layers).map(|i| {
            let at = |part: &str| format!("transformer.h.{i}.{part}");
            Ok(Layer {
                input_norm: norm(&at("input_layernorm"))?,
                qkv: linear(at("self_attention.query_key_value"), 3 * h, h)?,
                dense: linear(at("self_attention.dense"), h, h)?,
                post_norm: norm(&at("post_attention_layernorm"))?,
                up: linear(at("mlp.dense_h_to_4h"), 4 * h, h)?,
                down: linear(at("mlp.dense_4h_to_h"), h, 4 * h)?,
            })
        });
        Ok(Bloom {
            heads: config.attention_heads(),
            embedding: matrix(table, embedding)?,
            embedding_norm: norm("transformer.word_embeddings_layernorm")?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: norm("transformer.ln_f")?,
            head: if config.tied {
                None
            } else {
                Some(matrix("lm_head.weight", tensor("lm_head.weight", &[config.vocab_size, h])?)?)
            },
            cache_dtype,
            config,
        })
    }

    /// A KV cache of `blocks` blocks.
    pub fn cache(&self, backend: &B, blocks: usize) -> Result<B::Cache> {
        backend.cache(self.cache_dtype, self.config.layers, &self.heads, blocks)
    }

    /// Bytes of the KV cache that one token takes.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.config.kv_bytes_per_token(self.cache_dtype.size())
    }

    pub fn head(&self) -> &B::Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Runs all tokens of `batch` through the layers and extends the cache. The final hidden states
    /// stay in `scratch` for [`Bloom::logits`].
    pub fn forward(&self, backend: &B, batch: &Batch, cache: &mut B::Cache, s: &mut Scratch<B>) {
        backend.begin(batch, &mut s.pass);
        backend.forward(Forward {
            batch,
            embedding: &self.embedding,
            embedding_norm: &self.embedding_norm,
            layers: &self.layers,
            heads: &self.heads,
            eps: self.config.layer_norm_epsilon,
            residual_post_norm: self.config.residual_post_layer_norm,
            cache,
            scratch: s,
        });
    }

    /// Logits `[rows.len(), vocabulary]` of chosen tokens of the last forward pass.
    pub fn logits(
        &self,
        backend: &B,
        rows: &[usize],
        s: &mut Scratch<B>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        backend.gather_norm(
            &s.x,
            rows,
            &self.final_norm,
            self.config.layer_norm_epsilon,
            &mut s.normed,
        );
        backend.logits(&s.normed, self.head(), out)
    }

    /// Chooses a token for each row of the last forward pass. `logits` is scratch.
    pub fn sample(
        &self,
        backend: &B,
        rows: &[SampleRow],
        s: &mut Scratch<B>,
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>> {
        if rows.is_empty() {
            return Ok(vec![]);
        }
        let rows = self.gather(backend, rows, s);
        backend.sample(&s.normed, self.head(), &rows, logits)
    }

    /// [`Bloom::sample`] that does not wait; see [`Backend::start_sample`].
    pub fn start_sample(
        &self,
        backend: &B,
        rows: &[SampleRow],
        s: &mut Scratch<B>,
    ) -> Result<B::Choosing> {
        let rows = self.gather(backend, rows, s);
        backend.start_sample(&s.normed, self.head(), &rows)
    }

    /// Normalizes the tokens that choices are made from, each once, and tells each choice its row.
    fn gather<'r>(
        &self,
        backend: &B,
        rows: &'r [SampleRow<'r>],
        s: &mut Scratch<B>,
    ) -> Vec<(usize, &'r SampleRow<'r>)> {
        // candidates of one prompt share a row
        let mut tokens: Vec<usize> = rows.iter().map(|r| r.row).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let at = |r: &SampleRow| tokens.binary_search(&r.row).expect("taken from the rows above");
        backend.gather_norm(
            &s.x,
            &tokens,
            &self.final_norm,
            self.config.layer_norm_epsilon,
            &mut s.normed,
        );
        rows.iter().map(|r| (at(r), r)).collect()
    }
}
