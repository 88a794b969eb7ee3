//! Attention over the paged KV cache with ALiBi.
//!
//! Per layer, keys and values lie as `[block, head, position in block, head size]`. A query walks its blocks with an
//! online softmax: sixteen scores at once (one block is one vector), then sixteen rows of values. The order of
//! sums depends on absolute positions alone, so chunked prefill, decoding and any batch give the same bits.

use super::Cpu;
use super::product::Element;
use super::rows;
use super::threads::Disjoint;
use crate::error::{Error, Result};
use crate::ops::{BLOCK, Batch, Heads, Span};
use crate::simd_fn;
use crate::tensor::DType;
use half::{bf16, f16};

/// Largest head size; BLOOM's are 64 to 128.
const MAX_HEAD: usize = 512;
/// Queries of one task.
const QUERIES: usize = 16;

/// Keys and values of all layers.
pub enum Cache {
    F32(Blocks<f32>),
    F16(Blocks<f16>),
    Bf16(Blocks<bf16>),
}

pub struct Blocks<E> {
    /// `[layer][key or value]`, each `[block, head, position, head size]`.
    data: Vec<[Vec<E>; 2]>,
    /// Elements of a block in one layer.
    block: usize,
}

impl Cache {
    /// Memory for `blocks` blocks; pages that are never written take none. 8-bit models cache in bf16.
    pub fn new(dtype: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<Cache> {
        if heads.size > MAX_HEAD {
            return Err(Error::invalid(format!("head size {} is too large; at most {MAX_HEAD}", heads.size)));
        }
        fn make<E: bytemuck::Zeroable + Clone>(layers: usize, block: usize, blocks: usize) -> Result<Blocks<E>> {
            let one = || -> Result<Vec<E>> {
                let mut v: Vec<E> = Vec::new();
                let bytes = blocks * block * size_of::<E>();
                v.try_reserve_exact(blocks * block)
                    .map_err(|_| Error::invalid(format!("no memory for a KV cache of {} MiB a layer", bytes >> 19)))?;
                drop(v);
                Ok(bytemuck::zeroed_vec(blocks * block))
            };
            let data = (0..layers).map(|_| Ok([one()?, one()?])).collect::<Result<_>>()?;
            Ok(Blocks { data, block })
        }
        let block = heads.count * BLOCK * heads.size;
        Ok(match dtype {
            DType::F32 => Cache::F32(make(layers, block, blocks)?),
            DType::F16 => Cache::F16(make(layers, block, blocks)?),
            DType::Bf16 | DType::Int8 => Cache::Bf16(make(layers, block, blocks)?),
        })
    }

    pub fn copy_block(&mut self, from: u32, to: u32) {
        fn copy<E: Copy>(b: &mut Blocks<E>, from: usize, to: usize) {
            for part in b.data.iter_mut().flatten() {
                part.copy_within(from * b.block..(from + 1) * b.block, to * b.block);
            }
        }
        let (from, to) = (from as usize, to as usize);
        match self {
            Cache::F32(b) => copy(b, from, to),
            Cache::F16(b) => copy(b, from, to),
            Cache::Bf16(b) => copy(b, from, to),
        }
    }

    /// Writes the keys and values of `qkv` and computes `out`; see [`crate::ops::Backend::attention`].
    pub fn attend(&mut self, cpu: &Cpu, batch: &Batch, layer: usize, heads: &Heads, qkv: &[f32], out: &mut [f32]) {
        match self {
            Cache::F32(b) => b.attend(cpu, batch, layer, heads, qkv, out),
            Cache::F16(b) => b.attend(cpu, batch, layer, heads, qkv, out),
            Cache::Bf16(b) => b.attend(cpu, batch, layer, heads, qkv, out),
        }
    }
}

impl<E: Attend> Blocks<E> {
    fn attend(&mut self, cpu: &Cpu, batch: &Batch, layer: usize, heads: &Heads, qkv: &[f32], out: &mut [f32]) {
        let (n, size) = (heads.count, heads.size);
        assert_eq!(qkv.len(), batch.ids.len() * 3 * n * size);
        let block = self.block;
        let [keys, values] = &mut self.data[layer];
        let (k, v) = (Disjoint::new(keys), Disjoint::new(values));
        // a decoding batch has one token a span: spans are the tasks; a long prefill has few spans: tasks are heads
        cpu.threads.run(batch.spans.len() * n, |task| {
            let (span, head) = (&batch.spans[task / n], task % n);
            for i in 0..span.len {
                let position = span.past + i;
                let at = span.blocks[position / BLOCK] as usize * block + (head * BLOCK + position % BLOCK) * size;
                let from = ((span.start + i) * n + head) * 3 * size;
                for (to, part) in [(&k, 1), (&v, 2)] {
                    // SAFETY: a position of a head belongs to one span: blocks being written are never shared.
                    let to = unsafe { to.slice(at..at + size) };
                    let from = &qkv[from + part * size..from + (part + 1) * size];
                    E::narrow(cpu.isa, from, to);
                }
            }
        });
        let (keys, values) = (&*keys, &*values);
        let chunks: Vec<(&Span, usize)> =
            batch.spans.iter().flat_map(|s| (0..s.len).step_by(QUERIES).map(move |i| (s, i))).collect();
        let out = Disjoint::new(out);
        cpu.threads.run(chunks.len() * n, |task| {
            let ((span, first), head) = (chunks[task / n], task % n);
            let view = View { keys, values, blocks: &span.blocks, stride: block, head: head * BLOCK * size, size };
            for i in first..(first + QUERIES).min(span.len) {
                let token = span.start + i;
                let q = &qkv[(token * n + head) * 3 * size..][..size];
                // SAFETY: one task writes this head of this token.
                let out = unsafe { out.slice((token * n + head) * size..(token * n + head + 1) * size) };
                E::attend(cpu.isa, q, span.past + i, heads.slopes[head], &view, out);
            }
        });
    }
}

/// One head of one sequence in the cache.
pub struct View<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    blocks: &'a [u32],
    /// Elements from one block to the next, and from a block's start to this head.
    stride: usize,
    head: usize,
    size: usize,
}

