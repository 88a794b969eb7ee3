//! The KV cache and attention.

use super::{Buffer, Cuda, Pass};
use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use crate::ops::{BLOCK, Heads};
use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;
use std::rc::Rc;

/// As in `kernels/attention.cu`.
const WARPS: usize = 4;
const SPLIT: usize = 512;
/// Head sizes that there are kernels for.
pub(super) const SIZES: [usize; 5] = [32, 64, 80, 96, 128];
/// Most queries of one launch: a grid's second dimension ends at 65,535.
const QUERIES: usize = 32768;

/// Keys and values of all layers: `[layer][keys or values][block, head, position, head size]` in 16 bits.
pub struct Cache<L: Launcher> {
    pub(super) memory: Memory<L>,
    pub(super) layers: usize,
    pub(super) blocks: usize,
    /// Bytes of a block's keys in one layer.
    pub(super) block_bytes: usize,
    slopes: Memory<L>,
    /// Of long sequences that several blocks of threads share: partial results, and how many are there.
    partials: RefCell<Option<Memory<L>>>,
    counters: RefCell<Option<Memory<L>>>,
}

/// `Attention` of `kernels/attention.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Attention {
    out: u64,
    q: u64,
    keys: u64,
    values: u64,
    spans: u64,
    positions: u64,
    tables: u64,
    slopes: u64,
    partials: u64,
    counters: u64,
    heads: u32,
    table_width: u32,
    splits: u32,
    unused: u32,
}

impl<L: Launcher> Cache<L> {
    pub(super) fn new(launcher: &Rc<L>, layers: usize, heads: &Heads, blocks: usize) -> Result<Cache<L>> {
        assert!(SIZES.contains(&heads.size), "see `Cuda::supports`");
        let block_bytes = heads.count * BLOCK * heads.size * 2;
        Ok(Cache {
            // positions of a block that are not written yet are loaded with it
            memory: Memory::zeroed(launcher, layers * 2 * blocks * block_bytes)?,
            layers,
            blocks,
            block_bytes,
            slopes: Memory::from_bytes(launcher, bytemuck::cast_slice(&heads.slopes))?,
            partials: RefCell::default(),
            counters: RefCell::default(),
        })
    }

    /// Where a layer's keys and values begin.
    pub(super) fn layer(&self, layer: usize) -> (u64, u64) {
        let part = (self.blocks * self.block_bytes) as u64;
        let keys = self.memory.at + 2 * layer as u64 * part;
        (keys, keys + part)
    }
}

impl<L: Launcher> Cuda<L> {
    pub(super) fn attend(
        &self,
        pass: &Pass<L>,
        heads: &Heads,
        queries: &Buffer<L>,
        cache: &Cache<L>,
        layer: usize,
        out: &mut Buffer<L>,
    ) -> Result<()> {
        let (tokens, size) = (pass.tokens, heads.size);
        self.reserve(out, tokens, heads.count * size, true)?;
        let splits = pass.longest.div_ceil(SPLIT);
        let (keys, values) = cache.layer(layer);
        let mut a = Attention {
            out: out.at(),
            q: queries.at(),
            keys,
            values,
            spans: pass.spans,
            positions: pass.positions,
            tables: pass.tables,
            slopes: cache.slopes.at,
            heads: heads.count as u32,
            table_width: pass.table_width as u32,
            splits: splits as u32,
            ..Attention::zeroed()
        };
        if splits > 1 {
            let pairs = tokens.min(QUERIES) * heads.count;
            let mut partials = cache.partials.borrow_mut();
            self.grow(&mut partials, pairs * splits * (size + 2) * 4)?;
            let mut counters = cache.counters.borrow_mut();
            if counters.as_ref().is_none_or(|m| m.bytes < pairs * 4) {
                *counters = Some(Memory::zeroed(&self.launcher, pairs.next_power_of_two() * 4)?);
            }
            a.partials = partials.as_ref().map_or(0, |m| m.at);
            a.counters = counters.as_ref().map_or(0, |m| m.at);
        }
        let kernel = format!("attend_{}_{size}", self.suffix());
        let shared = (WARPS * (size + 2) + 1) * 4;
        for first in (0..tokens).step_by(QUERIES) {
            let count = QUERIES.min(tokens - first);
            let f = first as u64;
            let row = (heads.count * size * 2) as u64;
            let part = Attention {
                out: a.out + f * row,
                q: a.q + f * row,
                spans: a.spans + 4 * f,
                positions: a.positions + 4 * f,
                ..a
            };
            self.launch(&kernel, [heads.count, count, splits], (WARPS * 32) as u32, shared, Args::new().with(part))?;
        }
        Ok(())
    }
}
