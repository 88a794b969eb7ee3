//! Dot products of a row of weights with a row of activations, by storage type and instruction set.

use crate::ops::cpu::simd::Simd;
use half::{bf16, f16};
use std::marker::PhantomData;

/// One way to multiply and add; lanes run along the inner dimension.
///
/// # Safety
/// Every function needs the instruction set of the implementing type and pointers valid for the elements it reads.
#[allow(clippy::missing_safety_doc)] // one contract for the whole trait, stated above
pub trait Dot {
    /// Stored weight and prepared activation.
    type W: Copy + Send + Sync + 'static;
    type A: Copy + Default + Send + Sync + 'static;
    /// Loaded vectors and sums.
    type Wv: Copy;
    type Av: Copy;
    type Acc: Copy;
    /// A finished sum, to be scaled by [`super::Weights`].
    type Sum: Copy + Default + Send + Sync + std::ops::AddAssign + 'static;

    /// Elements of one load.
    const STEP: usize;
    /// Whether there are registers for a tile of 4 x 6 sums (else 2 x 2).
    const WIDE: bool;

    unsafe fn zero() -> Self::Acc;
    unsafe fn load_w(p: *const Self::W) -> Self::Wv;
    /// The first `n` elements, zeros behind.
    unsafe fn load_w_partial(p: *const Self::W, n: usize) -> Self::Wv;
    unsafe fn load_a(p: *const Self::A) -> Self::Av;
    unsafe fn dot(acc: Self::Acc, w: Self::Wv, a: Self::Av) -> Self::Acc;
    unsafe fn sum(acc: Self::Acc) -> Self::Sum;
    /// Sixteen sums, each equal to [`Dot::sum`] of its accumulator.
    #[inline(always)]
    unsafe fn sum16(acc: &[Self::Acc; 16]) -> [Self::Sum; 16] {
        std::array::from_fn(|i| unsafe { Self::sum(acc[i]) })
    }
    /// [`Dot::sum16`] for eight.
    #[inline(always)]
    unsafe fn sum8(acc: &[Self::Acc; 8]) -> [Self::Sum; 8] {
        std::array::from_fn(|i| unsafe { Self::sum(acc[i]) })
    }
}

/// A type that vectors of f32 can be read from.
///
/// # Safety
/// As for [`Simd`].
#[allow(clippy::missing_safety_doc)]
pub trait Element: Copy + Send + Sync + 'static {
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    unsafe fn load_partial<S: Simd>(p: *const Self, n: usize) -> S::V;
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    fn from_f32(x: f32) -> Self;
}

macro_rules! element {
    ($t:ty, $load:ident, $partial:ident, $store:ident, $from:expr) => {
        impl Element for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const Self) -> S::V {
                unsafe { S::$load(p) }
            }
            #[inline(always)]
            unsafe fn load_partial<S: Simd>(p: *const Self, n: usize) -> S::V {
                unsafe { S::$partial(p, n) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
                unsafe { S::$store(p, v) }
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
        }
    };
}
element!(f32, load, load_partial, store, |x| x);
element!(f16, load_f16, load_f16_partial, store_f16, f16::from_f32);
element!(bf16, load_bf16, load_bf16_partial, store_bf16, bf16::from_f32);

/// Weights widened to f32, activations in f32.
pub struct Float<S, E>(PhantomData<(S, E)>);

impl<S: Simd, E: Element> Dot for Float<S, E> {
    type W = E;
    type A = f32;
    type Wv = S::V;
    type Av = S::V;
    type Acc = S::V;
    type Sum = f32;
    const STEP: usize = 16;
    const WIDE: bool = S::REGISTERS >= 32;

