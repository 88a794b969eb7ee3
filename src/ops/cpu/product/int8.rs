//! y = x W^T with 8-bit weights, quantized at load and laid out for the instructions that multiply them.
//!
//! Groups of 16 rows lie as `[inputs / 4][16 rows][4 inner]`: 64 bytes are one operand of `vpdpbusd`, whose 16
//! sums are 16 outputs, so that nothing is summed across lanes. A tile is 12 tokens by 2 groups (24 vector sums). The
//! products are integers and exact: every order of summation gives the same result.

use super::super::Cpu;
use super::super::simd::Isa;
use super::super::threads::Disjoint;
use super::{Finish, prefetch, prepare};
use crate::simd_fn;
use memmap2::MmapMut;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a group: the lanes of one operand.
const GROUP: usize = 16;
/// Inner elements that one lane multiplies at a time.
const INNER: usize = 4;
/// Groups of one task.
const PANEL: usize = 6;
/// Inner elements that stay in the first-level cache, for two groups, while all tokens pass by.
const CHUNK: usize = 512;
/// Most tokens that pass a panel at once.
const TOKENS: usize = 192;
/// Bytes ahead of use that weights of a single tile are asked for.
const AHEAD: usize = 2048;

/// 8-bit weights with one scale for each row.
pub struct Int8 {
    /// `[rows / 16][inputs / 4][16][4]`, zeros in what lies beyond the matrix.
    data: MmapMut,
    pub scales: Vec<f32>,
    /// Sum of each row, which takes the activations' offset out of its products.
    sums: Vec<i32>,
    cols: usize,
}

impl Int8 {
    /// Quantizes rows of `cols` elements that `row` makes.
    pub fn new(rows: usize, cols: usize, row: impl Fn(usize) -> Vec<f32>) -> std::io::Result<Int8> {
        let bytes = rows.div_ceil(GROUP) * cols.div_ceil(INNER) * GROUP * INNER;
        let data = MmapMut::map_anon(bytes.max(1))?;
        // fewer misses of the address cache; where the system has no huge pages, nothing is lost
        #[cfg(target_os = "linux")]
        let _ = data.advise(memmap2::Advice::HugePage);
        let isa = Isa::detect();
        let mut m = Int8 { data, scales: vec![0.0; rows], sums: vec![0; rows], cols };
        let mut quantized = vec![0u8; cols];
        for i in 0..rows {
            m.scales[i] = quantize_offset(isa, &row(i), &mut quantized);
            for (k, q) in quantized.chunks(INNER).enumerate() {
                let at = m.at(i, k * INNER);
                for (to, q) in m.data[at..].iter_mut().zip(q) {
                    let q = *q as i32 - 128;
                    *to = q as i8 as u8;
                    m.sums[i] += q;
                }
            }
        }
        Ok(m)
    }

    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of one group.
    fn group(&self) -> usize {
        self.cols.div_ceil(INNER) * GROUP * INNER
    }

    fn at(&self, row: usize, k: usize) -> usize {
        row / GROUP * self.group() + k / INNER * GROUP * INNER + row % GROUP * INNER + k % INNER
    }

    /// Copies a row in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        for (k, v) in out.iter_mut().enumerate() {
            *v = self.data[self.at(row, k)] as i8 as f32 * self.scales[row];
        }
    }
}

