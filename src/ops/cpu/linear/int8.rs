//! y = x W^T with 8-bit weights, quantized at load and laid out for the instructions that multiply
//! them: [`super::lanes`] with words of four inner elements, for `vpdpbusd`. The products are
//! integers and exact.

use super::super::Cpu;
use super::super::simd::InstructionSet;
use super::super::threads::Disjoint;
use super::StoreFn;
use super::lanes::{self, GROUP, Groups, Lanes, Panel, WORD as INNER, panel};
use crate::simd_fn;
use crate::tensor::Bytes;
use std::cell::RefCell;

/// 8-bit weights with one scale for each row.
pub struct Int8Weight {
    /// `[rows / 16][inputs / 4][16][4]`, zeros in what lies beyond the matrix.
    data: Bytes,
    pub scales: Vec<f32>,
    /// Sum of each row, which takes the activations' offset out of its products.
    sums: Vec<i32>,
    cols: usize,
}

impl Int8Weight {
    /// Quantizes rows of `cols` elements that `row` makes.
    pub fn new(
        cpu: &Cpu,
        rows: usize,
        cols: usize,
        row: impl Fn(usize) -> Vec<f32> + Sync,
    ) -> std::io::Result<Int8Weight> {
        let (words, count) = (cols.div_ceil(INNER), rows.div_ceil(GROUP));
        let (mut scales, mut sums) = (vec![0.0; rows], vec![0; rows]);
        let data = Bytes::in_huge_pages(count * words * GROUP * INNER, |data| {
            let (data, scales, sums) =
                (Disjoint::new(data), Disjoint::new(&mut scales), Disjoint::new(&mut sums));
            cpu.threads.run_ranges(count, 4, |groups| {
                let mut quantized = vec![0u32; words];
                for i in groups.start * GROUP..(groups.end * GROUP).min(rows) {
                    let bytes = bytemuck::cast_slice_mut::<u32, u8>(&mut quantized);
                    let group = i / GROUP * words * GROUP * INNER;
                    // SAFETY: every group is one task's.
                    let (scale, sum, group) = unsafe {
                        (
                            scales.slice(i..i + 1),
                            sums.slice(i..i + 1),
                            data.slice(group..group + words * GROUP * INNER),
                        )
                    };
                    scale[0] = quantize_offset(cpu.isa, &row(i), bytes);
                    // the offset goes, here and below, and what is behind the row becomes zero with
                    // it
                    bytes[cols..].fill(128);
                    sum[0] =
                        bytes.iter().map(|&q| q as i32).sum::<i32>() - 128 * bytes.len() as i32;
                    let lanes = bytemuck::cast_slice_mut::<u8, [u32; GROUP]>(group);
                    for (lanes, word) in lanes.iter_mut().zip(&quantized) {
                        lanes[i % GROUP] = word ^ 0x8080_8080;
                    }
                }
            });
        })?;
        Ok(Int8Weight { data, scales, sums, cols })
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
    /// Outputs of one token, kept from call to call.
    static OUTPUTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes x W^T for `x` = `[tokens, inputs]`, and hands every token's outputs to `store`, panel
/// by panel.
pub fn gemm_nt(cpu: &Cpu, x: &[f32], w: &Int8Weight, store: &StoreFn) {
    let (rows, inputs) = (w.rows(), w.cols);
    let tokens = x.len() / inputs;
    let panel: Panel<i32> = match cpu.isa.set() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512Bf16 => x86::panel_vnni,
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 | InstructionSet::Avx2 => x86::panel_avx2,
        _ => panel::<Portable>,
    };
    // each token is scaled by its largest element; 128 is zero
    let mut scales = vec![0f32; tokens];
    let scales_out = Disjoint::new(&mut scales);
    // SAFETY: every token is one task's.
    let quantize = |x: &[f32], row: &mut [u8], t: usize| unsafe {
        scales_out.slice(t..t + 1)[0] = quantize_offset(cpu.isa, x, row);
    };
    lanes::prepare(cpu, x, inputs, quantize, |a| {
        // SAFETY: all scales are written, and nobody writes them now.
        let scales = unsafe { &*scales_out.slice(0..tokens) };
        lanes::tasks(
            cpu,
            rows.div_ceil(GROUP),
            tokens,
            |group, count, tokens, sums: &mut [i32]| {
                let first = group * GROUP;
                let real = (count * GROUP).min(rows - first);
                // SAFETY: the instruction set was matched above; the panel lies inside the weights.
                unsafe {
                    let at = w.data.as_ptr().add(group * w.group());
                    panel(Groups { at, bytes: w.group(), count }, a, tokens.clone(), sums);
                }
                OUTPUTS.with_borrow_mut(|outputs| {
                    outputs.resize(real, 0.0);
                    for (t, sums) in tokens.zip(sums.chunks_exact(count * GROUP)) {
                        scale_sums(
                            cpu.isa,
                            sums,
                            &w.sums[first..],
                            &w.scales[first..],
                            scales[t],
                            outputs,
                        );
                        store(t, first, outputs);
                    }
                });
            },
        );
    });
}

simd_fn! {
    /// Rounds `x` to whole multiples, at most 127, of the returned scale (its largest element over
    /// 127), and adds 128.
    pub fn quantize_offset<S>(x: &[f32], out: &mut [u8]) -> f32 {
        let full = x.len() / 16 * 16;
        assert!(x.len() <= out.len());
        let mut max = S::splat(0.0);
        for i in (0..full).step_by(16) {
            let v = S::load(x.as_ptr().add(i));
            max = S::max(max, S::max(v, S::sub(S::splat(0.0), v)));
        }
        let max = x[full..].iter().fold(S::max_lane(max), |m, v| m.max(v.abs()));
        let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
        for i in (0..full).step_by(16) {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(inverse));
            S::store_u8(out.as_mut_ptr().add(i), S::add(S::round(v), S::splat(128.0)));
        }
        for i in full..x.len() {
            out[i] = ((x[i] * inverse).round_ties_even() + 128.0) as u8;
        }
        max / 127.0
    }
}

