//! BLOOM's parameter tree: every tensor in the order of the forward pass.

use super::{Architecture, BloomConfig};
use crate::checkpoint::Parameter;
use crate::ops::Affine;
use std::convert::Infallible;

/// All parameters, each as a `T`.
#[derive(Clone, Debug)]
pub struct BloomParameters<T> {
    /// One row a token id.
    pub embedding: T,
    /// After the embedding.
    pub embedding_norm: Affine<T>,
    /// The layers, the first one first.
    pub layers: Vec<BloomLayerParameters<T>>,
    /// Before the LM head.
    pub final_norm: Affine<T>,
    /// `None` if the LM head shares the embedding's weights, or there is none.
    pub lm_head: Option<T>,
    /// Of reward models: gives a hidden state its score, `[1, hidden]`.
    pub score: Option<T>,
}

/// The parameters of a layer.
#[derive(Clone, Debug)]
pub struct BloomLayerParameters<T> {
    /// Before attention.
    pub input_norm: Affine<T>,
    /// Queries, keys and values; rows are `[head, 3, head size]`.
    pub qkv: Affine<T>,
    /// After attention.
    pub dense: Affine<T>,
    /// Before the MLP.
    pub post_norm: Affine<T>,
    /// The MLP's first matrix.
    pub up: Affine<T>,
    /// The MLP's second matrix.
    pub down: Affine<T>,
}

impl BloomConfig {
    /// Makes a `T` of every parameter, in their order.
    ///
    /// # Errors
    /// The first that `make` returns.
    pub fn parameter_tree<T, E>(
        &self,
        mut make: impl FnMut(Parameter) -> Result<T, E>,
    ) -> Result<BloomParameters<T>, E> {
        let (h, make) = (self.hidden_size, &mut make);
        let table = [self.vocab_size, h];
        Ok(BloomParameters {
            embedding: make(Parameter::new("transformer.word_embeddings.weight", &table))?,
            embedding_norm: Affine::layer_norm("transformer.word_embeddings_layernorm", h, make)?,
            layers: (0..self.layers).map(|i| self.layer(i, make)).collect::<Result<_, E>>()?,
            final_norm: Affine::layer_norm("transformer.ln_f", h, make)?,
            lm_head: match (self.architecture, self.tied) {
                (Architecture::CausalLm, false) => {
                    Some(make(Parameter::new("lm_head.weight", &table))?)
                }
                _ => None,
            },
            score: match self.architecture {
                Architecture::CausalLm => None,
                Architecture::SequenceClassification => {
                    Some(make(Parameter::new("score.weight", &[1, h]))?)
                }
            },
        })
    }

    fn layer<T, E>(
        &self,
        i: usize,
        make: &mut impl FnMut(Parameter) -> Result<T, E>,
    ) -> Result<BloomLayerParameters<T>, E> {
        let h = self.hidden_size;
        let at = |part: &str| format!("transformer.h.{i}.{part}");
        Ok(BloomLayerParameters {
            input_norm: Affine::layer_norm(&at("input_layernorm"), h, make)?,
            qkv: Affine::linear(&at("self_attention.query_key_value"), [3 * h, h], make)?,
            dense: Affine::linear(&at("self_attention.dense"), [h, h], make)?,
            post_norm: Affine::layer_norm(&at("post_attention_layernorm"), h, make)?,
            up: Affine::linear(&at("mlp.dense_h_to_4h"), [4 * h, h], make)?,
            down: Affine::linear(&at("mlp.dense_4h_to_h"), [h, 4 * h], make)?,
        })
    }

    /// Every tensor, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut list = Vec::new();
        let push = |parameter| {
            list.push(parameter);
            Ok::<(), Infallible>(())
        };
        let Ok(_) = self.parameter_tree(push);
        list
    }
}
