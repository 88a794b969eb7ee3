//! BLOOM with its gradients: the forward pass and its hand-written backward pass, over
//! packed sequences.

use super::{BloomConfig, BloomLayerParameters, BloomParameters};
use crate::models::params::flat_ranges;
use crate::ops::train::{
    AttentionOutput, LossGradients, NormOutput, PackedBatch, Params, Precision, TrainBackend,
};
use crate::ops::{Heads, Tensor};
use std::ops::Range;

/// A model's parameters in one flat buffer, in the order of [`BloomConfig::parameters`].
pub struct TrainModel<F = Vec<f32>> {
    /// Sizes and switches.
    pub config: BloomConfig,
    /// The parameters.
    pub values: F,
    layout: BloomParameters<Range<usize>>,
    heads: Heads,
}

/// What the forward pass keeps of a layer for the backward pass.
struct LayerActivations<B: TrainBackend> {
    x: Tensor<B>,
    norm1: NormOutput<B>,
    qkv: Tensor<B>,
    attention: AttentionOutput<B>,
    x2: Tensor<B>,
    norm2: NormOutput<B>,
    up: Tensor<B>,
    gelu: Tensor<B>,
}

impl<B: TrainBackend> Default for LayerActivations<B> {
    fn default() -> Self {
        LayerActivations {
            x: Tensor::default(),
            norm1: NormOutput::default(),
            qkv: Tensor::default(),
            attention: AttentionOutput::default(),
            x2: Tensor::default(),
            norm2: NormOutput::default(),
            up: Tensor::default(),
            gelu: Tensor::default(),
        }
    }
}

/// Gradients of activations, one layer's at a time.
struct Gradients<B: TrainBackend> {
    x: Tensor<B>,
    normed: Tensor<B>,
    residual: Tensor<B>,
    wide: Tensor<B>,
    qkv: Tensor<B>,
    attention: Tensor<B>,
    labelled: Tensor<B>,
}

/// Activations and their gradients, kept from step to step.
pub struct Workspace<B: TrainBackend> {
    embedded: Tensor<B>,
    embedding_norm: NormOutput<B>,
    layers: Vec<LayerActivations<B>>,
    x: Tensor<B>,
    final_norm: NormOutput<B>,
    labelled: Tensor<B>,
    logits: Tensor<B>,
    d: Gradients<B>,
}

impl<B: TrainBackend> Default for Workspace<B> {
    fn default() -> Self {
        Workspace {
            embedded: Tensor::default(),
            embedding_norm: NormOutput::default(),
            layers: Vec::new(),
            x: Tensor::default(),
            final_norm: NormOutput::default(),
            labelled: Tensor::default(),
            logits: Tensor::default(),
            d: Gradients {
                x: Tensor::default(),
                normed: Tensor::default(),
                residual: Tensor::default(),
                wide: Tensor::default(),
                qkv: Tensor::default(),
                attention: Tensor::default(),
                labelled: Tensor::default(),
            },
        }
    }
}

/// Bytes that training takes for each token of a pass: what [`Workspace`] keeps of every layer, and
/// what one layer needs at a time.
pub fn training_bytes_per_token(config: &BloomConfig) -> f64 {
    let (h, heads, layers) = (config.hidden_size as f64, config.heads as f64, config.layers as f64);
    let norm = h + 2.0;
    let saved = 2.0 * norm + (3.0 + 1.0 + 1.0 + 1.0 + 4.0 + 4.0) * h + heads;
    // embedding and final norm, labelled rows, gradients
    let shared = 2.0 * norm + 2.0 * h + 2.0 * h + (3.0 + 1.0 + 4.0 + 3.0) * h;
    // operands in the type that they are multiplied in
    let operands = 8.0 * h;
    4.0 * (layers * saved + shared + operands)
}

