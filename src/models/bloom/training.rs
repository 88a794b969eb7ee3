//! BLOOM with its gradients: the forward pass and its hand-written backward pass, over
//! packed sequences.

use super::{BloomConfig, BloomLayerParameters, BloomParameters};
use crate::models::params::flat_ranges;
use crate::error::Result;
use crate::ops::train::{
    AttentionOutput, LinearBackward, LossGradients, NormBackward, NormOutput, PackedBatch, Params,
    Precision, TrainBackend,
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

/// What the forward pass keeps of a layer for the backward pass, besides its input.
struct LayerActivations<B: TrainBackend> {
    norm1: NormOutput<B>,
    qkv: Tensor<B>,
    attention: AttentionOutput<B>,
    x2: Tensor<B>,
    norm2: NormOutput<B>,
    up: Tensor<B>,
    gelu: Tensor<B>,
    /// The layer's output.
    out: Tensor<B>,
}

impl<B: TrainBackend> Default for LayerActivations<B> {
    fn default() -> Self {
        LayerActivations {
            norm1: NormOutput::default(),
            qkv: Tensor::default(),
            attention: AttentionOutput::default(),
            x2: Tensor::default(),
            norm2: NormOutput::default(),
            up: Tensor::default(),
            gelu: Tensor::default(),
            out: Tensor::default(),
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

    /// The model with its parameters on a backend's device.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn place<B: TrainBackend>(self, b: &B) -> Result<TrainModel<B::Flat>> {
        let TrainModel { config, values, layout, heads } = self;
        Ok(TrainModel { config, values: b.parameters(values)?, layout, heads })
    }
}

impl<F> TrainModel<F> {
    /// A model over `values`, which must hold exactly the config's parameters.
    pub fn new(config: BloomConfig, values: F) -> TrainModel<F> {
        let Ok(layout) = config.parameter_tree(flat_ranges());
        let heads = config.attention_heads();
        TrainModel { config, values, layout, heads }
    }

    /// Adds the cross-entropy of all labels of `batch` to the loss of `sums`. With `gradients`, adds
    /// `scale` times the gradient of that sum to them (same layout as the values).
    pub fn loss<B: TrainBackend<Flat = F>>(
        &self,
        b: &B,
        (precision, batch): (Precision, &PackedBatch),
        space: &mut Workspace<B>,
        gradients: Option<(f32, &mut F)>,
        sums: &mut B::Sums,
    ) {
        if batch.labels.is_empty() {
            return;
        }
        let p = Params { values: &self.values, precision };
        let pass = Pass { b, p, batch, model: self };
        pass.forward(space);
        let (rows, targets): (Vec<usize>, Vec<u32>) = batch.labels.iter().copied().unzip();
        let lm_head = self.layout.lm_head.as_ref().unwrap_or(&self.layout.embedding);
        let Workspace { labelled, logits, final_norm, d, .. } = space;
        b.gather_rows(labelled, &final_norm.y, &rows);
        let rows_of = (&*labelled, &mut *logits);
        let Some((scale, grads)) = gradients else {
            return b.lm_head_loss(rows_of, &targets, (p, lm_head), None, sums);
        };
        let to = LossGradients { scale, dx: &mut d.labelled, grads: &mut *grads };
        b.lm_head_loss(rows_of, &targets, (p, lm_head), Some(to), sums);
        // the gradient of the final norm's output is zero but at labelled positions
        b.scatter_rows(&mut d.normed, &d.labelled, &rows, batch.ids.len());
        pass.backward(space, grads);
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
        let Workspace { embedded, embedding_norm, layers, final_norm, .. } = space;
        let table = (p, &l.embedding);
        let out = (&mut *embedding_norm, embedded);
        b.embedding_norm_forward(out, &self.batch.ids, table, &l.embedding_norm, eps);
        layers.resize_with(c.layers, LayerActivations::default);
        let mut x = &embedding_norm.y;
        for (a, l) in layers.iter_mut().zip(&l.layers) {
            self.layer_forward(l, x, a);
            x = &a.out;
        }
        b.layer_norm_forward(final_norm, x, (p, &l.final_norm), eps);
    }

    /// From a layer's input `x` to `a.out`.
    fn layer_forward(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        x: &Tensor<B>,
        a: &mut LayerActivations<B>,
    ) {
        let (b, p, c) = (self.b, self.p, &self.model.config);
        let (eps, post_norm) = (c.layer_norm_epsilon, c.residual_post_layer_norm);
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        b.layer_norm_forward(&mut a.norm1, x, (p, &l.input_norm), eps);
        b.linear_forward(&mut a.qkv, &a.norm1.y, (p, &l.qkv), None);
        let cu_seqlens = &self.batch.cu_seqlens;
        b.attention_forward(&mut a.attention, &a.qkv, &self.model.heads, cu_seqlens);
        let residual = if post_norm { &a.norm1.y } else { x };
        b.linear_forward(&mut a.x2, &a.attention.y, (p, &l.dense), Some(residual));
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        b.layer_norm_forward(&mut a.norm2, &a.x2, (p, &l.post_norm), eps);
        b.linear_forward(&mut a.up, &a.norm2.y, (p, &l.up), None);
        b.gelu_forward(&mut a.gelu, &a.up);
        let residual = if post_norm { &a.norm2.y } else { &a.x2 };
        b.linear_forward(&mut a.out, &a.gelu, (p, &l.down), Some(residual));
    }

    /// From the gradient of the final norm's output in `space.d.normed`.
    fn backward(&self, space: &mut Workspace<B>, grads: &mut B::Flat) {
        let (b, p, l) = (self.b, self.p, &self.model.layout);
        let Workspace { embedded, embedding_norm, layers, final_norm, d, .. } = space;
        let input = |i: usize| if i == 0 { &embedding_norm.y } else { &layers[i - 1].out };
        let last = input(layers.len());
        let final_norm =
            NormBackward { dy: &d.normed, x: last, output: final_norm, residual: None };
        b.layer_norm_backward(&mut d.x, grads, final_norm, (p, &l.final_norm));
        for (i, (a, l)) in layers.iter().zip(&l.layers).enumerate().rev() {
            self.layer_backward(l, (input(i), a), d, grads);
        }
        let norm = NormBackward { dy: &d.x, x: embedded, output: embedding_norm, residual: None };
        b.layer_norm_backward(&mut d.residual, grads, norm, (p, &l.embedding_norm));
        b.embedding_backward(grads, &d.residual, &self.batch.ids, &l.embedding);
    }

    /// From the gradient of a layer's output in `d.x` to that of its input, in the same place.
    fn layer_backward(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        (x, a): (&Tensor<B>, &LayerActivations<B>),
        d: &mut Gradients<B>,
        g: &mut B::Flat,
    ) {
        let (b, p, batch) = (self.b, self.p, self.batch);
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        let down = LinearBackward { dy: &d.x, x: &a.gelu, before_gelu: Some(&a.up) };
        b.linear_backward(&mut d.wide, g, down, (p, &l.down));
        let up = LinearBackward { dy: &d.wide, x: &a.norm2.y, before_gelu: None };
        b.linear_backward(&mut d.normed, g, up, (p, &l.up));
        let residual = self.residual(&d.x, &mut d.normed);
        let norm = NormBackward { dy: &d.normed, x: &a.x2, output: &a.norm2, residual };
        b.layer_norm_backward(&mut d.residual, g, norm, (p, &l.post_norm));
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        let dense = LinearBackward { dy: &d.residual, x: &a.attention.y, before_gelu: None };
        b.linear_backward(&mut d.attention, g, dense, (p, &l.dense));
        let (forward, heads) = ((&a.qkv, &a.attention), &self.model.heads);
        b.attention_backward(&mut d.qkv, &d.attention, forward, heads, &batch.cu_seqlens);
        let qkv = LinearBackward { dy: &d.qkv, x: &a.norm1.y, before_gelu: None };
        b.linear_backward(&mut d.normed, g, qkv, (p, &l.qkv));
        let residual = self.residual(&d.residual, &mut d.normed);
        let norm = NormBackward { dy: &d.normed, x, output: &a.norm1, residual };
        b.layer_norm_backward(&mut d.x, g, norm, (p, &l.input_norm));
    }

    /// Where the gradient `from` of the residual branch goes on: into that of the norm's output, if
    /// the branch starts after the norm, or else beside that of the norm's input.
    fn residual<'t>(&self, from: &'t Tensor<B>, normed: &mut Tensor<B>) -> Option<&'t Tensor<B>> {
        if self.model.config.residual_post_layer_norm {
            self.b.add(normed, from);
            return None;
        }
        Some(from)
    }
}
