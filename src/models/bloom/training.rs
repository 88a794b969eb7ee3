//! BLOOM with its gradients: forward and hand-written backward over packed sequences, in f32.

use super::{BloomConfig, alibi_slopes};
use crate::ops::cpu::Cpu;
use crate::ops::cpu::matmul::Precision;
use crate::ops::cpu::training::{self as ops, Attention};
use std::ops::Range;

/// All parameters in one buffer, in the order of [`BloomConfig::parameters`].
pub struct TrainModel {
    pub config: BloomConfig,
    pub values: Vec<f32>,
    layout: Layout,
    slopes: Vec<f32>,
}

/// Where each parameter lies in the buffer.
#[derive(Clone)]
struct Layout {
    embedding: Range<usize>,
    embedding_norm: Norm,
    layers: Vec<LayerLayout>,
    final_norm: Norm,
    head: Range<usize>,
}

#[derive(Clone)]
struct Norm {
    weight: Range<usize>,
    bias: Range<usize>,
}

type Linear = Norm;

#[derive(Clone)]
struct LayerLayout {
    input_norm: Norm,
    qkv: Linear,
    dense: Linear,
    post_norm: Norm,
    up: Linear,
    down: Linear,
}

impl Layout {
    fn new(config: &BloomConfig) -> Layout {
        let mut start = 0;
        let mut ranges = config.parameters().into_iter().map(|p| {
            let range = start..start + p.len();
            start = range.end;
            range
        });
        let mut next = || ranges.next().expect("the list of parameters is complete");
        let pair = |next: &mut dyn FnMut() -> Range<usize>| Norm { weight: next(), bias: next() };
        let embedding = next();
        let embedding_norm = pair(&mut next);
        let layers = (0..config.layers)
            .map(|_| LayerLayout {
                input_norm: pair(&mut next),
                qkv: pair(&mut next),
                dense: pair(&mut next),
                post_norm: pair(&mut next),
                up: pair(&mut next),
                down: pair(&mut next),
            })
            .collect();
        let final_norm = pair(&mut next);
        let head = if config.tied { embedding.clone() } else { next() };
        Layout { embedding, embedding_norm, layers, final_norm, head }
    }
}

/// Packed sequences and what to predict.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// All tokens of all sequences.
    pub ids: Vec<u32>,
    /// Start of each sequence, and the total at the end.
    pub starts: Vec<usize>,
    /// `(position in ids, token that follows)` for every position with a label, in order.
    pub labels: Vec<(usize, u32)>,
}

impl Batch {
    pub fn new() -> Batch {
        Batch { starts: vec![0], ..Batch::default() }
    }

    /// Adds a sequence of which the tokens from `loss_from` on are to be predicted.
    pub fn push(&mut self, ids: &[u32], loss_from: usize) {
        let start = self.ids.len();
        for (t, &id) in ids.iter().enumerate().skip(loss_from.max(1)) {
            self.labels.push((start + t - 1, id));
        }
        self.ids.extend_from_slice(ids);
        self.starts.push(self.ids.len());
    }
}

/// What the forward pass keeps of a layer for the backward pass; all `[tokens, width]`.
#[derive(Default)]
struct Saved {
    x: Vec<f32>,
    norm1: Normed,
    qkv: Vec<f32>,
    lse: Vec<f32>,
    attention: Vec<f32>,
    x2: Vec<f32>,
    norm2: Normed,
    up: Vec<f32>,
    gelu: Vec<f32>,
}

#[derive(Default)]
struct Normed {
    y: Vec<f32>,
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

/// Activations and scratch, kept from step to step.
#[derive(Default)]
pub struct Workspace {
    embedded: Vec<f32>,
    embedding_norm: Normed,
    layers: Vec<Saved>,
    x: Vec<f32>,
    final_norm: Normed,
    labelled: Vec<f32>,
    dlabelled: Vec<f32>,
    logits: Vec<f32>,
    dx: Vec<f32>,
    dnorm: Vec<f32>,
    dresidual: Vec<f32>,
    dwide: Vec<f32>,
    dqkv: Vec<f32>,
    dattention: Vec<f32>,
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

/// A zeroed or reused buffer of `len` elements; what it holds is written before it is read.
fn sized(v: &mut Vec<f32>, len: usize) -> &mut [f32] {
    v.resize(len, 0.0);
    v
}

impl Normed {
    fn forward(&mut self, cpu: &Cpu, x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let tokens = x.len() / weight.len();
        sized(&mut self.y, x.len());
        sized(&mut self.mean, tokens);
        sized(&mut self.rstd, tokens);
        ops::layer_norm(cpu, x, weight, bias, eps, &mut self.y, &mut self.mean, &mut self.rstd);
    }
}

/// Two mutable ranges of a buffer, the first before the second.
fn pair_mut<'a>(
    v: &'a mut [f32],
    a: &Range<usize>,
    b: &Range<usize>,
) -> (&'a mut [f32], &'a mut [f32]) {
    let (low, high) = v.split_at_mut(b.start);
    (&mut low[a.clone()], &mut high[..b.len()])
}

impl TrainModel {
    /// A model over `values`, which must hold exactly the config's parameters.
    pub fn new(config: BloomConfig, values: Vec<f32>) -> TrainModel {
        assert_eq!(values.len(), config.parameter_count());
        let layout = Layout::new(&config);
        let slopes = alibi_slopes(config.heads);
        TrainModel { config, values, layout, slopes }
    }

