//! BLOOM with its gradients: the forward pass and its hand-written backward pass, over
//! packed sequences.

use super::{BloomConfig, BloomLayerParameters, BloomParameters};
use crate::error::Result;
use crate::models::params::flat_ranges;
use crate::ops::token_loss::{LossGradients, LossOutput, TokenLoss, TokenStats};
use crate::ops::train::{
    AttentionOutput, LinearBackward, NormBackward, NormOutput, PackedBatch, Params, Precision,
    TrainBackend,
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

/// What the backward pass computes again instead of reading what the forward pass has kept.
/// Gradients have the same bits whatever is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Attention, layer norms and GELU: a third less memory for a twentieth of the work.
    Attention,
    /// Everything between a layer's input and its output, for a third of the work.
    Layer,
}

/// What the GEMMs of a layer's forward pass gave, but for the last one.
struct LinearOutputs<B: TrainBackend> {
    qkv: Tensor<B>,
    x2: Tensor<B>,
    up: Tensor<B>,
}

impl<B: TrainBackend> Default for LinearOutputs<B> {
    fn default() -> Self {
        let (qkv, x2, up) = (Tensor::default(), Tensor::default(), Tensor::default());
        LinearOutputs { qkv, x2, up }
    }
}

/// What came of these by operations that take little work.
struct CheapOutputs<B: TrainBackend> {
    norm1: NormOutput<B>,
    attention: AttentionOutput<B>,
    norm2: NormOutput<B>,
    gelu: Tensor<B>,
}

impl<B: TrainBackend> Default for CheapOutputs<B> {
    fn default() -> Self {
        CheapOutputs {
            norm1: NormOutput::default(),
            attention: AttentionOutput::default(),
            norm2: NormOutput::default(),
            gelu: Tensor::default(),
        }
    }
}

/// What the forward pass keeps of the layers for the backward pass.
struct LayerActivations<B: TrainBackend> {
    /// Of each layer its output.
    out: Vec<Tensor<B>>,
    /// Of each layer, or of one layer at a time.
    linear: Vec<LinearOutputs<B>>,
    cheap: Vec<CheapOutputs<B>>,
}

/// What is kept of one layer, and its input.
struct LayerView<'a, B: TrainBackend> {
    x: &'a Tensor<B>,
    linear: &'a mut LinearOutputs<B>,
    cheap: &'a mut CheapOutputs<B>,
}

impl<B: TrainBackend> LayerActivations<B> {
    fn new() -> Self {
        LayerActivations { out: Vec::new(), linear: Vec::new(), cheap: Vec::new() }
    }

    fn resize(&mut self, layers: usize, recompute: Recompute) {
        let one = layers.min(1);
        let (linear, cheap) = match recompute {
            Recompute::None => (layers, layers),
            Recompute::Attention => (layers, one),
            Recompute::Layer => (one, one),
        };
        self.out.resize_with(layers, Tensor::default);
        self.linear.resize_with(linear, LinearOutputs::default);
        self.cheap.resize_with(cheap, CheapOutputs::default);
    }

