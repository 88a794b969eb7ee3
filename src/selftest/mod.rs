//! Every CUDA kernel against the CPU backend, on a GPU or in the emulator.
//!
//! Both backends get the same numbers, already rounded to the kernels' 16-bit type, so that what is
//! left is the order of sums, and the rounding of what a kernel stores in 16 bits itself.

mod train;

pub use train::TrainShapes;

use crate::device::Launcher;
use crate::error::Result;
use crate::models::bloom::alibi_slopes;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::simd::Isa;
use crate::ops::cuda::{Cuda, LinearInput, Persistent};
use crate::ops::sampling::{SampledToken, Sampling, SamplingRow};
use crate::ops::{
    BLOCK, Backend, Batch, DecodeBackend, Decoder, DecoderActivations, DecoderLayer, Epilogue,
    Heads, LayerNorm, Linear, NormInput, Tensor,
};
use crate::random::PhiloxStream;
use crate::tensor::{DType, HostTensor};
use half::{bf16, f16};
use std::rc::Rc;

const EPS: f32 = 1e-5;

/// What is tried; by default nothing.
#[derive(Clone, Debug, Default)]
pub struct Shapes {
    /// Heads and head sizes of attention.
    pub heads: Vec<(usize, usize)>,
    /// Heads and head sizes of whole decoding steps.
    pub steps: Vec<(usize, usize)>,
    /// `(outputs, inputs)` of GEMMs.
    pub matrices: Vec<(usize, usize)>,
    /// The same with rows so long that they are brought by another kernel where tokens are few.
    pub long_matrices: Vec<(usize, usize)>,
    /// Tokens of a GEMM.
    pub tokens: Vec<usize>,
    /// `(positions in the cache, new tokens)` of the spans of attention batches.
    pub batches: Vec<Vec<(usize, usize)>>,
    /// Sizes of the vocabularies to sample from.
    pub vocabularies: Vec<usize>,
    /// Of training.
    pub train: TrainShapes,
    /// Begins the random numbers.
    pub seed: u64,
}

impl Shapes {
    /// The edges, small enough for the emulator.
    pub fn small(seed: u64) -> Shapes {
        Shapes {
            heads: vec![(1, 64), (3, 32), (2, 80), (2, 96), (1, 128)],
            steps: vec![(2, 32), (1, 64), (1, 80), (1, 96), (1, 128)],
            matrices: vec![(16, 16), (48, 64), (150, 208), (7, 288)],
            long_matrices: vec![(20, 3216)],
            tokens: vec![1, 3, 16, 17, 40, 67, 130],
            batches: vec![
                vec![(0, 1)],
                vec![(15, 1), (16, 1), (17, 2)],
                vec![(0, 37), (5, 3), (31, 1)],
                vec![(511, 1), (512, 1), (3, 1), (1040, 2)],
            ],
            // the larger has more tokens than lists in shared memory
            vocabularies: vec![203, 1300],
            train: TrainShapes {
                linears: vec![[70, 48, 64], [37, 136, 288], [130, 152, 32]],
                heads: vec![(3, 32), (1, 64), (1, 80), (2, 96), (1, 128)],
                lengths: vec![1, 63, 66],
                lm_heads: vec![[9, 130, 48], [21, 203, 64]],
            },
            seed,
        }
    }

    /// Drawn from the seed, small enough for the emulator.
    pub fn random(seed: u64) -> Shapes {
        let mut words = PhiloxStream::new(seed, 2);
        let mut between = |min: usize, max: usize| min + words.below(max - min + 1);
        let sizes = [32, 64, 80, 96, 128];
        Shapes {
            heads: (0..2).map(|_| (between(1, 4), sizes[between(0, 4)])).collect(),
            steps: vec![],
            matrices: (0..3).map(|_| (between(1, 300), 16 * between(1, 24))).collect(),
            long_matrices: vec![],
            tokens: (0..4).map(|i| between(1, [16, 32, 64, 150][i])).collect(),
            batches: (0..3)
                .map(|_| {
                    (0..between(1, 4))
                        .map(|_| (between(0, 3) * between(0, 60), between(1, 70)))
                        .collect()
                })
                .collect(),
            vocabularies: vec![between(30, 600)],
            train: TrainShapes {
                linears: (0..2)
                    .map(|_| [between(1, 150), 8 * between(1, 40), 16 * between(1, 20)])
                    .collect(),
                heads: vec![(between(1, 3), sizes[between(0, 4)])],
                lengths: (0..3).map(|_| between(1, 100)).collect(),
                lm_heads: vec![[between(1, 40), between(20, 400), 16 * between(1, 6)]],
            },
            seed,
        }
    }

