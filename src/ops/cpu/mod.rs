//! The CPU backend: native Rust with AVX-512, AVX2 and portable paths chosen at run time.

pub mod attention;
pub mod finite;
pub mod matmul;
#[cfg(target_arch = "x86_64")]
mod matmul_bf16;
pub mod product;
mod resident;
pub mod rows;
pub mod simd;
pub mod threads;
pub mod training;

use super::{Backend, Batch, Epilogue, Heads, LayerNorm, Linear, Norm};
use crate::engine::{Chosen, SampleRow, choose};
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::simd_fn;
use crate::tensor::{DType, Tensor};
use attention::Cache;
use product::Matrix;
use simd::Isa;
use threads::{Disjoint, Threads};

/// The machine's processor: its threads and the instruction set to use.
pub struct Cpu {
    pub threads: Threads,
    pub isa: Isa,
    /// Whether weights of a mapped file are copied to where they are read fastest: a pause at the
    /// start for whoever reads them many times. Results are the same.
    pub resident: bool,
}

impl Cpu {
    /// `threads` as for [`Threads::new`].
    pub fn new(threads: usize, isa: Isa) -> Cpu {
        Cpu { threads: Threads::new(threads), isa, resident: false }
    }

    fn layer_norm(&self, x: &[f32], norm: &LayerNorm<Vec<f32>>, eps: f32, out: &mut Vec<f32>) {
        let h = norm.weight.len();
        out.resize(x.len(), 0.0);
        let rows = Disjoint::new(out);
        self.threads.run_ranges(x.len() / h, 8, |r| {
            for t in r {
                let row = t * h..(t + 1) * h;
                // SAFETY: every token's row is written once.
                let out = unsafe { rows.slice(row.clone()) };
                rows::layer_norm_row(self.isa, &x[row], &norm.weight, &norm.bias, eps, out);
            }
        });
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Buffer = Vec<f32>;
    type Cache = Cache;
    type Pass = ();
    type Choosing = Vec<Chosen>;

    fn matrix(&self, tensor: Tensor, dtype: Option<DType>) -> Result<Matrix> {
        Matrix::new(self, tensor, dtype)
    }

    fn stored(&self, matrix: &Matrix) -> DType {
        matrix.dtype()
    }

    fn vector(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32())
    }

    fn fits(&self, plan: &MemoryPlan) -> Result<()> {
        plan.check()
    }

    fn cache(&self, dtype: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<Cache> {
        Cache::new(dtype, layers, heads, blocks)
    }

    fn copy_block(&self, cache: &mut Cache, from: u32, to: u32) {
        cache.copy_block(from, to);
    }

    fn begin(&self, _: &Batch, _: &mut ()) {}

    fn embed_norm(
        &self,
        batch: &Batch,
        _: &(),
        table: &Matrix,
        norm: &LayerNorm<Vec<f32>>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let (h, ids) = (table.cols(), &batch.ids);
        out.resize(ids.len() * h, 0.0);
        let rows = Disjoint::new(out);
        self.threads.run_ranges(ids.len(), 8, |r| {
            let mut row = vec![0f32; h];
            for t in r {
                table.read_row(ids[t] as usize, &mut row);
                // SAFETY: every token's row is written once.
                let out = unsafe { rows.slice(t * h..(t + 1) * h) };
                rows::layer_norm_row(self.isa, &row, &norm.weight, &norm.bias, eps, out);
            }
        });
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        linear: &Linear<Matrix, Vec<f32>>,
        epilogue: Epilogue<Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let n = linear.weight.rows();
        out.resize(x.len() / linear.weight.cols() * n, 0.0);
        let rows = Disjoint::new(out);
        product::product(self, x, &linear.weight, &|token, first, sums| {
            let at = token * n + first..token * n + first + sums.len();
            // SAFETY: every output is finished once.
            let out = unsafe { rows.slice(at.clone()) };
            let bias = &linear.bias[first..first + sums.len()];
            match epilogue {
                Epilogue::Bias => add_bias(self.isa, sums, bias, out),
                Epilogue::BiasGelu => add_bias_gelu(self.isa, sums, bias, out),
                Epilogue::BiasResidual(residual) => {
                    add_bias_residual(self.isa, sums, bias, &residual[at], out)
                }
            }
        });
    }

    fn norm_linear(
        &self,
        x: &Vec<f32>,
        norm: Norm<Cpu>,
        linear: &Linear<Matrix, Vec<f32>>,
        epilogue: Epilogue<Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        self.layer_norm(x, norm.norm, norm.eps, norm.normed);
        self.linear(norm.normed, linear, epilogue, out);
    }

    fn norm_qkv(
        &self,
        batch: &Batch,
        _: &(),
        layer: usize,
        x: &Vec<f32>,
        norm: Norm<Cpu>,
        linear: &Linear<Matrix, Vec<f32>>,
        heads: &Heads,
        cache: &mut Cache,
        out: &mut Vec<f32>,
    ) {
        self.norm_linear(x, norm, linear, Epilogue::Bias, out);
        cache.write(self, batch, layer, heads, out);
    }

    fn attention(
        &self,
        batch: &Batch,
        _: &(),
        layer: usize,
        heads: &Heads,
        queries: &Vec<f32>,
        cache: &Cache,
        out: &mut Vec<f32>,
    ) {
        out.resize(queries.len() / 3, 0.0);
        cache.attend(self, batch, layer, heads, queries, out);
    }

    fn gather_norm(
        &self,
        x: &Vec<f32>,
        rows: &[usize],
        norm: &LayerNorm<Vec<f32>>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let h = norm.weight.len();
        out.resize(rows.len() * h, 0.0);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(h)) {
            rows::layer_norm_row(
                self.isa,
                &x[row * h..(row + 1) * h],
                &norm.weight,
                &norm.bias,
                eps,
                out,
            );
        }
    }

