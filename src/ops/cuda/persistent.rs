//! Decoding steps of few sequences as one kernel, whose blocks stay on their multiprocessors from
//! the first layer to the last.
//!
//! What it saves are launches and the pauses between them, what it costs are barriers of the whole
//! device: which is faster depends on the model and the GPU, so it is measured (see `graphs.rs`).

use super::decoder::ForwardPass;
use super::{Cuda, Ids};
use crate::device::{Args, Launcher, Memory, Shape};
use crate::error::{Error, Result};
use crate::ops::{DecoderLayer, LayerNorm, Linear, ObjectId, Weight as _};
use crate::tensor::DType;
use bytemuck::{Pod, Zeroable};
use std::cell::Cell;

/// Whether decoding steps of few sequences are one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistent {
    /// Where that was faster when both ways were tried.
    Auto,
    Always,
    Never,
}

/// As in `kernels/decode_step.cu`.
const WARPS: usize = 8;
const THREADS: u32 = 256;
const TOKENS: usize = 8;
const PIECE_BYTES: usize = 2048;
const GROUP_ROWS: usize = 64;
const SPLIT: usize = 128;
const STRIDE_MORE: usize = 32;
/// Pieces of weights on their way to a warp, the most first.
const DEPTHS: [usize; 2] = [10, 4];

/// `Product` of the kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Product {
    weight: u64,
    scales: u64,
    bias: u64,
}

/// `Layer` of the kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LayerArgs {
    products: [Product; 4],
    input_norm: [u64; 2],
    post_norm: [u64; 2],
}

/// `Model` of the kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Model {
    layers: u64,
    embedding: u64,
    embedding_scales: u64,
    embedding_norm: u64,
    embedding_shift: u64,
    count: u32,
    width: u32,
    eps: f32,
    residual_post_norm: u32,
}

/// `Step` of the kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Step {
    x: u64,
    x2: u64,
    normed: u64,
    queries: u64,
    attended: u64,
    wide: u64,
    slots: u64,
    barrier: u64,
    layer_bytes: u64,
    tokens: u32,
    arrived: u32,
}

/// What the device knows of the last model: addresses hold until memory changes.
pub(super) struct Models<L: Launcher> {
    decoder: Option<ObjectId>,
    changes: u64,
    table: Option<Memory<L>>,
    barrier: Option<Memory<L>>,
    /// Where the barrier stands.
    arrived: Cell<u32>,
}

impl<L: Launcher> Default for Models<L> {
    fn default() -> Self {
        Models { decoder: None, changes: 0, table: None, barrier: None, arrived: Cell::new(0) }
    }
}

fn product<L: Launcher>(linear: &Linear<Cuda<L>>) -> Product {
    Product { weight: linear.weight.data.at, scales: linear.weight.scales(), bias: linear.bias.at }
}

fn norm<L: Launcher>(norm: &LayerNorm<Cuda<L>>) -> [u64; 2] {
    [norm.weight.at, norm.bias.at]
}

fn shared_bytes(depth: usize, width: usize) -> usize {
    WARPS * depth * PIECE_BYTES
        + WARPS * TOKENS * GROUP_ROWS * 4
        + TOKENS * (width + STRIDE_MORE) * 2
}

impl<L: Launcher> Cuda<L> {
    /// The most weights on their way with which there is room for a pass, if the kernel can do it
    /// at all.
    fn depth(&self, f: &ForwardPass<L>) -> Option<usize> {
        let pass = &f.a.batch;
        let int8 = f.decoder.embedding.int8();
        let same = |l: &Linear<Self>| l.weight.int8() == int8;
        let alike =
            |l: &DecoderLayer<Self>| same(&l.qkv) && same(&l.dense) && same(&l.up) && same(&l.down);
        let fits = |depth: &usize| {
            shared_bytes(*depth, f.decoder.embedding.cols())
                <= self.launcher.limits().shared_bytes as usize
        };
        let few =
            pass.tokens <= TOKENS && pass.single_count == pass.tokens && !self.batch_invariant;
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
        if models.decoder != id || models.changes != self.launcher.changes() {
            let args = |l: &DecoderLayer<Self>| LayerArgs {
                products: [&l.qkv, &l.dense, &l.up, &l.down].map(product),
                input_norm: norm(&l.input_norm),
                post_norm: norm(&l.post_norm),
            };
            let table: Vec<LayerArgs> = f.decoder.layers.iter().map(args).collect();
            let at = self.place(&mut models.table, size_of_val(&table[..]))?;
            self.launcher.write(at, bytemuck::cast_slice(&table))?;
            (models.decoder, models.changes) = (id, self.launcher.changes());
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
        let model = Model {
            layers: at(&models.table),
            embedding: f.decoder.embedding.data.at,
            embedding_scales: f.decoder.embedding.scales(),
            embedding_norm: f.decoder.embedding_norm.weight.at,
            embedding_shift: f.decoder.embedding_norm.bias.at,
            count: f.decoder.layers.len() as u32,
            width: f.decoder.embedding.cols() as u32,
            eps: f.decoder.embedding_norm.eps,
            residual_post_norm: f.decoder.residual_post_norm as u32,
        };
        let arrived = models.arrived.get();
        let step = Step {
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
        let ids = Ids::of(pass, f.decoder.embedding.rows());
        let attention = self.attention_args(&s.attention, &s.queries, pass, f.cache);
        let attention = attention.shared(pass.longest_single.div_ceil(SPLIT), sums);
        let blocks = self.launcher.limits().processors;
        let int8 = if f.decoder.embedding.int8() { "_int8" } else { "" };
        let kernel = format!("decode_step_{}{int8}_{depth}", self.suffix());
        let shared_bytes = shared_bytes(depth, f.decoder.embedding.cols()) as u32;
        let shape = Shape {
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared_bytes,
            cooperative: true,
            cluster: 1,
        };
        self.launcher.launch(
            &kernel,
            shape,
            &Args::new().with(model).with(step).with(ids).with(attention),
        )?;
        // each block comes to five barriers a layer; the first has one more, the last one less
        models.arrived.set(arrived.wrapping_add(blocks * 5 * f.decoder.layers.len() as u32));
        Ok(())
    }
}
