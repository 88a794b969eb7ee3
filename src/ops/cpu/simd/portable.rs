//! The portable instruction set: plain Rust over arrays, which the compiler vectorises as it can.

use super::{LANES, Simd};
use half::{bf16, f16};

/// [`Simd`] in plain Rust, for every machine.
#[derive(Clone, Copy)]
pub struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    const REGISTERS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        p.cast::<V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> V {
        let mut v = [0.0; LANES];
        std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n);
        v
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> V {
        std::array::from_fn(|i| p.add(i).read_unaligned().to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> V {
        std::array::from_fn(|i| p.add(i).read_unaligned().to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        p.cast::<V>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, v: V, n: usize) {
        std::ptr::copy_nonoverlapping(v.as_ptr(), p, n)
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map(a, b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn sqrt(a: V) -> V {
        std::array::from_fn(|i| a[i].sqrt())
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // not mul_add: without FMA hardware that is a library call for every lane
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        // adding and taking away 1.5 * 2^23 leaves the nearest integer, for |a| < 2^22
        const MAGIC: f32 = 12_582_912.0;
        std::array::from_fn(|i| (a[i] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: V, n: V) -> V {
        std::array::from_fn(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        let a: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    unsafe fn max_lane(v: V) -> f32 {
        v.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
}
