//! Products whose vector lanes are outputs: nothing is summed across lanes.
//!
//! Groups of 16 rows of weights lie as `[words][16 rows]`, a word being 4 bytes along the inner
//! dimension (4 int8, 2 bf16): 64 bytes are one operand of a dot-product instruction, whose other
//! operand is one word of activations for all lanes. Groups follow each other, so that a panel is
//! one stretch of memory. Activations lie in quads of tokens, `[words][4 tokens]`. An output is
//! summed word by word from the first to the last, whatever the tiles: a token's result is the same
//! in every batch.

use super::{Line, prefetch};
use crate::ops::cpu::Cpu;
use crate::ops::cpu::threads::Disjoint;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a group: the lanes of one operand.
pub const GROUP: usize = 16;
/// Bytes of a word.
pub const WORD: usize = 4;
/// Most groups of one task.
const PANEL: usize = 6;
/// Most tokens that pass a panel at once.
const TOKENS: usize = 192;
/// Bytes of a row that two groups keep in the first-level cache while all tokens pass by.
const CHUNK: usize = 512;
/// Most tokens of a single tile, whose groups stream by.
const FEW: usize = 16;
/// Of more than 12 such tokens, the bytes of their rows that stay in the first-level cache
/// meanwhile.
const TALL_CHUNK: usize = 1024;
/// Bytes ahead of use that streaming weights are asked for.
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
    /// Registers for 24 sums: tiles of 12 tokens and 2 groups, or 16 and 1 (else 4 and 1).
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

/// Cuts a product into tasks of a panel each. `body` gets the first group, how many there are, the
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

/// Adds the products of a panel with `tokens` to `sums` = `[tokens, groups, 16]`.
pub type Panel<Sum> = unsafe fn(Groups, Quads, Range<usize>, &mut [Sum]);

/// See [`Panel`].
///
/// # Safety
/// Needs the instruction set of `L`; the groups and `tokens` lie inside the weights and
/// activations.
#[inline(always)]
pub unsafe fn panel<L: Lanes>(w: Groups, a: Quads, tokens: Range<usize>, sums: &mut [L::Sum]) {
    let inner = w.bytes / GROUP; // bytes of a row
    let count = tokens.len();
    // Where one tile takes all tokens, memory is the limit, and a few long streams are what it
    // delivers fastest. Else a chunk of two groups stays in the first-level cache while all tokens
    // use it, and the next is asked for meanwhile.
    let (tile_m, height) = if L::WIDE { (12, 2) } else { (4, 1) };
    let tall = L::WIDE && count > tile_m && count <= FEW;
    let plan = if tall {
        Plan { tile_m: FEW, height: 1, chunk: TALL_CHUNK, streaming: true }
    } else if count <= tile_m {
        Plan { tile_m, height, chunk: inner, streaming: true }
    } else {
        // tiles of nearly equal size, in whole fours
        let tile_m = count.div_ceil(count.div_ceil(tile_m)).next_multiple_of(4).min(tile_m);
        Plan { tile_m, height, chunk: CHUNK, streaming: false }
    };
    // groups of a streaming tile are far apart: a stream each
    let step = if plan.streaming { w.count / plan.height } else { 1 };
    for k in (0..inner).step_by(plan.chunk) {
        let kn = plan.chunk.min(inner - k);
        let mut g = 0;
        while g < w.count {
            let paired = g + plan.height <= w.count / plan.height * plan.height;
            let (n, first) = match (paired, plan.streaming) {
                (false, _) => (1, g),
                (true, true) => (plan.height, g / plan.height),
                (true, false) => (plan.height, g),
            };
            let at = w.at.add(first * w.bytes + k * GROUP);
            let mut t = tokens.start;
            let mut number = 0;
            while t < tokens.end {
                let m = plan.tile_m.min(tokens.end - t);
                let tile = Tile {
                    w: at,
                    stride: step * w.bytes,
                    streaming: plan.streaming,
                    next: if plan.streaming {
                        // where the stream goes on: the next group, or the first one's next
                        // chunk
                        match (first + 1 < step, k + kn < inner) {
                            (true, _) => at.wrapping_add(w.bytes),
                            (false, true) => w.at.wrapping_add((k + kn) * GROUP),
                            (false, false) => w.at.wrapping_add(w.count * w.bytes),
                        }
                    } else {
                        at.wrapping_add((n + number % n) * w.bytes)
                    },
                    a: a.data.as_ptr().add(t / 4 * a.bytes + k * 4),
                    quad: a.bytes,
                    kn,
                    out: sums.as_mut_ptr().add(((t - tokens.start) * w.count + first) * GROUP),
                    out_token: w.count * GROUP,
                    out_group: step * GROUP,
                };
                tile.run::<L>(m, n);
                t += m;
                number += 1;
            }
            g += n;
        }
    }
}

/// How a panel is gone about.
struct Plan {
    /// Tokens and groups of a tile.
    tile_m: usize,
    height: usize,
    /// Bytes of a row that are used before the next group's.
    chunk: usize,
    /// Whether one tile takes all tokens.
    streaming: bool,
}

/// A tile: its weights and activations, from the chunk's first word, and where its sums are.
struct Tile<S> {
    w: *const u8,
    /// Bytes from one group of the tile to the next.
    stride: usize,
    streaming: bool,
    /// What will be wanted after this: of a streaming tile, after its own weights.
    next: *const u8,
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
    unsafe fn run<L: Lanes<Sum = S>>(&self, m: usize, n: usize) {
        macro_rules! tiles {
                ($n:literal: $($m:literal)*) => {
                    match m {
                        $($m => self.tile::<L, $m, $n>(),)*
                        _ => unreachable!("no tile has {m} tokens and {n} groups"),
                    }
                };
            }
        match (n, L::WIDE) {
            (2, _) => tiles!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
            (_, true) => tiles!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16),
            (_, false) => tiles!(1: 1 2 3 4),
        }
    }

    /// M tokens by N groups.
    ///
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn tile<L: Lanes<Sum = S>, const M: usize, const N: usize>(&self) {
        // no closures: they would not be compiled with the instruction set
        let mut acc = [[L::zero(); N]; M];
        for (m, row) in acc.iter_mut().enumerate() {
            for (n, acc) in row.iter_mut().enumerate() {
                *acc = L::begin(self.out.add(m * self.out_token + n * self.out_group));
            }
        }
        if self.streaming {
            // ahead in its own weights as far as they go, then in what comes next
            let cut = self.kn.saturating_sub(AHEAD / GROUP);
            for i in (0..cut).step_by(WORD) {
                for n in 0..N {
                    prefetch::<_, true>(self.w.wrapping_add(n * self.stride + i * GROUP + AHEAD));
                }
                self.step::<L, M, N>(&mut acc, i);
            }
            for i in (cut..self.kn).step_by(WORD) {
                for n in 0..N {
                    prefetch::<_, true>(
                        self.next.wrapping_add(n * self.stride + (i - cut) * GROUP),
                    );
                }
                self.step::<L, M, N>(&mut acc, i);
            }
        } else {
            for i in (0..self.kn).step_by(WORD) {
                prefetch::<_, false>(self.next.wrapping_add(i * GROUP));
                self.step::<L, M, N>(&mut acc, i);
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
            w: $crate::ops::cpu::product::lanes::Groups,
            a: $crate::ops::cpu::product::lanes::Quads,
            tokens: std::ops::Range<usize>,
            sums: &mut [<$lanes as $crate::ops::cpu::product::lanes::Lanes>::Sum],
        ) {
            $crate::ops::cpu::product::lanes::panel::<$lanes>(w, a, tokens, sums)
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use panel_instance;
