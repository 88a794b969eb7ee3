//! Attention over the paged KV cache with ALiBi.
//!
//! Per layer, keys and values lie as `[block, head, position in block, head size]`. A query walks
//! its blocks with an online softmax: sixteen scores at once (one block is one vector), then
//! sixteen rows of values. The order of sums depends on absolute positions alone, so chunked
//! prefill, decoding and any batch give the same bits.

use super::Cpu;
use super::rows;
use super::simd::{Element, Isa, Simd, prefetch};
use super::threads::Disjoint;
use crate::error::{Error, Result};
use crate::ops::{BLOCK, Batch, Heads, Span};
use crate::simd_fn;
use crate::tensor::DType;
use half::{bf16, f16};
use std::ops::Range;

/// Largest head size; BLOOM's are 64 to 128.
const MAX_HEAD: usize = 512;
/// Queries of one task.
const QUERIES: usize = 16;
/// Heads of one task, if its sequence has one query: they lie together in the cache.
const HEADS: usize = 4;
/// Queries that read keys and values together.
const TOGETHER: usize = 4;

/// Keys and values of all layers.
pub struct KvCache {
    heads: Heads,
    blocks: KvData,
}

enum KvData {
    F32(KvBlocks<f32>),
    F16(KvBlocks<f16>),
    Bf16(KvBlocks<bf16>),
}

/// The blocks of all layers, with elements stored as `E`.
pub struct KvBlocks<E> {
    /// `[layer][key or value]`, each `[block, head, position, head size]`.
    data: Vec<[Vec<E>; 2]>,
    /// Elements of a block in one layer.
    block: usize,
}

impl KvCache {
    /// Memory for `blocks` blocks; pages that are never written take none. 8-bit models cache in
    /// bf16.
    pub fn new(dtype: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<KvCache> {
        if heads.size > MAX_HEAD {
            return Err(Error::invalid(format!(
                "head size {} is too large; at most {MAX_HEAD}",
                heads.size
            )));
        }
        fn make<E: bytemuck::Zeroable + Clone>(
            layers: usize,
            block: usize,
            blocks: usize,
        ) -> Result<KvBlocks<E>> {
            let one = || -> Result<Vec<E>> {
                // zeroed by the system, page by page as they are used
                blocks
                    .checked_mul(block)
                    .and_then(|len| bytemuck::allocation::try_zeroed_vec(len).ok())
                    .ok_or_else(|| {
                        let bytes = blocks as f64 * block as f64 * size_of::<E>() as f64;
                        Error::invalid(format!(
                            "no memory for a KV cache of {:.1} GB a layer; lower --cache-tokens",
                            2.0 * bytes / 1e9
                        ))
                    })
            };
            let data = (0..layers).map(|_| Ok([one()?, one()?])).collect::<Result<_>>()?;
            Ok(KvBlocks { data, block })
        }
        let block = heads.count * BLOCK * heads.size;
        let blocks = match dtype {
            DType::F32 => KvData::F32(make(layers, block, blocks)?),
            DType::F16 => KvData::F16(make(layers, block, blocks)?),
            DType::Bf16 | DType::Int8 => KvData::Bf16(make(layers, block, blocks)?),
        };
        Ok(KvCache { heads: heads.clone(), blocks })
    }

    /// Overwrites block `to` with the keys and values of block `from`, in all layers.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        fn copy<E: Copy>(b: &mut KvBlocks<E>, from: usize, to: usize) {
            for part in b.data.iter_mut().flatten() {
                part.copy_within(from * b.block..(from + 1) * b.block, to * b.block);
            }
        }
        let (from, to) = (from as usize, to as usize);
        match &mut self.blocks {
            KvData::F32(b) => copy(b, from, to),
            KvData::F16(b) => copy(b, from, to),
            KvData::Bf16(b) => copy(b, from, to),
        }
    }

    /// The heads of each layer.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// Writes the keys and values of `qkv` = `[tokens, head, 3, head size]`.
    pub fn write(&mut self, cpu: &Cpu, batch: &Batch, layer: usize, qkv: &[f32]) {
        let heads = &self.heads;
        match &mut self.blocks {
            KvData::F32(b) => b.write(cpu, batch, layer, heads, qkv),
            KvData::F16(b) => b.write(cpu, batch, layer, heads, qkv),
            KvData::Bf16(b) => b.write(cpu, batch, layer, heads, qkv),
        }
    }

    /// Attention of the queries of `qkv`; see [`crate::ops::DecodeBackend::paged_attention`].
    pub fn attend(&self, cpu: &Cpu, batch: &Batch, layer: usize, qkv: &[f32], out: &mut [f32]) {
        let inputs = AttentionInputs { batch, heads: &self.heads, qkv };
        match &self.blocks {
            KvData::F32(b) => b.attend(cpu, layer, &inputs, out),
            KvData::F16(b) => b.attend(cpu, layer, &inputs, out),
            KvData::Bf16(b) => b.attend(cpu, layer, &inputs, out),
        }
    }
}