impl TrainModel<Vec<f32>> {
    /// BLOOM's initial weights: N(0, 0.02), with the matrices that feed the residual stream
    /// narrowed by sqrt(2 layers); norms one, biases zero.
    pub fn random(config: BloomConfig, seed: u64) -> TrainModel {
        let mut values = Vec::with_capacity(config.parameter_count());
        let residual_std = 0.02 / (2.0 * config.layers as f32).sqrt();
        for (index, p) in config.parameters().into_iter().enumerate() {
            let mut normal = crate::random::Normal::new(seed, index as u64);
            match () {
                _ if p.name.ends_with(".bias") => values.extend(std::iter::repeat_n(0.0, p.len())),
                _ if p.shape.len() == 1 => values.extend(std::iter::repeat_n(1.0, p.len())),
                _ => {
                    let residual = p.name.contains("dense.") || p.name.contains("4h_to_h");
                    let std = if residual { residual_std } else { 0.02 };
                    values.extend((0..p.len()).map(|_| normal.sample() * std));
                }
            }
        }
        TrainModel::new(config, values)
    }
}

impl<F> TrainModel<F> {
    /// A model over `values`, which must hold exactly the config's parameters.
    pub fn new(config: BloomConfig, values: F) -> TrainModel<F> {
        let Ok(layout) = config.parameter_tree(flat_ranges());
        let heads = config.attention_heads();
        TrainModel { config, values, layout, heads }
    }

    /// Summed cross-entropy over the labels of `batch`. With `gradients`, adds `scale` times the
    /// gradient of that sum to them (same layout as the values).
    pub fn loss<B: TrainBackend<Flat = F>>(
        &self,
        b: &B,
        precision: Precision,
        batch: &PackedBatch,
        space: &mut Workspace<B>,
        gradients: Option<(f32, &mut F)>,
    ) -> f64 {
        if batch.labels.is_empty() {
            return 0.0;
        }
        let p = Params { values: &self.values, precision };
        let pass = Pass { b, p, batch, model: self };
        pass.forward(space);
        let (rows, targets): (Vec<usize>, Vec<u32>) = batch.labels.iter().copied().unzip();
        let lm_head = self.layout.lm_head.as_ref().unwrap_or(&self.layout.embedding);
        let Workspace { labelled, logits, final_norm, d, .. } = space;
        b.gather_rows(labelled, &final_norm.y, &rows);
        let Some((scale, grads)) = gradients else {
            return b.lm_head_loss(labelled, &targets, (p, lm_head), logits, None);
        };
        let to = LossGradients { scale, dx: &mut d.labelled, grads: &mut *grads };
        let loss = b.lm_head_loss(labelled, &targets, (p, lm_head), logits, Some(to));
        // the gradient of the final norm's output is zero but at labelled positions
        b.scatter_rows(&mut d.normed, &d.labelled, &rows, batch.ids.len());
        pass.backward(space, grads);
        loss
    }
}

/// A forward or backward pass over a batch.
struct Pass<'a, B: TrainBackend> {
    b: &'a B,
    p: Params<'a, B::Flat>,
    batch: &'a PackedBatch,
    model: &'a TrainModel<B::Flat>,
}

