//! y = x W^T for inference: weights `[outputs, inputs]` in the type and place they are stored in.
//! Those that instructions for dot products take (`bf16.rs`, `int8.rs`) have kernels of their own,
//! `lanes.rs`.
//!
//! The others in dot-product form: lanes run along the inner dimension, so that mapped files are
//! read as they lie. A tile is 4 tokens by 6 rows of weights (24 vector sums in registers, 10 loads
//! for 24 multiply-adds). A task takes a panel of rows, whose chunk of `CHUNK` inner elements
//! stays in L1 while all tokens pass by it from L2: each weight is read from memory once a call. An
//! output's sum runs over lanes, then chunks, in an order that depends on the inner size alone: a
//! token's result is the same in every batch.

#[cfg(target_arch = "x86_64")]
mod bf16;
mod dot;
mod int8;
mod lanes;
mod weight;

pub use int8::quantize_offset;
pub use weight::CpuWeight;

use super::Cpu;
use super::simd::{Element, InstructionSet, prefetch};
use super::threads::Disjoint;
use crate::ops::Weight as _;
use dot::{Dot, Float};
use std::cell::RefCell;
use std::ops::Range;

/// Inner elements that are summed before the next chunk begins: six rows of it fit L1.
const CHUNK: usize = 2048;
/// Maximum weights and rows of one task: longer tasks would leave a thread waiting at the end.
const PANEL: usize = 96 * 2048;
const PANEL_ROWS: usize = 96;
/// Maximum tokens that pass a panel at once: their activations stay in L2.
const TOKENS: usize = 192;
/// Streams of weights of a pass of few tokens, and how many bytes ahead of use they are asked for.
/// Measured on Zen 4: one stream 85 % of the read bandwidth, two 98 %, six neighbouring rows 60 %.
const STREAMS: usize = 2;
const AHEAD: usize = 1024;
/// Activations are padded with zeros to a multiple of this many elements.
const PAD: usize = 64;

/// Receives finished outputs: the token, the first row of the panel, and its sums.
pub type StoreFn<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// Computes x W^T for `x` = `[tokens, inputs]`, and hands every token's outputs to `store`, panel
/// by panel.
pub fn gemm_nt(cpu: &Cpu, x: &[f32], weights: &CpuWeight, store: &StoreFn) {
    match weights {
        CpuWeight::F32(w) => float(cpu, x, w, weights, store),
        CpuWeight::F16(w) => float(cpu, x, w, weights, store),
        #[cfg(target_arch = "x86_64")]
        CpuWeight::Bf16Packed(w) => bf16::gemm_nt(cpu, x, w, store),
        CpuWeight::Bf16(w) => float(cpu, x, w, weights, store),
        CpuWeight::Int8(w) => int8::gemm_nt(cpu, x, w, store),
    }
}

fn float<E: Element + bytemuck::Pod>(
    cpu: &Cpu,
    x: &[f32],
    w: &weight::RowMajor<E>,
    shape: &CpuWeight,
    store: &StoreFn,
) {
    prepare(cpu, x, shape.cols(), |a, width| match cpu.isa.set() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => {
            use super::simd::Avx512;
            run::<Float<Avx512, E>>(
                cpu,
                panel_avx512::<Float<Avx512, E>>,
                a,
                width,
                &w.data,
                shape,
                store,
            )
        }
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => {
            use super::simd::Avx2;
            run::<Float<Avx2, E>>(
                cpu,
                panel_avx2::<Float<Avx2, E>>,
                a,
                width,
                &w.data,
                shape,
                store,
            )
        }
        _ => {
            use super::simd::Portable;
            run::<Float<Portable, E>>(
                cpu,
                panel::<Float<Portable, E>>,
                a,
                width,
                &w.data,
                shape,
                store,
            )
        }
    });
}

/// A cache line, which aligns prepared activations.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// Prepared activations, kept from call to call.
    static PREPARED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Passes the activations on with their row width: aligned, and padded with zeros.
