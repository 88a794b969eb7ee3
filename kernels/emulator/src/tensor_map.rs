//! Tensor maps: what kernels give to TMA to say which matrix tiles are copied from.

use crate::memory::Address;

/// A row-major matrix `[rows, cols]` of 16-bit elements, and how many rows a tile has. On the GPU
/// a tensor map is 128 bytes that only the driver can read; here it begins with these.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorMap {
    pub magic: u64,
    pub at: u64,
    pub rows: u64,
    pub cols: u64,
    pub tile_rows: u64,
}

impl TensorMap {
    pub const MAGIC: u64 = 0x7465_6e73_6f72_6d70;
}

/// A tensor map for kernels: tiles of `tile_rows` by 64 of a row-major matrix `[rows, cols]` of
/// 16-bit elements, swizzled by 128 bytes, zeros beyond the matrix.
pub fn tensor_map(at: Address, rows: usize, cols: usize, tile_rows: usize) -> [u64; 16] {
    let mut map = [0; 16];
    map[..5].copy_from_slice(&[TensorMap::MAGIC, at, rows as u64, cols as u64, tile_rows as u64]);
    map
}