    /// BLOOM's initial weights: N(0, 0.02), with the products that feed the residual stream
    /// narrowed by sqrt(2 layers); norms one, biases zero.
    pub fn random(config: BloomConfig, seed: u64) -> TrainModel {
        let mut values = Vec::with_capacity(config.parameter_count());
        let narrow = 0.02 / (2.0 * config.layers as f32).sqrt();
        for (index, p) in config.parameters().into_iter().enumerate() {
            let mut normal = crate::random::Normal::new(seed, index as u64);
            match () {
                _ if p.name.ends_with(".bias") => values.extend(std::iter::repeat_n(0.0, p.len())),
                _ if p.shape.len() == 1 => values.extend(std::iter::repeat_n(1.0, p.len())),
                _ => {
                    let residual = p.name.contains("dense.") || p.name.contains("4h_to_h");
                    let deviation = if residual { narrow } else { 0.02 };
                    values.extend((0..p.len()).map(|_| normal.sample() * deviation));
                }
            }
        }
        TrainModel::new(config, values)
    }

    /// Summed cross-entropy over the labels of `batch`. With `gradients`, adds `scale` times the
    /// gradient of that sum to them (same layout as `values`).
    pub fn loss(
        &self,
        cpu: &Cpu,
        precision: Precision,
        batch: &Batch,
        space: &mut Workspace,
        gradients: Option<(f32, &mut [f32])>,
    ) -> f64 {
        self.forward(cpu, precision, batch, space);
        let h = self.config.hidden_size;
        let w = &self.values;
        let labels = &batch.labels;
        let hidden = &space.final_norm.y;
        let labelled = sized(&mut space.labelled, labels.len() * h);
        for (row, (t, _)) in labelled.chunks_exact_mut(h).zip(labels) {
            row.copy_from_slice(&hidden[t * h..(t + 1) * h]);
        }
        let targets: Vec<u32> = labels.iter().map(|l| l.1).collect();
        let head = &w[self.layout.head.clone()];
        let Some((scale, grads)) = gradients else {
            return ops::cross_entropy(
                cpu,
                precision,
                labelled,
                head,
                &targets,
                &mut space.logits,
                None,
            );
        };
        let dlabelled = sized(&mut space.dlabelled, labels.len() * h);
        let dhead = &mut grads[self.layout.head.clone()];
        let out = Some((scale, &mut *dlabelled, dhead));
        let loss =
            ops::cross_entropy(cpu, precision, labelled, head, &targets, &mut space.logits, out);
        // the final norm's output gradient is zero but at labelled positions
        let dnorm = sized(&mut space.dnorm, batch.ids.len() * h);
        dnorm.fill(0.0);
        for (row, (t, _)) in dlabelled.chunks_exact(h).zip(labels) {
            dnorm[t * h..(t + 1) * h].copy_from_slice(row);
        }
        self.backward(cpu, precision, batch, space, grads);
        loss
    }

    fn forward(&self, cpu: &Cpu, precision: Precision, batch: &Batch, space: &mut Workspace) {
        let (c, w, l) = (&self.config, &self.values, &self.layout);
        let (h, tokens, eps) = (c.hidden_size, batch.ids.len(), c.layer_norm_epsilon);
        let get = |r: &Range<usize>| &w[r.clone()];
        ops::embed(cpu, &batch.ids, get(&l.embedding), sized(&mut space.embedded, tokens * h));
        space.embedding_norm.forward(
            cpu,
            &space.embedded,
            get(&l.embedding_norm.weight),
            get(&l.embedding_norm.bias),
            eps,
        );
        space.layers.resize_with(c.layers, Saved::default);
        let mut input = &space.embedding_norm.y;
        let attention = self.attention(batch);
        for (s, l) in space.layers.iter_mut().zip(&l.layers) {
            sized(&mut s.x, tokens * h).copy_from_slice(input);
            s.norm1.forward(cpu, &s.x, get(&l.input_norm.weight), get(&l.input_norm.bias), eps);
            let qkv = sized(&mut s.qkv, tokens * 3 * h);
            ops::linear(
                cpu,
                precision,
                &s.norm1.y,
                get(&l.qkv.weight),
                get(&l.qkv.bias),
                None,
                qkv,
            );
            let lse = sized(&mut s.lse, tokens * c.heads);
            attention.forward(cpu, qkv, sized(&mut s.attention, tokens * h), lse);
            let residual = if c.residual_post_layer_norm { &s.norm1.y } else { &s.x };
            let x2 = sized(&mut s.x2, tokens * h);
            let (weight, bias) = (get(&l.dense.weight), get(&l.dense.bias));
            ops::linear(cpu, precision, &s.attention, weight, bias, Some(residual), x2);
            s.norm2.forward(cpu, x2, get(&l.post_norm.weight), get(&l.post_norm.bias), eps);
            let up = sized(&mut s.up, tokens * 4 * h);
            ops::linear(cpu, precision, &s.norm2.y, get(&l.up.weight), get(&l.up.bias), None, up);
            let gelu = sized(&mut s.gelu, tokens * 4 * h);
            ops::gelu(cpu, up, gelu);
            let residual = if c.residual_post_layer_norm { &s.norm2.y } else { &s.x2 };
            let out = sized(&mut space.x, tokens * h);
            let (weight, bias) = (get(&l.down.weight), get(&l.down.bias));
            ops::linear(cpu, precision, gelu, weight, bias, Some(residual), out);
            input = &space.x;
        }
        let (weight, bias) = (get(&l.final_norm.weight), get(&l.final_norm.bias));
        space.final_norm.forward(cpu, &space.x, weight, bias, eps);
    }