/// Queries of a batch.
struct AttentionInputs<'a> {
    batch: &'a Batch,
    heads: &'a Heads,
    /// `[tokens, head, 3, head size]`.
    qkv: &'a [f32],
}

impl<E: Attend> KvBlocks<E> {
    fn write(&mut self, cpu: &Cpu, batch: &Batch, layer: usize, heads: &Heads, qkv: &[f32]) {
        let (n, size) = (heads.count, heads.size);
        assert_eq!(qkv.len(), batch.ids.len() * 3 * n * size);
        let block = self.block;
        let [keys, values] = &mut self.data[layer];
        let (k, v) = (Disjoint::new(keys), Disjoint::new(values));
        // a decoding batch has one token a span: spans are the tasks; a long prefill has few spans:
        // tasks are heads
        cpu.threads.run(batch.spans.len() * n, |task| {
            let (span, head) = (&batch.spans[task / n], task % n);
            for i in 0..span.len {
                let position = span.past + i;
                let at = span.blocks[position / BLOCK] as usize * block
                    + (head * BLOCK + position % BLOCK) * size;
                let from = ((span.start + i) * n + head) * 3 * size;
                for (to, part) in [(&k, 1), (&v, 2)] {
                    // SAFETY: a position of a head belongs to one span: blocks being written are
                    // never shared.
                    let to = unsafe { to.slice(at..at + size) };
                    let from = &qkv[from + part * size..from + (part + 1) * size];
                    E::convert(cpu.isa, from, to);
                }
            }
        });
    }

    fn attend(&self, cpu: &Cpu, layer: usize, inputs: &AttentionInputs, out: &mut [f32]) {
        let AttentionInputs { batch, heads, qkv } = *inputs;
        let (n, size, block) = (heads.count, heads.size, self.block);
        let [keys, values] = &self.data[layer];
        // some queries of a sequence, and some heads
        let mut tasks: Vec<(&Span, usize, Range<usize>)> = Vec::new();
        for span in &batch.spans {
            let together = if span.len == 1 { HEADS } else { 1 };
            for first in (0..span.len).step_by(QUERIES) {
                tasks.extend(
                    (0..n).step_by(together).map(|h| (span, first, h..(h + together).min(n))),
                );
            }
        }
        let out = Disjoint::new(out);
        let attend = |span: &Span, first: usize, head: usize| {
            let view = HeadView {
                keys,
                values,
                blocks: &span.blocks,
                stride: block,
                head: head * BLOCK * size,
                size,
            };
            let end = (first + QUERIES).min(span.len);
            let mut i = first;
            while i < end {
                // queries of one block of positions have the same whole blocks before them
                let same_block = BLOCK - (span.past + i) % BLOCK;
                let count = if same_block.min(end - i) >= TOGETHER { TOGETHER } else { 1 };
                let token = span.start + i;
                let stride = n * size;
                let at = token * stride + head * size;
                let q = &qkv[(token * n + head) * 3 * size..][..((count - 1) * n * 3 + 1) * size];
                // SAFETY: one task writes this head of these tokens, and nothing of what lies
                // between.
                let out: [&mut [f32]; TOGETHER] = std::array::from_fn(|j| {
                    let at = at + j * stride;
                    // SAFETY: see above.
                    if j < count { unsafe { out.slice(at..at + size) } } else { &mut [] }
                });
                let queries = Queries { q, stride: 3 * n * size, count, position: span.past + i };
                E::attend(cpu.isa, &queries, heads.slopes[head], &view, out);
                i += count;
            }
        };
        cpu.threads.run(tasks.len(), |task| {
            let (span, first, ref heads) = tasks[task];
            heads.clone().for_each(|head| attend(span, first, head));
        });
    }
}

