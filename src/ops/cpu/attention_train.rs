//! Causal attention with ALiBi over packed sequences, for training.

use super::Cpu;
use super::matmul::{matmul_small, matmul_tile};
use super::matrix_view::MatrixView;
use super::threads::Disjoint;
use crate::ops::Heads;
use crate::simd_fn;

/// Queries of one attention block.
const QUERIES: usize = 64;

/// Sizes of an attention call: packed sequences, given by their starts and the end of the last one.
pub(super) struct PackedAttention<'a> {
    pub cu_seqlens: &'a [usize],
    pub heads: usize,
    pub head_size: usize,
    pub slopes: &'a [f32],
}

/// What the backward pass of attention reads.
pub(super) struct AttentionBackward<'a> {
    pub qkv: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub dout: &'a [f32],
}

/// A row of scores in the backward pass.
struct ScoreRow {
    position: usize,
    scale: f32,
    slope: f32,
    /// Log-sum-exp of the scores, and the product of the output with its gradient.
    lse: f32,
    dot: f32,
}

impl<'a> PackedAttention<'a> {
    pub fn new(heads: &'a Heads, cu_seqlens: &'a [usize]) -> Self {
        let (count, head_size) = (heads.count, heads.size);
        PackedAttention { cu_seqlens, heads: count, head_size, slopes: &heads.slopes }
    }

    fn tasks(&self) -> usize {
        (self.cu_seqlens.len() - 1) * self.heads
    }

    /// Tokens and head of a task; the longest sequences need not come first, tasks are many.
    fn task(&self, task: usize) -> (usize, usize, usize) {
        let (sequence, head) = (task / self.heads, task % self.heads);
        (self.cu_seqlens[sequence], self.cu_seqlens[sequence + 1] - self.cu_seqlens[sequence], head)
    }

    /// Query, key or value (`part` 0, 1, 2) of a head over `rows` tokens from `first`.
    fn part<'x>(
        &self,
        qkv: &'x [f32],
        part: usize,
        (first, rows): (usize, usize),
        head: usize,
    ) -> MatrixView<'x> {
        let width = 3 * self.heads * self.head_size;
        let start = first * width + (head * 3 + part) * self.head_size;
        let end = if rows == 0 { start } else { start + (rows - 1) * width + self.head_size };
        MatrixView::strided(&qkv[start..end], rows, self.head_size, width)
    }

    /// A head's part of a `[tokens, hidden]` activation.
    fn output<'x>(&self, x: &'x [f32], first: usize, rows: usize, head: usize) -> MatrixView<'x> {
        let width = self.heads * self.head_size;
        let start = first * width + head * self.head_size;
        MatrixView::strided(
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
                self.scores(qkv, (first, i), rows, head, &mut scores);
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
                let p = MatrixView::new(&scores[..rows * keys], rows, keys);
                // SAFETY: heads of a row interleave between tasks but share no element.
                unsafe { matmul_tile(c, width, p, self.part(qkv, 2, (first, keys), head), false) };
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
        (first, i): (usize, usize),
        rows: usize,
        head: usize,
        scores: &mut [f32],
    ) {
        let keys = i + rows;
        let q = self.part(qkv, 0, (first + i, rows), head);
        let k = self.part(qkv, 1, (first, keys), head);
        matmul_small(&mut scores[..rows * keys], keys, q, k.t(), false);
    }

    /// Writes the gradient of `qkv` to `dqkv`, given `out` and `lse` of the forward pass and the
    /// gradient `dout`.
    pub fn backward(&self, cpu: &Cpu, b: &AttentionBackward, dqkv: &mut [f32]) {
        let AttentionBackward { qkv, out, lse, dout } = *b;
        let width = 3 * self.heads * self.head_size;
        let d = Disjoint::new(dqkv);
        cpu.threads.run(self.tasks(), |task| {
            let (first, tokens, head) = self.task(task);
            let mut p = vec![0f32; QUERIES * tokens];
            let mut ds = vec![0f32; QUERIES * tokens];
            for i in (0..tokens).step_by(QUERIES) {
                let rows = QUERIES.min(tokens - i);
                let keys = i + rows;
                self.scores(qkv, (first, i), rows, head, &mut p);
                let o = self.output(out, first + i, rows, head);
                let g = self.output(dout, first + i, rows, head);
                matmul_small(
                    &mut ds[..rows * keys],
                    keys,
                    g,
                    self.part(qkv, 2, (first, keys), head).t(),
                    false,
                );
                for r in 0..rows {
                    let at = r * o.row_stride..r * o.row_stride + self.head_size;
                    let dot: f32 =
                        o.data[at.clone()].iter().zip(&g.data[at]).map(|(a, b)| a * b).sum();
                    let lse = lse[(first + i + r) * self.heads + head];
                    let row = r * keys..(r + 1) * keys;
                    let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
                    let row = ScoreRow {
                        position: i + r,
                        scale: self.scale(),
                        slope: self.slopes[head],
                        lse,
                        dot,
                    };
                    softmax_causal_backward(cpu.isa, p, ds, &row);
                }
                let p = MatrixView::new(&p[..rows * keys], rows, keys);
                let ds = MatrixView::new(&ds[..rows * keys], rows, keys);
                let part = |part: usize, from: usize, rows: usize| {
                    let start = (first + from) * width + (head * 3 + part) * self.head_size;
                    d.tile(start, (rows - 1) * width + self.head_size)
                };
                // SAFETY: heads of a row interleave between tasks but share no element.
                unsafe {
                    let k = self.part(qkv, 1, (first, keys), head);
                    matmul_tile(part(0, i, rows), width, ds, k, false);
                    // keys before this block have a sum already; the block's own rows start one
                    for (which, weights, x) in
                        [(1, ds, self.part(qkv, 0, (first + i, rows), head)), (2, p, g)]
                    {
                        if i > 0 {
                            let before = MatrixView { cols: i, ..weights };
                            matmul_tile(part(which, 0, i), width, before.t(), x, true);
                        }
                        let own = MatrixView { data: &weights.data[i..], cols: rows, ..weights };
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
        let mut max = f32::NEG_INFINITY;
        for (j, s) in row[..n].iter_mut().enumerate() {
            *s = *s * scale - slope * (position - j) as f32;
            max = if *s > max { *s } else { max };
        }
        let m = S::splat(max);
        let mut sum = S::splat(0.0);
        let full = n / 16 * 16;
        for j in (0..full).step_by(16) {
            let e = S::exp(S::sub(S::load(row.as_ptr().add(j)), m));
            S::store(row.as_mut_ptr().add(j), e);
            sum = S::add(sum, e);
        }
        let mut sum = S::sum(sum);
        for s in &mut row[full..n] {
            *s = (*s - max).exp();
            sum += *s;
        }
        let inverse = 1.0 / sum;
        row[..n].iter_mut().for_each(|s| *s *= inverse);
        row[n..].fill(0.0);
        max + sum.ln()
    }
}

simd_fn! {
    /// Turns raw scores into probabilities and their gradients into gradients of raw scores.
    fn softmax_causal_backward<S>(p: &mut [f32], d: &mut [f32], row: &ScoreRow) {
        let ScoreRow { position, scale, slope, lse, dot } = *row;
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