    #[inline(always)]
    unsafe fn zero() -> S::V {
        unsafe { S::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load_w(p: *const E) -> S::V {
        unsafe { E::load::<S>(p) }
    }
    #[inline(always)]
    unsafe fn load_w_partial(p: *const E, n: usize) -> S::V {
        unsafe { E::load_partial::<S>(p, n) }
    }
    #[inline(always)]
    unsafe fn load_a(p: *const f32) -> S::V {
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn dot(acc: S::V, w: S::V, a: S::V) -> S::V {
        unsafe { S::fma(w, a, acc) }
    }
    #[inline(always)]
    unsafe fn sum(acc: S::V) -> f32 {
        unsafe { S::sum(acc) }
    }
    #[inline(always)]
    unsafe fn sum16(acc: &[S::V; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        unsafe { S::store(out.as_mut_ptr(), S::sum16(acc)) };
        out
    }
    #[inline(always)]
    unsafe fn sum8(acc: &[S::V; 8]) -> [f32; 8] {
        unsafe { S::sum8(acc) }
    }
}

/// 8-bit weights with activations of 8 bits, offset by 128; sums are exact, on every instruction set the same.
pub struct Int8Portable;

impl Dot for Int8Portable {
    type W = i8;
    type A = u8;
    type Wv = [i8; 16];
    type Av = [u8; 16];
    type Acc = [i32; 16];
    type Sum = i32;
    const STEP: usize = 16;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn load_w(p: *const i8) -> [i8; 16] {
        unsafe { p.cast::<[i8; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_w_partial(p: *const i8, n: usize) -> [i8; 16] {
        let mut v = [0; 16];
        unsafe { std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n) };
        v
    }
    #[inline(always)]
    unsafe fn load_a(p: *const u8) -> [u8; 16] {
        unsafe { p.cast::<[u8; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; 16], w: [i8; 16], a: [u8; 16]) -> [i32; 16] {
        std::array::from_fn(|i| acc[i] + w[i] as i32 * a[i] as i32)
    }
    #[inline(always)]
    unsafe fn sum(acc: [i32; 16]) -> i32 {
        acc.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Bf16Avx512, Int8Avx2, Int8Vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Dot;
    use crate::ops::cpu::simd::{Avx512, Simd, sum8_i32, sum16_i32};
    use half::bf16;
    use std::arch::x86_64::*;

    /// bf16 weights and activations, 32 products and 16 sums an instruction (`vdpbf16ps`).
    pub struct Bf16Avx512;

    impl Dot for Bf16Avx512 {
        type W = bf16;
        type A = bf16;
        type Wv = __m512i;
        type Av = __m512i;
        type Acc = __m512;
        type Sum = f32;
        const STEP: usize = 32;
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const bf16) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_w_partial(p: *const bf16, n: usize) -> __m512i {
            unsafe { _mm512_maskz_loadu_epi16(((1u64 << n) - 1) as __mmask32, p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_a(p: *const bf16) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512, w: __m512i, a: __m512i) -> __m512 {
            unsafe {
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(w),
                    std::mem::transmute::<__m512i, __m512bh>(a),
                )
            }
        }
        #[inline(always)]
        unsafe fn sum(acc: __m512) -> f32 {
            unsafe { Avx512::sum(acc) }
        }
        #[inline(always)]
        unsafe fn sum16(acc: &[__m512; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            unsafe { Avx512::store(out.as_mut_ptr(), Avx512::sum16(acc)) };
            out
        }
        #[inline(always)]
        unsafe fn sum8(acc: &[__m512; 8]) -> [f32; 8] {
            unsafe { Avx512::sum8(acc) }
        }
    }

    /// 64 products and 16 sums an instruction (`vpdpbusd`).
    pub struct Int8Vnni;

    impl Dot for Int8Vnni {
        type W = i8;
        type A = u8;
        type Wv = __m512i;
        type Av = __m512i;
        type Acc = __m512i;
        type Sum = i32;
        const STEP: usize = 64;
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const i8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_w_partial(p: *const i8, n: usize) -> __m512i {
            unsafe { _mm512_maskz_loadu_epi8((1u64 << n) - 1, p) }
        }
        #[inline(always)]
        unsafe fn load_a(p: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, a, w) }
        }
        #[inline(always)]
        unsafe fn sum(acc: __m512i) -> i32 {
            unsafe { _mm512_reduce_add_epi32(acc) }
        }
        #[inline(always)]
        unsafe fn sum16(acc: &[__m512i; 16]) -> [i32; 16] {
            unsafe { sum16_i32(acc) }
        }
        #[inline(always)]
        unsafe fn sum8(acc: &[__m512i; 8]) -> [i32; 8] {
            unsafe { sum8_i32(acc) }
        }
    }

    /// 16 products and 8 sums an instruction (`vpmaddwd` on values widened to 16 bits, which cannot saturate).
    pub struct Int8Avx2;

    impl Dot for Int8Avx2 {
        type W = i8;
        type A = u8;
        type Wv = __m256i;
        type Av = __m256i;
        type Acc = __m256i;
        type Sum = i32;
        const STEP: usize = 16;
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> __m256i {
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const i8) -> __m256i {
            unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_w_partial(p: *const i8, n: usize) -> __m256i {
            let mut v = [0i8; 16];
            unsafe {
                std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n);
                Self::load_w(v.as_ptr())
            }
        }
        #[inline(always)]
        unsafe fn load_a(p: *const u8) -> __m256i {
            unsafe { _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)) }
        }
        #[inline(always)]
        unsafe fn sum(acc: __m256i) -> i32 {
            let mut lanes = [0i32; 8];
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), acc) };
            lanes.iter().sum()
        }
    }
}
