//! y = x W^T with outputs in the vector lanes: nothing is summed across lanes.
//!
//! Groups of 16 rows of weights lie as `[words][16 rows]`, a word being 4 bytes along the inner
//! dimension (4 int8, 2 bf16): 64 bytes are one operand of a dot-product instruction, whose other
//! operand is one word of activations for all lanes. Groups follow each other, so that a panel is
//! one stretch of memory. Activations lie in quads of tokens, `[words][4 tokens]`. An output is
//! summed word by word from the first to the last, whatever the tiles: a token's result is the same
//! in every batch.

use super::Line;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::simd::prefetch;
use crate::ops::cpu::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a group: the lanes of one operand.
pub const GROUP: usize = 16;
/// Bytes of a word.
pub const WORD: usize = 4;
/// Maximum groups of one task.
const PANEL: usize = 6;
/// Maximum tokens that pass a panel at once.
const TOKENS: usize = 192;
/// Bytes of a row that a tile of many goes through before the next tile takes the same weights,
/// which L1 and L2 hold meanwhile.
const CHUNK: usize = 1536;
/// Distance of the prefetch of streaming weights, in bytes.
const AHEAD: usize = 8192;

/// How one group's 16 sums are kept and added to.
///
/// # Safety
/// Every function needs the instruction set of the implementing type, 64 bytes of weights, 4 of
/// activations and 16 sums.
#[allow(clippy::missing_safety_doc)] // one contract for the whole trait, stated above
pub trait Lanes {
    type Acc: Copy;
    type W: Copy;
    type Sum: Copy;
    /// Whether there are registers for 24 sums: tiles of 12 tokens and 2 groups (else 4 and 1).
    const WIDE: bool;

    unsafe fn zero() -> Self::Acc;
    /// Goes on from the sums at `out`, or from zero if [`Lanes::end`] adds to them.
    unsafe fn begin(out: *const Self::Sum) -> Self::Acc;
    unsafe fn load(w: *const u8) -> Self::W;
    unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc;
    unsafe fn end(acc: Self::Acc, out: *mut Self::Sum);
}

/// A panel of weights: its first group, the bytes of a group, and how many groups there are.
#[derive(Clone, Copy)]
pub struct Groups {
    pub at: *const u8,
    pub bytes: usize,
    pub count: usize,
}

/// Activations, prepared by [`prepare`].
#[derive(Clone, Copy)]
pub struct Quads<'a> {
    data: &'a [u8],
    /// Bytes of a quad.
    bytes: usize,
}

