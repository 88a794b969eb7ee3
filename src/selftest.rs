//! Every CUDA kernel against the CPU backend, on a GPU or in the emulator.
//!
//! Both backends get the same numbers, already rounded to the kernels' 16-bit type, so that what is
//! left is the order of sums, and the rounding of what a kernel stores in 16 bits itself.

use crate::device::Launcher;
use crate::engine::{SampleRow, Sampling};
use crate::error::Result;
use crate::models::bloom::alibi_slopes;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::simd::Isa;
use crate::ops::cuda::{Cuda, Persistent};
use crate::ops::{
    BLOCK, Backend, Batch, Epilogue, Forward, Heads, Layer, LayerNorm, Linear, Norm, Scratch,
};
use crate::random::Words;
use crate::tensor::{DType, Tensor};
use half::{bf16, f16};
use std::rc::Rc;

const EPS: f32 = 1e-5;

/// Layers and tokens of the small model that steps are tried with.
const LAYERS: usize = 2;
const VOCABULARY: usize = 50;

struct SmallModel<B: Backend> {
    embedding: B::Matrix,
    embedding_norm: LayerNorm<B::Vector>,
    layers: Vec<Layer<B>>,
    residual_post_norm: bool,
}

impl<B: Backend> SmallModel<B> {
    /// The hidden states that each batch comes to, one batch after the other.
    fn run(
        &self,
        backend: &B,
        heads: &Heads,
        batches: &[Batch],
        mut cache: B::Cache,
        read: &dyn Fn(&B::Buffer) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let mut scratch = Scratch::default();
        let mut states = Vec::new();
        for batch in batches {
            backend.begin(batch, &mut scratch.pass);
            backend.forward(Forward {
                batch,
                embedding: &self.embedding,
                embedding_norm: &self.embedding_norm,
                layers: &self.layers,
                heads,
                eps: EPS,
                residual_post_norm: self.residual_post_norm,
                cache: &mut cache,
                scratch: &mut scratch,
            });
            states.extend(read(&scratch.x)?);
        }
        Ok(states)
    }
}

/// What is tried.
#[derive(Clone, Debug)]
pub struct Shapes {
    /// Heads and head sizes of attention, and of whole steps.
    pub heads: Vec<(usize, usize)>,
    pub steps: Vec<(usize, usize)>,
    /// `(outputs, inputs)` of products.
    pub matrices: Vec<(usize, usize)>,
    /// The same with rows so long that they are brought in another way where tokens are few.
    pub long_matrices: Vec<(usize, usize)>,
    /// Tokens of a product.
    pub tokens: Vec<usize>,
    /// `(positions in the cache, new tokens)` of the spans of attention batches.
    pub batches: Vec<Vec<(usize, usize)>>,
    pub vocabularies: Vec<usize>,
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
            seed,
        }
    }

    /// Drawn from the seed, small enough for the emulator.
    pub fn random(seed: u64) -> Shapes {
        let mut words = Words::new(seed, 2);
        let mut between = |least: usize, most: usize| least + words.below(most - least + 1);
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
            seed,
        }
    }
}

/// A kernel's result beside the CPU's.
#[derive(Clone, Debug)]
pub struct KernelCheck {
    pub operation: &'static str,
    pub case: String,
    /// Largest difference over the largest magnitude.
    pub error: f32,
    /// What rounding explains.
    pub allowed: f32,
}

impl KernelCheck {
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }
}

/// The same matrix of both backends.
type Matrices<L> = (<Cuda<L> as Backend>::Matrix, <Cpu as Backend>::Matrix);

