//! A training step on random tokens: forward, backward, clipping, AdamW.

use super::machine;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::train::{Batch, TrainModel, Workspace};
use crate::ops::cpu::Cpu;
use crate::ops::cpu::matmul::Precision;
use crate::random::Words;
use crate::train::optimizer::{AdamW, AdamWOptions, clip_gradients};
use serde::Serialize;
use std::time::Instant;

#[derive(Clone, Copy, Debug)]
pub struct TrainBenchOptions {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub vocab: usize,
    pub sequences: usize,
    pub tokens: usize,
    pub precision: Precision,
    pub repeats: usize,
}

#[derive(Debug, Serialize)]
pub struct TrainReport {
    pub parameters: usize,
    pub precision: &'static str,
    pub isa: &'static str,
    pub threads: usize,
    pub processor: String,
    pub tokens_per_step: usize,
    pub peak_gigaflops: f64,
    /// Of the best step.
    pub tokens_per_second: f64,
    pub milliseconds: f64,
    /// Multiply-adds counted twice: three times those of the forward pass.
    pub flops: f64,
    pub floor_milliseconds: f64,
    pub fraction: f64,
}

pub fn run(cpu: &Cpu, o: TrainBenchOptions) -> TrainReport {
    let mut model = TrainModel::random(BloomConfig::new(o.vocab, o.hidden, o.layers, o.heads), 1);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(&model.config, options);
    let mut words = Words::new(1, 1);
    let mut batch = Batch::new();
    for _ in 0..o.sequences {
        let ids: Vec<u32> = (0..o.tokens).map(|_| words.below(o.vocab) as u32).collect();
        batch.push(&ids, 1);
    }
    let (mut grads, mut space) = (vec![0f32; model.values.len()], Workspace::default());
    let mut best = f64::INFINITY;
    // the first step allocates and is not counted
    for step in 0..=o.repeats.max(1) {
        let started = Instant::now();
        grads.fill(0.0);
        let out = Some((1.0 / batch.labels.len() as f32, &mut grads[..]));
        model.loss(cpu, o.precision, &batch, &mut space, out);
        clip_gradients(cpu, &mut grads, 1.0);
        optimizer.step(cpu, &mut model.values, &grads, 1e-4);
        if step > 0 {
            best = best.min(started.elapsed().as_secs_f64());
        }
    }
    let (peak, precision) = match o.precision {
        Precision::F32 => (machine::peak_f32(cpu), "f32"),
        Precision::Bf16 => (machine::peak_bf16(cpu), "bf16"),
    };
    let h = o.hidden as f64;
    let tokens = (o.sequences * o.tokens) as f64;
    let attention = 4.0 * tokens * (o.tokens as f64 + 1.0) / 2.0 * h * o.layers as f64;
    let products = 2.0 * tokens * o.layers as f64 * 12.0 * h * h + 2.0 * batch.labels.len() as f64 * o.vocab as f64 * h;
    let flops = 3.0 * (products + attention);
    TrainReport {
        parameters: model.values.len(),
        precision,
        isa: cpu.isa.name(),
        threads: cpu.threads.count(),
        processor: machine::processor(),
        tokens_per_step: batch.ids.len(),
        peak_gigaflops: peak / 1e9,
        tokens_per_second: tokens / best,
        milliseconds: best * 1e3,
        flops,
        floor_milliseconds: flops / peak * 1e3,
        fraction: flops / peak / best,
    }
}
