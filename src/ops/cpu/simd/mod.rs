//! Vectors of sixteen f32 lanes with one meaning on every instruction set.
//!
//! Kernels are written once, generic over [`Simd`], and compiled three times: AVX-512, AVX2 (two
//! 8-lane halves) and portable Rust. Sixteen lanes everywhere keep one reduction order, so that
//! a kernel's result never depends on how many rows share the call.

mod element;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use element::Element;
pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, transpose};

use half::{bf16, f16};

/// Lanes of a vector.
pub const LANES: usize = 16;

/// A set of instructions that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// What every machine has.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`InstructionSet::Avx512`] with BF16 dot products and VNNI.
    Avx512Bf16,
}

impl InstructionSet {
    /// Every set, slowest first.
    pub const ALL: [InstructionSet; 4] = [
        InstructionSet::Portable,
        InstructionSet::Avx2,
        InstructionSet::Avx512,
        InstructionSet::Avx512Bf16,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            InstructionSet::Portable => "portable",
            InstructionSet::Avx2 => "avx2",
            InstructionSet::Avx512 => "avx512",
            InstructionSet::Avx512Bf16 => "avx512-bf16",
        }
    }

    /// The right to run kernels with this set, if this machine has it.
    #[cfg(target_arch = "x86_64")]
    pub fn get(self) -> Option<Isa> {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let has = match self {
            InstructionSet::Portable => true,
            InstructionSet::Avx2 => avx2,
            InstructionSet::Avx512 => avx512,
            InstructionSet::Avx512Bf16 => {
                avx512
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
        };
        has.then_some(Isa(self))
    }

    /// The right to run kernels with this set, if this machine has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn get(self) -> Option<Isa> {
        (self == InstructionSet::Portable).then_some(Isa(self))
    }
}

/// An instruction set that this machine has: there is no other way to one than
/// [`InstructionSet::get`], so that safe functions can run what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(InstructionSet);

impl Isa {
    /// The fastest set of this machine.
    pub fn detect() -> Isa {
        Isa::available().last().unwrap_or(Isa(InstructionSet::Portable))
    }

    /// All sets of this machine, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        InstructionSet::ALL.into_iter().filter_map(InstructionSet::get)
    }

    /// Which set it is.
    pub fn set(self) -> InstructionSet {
        self.0
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Whether there are instructions for dot products of bf16 and of 8-bit integers.
    pub fn has_bf16(self) -> bool {
        self.0 == InstructionSet::Avx512Bf16
    }
}

