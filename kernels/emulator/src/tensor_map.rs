//! Tensor maps: what kernels give to TMA to say which matrix tiles are copied from.

use crate::memory::Address;

/// How the 16-byte chunks of a tile are permuted in shared memory: by the driver's number.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u32)]
pub enum Swizzle {
    None,
    Bytes32,
    Bytes64,
    Bytes128,
}

impl Swizzle {
    pub const ALL: [Swizzle; 4] =
        [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128];

    /// Bytes of the longest row that it permutes.
    pub fn span(self) -> u32 {
        [16, 32, 64, 128][self as usize]
    }

    /// Where the byte `offset` of a tile lies, counted from an address aligned to 1024.
    pub fn place(self, offset: usize) -> usize {
        let rows = [0, 1, 3, 7][self as usize];
        offset ^ (offset >> 7 & rows) << 4
    }
}

/// The arguments of `cuTensorMapEncodeTiled` for a matrix of 16-bit elements; the inner dimension
/// comes first, as there.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapConfig {
    pub address: Address,
    pub global_dim: [u64; 2],
    /// In bytes, of the outer dimension.
    pub global_stride: u64,
    pub box_dim: [u32; 2],
    pub element_strides: [u32; 2],
    /// As the driver numbers them: 0, 32, 64 or 128 bytes.
    pub swizzle: u32,
}

/// On the GPU a tensor map is 128 bytes that only the driver can read; here it begins with these.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorMap {
    magic: u64,
    pub address: u64,
    pub cols: u64,
    pub rows: u64,
    pub stride: u64,
    pub tile_cols: u64,
    pub tile_rows: u64,
    swizzle: u64,
}

const MAGIC: u64 = 0x7465_6e73_6f72_6d70;

impl TensorMap {
    /// # Errors
    /// If these bytes are no tensor map.
    pub fn swizzle(&self) -> Result<Swizzle, String> {
        if self.magic != MAGIC {
            return Err("TMA is given something that is no tensor map".to_owned());
        }
        Ok(Swizzle::ALL[self.swizzle as usize])
    }
}

/// A tensor map for kernels.
///
/// # Errors
/// What the driver refuses as CUDA_ERROR_INVALID_VALUE.
pub fn tensor_map(c: &TensorMapConfig) -> Result<[u64; 16], String> {
    let refused = |what: String| Err(format!("a tensor map of {c:?}: {what}"));
    let Some(swizzle) = Swizzle::ALL.get(c.swizzle as usize) else {
        return refused("there are swizzles 0 to 3".into());
    };
    if !c.address.is_multiple_of(16) {
        return refused("the address is no multiple of 16".into());
    }
    if !c.global_stride.is_multiple_of(16) || c.global_stride >= 1 << 40 {
        return refused("the stride is no multiple of 16 below 2^40".into());
    }
    if c.global_stride < c.global_dim[0] * 2 {
        return refused("rows overlap".into());
    }
    if c.global_dim.iter().any(|&n| n == 0 || n > 1 << 32) {
        return refused("dimensions are 1 to 2^32".into());
    }
    if c.box_dim.iter().any(|n| !(1..=256).contains(n)) {
        return refused("a box has 1 to 256 elements along each dimension".into());
    }
    let row = c.box_dim[0] * 2;
    if !row.is_multiple_of(16) || *swizzle != Swizzle::None && row > swizzle.span() {
        return refused(format!("rows of {row} bytes do not fit the swizzle"));
    }
    if c.element_strides != [1, 1] {
        return refused("the emulator has element strides of 1 alone".into());
    }
    let mut map = [0; 16];
    let [cols, rows] = c.global_dim;
    let [tile_cols, tile_rows] = c.box_dim.map(u64::from);
    let words =
        [MAGIC, c.address, cols, rows, c.global_stride, tile_cols, tile_rows, c.swizzle.into()];
    map[..words.len()].copy_from_slice(&words);
    Ok(map)
}
