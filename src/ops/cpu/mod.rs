//! The CPU backend: native Rust with AVX-512, AVX2 and portable paths chosen at run time.

// An unsafe function here needs an instruction set or valid pointers as a whole, as its contract
// says: a block inside it would say so again and nothing more.
#![allow(unsafe_op_in_unsafe_fn)]

pub mod attention;
mod attention_train;
mod embedding_train;
pub mod finite;
mod huge_pages;
pub mod linear;
mod linear_train;
mod loss;
pub mod matmul;
#[cfg(target_arch = "x86_64")]
mod matmul_bf16;
pub mod matrix_view;
mod norm_train;
mod optimizer;
pub mod rows;
pub mod sampling;
mod scalar_train;
pub mod simd;
pub mod threads;
mod train;

use super::sampling::{SampledToken, SamplingRow};
use super::{
    Backend, Batch, DecodeBackend, Epilogue, Heads, LayerNorm, Linear, Tensor, Weight as _,
};
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::simd_fn;
use crate::tensor::{DType, HostTensor};
use attention::KvCache;
use linear::CpuWeight;
use sampling::sample_token;
use simd::Isa;
use threads::{Disjoint, Threads};

/// The machine's processor: its threads and the instruction set to use.
pub struct Cpu {
    threads: Threads,
    isa: Isa,
    resident: bool,
}

impl Cpu {
    /// `threads` as for [`Threads::new`].
    pub fn new(threads: usize, isa: Isa) -> Cpu {
        Cpu { threads: Threads::new(threads), isa, resident: false }
    }

    /// Says whether weights of a mapped file are copied to where they are read fastest: a pause at
    /// the start for whoever reads them many times. Results are the same.
    pub fn with_resident_weights(self, resident: bool) -> Cpu {
        Cpu { resident, ..self }
    }

    /// The threads that operations run on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// See [`Cpu::with_resident_weights`].
    pub fn resident(&self) -> bool {
        self.resident
    }

    /// Activations from the host: rows of `width`.
    pub fn upload(&self, x: &[f32], width: usize) -> Tensor<Cpu> {
        let mut tensor = Tensor::default();
        self.room(&mut tensor, [x.len() / width, width]).copy_from_slice(x);
        tensor
    }

    /// Makes room for what an operation writes.
    fn room<'t>(&self, y: &'t mut Tensor<Cpu>, shape: [usize; 2]) -> &'t mut Vec<f32> {
        let buffer = y.set(shape, DType::F32);
        buffer.resize(shape[0] * shape[1], 0.0);
        buffer
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Weight = CpuWeight;
    type Vector = Vec<f32>;

    fn weight(&self, tensor: HostTensor, dtype: Option<DType>) -> Result<CpuWeight> {
        CpuWeight::new(self, tensor, dtype)
    }

    fn vector(&self, tensor: &HostTensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32())
    }

    fn fits(&self, plan: &MemoryPlan) -> Result<()> {
        plan.check()
    }

    fn linear(
        &self,
        y: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        linear: &Linear<Cpu>,
        epilogue: Epilogue<Cpu>,
    ) {
        let (n, k) = (linear.weight.rows(), linear.weight.cols());
        let tokens = x.shape()[0];
        x.expect("linear", [tokens, k], DType::F32);
        if let Epilogue::BiasResidual(residual) = &epilogue {
            residual.expect("linear's residual", [tokens, n], DType::F32);
        }
        let rows = Disjoint::new(self.room(y, [tokens, n]));
        linear::gemm_nt(self, x.buffer(), &linear.weight, &|token, first, sums| {
            let at = token * n + first..token * n + first + sums.len();
            // SAFETY: every output is finished once.
            let out = unsafe { rows.slice(at.clone()) };
            let bias = &linear.bias[first..first + sums.len()];
            match &epilogue {
                Epilogue::Bias | Epilogue::BiasHalf => add_bias(self.isa, sums, bias, out),
                Epilogue::BiasGelu => add_bias_gelu(self.isa, sums, bias, out),
                Epilogue::BiasResidual(residual) => {
                    add_bias_residual(self.isa, sums, bias, &residual.buffer()[at], out)
                }
            }
        });
    }

    fn layer_norm(&self, y: &mut Tensor<Cpu>, x: &Tensor<Cpu>, norm: &LayerNorm<Cpu>) {
        let (tokens, h) = (x.shape()[0], norm.weight.len());
        x.expect("layer_norm", [tokens, h], DType::F32);
        let rows = Disjoint::new(self.room(y, [tokens, h]));
        self.threads.run_ranges(tokens, 8, |r| {
            for t in r {
                let row = t * h..(t + 1) * h;
                // SAFETY: every token's row is written once.
                let out = unsafe { rows.slice(row.clone()) };
                self.layer_norm_row(&x.buffer()[row], norm, out);
            }
        });
    }

    fn layer_norm_rows(
        &self,
        y: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        rows: &[usize],
        norm: &LayerNorm<Cpu>,
    ) {
        let h = norm.weight.len();
        x.expect("layer_norm_rows", [x.shape()[0], h], DType::F32);
        let out = self.room(y, [rows.len(), h]);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(h)) {
            self.layer_norm_row(&x.buffer()[row * h..(row + 1) * h], norm, out);
        }
    }
}

