//! Losses fused with the LM head: logits never leave a chunk.

use super::Cpu;
use super::matmul::matmul;
use super::matrix_view::MatrixView;
use super::rows::exp_sum;
use super::simd::Isa;
use super::threads::Disjoint;
use crate::ops::token_loss::{ClippedPpo, MAX_LOG_RATIO, TokenLoss};
use crate::ops::train::Precision;
use crate::simd_fn;

/// Maximum logits in memory at once, as elements.
const LOGITS: usize = 4 << 20;

/// Rows of logits that are in memory at once, of `rows`.
pub(super) fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    (LOGITS / vocabulary).max(16).min(rows)
}

/// What logits are made of, and what they are compared with.
pub(super) struct Labels<'a> {
    /// Hidden states.
    pub x: &'a [f32],
    /// The LM head `[vocabulary, hidden]`.
    pub head: &'a [f32],
    pub precision: Precision,
    pub targets: &'a [u32],
}

/// A loss of the labels, in chunks that never hold more than [`LOGITS`] logits. Returns its sum.
/// Log-probabilities and entropies go to `stats`. With `gradients`, writes those of the hidden
/// states to the first and adds that of the head to the second, if there is one. `logits` is
/// scratch.
pub(super) fn token_loss(
    cpu: &Cpu,
    labels: &Labels,
    loss: &TokenLoss<Cpu>,
    logits: &mut Vec<f32>,
    stats: Option<(&mut [f32], &mut [f32])>,
    mut gradients: Option<(&mut [f32], Option<&mut [f32]>)>,
) -> f64 {
    let &Labels { x, head, precision, targets } = labels;
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
    let stats = stats.map(|(l, e)| (Disjoint::new(l), Disjoint::new(e)));
    for start in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - start);
        let logits = &mut logits[..n * vocab];
        let x = MatrixView::new(&x[start * h..(start + n) * h], n, h);
        matmul(cpu, precision, (logits, vocab), x, head_view.t(), false);
        let differentiate = gradients.is_some();
        let (rows_of, loss_of) = (Disjoint::new(logits), Disjoint::new(&mut losses));
        cpu.threads.run(n, |r| {
            let label = start + r;
            let one = label..label + 1;
            // SAFETY: every row is one task's.
            let (row, total) =
                unsafe { (rows_of.slice(r * vocab..(r + 1) * vocab), loss_of.slice(one.clone())) };
            let mut row = Row { isa: cpu.isa, row, label, target: targets[label] as usize };
            let known = stats.as_ref().map(|(log_probs, entropies)| {
                let known = row.stats();
                // SAFETY: every label is one task's.
                let (l, e) = unsafe { (log_probs.slice(one.clone()), entropies.slice(one)) };
                (l[0], e[0]) = (known.log_prob, known.entropy);
                known
            });
            total[0] = row.loss(loss, known, differentiate);
        });
        if let Some((dx, dhead)) = &mut gradients {
            let g = MatrixView::new(logits, n, vocab);
            let dx = &mut dx[start * h..(start + n) * h];
            matmul(cpu, precision, (dx, h), g, head_view, false);
            if let Some(dhead) = dhead {
                matmul(cpu, precision, (dhead, h), g.t(), x, true);
            }
        }
    }
    losses.iter().sum()
}

/// What is known of a row of logits.
#[derive(Clone, Copy)]
struct RowStats {
    max: f32,
    /// Logarithm of the sum of exp(logit - max).
    log_sum: f32,
    log_prob: f32,
    entropy: f32,
}

/// A label's loss, and its gradients.
#[derive(Clone, Copy, Debug)]
struct LabelLoss {
    loss: f64,
    log_prob: f32,
    entropy: f32,
}

/// A row of logits.
struct Row<'a> {
    isa: Isa,
    row: &'a mut [f32],
    label: usize,
    target: usize,
}

