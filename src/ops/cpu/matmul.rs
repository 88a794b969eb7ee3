//! C = A B for training: large f32 matrices with any strides.
//!
//! Two kernels: f32 (crate `gemm` on blocks of C), and bf16 with f32 accumulation
//! (`matmul_bf16.rs`) where the machine has BF16 dot products. Each element of C is summed in
//! an order that depends on the shapes alone, so that runs repeat bit for bit on any number of
//! threads.

use super::Cpu;
use super::matrix_view::MatrixView;
use super::threads::Disjoint;
use crate::ops::train::Precision;

/// Rows and columns of the blocks of C that threads take in the f32 path.
const BLOCK: (usize, usize) = (256, 512);

/// C = A B, or C += A B with `accumulate`. `c` is row-major with `c_stride` elements a row.
pub fn matmul(
    cpu: &Cpu,
    precision: Precision,
    (c, c_stride): (&mut [f32], usize),
    a: MatrixView,
    b: MatrixView,
    accumulate: bool,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * c_stride + n <= c.len());
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16 && cpu.isa.has_bf16() {
        return super::matmul_bf16::matmul(cpu, c, c_stride, a, b, accumulate);
    }
    let _ = precision;
    let (blocks_m, blocks_n) = (m.div_ceil(BLOCK.0), n.div_ceil(BLOCK.1));
    let out = Disjoint::new(c);
    cpu.threads.run(blocks_m * blocks_n, |block| {
        let (i, j) = (block / blocks_n * BLOCK.0, block % blocks_n * BLOCK.1);
        let (bm, bn) = (BLOCK.0.min(m - i), BLOCK.1.min(n - j));
        let a = MatrixView { data: &a.data[i * a.row_stride..], rows: bm, ..a };
        let b = MatrixView { data: &b.data[j * b.col_stride..], cols: bn, ..b };
        let c = out.tile(i * c_stride + j, (bm - 1) * c_stride + bn);
        // SAFETY: blocks of C share no element.
        unsafe { matmul_tile(c, c_stride, a, b, accumulate) }
    });
}

/// C = A B on the calling thread alone, in f32: for the many small GEMMs of attention.
pub fn matmul_small(
    c: &mut [f32],
    c_stride: usize,
    a: MatrixView,
    b: MatrixView,
    accumulate: bool,
) {
    assert!(a.rows == 0 || (a.rows - 1) * c_stride + b.cols <= c.len());
    // SAFETY: C is all ours, and large enough.
    unsafe { matmul_tile(c.as_mut_ptr(), c_stride, a, b, accumulate) }
}

/// [`matmul_small`] into a tile of a larger matrix.
///
/// # Safety
/// `c` must be valid for `a.rows` rows of `b.cols` elements, `c_stride` apart, that no other thread
/// uses.
pub unsafe fn matmul_tile(
    c: *mut f32,
    c_stride: usize,
    a: MatrixView,
    b: MatrixView,
    accumulate: bool,
) {
    assert_eq!(a.cols, b.rows, "inner sizes differ");
    if a.rows == 0 || b.cols == 0 || a.cols == 0 {
        return;
    }
    gemm::gemm(
        a.rows,
        b.cols,
        a.cols,
        c,
        1,
        c_stride as isize,
        accumulate,
        a.data.as_ptr(),
        a.col_stride as isize,
        a.row_stride as isize,
        b.data.as_ptr(),
        b.col_stride as isize,
        b.row_stride as isize,
        1.0,
        1.0,
        false,
        false,
        false,
        gemm::Parallelism::None,
    );
}