simd_fn! {
    /// Outputs of one token: takes the activations' offset out and applies both scales.
    fn scale_sums<S>(
        sums: &[i32], row_sums: &[i32], row_scales: &[f32], scale: f32, out: &mut [f32],
    ) {
        let n = out.len();
        let (sums, row_sums, row_scales) = (&sums[..n], &row_sums[..n], &row_scales[..n]);
        for i in 0..n {
            out[i] = (sums[i] - 128 * row_sums[i]) as f32 * (scale * row_scales[i]);
        }
    }
}

/// Plain Rust.
struct Portable;

impl Lanes for Portable {
    type Acc = [i32; GROUP];
    type W = [[i8; INNER]; GROUP];
    type Sum = i32;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::Acc {
        [0; GROUP]
    }
    #[inline(always)]
    unsafe fn begin(_: *const i32) -> Self::Acc {
        [0; GROUP]
    }
    #[inline(always)]
    unsafe fn load(w: *const u8) -> Self::W {
        w.cast::<Self::W>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc {
        let a = a.cast::<[u8; INNER]>().read_unaligned();
        std::array::from_fn(|i| {
            (0..INNER).fold(acc[i], |sum, k| sum + w[i][k] as i32 * a[k] as i32)
        })
    }
    #[inline(always)]
    unsafe fn end(acc: Self::Acc, out: *mut i32) {
        for (i, sum) in acc.into_iter().enumerate() {
            *out.add(i) += sum;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::lanes::panel_instance;
    use super::Lanes;
    use std::arch::x86_64::*;

    /// 64 multiply-adds an instruction.
    pub struct Vnni;

    impl Lanes for Vnni {
        type Acc = __m512i;
        type W = __m512i;
        type Sum = i32;
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            _mm512_setzero_si512()
        }
        #[inline(always)]
        unsafe fn begin(out: *const i32) -> __m512i {
            _mm512_loadu_si512(out.cast())
        }
        #[inline(always)]
        unsafe fn load(w: *const u8) -> __m512i {
            _mm512_loadu_si512(w.cast())
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512i, w: __m512i, a: *const u8) -> __m512i {
            _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(a.cast::<i32>().read_unaligned()), w)
        }
        #[inline(always)]
        unsafe fn end(acc: __m512i, out: *mut i32) {
            _mm512_storeu_si512(out.cast(), acc)
        }
    }

    /// Values widened to 16 bits, whose products by pairs (`vpmaddwd`) cannot saturate.
    pub struct Avx2;

    impl Lanes for Avx2 {
        /// Four rows each, two partial sums a row.
        type Acc = [__m256i; 4];
        type W = [__m256i; 4];
        type Sum = i32;
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self::Acc {
            [_mm256_setzero_si256(); 4]
        }
        #[inline(always)]
        unsafe fn begin(_: *const i32) -> Self::Acc {
            Self::zero()
        }
        #[inline(always)]
        unsafe fn load(w: *const u8) -> Self::W {
            let part = w.cast::<__m128i>();
            let [a, b, c, d] = [part, part.add(1), part.add(2), part.add(3)];
            [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(a)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(b)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(c)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(d)),
            ]
        }
        #[inline(always)]
        unsafe fn dot(acc: Self::Acc, w: Self::W, a: *const u8) -> Self::Acc {
            let a = _mm256_cvtepu8_epi16(_mm_set1_epi32(a.cast::<i32>().read_unaligned()));
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(w[0], a)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(w[1], a)),
                _mm256_add_epi32(acc[2], _mm256_madd_epi16(w[2], a)),
                _mm256_add_epi32(acc[3], _mm256_madd_epi16(w[3], a)),
            ]
        }
        #[inline(always)]
        unsafe fn end(acc: Self::Acc, out: *mut i32) {
            for half in 0..2 {
                // halves of 128 bits hold rows 0 1 4 5 and 2 3 6 7 after the addition of
                // neighbours
                let sums = _mm256_hadd_epi32(acc[2 * half], acc[2 * half + 1]);
                let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(sums);
                let out = out.add(8 * half).cast::<__m256i>();
                _mm256_storeu_si256(out, _mm256_add_epi32(sums, _mm256_loadu_si256(out)));
            }
        }
    }

    panel_instance!(
        panel_vnni,
        Vnni,
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
    );
    panel_instance!(panel_avx2, Avx2, "avx2,fma,f16c");
}