    /// BLOOM's own.
    pub fn real(seed: u64) -> Shapes {
        Shapes {
            heads: vec![(16, 64), (16, 96), (16, 128), (32, 80)],
            steps: vec![(16, 64), (16, 96), (16, 128), (32, 80)],
            matrices: vec![(4608, 1536), (1536, 1536), (6144, 1536), (1536, 6144), (4096, 16384)],
            long_matrices: vec![],
            tokens: vec![1, 2, 8, 16, 17, 64, 200, 1000],
            batches: vec![
                (0..64).map(|i| (2 * i + 1, 1)).collect(),
                vec![(0, 128), (0, 384), (100, 30), (2047, 1)],
                vec![(1500, 1), (512, 1), (511, 1)],
            ],
            vocabularies: vec![250_880],
            train: TrainShapes {
                linears: vec![
                    [6144, 4608, 1536],
                    [6144, 1536, 1536],
                    [6144, 6144, 1536],
                    [6144, 1536, 6144],
                ],
                heads: vec![(16, 64), (16, 96), (16, 128), (32, 80)],
                lengths: vec![384, 1000, 1, 383, 2048],
                lm_heads: vec![[1100, 250_880, 1536], [100, 250_881, 64], [300, 50_257, 768]],
            },
            seed,
        }
    }
}

/// A kernel's result compared with the CPU's.
#[derive(Clone, Debug)]
pub struct KernelCheck {
    /// The operation's name.
    pub operation: &'static str,
    /// The shapes and settings that it was tried with.
    pub case: String,
    /// Largest difference over the largest magnitude.
    pub error: f32,
    /// What rounding explains.
    pub allowed: f32,
}

impl KernelCheck {
    /// Whether the error is no larger than what is allowed.
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }
}

/// The same matrix of both backends.
type Weights<L> = (<Cuda<L> as Backend>::Weight, <Cpu as Backend>::Weight);
/// The same layer norm.
type Norms<L> = (LayerNorm<Cuda<L>>, LayerNorm<Cpu>);
/// The same linear layer.
type Linears<L> = (Linear<Cuda<L>>, Linear<Cpu>);

struct Test<'a, L: Launcher> {
    cuda: Cuda<L>,
    cpu: Cpu,
    half: DType,
    words: PhiloxStream,
    each: &'a mut dyn FnMut(KernelCheck),
}

/// Tries all kernels in one 16-bit type; `each` is told of every case.
pub fn run<L: Launcher>(
    launcher: &Rc<L>,
    half: DType,
    shapes: &Shapes,
    each: &mut dyn FnMut(KernelCheck),
) -> Result<()> {
    let cuda = Cuda::new(launcher.clone(), half, false);
    let cpu = Cpu::new(0, Isa::detect());
    let mut test = Test { cuda, cpu, half, words: PhiloxStream::new(shapes.seed, 1), each };
    if half == DType::Bf16 {
        test.train(&shapes.train)?;
    }
    for &(outputs, inputs) in &shapes.matrices {
        for int8 in [false, true] {
            let weights = test.matrix(outputs, inputs, int8)?;
            test.rows(&weights, (outputs, inputs), int8)?;
            test.gemms(weights, (outputs, inputs), &shapes.tokens, int8)?;
        }
    }
    for &(outputs, inputs) in &shapes.long_matrices {
        for int8 in [false, true] {
            let weights = test.matrix(outputs, inputs, int8)?;
            test.gemms(weights, (outputs, inputs), &[1, 6], int8)?;
        }
    }
    for (i, &(count, size)) in shapes.steps.iter().enumerate() {
        // in one kernel, and by larger GEMMs
        for sequences in [5, 20] {
            test.steps(count, size, sequences, i % 2 == 1, i % 3 == 1)?;
        }
    }
    for &(count, size) in &shapes.heads {
        for batch in &shapes.batches {
            test.attention(count, size, batch)?;
        }
    }
    let width = shapes.matrices.iter().map(|m| m.1).find(|i| *i <= 2048).unwrap_or(64);
    for int8 in [false, true] {
        for (i, &vocabulary) in shapes.vocabularies.iter().enumerate() {
            let (lm_head, cpu_lm_head) = test.matrix(vocabulary, width, int8)?;
            let rows: &[usize] = if i == 0 { &[5, 20, 50, 140] } else { &[5] };
            for &rows in rows {
                test.sampling((&lm_head, &cpu_lm_head), (vocabulary, width), rows, int8)?;
            }
        }
    }
    Ok(())
}

fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    let max = theirs.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let worst = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() });
    if ours.len() == theirs.len() { worst.fold(0.0, f32::max) / max } else { f32::INFINITY }
}

/// Greedy, plain and filtered sampling, with and without penalties.
fn samplings(vocabulary: usize) -> [Sampling; 11] {
    let plain = Sampling { seed: 11, ..Sampling::default() };
    let penalty = Sampling { repetition_penalty: 1.7, ..plain };
    let warm = Sampling { temperature: 0.8, ..plain };
    let both = Sampling { temperature: 1.3, seed: u64::MAX - 5, ..penalty };
    let ranked = Sampling { top_k: 20, top_p: 0.9, ..both };
    let likely = Sampling { top_k: 7, min_p: 0.2, ..warm };
    let nucleus = Sampling { top_p: 0.5, ..warm };
    let floor = Sampling { min_p: 0.4, ..both };
    // more tokens than a list in shared memory holds, in the larger vocabularies
    let long = Sampling { top_k: vocabulary - 1, min_p: 0.3, ..warm };
    let flat = Sampling { top_p: 0.95, temperature: 6.0, ..both };
    let wide = Sampling { top_k: vocabulary - 9, top_p: 0.97, min_p: 0.01, ..flat };
    [plain, penalty, warm, both, ranked, likely, nucleus, floor, long, flat, wide]
}

