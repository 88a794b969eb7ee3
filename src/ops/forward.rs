//! A forward pass over BLOOM's layers, as a device gets it: the operations one by one, or all there
//! is to know of them.

use super::{Backend, Batch, Epilogue, Heads, LayerNorm, Linear, Norm};

/// Weights of a layer.
pub struct Layer<B: Backend> {
    pub input_norm: LayerNorm<B::Vector>,
    pub qkv: Linear<B::Matrix, B::Vector>,
    pub dense: Linear<B::Matrix, B::Vector>,
    pub post_norm: LayerNorm<B::Vector>,
    pub up: Linear<B::Matrix, B::Vector>,
    pub down: Linear<B::Matrix, B::Vector>,
}

/// Activations, kept from pass to pass.
pub struct Scratch<B: Backend> {
    /// The residual stream; after a pass, the last layer's output.
    pub x: B::Buffer,
    pub normed: B::Buffer,
    pub qkv: B::Buffer,
    pub attention: B::Buffer,
    pub x2: B::Buffer,
    pub wide: B::Buffer,
    pub pass: B::Pass,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Scratch {
            x: Default::default(),
            normed: Default::default(),
            qkv: Default::default(),
            attention: Default::default(),
            x2: Default::default(),
            wide: Default::default(),
            pass: Default::default(),
        }
    }
}

/// From the tokens of `batch`, which [`Backend::begin`] was told of, to the last layer's output in
/// `scratch.x`.
pub struct Forward<'a, B: Backend> {
    pub batch: &'a Batch,
    pub embedding: &'a B::Matrix,
    pub embedding_norm: &'a LayerNorm<B::Vector>,
    pub layers: &'a [Layer<B>],
    pub heads: &'a Heads,
    /// Of all layer norms.
    pub eps: f32,
    /// Whether the residual branches off after the layer norms instead of before them.
    pub residual_post_norm: bool,
    pub cache: &'a mut B::Cache,
    pub scratch: &'a mut Scratch<B>,
}

impl<B: Backend> Forward<'_, B> {
    /// Operation by operation.
    pub fn operations(&mut self, backend: &B) {
        let Scratch { x, normed, qkv, attention, x2, wide, pass } = &mut *self.scratch;
        let (eps, keep) = (self.eps, self.residual_post_norm);
        backend.embed_norm(self.batch, pass, self.embedding, self.embedding_norm, eps, x);
        for (i, layer) in self.layers.iter().enumerate() {
            let norm = Norm { norm: &layer.input_norm, eps, keep, normed };
            backend.norm_qkv(self.batch, pass, i, x, norm, &layer.qkv, self.heads, self.cache, qkv);
            backend.attention(self.batch, pass, i, self.heads, qkv, self.cache, attention);
            if keep {
                backend.linear(attention, &layer.dense, Epilogue::BiasResidual(normed), x2);
            } else {
                let norm = Norm { norm: &layer.post_norm, eps, keep, normed };
                backend.linear_before_norm(
                    attention,
                    &layer.dense,
                    Epilogue::BiasResidual(x),
                    x2,
                    norm,
                );
            }
            let norm = Norm { norm: &layer.post_norm, eps, keep, normed };
            backend.norm_linear(x2, norm, &layer.up, Epilogue::BiasGelu, wide);
            match self.layers.get(i + 1) {
                _ if keep => backend.linear(wide, &layer.down, Epilogue::BiasResidual(normed), x),
                Some(next) => {
                    let norm = Norm { norm: &next.input_norm, eps, keep, normed };
                    backend.linear_before_norm(
                        wide,
                        &layer.down,
                        Epilogue::BiasResidual(x2),
                        x,
                        norm,
                    );
                }
                None => backend.linear(wide, &layer.down, Epilogue::BiasResidual(x2), x),
            }
        }
    }

    /// Addresses of all that the operations refer to and that may be another's next time.
    pub fn owners(&self) -> [usize; 3] {
        [
            self.layers.as_ptr() as usize,
            &raw const *self.cache as usize,
            &raw const *self.scratch as usize,
        ]
    }
}