    fn logits(&self, x: &Vec<f32>, head: &Matrix, out: &mut Vec<f32>) -> Result<()> {
        let n = head.rows();
        out.resize(x.len() / head.cols() * n, 0.0);
        let rows = Disjoint::new(out);
        product::product(self, x, head, &|token, first, sums| {
            // SAFETY: every output is finished once.
            unsafe { rows.slice(token * n + first..token * n + first + sums.len()) }
                .copy_from_slice(sums);
        });
        Ok(())
    }

    fn sample(
        &self,
        x: &Vec<f32>,
        head: &Matrix,
        rows: &[(usize, &SampleRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>> {
        self.logits(x, head, scratch)?;
        let vocab = head.rows();
        let mut chosen = vec![Chosen::default(); rows.len()];
        // rows of one token stand together where a prompt has just split; each group is one task
        let groups: Vec<Vec<usize>> = (0..scratch.len() / vocab)
            .map(|g| (0..rows.len()).filter(|&i| rows[i].0 == g).collect())
            .collect();
        let (logits, out) = (Disjoint::new(scratch), Disjoint::new(&mut chosen));
        self.threads.run(groups.len(), |g| {
            // SAFETY: a group's logits and choices are one task's.
            let logits = unsafe { logits.slice(g * vocab..(g + 1) * vocab) };
            let (most, sum) = rows::exp_sum(self.isa, logits, false);
            let lse = most + sum.ln();
            for &i in &groups[g] {
                unsafe { out.slice(i..i + 1)[0] = choose(logits, lse, rows[i].1) };
            }
        });
        Ok(chosen)
    }

    /// Nothing is gained: the passes run on the processor that would go ahead.
    fn chooses_alone(&self, _: &SampleRow) -> bool {
        false
    }

    fn start_sample(
        &self,
        x: &Vec<f32>,
        head: &Matrix,
        rows: &[(usize, &SampleRow)],
    ) -> Result<Vec<Chosen>> {
        self.sample(x, head, rows, &mut Vec::new())
    }

    fn finish_sample(&self, choosing: Vec<Chosen>) -> Result<Vec<Chosen>> {
        Ok(choosing)
    }
}

simd_fn! {
    fn add_bias<S>(x: &[f32], bias: &[f32], out: &mut [f32]) {
        let n = out.len();
        let (x, bias) = (&x[..n], &bias[..n]);
        for i in 0..n {
            out[i] = x[i] + bias[i];
        }
    }
}

simd_fn! {
    fn add_bias_residual<S>(x: &[f32], bias: &[f32], residual: &[f32], out: &mut [f32]) {
        let n = out.len();
        let (x, bias, residual) = (&x[..n], &bias[..n], &residual[..n]);
        for i in 0..n {
            out[i] = x[i] + bias[i] + residual[i];
        }
    }
}

simd_fn! {
    fn add_bias_gelu<S>(x: &[f32], bias: &[f32], out: &mut [f32]) {
        let n = out.len();
        let full = n / 16 * 16;
        let (x, bias, out) = (x[..n].as_ptr(), bias[..n].as_ptr(), out.as_mut_ptr());
        for i in (0..full).step_by(16) {
            S::store(out.add(i), S::gelu(S::add(S::load(x.add(i)), S::load(bias.add(i)))));
        }
        if full < n {
            let rest = n - full;
            let v = S::add(S::load_partial(x.add(full), rest), S::load_partial(bias.add(full), rest));
            S::store_partial(out.add(full), S::gelu(v), rest);
        }
    }
}