/// Sixteen f32 lanes and what kernels do with them.
///
/// # Safety
/// Every function needs the instruction set of the implementing type, and pointers that are valid
/// for as many elements as the function's name or count says. No alignment is required.
#[allow(clippy::missing_safety_doc)] // one contract for the whole trait, stated above
pub trait Simd: Copy + 'static {
    /// Sixteen f32 lanes.
    type V: Copy;
    /// Vectors [`Simd::V`] that the registers hold.
    const REGISTERS: usize;

    /// `x` in all lanes.
    unsafe fn splat(x: f32) -> Self::V;
    /// Sixteen elements at `p`.
    unsafe fn load(p: *const f32) -> Self::V;
    /// The first `n <= 16` elements, zero in the other lanes.
    unsafe fn load_partial(p: *const f32, n: usize) -> Self::V;
    /// Sixteen elements at `p`, widened to f32.
    unsafe fn load_f16(p: *const f16) -> Self::V;
    /// Sixteen elements at `p`, widened to f32.
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    /// Writes all lanes at `p`.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Writes the first `n <= 16` lanes at `p`.
    unsafe fn store_partial(p: *mut f32, v: Self::V, n: usize);
    /// Writes all lanes at `p`, rounded to bf16, ties to even.
    #[inline(always)]
    unsafe fn store_bf16(p: *mut bf16, v: Self::V) {
        let mut a = [0f32; LANES];
        Self::store(a.as_mut_ptr(), v);
        for (i, x) in a.into_iter().enumerate() {
            *p.add(i) = bf16::from_f32(x);
        }
    }
    /// Writes all lanes at `p`, rounded to f16, ties to even.
    #[inline(always)]
    unsafe fn store_f16(p: *mut f16, v: Self::V) {
        let mut a = [0f32; LANES];
        Self::store(a.as_mut_ptr(), v);
        for (i, x) in a.into_iter().enumerate() {
            *p.add(i) = f16::from_f32(x);
        }
    }
    /// Writes all lanes at `p`, rounded to integers, ties to even; lanes must lie in 0..=255.
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: Self::V) {
        let mut a = [0f32; LANES];
        Self::store(a.as_mut_ptr(), Self::round(v));
        for (i, x) in a.into_iter().enumerate() {
            *p.add(i) = x as u8;
        }
    }
    /// a + b in each lane.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a - b in each lane.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a * b in each lane.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a / b in each lane.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of a and b in each lane.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of a and b in each lane.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// Square root of each lane.
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// a * 2^n for integral n in [-126, 127].
    unsafe fn scale_by_power(a: Self::V, n: Self::V) -> Self::V;
    /// Sum of the lanes: lane i + lane i+8, then +4, +2, +1.
    unsafe fn sum(v: Self::V) -> f32;
    /// The largest lane.
    unsafe fn max_lane(v: Self::V) -> f32;
    /// The first `n <= 16` lanes of `v`, behind them those of `rest`.
    #[inline(always)]
    unsafe fn first(v: Self::V, n: usize, rest: Self::V) -> Self::V {
        let mut a = [0f32; LANES];
        Self::store(a.as_mut_ptr(), rest);
        Self::store_partial(a.as_mut_ptr(), v, n);
        Self::load(a.as_ptr())
    }

    /// Sixteen sums, each in the order of [`Simd::sum`].
    #[inline(always)]
    unsafe fn sum16(v: &[Self::V; 16]) -> Self::V {
        let mut sums = [0f32; 16];
        for (s, v) in sums.iter_mut().zip(v) {
            *s = Self::sum(*v);
        }
        Self::load(sums.as_ptr())
    }

    /// Eight sums, each in the order of [`Simd::sum`].
    #[inline(always)]
    unsafe fn sum8(v: &[Self::V; 8]) -> [f32; 8] {
        std::array::from_fn(|i| Self::sum(v[i]))
    }

    /// The first `n <= 16` elements, widened to f32, zero in the other lanes.
    #[inline(always)]
    unsafe fn load_f16_partial(p: *const f16, n: usize) -> Self::V {
        let mut a = [f16::ZERO; LANES];
        std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
        Self::load_f16(a.as_ptr())
    }

    /// The first `n <= 16` elements, widened to f32, zero in the other lanes.
    #[inline(always)]
    unsafe fn load_bf16_partial(p: *const bf16, n: usize) -> Self::V {
        let mut a = [bf16::ZERO; LANES];
        std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
        Self::load_bf16(a.as_ptr())
    }

    /// e^x within 2 ulp for x in [-87, 88]; saturates outside.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        let x = Self::max(Self::min(x, Self::splat(88.0)), Self::splat(-87.0));
        let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
        // x - n ln 2 in two steps, so that the product with the high part is exact
        let r = Self::fma(n, Self::splat(-0.693_359_4), x);
        let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_2e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = Self::fma(p, r, Self::splat(c));
        }
        let p = Self::fma(Self::mul(p, r), r, Self::add(r, Self::splat(1.0)));
        Self::scale_by_power(p, n)
    }

    /// GELU in BLOOM's tanh form, written as x / (1 + exp(-2u)), u = sqrt(2/pi)(x + 0.044715 x^3).
    #[inline(always)]
    unsafe fn gelu(x: Self::V) -> Self::V {
        let x2 = Self::mul(x, x);
        let inner = Self::fma(x2, Self::splat(0.044715), Self::splat(1.0));
        let u2 = Self::mul(Self::mul(x, inner), Self::splat(-2.0 * GELU_SCALE));
        Self::div(x, Self::add(Self::splat(1.0), Self::exp(u2)))
    }

    /// d gelu(x) / dx times `g`.
    #[inline(always)]
    unsafe fn gelu_backward(x: Self::V, g: Self::V) -> Self::V {
        let one = Self::splat(1.0);
        let x2 = Self::mul(x, x);
        let inner = Self::fma(x2, Self::splat(0.044715), one);
        let u2 = Self::mul(Self::mul(x, inner), Self::splat(-2.0 * GELU_SCALE));
        let s = Self::div(one, Self::add(one, Self::exp(u2)));
        // gelu = x s(2u): derivative s + x s (1 - s) 2 u'
        let du = Self::mul(
            Self::fma(x2, Self::splat(3.0 * 0.044715), one),
            Self::splat(2.0 * GELU_SCALE),
        );
        let t = Self::mul(Self::mul(x, Self::sub(one, s)), du);
        Self::mul(g, Self::fma(s, t, s))
    }
}

/// sqrt(2 / pi) as BLOOM writes it.
pub const GELU_SCALE: f32 = 0.797_884_6;

/// Defines a function generic over [`Simd`] and a dispatcher of the same name whose first
/// argument is the [`Isa`]; each instance is compiled with its own target features.
#[macro_export]
macro_rules! simd_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$S:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::ops::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            // a plain loop needs no vocabulary: compiled with the instruction set, it is vectorized
            // all the same
            #[allow(clippy::extra_unused_type_parameters)]
            // bodies are kernels: all of one is unsafe, and says so by being in this macro
            #[allow(unsafe_op_in_unsafe_fn)]
            #[inline(always)]
            unsafe fn generic<$S: $crate::ops::cpu::simd::Simd>($($arg: $ty),*) $(-> $ret)? {
                $body
            }
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_op_in_unsafe_fn)] // its contract is that of the body
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                generic::<$crate::ops::cpu::simd::Avx512>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_op_in_unsafe_fn)] // its contract is that of the body
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                generic::<$crate::ops::cpu::simd::Avx2>($($arg),*)
            }
            // SAFETY: there is an `Isa` of machines alone that have the set; slices carry their
            // lengths.
            unsafe {
                match isa.set() {
                    #[cfg(target_arch = "x86_64")]
                    $crate::ops::cpu::simd::InstructionSet::Avx512
                    | $crate::ops::cpu::simd::InstructionSet::Avx512Bf16 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::ops::cpu::simd::InstructionSet::Avx2 => avx2($($arg),*),
                    _ => generic::<$crate::ops::cpu::simd::Portable>($($arg),*),
                }
            }
        }
    };
}

/// Asks for the cache line at `p`, into the first level or only the second; any address will do.
#[inline(always)]
pub fn prefetch<T, const FIRST: bool>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if FIRST {
            _mm_prefetch::<_MM_HINT_T0>(p.cast())
        } else {
            _mm_prefetch::<_MM_HINT_T1>(p.cast())
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
