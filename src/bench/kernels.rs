//! The operations of a layer and of the LM head, one by one, each compared with its floor.
//!
//! Random weights of a published shape; its layers take turns, so that weights come from memory and
//! not from a cache.

use super::floor::{Compared, Gauge, MinimumWork, Peaks};
use super::llm::random_checkpoint;
use super::machine::{Machine, probe_bytes};
use crate::engine::{Sampling, SamplingRow};
use crate::error::Result;
use crate::memory::MemoryPlan;
use crate::models::bloom::{Bloom, BloomConfig};
use crate::ops::{BLOCK, Batch, DecodeBackend, Epilogue, LayerNorm, Linear, NormInput, Tensor};
use crate::random::PhiloxStream;
use crate::tensor::{DType, HostTensor};
use serde::Serialize;
use std::cell::RefCell;

/// What to measure.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Sequences of decoding steps, each with `context` positions.
    pub batches: Vec<usize>,
    /// Positions of each sequence at a decoding step, its new token included.
    pub context: usize,
    /// Sequences and tokens of prompts.
    pub prefills: Vec<(usize, usize)>,
    /// Rows and columns of square matrices to multiply.
    pub squares: Vec<usize>,
    /// Calls that are timed together.
    pub calls: usize,
}

/// One operation on one kind of batch.
#[derive(Debug, Serialize)]
pub struct KernelRow {
    /// The operation's name.
    pub operation: &'static str,
    /// Sequences of the batch.
    pub sequences: usize,
    /// New tokens of each sequence.
    pub tokens: usize,
    /// Positions that a sequence's last new token sees, its own included.
    pub positions: usize,
    /// Time of one call.
    pub microseconds: f64,
    /// Bytes that one call reads from and writes to memory at least once.
    pub bytes: f64,
    /// Floating-point operations of one call: multiply-adds are counted twice.
    pub flops: f64,
    /// Bytes over time, over 1e9.
    pub gigabytes_per_second: f64,
    /// FLOPs over time, over 1e12.
    pub teraflops: f64,
    /// Minimum time of one call.
    pub floor_microseconds: f64,
    /// The time compared with its floor.
    #[serde(flatten)]
    pub compared: Compared,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
pub struct KernelReport {
    /// Type of the weights.
    pub weights: &'static str,
    /// Name of the processor or GPU.
    pub processor: String,
    /// Instruction set, or the GPU's architecture.
    pub isa: String,
    /// The best that was measured in the whole run; each row has what was reached right before and
    /// after it.
    #[serde(flatten)]
    pub best: Peaks,
    /// Bytes that the last cache before memory holds, where that is known.
    pub last_cache_bytes: Option<usize>,
    /// One row for each operation and kind of batch.
    pub rows: Vec<KernelRow>,
}

struct Bench<'a, B: DecodeBackend + Machine> {
    backend: &'a B,
    model: Bloom<B>,
    /// Bytes of a weight and of an element of the KV cache.
    weight: f64,
    cached: f64,
    timer: Timer<'a, B>,
}

/// Work whose calls all go through the same bytes.
fn whole(bytes: f64, flops: f64) -> MinimumWork {
    MinimumWork { bytes, flops, working_set: bytes }
}

/// One kind of batch.
#[derive(Clone, Copy)]
pub(super) struct Case {
    pub sequences: usize,
    pub tokens: usize,
    pub positions: usize,
}

impl Case {
    /// Random tokens at the end of each sequence's positions.
    fn batch(&self, vocabulary: usize) -> Batch {
        let blocks = self.positions.div_ceil(BLOCK);
        let mut words = PhiloxStream::new(3, self.all() as u64);
        let mut batch = Batch::default();
        for s in 0..self.sequences {
            let ids: Vec<u32> = (0..self.tokens).map(|_| words.below(vocabulary) as u32).collect();
            let table: Vec<u32> = (0..blocks).map(|b| (s * blocks + b) as u32).collect();
            batch.push(&ids, self.positions - self.tokens, &table);
        }
        batch
    }

