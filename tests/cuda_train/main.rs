//! The CUDA kernels of training, executed by the emulator, against the CPU.

mod attention;
#[path = "../emulated/mod.rs"]
mod emulated;
mod gemm;
mod losses;
mod model;
mod parallel;
mod ppo;