thread_local! {
    /// Sums of a panel and outputs of one token, kept from call to call.
    static SUMS: RefCell<(Vec<i32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// `(weights from the panel's first group, bytes of a group, groups, activations, their width, tokens, sums)`; the
/// sums are `[tokens, groups, 16]`.
type Panel = unsafe fn(*const i8, usize, usize, &[u8], usize, Range<usize>, &mut [i32]);

/// Computes x W^T for `x` = `[tokens, inputs]`, and hands every token's outputs to `finish`, panel by panel.
pub fn product(cpu: &Cpu, x: &[f32], w: &Int8, finish: &Finish) {
    let (rows, inputs) = (w.rows(), w.cols);
    let tokens = x.len() / inputs;
    let panel: Panel = match cpu.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => x86::panel_vnni,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => x86::panel_avx2,
        _ => panel::<Portable>,
    };
    // each token is scaled by its largest element; 128 is zero
    let mut scales = vec![0f32; tokens];
    let scales_out = Disjoint::new(&mut scales);
    // SAFETY: every token is one task's.
    let quantize = |cpu: &Cpu, x: &[f32], row: &mut [u8], t: usize| unsafe {
        scales_out.slice(t..t + 1)[0] = quantize_offset(cpu.isa, x, row);
    };
    prepare(cpu, x, inputs, quantize, |a, width| {
        // SAFETY: all scales are written, and nobody writes them now.
        let scales = unsafe { &*scales_out.slice(0..tokens) };
        let groups = rows.div_ceil(GROUP);
        // panels small enough that the threads end together
        let share = groups.div_ceil(cpu.threads.count() * 8).next_multiple_of(2).min(PANEL);
        for first in (0..tokens).step_by(TOKENS) {
            let tokens = first..(first + TOKENS).min(tokens);
            cpu.threads.run(groups.div_ceil(share), |p| {
                let n = share.min(groups - p * share);
                let first_row = p * share * GROUP;
                let real = (n * GROUP).min(rows - first_row);
                SUMS.with_borrow_mut(|(sums, outputs)| {
                    sums.clear();
                    sums.resize(tokens.len() * n * GROUP, 0);
                    outputs.resize(real, 0.0);
                    // SAFETY: the instruction set was matched above; the panel lies inside the weights.
                    unsafe {
                        let at = w.data.as_ptr().add(p * share * w.group()).cast();
                        panel(at, w.group(), n, a, width, tokens.clone(), sums);
                    }
                    let (row_sums, row_scales) = (&w.sums[first_row..], &w.scales[first_row..]);
                    for (t, sums) in tokens.clone().zip(sums.chunks_exact(n * GROUP)) {
                        scale_sums(cpu.isa, sums, row_sums, row_scales, scales[t], outputs);
                        finish(t, first_row, outputs);
                    }
                });
            });
        }
    });
}

simd_fn! {
    /// Rounds `x` to whole multiples, at most 127, of the returned scale (its largest element over 127), and adds 128.
    pub fn quantize_offset<S>(x: &[f32], out: &mut [u8]) -> f32 {
        let full = x.len() / 16 * 16;
        assert!(x.len() <= out.len());
        let mut most = S::splat(0.0);
        for i in (0..full).step_by(16) {
            let v = S::load(x.as_ptr().add(i));
            most = S::max(most, S::max(v, S::sub(S::splat(0.0), v)));
        }
        let most = x[full..].iter().fold(S::max_lane(most), |m, v| m.max(v.abs()));
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        for i in (0..full).step_by(16) {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(inverse));
            S::store_u8(out.as_mut_ptr().add(i), S::add(S::round(v), S::splat(128.0)));
        }
        for i in full..x.len() {
            out[i] = ((x[i] * inverse).round_ties_even() + 128.0) as u8;
        }
        most / 127.0
    }
}

simd_fn! {
    /// Outputs of one token: takes the activations' offset out and applies both scales.
    fn scale_sums<S>(sums: &[i32], row_sums: &[i32], row_scales: &[f32], scale: f32, out: &mut [f32]) {
        let n = out.len();
        let (sums, row_sums, row_scales) = (&sums[..n], &row_sums[..n], &row_scales[..n]);
        for i in 0..n {
            out[i] = (sums[i] - 128 * row_sums[i]) as f32 * (scale * row_scales[i]);
        }
    }
}

/// How one group's 16 sums are kept and added to.
///
/// # Safety
/// Every function needs the instruction set of the implementing type, 64 bytes of weights, 4 of activations and 16 sums.
#[allow(clippy::missing_safety_doc)] // one contract for the whole trait, stated above
trait Lanes {
    type Acc: Copy;
    type W: Copy;
    /// Tokens of the largest tile and its groups: 12 and 2, or 4 and 1.
    const TILE: (usize, usize);

    unsafe fn zero() -> Self::Acc;
    unsafe fn load(w: *const i8) -> Self::W;
    unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc;
    unsafe fn add_to(acc: Self::Acc, out: *mut i32);
}