/// One head of one sequence in the cache.
pub struct HeadView<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    blocks: &'a [u32],
    /// Elements from one block to the next, and from a block's start to this head.
    stride: usize,
    head: usize,
    size: usize,
}

/// One head of one or `TOGETHER` queries at consecutive positions, all in one block of positions.
pub struct Queries<'a> {
    q: &'a [f32],
    /// Elements from one query to the next.
    stride: usize,
    count: usize,
    /// Of the first.
    position: usize,
}

type Outputs<'a> = [&'a mut [f32]; TOGETHER];

/// A type that keys and values are stored as.
pub trait Attend: Element {
    /// Writes f32 in this type.
    fn convert(isa: Isa, x: &[f32], out: &mut [Self]);

    /// Attention of the queries, each over all positions up to its own.
    fn attend(isa: Isa, queries: &Queries, slope: f32, view: &HeadView<Self>, out: Outputs);
}

macro_rules! attend {
    ($e:ty, $name:ident, $convert:path) => {
        simd_fn! {
            fn $name<S>(queries: &Queries, slope: f32, view: &HeadView<$e>, out: Outputs) {
                attend::<S, $e>(queries, slope, view, out)
            }
        }
        impl Attend for $e {
            fn convert(isa: Isa, x: &[f32], out: &mut [Self]) {
                $convert(isa, x, out)
            }
            fn attend(
                isa: Isa,
                queries: &Queries,
                slope: f32,
                view: &HeadView<Self>,
                out: Outputs,
            ) {
                $name(isa, queries, slope, view, out)
            }
        }
    };
}
attend!(f32, attend_f32, rows::f32_to_f32);
attend!(f16, attend_f16, rows::f32_to_f16);
attend!(bf16, attend_bf16, rows::f32_to_bf16);

/// A query's running softmax: the largest score, and the lanes' sums of exponentials.
#[derive(Clone, Copy)]
struct SoftmaxStats<S: Simd> {
    max: f32,
    sum_exp: S::V,
}

/// # Safety
/// Needs the instruction set of `S`.
#[inline(always)]
unsafe fn attend<S: Simd, E: Element>(
    queries: &Queries,
    slope: f32,
    view: &HeadView<E>,
    mut out: Outputs,
) {
    let Queries { q, stride, count, position } = *queries;
    let mut state =
        [SoftmaxStats::<S> { max: f32::NEG_INFINITY, sum_exp: S::splat(0.0) }; TOGETHER];
    for out in &mut out {
        out.fill(0.0);
    }
    let whole = position / BLOCK;
    let mut scores = [[0f32; BLOCK]; TOGETHER];
    for (b, &index) in view.blocks[..=whole].iter().enumerate() {
        let at = index as usize * view.stride + view.head;
        let keys = view.keys[at..at + BLOCK * view.size].as_ptr();
        let values = view.values[at..at + BLOCK * view.size].as_ptr();
        if count == 1 {
            // a decoding query reads each of them once: they come from memory while the keys
            // before are at work
            let next = view.blocks.get(b + 1).filter(|_| b < whole);
            let next = next.map_or(keys.wrapping_add(BLOCK * view.size), |&index| {
                view.keys.as_ptr().wrapping_add(index as usize * view.stride + view.head)
            });
            for i in (0..BLOCK * view.size).step_by(64 / size_of::<E>()) {
                prefetch::<_, true>(values.wrapping_add(i));
                prefetch::<_, true>(next.wrapping_add(i));
            }
        }
        if S::REGISTERS >= 32 && count == TOGETHER && b < whole {
            dots_together::<S, E>(q.as_ptr(), stride, keys, view.size, &mut scores);
            let mut weights = [[0f32; BLOCK]; TOGETHER];
            for j in 0..TOGETHER {
                let block = KeyBlock { index: b, position: position + j, slope, size: view.size };
                weights[j] = online_softmax::<S>(&scores[j], block, &mut state[j], out[j]);
            }
            values_together::<S, E>(&weights, values, view.size, &mut out);
        } else {
            for j in 0..count {
                let block = KeyBlock { index: b, position: position + j, slope, size: view.size };
                dots::<S, E>(q.as_ptr().add(j * stride), keys, view.size, &mut scores[j]);
                let weights = online_softmax::<S>(&scores[j], block, &mut state[j], out[j]);
                add_values::<S, E>(&weights[..block.valid()], values, view.size, out[j]);
            }
        }
    }
    for j in 0..count {
        let inverse = 1.0 / S::sum(state[j].sum_exp);
        for o in out[j].iter_mut() {
            *o *= inverse;
        }
    }
}