impl Row<'_> {
    fn stats(&mut self) -> RowStats {
        let (max, sum) = exp_sum(self.isa, self.row, false);
        let log_sum = sum.ln();
        RowStats {
            max,
            log_sum,
            log_prob: (self.row[self.target] - max) - log_sum,
            entropy: log_sum - exp_dot(self.isa, self.row, max) / sum,
        }
    }

    /// The label's loss. Logits become their gradients if these are wanted.
    fn loss(&mut self, loss: &TokenLoss<Cpu>, known: Option<RowStats>, differentiate: bool) -> f64 {
        let mut known = || known.unwrap_or_else(|| self.stats());
        let (known, of) = match loss {
            TokenLoss::CrossEntropy { scale } => {
                return self.cross_entropy(differentiate.then_some(*scale));
            }
            TokenLoss::ClippedPpo(ppo) => {
                let known = known();
                (known, clipped_ppo(ppo, self.label, &known))
            }
            TokenLoss::Given { log_probs, entropies } => {
                let (known, i) = (known(), self.label);
                let (g, h) = (log_probs.buffer()[i], entropies.map_or(0.0, |e| e.buffer()[i]));
                (known, LabelLoss { loss: 0.0, log_prob: g, entropy: h })
            }
        };
        if differentiate {
            self.differentiate(&known, &of);
        }
        of.loss
    }

    /// Exponentials are computed once for the loss and the gradients.
    fn cross_entropy(&mut self, scale: Option<f32>) -> f64 {
        let logit = self.row[self.target];
        let (max, sum) = exp_sum(self.isa, self.row, scale.is_some());
        if let Some(scale) = scale {
            scale_slice(self.isa, self.row, scale / sum);
            self.row[self.target] -= scale;
        }
        (max as f64 - logit as f64) + (sum as f64).ln()
    }

    /// With g and h the gradients of log-probability and entropy, that of logit j is
    /// g ([j = target] - p_j) - h p_j (log p_j + H).
    fn differentiate(&mut self, known: &RowStats, gradients: &LabelLoss) {
        let &LabelLoss { log_prob: g, entropy: h, .. } = gradients;
        let from = (known.max, known.log_sum);
        // p_j times this and h log p_j
        softmax_gradient(self.isa, self.row, from, g + h * known.entropy, h);
        self.row[self.target] += g;
    }
}

/// What is no finite number stays so: it comes of log-probabilities that are none.
fn clamp_log_ratio(x: f32) -> f32 {
    if x.is_infinite() { x } else { x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) }
}

/// See [`ClippedPpo`].
fn clipped_ppo(ppo: &ClippedPpo<Cpu>, label: usize, known: &RowStats) -> LabelLoss {
    let advantage = ppo.advantages.buffer()[label];
    let moved = known.log_prob - ppo.old_log_probs.buffer()[label];
    let ratio = clamp_log_ratio(moved).exp();
    let plain = ratio * advantage;
    let clipped = ratio.max(1.0 - ppo.clip).min(1.0 + ppo.clip) * advantage;
    // a ratio that is no number makes the loss none, so that the step is not taken
    let (mut loss, mut g) = if clipped < plain { (-clipped, 0.0) } else { (-plain, -plain) };
    if clamp_log_ratio(moved) != moved {
        g = 0.0;
    }
    if let Some(reference) = ppo.reference_log_probs {
        let moved = known.log_prob - reference.buffer()[label];
        let log_ratio = clamp_log_ratio(moved);
        let inverse = (-log_ratio).exp_m1();
        loss += ppo.kl * (inverse + log_ratio);
        if log_ratio == moved {
            g -= ppo.kl * inverse;
        }
    }
    loss -= ppo.entropy * known.entropy;
    LabelLoss { loss: loss as f64, log_prob: ppo.scale * g, entropy: -ppo.scale * ppo.entropy }
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

simd_fn! {
    /// The sum of exp(x - max) * (x - max).
    fn exp_dot<S>(row: &[f32], max: f32) -> f32 {
        let full = row.len() / 16 * 16;
        let m = S::splat(max);
        let mut dot = S::splat(0.0);
        for j in (0..full).step_by(16) {
            let d = S::sub(S::load(row.as_ptr().add(j)), m);
            dot = S::fma(S::exp(d), d, dot);
        }
        let mut dot = S::sum(dot);
        for s in &row[full..] {
            dot += (*s - max).exp() * (*s - max);
        }
        dot
    }
}

simd_fn! {
    /// Each logit becomes -p (base + slope log p), with log p = logit - `from.0` - `from.1`.
    fn softmax_gradient<S>(row: &mut [f32], from: (f32, f32), base: f32, slope: f32) {
        let full = row.len() / 16 * 16;
        let (max, log_sum) = (S::splat(from.0), S::splat(from.1));
        let (b, s) = (S::splat(-base), S::splat(-slope));
        for j in (0..full).step_by(16) {
            let at = row.as_mut_ptr().add(j);
            let log_p = S::sub(S::sub(S::load(at), max), log_sum);
            S::store(at, S::mul(S::exp(log_p), S::fma(s, log_p, b)));
        }
        for v in &mut row[full..] {
            let log_p = (*v - from.0) - from.1;
            *v = log_p.exp() * (-base - slope * log_p);
        }
    }
}