    fn attention<'a>(&'a self, batch: &'a Batch) -> Attention<'a> {
        Attention {
            starts: &batch.starts,
            heads: self.config.heads,
            head_size: self.config.head_size(),
            slopes: &self.slopes,
        }
    }

    /// From the gradient of the final norm's output in `space.dnorm`.
    fn backward(
        &self,
        cpu: &Cpu,
        precision: Precision,
        batch: &Batch,
        space: &mut Workspace,
        grads: &mut [f32],
    ) {
        let (c, w, l) = (&self.config, &self.values, &self.layout);
        let (h, tokens) = (c.hidden_size, batch.ids.len());
        let get = |r: &Range<usize>| &w[r.clone()];
        let attention = self.attention(batch);
        let Workspace { dx, dnorm, dresidual, dwide, dqkv, dattention, .. } = space;
        let dx = sized(dx, tokens * h);
        let dresidual = sized(dresidual, tokens * h);
        let dwide = sized(dwide, tokens * 4 * h);
        let dqkv = sized(dqkv, tokens * 3 * h);
        let dattention = sized(dattention, tokens * h);
        // The gradient of a norm's input is added to `dx`, which holds what comes along the
        // residual branch.
        let norm_backward = |norm: &Norm,
                             n: &Normed,
                             x: &[f32],
                             dy: &[f32],
                             dx: &mut [f32],
                             grads: &mut [f32]| {
            let (dw, db) = pair_mut(grads, &norm.weight, &norm.bias);
            ops::layer_norm_backward(cpu, dy, x, get(&norm.weight), &n.mean, &n.rstd, dx, dw, db);
        };
        let linear_backward =
            |lin: &Linear, x: &[f32], dy: &[f32], dx: &mut [f32], grads: &mut [f32]| {
                let (dw, db) = pair_mut(grads, &lin.weight, &lin.bias);
                ops::linear_backward(cpu, precision, dy, x, get(&lin.weight), dx, dw, db);
            };
        dx.fill(0.0);
        norm_backward(&l.final_norm, &space.final_norm, &space.x, dnorm, dx, grads);
        for (s, l) in space.layers.iter().zip(&l.layers).rev() {
            // x_out = down(gelu(up(norm2))) + (norm2 or x2)
            linear_backward(&l.down, &s.gelu, dx, dwide, grads);
            ops::gelu_backward(cpu, &s.up, dwide);
            linear_backward(&l.up, &s.norm2.y, dwide, dnorm, grads);
            merge_residual(c.residual_post_layer_norm, dx, dnorm, dresidual);
            norm_backward(&l.post_norm, &s.norm2, &s.x2, dnorm, dresidual, grads);
            // x2 = dense(attention(qkv(norm1))) + (norm1 or x)
            linear_backward(&l.dense, &s.attention, dresidual, dattention, grads);
            attention.backward(cpu, &s.qkv, &s.attention, &s.lse, dattention, dqkv);
            linear_backward(&l.qkv, &s.norm1.y, dqkv, dnorm, grads);
            merge_residual(c.residual_post_layer_norm, dresidual, dnorm, dx);
            norm_backward(&l.input_norm, &s.norm1, &s.x, dnorm, dx, grads);
        }
        dnorm.copy_from_slice(dx);
        dx.fill(0.0);
        norm_backward(&l.embedding_norm, &space.embedding_norm, &space.embedded, dnorm, dx, grads);
        ops::embed_backward(cpu, &batch.ids, dx, &mut grads[l.embedding.clone()]);
    }
}

/// Sends the gradient `from` along the residual branch: into the norm's output if the branch
/// starts after it, else to the norm's input `to`.
fn merge_residual(post_norm: bool, from: &[f32], dnorm: &mut [f32], to: &mut [f32]) {
    if post_norm {
        dnorm.iter_mut().zip(from).for_each(|(d, f)| *d += f);
        to.fill(0.0);
    } else {
        to.copy_from_slice(from);
    }
}