pub trait Attend: Element {
    /// Writes f32 in this type.
    fn narrow(isa: super::simd::Isa, x: &[f32], out: &mut [Self]);

    /// Attention of the query at `position`.
    fn attend(isa: super::simd::Isa, q: &[f32], position: usize, slope: f32, view: &View<Self>, out: &mut [f32]);
}

macro_rules! attend {
    ($e:ty, $name:ident, $narrow:path) => {
        simd_fn! {
            fn $name<S>(q: &[f32], position: usize, slope: f32, view: &View<$e>, out: &mut [f32]) {
                attend_one::<S, $e>(q, position, slope, view, out)
            }
        }
        impl Attend for $e {
            fn narrow(isa: super::simd::Isa, x: &[f32], out: &mut [Self]) {
                $narrow(isa, x, out)
            }
            fn attend(isa: super::simd::Isa, q: &[f32], position: usize, slope: f32, view: &View<Self>, out: &mut [f32]) {
                $name(isa, q, position, slope, view, out)
            }
        }
    };
}
attend!(f32, attend_f32, rows::narrow_f32);
attend!(f16, attend_f16, rows::narrow_f16);
attend!(bf16, attend_bf16, rows::narrow_bf16);

/// # Safety
/// Needs the instruction set of `S`.
#[inline(always)]
unsafe fn attend_one<S: super::simd::Simd, E: Element>(
    q: &[f32],
    position: usize,
    slope: f32,
    view: &View<E>,
    out: &mut [f32],
) {
    let size = view.size;
    let full = size / 16 * 16;
    let rest = size - full;
    let scale = 1.0 / (size as f32).sqrt();
    let mut lane_numbers = [0f32; BLOCK];
    lane_numbers.iter_mut().enumerate().for_each(|(i, l)| *l = i as f32);
    unsafe {
        let lanes = S::load(lane_numbers.as_ptr());
        let mut most = f32::NEG_INFINITY;
        let mut sum = S::splat(0.0);
        out.fill(0.0);
        let blocks = position / BLOCK + 1;
        for (b, &index) in view.blocks[..blocks].iter().enumerate() {
            let at = index as usize * view.stride + view.head;
            let keys = view.keys[at..at + BLOCK * size].as_ptr();
            let values = view.values[at..at + BLOCK * size].as_ptr();
            let valid = (position + 1 - b * BLOCK).min(BLOCK);
            let mut dots = [S::splat(0.0); BLOCK];
            for d in (0..full).step_by(16) {
                let q = S::load(q.as_ptr().add(d));
                for (j, dot) in dots.iter_mut().enumerate() {
                    *dot = S::fma(q, E::load::<S>(keys.add(j * size + d)), *dot);
                }
            }
            if rest > 0 {
                let q = S::load_partial(q.as_ptr().add(full), rest);
                for (j, dot) in dots.iter_mut().enumerate() {
                    *dot = S::fma(q, E::load_partial::<S>(keys.add(j * size + full), rest), *dot);
                }
            }
            // scaled scores plus slope * (key position - query position)
            let distance = S::add(lanes, S::splat(b as f32 * BLOCK as f32 - position as f32));
            let scores = S::fma(S::sum16(&dots), S::splat(scale), S::mul(distance, S::splat(slope)));
            let mut weights = [f32::NEG_INFINITY; BLOCK];
            S::store_partial(weights.as_mut_ptr(), scores, valid);
            let here = S::max_lane(S::load(weights.as_ptr()));
            if here > most {
                if b > 0 {
                    let shrink = (most - here).exp();
                    sum = S::mul(sum, S::splat(shrink));
                    out.iter_mut().for_each(|o| *o *= shrink);
                }
                most = here;
            }
            let exps = S::exp(S::sub(S::load(weights.as_ptr()), S::splat(most)));
            weights = [0.0; BLOCK];
            S::store_partial(weights.as_mut_ptr(), exps, valid);
            sum = S::add(sum, S::load(weights.as_ptr()));
            for d in (0..full).step_by(16) {
                let mut o = S::load(out.as_ptr().add(d));
                for (j, w) in weights.iter().enumerate().take(valid) {
                    o = S::fma(S::splat(*w), E::load::<S>(values.add(j * size + d)), o);
                }
                S::store(out.as_mut_ptr().add(d), o);
            }
            if rest > 0 {
                let mut o = S::load_partial(out.as_ptr().add(full), rest);
                for (j, w) in weights.iter().enumerate().take(valid) {
                    o = S::fma(S::splat(*w), E::load_partial::<S>(values.add(j * size + full), rest), o);
                }
                S::store_partial(out.as_mut_ptr().add(full), o, rest);
            }
        }
        let inverse = 1.0 / S::sum(sum);
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}
