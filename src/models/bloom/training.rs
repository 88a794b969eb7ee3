//! BLOOM with its gradients: the forward pass and its hand-written backward pass, over
//! packed sequences.

pub use super::workspace::{Recompute, Workspace, training_bytes_per_token};

use super::workspace::{Gradients, HeadActivations, LayerView};
use super::{Architecture, BloomConfig, BloomLayerParameters, BloomParameters, ScalarHead};
use crate::checkpoint::Parameter;
use crate::error::Result;
use crate::models::params::flat_ranges;
use crate::ops::scalar_loss::ScalarLoss;
use crate::ops::token_loss::{LossGradients, LossOutput, TokenLoss, TokenStats};
use crate::ops::train::{
    LinearBackward, NormBackward, PackedBatch, Params, Precision, ProjectionBackward, TrainBackend,
};
use crate::ops::{Heads, Projection, Tensor};
use std::ops::Range;

/// A model's parameters in one flat buffer, in the order of [`TrainModel::parameters`].
pub struct TrainModel<F = Vec<f32>> {
    /// Sizes and switches.
    pub config: BloomConfig,
    /// The parameters.
    pub values: F,
    layout: BloomParameters<Range<usize>>,
    /// What gives the labelled positions one number each, if anything does.
    head: Option<ScalarHead<Range<usize>>>,
    has_value_head: bool,
    /// First layers that are not trained; with them goes the embedding.
    frozen: usize,
    heads: Heads,
}

/// Which loss the labelled positions have: either, or both beside each other.
pub struct Objective<'a, B: TrainBackend> {
    /// Of what the LM head says of the labels.
    pub tokens: Option<&'a TokenLoss<'a, B>>,
    /// Of the numbers that the scalar head gives them.
    pub scalars: Option<&'a ScalarLoss<'a, B>>,
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
        let TrainModel { config, values, layout, head, has_value_head, frozen, heads } = self;
        let values = b.parameters(values)?;
        Ok(TrainModel { config, values, layout, head, has_value_head, frozen, heads })
    }

    /// The model as a reward model: without an LM head, and with a score if it has none yet.
    pub fn into_reward_model(self, seed: u64) -> TrainModel {
        let TrainModel { mut config, mut values, layout, .. } = self;
        if config.architecture == Architecture::SequenceClassification {
            return TrainModel::new(config, values);
        }
        if let Some(lm_head) = layout.lm_head {
            values.truncate(lm_head.start);
        }
        config.architecture = Architecture::SequenceClassification;
        config.tied = true;
        // as openai/lm-human-preferences begins its heads
        let std = 1.0 / (config.hidden_size as f32 + 1.0).sqrt();
        let mut normal = crate::random::Normal::new(seed, u64::MAX);
        values.extend((0..config.hidden_size).map(|_| normal.sample() * std));
        TrainModel::new(config, values)
    }

    /// The model with a value head behind its other parameters: its output begins as zero, so that
    /// nothing is expected of any state.
    pub fn with_value_head(mut self, seed: u64) -> TrainModel {
        for (index, p) in self.config.value_head_parameters().into_iter().enumerate() {
            let mut normal = crate::random::Normal::new(seed, u64::MAX - index as u64);
            let hidden = p.name == "v_head.0.weight";
            let std = if hidden { 1.0 / (self.config.hidden_size as f32).sqrt() } else { 0.0 };
            self.values.extend((0..p.len()).map(|_| normal.sample() * std));
        }
        TrainModel::new_with_value_head(self.config, self.values)
    }
}

impl<F> TrainModel<F> {
    /// A model over `values`, which must hold exactly the config's parameters.
    pub fn new(config: BloomConfig, values: F) -> TrainModel<F> {
        let Ok(layout) = config.parameter_tree(flat_ranges());
        let heads = config.attention_heads();
        let head = layout.score.clone().map(|weight| {
            let output = Projection { weight, bias: None };
            ScalarHead { hidden: None, output }
        });
        TrainModel { config, values, layout, head, has_value_head: false, frozen: 0, heads }
    }

