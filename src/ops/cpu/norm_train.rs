//! Layer norm for training: keeps each row's statistics, and its backward pass.

use super::Cpu;
use super::rows::layer_norm_row;
use super::threads::Disjoint;
use super::train::COLUMNS;
use crate::simd_fn;

/// Gain, shift and what is added to the variance.
pub(super) struct NormParams<'a> {
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub eps: f32,
}

/// y = (x - mean) * rstd * weight + bias per row; keeps mean and rstd for the backward pass.
pub(super) fn layer_norm(
    cpu: &Cpu,
    x: &[f32],
    n: &NormParams,
    y: &mut [f32],
    (mean, rstd): (&mut [f32], &mut [f32]),
) {
    let h = n.weight.len();
    let tokens = x.len() / h;
    let (y, mean, rstd) = (Disjoint::new(y), Disjoint::new(mean), Disjoint::new(rstd));
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            let row = t * h..(t + 1) * h;
            // SAFETY: every token's row is written once.
            let (y, m, s) =
                unsafe { (y.slice(row.clone()), mean.slice(t..t + 1), rstd.slice(t..t + 1)) };
            (m[0], s[0]) = layer_norm_row(cpu.isa, &x[row], n.weight, n.bias, n.eps, y);
        }
    });
}

/// What the backward pass of a layer norm reads.
pub(super) struct NormBackward<'a> {
    pub dy: &'a [f32],
    pub x: &'a [f32],
    pub residual: Option<&'a [f32]>,
    pub weight: &'a [f32],
    pub mean: &'a [f32],
    pub rstd: &'a [f32],
}

/// Writes the gradient of the input, with that of the residual branch, to `dx`; adds those of
/// weight and bias to `dw` and `db`.
pub(super) fn layer_norm_backward(
    cpu: &Cpu,
    b: &NormBackward,
    dx: &mut [f32],
    (dw, db): (&mut [f32], &mut [f32]),
) {
    let NormBackward { dy, x, residual, weight, mean, rstd } = *b;
    let h = weight.len();
    let tokens = mean.len();
    let out = Disjoint::new(dx);
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            let row = t * h..(t + 1) * h;
            // SAFETY: every token's row is written once.
            let dx = unsafe { out.slice(row.clone()) };
            match residual {
                Some(residual) => dx.copy_from_slice(&residual[row.clone()]),
                None => dx.fill(0.0),
            }
            let stats = (mean[t], rstd[t]);
            layer_norm_row_backward(cpu.isa, &dy[row.clone()], &x[row], weight, stats, dx);
        }
    });
    let (dw, db) = (Disjoint::new(dw), Disjoint::new(db));
    cpu.threads.run(h.div_ceil(COLUMNS), |c| {
        let columns = c * COLUMNS..((c + 1) * COLUMNS).min(h);
        // SAFETY: every column is written by one task.
        let (dw, db) = unsafe { (dw.slice(columns.clone()), db.slice(columns.clone())) };
        for t in 0..tokens {
            let row = t * h + columns.start..t * h + columns.end;
            let (m, r) = (mean[t], rstd[t]);
            let gradients = dw.iter_mut().zip(db.iter_mut()).zip(&dy[row.clone()]).zip(&x[row]);
            for (((dw, db), g), x) in gradients {
                *dw += g * ((x - m) * r);
                *db += g;
            }
        }
    });
}

simd_fn! {
    /// Adds the gradient of a row's input to `dx`.
    fn layer_norm_row_backward<S>(
        dy: &[f32], x: &[f32], weight: &[f32], stats: (f32, f32), dx: &mut [f32],
    ) {
        let (mean, rstd) = stats;
        let n = x.len();
        assert!(dy.len() == n && weight.len() == n && dx.len() == n);
        let (m, r) = (S::splat(mean), S::splat(rstd));
        let (mut sum, mut dot) = (S::splat(0.0), S::splat(0.0));
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            // lanes beyond the row have g = 0 and add nothing
            let gain = S::load_partial(weight.as_ptr().add(i), lanes);
            let g = S::mul(S::load_partial(dy.as_ptr().add(i), lanes), gain);
            let xhat = S::mul(S::sub(S::load_partial(x.as_ptr().add(i), lanes), m), r);
            sum = S::add(sum, g);
            dot = S::fma(g, xhat, dot);
        }
        let (sum, dot) = (S::splat(S::sum(sum) / n as f32), S::splat(S::sum(dot) / n as f32));
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            let gain = S::load_partial(weight.as_ptr().add(i), lanes);
            let g = S::mul(S::load_partial(dy.as_ptr().add(i), lanes), gain);
            let xhat = S::mul(S::sub(S::load_partial(x.as_ptr().add(i), lanes), m), r);
            let d = S::mul(r, S::sub(S::sub(g, sum), S::mul(xhat, dot)));
            let p = dx.as_mut_ptr().add(i);
            S::store_partial(p, S::add(S::load_partial(p, lanes), d), lanes);
        }
    }
}
