//! Forward and backward passes of the single operations of BLOOM, for training in f32.
//!
//! Tokens of all sequences of a batch are packed: activations are `[tokens, width]`, row-major.
//! Sums over tokens run in the order of the tokens whatever the number of threads, so gradients
//! repeat bit for bit.

use super::Cpu;
use super::matmul::{Precision, View, matmul, matmul_small, matmul_tile};
use super::rows::{exp_sum, layer_norm_row};
use super::threads::Disjoint;
use crate::simd_fn;

/// Columns that one task sums over all tokens.
const COLUMNS: usize = 64;
/// Queries of one attention block.
const QUERIES: usize = 64;
/// Most logits in memory at once in the loss, as elements.
const LOGITS: usize = 4 << 20;

/// y = (x - mean) * rstd * weight + bias per row; keeps mean and rstd for the backward pass.
#[allow(clippy::too_many_arguments)]
pub fn layer_norm(
    cpu: &Cpu,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let h = weight.len();
    let tokens = x.len() / h;
    let (y, mean, rstd) = (Disjoint::new(y), Disjoint::new(mean), Disjoint::new(rstd));
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            // SAFETY: every token's row is written once.
            let (y, m, s) = unsafe {
                (y.slice(t * h..(t + 1) * h), mean.slice(t..t + 1), rstd.slice(t..t + 1))
            };
            (m[0], s[0]) = layer_norm_row(cpu.isa, &x[t * h..(t + 1) * h], weight, bias, eps, y);
        }
    });
}

/// Adds the gradient of the input to `dx` and those of weight and bias to `dw` and `db`.
#[allow(clippy::too_many_arguments)]
pub fn layer_norm_backward(
    cpu: &Cpu,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let h = weight.len();
    let tokens = mean.len();
    let out = Disjoint::new(dx);
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            let row = t * h..(t + 1) * h;
            // SAFETY: every token's row is written once.
            let dx = unsafe { out.slice(row.clone()) };
            layer_norm_row_backward(
                cpu.isa,
                &dy[row.clone()],
                &x[row],
                weight,
                mean[t],
                rstd[t],
                dx,
            );
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
            for (((dw, db), g), x) in
                dw.iter_mut().zip(db.iter_mut()).zip(&dy[row.clone()]).zip(&x[row])
            {
                *dw += g * ((x - m) * r);
                *db += g;
            }
        }
    });
}

simd_fn! {
    fn layer_norm_row_backward<S>(dy: &[f32], x: &[f32], weight: &[f32], mean: f32, rstd: f32, dx: &mut [f32]) {
        let n = x.len();
        assert!(dy.len() == n && weight.len() == n && dx.len() == n);
        let (m, r) = (S::splat(mean), S::splat(rstd));
        let (mut sum, mut dot) = (S::splat(0.0), S::splat(0.0));
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            // lanes beyond the row have g = 0 and add nothing
            let g = S::mul(S::load_partial(dy.as_ptr().add(i), lanes), S::load_partial(weight.as_ptr().add(i), lanes));
            let xhat = S::mul(S::sub(S::load_partial(x.as_ptr().add(i), lanes), m), r);
            sum = S::add(sum, g);
            dot = S::fma(g, xhat, dot);
        }
        let (sum, dot) = (S::splat(S::sum(sum) / n as f32), S::splat(S::sum(dot) / n as f32));
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            let g = S::mul(S::load_partial(dy.as_ptr().add(i), lanes), S::load_partial(weight.as_ptr().add(i), lanes));
            let xhat = S::mul(S::sub(S::load_partial(x.as_ptr().add(i), lanes), m), r);
            let d = S::mul(r, S::sub(S::sub(g, sum), S::mul(xhat, dot)));
            let p = dx.as_mut_ptr().add(i);
            S::store_partial(p, S::add(S::load_partial(p, lanes), d), lanes);
        }
    }
}

/// y = x W^T + bias, plus `residual` if given. `weight` is `[outputs, inputs]`.
pub fn linear(
    cpu: &Cpu,
    precision: Precision,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    y: &mut [f32],
) {
    let n = bias.len();
    let k = weight.len() / n;
    let tokens = x.len() / k;
    let out = Disjoint::new(y);
    cpu.threads.run_ranges(tokens, 16, |r| {
        for t in r {
            // SAFETY: every token's row is written once.
            let row = unsafe { out.slice(t * n..(t + 1) * n) };
            match residual {
                None => row.copy_from_slice(bias),
                Some(residual) => {
                    for ((y, b), r) in row.iter_mut().zip(bias).zip(&residual[t * n..(t + 1) * n]) {
                        *y = b + r;
                    }
                }
            }
        }
    });
    matmul(cpu, precision, y, n, View::new(x, tokens, k), View::new(weight, n, k).t(), true);
}

