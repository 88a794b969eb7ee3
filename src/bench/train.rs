//! A training step on random tokens: forward, backward, clipping, AdamW.

use super::floor::{Compared, Gauge, MinimumWork, Peaks};
use super::machine::{self, Machine};
use crate::error::Result;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::{Backward, Recompute, TrainModel, Workspace};
use crate::ops::train::{PackedBatch, Precision, TrainBackend};
use crate::random::PhiloxStream;
use crate::tensor::DType;
use crate::train::memory::{Remedies, RunSize, plan};
use crate::train::optimizer::{AdamW, AdamWOptions, StepSize};
use serde::Serialize;
use std::time::Instant;

/// What to measure: a random model and a batch of random tokens.
#[derive(Clone, Copy, Debug)]
pub struct TrainBenchOptions {
    /// Size of the hidden states.
    pub hidden: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Heads of attention in each layer.
    pub heads: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Sequences of a batch.
    pub sequences: usize,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Precision of the GEMMs.
    pub precision: Precision,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Steps that are measured; 0 counts as 1.
    pub repeats: usize,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
pub struct TrainReport {
    /// Number of the model's parameters.
    pub parameters: usize,
    /// Precision of the GEMMs.
    pub precision: &'static str,
    /// Instruction set, or the GPU's architecture.
    pub isa: String,
    /// Threads, or the GPU's multiprocessors.
    pub threads: usize,
    /// Name of the processor or GPU.
    pub processor: String,
    /// Tokens of a batch.
    pub tokens_per_step: usize,
    /// Of the best step.
    pub tokens_per_second: f64,
    /// Time of the best step.
    pub milliseconds: f64,
    /// Multiply-adds counted twice: three times those of the forward pass.
    pub flops: f64,
    /// Minimum time of a step.
    pub floor_milliseconds: f64,
    /// Beside FLOPs over peak alone: bytes are not counted.
    #[serde(flatten)]
    pub compared: Compared,
}

/// Measures training steps on a device.
///
/// # Errors
///
/// Fails if the device does not have the memory that the steps take.
pub fn run<B: TrainBackend + Machine>(backend: &B, o: TrainBenchOptions) -> Result<TrainReport> {
    let config = BloomConfig::new(o.vocab, o.hidden, o.layers, o.heads);
    backend.supports(o.precision)?;
    let tokens = o.sequences * o.tokens;
    let size = RunSize { tokens, recompute: o.recompute, ranks: 1 };
    let remedies = Remedies {
        model: "--hidden, --layers or --vocab",
        pass: "--batch or --tokens, or take --recompute layer",
    };
    plan(backend, &config, size, remedies)
        .with(
            "a buffer to measure the bandwidth",
            machine::probe_bytes() as f64,
            "nothing: more memory is needed",
        )
        .check_against(backend.free_memory().unwrap_or(u64::MAX))?;
    let model = TrainModel::random(config, 1).place(backend)?;
    let (mut batch, mut words) = (PackedBatch::default(), PhiloxStream::new(1, 1));
    for _ in 0..o.sequences {
        let ids: Vec<u32> = (0..o.tokens).map(|_| words.below(o.vocab) as u32).collect();
        batch.push(&ids, 1);
    }
    let (dtype, precision) = match o.precision {
        Precision::F32 => (DType::F32, "f32"),
        Precision::Bf16 => (DType::Bf16, "bf16"),
    };
    let (best, peaks) = best_step(backend, model, &batch, (o, dtype))?;
    let h = o.hidden as f64;
    let tokens = (o.sequences * o.tokens) as f64;
    let attention = 4.0 * tokens * (o.tokens as f64 + 1.0) / 2.0 * h * o.layers as f64;
    let gemms = 2.0 * tokens * o.layers as f64 * 12.0 * h * h
        + 2.0 * batch.labels.len() as f64 * o.vocab as f64 * h;
    let flops = 3.0 * (gemms + attention);
    let compared =
        Compared::new(best, MinimumWork { bytes: 0.0, flops, working_set: 0.0 }, peaks, None);
    let (processor, isa) = backend.describe();
    Ok(TrainReport {
        parameters: BloomConfig::new(o.vocab, o.hidden, o.layers, o.heads).parameter_count(),
        precision,
        isa,
        threads: backend.threads(),
        processor,
        tokens_per_step: batch.ids.len(),
        tokens_per_second: tokens / best,
        milliseconds: best * 1e3,
        flops,
        floor_milliseconds: compared.floor * 1e3,
        compared,
    })
}

/// Seconds of the fastest of some steps, and the best that the machine reached around them.
fn best_step<B: TrainBackend + Machine>(
    backend: &B,
    mut model: TrainModel<B::Flat>,
    batch: &PackedBatch,
    (o, dtype): (TrainBenchOptions, DType),
) -> Result<(f64, Peaks)> {
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(backend, &model.config.parameters(), options)?;
    let mut grads = backend.zeros(model.config.parameter_count())?;
    let (mut space, mut sums) = (Workspace::with_recompute(o.recompute), backend.new_sums()?);
    let mut gauge = Gauge::new(backend, dtype)?;
    let (mut best, mut peaks) = (f64::INFINITY, Peaks::default());
    // the first step allocates and is not counted
    for step in 0..=o.repeats.max(1) {
        let (seconds, reached) = gauge.around(|| {
            let started = Instant::now();
            backend.clear(&mut grads);
            backend.clear_sums(&mut sums);
            let out = Some((1.0 / batch.labels.len() as f32, Backward::to(&mut grads)));
            model.loss(backend, (o.precision, batch), &mut space, out, &mut sums);
            optimizer.squared_norm(backend, &grads, &mut sums);
            let size = StepSize { learning_rate: 1e-4, max_norm: 1.0 };
            optimizer.step(backend, (&mut model.values, &grads), size, &sums);
            backend.sums(&sums)?;
            Ok(started.elapsed().as_secs_f64())
        })?;
        peaks = peaks.best(reached);
        if step > 0 {
            best = best.min(seconds);
        }
    }
    Ok((best, peaks))
}