/// A query and one block of keys.
#[derive(Clone, Copy)]
struct KeyBlock {
    index: usize,
    position: usize,
    slope: f32,
    size: usize,
}

impl KeyBlock {
    /// Keys of the block that the query sees.
    #[inline(always)]
    fn valid(self) -> usize {
        (self.position + 1 - self.index * BLOCK).min(BLOCK)
    }
}

/// Products of a query with the sixteen keys of a block.
///
/// # Safety
/// Needs the instruction set of `S`, a query of `size` and keys of `[16, size]` elements.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element>(
    q: *const f32,
    keys: *const E,
    size: usize,
    scores: &mut [f32; BLOCK],
) {
    let full = size / 16 * 16;
    let rest = size - full;
    let mut dots = [S::splat(0.0); BLOCK];
    for d in (0..full).step_by(16) {
        let q = S::load(q.add(d));
        for (j, dot) in dots.iter_mut().enumerate() {
            *dot = S::fma(q, E::load::<S>(keys.add(j * size + d)), *dot);
        }
    }
    if rest > 0 {
        let q = S::load_partial(q.add(full), rest);
        for (j, dot) in dots.iter_mut().enumerate() {
            *dot = S::fma(q, E::load_partial::<S>(keys.add(j * size + full), rest), *dot);
        }
    }
    S::store(scores.as_mut_ptr(), S::sum16(&dots));
}

/// [`dots`] for [`TOGETHER`] queries; each key is read once. Every sum has the order that it has in
/// [`dots`].
///
/// # Safety
/// As for [`dots`], with queries `stride` elements apart.
#[inline(always)]
unsafe fn dots_together<S: Simd, E: Element>(
    q: *const f32,
    stride: usize,
    keys: *const E,
    size: usize,
    scores: &mut [[f32; BLOCK]; TOGETHER],
) {
    let full = size / 16 * 16;
    let rest = size - full;
    for first in (0..BLOCK).step_by(4) {
        let keys = keys.add(first * size);
        // query by query, four keys each
        let mut dots = [S::splat(0.0); 16];
        for d in (0..full).step_by(16) {
            let k0 = E::load::<S>(keys.add(d));
            let k1 = E::load::<S>(keys.add(size + d));
            let k2 = E::load::<S>(keys.add(2 * size + d));
            let k3 = E::load::<S>(keys.add(3 * size + d));
            for (j, dots) in dots.chunks_exact_mut(4).enumerate() {
                let q = S::load(q.add(j * stride + d));
                dots[0] = S::fma(q, k0, dots[0]);
                dots[1] = S::fma(q, k1, dots[1]);
                dots[2] = S::fma(q, k2, dots[2]);
                dots[3] = S::fma(q, k3, dots[3]);
            }
        }
        if rest > 0 {
            for (j, dots) in dots.chunks_exact_mut(4).enumerate() {
                let q = S::load_partial(q.add(j * stride + full), rest);
                for (k, dot) in dots.iter_mut().enumerate() {
                    *dot = S::fma(q, E::load_partial::<S>(keys.add(k * size + full), rest), *dot);
                }
            }
        }
        let mut sums = [0f32; 16];
        S::store(sums.as_mut_ptr(), S::sum16(&dots));
        for (scores, sums) in scores.iter_mut().zip(sums.chunks_exact(4)) {
            scores[first..first + 4].copy_from_slice(sums);
        }
    }
}

