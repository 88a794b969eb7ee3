//! The operations of a training step, one by one, each compared with its floor.
//!
//! Random weights of one layer and of the embedding; what an operation reads is what the ones
//! before it in a step gave. The optimizer's are not among them.

use super::floor::MinimumWork;
use super::kernels::{Case, KernelReport, Timer};
use super::machine::{Machine, probe_bytes};
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::models::bloom::training::{Recompute, TrainModel, training_bytes_per_token};
use crate::models::bloom::{BloomConfig, BloomParameters};
use crate::models::params::flat_ranges;
use crate::ops::token_loss::{ClippedPpo, LossGradients, LossOutput, TokenLoss};
use crate::ops::train::{
    AttentionOutput, LinearBackward, NormBackward, NormOutput, Params, Precision, TrainBackend,
};
use crate::ops::{Affine, Tensor};
use crate::random::PhiloxStream;
use crate::tensor::DType;
use std::ops::Range;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct TrainKernelOptions {
    /// Sequences of a pass.
    pub sequences: usize,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Precision of the GEMMs.
    pub precision: Precision,
    /// Calls that are timed together.
    pub calls: usize,
}

/// What measuring takes.
fn plan<B: TrainBackend>(backend: &B, config: &BloomConfig, tokens: usize) -> MemoryPlan {
    let (parameters, vocabulary) = (config.parameter_count() as f64, config.vocab_size);
    let per_token = training_bytes_per_token(config, Recompute::None, B::ACTIVATION_BYTES);
    let size = "--shape";
    MemoryPlan::new()
        .with("weights", B::PARAMETER_BYTES as f64 * parameters, size)
        .with("gradients", 4.0 * parameters, size)
        .with("activations", per_token * tokens as f64, "--train")
        .with("logits", backend.logit_bytes(tokens, vocabulary) as f64, "--train")
        .with(
            "a buffer to measure the bandwidth",
            probe_bytes() as f64,
            "nothing: more memory is needed",
        )
}

/// Measures the operations of one layer, of the embedding and of the LM head.
///
/// # Errors
/// If the device cannot compute so, or does not have the memory.
pub fn run<B: TrainBackend + Machine>(
    backend: &B,
    config: BloomConfig,
    o: TrainKernelOptions,
) -> Result<KernelReport> {
    let config = BloomConfig { layers: 1, ..config };
    backend.supports(o.precision)?;
    let tokens = o.sequences * o.tokens;
    plan(backend, &config, tokens).check_against(backend.free_memory().unwrap_or(u64::MAX))?;
    let dtype = if o.precision == Precision::F32 { DType::F32 } else { DType::Bf16 };
    let Ok(layout) = config.parameter_tree(flat_ranges());
    let model = TrainModel::random(config, 1).place(backend)?;
    let mut words = PhiloxStream::new(3, 1);
    let ids = (0..tokens).map(|_| words.below(model.config.vocab_size) as u32).collect();
    let mut bench = Bench {
        b: backend,
        layout,
        ids,
        cu_seqlens: (0..=o.sequences).map(|s| s * o.tokens).collect(),
        grads: backend.zeros(model.config.parameter_count())?,
        case: Case { sequences: o.sequences, tokens: o.tokens, positions: o.tokens },
        timer: Timer::new(backend, dtype, o.calls)?,
        precision: o.precision,
        model,
    };
    let forward = bench.forward()?;
    bench.backward(&forward)?;
    bench.rows(&forward)?;
    bench.losses(&forward)?;
    Ok(bench.timer.report(dtype))
}

struct Bench<'a, B: TrainBackend + Machine> {
    b: &'a B,
    model: TrainModel<B::Flat>,
    layout: BloomParameters<Range<usize>>,
    precision: Precision,
    ids: Vec<u32>,
    cu_seqlens: Vec<usize>,
    grads: B::Flat,
    case: Case,
    timer: Timer<'a, B>,
}