fn prepare(cpu: &Cpu, x: &[f32], inputs: usize, then: impl FnOnce(&[f32], usize)) {
    let mut width = inputs.next_multiple_of(PAD);
    if (width * size_of::<f32>()).is_multiple_of(4096) {
        width += PAD; // rows a multiple of 4 KiB apart would fight for the same cache sets
    }
    let tokens = x.len() / inputs;
    PREPARED.with_borrow_mut(|lines| {
        let needed = (tokens * width * size_of::<f32>()).div_ceil(size_of::<Line>());
        if lines.len() < needed {
            lines.resize(needed, bytemuck::Zeroable::zeroed());
        }
        let a = &mut bytemuck::cast_slice_mut::<Line, f32>(&mut lines[..needed])[..tokens * width];
        let out = Disjoint::new(a);
        cpu.threads.run_ranges(tokens, 4, |r| {
            for t in r {
                // SAFETY: every token is one task's.
                let row = unsafe { out.slice(t * width..(t + 1) * width) };
                row[inputs..].fill(0.0);
                row[..inputs].copy_from_slice(&x[t * inputs..(t + 1) * inputs]);
            }
        });
        then(a, width);
    });
}

/// A panel's computation: `(weights, inputs, rows, activations, their width, tokens, sums [tokens,
/// rows])`.
type Panel<D> = unsafe fn(
    &[<D as Dot>::W],
    usize,
    Range<usize>,
    (&[<D as Dot>::A], usize),
    Range<usize>,
    &mut [f32],
);

thread_local! {
    /// Sums of a panel, kept from call to call.
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[allow(clippy::too_many_arguments)]
fn run<D: Dot>(
    cpu: &Cpu,
    panel: Panel<D>,
    a: &[D::A],
    width: usize,
    w: &[D::W],
    shape: &CpuWeight,
    store: &StoreFn,
) {
    let (rows, inputs) = (shape.rows(), shape.cols());
    let tokens = a.len() / width;
    assert_eq!(w.len(), rows * inputs);
    // panels small enough that the threads end together
    let share = rows.div_ceil(cpu.threads.count() * 8).next_multiple_of(6);
    let panel_rows = share.min((PANEL / inputs).next_multiple_of(6)).min(PANEL_ROWS);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..(first + TOKENS).min(tokens);
        cpu.threads.run(rows.div_ceil(panel_rows), |p| {
            let rows = p * panel_rows..((p + 1) * panel_rows).min(rows);
            let n = rows.len();
            SUMS.with_borrow_mut(|sums| {
                sums.clear();
                sums.resize(tokens.len() * n, 0.0);
                // SAFETY: the instruction set was matched with `cpu.isa`; sizes were checked above.
                unsafe { panel(w, inputs, rows.clone(), (a, width), tokens.clone(), sums) };
                for (t, sums) in tokens.clone().zip(sums.chunks_exact_mut(n)) {
                    store(t, rows.start, sums);
                }
            });
        });
    }
}

/// # Safety
/// Needs the instruction set of `D`; `rows` and `tokens` lie inside `w` and `a`, `sums` is zero.
#[inline(always)]
unsafe fn panel<D: Dot>(
    w: &[D::W],
    inputs: usize,
    rows: Range<usize>,
    (a, width): (&[D::A], usize),
    tokens: Range<usize>,
    sums: &mut [f32],
) {
    let n = rows.len();
    let (tile_m, tile_n) = if D::WIDE { (4, 6) } else { (2, 2) };
    // Where each row is read by one tile only, memory is the limit: few streams, each of
    // consecutive rows, are what it delivers fastest. Else a group of rows stays in L1 while all
    // tiles use it, and they ask for the next group meanwhile.
    let one_tile = tokens.len() <= tile_m;
    let (height, step) = if one_tile { (STREAMS, n / STREAMS) } else { (tile_n, 1) };
    let groups = n / height;
    let call = Call::<D> { w, inputs, first: rows.start, n, a, width, tokens, tile_m, one_tile };
    // no closures from here on: they would not be compiled with the instruction set
    if one_tile {
        for g in 0..groups {
            for k in (0..inputs).step_by(CHUNK) {
                call.group(g, (height, step), k, (g, k), sums);
            }
        }
    } else {
        for k in (0..inputs).step_by(CHUNK) {
            for g in 0..groups {
                let next = match (g + 1 < groups, k + CHUNK < inputs) {
                    (true, _) => ((g + 1) * height, k),
                    (false, true) => (0, k + CHUNK),
                    (false, false) => (n, 0), // likely the next panel
                };
                call.group(g * height, (height, step), k, next, sums);
            }
        }
    }
    for i in groups * height..n {
        for k in (0..inputs).step_by(CHUNK) {
            call.group(i, (1, 1), k, (i + 1, k), sums);
        }
    }
}

