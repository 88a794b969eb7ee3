//! Dot products of a row of weights with a row of activations, by storage type and instruction set.

use crate::ops::cpu::simd::{Element, Simd};
use std::marker::PhantomData;

/// One way to multiply and add; lanes run along the inner dimension.
///
/// # Safety
/// Every function needs the instruction set of the implementing type and pointers valid for the
/// elements it reads.
#[allow(clippy::missing_safety_doc)] // one contract for the whole trait, stated above
pub trait Dot {
    /// Stored weight and prepared activation.
    type W: Copy + Send + Sync + 'static;
    type A: Copy + Default + Send + Sync + 'static;
    /// Loaded vectors and sums.
    type Wv: Copy;
    type Av: Copy;
    type Acc: Copy;

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
    unsafe fn sum(acc: Self::Acc) -> f32;
    /// Sixteen sums, each equal to [`Dot::sum`] of its accumulator.
    #[inline(always)]
    unsafe fn sum16(acc: &[Self::Acc; 16]) -> [f32; 16] {
        std::array::from_fn(|i| Self::sum(acc[i]))
    }
    /// [`Dot::sum16`] for eight.
    #[inline(always)]
    unsafe fn sum8(acc: &[Self::Acc; 8]) -> [f32; 8] {
        std::array::from_fn(|i| Self::sum(acc[i]))
    }
}

/// Weights widened to f32, activations in f32.
pub struct Float<S, E>(PhantomData<(S, E)>);

impl<S: Simd, E: Element> Dot for Float<S, E> {
    type W = E;
    type A = f32;
    type Wv = S::V;
    type Av = S::V;
    type Acc = S::V;
    const STEP: usize = 16;
    const WIDE: bool = S::REGISTERS >= 32;

    #[inline(always)]
    unsafe fn zero() -> S::V {
        S::splat(0.0)
    }
    #[inline(always)]
    unsafe fn load_w(p: *const E) -> S::V {
        E::load::<S>(p)
    }
    #[inline(always)]
    unsafe fn load_w_partial(p: *const E, n: usize) -> S::V {
        E::load_partial::<S>(p, n)
    }
    #[inline(always)]
    unsafe fn load_a(p: *const f32) -> S::V {
        S::load(p)
    }
    #[inline(always)]
    unsafe fn dot(acc: S::V, w: S::V, a: S::V) -> S::V {
        S::fma(w, a, acc)
    }
    #[inline(always)]
    unsafe fn sum(acc: S::V) -> f32 {
        S::sum(acc)
    }
    #[inline(always)]
    unsafe fn sum16(acc: &[S::V; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        S::store(out.as_mut_ptr(), S::sum16(acc));
        out
    }
    #[inline(always)]
    unsafe fn sum8(acc: &[S::V; 8]) -> [f32; 8] {
        S::sum8(acc)
    }
}
