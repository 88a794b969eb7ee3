//! A matrix in memory that belongs to somebody else.

/// A matrix in somebody's memory: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    /// Elements, of which the first is (0, 0).
    pub data: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// Row-major, dense.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        MatrixView::strided(data, rows, cols, cols)
    }

    /// Row-major with `stride` elements from one row to the next.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len());
        MatrixView { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transposed matrix.
    pub fn t(self) -> Self {
        MatrixView {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}