/// Turns a block's scores into weights of its values, and rescales what was summed before if a
/// score is larger than all earlier ones.
///
/// # Safety
/// Needs the instruction set of `S`.
#[inline(always)]
unsafe fn online_softmax<S: Simd>(
    scores: &[f32; BLOCK],
    block: KeyBlock,
    state: &mut SoftmaxStats<S>,
    out: &mut [f32],
) -> [f32; BLOCK] {
    const LANE: [f32; BLOCK] =
        [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    let scale = 1.0 / (block.size as f32).sqrt();
    let valid = block.valid();
    // scaled scores plus slope * (key position - query position)
    let first = (block.index * BLOCK) as f32 - block.position as f32;
    let distance = S::add(S::load(LANE.as_ptr()), S::splat(first));
    let bias = S::mul(distance, S::splat(block.slope));
    let scores = S::fma(S::load(scores.as_ptr()), S::splat(scale), bias);
    // in registers: what is stored in part and loaded whole has to wait for memory
    let scores = S::first(scores, valid, S::splat(f32::NEG_INFINITY));
    let here = S::max_lane(scores);
    if here > state.max {
        if block.index > 0 {
            let rescale = (state.max - here).exp();
            state.sum_exp = S::mul(state.sum_exp, S::splat(rescale));
            for o in out.iter_mut() {
                *o *= rescale;
            }
        }
        state.max = here;
    }
    let exps = S::first(S::exp(S::sub(scores, S::splat(state.max))), valid, S::splat(0.0));
    state.sum_exp = S::add(state.sum_exp, exps);
    let mut weights = [0.0; BLOCK];
    S::store(weights.as_mut_ptr(), exps);
    weights
}

/// Adds the weighted rows of `values` to `out`.
///
/// # Safety
/// Needs the instruction set of `S` and values of `[16, size]` elements.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Element>(
    weights: &[f32],
    values: *const E,
    size: usize,
    out: &mut [f32],
) {
    let full = size / 16 * 16;
    let rest = size - full;
    for d in (0..full).step_by(16) {
        let mut o = S::load(out.as_ptr().add(d));
        for (j, w) in weights.iter().enumerate() {
            o = S::fma(S::splat(*w), E::load::<S>(values.add(j * size + d)), o);
        }
        S::store(out.as_mut_ptr().add(d), o);
    }
    if rest > 0 {
        let mut o = S::load_partial(out.as_ptr().add(full), rest);
        for (j, w) in weights.iter().enumerate() {
            o = S::fma(S::splat(*w), E::load_partial::<S>(values.add(j * size + full), rest), o);
        }
        S::store_partial(out.as_mut_ptr().add(full), o, rest);
    }
}

/// [`add_values`] for [`TOGETHER`] queries that see the whole block; each value is read once.
///
/// # Safety
/// As for [`add_values`].
#[inline(always)]
unsafe fn values_together<S: Simd, E: Element>(
    weights: &[[f32; BLOCK]; TOGETHER],
    values: *const E,
    size: usize,
    out: &mut Outputs,
) {
    let full = size / 16 * 16;
    for d in (0..full).step_by(16) {
        let mut o = [S::splat(0.0); TOGETHER];
        for (o, out) in o.iter_mut().zip(out.iter()) {
            *o = S::load(out.as_ptr().add(d));
        }
        for j in 0..BLOCK {
            let v = E::load::<S>(values.add(j * size + d));
            for (o, w) in o.iter_mut().zip(weights) {
                *o = S::fma(S::splat(w[j]), v, *o);
            }
        }
        for (o, out) in o.iter().zip(out.iter_mut()) {
            S::store(out.as_mut_ptr().add(d), *o);
        }
    }
    let rest = size - full;
    if rest > 0 {
        for (weights, out) in weights.iter().zip(out.iter_mut()) {
            let mut o = S::load_partial(out.as_ptr().add(full), rest);
            for (j, w) in weights.iter().enumerate() {
                o = S::fma(
                    S::splat(*w),
                    E::load_partial::<S>(values.add(j * size + full), rest),
                    o,
                );
            }
            S::store_partial(out.as_mut_ptr().add(full), o, rest);
        }
    }
}