/// Writes the gradient of the input to `dx`, adds those of weight and bias to `dw` and `db`.
#[allow(clippy::too_many_arguments)]
pub fn linear_backward(
    cpu: &Cpu,
    precision: Precision,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let n = db.len();
    let k = weight.len() / n;
    let tokens = x.len() / k;
    let dy_view = View::new(dy, tokens, n);
    matmul(cpu, precision, dx, k, dy_view, View::new(weight, n, k), false);
    matmul(cpu, precision, dw, k, dy_view.t(), View::new(x, tokens, k), true);
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
pub fn gelu(cpu: &Cpu, x: &[f32], y: &mut [f32]) {
    let out = Disjoint::new(y);
    cpu.threads.run_ranges(x.len(), GRAIN, |r| {
        // SAFETY: ranges are disjoint.
        gelu_slice(cpu.isa, &x[r.clone()], unsafe { out.slice(r) });
    });
}

/// Turns the gradient of gelu(x) in `g` into that of x.
pub fn gelu_backward(cpu: &Cpu, x: &[f32], g: &mut [f32]) {
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
            let v = S::gelu_backward(S::load_partial(x.as_ptr().add(i), lanes), S::load_partial(p, lanes));
            S::store_partial(p, v, lanes);
        }
    }
}

/// Sizes of an attention call: packed sequences, given by their starts (one more than sequences).
pub struct Attention<'a> {
    pub starts: &'a [usize],
    pub heads: usize,
    pub head_size: usize,
    pub slopes: &'a [f32],
}

