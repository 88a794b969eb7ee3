//! What a training pass keeps: activations for the backward pass, and gradients of activations.

use super::BloomConfig;
use crate::ops::Tensor;
use crate::ops::train::{AttentionOutput, NormOutput, TrainBackend};

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
pub(super) struct LinearOutputs<B: TrainBackend> {
    pub(super) qkv: Tensor<B>,
    pub(super) x2: Tensor<B>,
    pub(super) up: Tensor<B>,
}

impl<B: TrainBackend> Default for LinearOutputs<B> {
    fn default() -> Self {
        let (qkv, x2, up) = (Tensor::default(), Tensor::default(), Tensor::default());
        LinearOutputs { qkv, x2, up }
    }
}

/// What came of these by operations that take little work.
pub(super) struct CheapOutputs<B: TrainBackend> {
    pub(super) norm1: NormOutput<B>,
    pub(super) attention: AttentionOutput<B>,
    pub(super) norm2: NormOutput<B>,
    pub(super) gelu: Tensor<B>,
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
pub(super) struct LayerActivations<B: TrainBackend> {
    /// Of each layer its output.
    pub(super) out: Vec<Tensor<B>>,
    /// Of each layer, or of one layer at a time.
    pub(super) linear: Vec<LinearOutputs<B>>,
    pub(super) cheap: Vec<CheapOutputs<B>>,
}

/// What is kept of one layer, and its input.
pub(super) struct LayerView<'a, B: TrainBackend> {
    pub(super) x: &'a Tensor<B>,
    pub(super) linear: &'a mut LinearOutputs<B>,
    pub(super) cheap: &'a mut CheapOutputs<B>,
}

impl<B: TrainBackend> LayerActivations<B> {
    pub(super) fn new() -> Self {
        LayerActivations { out: Vec::new(), linear: Vec::new(), cheap: Vec::new() }
    }

    /// Makes room for `layers`, of which the last `trained` ones have a backward pass: the others
    /// leave nothing but their outputs.
    pub(super) fn resize(&mut self, layers: usize, trained: usize, recompute: Recompute) {
        let (one, kept) = (layers.min(1), trained.max(layers.min(1)));
        let (linear, cheap) = match recompute {
            Recompute::None => (kept, kept),
            Recompute::Attention => (kept, one),
            Recompute::Layer => (one, one),
        };
        self.out.resize_with(layers, Tensor::default);
        self.linear.resize_with(linear, LinearOutputs::default);
        self.cheap.resize_with(cheap, CheapOutputs::default);
    }

    /// What is kept of layer `i`, and its output; `first` is the input of the first layer.
    pub(super) fn layer<'a>(
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
pub(super) struct Gradients<B: TrainBackend> {
    pub(super) x: Tensor<B>,
    pub(super) normed: Tensor<B>,
    pub(super) residual: Tensor<B>,
    pub(super) wide: Tensor<B>,
    pub(super) qkv: Tensor<B>,
    pub(super) attention: Tensor<B>,
    pub(super) labelled: Tensor<B>,
    pub(super) head: HeadActivations<B>,
}

/// What a scalar head gives, or gradients of that.
pub(super) struct HeadActivations<B: TrainBackend> {
    /// After the ReLU, if the head has one.
    pub(super) hidden: Tensor<B>,
    /// `[labels, 1]`.
    pub(super) scalars: Tensor<B>,
    /// The head's share of the gradient of the labelled rows.
    pub(super) labelled: Tensor<B>,
}

impl<B: TrainBackend> Default for HeadActivations<B> {
    fn default() -> Self {
        let (hidden, scalars, labelled) = Default::default();
        HeadActivations { hidden, scalars, labelled }
    }
}

/// Activations and their gradients, kept from step to step.
pub struct Workspace<B: TrainBackend> {
    pub(super) embedded: Tensor<B>,
    pub(super) embedding_norm: NormOutput<B>,
    pub(super) layers: LayerActivations<B>,
    pub(super) recompute: Recompute,
    pub(super) final_norm: NormOutput<B>,
    pub(super) labelled: Tensor<B>,
    pub(super) logits: Tensor<B>,
    pub(super) head: HeadActivations<B>,
    /// Whether the frozen layers' last output is there already.
    pub(super) trunk_is_there: bool,
    pub(super) d: Gradients<B>,
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
            head: HeadActivations::default(),
            trunk_is_there: false,
            d: Gradients {
                x: Tensor::default(),
                normed: Tensor::default(),
                residual: Tensor::default(),
                wide: Tensor::default(),
                qkv: Tensor::default(),
                attention: Tensor::default(),
                labelled: Tensor::default(),
                head: HeadActivations::default(),
            },
        }
    }
}

impl<B: TrainBackend> Workspace<B> {
    /// Room for passes that compute some of their activations again.
    pub fn with_recompute(recompute: Recompute) -> Self {
        Workspace { recompute, ..Workspace::default() }
    }

    /// What the model's scalar head gave the labelled positions of the last pass, `[labels, 1]`.
    pub fn scalars(&self) -> &Tensor<B> {
        &self.head.scalars
    }

    /// [`Workspace::scalars`], which are not here any more.
    pub fn take_scalars(&mut self) -> Tensor<B> {
        std::mem::take(&mut self.head.scalars)
    }

    /// Takes the output that the first `frozen` layers had in the last pass, at least one of them.
    /// [`Workspace::put_trunk`] spares later passes over the same batch these layers.
    pub fn take_trunk(&mut self, frozen: usize) -> Tensor<B> {
        std::mem::take(&mut self.layers.out[frozen - 1])
    }

    /// Has the next pass begin behind the first `frozen` layers, whose output for its batch this
    /// is.
    pub fn put_trunk(&mut self, frozen: usize, trunk: Tensor<B>) {
        let len = self.layers.out.len().max(frozen);
        self.layers.out.resize_with(len, Tensor::default);
        self.layers.out[frozen - 1] = trunk;
        self.trunk_is_there = true;
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