impl<L: Launcher> Test<'_, L> {
    /// Numbers in (-1, 1) that the 16-bit type holds. Large matrices repeat a prime number of them,
    /// so that no two rows are equal and making them does not take longer than the kernels' work on
    /// them.
    fn noise(&mut self, n: usize) -> Vec<f32> {
        const PERIOD: usize = 4_194_301;
        let mut noise: Vec<f32> = (0..n.min(PERIOD))
            .map(|_| {
                let x = 2.0 * self.words.uniform() - 1.0;
                if self.half == DType::F16 {
                    f16::from_f32(x).to_f32()
                } else {
                    bf16::from_f32(x).to_f32()
                }
            })
            .collect();
        noise.reserve_exact(n - noise.len());
        while noise.len() < n {
            noise.extend_from_within(..PERIOD.min(n - noise.len()));
        }
        noise
    }

    /// The same numbers as a matrix of both backends. In 8 bits the rows are whole multiples of
    /// their scales, so that nothing is lost.
    fn matrix(&mut self, rows: usize, cols: usize, int8: bool) -> Result<Weights<L>> {
        let mut x = self.noise(rows * cols);
        if int8 {
            for row in x.chunks_exact_mut(cols) {
                row.iter_mut().for_each(|v| *v = (*v * 127.0).round() / 64.0);
                row[0] = 127.0 / 64.0;
            }
        }
        let t = HostTensor::of_rows(&x, cols);
        let ours = self.cuda.weight(t.clone(), int8.then_some(DType::Int8))?;
        Ok((ours, self.cpu.weight(t, Some(DType::F32))?))
    }

    /// The same layer norm of both backends, of numbers near `scale` and up to it.
    fn norm(&mut self, width: usize, scale: f32) -> Result<Norms<L>> {
        let weight: Vec<f32> = self.noise(width).iter().map(|v| (1.0 + 0.3 * v) * scale).collect();
        let bias: Vec<f32> = self.noise(width).iter().map(|v| v * scale).collect();
        let ours = LayerNorm {
            weight: self.cuda.vector(&HostTensor::of_rows(&weight, width))?,
            bias: self.cuda.vector(&HostTensor::of_rows(&bias, width))?,
            eps: EPS,
        };
        Ok((ours, LayerNorm { weight, bias, eps: EPS }))
    }

    /// The same linear layer of both backends.
    fn linear(&mut self, (weight, cpu_weight): Weights<L>, outputs: usize) -> Result<Linears<L>> {
        let bias = self.noise(outputs);
        let ours = self.cuda.vector(&HostTensor::of_rows(&bias, outputs))?;
        Ok((Linear { weight, bias: ours }, Linear { weight: cpu_weight, bias }))
    }

    /// Error of one rounding to the 16-bit type.
    fn rounding(&self) -> f32 {
        if self.half == DType::F16 { 4.9e-4 } else { 3.9e-3 }
    }

    fn report(&mut self, operation: &'static str, case: String, error: f32, allowed: f32) {
        let case = format!("{} {case}", self.half.name());
        (self.each)(KernelCheck { operation, case, error, allowed });
    }

    /// Embedding and layer norm.
    fn rows(
        &mut self,
        (table, cpu_table): &Weights<L>,
        (outputs, inputs): (usize, usize),
        int8: bool,
    ) -> Result<()> {
        let (norm, cpu_norm) = self.norm(inputs, 1.0)?;
        let mut batch = Batch::default();
        let ids: Vec<u32> = (0..9).map(|_| self.words.below(outputs) as u32).collect();
        batch.push(&ids, 0, &[0]);
        let (mut on_device, mut out, mut expected) = Default::default();
        self.cuda.upload_batch(&batch, &mut on_device);
        self.cuda.embedding_norm(&mut out, &on_device, table, &norm);
        self.cpu.embedding_norm(&mut expected, &batch, cpu_table, &cpu_norm);
        let case = format!("{inputs} wide{}", if int8 { ", int8" } else { "" });
        let e = error(&self.cuda.download(&out)?, expected.buffer());
        self.report("embed_norm", case.clone(), e, 1e-5);
        let rows = [8, 0, 3, 3];
        let (mut gathered, mut expected_rows) = Default::default();
        self.cuda.layer_norm_rows(&mut gathered, &out, &rows, &norm);
        self.cpu.layer_norm_rows(&mut expected_rows, &expected, &rows, &cpu_norm);
        let e = error(&self.cuda.download(&gathered)?, expected_rows.buffer());
        self.report("layer_norm", case, e, self.rounding());
        Ok(())
    }

    /// The same small decoder of both backends.
    fn decoders(
        &mut self,
        heads: &Heads,
        [layers, vocabulary]: [usize; 2],
        int8: bool,
        residual_post_norm: bool,
    ) -> Result<(Decoder<Cuda<L>>, Decoder<Cpu>)> {
        let width = heads.width();
        let (embedding, cpu_embedding) = self.matrix(vocabulary, width, int8)?;
        let (embedding_norm, cpu_embedding_norm) = self.norm(width, 1.0)?;
        let (final_norm, cpu_final_norm) = self.norm(width, 1.0)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..layers {
            let mut linear = |outputs: usize, inputs: usize| -> Result<_> {
                let weights = self.matrix(outputs, inputs, int8)?;
                self.linear(weights, outputs)
            };
            let (qkv, cpu_qkv) = linear(3 * width, width)?;
            let (dense, cpu_dense) = linear(width, width)?;
            let (up, cpu_up) = linear(4 * width, width)?;
            let (down, cpu_down) = linear(width, 4 * width)?;
            // small numbers after the norms, so that no softmax is all on one position
            let scale = 0.5 / (width as f32).sqrt();
            let (input_norm, cpu_input_norm) = self.norm(width, scale)?;
            let (post_norm, cpu_post_norm) = self.norm(width, scale)?;
            ours.push(DecoderLayer { input_norm, qkv, dense, post_norm, up, down });
            theirs.push(DecoderLayer {
                input_norm: cpu_input_norm,
                qkv: cpu_qkv,
                dense: cpu_dense,
                post_norm: cpu_post_norm,
                up: cpu_up,
                down: cpu_down,
            });
        }
        let ours = Decoder {
            id: Default::default(),
            embedding,
            embedding_norm,
            layers: ours,
            heads: heads.clone(),
            residual_post_norm,
            final_norm,
            lm_head: None,
        };
        let theirs = Decoder {
            id: Default::default(),
            embedding: cpu_embedding,
            embedding_norm: cpu_embedding_norm,
            layers: theirs,
            heads: heads.clone(),
            residual_post_norm,
            final_norm: cpu_final_norm,
            lm_head: None,
        };
        Ok((ours, theirs))
    }

    /// Decoding steps of a small model: operation by operation, captured and replayed, and in one
    /// kernel.
    fn steps(
        &mut self,
        count: usize,
        size: usize,
        sequences: usize,
        int8: bool,
        residual_post_norm: bool,
    ) -> Result<()> {
        const LAYERS: usize = 2;
        const VOCABULARY: usize = 50;
        let heads = Heads { count, size, slopes: alibi_slopes(count) };
        let (decoder, cpu_decoder) =
            self.decoders(&heads, [LAYERS, VOCABULARY], int8, residual_post_norm)?;
        // the first sequences are longer than one block of threads takes
        let steps = 3;
        let start = |s: usize| [160, 0, 14][s % 3];
        let blocks = |s: usize| -> Vec<u32> { (0..11).map(|b| (s * 11 + b) as u32).collect() };
        let batches: Vec<Batch> = (0..steps)
            .map(|step| {
                let mut batch = Batch::default();
                for s in 0..sequences {
                    batch.push(&[self.words.below(VOCABULARY) as u32], start(s) + step, &blocks(s));
                }
                batch
            })
            .collect();
        let variants = [
            (false, Persistent::Never),
            (true, Persistent::Never),
            (true, Persistent::Always),
            (true, Persistent::Auto),
        ];
        // more sequences than the one kernel takes
        let variants = if sequences > 8 { &variants[..2] } else { &variants[..] };
        let mut results = Vec::new();
        for &(graphs, persistent) in variants {
            (self.cuda.captures_graphs, self.cuda.persistent) = (graphs, persistent);
            let mut cache = self.cuda.cache(self.half, LAYERS, &heads, 11 * sequences)?;
            let mut a = DecoderActivations::default();
            let mut result = Vec::new();
            for batch in &batches {
                self.cuda.upload_batch(batch, &mut a.batch);
                self.cuda.decoder(&decoder, &mut cache, &mut a);
                result.extend(self.cuda.download(&a.x)?);
            }
            results.push(result);
        }
        (self.cuda.captures_graphs, self.cuda.persistent) = (true, Persistent::Never);
        let mut expected = Vec::new();
        let mut cache = self.cpu.cache(DType::F32, LAYERS, &heads, 11 * sequences)?;
        let mut a = DecoderActivations::default();
        for batch in &batches {
            self.cpu.upload_batch(batch, &mut a.batch);
            self.cpu.decoder(&cpu_decoder, &mut cache, &mut a);
            expected.extend_from_slice(a.x.buffer());
        }
        let int8 = if int8 { ", int8" } else { "" };
        let case = format!("{sequences} sequences, {LAYERS} layers of {count} x {size}{int8}");
        // activations are rounded seven times a layer
        let allowed = 7.0 * LAYERS as f32 * self.rounding();
        self.report("steps", case.clone(), error(&results[0], &expected), allowed);
        self.report("recorded steps", case.clone(), error(&results[1], &results[0]), 0.0);
        for (name, result) in
            ["steps in one kernel", "steps the faster way"].into_iter().zip(&results[2..])
        {
            self.report(name, case.clone(), error(result, &expected), allowed);
        }
        Ok(())
    }

    /// Products with every epilogue but that of attention, with and without a norm before.
    fn gemms(
        &mut self,
        weights: Weights<L>,
        (outputs, inputs): (usize, usize),
        tokens: &[usize],
        int8: bool,
    ) -> Result<()> {
        let linears = self.linear(weights, outputs)?;
        tokens
            .iter()
            .try_for_each(|&tokens| self.products_of(&linears, (outputs, inputs), tokens, int8))
    }

    fn products_of(
        &mut self,
        (linear, cpu_linear): &Linears<L>,
        (outputs, inputs): (usize, usize),
        tokens: usize,
        int8: bool,
    ) -> Result<()> {
        let x = self.noise(tokens * inputs);
        let residual = self.noise(tokens * outputs);
        let half = self.cuda.upload(&x, inputs, self.half)?;
        let full = self.cuda.upload(&x, inputs, DType::F32)?;
        let cpu_x = self.cpu.upload(&x, inputs);
        let our_residuals = [
            self.cuda.upload(&residual, outputs, DType::F32)?,
            self.cuda.upload(&residual, outputs, self.half)?,
        ];
        let cpu_residual = self.cpu.upload(&residual, outputs);
        let (norm, cpu_norm) = self.norm(inputs, 1.0)?;
        let case = format!("{tokens} x {inputs} to {outputs}{}", if int8 { ", int8" } else { "" });
        let (mut out, mut expected) = Default::default();
        // the same terms summed in another order
        let sums = 3e-6 * (inputs as f32).sqrt();
        self.cuda.linear(&mut out, &half, linear, Epilogue::Bias);
        self.cpu.linear(&mut expected, &cpu_x, cpu_linear, Epilogue::Bias);
        let e = error(&self.cuda.download(&out)?, expected.buffer());
        self.report("linear", case.clone(), e, sums);
        self.cuda.linear(&mut out, &half, linear, Epilogue::BiasHalf);
        let e = error(&self.cuda.download(&out)?, expected.buffer());
        self.report("linear, rounded", case.clone(), e, self.rounding());
        let epilogue = Epilogue::BiasResidual(&cpu_residual);
        self.cpu.linear(&mut expected, &cpu_x, cpu_linear, epilogue);
        for r in &our_residuals {
            self.cuda.linear(&mut out, &half, linear, Epilogue::BiasResidual(r));
            let e = error(&self.cuda.download(&out)?, expected.buffer());
            self.report("linear + residual", case.clone(), e, sums);
        }
        let (mut normed, mut expected_normed, mut gelu) = Default::default();
        let input =
            LinearInput::Normalized { x: &full, norm: &norm, normed: &mut normed, keep: true };
        self.cuda.launch_linear(&mut gelu, input, linear, Epilogue::BiasGelu)?;
        let input = NormInput { x: &cpu_x, norm: &cpu_norm, normed: &mut expected_normed };
        self.cpu.layer_norm_linear(&mut expected, input, cpu_linear, Epilogue::BiasGelu);
        let e = error(&self.cuda.download(&gelu)?, expected.buffer());
        // the normalized rows and the result are rounded
        self.report("norm + linear + GELU", case.clone(), e, 3.0 * self.rounding());
        let e = error(&self.cuda.download(&normed)?, expected_normed.buffer());
        self.report("norm before a linear", case, e, self.rounding());
        Ok(())
    }

    /// Norm, queries, keys and values, and attention over the cache. `spans`: positions that are
    /// there, and new ones.
    fn attention(&mut self, count: usize, size: usize, spans: &[(usize, usize)]) -> Result<()> {
        let width = count * size;
        let heads = Heads { count, size, slopes: alibi_slopes(count) };
        let weights = self.matrix(3 * width, width, false)?;
        let (linear, cpu_linear) = self.linear(weights, 3 * width)?;
        // scores of about one: softmax over many positions, not one
        let (norm, cpu_norm) = self.norm(width, 0.5 / (width as f32).sqrt())?;
        let needed: usize = spans.iter().map(|s| (s.0 + s.1).div_ceil(BLOCK)).sum();
        let mut order: Vec<u32> = (0..needed as u32).collect();
        self.words.shuffle(&mut order);
        let mut free = order.into_iter();
        let tables: Vec<Vec<u32>> = spans
            .iter()
            .map(|s| free.by_ref().take((s.0 + s.1).div_ceil(BLOCK)).collect())
            .collect();
        let mut cache = self.cuda.cache(self.half, 2, &heads, needed)?;
        let mut cpu_cache = self.cpu.cache(DType::F32, 2, &heads, needed)?;
        // first what is in the cache, then the batch
        for stage in 0..2 {
            let mut batch = Batch::default();
            for (&(past, new), table) in spans.iter().zip(&tables) {
                let (start, n) = if stage == 0 { (0, past) } else { (past, new) };
                if n > 0 {
                    batch.push(&vec![0; n], start, table);
                }
            }
            if batch.ids.is_empty() {
                continue;
            }
            let tokens = batch.ids.len();
            let x = self.noise(tokens * width);
            let full = self.cuda.upload(&x, width, DType::F32)?;
            let (mut on_device, mut normed, mut q, mut out) = Default::default();
            self.cuda.upload_batch(&batch, &mut on_device);
            let input = NormInput { x: &full, norm: &norm, normed: &mut normed };
            let at = (&mut cache, 1);
            self.cuda.layer_norm_qkv_to_cache(&mut q, input, &linear, &on_device, at);
            let (mut cpu_normed, mut qkv, mut expected) = Default::default();
            let cpu_x = self.cpu.upload(&x, width);
            let input = NormInput { x: &cpu_x, norm: &cpu_norm, normed: &mut cpu_normed };
            let at = (&mut cpu_cache, 1);
            self.cpu.layer_norm_qkv_to_cache(&mut qkv, input, &cpu_linear, &batch, at);
            if stage == 1 {
                self.cuda.paged_attention(&mut out, &q, &on_device, (&cache, 1));
                self.cpu.paged_attention(&mut expected, &qkv, &batch, (&cpu_cache, 1));
                let e = error(&self.cuda.download(&out)?, expected.buffer());
                let case = format!("{count} x {size}, {} spans, {tokens} tokens", spans.len());
                // the normalized rows, queries, keys, values and the result are rounded
                self.report("attention", case, e, 4.0 * self.rounding());
            }
        }
        // whole blocks are copied in every layer
        if needed > 1 {
            self.cuda.copy_block(&mut cache, tables[0][0], tables[spans.len() - 1][0]);
            self.cuda.download(&self.cuda.upload(&[0.0; 16], 16, DType::F32)?)?;
        }
        Ok(())
    }

    /// Tokens chosen from the LM head, in every way.
    fn sampling(
        &mut self,
        (lm_head, cpu_lm_head): (&<Cuda<L> as Backend>::Weight, &<Cpu as Backend>::Weight),
        (vocabulary, width): (usize, usize),
        rows: usize,
        int8: bool,
    ) -> Result<()> {
        let scale = 4.0 / (width as f32).sqrt();
        let x: Vec<f32> = self.noise(rows * width);
        // a power of two keeps the numbers exact
        let scale = scale.log2().round().exp2();
        let x: Vec<f32> = x.iter().map(|v| v * scale).collect();
        let ours_x = self.cuda.upload(&x, width, self.half)?;
        let x = self.cpu.upload(&x, width);
        let seen: Vec<u32> = (0..vocabulary as u32).step_by(5).take(40).collect();
        let settings = samplings(vocabulary);
        let ranked = settings[4];
        let bias: Vec<(u32, f32)> = (0..vocabulary as u32)
            .step_by(3)
            .take(60)
            .map(|t| (t, [1.5, -0.5, f32::NEG_INFINITY][t as usize / 3 % 3]))
            .collect();
        // several choices of the first rows, then one of each
        let count = 5 * settings.len();
        let list: Vec<(usize, SamplingRow)> = (0..count + rows - 5)
            .map(|i| {
                let row = if i < count { i / settings.len() } else { i - count + 5 };
                // of the others only some are filtered, which takes long in the emulator
                let sampling = match i % 16 {
                    _ if i < count => &settings[i % settings.len()],
                    5 => &ranked,
                    n => &settings[n % 4],
                };
                let plain = SamplingRow {
                    seen: &seen,
                    ..SamplingRow::new(row, sampling, i as u32, 77 + i as u32)
                };
                let row_of = match i % 4 {
                    1 => SamplingRow { bias: &bias, ..plain },
                    2 if i % 5 == 0 => {
                        SamplingRow { forced: Some(i as u32 % vocabulary as u32), ..plain }
                    }
                    3 if i % 5 == 0 => SamplingRow { top: 3, ..plain },
                    _ => plain,
                };
                (row, row_of)
            })
            .collect();
        let list: Vec<(usize, &SamplingRow)> = list.iter().map(|(row, r)| (*row, r)).collect();
        let (mut logits, mut expected_logits) = (Vec::new(), Vec::new());
        let ours = self.cuda.sample(&ours_x, lm_head, &list, &mut logits)?;
        let theirs = self.cpu.sample(&x, cpu_lm_head, &list, &mut expected_logits)?;
        let tokens = |c: &SampledToken| (c.token, c.top.iter().map(|t| t.0).collect::<Vec<_>>());
        let different = ours.iter().zip(&theirs).filter(|(a, b)| tokens(a) != tokens(b)).count();
        let case =
            format!("{rows} x {width} to {vocabulary} tokens{}", if int8 { ", int8" } else { "" });
        self.report("sampled tokens that differ", case.clone(), different as f32, 0.0);
        let get = |c: &[SampledToken]| -> Vec<f32> {
            c.iter()
                .flat_map(|c| [c.logprob].into_iter().chain(c.top.iter().map(|t| t.1)))
                .collect()
        };
        let e = error(&get(&ours), &get(&theirs));
        self.report("log-probabilities", case.clone(), e, 1e-5);
        self.pending_tokens(&ours_x, &x, (lm_head, cpu_lm_head), &list, case.clone())?;
        self.cuda.logits(&ours_x, lm_head, &mut logits)?;
        self.cpu.logits(&x, cpu_lm_head, &mut expected_logits)?;
        let e = error(&logits, &expected_logits);
        self.report("logits", case, e, 3e-6 * (width as f32).sqrt());
        Ok(())
    }

    /// Choices whose tokens go on to the next embedding, and count as seen in the next choices,
    /// before the host has read them.
    fn pending_tokens(
        &mut self,
        x: &Tensor<Cuda<L>>,
        cpu_x: &Tensor<Cpu>,
        (lm_head, cpu_lm_head): (&<Cuda<L> as Backend>::Weight, &<Cpu as Backend>::Weight),
        list: &[(usize, &SamplingRow)],
        case: String,
    ) -> Result<()> {
        let list: Vec<_> =
            list.iter().copied().filter(|r| self.cuda.samples_on_device(r.1)).collect();
        let (norm, cpu_norm) = self.norm(cpu_x.shape()[1], 1.0)?;
        let first = self.cuda.sample_async(x, lm_head, &list)?;
        let mut batch = Batch::default();
        for i in 0..list.len() {
            batch.push(&[0], 0, &[0]);
            batch.pending.push((i, i));
        }
        let (mut on_device, mut out, mut expected, mut scratch) = Default::default();
        self.cuda.upload_batch(&batch, &mut on_device);
        self.cuda.embedding_norm(&mut out, &on_device, lm_head, &norm);
        let next: Vec<SamplingRow> = (0..list.len())
            .map(|i| SamplingRow { pending: Some(i), position: 500, ..*list[i].1 })
            .collect();
        let next: Vec<_> = list.iter().zip(&next).map(|(r, n)| (r.0, n)).collect();
        let second = self.cuda.sample_async(x, lm_head, &next)?;
        let (first, second) = (self.cuda.wait(first)?, self.cuda.wait(second)?);
        batch.ids = first.iter().map(|c| c.token).collect();
        self.cpu.embedding_norm(&mut expected, &batch, cpu_lm_head, &cpu_norm);
        let e = error(&self.cuda.download(&out)?, expected.buffer());
        self.report("embedding of fed tokens", case.clone(), e, 1e-5);
        let seen: Vec<Vec<u32>> = next
            .iter()
            .zip(&batch.ids)
            .map(|((_, r), token)| {
                r.seen.iter().copied().filter(|t| t != token).chain([*token]).collect()
            })
            .collect();
        let known: Vec<SamplingRow> = next
            .iter()
            .zip(&seen)
            .map(|((_, r), seen)| SamplingRow { pending: None, seen, ..**r })
            .collect();
        let known: Vec<_> = next.iter().zip(&known).map(|(r, k)| (r.0, k)).collect();
        let theirs = self.cpu.sample(cpu_x, cpu_lm_head, &known, &mut scratch)?;
        let different = second.iter().zip(&theirs).filter(|(a, b)| a.token != b.token).count();
        self.report("tokens after fed ones that differ", case, different as f32, 0.0);
        Ok(())
    }
}
