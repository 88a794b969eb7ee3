//! Prefill and decode of BLOOM, on random weights of any published shape.

use super::floor::{Compared, Gauge, MinimumWork, Peaks};
use super::machine::{self, Machine};
use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, EngineOptions, Event, Request, Verdict};
use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::models::bloom::{Bloom, BloomCheckpoint, BloomConfig};
use crate::ops::cuda::Comparison;
use crate::ops::{DecodeBackend, Weight as _};
use crate::random::PhiloxStream;
use crate::tensor::{Bytes, DType, HostTensor};
use half::{bf16, f16};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct LlmOptions {
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Decoding steps that each repeat measures.
    pub new_tokens: usize,
    /// Sequences that go on together.
    pub batch: usize,
    /// How often prefill and decode are measured; 0 counts as 1.
    pub repeats: usize,
}

/// One phase: what it took, and the minimum it could have taken.
#[derive(Debug, Serialize)]
pub struct Phase {
    /// Tokens of all sequences, over the median time.
    pub tokens_per_second: f64,
    /// Median time of a forward pass.
    pub milliseconds: f64,
    /// Bytes that a forward pass reads from and writes to memory at least once.
    pub bytes: f64,
    /// Floating-point operations of a forward pass: multiply-adds are counted twice.
    pub flops: f64,
    /// Minimum time of a forward pass.
    pub floor_milliseconds: f64,
    /// The time compared with its floor.
    #[serde(flatten)]
    pub compared: Compared,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
pub struct LlmReport {
    /// Number of the model's parameters.
    pub parameters: usize,
    /// Type of the weights.
    pub weights: &'static str,
    /// Instruction set, or the GPU's architecture.
    pub isa: String,
    /// Threads, or the GPU's multiprocessors.
    pub threads: usize,
    /// Name of the processor or GPU.
    pub processor: String,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Decoding steps that each repeat measured.
    pub new_tokens: usize,
    /// Sequences that went on together.
    pub batch: usize,
    /// The best that was measured in the whole run; each phase has what was reached right before
    /// and after it.
    #[serde(flatten)]
    pub best: Peaks,
    /// Bytes that the last cache before memory holds, where that is known.
    pub last_cache_bytes: Option<usize>,
    /// All prompts at once; median of the repeats.
    pub prefill: Phase,
    /// One new token for every sequence; median of all steps.
    pub decode: Phase,
    /// The maximum memory that this process has held, in bytes, less what measuring the bandwidth
    /// took; none where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// On a GPU, decoding steps of each shape as launches and as one kernel; the faster way was
    /// taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Comparison>,
}

/// A checkpoint of random weights in `dtype` (int8 is quantized from bf16 at load).
pub fn random_checkpoint(config: BloomConfig, dtype: DType) -> Result<BloomCheckpoint> {
    let stored = if dtype == DType::Int8 { DType::Bf16 } else { dtype };
    let bytes = (config.parameter_count() * stored.size()) as f64;
    MemoryPlan::new()
        .with("weights", bytes, "--dtype to bf16, or take a smaller --shape")
        .check()?;
    // one block of noise serves all tensors: each takes a stretch of it
    let mut words = PhiloxStream::new(1, 0);
    let noise: Vec<f32> = (0..1 << 18).map(|_| (words.uniform() - 0.5) * 0.07).collect();
    let bytes: Vec<u8> = match stored {
        DType::F32 => noise.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => noise.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => noise.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
    };
    let mut tensors = BTreeMap::new();
    for (i, p) in config.parameters().into_iter().enumerate() {
        let len = p.len() * stored.size();
        let filled = Bytes::in_huge_pages(len, |mut data| {
            let mut at = (i * 4099 * stored.size()) % bytes.len();
            while !data.is_empty() {
                let n = (bytes.len() - at).min(data.len());
                data[..n].copy_from_slice(&bytes[at..at + n]);
                data = &mut data[n..];
                at = 0;
            }
        });
        let bytes = filled.map_err(Error::io("memory", "reserve"))?;
        tensors.insert(p.name, HostTensor { dtype: stored, shape: p.shape, bytes });
    }
    let weights = Checkpoint { tensors, path: "random weights".into(), files: vec![] };
    BloomCheckpoint::new(config, weights)
}

/// What measuring a model takes besides its weights.
pub fn plan<B: DecodeBackend>(model: &Bloom<B>, o: &LlmOptions) -> MemoryPlan {
    let flags = "--batch or --prompt-tokens";
    let engine = crate::engine::memory_plan(model, &o.engine());
    // ids of prompts, in requests and in sequences
    let ids = 32.0 * o.batch as f64 * (o.prompt_tokens + o.new_tokens) as f64;
    MemoryPlan::new()
        .with("KV cache and activations", engine.bytes(), flags)
        .with("prompts", ids, flags)
        .with(
            "a buffer to measure the bandwidth",
            machine::probe_bytes() as f64,
            "nothing: more memory is needed",
        )
}

impl LlmOptions {
    fn engine(&self) -> EngineOptions {
        EngineOptions {
            cache_tokens: self.batch * (self.prompt_tokens + self.new_tokens + 16),
            batch_tokens: self.batch * self.prompt_tokens,
            sequences: self.batch,
            ..EngineOptions::default()
        }
    }
}

/// A model's sequences, all of which go on together.
struct Runner<'a, B: DecodeBackend> {
    engine: Engine<'a, B>,
    model: &'a Bloom<B>,
    o: LlmOptions,
    words: PhiloxStream,
    next_id: u64,
}

