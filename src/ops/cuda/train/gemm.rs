//! GEMMs of training: logits, and the gradients of linear layers.

use super::super::{Cuda, abi};
use crate::device::{Args, Launcher};
use crate::error::Result;
use abi::{GEMM_ADD, GEMM_PARTIAL, GEMM_WRITE, GemmArgs};
use bytemuck::Zeroable;

const THREADS: u32 = abi::GEMM_TRAIN_THREADS as u32;
const TILE: usize = abi::GEMM_TRAIN_TILE;
const SLICE: usize = abi::GEMM_TRAIN_SLICE;
/// Both operands of all slices in work.
const SHARED: usize = abi::GEMM_TRAIN_STAGES * 2 * TILE * SLICE * 2;
/// Minimum slices of a part: less work would not be worth the trip of its sums through memory.
const PART_SLICES: usize = 4;

/// A row-major matrix in 16 bits on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    /// Where it begins, aligned to 16 bytes.
    pub at: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next, a multiple of 8. Those behind the columns are zeros.
    pub stride: usize,
}

impl Matrix {
    /// A matrix without padding, whose columns are a multiple of 8.
    pub fn new(at: u64, rows: usize, cols: usize) -> Matrix {
        Matrix { at, rows, cols, stride: cols }
    }
}

/// Which operand is transposed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// A B^T
    Nt,
    /// A B
    Nn,
    /// A^T B
    Tn,
}

impl Layout {
    fn name(self) -> &'static str {
        match self {
            Layout::Nt => "nt",
            Layout::Nn => "nn",
            Layout::Tn => "tn",
        }
    }
}

/// Sizes and addresses of a GEMM; what is done with its sums is added to them.
fn operands(layout: Layout, a: Matrix, b: Matrix) -> GemmArgs {
    let (m, k) = if layout == Layout::Tn { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (n, inner) = if layout == Layout::Nt { (b.rows, b.cols) } else { (b.cols, b.rows) };
    assert_eq!(k, inner, "a GEMM of {a:?} and {b:?}");
    GemmArgs {
        a: a.at,
        b: b.at,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        a_stride: a.stride as u32,
        b_stride: b.stride as u32,
        ..GemmArgs::zeroed()
    }
}

/// Into how many parts of how many slices the inner dimension is divided: as many as leave no
/// multiprocessor without a tile.
fn parts(tiles: usize, slices: usize, processors: usize) -> (usize, usize) {
    let wanted = (processors / tiles).clamp(1, slices.div_ceil(PART_SLICES).max(1));
    let each = slices.div_ceil(wanted).max(1);
    (slices.div_ceil(each).max(1), each)
}

impl<L: Launcher> Cuda<L> {
    /// `c` = `a b^T`.
    pub(super) fn gemm_nt(&self, c: Matrix, a: Matrix, b: Matrix) -> Result<()> {
        self.gemm_write(Layout::Nt, c, operands(Layout::Nt, a, b))
    }

    /// `c` = `a b`, times the gradient of the GELU of what is at `before_gelu`, laid out as `c`.
    pub(super) fn gemm_nn(
        &self,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        before_gelu: Option<u64>,
    ) -> Result<()> {
        let args = operands(Layout::Nn, a, b);
        let before_gelu = before_gelu.unwrap_or(0);
        self.gemm_write(Layout::Nn, c, GemmArgs { before_gelu, ..args })
    }

    /// Adds `a^T b` to the f32 matrix at `c`, whose rows have no padding, and the sums of the
    /// columns of `a` to what is at `row_sums`, unless that is 0.
    pub(super) fn gemm_tn_add(&self, c: u64, a: Matrix, b: Matrix, row_sums: u64) -> Result<()> {
        let args = operands(Layout::Tn, a, b);
        let c_stride = b.cols as u32;
        self.gemm(Layout::Tn, GemmArgs { c, c_stride, row_sums, mode: GEMM_ADD, ..args })
    }

    fn gemm_write(&self, layout: Layout, c: Matrix, args: GemmArgs) -> Result<()> {
        assert_eq!((c.rows as u32, c.cols as u32), (args.m, args.n), "results of a GEMM: {c:?}");
        let (at, c_stride) = (c.at, c.stride as u32);
        self.gemm(layout, GemmArgs { c: at, c_stride, mode: GEMM_WRITE, ..args })
    }

    fn gemm(&self, layout: Layout, args: GemmArgs) -> Result<()> {
        let (m, n) = (args.m as usize, args.n as usize);
        let tiles = m.div_ceil(TILE) * n.div_ceil(TILE);
        let slices = (args.k as usize).div_ceil(SLICE);
        let (parts, part_slices) = parts(tiles, slices, self.launcher.limits().processors as usize);
        let mut args = GemmArgs { parts: parts as u32, part_slices: part_slices as u32, ..args };
        let mode = args.mode;
        if parts > 1 {
            let bytes = 4 * parts * m * (n.next_multiple_of(8) + 1);
            args.partials = self.place(&mut self.gemm_partials.borrow_mut(), bytes)?;
            args.mode = GEMM_PARTIAL;
        }
        let kernel = format!("gemm_{}_bf16", layout.name());
        self.launch(&kernel, [tiles, parts, 1], THREADS, SHARED, Args::new().with(args))?;
        if parts == 1 {
            return Ok(());
        }
        let threads = m * n.div_ceil(8);
        let grid = [threads.div_ceil(THREADS as usize), 1, 1];
        let args = GemmArgs { mode, ..args };
        self.launch("gemm_combine_bf16", grid, THREADS, 0, Args::new().with(args))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_the_multiprocessors_and_cover_all_slices() {
        assert_eq!(parts(144, 96, 132), (1, 96));
        assert_eq!(parts(48, 3921, 132), (2, 1961));
        assert_eq!(parts(1, 1, 132), (1, 1));
        assert_eq!(parts(1, 0, 132), (1, 1));
        for (tiles, slices) in [(1, 5), (3, 17), (40, 96), (66, 100)] {
            let (parts, each) = parts(tiles, slices, 132);
            assert!(parts * tiles <= 132 && parts * each >= slices);
            assert!((parts - 1) * each < slices, "no part is empty");
        }
    }
}
