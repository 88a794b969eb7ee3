//! Decoding steps of few sequences as one kernel, whose blocks stay on their multiprocessors from
//! the first layer to the last.
//!
//! What it saves are launches and the pauses between them, what it costs are barriers of the whole
//! device: which is faster depends on the model and the GPU, so it is measured (see `graphs.rs`).

use super::Cuda;
use super::abi::{self, DecodeLayer, DecodeLinear, DecodeModel, DecodeStep, TokenIds};
use super::decoder::ForwardPass;
use crate::device::{Args, LaunchConfig, Launcher, Memory};
use crate::error::{Error, Result};
use crate::ops::{DecoderLayer, LayerNorm, Linear, ObjectId, Weight as _};
use crate::tensor::DType;
use std::cell::Cell;

/// Whether decoding steps of few sequences are one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistent {
    /// Where that was faster when both were tried.
    Auto,
    /// Wherever the kernel can do the pass.
    Always,
    /// Nowhere.
    Never,
}

const WARPS: usize = abi::DECODE_WARPS;
const THREADS: u32 = 32 * WARPS as u32;
const TOKENS: usize = abi::DECODE_TOKENS;
const PIECE_BYTES: usize = abi::DECODE_CHUNK_BYTES;
const GROUP_ROWS: usize = abi::DECODE_GROUP_OUTPUTS;
const SPLIT: usize = abi::DECODE_SPLIT;
const STRIDE_MORE: usize = abi::DECODE_PADDING;
/// Pieces of weights in flight to a warp, the largest number first.
const DEPTHS: [usize; 2] = [10, 4];

/// What the device knows of the last model: addresses hold until memory changes.
pub(super) struct Models<L: Launcher> {
    decoder: Option<ObjectId>,
    allocation_epoch: u64,
    table: Option<Memory<L>>,
    barrier: Option<Memory<L>>,
    /// Where the barrier stands.
    arrived: Cell<u32>,
}

impl<L: Launcher> Default for Models<L> {
    fn default() -> Self {
        Models {
            decoder: None,
            allocation_epoch: 0,
            table: None,
            barrier: None,
            arrived: Cell::new(0),
        }
    }
}

fn decode_linear<L: Launcher>(linear: &Linear<Cuda<L>>) -> DecodeLinear {
    DecodeLinear {
        weight: linear.weight.data.at,
        scales: linear.weight.scales(),
        bias: linear.bias.at,
    }
}

fn norm<L: Launcher>(norm: &LayerNorm<Cuda<L>>) -> [u64; 2] {
    [norm.weight.at, norm.bias.at]
}

fn shared_bytes(depth: usize, width: usize, layers: usize) -> usize {
    WARPS * depth * PIECE_BYTES
        + WARPS * TOKENS * GROUP_ROWS * 4
        + TOKENS * (width + STRIDE_MORE) * 2
        + layers * size_of::<DecodeLayer>()
}

impl<L: Launcher> Cuda<L> {
    /// The largest number of weights in flight with which there is room for a pass, if the kernel
    /// can do it at all.
    fn depth(&self, f: &ForwardPass<L>) -> Option<usize> {
        let pass = &f.a.batch;
        let int8 = f.decoder.embedding.int8();
        let same = |l: &Linear<Self>| l.weight.int8() == int8;
        let alike =
            |l: &DecoderLayer<Self>| same(&l.qkv) && same(&l.dense) && same(&l.up) && same(&l.down);
        let (width, layers) = (f.decoder.embedding.cols(), f.decoder.layers.len());
        let fits = |depth: &usize| {
            shared_bytes(*depth, width, layers) <= self.launcher.limits().shared_bytes as usize
        };
        let few = pass.tokens <= TOKENS
            && pass.single_count == pass.tokens
            && width <= abi::DECODE_MAX_WIDTH
            && !self.batch_invariant;
        if few && f.decoder.layers.iter().all(alike) { DEPTHS.into_iter().find(fits) } else { None }
    }

    pub(super) fn can_persist(&self, f: &ForwardPass<L>) -> bool {
        self.persistent != Persistent::Never && self.depth(f).is_some()
    }

