//! y = x W^T with bf16 weights on AVX-512 BF16: [`super::lanes`] with words of two inner elements,
//! for `vdpbf16ps`.
//!
//! Weights are laid out once, at load, in huge pages. The pause (0.2 s for BLOOM-1b1 on
//! two cores of Zen 5) comes back within some sixty tokens; laid out as they are used, from where
//! they lie in the file, one sequence decoded at a third of the speed.

use super::super::Cpu;
use super::super::finite::NotFinite;
use super::super::huge_pages::into_huge_pages;
use super::super::rows::f32_to_bf16;
use super::super::simd::transpose;
use super::StoreFn;
use super::lanes::{self, GROUP, Groups, Lanes, WORD, panel_instance};
use crate::tensor::{Bytes, DType};
use half::bf16;
use std::arch::x86_64::*;

/// `[rows, cols]`, laid out for the dot products.
pub struct Bf16Weight {
    /// `[rows / 16][cols / 2][16][2]`, zeros in what lies beyond the matrix.
    data: Bytes,
    rows: usize,
    cols: usize,
}

/// Bytes of a group of rows of `cols` elements.
fn group_bytes(cols: usize) -> usize {
    cols.div_ceil(2) * GROUP * WORD
}

impl Bf16Weight {
    /// Lays out a row-major matrix, in place where it is nobody else's, and looks for what is no
    /// number. `cpu` must have AVX-512 BF16.
    pub fn new(
        cpu: &Cpu,
        source: Bytes,
        [rows, cols]: [usize; 2],
        found: &NotFinite,
    ) -> std::io::Result<Bf16Weight> {
        let group = group_bytes(cols);
        let pack = |at: usize, from: &[u8], to: &mut [u8]| {
            found.look(cpu.isa, DType::Bf16, at / 2, from);
            // SAFETY: this type is only made where the instruction set is there.
            unsafe { pack_group(from, cols, to) }
        };
        let data = if rows.is_multiple_of(GROUP) && cols.is_multiple_of(2) {
            into_huge_pages(cpu, source, group, pack)?
        } else {
            Bytes::in_huge_pages(rows.div_ceil(GROUP) * group, |out| {
                let width = GROUP * cols * 2;
                for (i, (from, to)) in
                    source.chunks(width).zip(out.chunks_exact_mut(group)).enumerate()
                {
                    pack(i * width, from, to);
                }
            })?
        };
        Ok(Bf16Weight { data, rows, cols })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Copies a row in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let group = &self.data[row / GROUP * group_bytes(self.cols)..];
        for (k, v) in out.iter_mut().enumerate() {
            let at = (k / 2 * GROUP + row % GROUP) * WORD + k % 2 * 2;
            *v = bf16::from_le_bytes([group[at], group[at + 1]]).to_f32();
        }
    }
}

/// Computes x W^T; see [`super::gemm_nt`].
pub fn gemm_nt(cpu: &Cpu, x: &[f32], w: &Bf16Weight, store: &StoreFn) {
    let (rows, cols, bytes) = (w.rows, w.cols, group_bytes(w.cols));
    let convert = |x: &[f32], row: &mut [bf16], _| f32_to_bf16(cpu.isa, x, row);
    lanes::prepare(cpu, x, cols, convert, |a| {
        lanes::tasks(
            cpu,
            rows.div_ceil(GROUP),
            x.len() / cols,
            |first, count, tokens, sums: &mut [f32]| {
                let at = w.data[first * bytes..(first + count) * bytes].as_ptr();
                // SAFETY: such a matrix is only made where the instruction set is there; the panel
                // has so many groups.
                unsafe { panel_bf16(Groups { at, bytes, count }, a, tokens.clone(), sums) };
                let real = (count * GROUP).min(rows - first * GROUP);
                for (t, sums) in tokens.zip(sums.chunks_exact_mut(count * GROUP)) {
                    store(t, first * GROUP, &mut sums[..real]);
                }
            },
        );
    });
}

