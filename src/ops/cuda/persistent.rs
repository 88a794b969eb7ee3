//! Decoding steps of few sequences as one kernel, whose blocks stay on their multiprocessors from
//! the first layer to the last.
//!
//! What it saves are launches and the pauses between them, what it costs are barriers of the whole
//! device: which is faster depends on the model and the GPU, so it is measured (see `graphs.rs`).

use super::{Cuda, Ids, Matrix, Vector};
use crate::device::{Args, Launcher, Memory, Shape};
use crate::error::{Error, Result};
use crate::ops::{Forward, Layer, LayerNorm, Linear};
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
    layers: usize,
    changes: u64,
    table: Option<Memory<L>>,
    barrier: Option<Memory<L>>,
    /// Where the barrier stands.
    arrived: Cell<u32>,
}

impl<L: Launcher> Default for Models<L> {
    fn default() -> Self {
        Models { layers: 0, changes: 0, table: None, barrier: None, arrived: Cell::new(0) }
    }
}

fn product<L: Launcher>(linear: &Linear<Matrix<L>, Vector<L>>) -> Product {
    Product { weight: linear.weight.data.at, scales: linear.weight.scales(), bias: linear.bias.at }
}

fn norm<L: Launcher>(norm: &LayerNorm<Vector<L>>) -> [u64; 2] {
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
    fn depth(&self, f: &Forward<Self>) -> Option<usize> {
        let pass = &f.scratch.pass;
        let int8 = f.embedding.int8();
        let same = |l: &Linear<Matrix<L>, Vector<L>>| l.weight.int8() == int8;
        let alike =
            |l: &Layer<Self>| same(&l.qkv) && same(&l.dense) && same(&l.up) && same(&l.down);
        let fits = |depth: &usize| {
            shared_bytes(*depth, f.embedding.cols) <= self.launcher.limits().shared_bytes as usize
        };
        let few =
            pass.tokens <= TOKENS && pass.single_count == pass.tokens && !self.batch_invariant;
        if few && f.layers.iter().all(alike) { DEPTHS.into_iter().find(fits) } else { None }
    }

    pub(super) fn can_persist(&self, f: &Forward<Self>) -> bool {
        self.persistent != Persistent::Never && self.depth(f).is_some()
    }

    /// Makes room for a pass. Returns where blocks that share a sequence leave what they have.
    pub(super) fn prepare_persistent(&self, f: &mut Forward<Self>) -> Result<(u64, u64)> {
        let (tokens, width) = (f.scratch.pass.tokens, f.embedding.cols);
        for (buffer, width, narrow) in [
            (&mut f.scratch.x, width, false),
            (&mut f.scratch.x2, width, false),
            (&mut f.scratch.normed, width, true),
            (&mut f.scratch.qkv, width, true),
            (&mut f.scratch.attention, width, true),
            (&mut f.scratch.wide, 4 * width, true),
        ] {
            self.reserve(buffer, tokens, width, narrow)?;
        }
        let sums = self.shared_sums(
            f.cache,
            f.heads,
            tokens,
            f.scratch.pass.longest_single.div_ceil(SPLIT),
        )?;
        let mut models = self.models.borrow_mut();
        if models.barrier.is_none() {
            models.barrier = Some(Memory::zeroed(&self.launcher, 4)?);
            models.arrived.set(0);
        }
        let layers = f.layers.as_ptr() as usize;
        if models.layers != layers || models.changes != self.launcher.changes() {
            let args = |l: &Layer<Self>| LayerArgs {
                products: [&l.qkv, &l.dense, &l.up, &l.down].map(product),
                input_norm: norm(&l.input_norm),
                post_norm: norm(&l.post_norm),
            };
            let table: Vec<LayerArgs> = f.layers.iter().map(args).collect();
            let at = self.place(&mut models.table, size_of_val(&table[..]))?;
            self.launcher.write(at, bytemuck::cast_slice(&table))?;
            (models.layers, models.changes) = (layers, self.launcher.changes());
        }
        Ok(sums)
    }

    /// Does a pass that [`Cuda::can_persist`] is true of.
    pub(super) fn persist(&self, f: &mut Forward<Self>) -> Result<()> {
        let depth =
            self.depth(f).ok_or_else(|| Error::invalid("no room for a step in one kernel"))?;
        let sums = self.prepare_persistent(f)?;
        let models = self.models.borrow();
        let at = |m: &Option<Memory<L>>| m.as_ref().map_or(0, |m| m.at);
        let (s, pass) = (&*f.scratch, &f.scratch.pass);
        let model = Model {
            layers: at(&models.table),
            embedding: f.embedding.data.at,
            embedding_scales: f.embedding.scales(),
            embedding_norm: f.embedding_norm.weight.at,
            embedding_shift: f.embedding_norm.bias.at,
            count: f.layers.len() as u32,
            width: f.embedding.cols as u32,
            eps: f.eps,
            residual_post_norm: f.residual_post_norm as u32,
        };
        let arrived = models.arrived.get();
        let step = Step {
            x: s.x.at(),
            x2: s.x2.at(),
            normed: s.normed.at(),
            queries: s.qkv.at(),
            attended: s.attention.at(),
            wide: s.wide.at(),
            slots: pass.slots,
            barrier: at(&models.barrier),
            layer_bytes: (2 * f.cache.blocks * f.cache.block_bytes) as u64,
            tokens: pass.tokens as u32,
            arrived,
        };
        let ids = Ids::of(pass, f.embedding.rows);
        let attention = self.attention_args(pass, f.heads, &s.qkv, f.cache, &s.attention);
        let attention = attention.shared(pass.longest_single.div_ceil(SPLIT), sums);
        let blocks = self.launcher.limits().processors;
        let int8 = if f.embedding.int8() { "_int8" } else { "" };
        let kernel = format!("decode_step_{}{int8}_{depth}", self.suffix());
        let shared_bytes = shared_bytes(depth, f.embedding.cols) as u32;
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
        models.arrived.set(arrived.wrapping_add(blocks * 5 * f.layers.len() as u32));
        Ok(())
    }
}