    /// Makes room for a pass. Returns where blocks that share a sequence leave what they have.
    pub(super) fn prepare_persistent(&self, f: &mut ForwardPass<L>) -> Result<(u64, u64)> {
        let (tokens, width) = (f.a.batch.tokens, f.decoder.embedding.cols());
        for (tensor, width, dtype) in [
            (&mut f.a.x, width, DType::F32),
            (&mut f.a.x2, width, DType::F32),
            (&mut f.a.normed, width, self.half),
            (&mut f.a.queries, width, self.half),
            (&mut f.a.attention, width, self.half),
            (&mut f.a.wide, 4 * width, self.half),
        ] {
            self.reserve(tensor, [tokens, width], dtype)?;
        }
        let sums = self.shared_sums(f.cache, tokens, f.a.batch.longest_single.div_ceil(SPLIT))?;
        let mut models = self.models.borrow_mut();
        if models.barrier.is_none() {
            models.barrier = Some(Memory::zeroed(&self.launcher, 4)?);
            models.arrived.set(0);
        }
        let id = Some(f.decoder.id);
        if models.decoder != id || models.allocation_epoch != self.launcher.allocation_epoch() {
            let args = |l: &DecoderLayer<Self>| DecodeLayer {
                linears: [&l.qkv, &l.dense, &l.up, &l.down].map(decode_linear),
                input_norm: norm(&l.input_norm),
                post_norm: norm(&l.post_norm),
            };
            let table: Vec<DecodeLayer> = f.decoder.layers.iter().map(args).collect();
            let at = self.place(&mut models.table, size_of_val(&table[..]))?;
            self.launcher.write(at, bytemuck::cast_slice(&table))?;
            (models.decoder, models.allocation_epoch) = (id, self.launcher.allocation_epoch());
        }
        Ok(sums)
    }

    /// Does a pass that [`Cuda::can_persist`] is true of.
    pub(super) fn persist(&self, f: &mut ForwardPass<L>) -> Result<()> {
        let depth = self
            .depth(f)
            .ok_or_else(|| Error::Unsupported("no room for a step in one kernel".into()))?;
        let sums = self.prepare_persistent(f)?;
        let models = self.models.borrow();
        let at = |m: &Option<Memory<L>>| m.as_ref().map_or(0, |m| m.at);
        let (s, pass) = (&*f.a, &f.a.batch);
        let model = DecodeModel {
            layers: at(&models.table),
            embedding: f.decoder.embedding.data.at,
            embedding_scales: f.decoder.embedding.scales(),
            embedding_norm_weight: f.decoder.embedding_norm.weight.at,
            embedding_norm_bias: f.decoder.embedding_norm.bias.at,
            count: f.decoder.layers.len() as u32,
            width: f.decoder.embedding.cols() as u32,
            eps: f.decoder.embedding_norm.eps,
            residual_post_norm: f.decoder.residual_post_norm as u32,
        };
        let arrived = models.arrived.get();
        let step = DecodeStep {
            x: s.x.at(),
            x2: s.x2.at(),
            normed: s.normed.at(),
            queries: s.queries.at(),
            attended: s.attention.at(),
            wide: s.wide.at(),
            slots: pass.slots,
            barrier: at(&models.barrier),
            layer_bytes: (2 * f.cache.blocks * f.cache.block_bytes) as u64,
            tokens: pass.tokens as u32,
            arrived,
        };
        let ids = TokenIds::of(pass, f.decoder.embedding.rows());
        let attention = self.attention_args(&s.attention, &s.queries, pass, f.cache);
        let attention = attention.shared(pass.longest_single.div_ceil(SPLIT), sums);
        let blocks = self.launcher.limits().processors;
        let int8 = if f.decoder.embedding.int8() { "_int8" } else { "" };
        let kernel = format!("decode_step_{}{int8}_{depth}", self.suffix());
        let (width, layers) = (f.decoder.embedding.cols(), f.decoder.layers.len());
        let shared_bytes = shared_bytes(depth, width, layers) as u32;
        let config = LaunchConfig {
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared_bytes,
            cooperative: true,
            cluster: 1,
        };
        self.launcher.launch(
            &kernel,
            config,
            &Args::new().with(model).with(step).with(ids).with(attention),
        )?;
        // each block comes to five barriers a layer; the first has one more, the last one less
        models.arrived.set(arrived.wrapping_add(blocks * 5 * f.decoder.layers.len() as u32));
        Ok(())
    }
}
