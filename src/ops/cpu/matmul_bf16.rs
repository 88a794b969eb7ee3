//! C = A B in bf16 with f32 accumulation, on AVX-512 BF16 (`vdpbf16ps`).
//!
//! Both operands are rounded to bf16 while they are packed: A to rows with the inner dimension
//! contiguous, B to panels of 64 columns in which each 32-bit word holds two neighbours along the
//! inner dimension. The micro-kernel keeps 6 x 64 sums in 24 registers; for each pair of inner
//! steps it loads 4 registers of B and broadcasts 6 words of A for 24 dot products of 2 x 16 lanes,
//! which keeps the dot-product port busy (64 FLOP a cycle).

use super::Cpu;
use super::matrix_view::MatrixView;
use super::simd::transpose;
use super::threads::Disjoint;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Rows and columns of the register tile.
const MR: usize = 6;
const NR: usize = 64;
/// Inner steps of one pass over a tile; a block of B is KC x 64 x 2 bytes = 64 KiB, in L2.
const KC: usize = 512;
/// Rows of A that a task takes: 192 x KC x 2 bytes = 192 KiB, in L2 with the block of B.
const MC: usize = 192;
/// Panels of B that a task takes.
const PANELS: usize = 4;

thread_local! {
    /// Packed operands, kept from call to call.
    static PACKED: RefCell<(Vec<u32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// See [`super::matmul::matmul`]; one of the two strides of A and of B must be 1.
pub fn matmul(
    cpu: &Cpu,
    c: &mut [f32],
    c_stride: usize,
    a: MatrixView,
    b: MatrixView,
    accumulate: bool,
) {
    PACKED.with_borrow_mut(|(pa, pb)| {
        let (m, n, k) = (a.rows, b.cols, a.cols);
        // inner pairs, padded so that whole registers can be written
        let pairs = k.div_ceil(32) * 16;
        let panels = n.div_ceil(NR);
        let strips = m.div_ceil(16);
        grow(pa, strips * 16 * pairs);
        grow(pb, panels * NR * pairs);
        let (da, db) = (Disjoint::new(pa), Disjoint::new(pb));
        // SAFETY: every strip and every panel is one task's; the machine has the instructions.
        cpu.threads.run(strips + panels, |task| unsafe {
            if task < strips {
                let out = da.slice(task * 16 * pairs..(task + 1) * 16 * pairs);
                pack_a(out, pairs, a, task * 16);
            } else {
                let panel = task - strips;
                let out = db.slice(panel * NR * pairs..(panel + 1) * NR * pairs);
                pack_b(out, pairs, b, panel * NR);
            }
        });
        let (pa, pb) = (&*pa, &*pb);
        let out = Disjoint::new(c);
        let (blocks_m, blocks_n) = (m.div_ceil(MC), panels.div_ceil(PANELS));
        cpu.threads.run(blocks_m * blocks_n, |task| {
            let rows = task / blocks_n * MC..(task / blocks_n * MC + MC).min(m);
            let first = task % blocks_n * PANELS;
            for kp in (0..pairs).step_by(KC / 2) {
                let kn = (pairs - kp).min(KC / 2);
                for panel in first..(first + PANELS).min(panels) {
                    let width = NR.min(n - panel * NR);
                    let b = &pb[(panel * pairs + kp) * NR..(panel * pairs + kp + kn) * NR];
                    let mut i = rows.start;
                    while i < rows.end {
                        let height = MR.min(rows.end - i);
                        let c =
                            out.tile(i * c_stride + panel * NR, (height - 1) * c_stride + width);
                        // SAFETY: tiles of C are disjoint; `pa` and `b` hold `kn` pairs a row.
                        unsafe {
                            let a = pa.as_ptr().add(i * pairs + kp);
                            let add = accumulate || kp > 0;
                            match height {
                                6 => tile::<6>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                                5 => tile::<5>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                                4 => tile::<4>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                                3 => tile::<3>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                                2 => tile::<2>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                                _ => tile::<1>(c, c_stride, a, pairs, b.as_ptr(), kn, width, add),
                            }
                        }
                        i += height;
                    }
                }
            }
        });
    });
}

fn grow(v: &mut Vec<u32>, len: usize) {
    if v.len() < len {
        v.resize(len, 0);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<const M: usize>(
    c: *mut f32,
    c_stride: usize,
    a: *const u32,
    a_stride: usize,
    b: *const u32,
    pairs: usize,
    width: usize,
    add: bool,
) {
    let mut sums = [[_mm512_setzero_ps(); 4]; M];
    let mut b = b;
    for p in 0..pairs {
        let bs: [__m512bh; 4] =
            std::array::from_fn(|j| std::mem::transmute(_mm512_loadu_si512(b.add(j * 16).cast())));
        for (i, row) in sums.iter_mut().enumerate() {
            let x: __m512bh =
                std::mem::transmute(_mm512_set1_epi32(*a.add(i * a_stride + p) as i32));
            for (sum, b) in row.iter_mut().zip(bs) {
                *sum = _mm512_dpbf16_ps(*sum, x, b);
            }
        }
        b = b.add(NR);
    }
    for (i, row) in sums.iter().enumerate() {
        for (j, sum) in row.iter().enumerate() {
            let lanes = width.saturating_sub(j * 16).min(16);
            let mask = ((1u32 << lanes) - 1) as __mmask16;
            let p = c.add(i * c_stride + j * 16);
            let old = if add { _mm512_maskz_loadu_ps(mask, p) } else { _mm512_setzero_ps() };
            _mm512_mask_storeu_ps(p, mask, _mm512_add_ps(old, *sum));
        }
    }
}

/// 16 rows of A from `first` on, as `[row][pair]` words; zeros beyond the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_a(out: &mut [u32], pairs: usize, a: MatrixView, first: usize) {
    let rows = 16.min(a.rows - first);
    for p in (0..pairs).step_by(16) {
        // SAFETY: `load_words` masks what lies beyond the matrix; `out` holds 16 rows of `pairs`.
        unsafe {
            let mut words = load_words(a, first, rows, 2 * p);
            if a.col_stride != 1 {
                transpose(&mut words);
            }
            for (i, w) in words.iter().enumerate() {
                _mm512_storeu_si512(out.as_mut_ptr().add(i * pairs + p).cast(), *w);
            }
        }
    }
}

/// 64 columns of B from `first` on, as `[pair][column]` words; zeros beyond the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_b(out: &mut [u32], pairs: usize, b: MatrixView, first: usize) {
    let b = b.t();
    for j in (0..NR).step_by(16) {
        let columns = 16.min(b.rows.saturating_sub(first + j));
        for p in (0..pairs).step_by(16) {
            // SAFETY: as in `pack_a`; `out` holds `pairs` rows of 64.
            unsafe {
                let mut words = load_words(b, first + j, columns, 2 * p);
                if b.col_stride == 1 {
                    transpose(&mut words);
                }
                for (i, w) in words.iter().enumerate() {
                    _mm512_storeu_si512(out.as_mut_ptr().add((p + i) * NR + j).cast(), *w);
                }
            }
        }
    }
}

/// The block of `rows <= 16` rows from `first` and 32 inner steps from `k`, rounded to bf16 pairs:
/// `[row][pair]` if the inner dimension is contiguous, `[pair][row]` if the rows are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn load_words(v: MatrixView, first: usize, rows: usize, k: usize) -> [__m512i; 16] {
    let mut words = [_mm512_setzero_si512(); 16];
    let inner = v.cols.saturating_sub(k).min(32);
    let mask = |n: usize| ((1u32 << n) - 1) as __mmask16;
    let at = |row: usize, k: usize| v.data.as_ptr().add(row * v.row_stride + k * v.col_stride);
    if v.col_stride == 1 {
        let (m0, m1) = (mask(inner.min(16)), mask(inner.saturating_sub(16)));
        for (i, w) in words.iter_mut().enumerate().take(rows) {
            if inner == 0 {
                break;
            }
            let low = _mm512_maskz_loadu_ps(m0, at(first + i, k));
            let high = _mm512_maskz_loadu_ps(m1, at(first + i, k).wrapping_add(16));
            *w = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        }
    } else {
        debug_assert_eq!(v.row_stride, 1);
        let lanes = mask(rows);
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for (i, w) in words.iter_mut().enumerate() {
            let load = |step: usize| {
                if step < inner {
                    _mm512_maskz_loadu_ps(lanes, at(first, k + step))
                } else {
                    _mm512_setzero_ps()
                }
            };
            let both = _mm512_cvtne2ps_pbh(load(2 * i + 1), load(2 * i));
            *w = _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(both));
        }
    };
    words
}
