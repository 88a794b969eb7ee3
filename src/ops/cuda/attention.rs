//! The KV cache and attention.

use super::abi::{self, AttentionArgs};
use super::{Cuda, DeviceBatch};
use crate::device::{Args, Launcher, Memory, TensorMapConfig};
use crate::error::Result;
use crate::ops::{BLOCK, Heads, ObjectId, Tensor};
use bytemuck::Zeroable;
use std::cell::RefCell;
use std::rc::Rc;

/// One query at a time: warps of a block, and positions that it takes.
const WARPS: usize = abi::ATTENTION_DECODE_WARPS;
const SPLIT: usize = abi::ATTENTION_DECODE_SPLIT;
/// Head sizes that there are kernels for.
pub(super) const SIZES: [usize; 5] = [32, 64, 80, 96, 128];
/// Maximum queries or tiles of one launch: a grid's second dimension ends at 65,535.
const MAX_ROWS: usize = 32768;
/// Queries of a tile, and positions of a step.
const QUERIES: usize = abi::ATTENTION_PREFILL_QUERIES;
const STEP: usize = abi::ATTENTION_STEP;
/// On Hopper: queries of a tile, threads, stages of a step, columns of a tile in shared memory.
const HOPPER_QUERIES: usize = abi::ATTENTION_HOPPER_QUERIES;
const HOPPER_THREADS: u32 = abi::ATTENTION_HOPPER_THREADS as u32;
const HOPPER_STAGES: usize = abi::ATTENTION_HOPPER_STAGES;
const HOPPER_COLUMNS: usize = abi::ATTENTION_HOPPER_COLUMNS;
/// Spans of at least so many tokens are cut into tiles, others go one query at a time.
pub(super) const TILED: usize = 16;

/// Keys and values of all layers: `[layer][keys or values][block, head, position, head size]` in 16
/// bits.
pub struct Cache<L: Launcher> {
    pub(super) id: ObjectId,
    pub(super) memory: Memory<L>,
    pub(super) layers: usize,
    pub(super) blocks: usize,
    /// Bytes of a block's keys in one layer.
    pub(super) block_bytes: usize,
    heads: Heads,
    slopes: Memory<L>,
    /// Of long sequences that several blocks of threads share: partial results, and how many are
    /// there.
    partials: RefCell<Option<Memory<L>>>,
    counters: RefCell<Option<Memory<L>>>,
}

impl AttentionArgs {
    /// For sequences that blocks of threads share, `splits` at most.
    pub(super) fn shared(self, splits: usize, (partials, counters): (u64, u64)) -> AttentionArgs {
        AttentionArgs { splits: splits as u32, partials, counters, ..self }
    }
}

impl<L: Launcher> Cache<L> {
    pub(super) fn new(
        launcher: &Rc<L>,
        layers: usize,
        heads: &Heads,
        blocks: usize,
    ) -> Result<Cache<L>> {
        assert!(SIZES.contains(&heads.size), "see `Cuda::supports`");
        let block_bytes = heads.count * BLOCK * heads.size * 2;
        Ok(Cache {
            id: ObjectId::default(),
            // positions of a block that are not written yet are loaded with it
            memory: Memory::zeroed(launcher, layers * 2 * blocks * block_bytes)?,
            layers,
            blocks,
            block_bytes,
            heads: heads.clone(),
            slopes: Memory::from_bytes(launcher, bytemuck::cast_slice(&heads.slopes))?,
            partials: RefCell::default(),
            counters: RefCell::default(),
        })
    }

    /// The heads of each layer.
    pub(super) fn heads(&self) -> &Heads {
        &self.heads
    }

    /// Where a layer's keys and values begin.
    pub(super) fn layer(&self, layer: usize) -> (u64, u64) {
        let part = (self.blocks * self.block_bytes) as u64;
        let keys = self.memory.at + 2 * layer as u64 * part;
        (keys, keys + part)
    }
}

/// Queries of a tile.
pub(super) fn tile_queries(hopper: bool) -> usize {
    if hopper { HOPPER_QUERIES } else { QUERIES }
}

/// Parts in which blocks of threads share the longest sequence.
pub(super) fn splits(positions: usize) -> usize {
    positions.div_ceil(SPLIT)
}

