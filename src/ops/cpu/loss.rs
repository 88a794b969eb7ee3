//! Losses fused with the LM head: logits never leave a chunk.

use super::Cpu;
use super::matmul::matmul;
use super::matrix_view::MatrixView;
use super::rows::exp_sum;
use super::threads::Disjoint;
use crate::ops::train::Precision;
use crate::simd_fn;

/// Maximum logits in memory at once, as elements.
const LOGITS: usize = 4 << 20;

/// Rows of logits that are in memory at once, of `rows`.
pub(super) fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    (LOGITS / vocabulary).max(16).min(rows)
}

/// Cross-entropy of `rows` of the hidden states against `targets` through the LM head `[vocabulary,
/// hidden]`, in chunks that never hold more than [`LOGITS`] logits. Returns the summed loss. With
/// `gradients`, writes `scale` * d loss / d x into rows of `dx` and adds that of the head. `logits`
/// is scratch.
pub(super) fn cross_entropy(
    cpu: &Cpu,
    x: &[f32],
    (precision, head): (Precision, &[f32]),
    targets: &[u32],
    logits: &mut Vec<f32>,
    gradients: Option<(f32, &mut [f32], &mut [f32])>,
) -> f64 {
    let rows = targets.len();
    if rows == 0 {
        return 0.0;
    }
    let h = x.len() / rows;
    let vocab = head.len() / h;
    let chunk = chunk_rows(rows, vocab);
    logits.resize(chunk * vocab, 0.0);
    let mut losses = vec![0f64; rows];
    let head_view = MatrixView::new(head, vocab, h);
    let mut gradients = gradients;
    for start in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - start);
        let logits = &mut logits[..n * vocab];
        let x = MatrixView::new(&x[start * h..(start + n) * h], n, h);
        matmul(cpu, precision, (logits, vocab), x, head_view.t(), false);
        let scale = gradients.as_ref().map(|g| g.0);
        let (rows_of, loss_of) =
            (Disjoint::new(logits), Disjoint::new(&mut losses[start..start + n]));
        cpu.threads.run(n, |r| {
            // SAFETY: every row is one task's.
            let (row, loss) =
                unsafe { (rows_of.slice(r * vocab..(r + 1) * vocab), loss_of.slice(r..r + 1)) };
            let target = targets[start + r] as usize;
            let logit = row[target];
            let (max, sum) = exp_sum(cpu.isa, row, scale.is_some());
            loss[0] = (max as f64 - logit as f64) + (sum as f64).ln();
            if let Some(scale) = scale {
                scale_slice(cpu.isa, row, scale / sum);
                row[target] -= scale;
            }
        });
        if let Some((_, dx, dhead)) = &mut gradients {
            let g = MatrixView::new(logits, n, vocab);
            let dx = &mut dx[start * h..(start + n) * h];
            matmul(cpu, precision, (dx, h), g, head_view, false);
            matmul(cpu, precision, (dhead, h), g.t(), x, true);
        }
    }
    losses.iter().sum()
}

simd_fn! {
    fn scale_slice<S>(x: &mut [f32], factor: f32) {
        let factor_v = S::splat(factor);
        let full = x.len() / 16 * 16;
        for i in (0..full).step_by(16) {
            let p = x.as_mut_ptr().add(i);
            S::store(p, S::mul(S::load(p), factor_v));
        }
        x[full..].iter_mut().for_each(|v| *v *= factor);
    }
}