impl<B: DecodeBackend> Runner<'_, B> {
    /// Random prompts, one for each sequence.
    fn submit(&mut self, max_new: usize) -> Result<()> {
        let config = &self.model.config;
        for _ in 0..self.o.batch {
            let prompt = (0..self.o.prompt_tokens)
                .map(|_| self.words.below(config.vocab_size) as u32)
                .collect();
            let request = Request::new(self.next_id, prompt, max_new, config.eos_token_id);
            self.next_id += 1;
            self.engine.submit(Request { ignore_eos: true, ..request })?;
        }
        Ok(())
    }

    /// Seconds for a token of every sequence; a step may begin the next one before it tells the
    /// last one's.
    fn tokens(&mut self) -> Result<f64> {
        let started = Instant::now();
        let mut heard = 0;
        while heard < self.o.batch {
            self.engine.step(&mut |event| {
                heard += usize::from(matches!(event, Event::Token { .. }));
                Verdict::Go
            })?;
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

impl Phase {
    /// A phase of passes of so many tokens that took these times.
    fn new(
        times: &mut [f64],
        tokens: usize,
        work: MinimumWork,
        peaks: Peaks,
        cache: Option<usize>,
    ) -> Phase {
        times.sort_by(f64::total_cmp);
        let seconds = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
        let compared = Compared::new(seconds, work, peaks, cache);
        Phase {
            tokens_per_second: tokens as f64 / seconds,
            milliseconds: seconds * 1e3,
            bytes: work.bytes,
            flops: work.flops,
            floor_milliseconds: compared.floor * 1e3,
            compared,
        }
    }
}

/// Measures `model`.
pub fn run<B: DecodeBackend + Machine>(
    backend: &B,
    model: &Bloom<B>,
    options: LlmOptions,
) -> Result<LlmReport> {
    let o = options;
    let config = &model.config;
    if o.prompt_tokens + o.new_tokens + 1 > config.context {
        return Err(Error::invalid(format!(
            "--prompt-tokens {} and --new-tokens {} are more than the model's context of {}",
            o.prompt_tokens, o.new_tokens, config.context
        )));
    }
    backend.fits(&plan(model, &o))?;
    let dtype = model.lm_head().dtype();
    let before_probe = machine::peak_memory();
    let mut gauge = Gauge::new(backend, dtype)?;
    let (mut prefill_times, mut prefill_peaks) = (Vec::new(), Peaks::default());
    let (mut decode_times, mut decode_peaks) = (Vec::new(), Peaks::default());
    for repeat in 0..o.repeats.max(1) {
        let engine = Engine::new(backend, model, o.engine())?;
        let mut runner =
            Runner { engine, model, o, words: PhiloxStream::new(7, repeat as u64), next_id: 0 };
        runner.submit(1)?;
        let (seconds, peaks) = gauge.around(|| runner.tokens())?;
        prefill_times.push(seconds);
        prefill_peaks = prefill_peaks.best(peaks);
        runner.submit(o.new_tokens + 1)?;
        runner.tokens()?;
        let decode = || (0..o.new_tokens).map(|_| runner.tokens()).collect::<Result<Vec<f64>>>();
        let (seconds, peaks) = gauge.around(decode)?;
        decode_times.extend(seconds);
        decode_peaks = decode_peaks.best(peaks);
    }
    // the probe was there all the time that came after it
    let without = |all: u64| all.saturating_sub(gauge.probe_bytes());
    let peak_memory_bytes =
        machine::peak_memory().map(|all| without(all).max(before_probe.unwrap_or(0)));
    let (processor, isa) = backend.describe();
    let counted = Counted::new(model, dtype);
    let cache = backend.last_cache();
    let phase = |times: &mut Vec<f64>, tokens: usize, (bytes, flops): (f64, f64), peaks: Peaks| {
        // every pass goes through all weights and all of the cache
        Phase::new(times, tokens, MinimumWork { bytes, flops, working_set: bytes }, peaks, cache)
    };
    let tokens = o.batch * o.prompt_tokens;
    let prefill = phase(
        &mut prefill_times,
        tokens,
        counted.pass(tokens, 0, o.prompt_tokens, o.batch),
        prefill_peaks,
    );
    let past = o.prompt_tokens + o.new_tokens / 2;
    let decode =
        phase(&mut decode_times, o.batch, counted.pass(o.batch, past, 1, o.batch), decode_peaks);
    Ok(LlmReport {
        parameters: config.parameter_count(),
        weights: dtype.name(),
        isa,
        threads: backend.threads(),
        processor,
        prompt_tokens: o.prompt_tokens,
        new_tokens: o.new_tokens,
        batch: o.batch,
        best: gauge.best,
        last_cache_bytes: cache,
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
    fn new<B: DecodeBackend>(model: &Bloom<B>, dtype: DType) -> Counted {
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
        let bytes = (self.layer_weights + self.head_weights) * self.element
            + tokens / span * (past + span) * self.kv;
        // each query meets its past and, on average, half of its span
        let attention = 4.0 * tokens * (past + (span + 1.0) / 2.0) * self.hidden * self.layers;
        (bytes, 2.0 * self.layer_weights * tokens + 2.0 * self.head_weights * rows + attention)
    }
}