impl Cpu {
    fn layer_norm_row(&self, x: &[f32], norm: &LayerNorm<Cpu>, out: &mut [f32]) {
        rows::layer_norm_row(self.isa, x, &norm.weight, &norm.bias, norm.eps, out);
    }
}

impl DecodeBackend for Cpu {
    type Cache = KvCache;
    type DeviceBatch = Batch;
    type PendingSamples = Vec<SampledToken>;

    fn cache(&self, dtype: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<KvCache> {
        KvCache::new(dtype, layers, heads, blocks)
    }

    fn copy_block(&self, cache: &mut KvCache, from: u32, to: u32) {
        cache.copy_block(from, to);
    }

    fn upload_batch(&self, batch: &Batch, to: &mut Batch) {
        to.copy_from(batch);
    }

    fn embedding_norm(
        &self,
        y: &mut Tensor<Cpu>,
        batch: &Batch,
        table: &CpuWeight,
        norm: &LayerNorm<Cpu>,
    ) {
        let (h, ids) = (table.cols(), &batch.ids);
        let rows = Disjoint::new(self.room(y, [ids.len(), h]));
        self.threads.run_ranges(ids.len(), 8, |r| {
            let mut row = vec![0f32; h];
            for t in r {
                table.read_row(ids[t] as usize, &mut row);
                // SAFETY: every token's row is written once.
                let out = unsafe { rows.slice(t * h..(t + 1) * h) };
                self.layer_norm_row(&row, norm, out);
            }
        });
    }

    /// `queries` are `[tokens, head, 3, head size]`: keys and values are left where they came from.
    fn qkv_to_cache(
        &self,
        queries: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        qkv: &Linear<Cpu>,
        batch: &Batch,
        (cache, layer): (&mut KvCache, usize),
    ) {
        self.linear(queries, x, qkv, Epilogue::Bias);
        cache.write(self, batch, layer, queries.buffer());
    }

    fn paged_attention(
        &self,
        y: &mut Tensor<Cpu>,
        queries: &Tensor<Cpu>,
        batch: &Batch,
        (cache, layer): (&KvCache, usize),
    ) {
        let (tokens, width) = (batch.ids.len(), cache.heads().width());
        queries.expect("paged_attention", [tokens, 3 * width], DType::F32);
        let out = self.room(y, [tokens, width]);
        cache.attend(self, batch, layer, queries.buffer(), out);
    }

    fn logits(&self, x: &Tensor<Cpu>, lm_head: &CpuWeight, out: &mut Vec<f32>) -> Result<()> {
        let (n, tokens) = (lm_head.rows(), x.shape()[0]);
        x.expect("logits", [tokens, lm_head.cols()], DType::F32);
        out.resize(tokens * n, 0.0);
        let rows = Disjoint::new(out);
        linear::gemm_nt(self, x.buffer(), lm_head, &|token, first, sums| {
            let at = token * n + first..token * n + first + sums.len();
            // SAFETY: every output is finished once.
            unsafe { rows.slice(at) }.copy_from_slice(sums);
        });
        Ok(())
    }

    fn sample(
        &self,
        x: &Tensor<Cpu>,
        lm_head: &CpuWeight,
        rows: &[(usize, &SamplingRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<SampledToken>> {
        self.logits(x, lm_head, scratch)?;
        let vocab = lm_head.rows();
        let mut sampled = vec![SampledToken::default(); rows.len()];
        // rows of one token stand together where a prompt has just split; each group is one task
        let groups: Vec<Vec<usize>> = (0..scratch.len() / vocab)
            .map(|g| (0..rows.len()).filter(|&i| rows[i].0 == g).collect())
            .collect();
        let (logits, out) = (Disjoint::new(scratch), Disjoint::new(&mut sampled));
        self.threads.run(groups.len(), |g| {
            // SAFETY: a group's logits are one task's.
            let logits = unsafe { logits.slice(g * vocab..(g + 1) * vocab) };
            let (max, sum) = rows::exp_sum(self.isa, logits, false);
            let lse = max + sum.ln();
            for &i in &groups[g] {
                // SAFETY: each row is in one group.
                let out = unsafe { out.slice(i..i + 1) };
                out[0] = sample_token(logits, lse, rows[i].1);
            }
        });
        Ok(sampled)
    }

    /// Nothing is gained: the passes run on the processor that would go ahead.
    fn samples_on_device(&self, _: &SamplingRow) -> bool {
        false
    }

    fn sample_async(
        &self,
        x: &Tensor<Cpu>,
        lm_head: &CpuWeight,
        rows: &[(usize, &SamplingRow)],
    ) -> Result<Vec<SampledToken>> {
        self.sample(x, lm_head, rows, &mut Vec::new())
    }

    fn wait(&self, pending: Vec<SampledToken>) -> Result<Vec<SampledToken>> {
        Ok(pending)
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
            let x = S::load_partial(x.add(full), rest);
            let v = S::add(x, S::load_partial(bias.add(full), rest));
            S::store_partial(out.add(full), S::gelu(v), rest);
        }
    }
}