struct Test<'a, L: Launcher> {
    cuda: Cuda<L>,
    cpu: Cpu,
    half: DType,
    words: Words,
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
    let mut test = Test { cuda, cpu, half, words: Words::new(shapes.seed, 1), each };
    for &(outputs, inputs) in &shapes.matrices {
        for int8 in [false, true] {
            let weights = test.matrix(outputs, inputs, int8)?;
            test.rows(&weights, (outputs, inputs), int8)?;
            test.products(weights, (outputs, inputs), &shapes.tokens, int8)?;
        }
    }
    for &(outputs, inputs) in &shapes.long_matrices {
        for int8 in [false, true] {
            let weights = test.matrix(outputs, inputs, int8)?;
            test.products(weights, (outputs, inputs), &[1, 6], int8)?;
        }
    }
    for (i, &(count, size)) in shapes.steps.iter().enumerate() {
        // in one kernel, and by larger products
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
            let (head, cpu_head) = test.matrix(vocabulary, width, int8)?;
            let rows: &[usize] = if i == 0 { &[5, 20, 50, 140] } else { &[5] };
            for &rows in rows {
                test.sampling((&head, &cpu_head), (vocabulary, width), rows, int8)?;
            }
        }
    }
    Ok(())
}

fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    let most = theirs.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let worst = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() });
    if ours.len() == theirs.len() { worst.fold(0.0, f32::max) / most } else { f32::INFINITY }
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
    fn matrix(&mut self, rows: usize, cols: usize, int8: bool) -> Result<Matrices<L>> {
        let mut x = self.noise(rows * cols);
        if int8 {
            for row in x.chunks_exact_mut(cols) {
                row.iter_mut().for_each(|v| *v = (*v * 127.0).round() / 64.0);
                row[0] = 127.0 / 64.0;
            }
        }
        let t = Tensor::of_rows(&x, cols);
        let ours = self.cuda.matrix(t.clone(), int8.then_some(DType::Int8))?;
        Ok((ours, self.cpu.matrix(t, Some(DType::F32))?))
    }

    #[allow(clippy::type_complexity)]
    fn norm(
        &mut self,
        width: usize,
    ) -> Result<(LayerNorm<<Cuda<L> as Backend>::Vector>, LayerNorm<Vec<f32>>)> {
        let weight: Vec<f32> = self.noise(width).iter().map(|v| 1.0 + 0.3 * v).collect();
        let bias = self.noise(width);
        let ours = LayerNorm {
            weight: self.cuda.vector(&Tensor::of_rows(&weight, width))?,
            bias: self.cuda.vector(&Tensor::of_rows(&bias, width))?,
        };
        Ok((ours, LayerNorm { weight, bias }))
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
        (table, cpu_table): &Matrices<L>,
        (outputs, inputs): (usize, usize),
        int8: bool,
    ) -> Result<()> {
        let (norm, cpu_norm) = self.norm(inputs)?;
        let mut batch = Batch::default();
        let ids: Vec<u32> = (0..9).map(|_| self.words.below(outputs) as u32).collect();
        batch.push(&ids, 0, &[0]);
        let (mut pass, mut out, mut expected) = Default::default();
        self.cuda.begin(&batch, &mut pass);
        self.cuda.embed_norm(&batch, &pass, table, &norm, EPS, &mut out);
        self.cpu.embed_norm(&batch, &(), cpu_table, &cpu_norm, EPS, &mut expected);
        let case = format!("{inputs} wide{}", if int8 { ", int8" } else { "" });
        let e = error(&self.cuda.download(&out, inputs)?, &expected);
        self.report("embed_norm", case.clone(), e, 1e-5);
        let rows = [8, 0, 3, 3];
        let (mut gathered, mut expected_rows) = Default::default();
        self.cuda.gather_norm(&out, &rows, &norm, EPS, &mut gathered);
        self.cpu.gather_norm(&expected, &rows, &cpu_norm, EPS, &mut expected_rows);
        let e = error(&self.cuda.download(&gathered, inputs)?, &expected_rows);
        self.report("layer_norm", case, e, self.rounding());
        Ok(())
    }

    /// A small model of random weights, ours and the CPU's.
    fn small_models(
        &mut self,
        width: usize,
        int8: bool,
        residual_post_norm: bool,
    ) -> Result<(SmallModel<Cuda<L>>, SmallModel<Cpu>)> {
        let (embedding, cpu_embedding) = self.matrix(VOCABULARY, width, int8)?;
        let (embedding_norm, cpu_embedding_norm) = self.norm(width)?;
        let (mut layers, mut cpu_layers) = (Vec::new(), Vec::new());
        for _ in 0..LAYERS {
            let mut linear = |outputs: usize, inputs: usize| -> Result<_> {
                let (weight, cpu_weight) = self.matrix(outputs, inputs, int8)?;
                let bias = self.noise(outputs);
                let ours =
                    Linear { weight, bias: self.cuda.vector(&Tensor::of_rows(&bias, outputs))? };
                Ok((ours, Linear { weight: cpu_weight, bias }))
            };
            let (qkv, cpu_qkv) = linear(3 * width, width)?;
            let (dense, cpu_dense) = linear(width, width)?;
            let (up, cpu_up) = linear(4 * width, width)?;
            let (down, cpu_down) = linear(width, 4 * width)?;
            // small numbers after the norms, so that no softmax is all on one position
            let mut norm = || -> Result<_> {
                let (mut ours, mut theirs) = self.norm(width)?;
                theirs
                    .weight
                    .iter_mut()
                    .chain(&mut theirs.bias)
                    .for_each(|v| *v *= 0.5 / (width as f32).sqrt());
                ours.weight = self.cuda.vector(&Tensor::of_rows(&theirs.weight, width))?;
                ours.bias = self.cuda.vector(&Tensor::of_rows(&theirs.bias, width))?;
                Ok((ours, theirs))
            };
            let (input_norm, cpu_input_norm) = norm()?;
            let (post_norm, cpu_post_norm) = norm()?;
            layers.push(Layer { input_norm, qkv, dense, post_norm, up, down });
            cpu_layers.push(Layer {
                input_norm: cpu_input_norm,
                qkv: cpu_qkv,
                dense: cpu_dense,
                post_norm: cpu_post_norm,
                up: cpu_up,
                down: cpu_down,
            });
        }
        let ours = SmallModel { embedding, embedding_norm, layers, residual_post_norm };
        let theirs = SmallModel {
            embedding: cpu_embedding,
            embedding_norm: cpu_embedding_norm,
            layers: cpu_layers,
            residual_post_norm,
        };
        Ok((ours, theirs))
    }

    /// A token for each sequence, three times.
    fn decoding_batches(&mut self, sequences: usize) -> Vec<Batch> {
        // the first sequences are longer than one block of threads takes
        let start = |s: usize| [160, 0, 14][s % 3];
        let blocks = |s: usize| -> Vec<u32> { (0..11).map(|b| (s * 11 + b) as u32).collect() };
        (0..3)
            .map(|step| {
                let mut batch = Batch::default();
                for s in 0..sequences {
                    batch.push(&[self.words.below(VOCABULARY) as u32], start(s) + step, &blocks(s));
                }
                batch
            })
            .collect()
    }

    /// Decoding steps of a small model: operation by operation, recorded and repeated, and in one
    /// kernel.
    fn steps(
        &mut self,
        count: usize,
        size: usize,
        sequences: usize,
        int8: bool,
        residual_post_norm: bool,
    ) -> Result<()> {
        let heads = Heads { count, size, slopes: alibi_slopes(count) };
        let (ours, theirs) = self.small_models(count * size, int8, residual_post_norm)?;
        let batches = self.decoding_batches(sequences);
        let ways = [
            (false, Persistent::Never),
            (true, Persistent::Never),
            (true, Persistent::Always),
            (true, Persistent::Auto),
        ];
        // more sequences than the one kernel takes
        let ways = if sequences > 8 { &ways[..2] } else { &ways[..] };
        let mut results = Vec::new();
        for &(records, persistent) in ways {
            (self.cuda.records, self.cuda.persistent) = (records, persistent);
            let cache = self.cuda.cache(self.half, LAYERS, &heads, 11 * sequences)?;
            let read = |x: &_| self.cuda.download(x, count * size);
            results.push(ours.run(&self.cuda, &heads, &batches, cache, &read)?);
        }
        (self.cuda.records, self.cuda.persistent) = (true, Persistent::Never);
        let cache = self.cpu.cache(DType::F32, LAYERS, &heads, 11 * sequences)?;
        let read = |x: &Vec<f32>| Ok(x.clone());
        let expected = theirs.run(&self.cpu, &heads, &batches, cache, &read)?;
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
    fn products(
        &mut self,
        (weight, cpu_weight): Matrices<L>,
        (outputs, inputs): (usize, usize),
        tokens: &[usize],
        int8: bool,
    ) -> Result<()> {
        let bias = self.noise(outputs);
        let linear = Linear { weight, bias: self.cuda.vector(&Tensor::of_rows(&bias, outputs))? };
        let cpu_linear = Linear { weight: cpu_weight, bias };
        tokens.iter().try_for_each(|&tokens| {
            self.products_of(&linear, &cpu_linear, (outputs, inputs), tokens, int8)
        })
    }

    fn products_of(
        &mut self,
        linear: &Linear<<Cuda<L> as Backend>::Matrix, <Cuda<L> as Backend>::Vector>,
        cpu_linear: &Linear<<Cpu as Backend>::Matrix, Vec<f32>>,
        (outputs, inputs): (usize, usize),
        tokens: usize,
        int8: bool,
    ) -> Result<()> {
        let x = self.noise(tokens * inputs);
        let residual = self.noise(tokens * outputs);
        let narrow = self.cuda.upload(&x, inputs, true)?;
        let wide = self.cuda.upload(&x, inputs, false)?;
        let our_residuals = [
            self.cuda.upload(&residual, outputs, false)?,
            self.cuda.upload(&residual, outputs, true)?,
        ];
        let (norm, cpu_norm) = self.norm(inputs)?;
        let case = format!("{tokens} x {inputs} to {outputs}{}", if int8 { ", int8" } else { "" });
        let (mut out, mut expected) = Default::default();
        // sums of the same products in another order
        let sums = 3e-6 * (inputs as f32).sqrt();
        self.cuda.linear(&narrow, linear, Epilogue::Bias, &mut out);
        self.cpu.linear(&x, cpu_linear, Epilogue::Bias, &mut expected);
        let e = error(&self.cuda.download(&out, outputs)?, &expected);
        self.report("linear", case.clone(), e, sums);
        self.cpu.linear(&x, cpu_linear, Epilogue::BiasResidual(&residual), &mut expected);
        for r in &our_residuals {
            self.cuda.linear(&narrow, linear, Epilogue::BiasResidual(r), &mut out);
            let e = error(&self.cuda.download(&out, outputs)?, &expected);
            self.report("linear + residual", case.clone(), e, sums);
        }
        let (mut normed, mut expected_normed) = Default::default();
        let mut gelu = Default::default();
        let of = |normed| Norm { norm: &norm, eps: EPS, keep: true, normed };
        self.cuda.norm_linear(&wide, of(&mut normed), linear, Epilogue::BiasGelu, &mut gelu);
        let norm = Norm { norm: &cpu_norm, eps: EPS, keep: true, normed: &mut expected_normed };
        self.cpu.norm_linear(&x, norm, cpu_linear, Epilogue::BiasGelu, &mut expected);
        let e = error(&self.cuda.download(&gelu, outputs)?, &expected);
        // the normalized rows and the result are rounded
        self.report("norm + linear + GELU", case.clone(), e, 3.0 * self.rounding());
        let e = error(&self.cuda.download(&normed, inputs)?, &expected_normed);
        self.report("norm before a linear", case, e, self.rounding());
        Ok(())
    }

    /// Norm, queries, keys and values, and attention over the cache. `spans`: positions that are
    /// there, and new ones.
    fn attention(&mut self, count: usize, size: usize, spans: &[(usize, usize)]) -> Result<()> {
        let width = count * size;
        let heads = Heads { count, size, slopes: alibi_slopes(count) };
        let (weight, cpu_weight) = self.matrix(3 * width, width, false)?;
        let bias = self.noise(3 * width);
        let linear = Linear { weight, bias: self.cuda.vector(&Tensor::of_rows(&bias, 3 * width))? };
        let cpu_linear = Linear { weight: cpu_weight, bias };
        // scores of about one: softmax over many positions, not one
        let (mut norm, mut cpu_norm) = self.norm(width)?;
        cpu_norm
            .weight
            .iter_mut()
            .chain(&mut cpu_norm.bias)
            .for_each(|v| *v *= 0.5 / (width as f32).sqrt());
        norm.weight = self.cuda.vector(&Tensor::of_rows(&cpu_norm.weight, width))?;
        norm.bias = self.cuda.vector(&Tensor::of_rows(&cpu_norm.bias, width))?;
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
            let wide = self.cuda.upload(&x, width, false)?;
            let (mut pass, mut normed, mut q, mut out) = Default::default();
            self.cuda.begin(&batch, &mut pass);
            let of = Norm { norm: &norm, eps: EPS, keep: false, normed: &mut normed };
            self.cuda.norm_qkv(&batch, &pass, 1, &wide, of, &linear, &heads, &mut cache, &mut q);
            let (mut cpu_normed, mut qkv, mut expected) = Default::default();
            let of = Norm { norm: &cpu_norm, eps: EPS, keep: false, normed: &mut cpu_normed };
            self.cpu.norm_qkv(
                &batch,
                &(),
                1,
                &x,
                of,
                &cpu_linear,
                &heads,
                &mut cpu_cache,
                &mut qkv,
            );
            if stage == 1 {
                self.cuda.attention(&batch, &pass, 1, &heads, &q, &cache, &mut out);
                self.cpu.attention(&batch, &(), 1, &heads, &qkv, &cpu_cache, &mut expected);
                let e = error(&self.cuda.download(&out, width)?, &expected);
                let case = format!("{count} x {size}, {} spans, {tokens} tokens", spans.len());
                // the normalized rows, queries, keys, values and the result are rounded
                self.report("attention", case, e, 4.0 * self.rounding());
            }
        }
        // whole blocks are copied in every layer
        if needed > 1 {
            self.cuda.copy_block(&mut cache, tables[0][0], tables[spans.len() - 1][0]);
            self.cuda.download(&self.cuda.upload(&[0.0; 16], 16, false)?, 16)?;
        }
        Ok(())
    }

    /// Tokens chosen from the head, in every way.
    fn sampling(
        &mut self,
        (head, cpu_head): (&<Cuda<L> as Backend>::Matrix, &<Cpu as Backend>::Matrix),
        (vocabulary, width): (usize, usize),
        rows: usize,
        int8: bool,
    ) -> Result<()> {
        let scale = 4.0 / (width as f32).sqrt();
        let x: Vec<f32> = self.noise(rows * width);
        // a power of two keeps the numbers exact
        let scale = scale.log2().round().exp2();
        let x: Vec<f32> = x.iter().map(|v| v * scale).collect();
        let narrow = self.cuda.upload(&x, width, true)?;
        let seen: Vec<u32> = (0..vocabulary as u32).step_by(5).take(40).collect();
        let settings = sampling_settings(vocabulary);
        let bias: Vec<(u32, f32)> = (0..vocabulary as u32)
            .step_by(3)
            .take(60)
            .map(|t| (t, [1.5, -0.5, f32::NEG_INFINITY][t as usize / 3 % 3]))
            .collect();
        // several choices of the first rows, then one of each
        let count = 5 * settings.len();
        let list: Vec<(usize, SampleRow)> = (0..count + rows - 5)
            .map(|i| {
                let row = if i < count { i / settings.len() } else { i - count + 5 };
                // of the others only some are filtered, which takes long in the emulator
                let sampling = match i % 16 {
                    _ if i < count => &settings[i % settings.len()],
                    5 => &settings[RANKED],
                    n => &settings[n % 4],
                };
                let plain = SampleRow {
                    seen: &seen,
                    ..SampleRow::new(row, sampling, i as u32, 77 + i as u32)
                };
                let row_of = match i % 4 {
                    1 => SampleRow { bias: &bias, ..plain },
                    2 if i % 5 == 0 => {
                        SampleRow { forced: Some(i as u32 % vocabulary as u32), ..plain }
                    }
                    3 if i % 5 == 0 => SampleRow { top: 3, ..plain },
                    _ => plain,
                };
                (row, row_of)
            })
            .collect();
        let list: Vec<(usize, &SampleRow)> = list.iter().map(|(row, r)| (*row, r)).collect();
        let (mut logits, mut expected_logits) = (Vec::new(), Vec::new());
        let ours = self.cuda.sample(&narrow, head, &list, &mut logits)?;
        let theirs = self.cpu.sample(&x, cpu_head, &list, &mut expected_logits)?;
        let tokens =
            |c: &crate::engine::Chosen| (c.token, c.top.iter().map(|t| t.0).collect::<Vec<_>>());
        let different = ours.iter().zip(&theirs).filter(|(a, b)| tokens(a) != tokens(b)).count();
        let case =
            format!("{rows} x {width} to {vocabulary} tokens{}", if int8 { ", int8" } else { "" });
        self.report("sampled tokens that differ", case.clone(), different as f32, 0.0);
        let get = |c: &[crate::engine::Chosen]| -> Vec<f32> {
            c.iter()
                .flat_map(|c| [c.logprob].into_iter().chain(c.top.iter().map(|t| t.1)))
                .collect()
        };
        let e = error(&get(&ours), &get(&theirs));
        self.report("log-probabilities", case.clone(), e, 1e-5);
        self.fed_tokens(&narrow, &x, (head, cpu_head), &list, case.clone())?;
        self.cuda.logits(&narrow, head, &mut logits)?;
        self.cpu.logits(&x, cpu_head, &mut expected_logits)?;
        let e = error(&logits, &expected_logits);
        self.report("logits", case, e, 3e-6 * (width as f32).sqrt());
        Ok(())
    }

    /// Choices whose tokens go on to the next embedding, and count as seen in the next choices,
    /// before the host has read them.
    fn fed_tokens(
        &mut self,
        x: &<Cuda<L> as Backend>::Buffer,
        cpu_x: &Vec<f32>,
        (head, cpu_head): (&<Cuda<L> as Backend>::Matrix, &<Cpu as Backend>::Matrix),
        list: &[(usize, &SampleRow)],
        case: String,
    ) -> Result<()> {
        let list: Vec<_> = list.iter().copied().filter(|r| self.cuda.chooses_alone(r.1)).collect();
        let width = cpu_x.len() / (1 + list.iter().map(|r| r.0).max().unwrap_or(0));
        let (norm, cpu_norm) = self.norm(width)?;
        let first = self.cuda.start_sample(x, head, &list)?;
        let mut batch = Batch::default();
        for i in 0..list.len() {
            batch.push(&[0], 0, &[0]);
            batch.fed.push((i, i));
        }
        let (mut pass, mut out, mut expected, mut scratch) = Default::default();
        self.cuda.begin(&batch, &mut pass);
        self.cuda.embed_norm(&batch, &pass, head, &norm, EPS, &mut out);
        let next: Vec<SampleRow> = (0..list.len())
            .map(|i| SampleRow { fed: Some(i), position: 500, ..*list[i].1 })
            .collect();
        let next: Vec<_> = list.iter().zip(&next).map(|(r, n)| (r.0, n)).collect();
        let second = self.cuda.start_sample(x, head, &next)?;
        let (first, second) = (self.cuda.finish_sample(first)?, self.cuda.finish_sample(second)?);
        batch.ids = first.iter().map(|c| c.token).collect();
        self.cpu.embed_norm(&batch, &(), cpu_head, &cpu_norm, EPS, &mut expected);
        let e = error(&self.cuda.download(&out, width)?, &expected);
        self.report("embedding of fed tokens", case.clone(), e, 1e-5);
        let seen: Vec<Vec<u32>> = next
            .iter()
            .zip(&batch.ids)
            .map(|((_, r), token)| {
                r.seen.iter().copied().filter(|t| t != token).chain([*token]).collect()
            })
            .collect();
        let known: Vec<SampleRow> = next
            .iter()
            .zip(&seen)
            .map(|((_, r), seen)| SampleRow { fed: None, seen, ..**r })
            .collect();
        let known: Vec<_> = next.iter().zip(&known).map(|(r, k)| (r.0, k)).collect();
        let theirs = self.cpu.sample(cpu_x, cpu_head, &known, &mut scratch)?;
        let different = second.iter().zip(&theirs).filter(|(a, b)| a.token != b.token).count();
        self.report("tokens after fed ones that differ", case, different as f32, 0.0);
        Ok(())
    }
}

/// Which of the settings takes of the likely tokens those that make up most.
const RANKED: usize = 4;

/// Ways to sample that differ in what they need.
fn sampling_settings(vocabulary: usize) -> [Sampling; 11] {
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