/// # Safety
/// Needs the instruction set of `L`; `groups` and `tokens` lie inside the weights and activations; sums are zero.
#[inline(always)]
unsafe fn panel<L: Lanes>(
    w: *const i8,
    group: usize,
    groups: usize,
    a: &[u8],
    width: usize,
    tokens: Range<usize>,
    sums: &mut [i32],
) {
    let inner = group / GROUP; // inputs, rounded up to whole operands
    let (tile_m, tile_n) = L::TILE;
    // Where one tile takes all tokens, memory is the limit, and a few long streams are what it delivers fastest. Else
    // a chunk of two groups stays in the first-level cache while all tokens use it, and the next is asked for meanwhile.
    let streaming = tokens.len() <= tile_m;
    let chunk = if streaming { inner } else { CHUNK };
    let (height, step) = if streaming { (tile_n, groups / tile_n) } else { (tile_n, 1) };
    let tiles = tokens.len().div_ceil(tile_m);
    // tiles of nearly equal size, in whole fours
    let tile_m = tokens.len().div_ceil(tiles).next_multiple_of(4).min(tile_m);
    unsafe {
        for k in (0..inner).step_by(chunk) {
            let kn = chunk.min(inner - k);
            let mut g = 0;
            while g < groups {
                let paired = g + height <= groups / height * height;
                let (n, first, next) = if !paired {
                    (1, g, 1)
                } else if streaming {
                    (height, g / height, 0)
                } else {
                    (height, g, height)
                };
                let at = w.add(first * group + k * GROUP);
                let mut t = tokens.start;
                let mut number = 0;
                while t < tokens.end {
                    let m = tile_m.min(tokens.end - t);
                    let task = Task {
                        w: at,
                        stride: step * group,
                        ahead: if streaming {
                            at.wrapping_add(AHEAD)
                        } else {
                            at.wrapping_add((next + number % n) * group)
                        },
                        streaming,
                        a: a.as_ptr().add(t * width + k),
                        width,
                        kn,
                        out: sums.as_mut_ptr().add(((t - tokens.start) * groups + first) * GROUP),
                        out_token: groups * GROUP,
                        out_group: step * GROUP,
                    };
                    task.run::<L>(m, n);
                    t += m;
                    number += 1;
                }
                g += n;
            }
        }
    }
}

/// A tile: its weights and activations, from the chunk's first inner element, and where its sums are added.
struct Task {
    w: *const i8,
    /// Bytes from one group of the tile to the next.
    stride: usize,
    /// What to ask memory for: the weights themselves, further on, or a group that other tiles will use.
    ahead: *const i8,
    streaming: bool,
    a: *const u8,
    width: usize,
    kn: usize,
    out: *mut i32,
    out_token: usize,
    out_group: usize,
}

impl Task {
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn run<L: Lanes>(&self, m: usize, n: usize) {
        unsafe {
            macro_rules! tiles {
                ($n:literal: $($m:literal)*) => {
                    match m {
                        $($m => self.tile::<L, $m, $n>(),)*
                        _ => unreachable!("tiles have at most {:?} tokens", L::TILE),
                    }
                };
            }
            match n {
                2 => tiles!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
                _ if L::TILE.0 == 4 => tiles!(1: 1 2 3 4),
                _ => tiles!(1: 1 2 3 4 5 6 7 8 9 10 11 12),
            }
        }
    }

    /// M tokens by N groups.
    ///
    /// # Safety
    /// As for [`panel`].
    #[inline(always)]
    unsafe fn tile<L: Lanes, const M: usize, const N: usize>(&self) {
        unsafe {
            let mut acc = [[L::zero(); N]; M];
            for i in (0..self.kn).step_by(INNER) {
                if self.streaming {
                    for n in 0..N {
                        prefetch::<_, true>(self.ahead.wrapping_add(n * self.stride + i * GROUP));
                    }
                } else {
                    prefetch::<_, false>(self.ahead.wrapping_add(i * GROUP));
                }
                let ws: [L::W; N] = std::array::from_fn(|n| L::load(self.w.add(n * self.stride + i * GROUP)));
                for (m, row) in acc.iter_mut().enumerate() {
                    let a = self.a.add(m * self.width + i);
                    for (acc, w) in row.iter_mut().zip(ws) {
                        *acc = L::dot(*acc, w, a);
                    }
                }
            }
            for (m, row) in acc.iter().enumerate() {
                for (n, acc) in row.iter().enumerate() {
                    L::add_to(*acc, self.out.add(m * self.out_token + n * self.out_group));
                }
            }
        }
    }
}

