//! A training step on random tokens: forward, backward, clipping, AdamW.

use super::floor::{Compared, Gauge, MinimumWork, Peaks};
use super::machine;
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::{TrainModel, Workspace, training_bytes_per_token};
use crate::ops::cpu::Cpu;
use crate::ops::train::{PackedBatch, Precision, TrainBackend};
use crate::random::PhiloxStream;
use crate::tensor::DType;
use crate::train::optimizer::{AdamW, AdamWOptions};
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
    /// Instruction set.
    pub isa: &'static str,
    /// Threads that computed.
    pub threads: usize,
    /// Name of the processor.
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

/// What the steps take.
fn plan(config: &BloomConfig, o: &TrainBenchOptions) -> MemoryPlan {
    let tokens = o.sequences as f64 * o.tokens as f64;
    let per_token = training_bytes_per_token(config) + 4.0 * 6.0;
    MemoryPlan::new()
        .with(
            "weights, gradients and AdamW's moments",
            16.0 * config.parameter_count() as f64,
            "--hidden, --layers or --vocab",
        )
        .with("activations", tokens * per_token, "--batch or --tokens")
        .with(
            "a buffer to measure the bandwidth",
            machine::probe_bytes() as f64,
            "nothing: more memory is needed",
        )
}

/// Measures training steps on the CPU.
///
/// # Errors
///
/// Fails if the machine does not have the memory that the steps take.
pub fn run(cpu: &Cpu, o: TrainBenchOptions) -> Result<TrainReport> {
    let config = BloomConfig::new(o.vocab, o.hidden, o.layers, o.heads);
    plan(&config, &o).check()?;
    let mut model = TrainModel::random(config, 1);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(cpu, &model.config.parameters(), options)?;
    let mut words = PhiloxStream::new(1, 1);
    let mut batch = PackedBatch::default();
    for _ in 0..o.sequences {
        let ids: Vec<u32> = (0..o.tokens).map(|_| words.below(o.vocab) as u32).collect();
        batch.push(&ids, 1);
    }
    let (mut grads, mut space) = (cpu.zeros(model.values.len())?, Workspace::default());
    let mut sums = cpu.new_sums()?;
    let (dtype, precision) = match o.precision {
        Precision::F32 => (DType::F32, "f32"),
        Precision::Bf16 => (DType::Bf16, "bf16"),
    };
    let mut gauge = Gauge::new(cpu, dtype)?;
    let (mut best, mut peaks) = (f64::INFINITY, Peaks::default());
    // the first step allocates and is not counted
    for step in 0..=o.repeats.max(1) {
        let (seconds, reached) = gauge.around(|| {
            let started = Instant::now();
            cpu.clear(&mut grads);
            cpu.clear_sums(&mut sums);
            let out = Some((1.0 / batch.labels.len() as f32, &mut grads));
            model.loss(cpu, (o.precision, &batch), &mut space, out, &mut sums);
            cpu.clip_gradients(&mut grads, 1.0, &mut sums);
            optimizer.step(cpu, (&mut model.values, &grads), 1e-4, &sums);
            Ok(started.elapsed().as_secs_f64())
        })?;
        peaks = peaks.best(reached);
        if step > 0 {
            best = best.min(seconds);
        }
    }
    let h = o.hidden as f64;
    let tokens = (o.sequences * o.tokens) as f64;
    let attention = 4.0 * tokens * (o.tokens as f64 + 1.0) / 2.0 * h * o.layers as f64;
    let gemms = 2.0 * tokens * o.layers as f64 * 12.0 * h * h
        + 2.0 * batch.labels.len() as f64 * o.vocab as f64 * h;
    let flops = 3.0 * (gemms + attention);
    let compared =
        Compared::new(best, MinimumWork { bytes: 0.0, flops, working_set: 0.0 }, peaks, None);
    Ok(TrainReport {
        parameters: model.values.len(),
        precision,
        isa: cpu.isa().name(),
        threads: cpu.threads().count(),
        processor: machine::processor(),
        tokens_per_step: batch.ids.len(),
        tokens_per_second: tokens / best,
        milliseconds: best * 1e3,
        flops,
        floor_milliseconds: compared.floor * 1e3,
        compared,
    })
}