/// What the operations of the forward pass give.
struct Forward<B: TrainBackend> {
    embedded: Tensor<B>,
    norm1: NormOutput<B>,
    qkv: Tensor<B>,
    attention: AttentionOutput<B>,
    x2: Tensor<B>,
    norm2: NormOutput<B>,
    up: Tensor<B>,
    gelu: Tensor<B>,
    out: Tensor<B>,
}

impl<B: TrainBackend> Default for Forward<B> {
    fn default() -> Self {
        let (embedded, qkv, x2, up, gelu, out) = Default::default();
        let (norm1, norm2) = (NormOutput::default(), NormOutput::default());
        let attention = AttentionOutput::default();
        Forward { embedded, norm1, qkv, attention, x2, norm2, up, gelu, out }
    }
}

/// Work whose calls all go through the same bytes.
fn work(bytes: f64, flops: f64) -> MinimumWork {
    MinimumWork { bytes, flops, working_set: bytes }
}

/// Bytes of a gradient that is read and written in f32.
const ADDED: f64 = 8.0;

impl<B: TrainBackend + Machine> Bench<'_, B> {
    /// Tokens, the width of the hidden states, and bytes of an element of activations and of the
    /// weights that GEMMs read.
    fn sizes(&self) -> (f64, f64, f64) {
        let width = self.model.config.hidden_size;
        (self.ids.len() as f64, width as f64, B::ACTIVATION_BYTES as f64)
    }

    /// A linear layer, or with `passes` 2 its backward pass, whose two GEMMs have as many FLOPs
    /// each. `narrow` elements of each token have the type of activations, `wide` ones are f32.
    fn gemm(&self, at: &Affine<Range<usize>>, passes: f64, narrow: f64, wide: f64) -> MinimumWork {
        let ((n, _, a), weights) = (self.sizes(), at.weight.len() as f64);
        let weight_bytes = weights * (a + if passes > 1.0 { ADDED } else { 0.0 });
        work(weight_bytes + n * (narrow * a + wide * 4.0), passes * 2.0 * n * weights)
    }

    /// FLOPs of the products of attention, of which the forward pass has two.
    fn attention_flops(&self, products: f64) -> f64 {
        let ((n, h, _), seen) = (self.sizes(), (self.case.tokens as f64 + 1.0) / 2.0);
        2.0 * products * n * seen * h
    }

    fn forward(&mut self) -> Result<Forward<B>> {
        let (b, l, case) = (self.b, &self.layout.layers[0], self.case);
        let p = Params { values: &self.model.values, precision: self.precision };
        let ((n, h, a), heads) = (self.sizes(), self.model.config.attention_heads());
        let (eps, time) = (self.model.config.layer_norm_epsilon, &self.timer);
        let mut f = Forward::default();
        let embedding = (p, &self.layout.embedding);
        time.time("embedding + norm", case, work(n * h * (a + 8.0), 0.0), &mut |_| {
            let out = (&mut f.norm1, &mut f.embedded);
            b.embedding_norm_forward(out, &self.ids, embedding, &self.layout.embedding_norm, eps);
            Ok(())
        })?;
        let x = std::mem::take(&mut f.norm1.y);
        time.time("layer norm", case, work(n * h * (4.0 + a), 0.0), &mut |_| {
            b.layer_norm_forward(&mut f.norm1, &x, (p, &l.input_norm), eps);
            Ok(())
        })?;
        time.time("QKV", case, self.gemm(&l.qkv, 1.0, 4.0 * h, 0.0), &mut |_| {
            b.linear_forward(&mut f.qkv, &f.norm1.y, (p, &l.qkv), None);
            Ok(())
        })?;
        let read = work(n * 4.0 * h * a, self.attention_flops(2.0));
        time.time("attention", case, read, &mut |_| {
            b.attention_forward(&mut f.attention, &f.qkv, &heads, &self.cu_seqlens);
            Ok(())
        })?;
        time.time("dense + residual", case, self.gemm(&l.dense, 1.0, h, 2.0 * h), &mut |_| {
            b.linear_forward(&mut f.x2, &f.attention.y, (p, &l.dense), Some(&x));
            Ok(())
        })?;
        b.layer_norm_forward(&mut f.norm2, &f.x2, (p, &l.post_norm), eps);
        time.time("up", case, self.gemm(&l.up, 1.0, 5.0 * h, 0.0), &mut |_| {
            b.linear_forward(&mut f.up, &f.norm2.y, (p, &l.up), None);
            Ok(())
        })?;
        time.time("GELU", case, work(n * 8.0 * h * a, 0.0), &mut |_| {
            b.gelu_forward(&mut f.gelu, &f.up);
            Ok(())
        })?;
        time.time("down + residual", case, self.gemm(&l.down, 1.0, 4.0 * h, 2.0 * h), &mut |_| {
            b.linear_forward(&mut f.out, &f.gelu, (p, &l.down), Some(&f.x2));
            Ok(())
        })?;
        Ok(f)
    }

    /// The layer's output serves as the gradient of itself.
    fn backward(&mut self, f: &Forward<B>) -> Result<()> {
        let ((n, h, a), case, heads) =
            (self.sizes(), self.case, self.model.config.attention_heads());
        let l = &self.layout.layers[0];
        let works =
            [(&l.down, 12.0, 1.0), (&l.up, 6.0, 0.0), (&l.dense, 2.0, 1.0), (&l.qkv, 5.0, 0.0)]
                .map(|(at, narrow, wide)| self.gemm(at, 2.0, narrow * h, wide * h));
        let attention = work(n * 8.0 * h * a, self.attention_flops(5.0));
        let Bench { b, timer: time, grads: g, model, cu_seqlens, ids, .. } = self;
        let p = Params { values: &model.values, precision: self.precision };
        let (mut wide, mut normed, mut residual, mut attended, mut dqkv) = Default::default();
        time.time("down + GELU, backward", case, works[0], &mut |_| {
            let down = LinearBackward { dy: &f.out, x: &f.gelu, before_gelu: Some(&f.up) };
            b.linear_backward(&mut wide, g, down, (p, &l.down));
            Ok(())
        })?;
        time.time("up, backward", case, works[1], &mut |_| {
            let up = LinearBackward { dy: &wide, x: &f.norm2.y, before_gelu: None };
            b.linear_backward(&mut normed, g, up, (p, &l.up));
            Ok(())
        })?;
        time.time("layer norm, backward", case, work(n * h * (a + 12.0), 0.0), &mut |_| {
            let norm =
                NormBackward { dy: &normed, x: &f.x2, output: &f.norm2, residual: Some(&f.out) };
            b.layer_norm_backward(&mut residual, g, norm, (p, &l.post_norm));
            Ok(())
        })?;
        time.time("dense, backward", case, works[2], &mut |_| {
            let dense = LinearBackward { dy: &residual, x: &f.attention.y, before_gelu: None };
            b.linear_backward(&mut attended, g, dense, (p, &l.dense));
            Ok(())
        })?;
        time.time("attention, backward", case, attention, &mut |_| {
            b.attention_backward(&mut dqkv, &attended, (&f.qkv, &f.attention), &heads, cu_seqlens);
            Ok(())
        })?;
        time.time("QKV, backward", case, works[3], &mut |_| {
            let qkv = LinearBackward { dy: &dqkv, x: &f.norm1.y, before_gelu: None };
            b.linear_backward(&mut normed, g, qkv, (p, &l.qkv));
            Ok(())
        })?;
        let bytes = n * h * (4.0 + ADDED);
        time.time("embedding, backward", case, work(bytes, 0.0), &mut |_| {
            b.embedding_backward(g, &residual, ids, &self.layout.embedding);
            Ok(())
        })
    }

    /// Every second row, there and back.
    fn rows(&mut self, f: &Forward<B>) -> Result<()> {
        let ((n, h, a), b, case) = (self.sizes(), self.b, self.case);
        let rows: Vec<usize> = (0..self.ids.len()).step_by(2).collect();
        let (mut some, mut all) = Default::default();
        let half = work(n * h * a, 0.0);
        self.timer.time("gather half of the rows", case, half, &mut |_| {
            b.gather_rows(&mut some, &f.norm2.y, &rows);
            Ok(())
        })?;
        let whole = work(1.5 * n * h * a, 0.0);
        self.timer.time("scatter half of the rows", case, whole, &mut |_| {
            b.scatter_rows(&mut all, &some, &rows, self.ids.len());
            Ok(())
        })
    }

    /// Every token is a label.
    fn losses(&mut self, f: &Forward<B>) -> Result<()> {
        let ((n, h, a), case) = (self.sizes(), self.case);
        let Bench { b, timer: time, grads, model, ids, layout, precision, .. } = self;
        let p = Params { values: &model.values, precision: *precision };
        let (mut column, mut logits, mut dx) = Default::default();
        b.upload_column(&mut column, &vec![-1.0; ids.len()])?;
        let ppo = ClippedPpo {
            old_log_probs: &column,
            advantages: &column,
            reference_log_probs: Some(&column),
            clip: 0.2,
            kl: 0.1,
            entropy: 0.1,
            scale: 1.0 / n as f32,
        };
        let losses = [
            ("LM head + cross-entropy", TokenLoss::CrossEntropy { scale: 1.0 / n as f32 }),
            ("LM head + PPO", TokenLoss::ClippedPpo(ppo)),
        ];
        let (weights, mut sums) = (layout.embedding.len() as f64, b.new_sums()?);
        // logits need never be in memory
        let forward = work(weights * a + n * h * a, 2.0 * n * weights);
        let all = work(weights * (a + ADDED) + 2.0 * n * h * a, 6.0 * n * weights);
        for (name, loss) in losses {
            time.time(name, case, all, &mut |_| {
                let gradients = Some(LossGradients { dx: &mut dx, grads: Some(&mut *grads) });
                let to = LossOutput { sums: &mut sums, stats: None, gradients };
                let x = (&f.norm2.y, &mut logits);
                b.lm_head_loss(x, ids, (p, &layout.embedding), &loss, to);
                Ok(())
            })?;
        }
        let mut stats = Default::default();
        time.time("LM head + statistics", case, forward, &mut |_| {
            let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients: None };
            let (x, loss) = ((&f.norm2.y, &mut logits), TokenLoss::CrossEntropy { scale: 0.0 });
            b.lm_head_loss(x, ids, (p, &layout.embedding), &loss, to);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::Cpu;
    use crate::ops::cpu::simd::Isa;

    #[test]
    fn every_operation_has_a_row_with_work_and_time() {
        let cpu = Cpu::new(1, Isa::detect());
        let options =
            TrainKernelOptions { sequences: 2, tokens: 5, precision: Precision::F32, calls: 1 };
        let report = run(&cpu, BloomConfig::new(70, 32, 3, 2), options).unwrap();
        assert_eq!(report.rows.len(), 20);
        assert!(report.rows.iter().all(|r| r.microseconds > 0.0 && r.bytes > 0.0));
        let flops = |name| report.rows.iter().find(|r| r.operation == name).unwrap().flops;
        assert_eq!(flops("QKV"), 2.0 * 10.0 * 3.0 * 32.0 * 32.0);
        assert_eq!(flops("dense, backward"), 4.0 * 10.0 * 32.0 * 32.0);
        // each token sees three on average
        assert_eq!(flops("attention"), 4.0 * 10.0 * 3.0 * 32.0);
    }
}