/// Plain Rust.
struct Portable;

impl Lanes for Portable {
    type Acc = [i32; GROUP];
    type W = [[i8; INNER]; GROUP];
    const TILE: (usize, usize) = (4, 1);

    #[inline(always)]
    unsafe fn zero() -> Self::Acc {
        [0; GROUP]
    }
    #[inline(always)]
    unsafe fn load(w: *const i8) -> Self::W {
        unsafe { w.cast::<Self::W>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc {
        let a = unsafe { a.cast::<[u8; INNER]>().read_unaligned() };
        std::array::from_fn(|i| (0..INNER).fold(acc[i], |sum, k| sum + w[i][k] as i32 * a[k] as i32))
    }
    #[inline(always)]
    unsafe fn add_to(acc: Self::Acc, out: *mut i32) {
        for (i, sum) in acc.into_iter().enumerate() {
            unsafe { *out.add(i) += sum };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, panel};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// 64 products an instruction.
    struct Vnni;

    impl Lanes for Vnni {
        type Acc = __m512i;
        type W = __m512i;
        const TILE: (usize, usize) = (12, 2);

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn load(w: *const i8) -> __m512i {
            unsafe { _mm512_loadu_si512(w.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512i, w: __m512i, a: *const u8) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(a.cast::<i32>().read_unaligned()), w) }
        }
        #[inline(always)]
        unsafe fn add_to(acc: __m512i, out: *mut i32) {
            unsafe { _mm512_storeu_si512(out.cast(), _mm512_add_epi32(acc, _mm512_loadu_si512(out.cast()))) }
        }
    }

    /// Values widened to 16 bits, whose products by pairs (`vpmaddwd`) cannot saturate.
    struct Avx2;

    impl Lanes for Avx2 {
        /// Four rows each, two partial sums a row.
        type Acc = [__m256i; 4];
        type W = [__m256i; 4];
        const TILE: (usize, usize) = (4, 1);

        #[inline(always)]
        unsafe fn zero() -> Self::Acc {
            unsafe { [_mm256_setzero_si256(); 4] }
        }
        #[inline(always)]
        unsafe fn load(w: *const i8) -> Self::W {
            unsafe {
                let part = w.cast::<__m128i>();
                let [a, b, c, d] = [part, part.add(1), part.add(2), part.add(3)];
                [
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(a)),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(b)),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(c)),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(d)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc {
            unsafe {
                let a = _mm256_cvtepu8_epi16(_mm_set1_epi32(a.cast::<i32>().read_unaligned()));
                [
                    _mm256_add_epi32(acc[0], _mm256_madd_epi16(w[0], a)),
                    _mm256_add_epi32(acc[1], _mm256_madd_epi16(w[1], a)),
                    _mm256_add_epi32(acc[2], _mm256_madd_epi16(w[2], a)),
                    _mm256_add_epi32(acc[3], _mm256_madd_epi16(w[3], a)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn add_to(acc: Self::Acc, out: *mut i32) {
            for half in 0..2 {
                unsafe {
                    // halves of 128 bits hold rows 0 1 4 5 and 2 3 6 7 after the addition of neighbours
                    let sums = _mm256_hadd_epi32(acc[2 * half], acc[2 * half + 1]);
                    let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(sums);
                    let out = out.add(8 * half).cast::<__m256i>();
                    _mm256_storeu_si256(out, _mm256_add_epi32(sums, _mm256_loadu_si256(out)));
                }
            }
        }
    }

    macro_rules! instance {
        ($name:ident, $lanes:ty, $features:literal) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name(
                w: *const i8,
                group: usize,
                groups: usize,
                a: &[u8],
                width: usize,
                tokens: Range<usize>,
                sums: &mut [i32],
            ) {
                unsafe { panel::<$lanes>(w, group, groups, a, width, tokens, sums) }
            }
        };
    }
    instance!(panel_vnni, Vnni, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");
    instance!(panel_avx2, Avx2, "avx2,fma,f16c");
}