impl<L: Launcher> Cuda<L> {
    /// What the kernels are told, of the cache as a whole and of sequences that no two blocks of
    /// threads share.
    pub(super) fn attention_args(
        &self,
        y: &Tensor<Self>,
        queries: &Tensor<Self>,
        batch: &DeviceBatch<L>,
        cache: &Cache<L>,
    ) -> AttentionArgs {
        let (keys, values) = cache.layer(0);
        AttentionArgs {
            out: y.at(),
            q: queries.at(),
            keys,
            values,
            tokens: batch.singles,
            tiles: batch.tiles,
            spans: batch.spans,
            positions: batch.positions,
            tables: batch.tables,
            slopes: cache.slopes.at,
            heads: cache.heads.count as u32,
            table_width: batch.table_width as u32,
            splits: 1,
            ..AttentionArgs::zeroed()
        }
    }

    /// Where blocks of threads that share sequences leave what they have: partial results, and how
    /// many are there.
    pub(super) fn shared_sums(
        &self,
        cache: &Cache<L>,
        queries: usize,
        splits: usize,
    ) -> Result<(u64, u64)> {
        let heads = &cache.heads;
        let (mut partials, mut counters) =
            (cache.partials.borrow_mut(), cache.counters.borrow_mut());
        if splits > 1 {
            let pairs = queries * heads.count;
            self.grow(&mut partials, pairs * splits * (heads.size + 2) * 4)?;
            if counters.as_ref().is_none_or(|m| m.bytes < pairs * 4) {
                *counters = Some(Memory::zeroed(&self.launcher, pairs.next_power_of_two() * 4)?);
            }
        }
        Ok((partials.as_ref().map_or(0, |m| m.at), counters.as_ref().map_or(0, |m| m.at)))
    }

    /// See [`crate::ops::DecodeBackend::paged_attention`].
    pub(super) fn attend(
        &self,
        y: &mut Tensor<Self>,
        queries: &Tensor<Self>,
        batch: &DeviceBatch<L>,
        (cache, layer): (&Cache<L>, usize),
    ) -> Result<()> {
        let (heads, size) = (&cache.heads, cache.heads.size);
        queries.expect("paged_attention", [batch.tokens, heads.width()], self.half);
        self.reserve(y, [batch.tokens, heads.width()], self.half)?;
        let (keys, values) = cache.layer(layer);
        let a = AttentionArgs { keys, values, ..self.attention_args(y, queries, batch, cache) };
        let threads = (WARPS * 32) as u32;
        for first in (0..batch.tile_count).step_by(MAX_ROWS) {
            let part = AttentionArgs { tiles: a.tiles + 8 * first as u64, ..a };
            let grid = [heads.count, MAX_ROWS.min(batch.tile_count - first), 1];
            if self.hopper() {
                let kernel = format!("attention_hopper_{}_{size}", self.suffix());
                // all of the cache is one matrix, of which blocks of positions are copied
                let row = |at: u64| ((at - cache.memory.at) / (2 * size as u64)) as u32;
                let rows = cache.memory.bytes / (2 * size);
                let tiles = TensorMapConfig::tiles(cache.memory.at, rows, size, BLOCK);
                let map = self.launcher.tensor_map(&tiles)?;
                let args = Args::new().with(map).with(row(keys)).with(row(values)).with(part);
                let tile = STEP * HOPPER_COLUMNS * 2;
                let shared = HOPPER_STAGES * (2 * size.div_ceil(HOPPER_COLUMNS) * tile + 2 * 8);
                self.launch(&kernel, grid, HOPPER_THREADS, shared, args)?;
            } else {
                let kernel = format!("attention_prefill_{}_{size}", self.suffix());
                let shared = 2 * 2 * STEP * (2 * size + 16);
                self.launch(&kernel, grid, threads, shared, Args::new().with(part))?;
            }
        }
        if batch.single_count == 0 {
            return Ok(());
        }
        let splits = splits(batch.longest_single);
        let sums = self.shared_sums(cache, batch.single_count.min(MAX_ROWS), splits)?;
        let kernel = format!("attention_decode_{}_{size}", self.suffix());
        let shared = (WARPS * (size + 2) + 1) * 4;
        for first in (0..batch.single_count).step_by(MAX_ROWS) {
            let part =
                AttentionArgs { tokens: a.tokens + 4 * first as u64, ..a.shared(splits, sums) };
            let grid = [heads.count, MAX_ROWS.min(batch.single_count - first), splits];
            self.launch(&kernel, grid, threads, shared, Args::new().with(part))?;
        }
        Ok(())
    }
}