    fn all(&self) -> usize {
        self.sequences * self.tokens
    }
}

/// What measuring takes besides the weights: the largest batch, or the largest square.
pub fn plan(config: &BloomConfig, dtype: DType, o: &KernelOptions) -> MemoryPlan {
    let cached = if dtype == DType::Int8 { 2 } else { dtype.size() };
    let (h, element) = (config.hidden_size as f64, dtype.size() as f64);
    let batch = |sequences: usize, tokens: usize, positions: usize, flags: &'static str| {
        let positions = sequences as f64 * positions.next_multiple_of(BLOCK) as f64;
        let all = sequences as f64 * tokens as f64;
        MemoryPlan::new()
            .with("KV cache", positions * config.kv_bytes_per_token(cached) as f64, flags)
            .with("activations", all * 4.0 * 15.0 * h, flags)
            .with("logits", sequences as f64 * 4.0 * config.vocab_size as f64, flags)
    };
    let decodes = o.batches.iter().map(|&b| batch(b, 1, o.context, "--batch or --context"));
    let prefills = o.prefills.iter().map(|&(b, t)| batch(b, t, t, "--prefill"));
    let squares = o.squares.iter().map(|&n| {
        // noise twice, two matrices, and f32 rows, inputs and results
        MemoryPlan::new().with(
            "squares",
            n as f64 * n as f64 * (8.0 + 2.0 * element + 16.0),
            "--squares",
        )
    });
    let all = decodes.chain(prefills).chain(squares);
    let largest = all.max_by(|a, b| a.bytes().total_cmp(&b.bytes())).unwrap_or_default();
    largest.with(
        "a buffer to measure the bandwidth",
        probe_bytes() as f64,
        "nothing: more memory is needed",
    )
}

/// Measures all operations in `dtype`.
pub fn run<B: DecodeBackend + Machine>(
    backend: &B,
    config: BloomConfig,
    dtype: DType,
    options: &KernelOptions,
) -> Result<KernelReport> {
    backend.fits(&plan(&config, dtype, options))?;
    let cache_dtype = if dtype == DType::Int8 { DType::Bf16 } else { dtype };
    let bench = Bench {
        backend,
        model: Bloom::load(backend, random_checkpoint(config, dtype)?, Some(dtype))?,
        weight: dtype.size() as f64,
        cached: cache_dtype.size() as f64,
        timer: Timer::new(backend, dtype, options.calls)?,
    };
    for &sequences in &options.batches {
        bench.case(Case { sequences, tokens: 1, positions: options.context })?;
    }
    for &(sequences, tokens) in &options.prefills {
        bench.case(Case { sequences, tokens, positions: tokens })?;
    }
    for &n in &options.squares {
        bench.square(n, dtype)?;
    }
    Ok(bench.timer.report(dtype))
}

