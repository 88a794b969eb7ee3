//! Prefill and decode of BLOOM, on random weights of any published shape.

use super::machine::{self, Machine};
use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, EngineOptions, Event, Request, Verdict};
use crate::error::{Error, Result};
use crate::models::bloom::{Bloom, BloomConfig};
use crate::ops::Backend;
use crate::ops::cuda::Comparison;
use crate::random::Words;
use crate::tensor::{Bytes, DType, Tensor};
use half::{bf16, f16};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

#[derive(Clone, Copy, Debug)]
pub struct LlmOptions {
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub batch: usize,
    pub repeats: usize,
}

/// One phase: what it took, and the least it could have taken.
#[derive(Debug, Serialize)]
pub struct Phase {
    pub tokens_per_second: f64,
    pub milliseconds: f64,
    /// Bytes read from and written to memory at least once, and multiply-adds counted twice.
    pub bytes: f64,
    pub flops: f64,
    /// The longer of bytes over bandwidth and FLOPs over peak.
    pub floor_milliseconds: f64,
    /// Floor over time.
    pub fraction: f64,
}

#[derive(Debug, Serialize)]
pub struct LlmReport {
    pub parameters: usize,
    pub weights: &'static str,
    /// Instruction set, or the GPU's architecture.
    pub isa: String,
    /// Threads, or the GPU's multiprocessors.
    pub threads: usize,
    pub processor: String,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub batch: usize,
    pub read_gigabytes_per_second: f64,
    pub peak_gigaflops: f64,
    /// All prompts at once; median of the repeats.
    pub prefill: Phase,
    /// One new token for every sequence; median of all steps.
    pub decode: Phase,
    pub peak_memory_bytes: Option<u64>,
    /// On a GPU, decoding steps of each shape as launches and as one kernel; the faster way was taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Comparison>,
}

/// A checkpoint of random weights in `dtype` (int8 is quantized from bf16 at load).
pub fn random_checkpoint(config: BloomConfig, dtype: DType) -> Result<Checkpoint> {
    let stored = if dtype == DType::Int8 { DType::Bf16 } else { dtype };
    // one block of noise serves all tensors: each takes a stretch of it
    let mut words = Words::new(1, 0);
    let noise: Vec<f32> = (0..1 << 18).map(|_| (words.uniform() - 0.5) * 0.07).collect();
    let bytes: Vec<u8> = match stored {
        DType::F32 => noise.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => noise.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => noise.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
    };
    let mut tensors = BTreeMap::new();
    for (i, p) in config.parameters().into_iter().enumerate() {
        let len = p.len() * stored.size();
        let filled = Bytes::resident(len, |mut data| {
            let mut at = (i * 4099 * stored.size()) % bytes.len();
            while !data.is_empty() {
                let n = (bytes.len() - at).min(data.len());
                data[..n].copy_from_slice(&bytes[at..at + n]);
                data = &mut data[n..];
                at = 0;
            }
        });
        let bytes = filled.map_err(Error::io("memory", "reserve"))?;
        tensors.insert(p.name, Tensor { dtype: stored, shape: p.shape, bytes });
    }
    Ok(Checkpoint { config, tensors, path: "random weights".into(), files: vec![] })
}

