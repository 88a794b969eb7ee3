//! What generation needs of a backend: a paged KV cache, a decoder's layers, sampling.

use super::sampling::{SampledToken, SamplingRow};
use super::{
    Backend, Batch, Decoder, Epilogue, Heads, LayerNorm, Linear, NormInput, ObjectId, Tensor,
};
use crate::error::Result;
use crate::tensor::DType;

/// Activations of a decoder's forward pass, kept from pass to pass.
pub struct DecoderActivations<B: DecodeBackend> {
    /// Tells these from all others.
    pub id: ObjectId,
    /// What the device knows of the batch.
    pub batch: B::DeviceBatch,
    /// The residual stream `[tokens, hidden]`; after a pass, the last layer's output.
    pub x: Tensor<B>,
    /// Normalized rows.
    pub normed: Tensor<B>,
    /// Queries, as [`DecodeBackend::paged_attention`] takes them.
    pub queries: Tensor<B>,
    /// What attention gives, `[tokens, hidden]`.
    pub attention: Tensor<B>,
    /// The residual stream between attention and the MLP.
    pub x2: Tensor<B>,
    /// Inside the MLP, `[tokens, 4 hidden]`.
    pub wide: Tensor<B>,
}

impl<B: DecodeBackend> Default for DecoderActivations<B> {
    fn default() -> Self {
        DecoderActivations {
            id: Default::default(),
            batch: Default::default(),
            x: Default::default(),
            normed: Default::default(),
            queries: Default::default(),
            attention: Default::default(),
            x2: Default::default(),
            wide: Default::default(),
        }
    }
}

/// A backend that generates.
pub trait DecodeBackend: Backend {
    /// Keys and values of all layers, in blocks of [`super::BLOCK`] positions:
    /// `[block, head, position, head size]`.
    type Cache;
    /// What the device needs to know of a batch.
    type DeviceBatch: Default;
    /// Tokens that are being sampled.
    type PendingSamples;

    /// A KV cache of `blocks` blocks.
    ///
    /// # Errors
    /// If there is no memory for it, or the heads are of a size that the backend cannot do.
    fn cache(
        &self,
        dtype: DType,
        layers: usize,
        heads: &Heads,
        blocks: usize,
    ) -> Result<Self::Cache>;

    /// Copies a block's keys and values in all layers.
    fn copy_block(&self, cache: &mut Self::Cache, from: u32, to: u32);

    /// Tells the device what the operations below need to know of a batch.
    fn upload_batch(&self, batch: &Batch, to: &mut Self::DeviceBatch);

    /// Writes the normalized rows of `table` for the batch's ids to `y` = `[tokens, width]`.
    fn embedding_norm(
        &self,
        y: &mut Tensor<Self>,
        batch: &Self::DeviceBatch,
        table: &Self::Weight,
        norm: &LayerNorm<Self>,
    );

    /// Queries, keys and values of the rows of `x` = `[tokens, inputs]`; the linear layer's rows
    /// are `[head, 3, head size]`. Keys and values are written to the cache's `layer`; `queries` is
    /// what [`DecodeBackend::paged_attention`] takes.
    fn qkv_to_cache(
        &self,
        queries: &mut Tensor<Self>,
        x: &Tensor<Self>,
        qkv: &Linear<Self>,
        batch: &Self::DeviceBatch,
        cache: (&mut Self::Cache, usize),
    );

    /// [`DecodeBackend::qkv_to_cache`] of normalized rows. A backend may do both at once.
    fn layer_norm_qkv_to_cache(
        &self,
        queries: &mut Tensor<Self>,
        input: NormInput<Self>,
        qkv: &Linear<Self>,
        batch: &Self::DeviceBatch,
        cache: (&mut Self::Cache, usize),
    ) {
        self.layer_norm(input.normed, input.x, input.norm);
        self.qkv_to_cache(queries, input.normed, qkv, batch, cache);
    }

    /// Lets each query attend to its own and all earlier positions of its sequence in the cache's
    /// `layer`, with ALiBi. Writes `[tokens, head, head size]` to `y`.
    fn paged_attention(
        &self,
        y: &mut Tensor<Self>,
        queries: &Tensor<Self>,
        batch: &Self::DeviceBatch,
        cache: (&Self::Cache, usize),
    );

    /// A forward pass, from the ids of the batch that `a.batch` was told of to the last layer's
    /// output in `a.x`; extends the cache. A backend may do better than one operation after
    /// the other.
    fn decoder(
        &self,
        decoder: &Decoder<Self>,
        cache: &mut Self::Cache,
        a: &mut DecoderActivations<Self>,
    ) {
        composed(self, decoder, cache, a);
    }

    /// Logits `[rows of x, vocabulary]`, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn logits(&self, x: &Tensor<Self>, lm_head: &Self::Weight, out: &mut Vec<f32>) -> Result<()>;

    /// Samples from the LM head's logits: for each `(row of x, what to sample)` one token, in
    /// order. `scratch` may hold logits.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn sample(
        &self,
        x: &Tensor<Self>,
        lm_head: &Self::Weight,
        rows: &[(usize, &SamplingRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<SampledToken>>;

    /// Whether the device samples a row like this one by itself, so that the next pass can begin
    /// with a token which the host does not know yet.
    fn samples_on_device(&self, row: &SamplingRow) -> bool;

    /// [`DecodeBackend::sample`] that waits for nothing, of rows that
    /// [`DecodeBackend::samples_on_device`] is true of.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    fn sample_async(
        &self,
        x: &Tensor<Self>,
        lm_head: &Self::Weight,
        rows: &[(usize, &SamplingRow)],
    ) -> Result<Self::PendingSamples>;

    /// Waits for sampled tokens.
    ///
    /// # Errors
    /// If the device failed.
    fn wait(&self, pending: Self::PendingSamples) -> Result<Vec<SampledToken>>;
}

/// [`DecodeBackend::decoder`] operation by operation.
pub(super) fn composed<B: DecodeBackend>(
    b: &B,
    decoder: &Decoder<B>,
    cache: &mut B::Cache,
    a: &mut DecoderActivations<B>,
) {
    let DecoderActivations { batch, x, normed, queries, attention, x2, wide, .. } = a;
    b.embedding_norm(x, batch, &decoder.embedding, &decoder.embedding_norm);
    for (i, layer) in decoder.layers.iter().enumerate() {
        b.layer_norm(normed, x, &layer.input_norm);
        b.qkv_to_cache(queries, normed, &layer.qkv, batch, (cache, i));
        b.paged_attention(attention, queries, batch, (cache, i));
        let residual = if decoder.residual_post_norm { &*normed } else { &*x };
        b.linear(x2, attention, &layer.dense, Epilogue::BiasResidual(residual));
        b.layer_norm(normed, x2, &layer.post_norm);
        b.linear(wide, normed, &layer.up, Epilogue::BiasGelu);
        let residual = if decoder.residual_post_norm { &*normed } else { &*x2 };
        b.linear(x, wide, &layer.down, Epilogue::BiasResidual(residual));
    }
}