impl<B: DecodeBackend + Machine> Bench<'_, B> {
    /// All operations on one kind of batch.
    fn case(&self, case: Case) -> Result<()> {
        let (config, layers) = (&self.model.config, &self.model.decoder().layers);
        let batch = case.batch(config.vocab_size);
        let blocks = case.sequences * case.positions.div_ceil(BLOCK);
        let mut cache = self.model.cache(self.backend, blocks)?;
        let b = self.backend;
        let (h, n) = (config.hidden_size as f64, case.all() as f64);
        let mut on_device = B::DeviceBatch::default();
        b.upload_batch(&batch, &mut on_device);
        let (mut x, mut normed, mut queries, mut attended, mut x2, mut wide) = Default::default();
        // queries see the positions before their own span, and on average half of that
        let seen = (case.positions - case.tokens) as f64 + (case.tokens as f64 + 1.0) / 2.0;
        let kv = 2.0 * case.sequences as f64 * case.positions as f64 * h * self.cached;
        let count = layers.len() as f64;
        let gemm = |weight: f64, outputs: f64, inputs: f64| {
            let bytes = outputs * inputs * weight + 2.0 * n * (outputs + inputs);
            MinimumWork {
                bytes,
                flops: 2.0 * n * outputs * inputs,
                working_set: count * outputs * inputs * weight,
            }
        };
        let w = self.weight;
        let layer = |i: usize| &layers[i % layers.len()];
        let norm = |i: usize| &layer(i).input_norm;
        // The whole cache is written first: the system gives it memory at the first touch, and
        // until then all its addresses read one page of zeros, from L1.
        b.embedding_norm(&mut x, &on_device, self.model.lm_head(), norm(0));
        for i in 0..layers.len() {
            let input = NormInput { x: &x, norm: norm(i), normed: &mut normed };
            let cache = (&mut cache, i);
            b.layer_norm_qkv_to_cache(&mut queries, input, &layer(i).qkv, &on_device, cache);
        }
        (1..blocks as u32).for_each(|block| b.copy_block(&mut cache, 0, block));
        self.timer.time("embedding + norm", case, whole(n * h * (w + 4.0), 0.0), &mut |i| {
            b.embedding_norm(&mut x, &on_device, self.model.lm_head(), norm(i));
            Ok(())
        })?;
        self.timer.time("norm + QKV into cache", case, gemm(w, 3.0 * h, h), &mut |i| {
            let input = NormInput { x: &x, norm: norm(i), normed: &mut normed };
            let cache = (&mut cache, i % layers.len());
            b.layer_norm_qkv_to_cache(&mut queries, input, &layer(i).qkv, &on_device, cache);
            Ok(())
        })?;
        let read = MinimumWork {
            bytes: kv + 4.0 * n * h,
            flops: 4.0 * n * seen * h,
            working_set: count * kv,
        };
        self.timer.time("attention", case, read, &mut |i| {
            b.paged_attention(&mut attended, &queries, &on_device, (&cache, i % layers.len()));
            Ok(())
        })?;
        self.timer.time("dense + residual", case, gemm(w, h, h), &mut |i| {
            b.linear(&mut x2, &attended, &layer(i).dense, Epilogue::BiasResidual(&x));
            Ok(())
        })?;
        self.timer.time("norm + up + GELU", case, gemm(w, 4.0 * h, h), &mut |i| {
            let input = NormInput { x: &x2, norm: norm(i), normed: &mut normed };
            b.layer_norm_linear(&mut wide, input, &layer(i).up, Epilogue::BiasGelu);
            Ok(())
        })?;
        self.timer.time("down + residual", case, gemm(w, h, 4.0 * h), &mut |i| {
            b.linear(&mut x, &wide, &layer(i).down, Epilogue::BiasResidual(&x2));
            Ok(())
        })?;
        self.lm_head_case(case, &batch, &x)
    }

    /// The LM head and the kinds of sampling from it.
    fn lm_head_case(&self, case: Case, batch: &Batch, x: &Tensor<B>) -> Result<()> {
        let (b, config, w) = (self.backend, &self.model.config, self.weight);
        let h = config.hidden_size as f64;
        // the LM head sees each sequence's last token
        let rows: Vec<usize> = batch.spans.iter().map(|s| s.start + s.len - 1).collect();
        let mut normed = Tensor::default();
        b.layer_norm_rows(&mut normed, x, &rows, &self.model.decoder().layers[0].input_norm);
        let (vocabulary, r) = (config.vocab_size as f64, rows.len() as f64);
        let counted = whole(vocabulary * h * w, 2.0 * r * vocabulary * h);
        let plain = Sampling { temperature: 1.0, seed: 5, ..Sampling::default() };
        let kinds = [
            ("LM head + greedy", Sampling::default()),
            ("LM head + sampling", plain),
            ("LM head + top-k 50, top-p 0.95", Sampling { top_k: 50, top_p: 0.95, ..plain }),
        ];
        let mut scratch = Vec::new();
        for (name, sampling) in kinds {
            let choices: Vec<SamplingRow> = (0..rows.len())
                .map(|row| SamplingRow::new(row, &sampling, row as u32, 1))
                .collect();
            let choices: Vec<(usize, &SamplingRow)> = choices.iter().enumerate().collect();
            self.timer.time(name, case, counted, &mut |_| {
                b.sample(&normed, self.model.lm_head(), &choices, &mut scratch).map(drop)
            })?;
        }
        Ok(())
    }

    /// A GEMM of square matrices, of which two take turns; its inputs are the normalized rows of
    /// one.
    fn square(&self, n: usize, dtype: DType) -> Result<()> {
        let b = self.backend;
        let mut words = PhiloxStream::new(4, n as u64);
        let mut matrix = || {
            let noise: Vec<f32> = (0..n * n).map(|_| words.uniform() - 0.5).collect();
            b.weight(HostTensor::of_rows(&noise, n), Some(dtype))
        };
        let vector = |value: f32| b.vector(&HostTensor::of_rows(&vec![value; n], n));
        let linears = [
            Linear { weight: matrix()?, bias: vector(0.0)? },
            Linear { weight: matrix()?, bias: vector(0.0)? },
        ];
        let norm = LayerNorm { weight: vector(1.0)?, bias: vector(0.0)?, eps: 1e-5 };
        let mut batch = Batch::default();
        let blocks: Vec<u32> = (0..n.div_ceil(BLOCK) as u32).collect();
        batch.push(&(0..n as u32).collect::<Vec<u32>>(), 0, &blocks);
        let (mut on_device, mut rows, mut x, mut out) = Default::default();
        b.upload_batch(&batch, &mut on_device);
        b.embedding_norm(&mut rows, &on_device, &linears[0].weight, &norm);
        b.layer_norm(&mut x, &rows, &norm);
        let size = n as f64;
        // 16 bits out, as libraries have it
        let counted = whole(size * size * (self.weight + 2.0 + 2.0), 2.0 * size * size * size);
        self.timer.time(
            "square GEMM",
            Case { sequences: 1, tokens: n, positions: n },
            counted,
            &mut |i| {
                b.linear(&mut out, &x, &linears[i % 2], Epilogue::BiasHalf);
                Ok(())
            },
        )
    }
}

