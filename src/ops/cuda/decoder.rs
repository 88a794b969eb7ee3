//! A decoder's forward pass.

use super::linear::LinearInput;
use super::{Cache, Cuda};
use crate::device::Launcher;
use crate::error::Result;
use crate::ops::{Decoder, DecoderActivations, Epilogue};

/// What a forward pass reads and writes; see [`crate::ops::DecodeBackend::decoder`].
pub(super) struct ForwardPass<'a, L: Launcher> {
    pub decoder: &'a Decoder<Cuda<L>>,
    pub cache: &'a mut Cache<L>,
    pub a: &'a mut DecoderActivations<Cuda<L>>,
}

impl<L: Launcher> Cuda<L> {
    /// Launches a forward pass kernel by kernel: up to 16 tokens a norm is the beginning of the
    /// linear layer behind it, beyond that a launch of its own. As the end of the linear layer
    /// before it, by the cluster that is the last to write outputs of a row, it took longer: 2.33
    /// and not 2.21 ms a step of 64 tokens, 5.81 and not 5.09 of 256 (BLOOM-1b1 on an H100).
    pub(super) fn launch_decoder(&self, f: &mut ForwardPass<L>) -> Result<()> {
        let (d, keep) = (f.decoder, f.decoder.residual_post_norm);
        let a = &mut *f.a;
        self.launch_embedding_norm(&mut a.x, &a.batch, &d.embedding, &d.embedding_norm)?;
        for (i, layer) in d.layers.iter().enumerate() {
            let DecoderActivations { x, normed, queries, attention, x2, wide, batch, .. } = &mut *a;
            let input = LinearInput::Normalized { x, norm: &layer.input_norm, normed, keep };
            self.launch_qkv(queries, input, &layer.qkv, batch, (f.cache, i))?;
            self.attend(attention, queries, batch, (f.cache, i))?;
            let residual = Epilogue::BiasResidual(if keep { &*normed } else { &*x });
            self.launch_linear(x2, LinearInput::Rows(attention), &layer.dense, residual)?;
            let input = LinearInput::Normalized { x: x2, norm: &layer.post_norm, normed, keep };
            self.launch_linear(wide, input, &layer.up, Epilogue::BiasGelu)?;
            let residual = Epilogue::BiasResidual(if keep { &*normed } else { &*x2 });
            self.launch_linear(x, LinearInput::Rows(wide), &layer.down, residual)?;
        }
        Ok(())
    }
}