    /// A model with a value head, whose parameters are the last of `values`.
    pub fn new_with_value_head(config: BloomConfig, values: F) -> TrainModel<F> {
        let mut ranges = flat_ranges();
        let (Ok(_), Ok(head)) = (config.parameter_tree(&mut ranges), config.value_head(ranges));
        TrainModel { head: Some(head), has_value_head: true, ..TrainModel::new(config, values) }
    }

    /// Leaves the embedding and the first `layers` layers as they are: they get no gradients. With
    /// none, everything is trained.
    pub fn frozen(self, layers: usize) -> TrainModel<F> {
        TrainModel { frozen: layers.min(self.config.layers), ..self }
    }

    /// How many layers are not trained.
    pub fn frozen_layers(&self) -> usize {
        self.frozen
    }

    /// All parameters, the value head's last.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut all = self.config.parameters();
        if self.has_value_head {
            all.extend(self.config.value_head_parameters());
        }
        all
    }

    /// Elements of all parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(Parameter::len).sum()
    }

    /// The parameters that are trained, which are the last ones.
    pub fn trained(&self) -> Range<usize> {
        let first = match self.layout.layers.get(self.frozen) {
            _ if self.frozen == 0 => 0,
            Some(layer) => layer.input_norm.weight.start,
            None => self.layout.final_norm.weight.start,
        };
        first..self.parameter_count()
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
        batch: (Precision, &PackedBatch),
        space: &mut Workspace<B>,
        loss: &TokenLoss<B>,
        to: LossOutput<B, Backward<F>>,
    ) {
        self.objective(b, batch, space, &Objective { tokens: Some(loss), scalars: None }, to);
    }

    /// The losses of all labels of `batch`, one after the other from one forward pass. What the
    /// scalar head gives the labels stays in `space` ([`Workspace::scalars`]), also where nothing
    /// is said of its loss.
    pub fn objective<B: TrainBackend<Flat = F>>(
        &self,
        b: &B,
        (precision, batch): (Precision, &PackedBatch),
        space: &mut Workspace<B>,
        objective: &Objective<B>,
        to: LossOutput<B, Backward<F>>,
    ) {
        let LossOutput { sums, mut stats, gradients } = to;
        if batch.labels.is_empty() {
            space.head.scalars = Tensor::default();
            stats.into_iter().for_each(|s| *s = TokenStats::default());
            return;
        }
        let p = Params { values: &self.values, precision };
        let pass = Pass { b, p, batch, model: self };
        pass.forward(space);
        let (rows, targets): (Vec<usize>, Vec<u32>) = batch.labels.iter().copied().unzip();
        b.gather_rows(&mut space.labelled, &space.final_norm.y, &rows);
        let mut grads = None;
        let finished = gradients.map(|g| (grads.insert(g.grads), g.finished).1);
        if let Some(loss) = objective.tokens {
            pass.lm_head_loss(
                space,
                &targets,
                loss,
                (&mut *sums, stats.take(), grads.as_deref_mut()),
            );
        }
        if let Some(head) = &self.head {
            pass.head_forward(head, space);
            if let Some(loss) = objective.scalars {
                let alone = objective.tokens.is_none();
                pass.head_loss(head, space, loss, (sums, grads.as_deref_mut(), alone));
            }
        }
        let Some(grads) = grads else { return };
        // the gradient of the final norm's output is zero but at labelled positions
        b.scatter_rows(&mut space.d.normed, &space.d.labelled, &rows, batch.ids.len());
        pass.backward(space, (grads, finished.flatten().unwrap_or(&mut |_, _| {})));
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
    /// From the ids, or from the output of the frozen layers where that is there, to the final
    /// norm's output.
    fn forward(&self, space: &mut Workspace<B>) {
        let (b, p, c, l) = (self.b, self.p, &self.model.config, &self.model.layout);
        let (eps, post_norm) = (c.layer_norm_epsilon, c.residual_post_layer_norm);
        let Workspace { embedded, embedding_norm, layers, final_norm, .. } = space;
        let first = if space.trunk_is_there { self.model.frozen } else { 0 };
        if first == 0 {
            let table = (p, &l.embedding);
            let out = (&mut *embedding_norm, embedded);
            b.embedding_norm_forward(out, &self.batch.ids, table, &l.embedding_norm, eps);
        }
        space.trunk_is_there = false;
        layers.resize(c.layers, c.layers - self.model.frozen, space.recompute);
        for (i, l) in l.layers.iter().enumerate().skip(first) {
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

    /// A loss of the labelled rows through the LM head, which has gradients of its own unless it is
    /// frozen with the embedding.
    fn lm_head_loss(
        &self,
        space: &mut Workspace<B>,
        targets: &[u32],
        loss: &TokenLoss<B>,
        (sums, stats, grads): (&mut B::Sums, Option<&mut TokenStats<B>>, Option<&mut B::Flat>),
    ) {
        let layout = &self.model.layout;
        let trained = self.model.frozen == 0 || layout.lm_head.is_some();
        let lm_head = layout.lm_head.as_ref().unwrap_or(&layout.embedding);
        let Workspace { labelled, logits, d, .. } = space;
        let dx = &mut d.labelled;
        let gradients = grads.map(|grads| LossGradients { dx, grads: trained.then_some(grads) });
        let to = LossOutput { sums, stats, gradients };
        self.b.lm_head_loss((labelled, logits), targets, (self.p, lm_head), loss, to);
    }

    /// What the head gives the labelled rows.
    fn head_forward(&self, head: &ScalarHead<Range<usize>>, space: &mut Workspace<B>) {
        let (b, p) = (self.b, self.p);
        let HeadActivations { hidden, scalars, .. } = &mut space.head;
        let mut x = &space.labelled;
        if let Some(linear) = &head.hidden {
            b.linear_forward(hidden, x, (p, linear), None);
            b.relu(hidden);
            x = hidden;
        }
        b.projection_forward(scalars, x, (p, &head.output));
    }

    /// The loss of what the head gave; its share of the gradient of the labelled rows is all of it
    /// if it is `alone`, and else added to what is there.
    fn head_loss(
        &self,
        head: &ScalarHead<Range<usize>>,
        space: &mut Workspace<B>,
        loss: &ScalarLoss<B>,
        (sums, grads, alone): (&mut B::Sums, Option<&mut B::Flat>, bool),
    ) {
        let (b, p) = (self.b, self.p);
        let Workspace { head: a, labelled, d, .. } = space;
        let Some(grads) = grads else { return b.scalar_loss(None, &a.scalars, loss, sums) };
        b.scalar_loss(Some(&mut d.head.scalars), &a.scalars, loss, sums);
        let dx = if alone { &mut d.labelled } else { &mut d.head.labelled };
        let dy = &d.head.scalars;
        match &head.hidden {
            Some(linear) => {
                let backward = ProjectionBackward { dy, x: &a.hidden, after_relu: true };
                b.projection_backward(&mut d.head.hidden, grads, backward, (p, &head.output));
                let backward =
                    LinearBackward { dy: &d.head.hidden, x: labelled, before_gelu: None };
                b.linear_backward(dx, grads, backward, (p, linear));
            }
            None => {
                let backward = ProjectionBackward { dy, x: labelled, after_relu: false };
                b.projection_backward(dx, grads, backward, (p, &head.output));
            }
        }
        if !alone {
            b.add(&mut d.labelled, &d.head.labelled);
        }
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
        for (i, l) in l.layers.iter().enumerate().skip(self.model.frozen).rev() {
            let (mut a, _) = layers.layer(i, &embedding_norm.y);
            // what is there of a single layer is that of the last one
            if space.recompute != Recompute::None && i + 1 < self.model.config.layers {
                self.activations(l, &mut a, space.recompute == Recompute::Layer);
            }
            self.layer_backward(l, &a, d, grads);
            finished(grads, l.input_norm.weight.start);
        }
        if self.model.frozen > 0 {
            return finished(grads, 0);
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
