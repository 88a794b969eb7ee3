//! Linear layers and GELU for training, in f32 or with operands rounded to bf16.

use super::Cpu;
use super::matmul::matmul;
use super::matrix_view::MatrixView;
use super::threads::Disjoint;
use super::train::COLUMNS;
use crate::ops::train::Precision;
use crate::simd_fn;

/// A matrix `[outputs, inputs]`, its bias, and how GEMMs with it are computed.
pub(super) struct LinearParams<'a> {
    pub precision: Precision,
    pub weight: &'a [f32],
    pub bias: &'a [f32],
}

impl LinearParams<'_> {
    /// Outputs and inputs.
    fn shape(&self) -> (usize, usize) {
        (self.bias.len(), self.weight.len() / self.bias.len())
    }
}

/// y = x W^T + bias, plus `residual` if given.
pub(super) fn linear(
    cpu: &Cpu,
    x: &[f32],
    l: &LinearParams,
    residual: Option<&[f32]>,
    y: &mut [f32],
) {
    let (n, k) = l.shape();
    let tokens = x.len() / k;
    let out = Disjoint::new(y);
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            // SAFETY: every token's row is written once.
            let row = unsafe { out.slice(t * n..(t + 1) * n) };
            match residual {
                None => row.copy_from_slice(l.bias),
                Some(residual) => {
                    let residual = &residual[t * n..(t + 1) * n];
                    for ((y, b), r) in row.iter_mut().zip(l.bias).zip(residual) {
                        *y = b + r;
                    }
                }
            }
        }
    });
    let weight = MatrixView::new(l.weight, n, k);
    matmul(cpu, l.precision, (y, n), MatrixView::new(x, tokens, k), weight.t(), true);
}

/// Writes the gradient of the input to `dx`, adds those of weight and bias to `dw` and `db`.
pub(super) fn linear_backward(
    cpu: &Cpu,
    (dy, x): (&[f32], &[f32]),
    l: &LinearParams,
    dx: &mut [f32],
    (dw, db): (&mut [f32], &mut [f32]),
) {
    let (n, k) = l.shape();
    let tokens = x.len() / k;
    let dy_view = MatrixView::new(dy, tokens, n);
    matmul(cpu, l.precision, (dx, k), dy_view, MatrixView::new(l.weight, n, k), false);
    matmul(cpu, l.precision, (dw, k), dy_view.t(), MatrixView::new(x, tokens, k), true);
    add_columns(cpu, dy, db);
}

/// Adds the sum of the rows of `x` to `sums`.
fn add_columns(cpu: &Cpu, x: &[f32], sums: &mut [f32]) {
    let n = sums.len();
    let out = Disjoint::new(sums);
    cpu.threads.run(n.div_ceil(COLUMNS), |c| {
        let columns = c * COLUMNS..((c + 1) * COLUMNS).min(n);
        // SAFETY: every column is written by one task.
        let sums = unsafe { out.slice(columns.clone()) };
        for row in x.chunks_exact(n) {
            for (s, v) in sums.iter_mut().zip(&row[columns.clone()]) {
                *s += v;
            }
        }
    });
}

/// Elements of one task of an elementwise operation.
const GRAIN: usize = 8192;

/// y = gelu(x).
pub(super) fn gelu(cpu: &Cpu, x: &[f32], y: &mut [f32]) {
    let out = Disjoint::new(y);
    cpu.threads.run_ranges(x.len(), GRAIN, |r| {
        // SAFETY: ranges are disjoint.
        gelu_slice(cpu.isa, &x[r.clone()], unsafe { out.slice(r) });
    });
}

/// Turns the gradient of gelu(x) in `g` into that of x.
pub(super) fn gelu_backward(cpu: &Cpu, x: &[f32], g: &mut [f32]) {
    let out = Disjoint::new(g);
    cpu.threads.run_ranges(x.len(), GRAIN, |r| {
        // SAFETY: ranges are disjoint.
        gelu_backward_slice(cpu.isa, &x[r.clone()], unsafe { out.slice(r) });
    });
}

simd_fn! {
    fn gelu_slice<S>(x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len());
        for i in (0..x.len()).step_by(16) {
            let lanes = 16.min(x.len() - i);
            let v = S::gelu(S::load_partial(x.as_ptr().add(i), lanes));
            S::store_partial(y.as_mut_ptr().add(i), v, lanes);
        }
    }
}

simd_fn! {
    fn gelu_backward_slice<S>(x: &[f32], g: &mut [f32]) {
        assert_eq!(x.len(), g.len());
        for i in (0..x.len()).step_by(16) {
            let lanes = 16.min(x.len() - i);
            let p = g.as_mut_ptr().add(i);
            let (x, g) = (S::load_partial(x.as_ptr().add(i), lanes), S::load_partial(p, lanes));
            let v = S::gelu_backward(x, g);
            S::store_partial(p, v, lanes);
        }
    }
}