/// The arguments of [`panel`], and how it goes about them.
struct Call<'a, D: Dot> {
    w: &'a [D::W],
    inputs: usize,
    first: usize,
    n: usize,
    a: &'a [D::A],
    width: usize,
    tokens: Range<usize>,
    tile_m: usize,
    one_tile: bool,
}

impl<D: Dot> Call<'_, D> {
    /// All tokens with `height` rows from row `i` of the panel, `step` apart, over the chunk that
    /// begins at `k`. `next` is the row and chunk that will be wanted after these.
    ///
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn group(
        &self,
        i: usize,
        (height, step): (usize, usize),
        k: usize,
        next: (usize, usize),
        sums: &mut [f32],
    ) {
        let kn = CHUNK.min(self.inputs - k);
        let at = self.w.as_ptr().add((self.first + i) * self.inputs + k);
        // the tiles ask for equal parts of the next group, so that memory is never idle
        let next_kn = CHUNK.min(self.inputs - next.1);
        let next = self.w.as_ptr().wrapping_add((self.first + next.0) * self.inputs + next.1);
        let parts = self.tokens.len().div_ceil(self.tile_m);
        let mut t = self.tokens.start;
        let mut number = 0;
        while t < self.tokens.end {
            let m = self.tile_m.min(self.tokens.end - t);
            let w = Rows {
                at,
                stride: step * self.inputs,
                ahead: match self.one_tile {
                    true => Ahead::Bytes(AHEAD),
                    false => {
                        let from = number * height * next_kn / parts;
                        Ahead::Lines {
                            at: next.wrapping_add(from / next_kn * self.inputs + from % next_kn),
                            row: next_kn,
                            left: next_kn - from % next_kn,
                            skip: self.inputs - next_kn,
                            lines: height.div_ceil(parts),
                        }
                    }
                },
            };
            let a = self.a.as_ptr().add(t * self.width + k);
            let at = sums.as_mut_ptr().add((t - self.tokens.start) * self.n + i);
            tiles::<D>((m, height), w, a, self.width, kn, Sums { at, token: self.n, row: step });
            t += m;
            number += 1;
        }
    }
}

/// [`tile`] for `m` tokens and `n` rows.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn tiles<D: Dot>(
    (m, n): (usize, usize),
    w: Rows<D::W>,
    a: *const D::A,
    width: usize,
    k: usize,
    out: Sums,
) {
    match (m, n) {
        (4, 6) => tile::<D, 4, 6>(w, a, width, k, out),
        (3, 6) => tile::<D, 3, 6>(w, a, width, k, out),
        (2, 6) => tile::<D, 2, 6>(w, a, width, k, out),
        (1, 6) => tile::<D, 1, 6>(w, a, width, k, out),
        (4, 2) => tile::<D, 4, 2>(w, a, width, k, out),
        (3, 2) => tile::<D, 3, 2>(w, a, width, k, out),
        (2, 2) => tile::<D, 2, 2>(w, a, width, k, out),
        (1, 2) => tile::<D, 1, 2>(w, a, width, k, out),
        (4, 1) => tile::<D, 4, 1>(w, a, width, k, out),
        (3, 1) => tile::<D, 3, 1>(w, a, width, k, out),
        (2, 1) => tile::<D, 2, 1>(w, a, width, k, out),
        _ => tile::<D, 1, 1>(w, a, width, k, out),
    }
}

/// Where a tile's sums are added: elements from one token and from one row to the next.
struct Sums {
    at: *mut f32,
    token: usize,
    row: usize,
}

/// A group of rows of weights, and what to ask memory for while they are used.
struct Rows<W> {
    at: *const W,
    /// Elements from one row to the next.
    stride: usize,
    ahead: Ahead<W>,
}

enum Ahead<W> {
    /// Every row, so many bytes ahead.
    Bytes(usize),
    /// At every step so many lines (at most 3) of other rows from `at` on, of which `left` elements
    /// are in the first row; the next rows have `row` elements each, `skip` elements lie between.
    Lines { at: *const W, left: usize, row: usize, skip: usize, lines: usize },
}

