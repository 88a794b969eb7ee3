//! Weights that are no numbers: one NaN makes every logit one, so they are found while weights are
//! brought in.
//!
//! The check runs over bytes that are about to be copied, or have just been written, and so are in
//! a cache.

use super::Cpu;
use super::simd::Isa;
use crate::error::{Error, Result};
use crate::simd_fn;
use crate::tensor::{DType, HostTensor};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes that are looked through before the ones that hold something are searched.
const PART: usize = 1 << 14;

/// What many threads have found in one tensor.
pub struct NotFinite {
    count: AtomicUsize,
    first: AtomicUsize,
}

impl Default for NotFinite {
    fn default() -> Self {
        NotFinite { count: AtomicUsize::new(0), first: AtomicUsize::new(usize::MAX) }
    }
}

impl NotFinite {
    /// Looks through elements of a floating-point `dtype`, the first of which is the tensor's
    /// element `at`.
    pub fn look(&self, isa: Isa, dtype: DType, at: usize, bytes: &[u8]) {
        for (i, part) in bytes.chunks(PART).enumerate() {
            let any = match dtype {
                DType::F32 => any_f32(isa, part),
                DType::F16 => any_16(isa, part, 0x7c00),
                DType::Bf16 => any_16(isa, part, 0x7f80),
                DType::Int8 => false,
            };
            if any {
                self.search(dtype, at + i * PART / dtype.size(), part);
            }
        }
    }

    #[cold]
    fn search(&self, dtype: DType, at: usize, part: &[u8]) {
        for (i, e) in part.chunks_exact(dtype.size()).enumerate() {
            let finite = match dtype {
                DType::F32 => f32::from_le_bytes([e[0], e[1], e[2], e[3]]).is_finite(),
                DType::F16 => f16::from_le_bytes([e[0], e[1]]).is_finite(),
                DType::Bf16 => bf16::from_le_bytes([e[0], e[1]]).is_finite(),
                DType::Int8 => true,
            };
            if !finite {
                self.count.fetch_add(1, Relaxed);
                self.first.fetch_min(at + i, Relaxed);
            }
        }
    }

    /// An error if anything was found in a tensor of this shape; `what` says what it is, such as
    /// "NaN or infinite".
    pub fn result(&self, shape: &[usize], what: &str) -> Result<()> {
        let count = self.count.load(Relaxed);
        if count == 0 {
            return Ok(());
        }
        let mut rest = self.first.load(Relaxed);
        let mut index: Vec<usize> = shape.iter().rev().map(|&n| (rest % n, rest /= n).0).collect();
        index.reverse();
        let numbers = if count == 1 { "number that is" } else { "numbers that are" };
        Err(Error::Weights(format!("holds {count} {numbers} {what}, the first at {index:?}")))
    }
}

/// What [`NotFinite::result`] says of weights as they are stored.
pub const STORED: &str = "NaN or infinite (a broken conversion or a diverged training?)";

/// What [`NotFinite::result`] says of weights that were finite before they were converted.
pub fn overflowed(dtype: DType) -> String {
    format!("too large for {}; use --dtype bf16 or f32", dtype.name())
}

/// Looks through a whole tensor on the calling thread.
pub fn check(isa: Isa, tensor: &HostTensor) -> Result<()> {
    let found = NotFinite::default();
    found.look(isa, tensor.dtype, 0, &tensor.bytes);
    found.result(&tensor.shape, STORED)
}

/// [`check`] on all threads.
pub fn check_parallel(cpu: &Cpu, tensor: &HostTensor) -> Result<()> {
    let found = NotFinite::default();
    let parts = tensor.bytes.len().div_ceil(64 * PART);
    cpu.threads.run(parts, |i| {
        let range = i * 64 * PART..((i + 1) * 64 * PART).min(tensor.bytes.len());
        found.look(cpu.isa, tensor.dtype, range.start / tensor.dtype.size(), &tensor.bytes[range]);
    });
    found.result(&tensor.shape, STORED)
}

simd_fn! {
    /// Whether the exponent of any 16-bit element is all ones.
    fn any_16<S>(bytes: &[u8], exponent: u16) -> bool {
        let mut found = 0u16;
        for e in bytes.chunks_exact(2) {
            found |= u16::from(u16::from_le_bytes([e[0], e[1]]) & exponent == exponent);
        }
        found != 0
    }
}

simd_fn! {
    /// Whether the exponent of any f32 is all ones.
    fn any_f32<S>(bytes: &[u8]) -> bool {
        const EXPONENT: u32 = 0x7f80_0000;
        let mut found = 0u32;
        for e in bytes.chunks_exact(4) {
            found |= u32::from(u32::from_le_bytes([e[0], e[1], e[2], e[3]]) & EXPONENT == EXPONENT);
        }
        found != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_special_value_is_found_at_its_place_on_every_instruction_set() {
        let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for isa in Isa::available() {
            for len in [1usize, 31, 4097, 40_000] {
                for at in [0, len / 2, len - 1] {
                    for special in specials {
                        let mut values = vec![1.5f32; len];
                        values[0] = f32::MIN_POSITIVE;
                        values[at] = special;
                        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                        let f16s: Vec<u8> =
                            values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
                        let bf16s: Vec<u8> =
                            values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
                        for (dtype, bytes) in
                            [(DType::F32, f32s), (DType::F16, f16s), (DType::Bf16, bf16s)]
                        {
                            let found = NotFinite::default();
                            found.look(isa, dtype, 0, &bytes);
                            assert_eq!(
                                (found.count.into_inner(), found.first.into_inner()),
                                (1, at),
                                "{isa:?} {dtype:?}"
                            );
                        }
                    }
                }
            }
            let largest = [f32::MAX, f32::MIN, -0.0].map(f32::to_le_bytes).concat();
            let found = NotFinite::default();
            found.look(isa, DType::F32, 0, &largest);
            assert!(found.result(&[3], STORED).is_ok());
        }
        let found = NotFinite::default();
        found.look(Isa::detect(), DType::Bf16, 70, &[0x80, 0x7f, 0xff, 0xff]);
        let e = found.result(&[10, 16], STORED).unwrap_err().to_string();
        assert!(
            e.contains("holds 2 numbers that are NaN or infinite")
                && e.ends_with("first at [4, 6]"),
            "{e}"
        );
    }
}