impl Attention<'_> {
    fn tasks(&self) -> usize {
        (self.starts.len() - 1) * self.heads
    }

    /// Tokens and head of a task; the longest sequences need not come first, tasks are many.
    fn task(&self, task: usize) -> (usize, usize, usize) {
        let (sequence, head) = (task / self.heads, task % self.heads);
        (self.starts[sequence], self.starts[sequence + 1] - self.starts[sequence], head)
    }

    /// Query, key or value (`part` 0, 1, 2) of a head over `rows` tokens from `first`.
    fn part<'a>(
        &self,
        qkv: &'a [f32],
        part: usize,
        first: usize,
        rows: usize,
        head: usize,
    ) -> View<'a> {
        let width = 3 * self.heads * self.head_size;
        let start = first * width + (head * 3 + part) * self.head_size;
        let end = if rows == 0 { start } else { start + (rows - 1) * width + self.head_size };
        View::strided(&qkv[start..end], rows, self.head_size, width)
    }

    /// A head's part of a `[tokens, hidden]` activation.
    fn output<'a>(&self, x: &'a [f32], first: usize, rows: usize, head: usize) -> View<'a> {
        let width = self.heads * self.head_size;
        let start = first * width + head * self.head_size;
        View::strided(
            &x[start..start + (rows - 1) * width + self.head_size],
            rows,
            self.head_size,
            width,
        )
    }

    /// Causal attention with ALiBi. `qkv` is `[tokens, head, 3, head size]`, `out` `[tokens, head,
    /// head size]`, `lse` (log-sum-exp of the scores) `[tokens, head]`.
    pub fn forward(&self, cpu: &Cpu, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
        let width = self.heads * self.head_size;
        let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
        cpu.threads.run(self.tasks(), |task| {
            let (first, tokens, head) = self.task(task);
            let mut scores = vec![0f32; QUERIES * tokens];
            for i in (0..tokens).step_by(QUERIES) {
                let rows = QUERIES.min(tokens - i);
                let keys = i + rows;
                self.scores(qkv, first, i, rows, head, &mut scores);
                for r in 0..rows {
                    let row = &mut scores[r * keys..(r + 1) * keys];
                    let value =
                        softmax_causal(cpu.isa, row, i + r, self.scale(), self.slopes[head]);
                    let at = (first + i + r) * self.heads + head;
                    // SAFETY: one task writes this token and head.
                    unsafe { lse.slice(at..at + 1)[0] = value };
                }
                let start = (first + i) * width + head * self.head_size;
                let c = out.tile(start, (rows - 1) * width + self.head_size);
                let p = View::new(&scores[..rows * keys], rows, keys);
                // SAFETY: heads of a row interleave between tasks but share no element.
                unsafe { matmul_tile(c, width, p, self.part(qkv, 2, first, keys, head), false) };
            }
        });
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_size as f32).sqrt()
    }

    /// Unscaled q k^T of `rows` queries from `i` against all keys up to the last of them.
    fn scores(
        &self,
        qkv: &[f32],
        first: usize,
        i: usize,
        rows: usize,
        head: usize,
        scores: &mut [f32],
    ) {
        let keys = i + rows;
        let q = self.part(qkv, 0, first + i, rows, head);
        let k = self.part(qkv, 1, first, keys, head);
        matmul_small(&mut scores[..rows * keys], keys, q, k.t(), false);
    }

    /// Writes the gradient of `qkv` to `dqkv`, given `out` and `lse` of the forward pass and the
    /// gradient `dout`.
    pub fn backward(
        &self,
        cpu: &Cpu,
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        dqkv: &mut [f32],
    ) {
        let width = 3 * self.heads * self.head_size;
        let d = Disjoint::new(dqkv);
        cpu.threads.run(self.tasks(), |task| {
            let (first, tokens, head) = self.task(task);
            let mut p = vec![0f32; QUERIES * tokens];
            let mut ds = vec![0f32; QUERIES * tokens];
            for i in (0..tokens).step_by(QUERIES) {
                let rows = QUERIES.min(tokens - i);
                let keys = i + rows;
                self.scores(qkv, first, i, rows, head, &mut p);
                let o = self.output(out, first + i, rows, head);
                let g = self.output(dout, first + i, rows, head);
                matmul_small(
                    &mut ds[..rows * keys],
                    keys,
                    g,
                    self.part(qkv, 2, first, keys, head).t(),
                    false,
                );
                for r in 0..rows {
                    let at = r * o.row_stride..r * o.row_stride + self.head_size;
                    let dot: f32 =
                        o.data[at.clone()].iter().zip(&g.data[at]).map(|(a, b)| a * b).sum();
                    let lse = lse[(first + i + r) * self.heads + head];
                    let row = r * keys..(r + 1) * keys;
                    let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
                    softmax_causal_backward(
                        cpu.isa,
                        p,
                        ds,
                        i + r,
                        self.scale(),
                        self.slopes[head],
                        lse,
                        dot,
                    );
                }
                let p = View::new(&p[..rows * keys], rows, keys);
                let ds = View::new(&ds[..rows * keys], rows, keys);
                let part = |part: usize, from: usize, rows: usize| {
                    let start = (first + from) * width + (head * 3 + part) * self.head_size;
                    d.tile(start, (rows - 1) * width + self.head_size)
                };
                // SAFETY: heads of a row interleave between tasks but share no element.
                unsafe {
                    let k = self.part(qkv, 1, first, keys, head);
                    matmul_tile(part(0, i, rows), width, ds, k, false);
                    // keys before this block have a sum already; the block's own rows start one
                    for (which, weights, x) in
                        [(1, ds, self.part(qkv, 0, first + i, rows, head)), (2, p, g)]
                    {
                        if i > 0 {
                            let before = View { cols: i, ..weights };
                            matmul_tile(part(which, 0, i), width, before.t(), x, true);
                        }
                        let own = View { data: &weights.data[i..], cols: rows, ..weights };
                        matmul_tile(part(which, i, rows), width, own.t(), x, false);
                    }
                }
            }
        });
    }
}

simd_fn! {
    /// Turns raw scores of the query at `position` into probabilities; returns their log-sum-exp.
    fn softmax_causal<S>(row: &mut [f32], position: usize, scale: f32, slope: f32) -> f32 {
        let n = position + 1;
        let mut most = f32::NEG_INFINITY;
        for (j, s) in row[..n].iter_mut().enumerate() {
            *s = *s * scale - slope * (position - j) as f32;
            most = if *s > most { *s } else { most };
        }
        let m = S::splat(most);
        let mut sum = S::splat(0.0);
        let full = n / 16 * 16;
        for j in (0..full).step_by(16) {
            let e = S::exp(S::sub(S::load(row.as_ptr().add(j)), m));
            S::store(row.as_mut_ptr().add(j), e);
            sum = S::add(sum, e);
        }
        let mut sum = S::sum(sum);
        for s in &mut row[full..n] {
            *s = (*s - most).exp();
            sum += *s;
        }
        let inverse = 1.0 / sum;
        row[..n].iter_mut().for_each(|s| *s *= inverse);
        row[n..].fill(0.0);
        most + sum.ln()
    }
}

