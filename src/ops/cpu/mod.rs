//! The CPU backend.

pub mod matmul;
#[cfg(target_arch = "x86_64")]
mod matmul_bf16;
pub mod simd;
pub mod threads;
pub mod training;

use simd::Isa;
use threads::Threads;

/// The machine's processor: its threads and the instruction set to use.
pub struct Cpu {
    pub threads: Threads,
    pub isa: Isa,
}

impl Cpu {
    /// `threads` as for [`Threads::new`].
    pub fn new(threads: usize, isa: Isa) -> Cpu {
        Cpu { threads: Threads::new(threads), isa }
    }
}