/// Adds the products of M tokens with N rows over `k` inner elements to `out`.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn tile<D: Dot, const M: usize, const N: usize>(
    w: Rows<D::W>,
    a: *const D::A,
    a_stride: usize,
    k: usize,
    out: Sums,
) {
    let mut acc = [[D::zero(); N]; M];
    let full = k / D::STEP * D::STEP;
    match w.ahead {
        Ahead::Bytes(ahead) => {
            for i in (0..full).step_by(D::STEP) {
                for n in 0..N {
                    prefetch::<u8, true>(
                        w.at.add(n * w.stride + i).cast::<u8>().wrapping_add(ahead),
                    );
                }
                step::<D, M, N>(
                    &mut acc,
                    std::array::from_fn(|n| D::load_w(w.at.add(n * w.stride + i))),
                    a.add(i),
                    a_stride,
                );
            }
        }
        Ahead::Lines { mut at, mut left, row, skip, lines } => {
            let line = 64 / size_of::<D::W>();
            // asking for a line twice costs less than a branch
            let (second, third) = (line * (lines > 1) as usize, line * 2 * (lines > 2) as usize);
            for i in (0..full).step_by(D::STEP) {
                prefetch::<_, true>(at);
                prefetch::<_, true>(at.wrapping_add(second));
                prefetch::<_, true>(at.wrapping_add(third));
                at = at.wrapping_add(lines * line);
                left = left.wrapping_sub(lines * line);
                if left as isize <= 0 {
                    at = at.wrapping_add(skip);
                    left = row;
                }
                step::<D, M, N>(
                    &mut acc,
                    std::array::from_fn(|n| D::load_w(w.at.add(n * w.stride + i))),
                    a.add(i),
                    a_stride,
                );
            }
        }
    }
    if full < k {
        let ws =
            std::array::from_fn(|n| D::load_w_partial(w.at.add(n * w.stride + full), k - full));
        step::<D, M, N>(&mut acc, ws, a.add(full), a_stride);
    }
    // Groups of 16 and 8, the rest one by one. The groups' bounds are constants of M and N:
    // indexing `acc` with variables would keep it in memory all along.
    let count = M * N;
    let sixteen = if count >= 16 { 16 } else { 0 };
    let eight = if count - sixteen >= 8 { 8 } else { 0 };
    if sixteen > 0 {
        let sums = D::sum16(&std::array::from_fn(|j| acc[j / N % M][j % N]));
        for (j, sum) in sums.into_iter().enumerate() {
            *out.at.add(j / N * out.token + j % N * out.row) += sum;
        }
    }
    if eight > 0 {
        let sums = D::sum8(&std::array::from_fn(|j| acc[(sixteen + j) / N % M][(sixteen + j) % N]));
        for (j, sum) in sums.into_iter().enumerate() {
            let j = sixteen + j;
            *out.at.add(j / N * out.token + j % N * out.row) += sum;
        }
    }
    for (m, row) in acc.iter().enumerate() {
        for (n, acc) in row.iter().enumerate() {
            if m * N + n >= sixteen + eight {
                *out.at.add(m * out.token + n * out.row) += D::sum(*acc);
            }
        }
    }
}

/// One step of a tile: every token with every row.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn step<D: Dot, const M: usize, const N: usize>(
    acc: &mut [[D::Acc; N]; M],
    ws: [D::Wv; N],
    a: *const D::A,
    a_stride: usize,
) {
    for (m, row) in acc.iter_mut().enumerate() {
        let x = D::load_a(a.add(m * a_stride));
        for (acc, w) in row.iter_mut().zip(ws) {
            *acc = D::dot(*acc, w, x);
        }
    }
}

/// Instances of [`panel`] compiled with their instruction sets.
#[cfg(target_arch = "x86_64")]
mod instances {
    use super::dot::Dot;
    use super::panel;
    use std::ops::Range;

    macro_rules! instance {
        ($name:ident $(<$g:ident>)?, $d:ty, $features:literal) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name $(<$g: Dot>)? (
                w: &[<$d as Dot>::W],
                inputs: usize,
                rows: Range<usize>,
                a: (&[<$d as Dot>::A], usize),
                tokens: Range<usize>,
                sums: &mut [f32],
            ) {
                panel::<$d>(w, inputs, rows, a, tokens, sums)
            }
        };
    }
    instance!(panel_avx512<D>, D, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
    instance!(panel_avx2<D>, D, "avx2,fma,f16c");
}
#[cfg(target_arch = "x86_64")]
use instances::{panel_avx2, panel_avx512};