simd_fn! {
    /// Turns raw scores into probabilities and their gradients into gradients of raw scores.
    #[allow(clippy::too_many_arguments)]
    fn softmax_causal_backward<S>(p: &mut [f32], d: &mut [f32], position: usize, scale: f32, slope: f32, lse: f32, dot: f32) {
        let n = position + 1;
        for (j, s) in p[..n].iter_mut().enumerate() {
            *s = *s * scale - slope * (position - j) as f32 - lse;
        }
        let dot_v = S::splat(dot);
        for j in (0..n).step_by(16) {
            let lanes = 16.min(n - j);
            let (pp, dp) = (p.as_mut_ptr().add(j), d.as_mut_ptr().add(j));
            let e = S::exp(S::load_partial(pp, lanes));
            S::store_partial(pp, e, lanes);
            let g = S::mul(S::mul(e, S::sub(S::load_partial(dp, lanes), dot_v)), S::splat(scale));
            S::store_partial(dp, g, lanes);
        }
        p[n..].fill(0.0);
        d[n..].fill(0.0);
    }
}

/// Rows of `table` for each id.
pub fn embed(cpu: &Cpu, ids: &[u32], table: &[f32], out: &mut [f32]) {
    let h = out.len() / ids.len().max(1);
    let out = Disjoint::new(out);
    cpu.threads.run_ranges(ids.len(), 64, |r| {
        for t in r {
            let from = ids[t] as usize * h;
            // SAFETY: every token's row is written once.
            unsafe { out.slice(t * h..(t + 1) * h) }.copy_from_slice(&table[from..from + h]);
        }
    });
}

/// Adds each token's gradient to its row of the table's gradient.
pub fn embed_backward(cpu: &Cpu, ids: &[u32], dx: &[f32], dtable: &mut [f32]) {
    let h = dx.len() / ids.len().max(1);
    let out = Disjoint::new(dtable);
    cpu.threads.run(h.div_ceil(COLUMNS), |c| {
        let columns = c * COLUMNS..((c + 1) * COLUMNS).min(h);
        for (t, &id) in ids.iter().enumerate() {
            let row = id as usize * h;
            // SAFETY: every column is written by one task.
            let to = unsafe { out.slice(row + columns.start..row + columns.end) };
            for (a, b) in to.iter_mut().zip(&dx[t * h + columns.start..t * h + columns.end]) {
                *a += b;
            }
        }
    });
}

/// Cross-entropy of `rows` of the hidden states against `targets` through the head `[vocabulary,
/// hidden]`, in chunks that never hold more than [`LOGITS`] logits. Returns the summed loss. With
/// `gradients`, writes `scale` * d loss / d x into rows of `dx` and adds that of the head. `logits`
/// is scratch.
pub fn cross_entropy(
    cpu: &Cpu,
    precision: Precision,
    x: &[f32],
    head: &[f32],
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
    let chunk = (LOGITS / vocab).clamp(16, rows.max(16));
    logits.resize(chunk.min(rows) * vocab, 0.0);
    let mut losses = vec![0f64; rows];
    let head_view = View::new(head, vocab, h);
    let mut gradients = gradients;
    for start in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - start);
        let logits = &mut logits[..n * vocab];
        let x = View::new(&x[start * h..(start + n) * h], n, h);
        matmul(cpu, precision, logits, vocab, x, head_view.t(), false);
        let scale = gradients.as_ref().map(|g| g.0);
        let (rows_of, loss_of) =
            (Disjoint::new(logits), Disjoint::new(&mut losses[start..start + n]));
        cpu.threads.run(n, |r| {
            // SAFETY: every row is one task's.
            let (row, loss) =
                unsafe { (rows_of.slice(r * vocab..(r + 1) * vocab), loss_of.slice(r..r + 1)) };
            let target = targets[start + r] as usize;
            let logit = row[target];
            let (most, sum) = exp_sum(cpu.isa, row, scale.is_some());
            loss[0] = (most as f64 - logit as f64) + (sum as f64).ln();
            if let Some(scale) = scale {
                scale_slice(cpu.isa, row, scale / sum);
                row[target] -= scale;
            }
        });
        if let Some((_, dx, dhead)) = &mut gradients {
            let g = View::new(logits, n, vocab);
            matmul(cpu, precision, &mut dx[start * h..(start + n) * h], h, g, head_view, false);
            matmul(cpu, precision, dhead, h, g.t(), x, true);
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
