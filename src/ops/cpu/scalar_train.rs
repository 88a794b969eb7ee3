//! Heads that give one number a row, and the losses of such numbers.

use super::Cpu;
use super::threads::Disjoint;
use super::train::COLUMNS;
use crate::ops::scalar_loss::{ClippedValue, ScalarLoss};

/// Rows that one task takes.
const ROWS: usize = 16;

/// x = max(x, 0).
pub(super) fn relu(cpu: &Cpu, x: &mut [f32]) {
    let out = Disjoint::new(x);
    cpu.threads.run_ranges(out.len(), 8192, |r| {
        // SAFETY: ranges are disjoint.
        unsafe { out.slice(r) }.iter_mut().for_each(|x| *x = x.max(0.0));
    });
}

/// Each row's dot product with `weight`, plus `bias`. The order of a row's sum depends on its width
/// alone.
pub(super) fn project(cpu: &Cpu, x: &[f32], weight: &[f32], bias: f32, y: &mut [f32]) {
    let width = weight.len();
    let out = Disjoint::new(y);
    cpu.threads.run_ranges(x.len() / width, ROWS, |rows| {
        // SAFETY: every row is one task's.
        let y = unsafe { out.slice(rows.clone()) };
        let x = &x[rows.start * width..rows.end * width];
        for (y, x) in y.iter_mut().zip(x.chunks_exact(width)) {
            *y = dot(x, weight) + bias;
        }
    });
}

/// Sixteen sums side by side, which the compiler keeps in vectors.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (x_parts, w_parts) = (x.chunks_exact(16), w.chunks_exact(16));
    let rest: f32 = x_parts.remainder().iter().zip(w_parts.remainder()).map(|(x, w)| x * w).sum();
    for (x, w) in x_parts.zip(w_parts) {
        sums.iter_mut().zip(x).zip(w).for_each(|((s, x), w)| *s += x * w);
    }
    sums.iter().sum::<f32>() + rest
}

/// Writes the gradient of the rows, zero where `after_relu` and they are, to `dx`; adds that of the
/// weight to `dw`.
pub(super) fn project_backward(
    cpu: &Cpu,
    (dy, x): (&[f32], &[f32]),
    (weight, after_relu): (&[f32], bool),
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let width = weight.len();
    let out = Disjoint::new(dx);
    cpu.threads.run_ranges(dy.len(), ROWS, |rows| {
        for r in rows {
            let row = r * width..(r + 1) * width;
            // SAFETY: every row is one task's.
            let dx = unsafe { out.slice(row.clone()) };
            for ((dx, x), w) in dx.iter_mut().zip(&x[row]).zip(weight) {
                *dx = if after_relu && *x <= 0.0 { 0.0 } else { dy[r] * w };
            }
        }
    });
    let out = Disjoint::new(dw);
    cpu.threads.run(width.div_ceil(COLUMNS), |c| {
        let columns = c * COLUMNS..((c + 1) * COLUMNS).min(width);
        // SAFETY: every column is written by one task.
        let dw = unsafe { out.slice(columns.clone()) };
        for (dy, x) in dy.iter().zip(x.chunks_exact(width)) {
            dw.iter_mut().zip(&x[columns.clone()]).for_each(|(dw, x)| *dw += dy * x);
        }
    });
}

/// The sum of the losses of the rows; their gradients, scaled, go to `dy`.
pub(super) fn scalar_loss(y: &[f32], loss: &ScalarLoss<Cpu>, mut dy: Option<&mut [f32]>) -> f64 {
    let mut sum = 0.0;
    let mut add = |row: usize, loss: f32, gradient: f32| {
        sum += loss as f64;
        if let Some(dy) = &mut dy {
            dy[row] = gradient;
        }
    };
    match loss {
        ScalarLoss::Squared { targets, scale } => {
            for (i, (y, target)) in y.iter().zip(targets.buffer()).enumerate() {
                let error = y - target;
                add(i, error * error, 2.0 * scale * error);
            }
        }
        ScalarLoss::Pairwise { scale } => {
            for (i, pair) in y.chunks_exact(2).enumerate() {
                let margin = pair[0] - pair[1];
                // log(1 + exp(-margin)), whose exponential never overflows
                let loss = (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
                let gradient = -scale / (1.0 + margin.exp());
                add(2 * i, loss, gradient);
                add(2 * i + 1, 0.0, -gradient);
            }
        }
        ScalarLoss::ClippedValue(of) => {
            for (i, &y) in y.iter().enumerate() {
                let (loss, gradient) = clipped_value(of, i, y);
                add(i, loss, gradient);
            }
        }
    }
    sum
}

/// See [`ClippedValue`].
fn clipped_value(of: &ClippedValue<Cpu>, row: usize, y: f32) -> (f32, f32) {
    let (old, target) = (of.old_values.buffer()[row], of.returns.buffer()[row]);
    let (low, high) = (old - of.clip, old + of.clip);
    let (error, clipped) = (y - target, y.max(low).min(high) - target);
    let half = 0.5 * of.coefficient;
    // a value that is no number makes the loss none, so that the step is not taken
    if clipped * clipped > error * error {
        // a value within the limits has the same error: this one is beyond them
        return (half * clipped * clipped, 0.0);
    }
    (half * error * error, of.scale * of.coefficient * error)
}
