//! A decoder's forward pass, its layer norms fused with the linear layers around them.

use super::linear::LinearInput;
use super::{Cache, Cuda};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::{Decoder, DecoderActivations, DecoderLayer, Epilogue, Tensor};

/// What a forward pass reads and writes; see [`crate::ops::DecodeBackend::decoder`].
pub(super) struct ForwardPass<'a, L: Launcher> {
    pub decoder: &'a Decoder<Cuda<L>>,
    pub cache: &'a mut Cache<L>,
    pub a: &'a mut DecoderActivations<Cuda<L>>,
}

impl<L: Launcher> Cuda<L> {
    /// Launches a forward pass kernel by kernel: up to 16 tokens a norm is the beginning of the
    /// linear layer behind it, beyond that the end of the one before it where clusters do that, and
    /// a launch of its own elsewhere.
    pub(super) fn launch_decoder(&self, f: &mut ForwardPass<L>) -> Result<()> {
        let (d, a) = (f.decoder, &mut *f.a);
        self.launch_embedding_norm(&mut a.x, &a.batch, &d.embedding, &d.embedding_norm)?;
        // whether the rows that the next layer reads are in `normed` already
        let mut normalized = false;
        for (i, layer) in d.layers.iter().enumerate() {
            let input =
                input(&a.x, &layer.input_norm, &mut a.normed, d.residual_post_norm, normalized);
            self.launch_qkv(&mut a.queries, input, &layer.qkv, &a.batch, (f.cache, i))?;
            self.attend(&mut a.attention, &a.queries, &a.batch, (f.cache, i))?;
            let next = d.layers.get(i + 1);
            normalized = if d.residual_post_norm {
                self.launch_mlp_post_norm(layer, a)?;
                false
            } else {
                self.launch_mlp(layer, next, a)?
            };
        }
        Ok(())
    }

    /// What follows attention, with residuals that branch off before the norms. Returns whether the
    /// rows that the next layer reads are normalized.
    fn launch_mlp(
        &self,
        layer: &DecoderLayer<Self>,
        next: Option<&DecoderLayer<Self>>,
        a: &mut DecoderActivations<Self>,
    ) -> Result<bool> {
        let DecoderActivations { x, normed, attention, x2, wide, .. } = a;
        let residual = Epilogue::BiasResidual(x);
        let norm = (&layer.post_norm, &mut *normed);
        let normalized =
            self.launch_linear_then_norm(x2, attention, &layer.dense, residual, norm)?;
        let input = input(x2, &layer.post_norm, normed, false, normalized);
        self.launch_linear(wide, input, &layer.up, Epilogue::BiasGelu)?;
        let residual = Epilogue::BiasResidual(x2);
        match next {
            Some(next) => {
                let norm = (&next.input_norm, normed);
                self.launch_linear_then_norm(x, wide, &layer.down, residual, norm)
            }
            None => {
                self.launch_linear(x, LinearInput::Rows(wide), &layer.down, residual)?;
                Ok(false)
            }
        }
    }

    /// What follows attention, with residuals that branch off after the norms.
    fn launch_mlp_post_norm(
        &self,
        layer: &DecoderLayer<Self>,
        a: &mut DecoderActivations<Self>,
    ) -> Result<()> {
        let DecoderActivations { x, normed, attention, x2, wide, .. } = a;
        let rows = LinearInput::Rows(attention);
        self.launch_linear(x2, rows, &layer.dense, Epilogue::BiasResidual(normed))?;
        let input = input(x2, &layer.post_norm, normed, true, false);
        self.launch_linear(wide, input, &layer.up, Epilogue::BiasGelu)?;
        let rows = LinearInput::Rows(wide);
        self.launch_linear(x, rows, &layer.down, Epilogue::BiasResidual(normed))
    }
}

/// The rows of `x` as a linear layer reads them: normalized already, or yet to be.
fn input<'a, L: Launcher>(
    x: &'a Tensor<Cuda<L>>,
    norm: &'a crate::ops::LayerNorm<Cuda<L>>,
    normed: &'a mut Tensor<Cuda<L>>,
    keep: bool,
    normalized: bool,
) -> LinearInput<'a, L> {
    if normalized {
        LinearInput::Rows(normed)
    } else {
        LinearInput::Normalized { x, norm, normed, keep }
    }
}
