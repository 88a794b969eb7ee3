//! AVX-512 and AVX2.

use super::Simd;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// [`Simd`] with AVX-512: one vector of sixteen lanes.
#[derive(Clone, Copy)]
pub struct Avx512;

#[inline(always)]
fn lane_mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// Adds up the lanes of sixteen vectors: each step adds the halves of two vectors and keeps both
/// sums side by side, so that 16 vectors become 8, 4, 2, 1. (Written out: a closure would not be
/// compiled with the instruction set.) Order within a sum: lane + 8, + 4, + 2, + 1, as in
/// [`Simd::sum`].
macro_rules! fold16 {
    ($v:expr, $add:ident) => {{
        let v: &[__m512; 16] = $v;
        let a: [__m512; 8] = [
            halves!(v[0], v[8], $add),
            halves!(v[1], v[9], $add),
            halves!(v[2], v[10], $add),
            halves!(v[3], v[11], $add),
            halves!(v[4], v[12], $add),
            halves!(v[5], v[13], $add),
            halves!(v[6], v[14], $add),
            halves!(v[7], v[15], $add),
        ];
        // a[i] = [x_i: 2 quarters, x_{i+8}: 2 quarters]
        let b: [__m512; 4] = [
            quarters!(a[0], a[4], $add),
            quarters!(a[1], a[5], $add),
            quarters!(a[2], a[6], $add),
            quarters!(a[3], a[7], $add),
        ];
        // b[i] quarters: x_i, x_{i+8}, x_{i+4}, x_{i+12}
        let c: [__m512; 2] = [pairs!(b[0], b[2], $add), pairs!(b[1], b[3], $add)];
        // c[i] quarter q: [x_k, x_k, x_{k+2}, x_{k+2}] with k = i + (0, 8, 4, 12)[q]
        let d = lanes!(c[0], c[1], $add);
        // d quarter q: x_k for k = base_q + (0, 2, 1, 3), base = 0, 8, 4, 12
        let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        _mm512_permutexvar_ps(order, d)
    }};
}

/// [`fold16`] for eight vectors.
macro_rules! fold8 {
    ($v:expr, $add:ident) => {{
        let v: &[__m512; 8] = $v;
        let a: [__m512; 4] = [
            halves!(v[0], v[4], $add),
            halves!(v[1], v[5], $add),
            halves!(v[2], v[6], $add),
            halves!(v[3], v[7], $add),
        ];
        // a[i] = [x_i: 2 quarters, x_{i+4}: 2 quarters]
        let b: [__m512; 2] = [quarters!(a[0], a[2], $add), quarters!(a[1], a[3], $add)];
        // b[i] quarters: x_i, x_{i+4}, x_{i+2}, x_{i+6}
        let c = pairs!(b[0], b[1], $add);
        // c quarter q: [x_k, x_k, x_{k+1}, x_{k+1}] with k = (0, 4, 2, 6)[q]
        let d = $add(c, _mm512_permute_ps::<0b10_11_00_01>(c));
        let order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm512_castps512_ps256(_mm512_permutexvar_ps(order, d))
    }};
}

macro_rules! halves {
    ($x:expr, $y:expr, $add:ident) => {
        $add(
            _mm512_shuffle_f32x4::<0b01_00_01_00>($x, $y),
            _mm512_shuffle_f32x4::<0b11_10_11_10>($x, $y),
        )
    };
}

macro_rules! quarters {
    ($x:expr, $y:expr, $add:ident) => {
        $add(
            _mm512_shuffle_f32x4::<0b10_00_10_00>($x, $y),
            _mm512_shuffle_f32x4::<0b11_01_11_01>($x, $y),
        )
    };
}

macro_rules! pairs {
    ($x:expr, $y:expr, $add:ident) => {
        $add(_mm512_shuffle_ps::<0b01_00_01_00>($x, $y), _mm512_shuffle_ps::<0b11_10_11_10>($x, $y))
    };
}

macro_rules! lanes {
    ($x:expr, $y:expr, $add:ident) => {
        $add(_mm512_shuffle_ps::<0b10_00_10_00>($x, $y), _mm512_shuffle_ps::<0b11_01_11_01>($x, $y))
    };
}