impl<B: TrainBackend> Pass<'_, B> {
    /// From the ids to the final norm's output.
    fn forward(&self, space: &mut Workspace<B>) {
        let (b, p, c, l) = (self.b, self.p, &self.model.config, &self.model.layout);
        let eps = c.layer_norm_epsilon;
        let ids = &self.batch.ids;
        b.embedding_forward(&mut space.embedded, ids, c.hidden_size, (p, &l.embedding));
        let norm = (p, &l.embedding_norm);
        b.layer_norm_forward(&mut space.embedding_norm, &space.embedded, norm, eps);
        space.layers.resize_with(c.layers, LayerActivations::default);
        let mut input = &space.embedding_norm.y;
        for (a, l) in space.layers.iter_mut().zip(&l.layers) {
            b.copy(&mut a.x, input);
            self.layer_forward(l, a, &mut space.x);
            input = &space.x;
        }
        b.layer_norm_forward(&mut space.final_norm, &space.x, (p, &l.final_norm), eps);
    }

    /// From `a.x` to `out`.
    fn layer_forward(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        a: &mut LayerActivations<B>,
        out: &mut Tensor<B>,
    ) {
        let (b, p, c) = (self.b, self.p, &self.model.config);
        let (eps, post_norm) = (c.layer_norm_epsilon, c.residual_post_layer_norm);
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        b.layer_norm_forward(&mut a.norm1, &a.x, (p, &l.input_norm), eps);
        b.linear_forward(&mut a.qkv, &a.norm1.y, (p, &l.qkv), None);
        let cu_seqlens = &self.batch.cu_seqlens;
        b.attention_forward(&mut a.attention, &a.qkv, &self.model.heads, cu_seqlens);
        let residual = if post_norm { &a.norm1.y } else { &a.x };
        b.linear_forward(&mut a.x2, &a.attention.y, (p, &l.dense), Some(residual));
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        b.layer_norm_forward(&mut a.norm2, &a.x2, (p, &l.post_norm), eps);
        b.linear_forward(&mut a.up, &a.norm2.y, (p, &l.up), None);
        b.gelu_forward(&mut a.gelu, &a.up);
        let residual = if post_norm { &a.norm2.y } else { &a.x2 };
        b.linear_forward(out, &a.gelu, (p, &l.down), Some(residual));
    }

    /// From the gradient of the final norm's output in `space.d.normed`.
    fn backward(&self, space: &mut Workspace<B>, grads: &mut B::Flat) {
        let (b, p, l) = (self.b, self.p, &self.model.layout);
        let Workspace { embedded, embedding_norm, layers, x, final_norm, d, .. } = space;
        b.zero(&mut d.x, x);
        let forward = (&*x, &*final_norm);
        b.layer_norm_backward(&mut d.x, grads, &d.normed, forward, (p, &l.final_norm));
        for (a, l) in layers.iter().zip(&l.layers).rev() {
            self.layer_backward(l, a, d, grads);
        }
        b.copy(&mut d.normed, &d.x);
        b.zero(&mut d.x, embedded);
        let forward = (&*embedded, &*embedding_norm);
        b.layer_norm_backward(&mut d.x, grads, &d.normed, forward, (p, &l.embedding_norm));
        b.embedding_backward(grads, &d.x, &self.batch.ids, &l.embedding);
    }

    /// From the gradient of a layer's output in `d.x` to that of its input, in the same place.
    fn layer_backward(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        a: &LayerActivations<B>,
        d: &mut Gradients<B>,
        g: &mut B::Flat,
    ) {
        let (b, p, batch) = (self.b, self.p, self.batch);
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        b.linear_backward(&mut d.wide, g, &d.x, &a.gelu, (p, &l.down));
        b.gelu_backward(&mut d.wide, &a.up);
        b.linear_backward(&mut d.normed, g, &d.wide, &a.norm2.y, (p, &l.up));
        self.merge_residual(&d.x, &mut d.normed, &mut d.residual);
        let norm = (p, &l.post_norm);
        b.layer_norm_backward(&mut d.residual, g, &d.normed, (&a.x2, &a.norm2), norm);
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        b.linear_backward(&mut d.attention, g, &d.residual, &a.attention.y, (p, &l.dense));
        let (forward, heads) = ((&a.qkv, &a.attention), &self.model.heads);
        b.attention_backward(&mut d.qkv, &d.attention, forward, heads, &batch.cu_seqlens);
        b.linear_backward(&mut d.normed, g, &d.qkv, &a.norm1.y, (p, &l.qkv));
        self.merge_residual(&d.residual, &mut d.normed, &mut d.x);
        b.layer_norm_backward(&mut d.x, g, &d.normed, (&a.x, &a.norm1), (p, &l.input_norm));
    }

    /// Sends the gradient `from` along the residual branch: into that of the norm's output if the
    /// branch starts after the norm, else to that of the norm's input, `to`.
    fn merge_residual(&self, from: &Tensor<B>, normed: &mut Tensor<B>, to: &mut Tensor<B>) {
        if self.model.config.residual_post_layer_norm {
            self.b.add(normed, from);
            self.b.zero(to, from);
        } else {
            self.b.copy(to, from);
        }
    }
}
