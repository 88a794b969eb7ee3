//! Which kernel multiplies how many tokens with a matrix, and what it is launched with.

use super::{Cuda, DeviceWeight, abi};
use crate::device::Launcher;
use crate::ops::Weight as _;

/// Of the skinny kernels; those of the large tiles have as many threads.
pub(super) const THREADS: u32 = abi::LINEAR_LARGE_THREADS as u32;
pub(super) const WARPS: usize = abi::SKINNY_WARPS;
pub(super) const OUTPUTS: usize = abi::SKINNY_OUTPUTS;
const _: () = assert!(THREADS as usize == 32 * WARPS);
/// Of the large tiles; those of clusters have as many outputs.
pub(super) const TILE: usize = abi::LINEAR_LARGE_TILE;
pub(super) const SLICE: usize = abi::LINEAR_SLICE;
const STAGES: usize = abi::LINEAR_LARGE_STAGES;
const _: () = assert!(TILE == abi::LINEAR_CLUSTER_OUTPUTS);
/// Of the largest tiles on Hopper: tokens and outputs of a tile, threads, shared memory of the
/// stages, of their barriers, and of the sums that wait to be written.
pub(super) const HOPPER_M: usize = abi::LINEAR_HOPPER_TOKENS;
pub(super) const HOPPER_N: usize = abi::LINEAR_HOPPER_OUTPUTS;
pub(super) const HOPPER_THREADS: u32 = abi::LINEAR_HOPPER_THREADS as u32;
pub(super) const HOPPER_SHARED: usize = abi::LINEAR_HOPPER_STAGES
    * ((HOPPER_M + HOPPER_N) * SLICE * 2 + 2 * 8)
    + abi::LINEAR_HOPPER_STAGED_BYTES;
/// Of clusters and of the LM head on Hopper.
pub(super) const TILE_THREADS: u32 = abi::LINEAR_CLUSTER_THREADS as u32;
/// Maximum blocks of a cluster that every Hopper GPU has.
const CLUSTER: usize = 8;
/// Maximum tokens of one launch of the skinny kernels; more go to the tiles.
pub(super) const TOKENS: usize = 64;
/// Maximum tokens that every block normalizes for itself; beyond, a launch of its own costs less.
/// On Hopper also the maximum tokens of the skinny kernels: they read activations once for 16
/// outputs, which beyond is more than the weights.
pub(super) const FEW_TOKENS: usize = 16;

/// The kernel of a GEMM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum LinearKernel {
    /// Up to [`TOKENS`] at a time, weights once for each time.
    Skinny,
    /// Tiles of [`TILE`] by [`TILE`].
    Large,
    /// Hopper's tiles of so many tokens by [`TILE`] outputs, each by a cluster of so many blocks.
    Cluster { tokens: usize, blocks: usize },
    /// Hopper's tiles of [`HOPPER_M`] by [`HOPPER_N`].
    Hopper,
}

/// Shared memory of `kernels/include/tiles_hopper.cuh`: the ring and its barriers.
pub(super) fn tile_shared(tokens: usize) -> usize {
    let stages = if tokens == 64 { 4 } else { 3 };
    stages * ((tokens + TILE) * SLICE * 2 + 2 * 8)
}

/// Kernel instances by tokens, in tiles of 16.
pub(super) fn tiles(tokens: usize) -> usize {
    match tokens.div_ceil(16) {
        0 | 1 => 1,
        2 => 2,
        _ => 4,
    }
}

impl<L: Launcher> Cuda<L> {
    /// The kernel for so many tokens.
    pub(super) fn linear_kernel(&self, tokens: usize, weight: &DeviceWeight<L>) -> LinearKernel {
        let limits = self.launcher.limits();
        let hopper = self.hopper() && !weight.int8();
        if self.batch_invariant || tokens <= if hopper { FEW_TOKENS } else { TOKENS } {
            return LinearKernel::Skinny;
        }
        if !hopper {
            return LinearKernel::Large;
        }
        let processors = limits.processors as usize;
        let tile = tile_tokens(tokens);
        let tiles = tokens.div_ceil(tile) * weight.rows().div_ceil(TILE);
        // A power of two. Up to 64 tokens, time is that of the weights, and nearly all
        // multiprocessors are to load them; two blocks share one, so there may be more blocks than
        // multiprocessors. Beyond, more than half are at work: to divide the inputs further would
        // add sums, but no tensor cores.
        let tenths = if tokens <= TOKENS { 9 } else { 7 };
        let wanted = (processors * tenths / 10).div_ceil(tiles).next_power_of_two().min(CLUSTER);
        let max = weight.cols().div_ceil(SLICE);
        let blocks = if wanted > max { (max + 1).next_power_of_two() / 2 } else { wanted };
        // what the busiest multiprocessor has to do, in units of the smaller tile
        let large =
            2 * (tokens.div_ceil(HOPPER_M) * weight.rows().div_ceil(HOPPER_N)).div_ceil(processors);
        if tokens > TOKENS && large * blocks <= (tiles * blocks).div_ceil(processors) {
            LinearKernel::Hopper
        } else {
            LinearKernel::Cluster { tokens: tile, blocks }
        }
    }
}

/// Tokens of a tile of Hopper's smaller ones.
pub(super) fn tile_tokens(tokens: usize) -> usize {
    if tokens <= 64 { 64 } else { 128 }
}

/// Shared memory of `kernels/linear_large.cu`.
pub(super) fn large_shared<L: Launcher>(weight: &DeviceWeight<L>) -> usize {
    STAGES * TILE * (2 * SLICE + if weight.int8() { SLICE + 16 } else { 2 * SLICE })
}

/// Rounds of weights that a warp of `kernels/linear_skinny.cu` keeps on their way, and where a
/// block has a multiprocessor to itself.
pub(super) const SHALLOW: usize = abi::SKINNY_SHALLOW;
pub(super) const DEEP: usize = abi::SKINNY_DEEP;

/// Shared memory of `kernels/linear_skinny.cu`: the warps' rings of weights, a norm's gain and
/// shift, and rows that are normalized or staged.
pub(super) fn skinny_shared(
    depth: usize,
    tokens: usize,
    inputs: usize,
    int8: bool,
    norm: bool,
    rows: bool,
) -> usize {
    let parameters = if norm { 2 * inputs * 4 } else { 0 };
    WARPS * depth * 2 * 16 * 32
        + parameters
        + if rows { rows_shared(tokens, inputs, int8) } else { 0 }
}

fn rows_shared(tokens: usize, inputs: usize, int8: bool) -> usize {
    tokens * (inputs + if int8 { 8 } else { 32 }) * 2
}

/// Whether the skinny kernels bring rows without a norm to shared memory: as long as two blocks
/// share a multiprocessor.
pub(super) fn stages_rows(tokens: usize, inputs: usize, int8: bool) -> bool {
    rows_shared(tokens, inputs, int8) <= 50 << 10
}