/// Times operations, and measures the machine around each.
pub(super) struct Timer<'a, M: Machine> {
    machine: &'a M,
    gauge: RefCell<Gauge<'a, M>>,
    calls: usize,
    rows: RefCell<Vec<KernelRow>>,
}

impl<'a, M: Machine> Timer<'a, M> {
    /// For weights held in `dtype`, with so many calls of each operation.
    pub fn new(machine: &'a M, dtype: DType, calls: usize) -> Result<Timer<'a, M>> {
        let gauge = RefCell::new(Gauge::new(machine, dtype)?);
        Ok(Timer { machine, gauge, calls: calls.max(1), rows: RefCell::default() })
    }

    /// What was timed, with weights held in `dtype`.
    pub fn report(self, dtype: DType) -> KernelReport {
        let (processor, isa) = self.machine.describe();
        KernelReport {
            weights: dtype.name(),
            processor,
            isa,
            best: self.gauge.borrow().best,
            last_cache_bytes: self.machine.last_cache(),
            rows: self.rows.into_inner(),
        }
    }

    /// Adds a row of an operation: `work` is one call of it, and `minimum` what that has to do.
    pub fn time(
        &self,
        operation: &'static str,
        case: Case,
        minimum: MinimumWork,
        work: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let mut gauge = self.gauge.borrow_mut();
        let (seconds, peaks) = gauge.around(|| self.machine.time(self.calls, work))?;
        let compared = Compared::new(seconds, minimum, peaks, self.machine.last_cache());
        let MinimumWork { bytes, flops, .. } = minimum;
        self.rows.borrow_mut().push(KernelRow {
            operation,
            sequences: case.sequences,
            tokens: case.tokens,
            positions: case.positions,
            microseconds: seconds * 1e6,
            bytes,
            flops,
            gigabytes_per_second: bytes / seconds / 1e9,
            teraflops: flops / seconds / 1e12,
            floor_microseconds: compared.floor * 1e6,
            compared,
        });
        Ok(())
    }
}
