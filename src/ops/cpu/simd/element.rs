//! The types that vectors of f32 are read from and written as.

use super::Simd;
use half::{bf16, f16};

/// A type that vectors of f32 can be read from.
///
/// # Safety
/// As for [`Simd`].
#[allow(clippy::missing_safety_doc)]
pub trait Element: Copy + Send + Sync + 'static {
    /// The [`LANES`](super::LANES) elements at `p`, widened to f32.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// The first `n <= 16` elements, zero in the other lanes.
    unsafe fn load_partial<S: Simd>(p: *const Self, n: usize) -> S::V;
    /// Writes the sixteen lanes at `p`, rounded to this type, ties to even.
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// The nearest value of this type, ties to even.
    fn from_f32(x: f32) -> Self;
}

macro_rules! element {
    ($t:ty, $load:ident, $partial:ident, $store:ident, $from:expr) => {
        impl Element for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const Self) -> S::V {
                S::$load(p)
            }
            #[inline(always)]
            unsafe fn load_partial<S: Simd>(p: *const Self, n: usize) -> S::V {
                S::$partial(p, n)
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
                S::$store(p, v)
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