/// Measures `model`.
pub fn run<B: Backend + Machine>(backend: &B, model: &Bloom<B>, options: LlmOptions) -> Result<LlmReport> {
    let o = options;
    let config = &model.config;
    let dtype = backend.stored(model.head());
    let peak = backend.peak(dtype)?;
    let mut prefill_times = Vec::new();
    let mut decode_times = Vec::new();
    for repeat in 0..o.repeats.max(1) {
        let engine = EngineOptions {
            cache_tokens: o.batch * (o.prompt_tokens + o.new_tokens + 16),
            batch_tokens: o.batch * o.prompt_tokens,
            sequences: o.batch,
            ..EngineOptions::default()
        };
        let mut engine = Engine::new(backend, model, engine)?;
        let mut words = Words::new(7, repeat as u64);
        let mut ids = 0..;
        // a token of every sequence; a step may begin the next one before it tells the last one's
        let tokens = |engine: &mut Engine<B>| -> Result<f64> {
            let started = Instant::now();
            let mut heard = 0;
            while heard < o.batch {
                engine.step(&mut |event| {
                    heard += usize::from(matches!(event, Event::Token { .. }));
                    Verdict::Go
                })?;
            }
            Ok(started.elapsed().as_secs_f64())
        };
        let mut submit = |engine: &mut Engine<B>, max_new: usize| -> Result<()> {
            ids.by_ref().take(o.batch).try_for_each(|id| {
                let prompt = (0..o.prompt_tokens).map(|_| words.below(config.vocab_size) as u32).collect();
                let request = Request::new(id, prompt, max_new, config.eos_token_id);
                engine.submit(Request { ignore_eos: true, ..request })
            })
        };
        submit(&mut engine, 1)?;
        prefill_times.push(tokens(&mut engine)?);
        submit(&mut engine, o.new_tokens + 1)?;
        tokens(&mut engine)?;
        for _ in 0..o.new_tokens {
            decode_times.push(tokens(&mut engine)?);
        }
    }
    // before the buffers of the next measurement
    let peak_memory_bytes = machine::peak_memory();
    let bandwidth = backend.bandwidth()?;
    let (processor, isa) = backend.describe();
    let counted = Counted::new(model, dtype);
    let phase = |times: &mut Vec<f64>, tokens: usize, bytes: f64, flops: f64| {
        times.sort_by(f64::total_cmp);
        let seconds = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
        let floor = (bytes / bandwidth).max(flops / peak);
        Phase {
            tokens_per_second: tokens as f64 / seconds,
            milliseconds: seconds * 1e3,
            bytes,
            flops,
            floor_milliseconds: floor * 1e3,
            fraction: floor / seconds,
        }
    };
    let tokens = o.batch * o.prompt_tokens;
    let (bytes, flops) = counted.pass(tokens, 0, o.prompt_tokens, o.batch);
    let prefill = phase(&mut prefill_times, tokens, bytes, flops);
    let (bytes, flops) = counted.pass(o.batch, o.prompt_tokens + o.new_tokens / 2, 1, o.batch);
    let decode = phase(&mut decode_times, o.batch, bytes, flops);
    Ok(LlmReport {
        parameters: config.parameter_count(),
        weights: dtype.name(),
        isa,
        threads: backend.threads(),
        processor,
        prompt_tokens: o.prompt_tokens,
        new_tokens: o.new_tokens,
        batch: o.batch,
        read_gigabytes_per_second: bandwidth / 1e9,
        peak_gigaflops: peak / 1e9,
        prefill,
        decode,
        peak_memory_bytes,
        steps: backend.comparisons(),
    })
}

/// Bytes and FLOPs of a forward pass.
struct Counted {
    layer_weights: f64,
    head_weights: f64,
    element: f64,
    hidden: f64,
    layers: f64,
    kv: f64,
}

impl Counted {
    fn new<B: Backend>(model: &Bloom<B>, dtype: DType) -> Counted {
        let c = &model.config;
        let h = c.hidden_size as f64;
        Counted {
            layer_weights: c.layers as f64 * 12.0 * h * h,
            head_weights: c.vocab_size as f64 * h,
            element: dtype.size() as f64,
            hidden: h,
            layers: c.layers as f64,
            kv: model.cache_bytes_per_token() as f64,
        }
    }

    /// `tokens` in spans of `span` tokens after `past` positions, of which `rows` get logits.
    fn pass(&self, tokens: usize, past: usize, span: usize, rows: usize) -> (f64, f64) {
        let (tokens, past, span, rows) = (tokens as f64, past as f64, span as f64, rows as f64);
        let bytes = (self.layer_weights + self.head_weights) * self.element + tokens / span * (past + span) * self.kv;
        // each query meets its past and, on average, half of its span
        let attention = 4.0 * tokens * (past + (span + 1.0) / 2.0) * self.hidden * self.layers;
        (bytes, 2.0 * self.layer_weights * tokens + 2.0 * self.head_weights * rows + attention)
    }
}