    /// What is kept of layer `i`, and its output; `first` is the input of the first layer.
    fn layer<'a>(
        &'a mut self,
        i: usize,
        first: &'a Tensor<B>,
    ) -> (LayerView<'a, B>, &'a mut Tensor<B>) {
        let (before, out) = self.out.split_at_mut(i);
        let (linear, cheap) = (i % self.linear.len(), i % self.cheap.len());
        let view = LayerView {
            x: before.last().unwrap_or(first),
            linear: &mut self.linear[linear],
            cheap: &mut self.cheap[cheap],
        };
        (view, &mut out[0])
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
    layers: LayerActivations<B>,
    recompute: Recompute,
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
            layers: LayerActivations::new(),
            recompute: Recompute::None,
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

impl<B: TrainBackend> Workspace<B> {
    /// Room for passes that compute some of their activations again.
    pub fn with_recompute(recompute: Recompute) -> Self {
        Workspace { recompute, ..Workspace::default() }
    }
}

/// Bytes that training takes for each token of a pass, on a backend whose activations have
/// `activation` bytes an element: what [`Workspace`] keeps of every layer, and what one layer needs
/// at a time.
pub fn training_bytes_per_token(
    config: &BloomConfig,
    recompute: Recompute,
    activation: usize,
) -> f64 {
    let (h, heads, layers) = (config.hidden_size as f64, config.heads as f64, config.layers as f64);
    let (narrow, f32) = (activation as f64, 4.0);
    let out = f32 * h;
    let linear = narrow * (3.0 + 4.0) * h + f32 * h;
    let cheap = narrow * (1.0 + 1.0 + 1.0 + 4.0) * h + f32 * (4.0 + heads);
    let kept = match recompute {
        Recompute::None => layers * (out + linear + cheap),
        Recompute::Attention => layers * (out + linear) + cheap,
        Recompute::Layer => layers * out + linear + cheap,
    };
    // embedding, final norm, labelled rows; gradients; operands in the type that they are
    // multiplied in
    let shared = f32 * (2.0 * h + 4.0) + narrow * 2.0 * h;
    let gradients = f32 * 2.0 * h + narrow * (1.0 + 4.0 + 3.0 + 1.0 + 1.0) * h;
    kept + shared + gradients + f32 * 8.0 * h
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

    /// Adds the cross-entropy of all labels of `batch` to the loss of `sums`. With `gradients`,
    /// adds the scaled gradient of that sum to them (same layout as the values).
    pub fn loss<B: TrainBackend<Flat = F>>(
        &self,
        b: &B,
        (precision, batch): (Precision, &PackedBatch),
        space: &mut Workspace<B>,
        gradients: Option<(f32, Backward<F>)>,
        sums: &mut B::Sums,
    ) {
        let scale = gradients.as_ref().map_or(0.0, |g| g.0);
        let to = LossOutput { sums, stats: None, gradients: gradients.map(|g| g.1) };
        self.token_loss(b, (precision, batch), space, &TokenLoss::CrossEntropy { scale }, to);
    }

    /// A loss of all labels of `batch`, whose tensors have a number for each of these. Gradients
    /// are added to those of the parameters (same layout as the values). Without gradients this is
    /// the pass that old and reference log-probabilities come from.
    pub fn token_loss<B: TrainBackend<Flat = F>>(
        &self,
        b: &B,
        (precision, batch): (Precision, &PackedBatch),
        space: &mut Workspace<B>,
        loss: &TokenLoss<B>,
        to: LossOutput<B, Backward<F>>,
    ) {
        let LossOutput { sums, stats, gradients } = to;
        if batch.labels.is_empty() {
            stats.into_iter().for_each(|s| *s = TokenStats::default());
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
        let Some(Backward { grads, finished }) = gradients else {
            let to = LossOutput { sums, stats, gradients: None };
            return b.lm_head_loss(rows_of, &targets, (p, lm_head), loss, to);
        };
        let at_head = LossGradients { dx: &mut d.labelled, grads: &mut *grads };
        let to = LossOutput { sums, stats, gradients: Some(at_head) };
        b.lm_head_loss(rows_of, &targets, (p, lm_head), loss, to);
        // the gradient of the final norm's output is zero but at labelled positions
        b.scatter_rows(&mut d.normed, &d.labelled, &rows, batch.ids.len());
        pass.backward(space, (grads, finished.unwrap_or(&mut |_, _| {})));
    }
}

/// Told the first of the parameters whose gradients, to the last parameter's, are final.
type Finished<'a, F> = dyn FnMut(&mut F, usize) + 'a;

/// Where the gradients of a pass go.
pub struct Backward<'a, F> {
    grads: &'a mut F,
    finished: Option<&'a mut Finished<'a, F>>,
}

impl<'a, F> Backward<'a, F> {
    /// Gradients are added to `grads`.
    pub fn to(grads: &'a mut F) -> Self {
        Backward { grads, finished: None }
    }

    /// Has `finished` be called with the gradients, and the first of those that this pass will not
    /// touch any more: they are finished from the last parameters to the first.
    pub fn on_finished(self, finished: &'a mut Finished<'a, F>) -> Self {
        Backward { finished: Some(finished), ..self }
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
        let (eps, post_norm) = (c.layer_norm_epsilon, c.residual_post_layer_norm);
        let Workspace { embedded, embedding_norm, layers, final_norm, .. } = space;
        let table = (p, &l.embedding);
        let out = (&mut *embedding_norm, embedded);
        b.embedding_norm_forward(out, &self.batch.ids, table, &l.embedding_norm, eps);
        layers.resize(c.layers, space.recompute);
        for (i, l) in l.layers.iter().enumerate() {
            let (mut a, out) = layers.layer(i, &embedding_norm.y);
            self.activations(l, &mut a, true);
            let residual = if post_norm { &a.cheap.norm2.y } else { &a.linear.x2 };
            b.linear_forward(out, &a.cheap.gelu, (p, &l.down), Some(residual));
        }
        let x = layers.out.last().unwrap_or(&embedding_norm.y);
        b.layer_norm_forward(final_norm, x, (p, &l.final_norm), eps);
    }

    /// From a layer's input to the input of its last GEMM; without the GEMMs before it if what they
    /// gave has been kept.
    fn activations(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        a: &mut LayerView<B>,
        gemms: bool,
    ) {
        let (b, p, c) = (self.b, self.p, &self.model.config);
        let (eps, post_norm) = (c.layer_norm_epsilon, c.residual_post_layer_norm);
        let LayerView { x, linear, cheap } = a;
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        b.layer_norm_forward(&mut cheap.norm1, x, (p, &l.input_norm), eps);
        if gemms {
            b.linear_forward(&mut linear.qkv, &cheap.norm1.y, (p, &l.qkv), None);
        }
        let cu_seqlens = &self.batch.cu_seqlens;
        b.attention_forward(&mut cheap.attention, &linear.qkv, &self.model.heads, cu_seqlens);
        if gemms {
            let residual = if post_norm { &cheap.norm1.y } else { *x };
            let attended = &cheap.attention.y;
            b.linear_forward(&mut linear.x2, attended, (p, &l.dense), Some(residual));
        }
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        b.layer_norm_forward(&mut cheap.norm2, &linear.x2, (p, &l.post_norm), eps);
        if gemms {
            b.linear_forward(&mut linear.up, &cheap.norm2.y, (p, &l.up), None);
        }
        b.gelu_forward(&mut cheap.gelu, &linear.up);
    }

    /// From the gradient of the final norm's output in `space.d.normed`.
    fn backward(
        &self,
        space: &mut Workspace<B>,
        (grads, finished): (&mut B::Flat, &mut Finished<B::Flat>),
    ) {
        let (b, p, l) = (self.b, self.p, &self.model.layout);
        let Workspace { embedded, embedding_norm, layers, final_norm, d, .. } = space;
        let last = layers.out.last().unwrap_or(&embedding_norm.y);
        let final_norm =
            NormBackward { dy: &d.normed, x: last, output: final_norm, residual: None };
        b.layer_norm_backward(&mut d.x, grads, final_norm, (p, &l.final_norm));
        finished(grads, l.final_norm.weight.start);
        for (i, l) in l.layers.iter().enumerate().rev() {
            let (mut a, _) = layers.layer(i, &embedding_norm.y);
            // what is there of a single layer is that of the last one
            if space.recompute != Recompute::None && i + 1 < self.model.config.layers {
                self.activations(l, &mut a, space.recompute == Recompute::Layer);
            }
            self.layer_backward(l, &a, d, grads);
            finished(grads, l.input_norm.weight.start);
        }
        let norm = NormBackward { dy: &d.x, x: embedded, output: embedding_norm, residual: None };
        b.layer_norm_backward(&mut d.residual, grads, norm, (p, &l.embedding_norm));
        b.embedding_backward(grads, &d.residual, &self.batch.ids, &l.embedding);
        finished(grads, 0);
    }

    /// From the gradient of a layer's output in `d.x` to that of its input, in the same place.
    fn layer_backward(
        &self,
        l: &BloomLayerParameters<Range<usize>>,
        LayerView { x, linear: a, cheap: c }: &LayerView<B>,
        d: &mut Gradients<B>,
        g: &mut B::Flat,
    ) {
        let (b, p, batch) = (self.b, self.p, self.batch);
        // out = down(gelu(up(norm2))) + (norm2 or x2)
        let down = LinearBackward { dy: &d.x, x: &c.gelu, before_gelu: Some(&a.up) };
        b.linear_backward(&mut d.wide, g, down, (p, &l.down));
        let up = LinearBackward { dy: &d.wide, x: &c.norm2.y, before_gelu: None };
        b.linear_backward(&mut d.normed, g, up, (p, &l.up));
        let residual = self.residual(&d.x, &mut d.normed);
        let norm = NormBackward { dy: &d.normed, x: &a.x2, output: &c.norm2, residual };
        b.layer_norm_backward(&mut d.residual, g, norm, (p, &l.post_norm));
        // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
        let dense = LinearBackward { dy: &d.residual, x: &c.attention.y, before_gelu: None };
        b.linear_backward(&mut d.attention, g, dense, (p, &l.dense));
        let (forward, heads) = ((&a.qkv, &c.attention), &self.model.heads);
        b.attention_backward(&mut d.qkv, &d.attention, forward, heads, &batch.cu_seqlens);
        let qkv = LinearBackward { dy: &d.qkv, x: &c.norm1.y, before_gelu: None };
        b.linear_backward(&mut d.normed, g, qkv, (p, &l.qkv));
        let residual = self.residual(&d.residual, &mut d.normed);
        let norm = NormBackward { dy: &d.normed, x, output: &c.norm1, residual };
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