thread_local! {
    /// Prepared activations, kept from call to call.
    static PREPARED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// The rows of a quad before they are woven into each other.
    static ROWS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Has `convert` write each token's activations, of `inputs` elements in f32, as elements `A`, and
/// hands them on as quads.
pub fn prepare<A: bytemuck::Pod>(
    cpu: &Cpu,
    x: &[f32],
    inputs: usize,
    convert: impl Fn(&[f32], &mut [A], usize) + Sync,
    then: impl FnOnce(Quads),
) {
    let tokens = x.len() / inputs;
    let words = (inputs * size_of::<A>()).div_ceil(WORD);
    // quads a multiple of 4 KiB apart would fight for the same cache sets
    let bytes = (words * 4 * WORD).next_multiple_of(64) + 64;
    PREPARED.with_borrow_mut(|lines| {
        let needed = tokens.div_ceil(4) * bytes / size_of::<Line>();
        if lines.len() < needed {
            lines.resize(needed, bytemuck::Zeroable::zeroed());
        }
        let data = bytemuck::cast_slice_mut::<Line, u8>(&mut lines[..needed]);
        let out = Disjoint::new(data);
        cpu.threads.run_ranges(tokens.div_ceil(4), 1, |quads| {
            ROWS.with_borrow_mut(|rows| {
                rows.clear();
                rows.resize(4 * words, 0);
                for quad in quads {
                    let first = quad * 4;
                    for (t, row) in (first..tokens.min(first + 4)).zip(rows.chunks_exact_mut(words))
                    {
                        let row = &mut bytemuck::cast_slice_mut::<u32, A>(row)[..inputs];
                        convert(&x[t * inputs..(t + 1) * inputs], row, t);
                    }
                    // SAFETY: every quad is one task's.
                    let out = unsafe { out.slice(quad * bytes..quad * bytes + words * 4 * WORD) };
                    let [a, b, c, d] = [0, 1, 2, 3].map(|i| &rows[i * words..(i + 1) * words]);
                    for (i, out) in
                        bytemuck::cast_slice_mut::<u8, [u32; 4]>(out).iter_mut().enumerate()
                    {
                        *out = [a[i], b[i], c[i], d[i]];
                    }
                }
            });
        });
        then(Quads { data, bytes });
    });
}

thread_local! {
    /// Sums of a panel, kept from call to call.
    static SUMS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Cuts the work into tasks of a panel each. `body` gets the first group, how many there are, the
/// tokens, and room for their sums `[tokens, groups, 16]`, zeroed.
pub fn tasks<S: bytemuck::Pod>(
    cpu: &Cpu,
    groups: usize,
    tokens: usize,
    body: impl Fn(usize, usize, Range<usize>, &mut [S]) + Sync,
) {
    // small enough that the threads end together
    let share = groups.div_ceil(cpu.threads.count() * 8).next_multiple_of(2).min(PANEL);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..(first + TOKENS).min(tokens);
        cpu.threads.run(groups.div_ceil(share), |p| {
            let n = share.min(groups - p * share);
            SUMS.with_borrow_mut(|sums| {
                sums.clear();
                sums.resize(tokens.len() * n * GROUP, 0);
                body(p * share, n, tokens.clone(), bytemuck::cast_slice_mut(sums));
            });
        });
    }
}

/// Adds what a panel and `tokens` make to `sums` = `[tokens, groups, 16]`.
pub type Panel<Sum> = unsafe fn(Groups, Quads, Range<usize>, &mut [Sum]);

/// See [`Panel`].
///
/// # Safety
/// Needs the instruction set of `L`; the groups and `tokens` lie inside the weights and
/// activations.
#[inline(always)]
pub unsafe fn panel<L: Lanes>(w: Groups, a: Quads, tokens: Range<usize>, sums: &mut [L::Sum]) {
    let inner = w.bytes / GROUP; // bytes of a row
    let (tile_m, height) = if L::WIDE { (12, 2) } else { (4, 1) };
    let count = tokens.len();
    if count > tile_m {
        return blocked::<L>((tile_m, height), w, a, tokens, sums);
    }
    // One tile takes all tokens, so memory is the limit, and it delivers a few long streams
    // fastest: the groups of a tile are as far apart as they can be.
    let step = w.count / height;
    let paired = step * height;
    for g in (0..paired).step_by(height).chain(paired..w.count) {
        let (n, first) = if g < paired { (height, g / height) } else { (1, g) };
        let at = w.at.add(first * w.bytes);
        let tile = Tile {
            w: at,
            stride: step * w.bytes,
            a: a.data.as_ptr().add(tokens.start / 4 * a.bytes),
            quad: a.bytes,
            kn: inner,
            out: sums.as_mut_ptr().add(first * GROUP),
            out_token: w.count * GROUP,
            out_group: step * GROUP,
        };
        // where the streams go on
        let next = if first + 1 < step { at.add(w.bytes) } else { w.at.add(w.count * w.bytes) };
        tile.run::<L>((count, n), Prefetch::Stream { next });
    }
}

/// [`panel`] for more tokens than one tile takes. A chunk of a few groups stays in the caches while
/// all tiles use it; the first tiles ask for the next chunk, each for that of one group, which
/// arrives in L2 long before it is used. (Into L1 it would push out what is in use: measured on
/// Zen 4 with 16 tokens, 15 % slower.)
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn blocked<L: Lanes>(
    (tile_m, height): (usize, usize),
    w: Groups,
    a: Quads,
    tokens: Range<usize>,
    sums: &mut [L::Sum],
) {
    let inner = w.bytes / GROUP;
    // tiles of nearly equal size in whole quads, chunks of nearly equal size in whole words
    let equal = |total: usize, max: usize| total.div_ceil(total.div_ceil(max)).next_multiple_of(4);
    let tile_m = equal(tokens.len(), tile_m);
    let chunk = equal(inner, CHUNK);
    for g in (0..w.count).step_by(height) {
        let n = height.min(w.count - g);
        for k in (0..inner).step_by(chunk) {
            let kn = chunk.min(inner - k);
            let at = w.at.add(g * w.bytes + k * GROUP);
            let last = k + kn == inner;
            let next = if last { w.at.wrapping_add((g + n) * w.bytes) } else { at.add(kn * GROUP) };
            for (number, t) in tokens.clone().step_by(tile_m).enumerate() {
                let tile = Tile {
                    w: at,
                    stride: w.bytes,
                    a: a.data.as_ptr().add(t / 4 * a.bytes + k * 4),
                    quad: a.bytes,
                    kn,
                    out: sums.as_mut_ptr().add(((t - tokens.start) * w.count + g) * GROUP),
                    out_token: w.count * GROUP,
                    out_group: GROUP,
                };
                // tiles after the first ones have nothing to ask for
                let step = if number < n { GROUP } else { 0 };
                let next = next.wrapping_add(number.min(n) * w.bytes);
                tile.run::<L>((tile_m.min(tokens.end - t), n), Prefetch::Next { next, step });
            }
        }
    }
}

/// What a tile asks memory for.
#[derive(Clone, Copy)]
enum Prefetch {
    /// Its own weights [`AHEAD`] of use, into L1; at the end the groups from `next` on.
    Stream { next: *const u8 },
    /// The lines from `next` on into L2: one a word, `step` bytes of memory for a byte of a row.
    Next { next: *const u8, step: usize },
}

/// A tile: its weights and activations, from the chunk's first word, and where its sums are.
struct Tile<S> {
    w: *const u8,
    /// Bytes from one group of the tile to the next.
    stride: usize,
    a: *const u8,
    /// Bytes from one quad of tokens to the next.
    quad: usize,
    kn: usize,
    out: *mut S,
    out_token: usize,
    out_group: usize,
}

impl<S: Copy> Tile<S> {
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn run<L: Lanes<Sum = S>>(&self, (m, n): (usize, usize), prefetch: Prefetch) {
        macro_rules! tiles {
            ($n:literal: $($m:literal)*) => {
                match m {
                    $($m => self.tile::<L, $m, $n>(prefetch),)*
                    _ => unreachable!("no tile has {m} tokens and {n} groups"),
                }
            };
        }
        match (n, L::WIDE) {
            (2, _) => tiles!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
            (_, true) => tiles!(1: 1 2 3 4 5 6 7 8 9 10 11 12),
            (_, false) => tiles!(1: 1 2 3 4),
        }
    }

    /// M tokens by N groups.
    ///
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn tile<L: Lanes<Sum = S>, const M: usize, const N: usize>(&self, ahead: Prefetch) {
        // no closures: they would not be compiled with the instruction set
        let mut acc = [[L::zero(); N]; M];
        for (m, row) in acc.iter_mut().enumerate() {
            for (n, acc) in row.iter_mut().enumerate() {
                *acc = L::begin(self.out.add(m * self.out_token + n * self.out_group));
            }
        }
        match ahead {
            Prefetch::Stream { next } => {
                let cut = self.kn.saturating_sub(AHEAD / GROUP);
                for i in (0..cut).step_by(WORD) {
                    for n in 0..N {
                        let at = n * self.stride + i * GROUP + AHEAD;
                        prefetch::<_, true>(self.w.wrapping_add(at));
                    }
                    self.step::<L, M, N>(&mut acc, i);
                }
                for i in (cut..self.kn).step_by(WORD) {
                    for n in 0..N {
                        let at = n * self.stride + (i - cut) * GROUP;
                        prefetch::<_, true>(next.wrapping_add(at));
                    }
                    self.step::<L, M, N>(&mut acc, i);
                }
            }
            Prefetch::Next { next, step } => {
                for i in (0..self.kn).step_by(WORD) {
                    prefetch::<_, false>(next.wrapping_add(i * step));
                    self.step::<L, M, N>(&mut acc, i);
                }
            }
        }
        for (m, row) in acc.iter().enumerate() {
            for (n, acc) in row.iter().enumerate() {
                L::end(*acc, self.out.add(m * self.out_token + n * self.out_group));
            }
        }
    }

    /// One word, at byte `i` of the rows.
    ///
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn step<L: Lanes<Sum = S>, const M: usize, const N: usize>(
        &self,
        acc: &mut [[L::Acc; N]; M],
        i: usize,
    ) {
        let ws: [L::W; N] =
            std::array::from_fn(|n| L::load(self.w.add(n * self.stride + i * GROUP)));
        let a = self.a.add(i * 4);
        for (m, row) in acc.iter_mut().enumerate() {
            let a = a.add(m / 4 * self.quad + m % 4 * WORD);
            for (acc, w) in row.iter_mut().zip(ws) {
                *acc = L::dot(*acc, w, a);
            }
        }
    }
}

/// Defines a [`Panel`] compiled with its instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! panel_instance {
    ($name:ident, $lanes:ty, $features:literal) => {
        #[target_feature(enable = $features)]
        pub unsafe fn $name(
            w: $crate::ops::cpu::linear::lanes::Groups,
            a: $crate::ops::cpu::linear::lanes::Quads,
            tokens: std::ops::Range<usize>,
            sums: &mut [<$lanes as $crate::ops::cpu::linear::lanes::Lanes>::Sum],
        ) {
            $crate::ops::cpu::linear::lanes::panel::<$lanes>(w, a, tokens, sums)
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use panel_instance;