/// Lays out at most 16 rows of `cols` bf16 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_group(from: &[u8], cols: usize, to: &mut [u8]) {
    let rows = from.len() / (2 * cols);
    assert!(rows <= GROUP && from.len() == rows * 2 * cols && to.len() == group_bytes(cols));
    let words = cols.div_ceil(2);
    for word in (0..words).step_by(GROUP) {
        let inner = (cols - 2 * word).min(2 * GROUP);
        let mask = ((1u64 << inner) - 1) as __mmask32;
        let mut block = [_mm512_setzero_si512(); GROUP];
        // SAFETY: the mask covers elements of a row, `to` holds 16 rows of whole words.
        unsafe {
            for (row, lanes) in block.iter_mut().enumerate().take(rows) {
                let at = from.as_ptr().cast::<i16>().add(row * cols + 2 * word);
                *lanes = _mm512_maskz_loadu_epi16(mask, at);
            }
            transpose(&mut block);
            for (i, lanes) in block.iter().enumerate().take(words - word) {
                _mm512_storeu_si512(to.as_mut_ptr().add((word + i) * GROUP * WORD).cast(), *lanes);
            }
        }
    }
}

/// 32 multiply-adds an instruction.
pub struct Bf16;

impl Lanes for Bf16 {
    type Acc = __m512;
    type W = __m512bh;
    type Sum = f32;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn begin(out: *const f32) -> __m512 {
        _mm512_loadu_ps(out)
    }
    #[inline(always)]
    unsafe fn load(w: *const u8) -> __m512bh {
        std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(w.cast()))
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512, w: __m512bh, a: *const u8) -> __m512 {
        let a = _mm512_set1_epi32(a.cast::<i32>().read_unaligned());
        _mm512_dpbf16_ps(acc, w, std::mem::transmute::<__m512i, __m512bh>(a))
    }
    #[inline(always)]
    unsafe fn end(acc: __m512, out: *mut f32) {
        _mm512_storeu_ps(out, acc)
    }
}

panel_instance!(panel_bf16, Bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c");

#[cfg(test)]
mod tests {
    use super::super::{CpuWeight, gemm_nt};
    use crate::ops::cpu::Cpu;
    use crate::ops::cpu::simd::InstructionSet;
    use crate::ops::cpu::threads::Disjoint;
    use crate::random::PhiloxStream;
    use crate::tensor::{Bytes, DType, HostTensor};
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Against sums in f64 of the same rounded numbers; all tokens at once, and each alone.
        #[test]
        fn any_shape_is_exact_and_alone_as_in_company(
            rows in 1usize..120, cols in 1usize..700, tokens in 1usize..40,
        ) {
            let Some(isa) = InstructionSet::Avx512Bf16.get() else {
                return Ok(());
            };
            let cpu = Cpu::new(2, isa);
            let mut words = PhiloxStream::new(rows as u64, (cols * tokens) as u64);
            let mut noise = |n: usize| -> Vec<bf16> {
                (0..n).map(|_| bf16::from_f32(words.uniform() - 0.5)).collect()
            };
            let (w, x) = (noise(rows * cols), noise(tokens * cols));
            let x: Vec<f32> = x.into_iter().map(bf16::to_f32).collect();
            let fill = |to: &mut [u8]| to.copy_from_slice(bytemuck::cast_slice(&w));
            let bytes = Bytes::in_huge_pages(rows * cols * 2, fill).unwrap();
            let tensor = HostTensor { dtype: DType::Bf16, shape: vec![rows, cols], bytes };
            let matrix = CpuWeight::new(&cpu, tensor, None).unwrap();
            let mut row = vec![0f32; cols];
            matrix.read_row(rows - 1, &mut row);
            prop_assert!(row.iter().zip(&w[(rows - 1) * cols..]).all(|(a, b)| *a == b.to_f32()));
            let run = |x: &[f32]| {
                let mut out = vec![0f32; x.len() / cols * rows];
                let place = Disjoint::new(&mut out);
                gemm_nt(&cpu, x, &matrix, &|t, first, sums: &mut [f32]| {
                    let at = t * rows + first..t * rows + first + sums.len();
                    // SAFETY: every output is finished once.
                    unsafe { place.slice(at) }.copy_from_slice(sums);
                });
                out
            };
            let all = run(&x);
            for (t, x) in x.chunks_exact(cols).enumerate() {
                let ours = &all[t * rows..(t + 1) * rows];
                prop_assert!(run(x) == ours, "token {} alone", t);
                for (r, ours) in ours.iter().enumerate() {
                    let terms = x.iter().zip(&w[r * cols..]);
                    let exact: f64 = terms.map(|(x, w)| *x as f64 * w.to_f64()).sum();
                    // a quarter is the largest term; each addition rounds the sum so far
                    let max = cols as f64 * 0.25 * cols as f64 * f32::EPSILON as f64;
                    prop_assert!((*ours as f64 - exact).abs() <= max, "row {} of token {}: {} \
                        {}", r, t, ours, exact);
                }
            }
        }
    }
}