/// Transposes 16 x 16 words.
///
/// # Safety
/// Needs AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(w: &mut [__m512i; 16]) {
    let mut t = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
    for i in 0..4 {
        let s = 4 * i;
        w[s] = _mm512_unpacklo_epi64(t[s], t[s + 2]);
        w[s + 1] = _mm512_unpackhi_epi64(t[s], t[s + 2]);
        w[s + 2] = _mm512_unpacklo_epi64(t[s + 1], t[s + 3]);
        w[s + 3] = _mm512_unpackhi_epi64(t[s + 1], t[s + 3]);
    }
    // w[4g + j] holds, in its quarter q, column 4q + j of rows 4g..4g+4
    for j in 0..4 {
        let (a, b, c, d) = (w[j], w[4 + j], w[8 + j], w[12 + j]);
        let ab_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let ab_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        let cd_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
        let cd_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
        t[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_even, cd_even);
        t[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_even, cd_even);
        t[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd);
        t[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd);
    }
    *w = t;
}

impl Simd for Avx512 {
    type V = __m512;
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(lane_mask(n), p)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m512 {
        expand_bf16_512(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_f16_partial(p: *const f16, n: usize) -> __m512 {
        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(p: *const bf16, n: usize) -> __m512 {
        expand_bf16_512(_mm256_maskz_loadu_epi16(lane_mask(n), p.cast()))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, v: __m512, n: usize) {
        _mm512_mask_storeu_ps(p, lane_mask(n), v)
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut bf16, v: __m512) {
        // half a unit in the last place, a little less where the kept part is even
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: __m512) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m512) -> __m512 {
        _mm512_sqrt_ps(a)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: __m512, n: __m512) -> __m512 {
        _mm512_scalef_ps(a, n)
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        let halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        sum_256(halves)
    }
    #[inline(always)]
    unsafe fn first(v: __m512, n: usize, rest: __m512) -> __m512 {
        _mm512_mask_blend_ps(lane_mask(n), rest, v)
    }
    #[inline(always)]
    unsafe fn max_lane(v: __m512) -> f32 {
        _mm512_reduce_max_ps(v)
    }
    #[inline(always)]
    unsafe fn sum16(v: &[__m512; 16]) -> __m512 {
        fold16!(v, _mm512_add_ps)
    }
    #[inline(always)]
    unsafe fn sum8(v: &[__m512; 8]) -> [f32; 8] {
        let mut out = [0.0; 8];
        _mm256_storeu_ps(out.as_mut_ptr(), fold8!(v, _mm512_add_ps));
        out
    }
}

#[inline(always)]
unsafe fn expand_bf16_512(v: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v)))
}

#[inline(always)]
unsafe fn sum_256(v: __m256) -> f32 {
    let q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps::<1>(d, d)))
}

/// [`Simd`] with AVX2 and FMA: two vectors of eight lanes.
#[derive(Clone, Copy)]
pub struct Avx2;

#[derive(Clone, Copy)]
pub struct V2(__m256, __m256);

macro_rules! both {
    ($f:ident($($arg:ident),*)) => { V2($f($($arg.0),*), $f($($arg.1),*)) };
}

impl Simd for Avx2 {
    type V = V2;
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V2 {
        V2(_mm256_set1_ps(x), _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V2 {
        V2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)))
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> V2 {
        let mut a = [0f32; 16];
        std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
        Self::load(a.as_ptr())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> V2 {
        V2(
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
        )
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> V2 {
        let expand =
            |v: __m128i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)));
        V2(expand(_mm_loadu_si128(p.cast())), expand(_mm_loadu_si128(p.add(8).cast())))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V2) {
        _mm256_storeu_ps(p, v.0);
        _mm256_storeu_ps(p.add(8), v.1);
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, v: V2, n: usize) {
        let mut a = [0f32; 16];
        Self::store(a.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(a.as_ptr(), p, n);
    }
    #[inline(always)]
    unsafe fn add(a: V2, b: V2) -> V2 {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sub(a: V2, b: V2) -> V2 {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: V2, b: V2) -> V2 {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    unsafe fn div(a: V2, b: V2) -> V2 {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    unsafe fn max(a: V2, b: V2) -> V2 {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    unsafe fn min(a: V2, b: V2) -> V2 {
        both!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sqrt(a: V2) -> V2 {
        both!(_mm256_sqrt_ps(a))
    }
    #[inline(always)]
    unsafe fn fma(a: V2, b: V2, c: V2) -> V2 {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn round(a: V2) -> V2 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        V2(_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1))
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: V2, n: V2) -> V2 {
        let power = |n: __m256| {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        };
        V2(_mm256_mul_ps(a.0, power(n.0)), _mm256_mul_ps(a.1, power(n.1)))
    }
    #[inline(always)]
    unsafe fn sum(v: V2) -> f32 {
        sum_256(_mm256_add_ps(v.0, v.1))
    }
    #[inline(always)]
    unsafe fn max_lane(v: V2) -> f32 {
        let m = _mm256_max_ps(v.0, v.1);
        let q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps::<1>(m));
        let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
        _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps::<1>(d, d)))
    }
}
