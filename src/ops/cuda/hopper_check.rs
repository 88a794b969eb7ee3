//! Whether the kernels with Hopper's own instructions (TMA, wgmma, clusters) do on this GPU what
//! the others do: tried on small problems before a model uses them.
//!
//! The problems are small but reach what goes wrong in such kernels: rings of stages that wrap
//! within a tile and from tile to tile, blocks that take several tiles, clusters of every size,
//! inputs that are no multiple of a slice, tokens and outputs that fill no tile, every epilogue,
//! prompts of many steps, and launches that begin before the ones that they depend on have ended.
//!
//! On a GPU with 132 multiprocessors these kernels do 30 GFLOP and the others 15, well under a
//! millisecond of work. What takes time are the copies, 0.2 GB, and making and comparing as many
//! numbers on the host, most of them for [`Check::turns`], which needs more tiles than there are
//! multiprocessors; and the launches of the chain, 41 of a few microseconds, [`CHAIN_RUNS`] times.
//! Together that is less than half a second by estimate.

use super::compare::{max_error, row_error};
use super::gemm_select::{
    HOPPER_M, HOPPER_N, LinearKernel, SLICE, TOKENS as SKINNY_TOKENS, tile_tokens,
};
use super::lm_head::{LmHead, moments_blocks};
use super::{Cache, Cuda, DeviceBatch, DeviceWeight};
use crate::device::{Launcher, Memory};
use crate::error::{Error, Result};
use crate::ops::sampling::{Sampling, SamplingRow};
use crate::ops::{
    BLOCK, Backend, Batch, DecodeBackend, DecoderActivations, DecoderLayer, Epilogue, Heads,
    LayerNorm, Linear, Tensor, Weight as _,
};
use crate::random::PhiloxStream;
use crate::tensor::{Bytes, DType, HostTensor};
use std::sync::Arc;

/// Runs of the chain of dependent launches on a GPU, where a fault may need luck to show.
pub const CHAIN_RUNS: usize = 50;
/// Layers of the chain: with eight launches each and the first norm it has 41.
const CHAIN_LAYERS: usize = 5;

/// Nine slices and a quarter: more than twice round every ring.
const INPUTS: usize = 9 * SLICE + 16;
/// Five slices and a quarter: rings of three and four stages wrap, and begin each tile elsewhere.
const FEW_INPUTS: usize = 5 * SLICE + 16;
/// Each of eight blocks has five slices or six, more than a ring has stages.
const MANY_INPUTS: usize = 40 * SLICE + 16;

/// Largest difference of results in f32, over the largest magnitude: only the order of sums
/// differs. A product that is left out is more.
const SUMS: f32 = 1e-3;
/// The same of results in 16 bits, which are rounded in both.
const ROUNDED: f32 = 0.02;
/// Largest RMS of differences in a row, over the row's RMS, where results of 16 bits are read
/// again.
const ROWS: f32 = 0.02;

/// An epilogue, with what it adds.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Bias,
    Gelu,
    Residual,
    HalfResidual,
}
use Mode::{Bias, Gelu, HalfResidual, Residual};

/// Tokens, outputs and inputs of a GEMM.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    outputs: usize,
    inputs: usize,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} tokens of {} inputs to {} outputs", self.tokens, self.inputs, self.outputs)
    }
}

/// A kernel of clusters that divide the inputs.
const fn cluster(tokens: usize, blocks: usize) -> LinearKernel {
    LinearKernel::Cluster { tokens, blocks }
}

const fn shape(tokens: usize, outputs: usize, inputs: usize) -> Shape {
    Shape { tokens, outputs, inputs }
}

/// GEMMs, the kernels that do them, and their epilogues. Odd tokens and outputs everywhere; widths
/// that are no multiple of 8 are written in pairs, others in eights.
const GEMMS: [(Shape, &[LinearKernel], &[Mode]); 5] = [
    (
        shape(61, 301, INPUTS),
        &[cluster(64, 1), cluster(64, 2), cluster(64, 4), cluster(64, 8), LinearKernel::Hopper],
        &[Bias, HalfResidual],
    ),
    (
        shape(61, 312, INPUTS),
        &[cluster(64, 8), LinearKernel::Hopper],
        &[Bias, Gelu, Residual, HalfResidual],
    ),
    (
        shape(133, 136, INPUTS),
        &[cluster(128, 1), cluster(128, 2), cluster(128, 8), LinearKernel::Hopper],
        &[Gelu, Residual],
    ),
    (shape(45, 117, MANY_INPUTS), &[cluster(64, 4), cluster(64, 8)], &[Bias]),
    (shape(71, 120, MANY_INPUTS), &[cluster(128, 4), cluster(128, 8)], &[Bias]),
];

/// Tries the kernels of Hopper and collects what comes out wrong.
struct Check<'a, L: Launcher> {
    cuda: &'a Cuda<L>,
    words: PhiloxStream,
    wrong: Vec<String>,
}

impl<L: Launcher> Cuda<L> {
    /// Tries the kernels that Hopper alone has, if they are to be used, and compares them with
    /// those that every GPU has. If results differ it leaves them alone from then on, and returns a
    /// line for each result that does: kernel, problem, and largest difference. `head_size` is the
    /// model's, `chain_runs` how often a chain of launches that depend on each other is repeated:
    /// [`CHAIN_RUNS`] times on a GPU.
    ///
    /// # Errors
    /// When a kernel fails: the device can do nothing more in this process then.
    pub fn try_hopper(&self, head_size: usize, chain_runs: usize) -> Result<Vec<String>> {
        // batch-invariant GEMMs and attention are never Hopper's
        if !self.hopper() || self.batch_invariant {
            return Ok(vec![]);
        }
        let mut check = Check { cuda: self, words: PhiloxStream::new(1, 3), wrong: Vec::new() };
        check.all(head_size, chain_runs).map_err(|e| match e {
            Error::Cuda(what) => Error::Cuda(format!(
                "{what}, in the kernels with Hopper's own instructions; BPROMPT_HOPPER=0 goes \
                without them"
            )),
            other => other,
        })?;
        let wrong = check.wrong;
        self.without_hopper.set(!wrong.is_empty());
        Ok(wrong)
    }

    /// A kernel's name, and how it is launched.
    fn kernel_name(&self, by: LinearKernel) -> String {
        let half = self.suffix();
        match by {
            LinearKernel::Skinny => format!("linear_skinny_{half}"),
            LinearKernel::Large => format!("linear_large_{half}"),
            LinearKernel::Hopper => format!("linear_hopper_{half}"),
            LinearKernel::Cluster { tokens, blocks } => {
                format!("linear_cluster_{half}_{tokens} in clusters of {blocks}")
            }
        }
    }
}

/// The kernel of every GPU for so many tokens.
fn portable(tokens: usize) -> LinearKernel {
    if tokens <= SKINNY_TOKENS { LinearKernel::Skinny } else { LinearKernel::Large }
}

impl<L: Launcher> Check<'_, L> {
    fn all(&mut self, head_size: usize, chain_runs: usize) -> Result<()> {
        for (shape, kernels, modes) in GEMMS {
            self.gemm(shape, kernels, modes)?;
        }
        self.turns()?;
        for (tokens, kernels) in [
            (61, [cluster(64, 8), LinearKernel::Hopper]),
            (133, [cluster(128, 4), LinearKernel::Hopper]),
        ] {
            self.qkv(tokens, head_size, kernels)?;
        }
        for tokens in [61, 133] {
            self.lm_head(tokens)?;
        }
        self.attention(head_size)?;
        self.chain(head_size, chain_runs)
    }

    /// Remembers an error that is larger than what is allowed.
    fn judge(&mut self, kernel: &str, problem: &str, error: f32, allowed: f32) {
        tracing::debug!("{kernel}, {problem}: {error:.2e} of {allowed:e}");
        if error > allowed {
            self.wrong.push(format!(
                "{kernel}, {problem}: a difference of {error:.2e} to the kernels of every GPU, \
                expected at most {allowed:e}"
            ));
        }
    }

    /// Numbers in (-1, 1). Large matrices repeat a prime number of them: their rows differ, and
    /// making them takes less time than copying them.
    fn noise(&mut self, n: usize) -> Vec<f32> {
        const PERIOD: usize = 65_521;
        let mut noise: Vec<f32> =
            (0..n.min(PERIOD)).map(|_| 2.0 * self.words.uniform() - 1.0).collect();
        while noise.len() < n {
            noise.extend_from_within(..PERIOD.min(n - noise.len()));
        }
        noise
    }

    fn rows(&mut self, rows: usize, width: usize, dtype: DType) -> Result<Tensor<Cuda<L>>> {
        let noise = self.noise(rows * width);
        self.cuda.upload(&noise, width, dtype)
    }

    fn matrix(&mut self, outputs: usize, inputs: usize) -> Result<DeviceWeight<L>> {
        let noise = self.noise(outputs * inputs);
        self.cuda.weight(HostTensor::of_rows(&noise, inputs), None)
    }

    fn linear(&mut self, outputs: usize, inputs: usize) -> Result<Linear<Cuda<L>>> {
        let weight = self.matrix(outputs, inputs)?;
        let bias = self.cuda.vector(&HostTensor::of_rows(&self.noise(outputs), outputs))?;
        Ok(Linear { weight, bias })
    }

    /// A layer norm after which a GEMM's results are about one.
    fn norm(&mut self, width: usize) -> Result<LayerNorm<Cuda<L>>> {
        let scale = 2.0 / (width as f32).sqrt();
        let mut vector = || {
            let small: Vec<f32> = self.noise(width).iter().map(|v| v * scale).collect();
            self.cuda.vector(&HostTensor::of_rows(&small, width))
        };
        Ok(LayerNorm { weight: vector()?, bias: vector()?, eps: 1e-5 })
    }

    /// Room for results of a shape that holds no results yet: those of another kernel must not pass
    /// for this one's.
    fn blank(&self, y: &mut Tensor<Cuda<L>>, shape: [usize; 2]) -> Result<()> {
        self.cuda.reserve(y, shape, DType::F32)?;
        self.cuda.launcher.zero(y.at(), shape[0] * shape[1] * 4)
    }

    /// Elements of the 16-bit type.
    fn read_halves(&self, at: u64, count: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; count * 2];
        self.cuda.launcher.read(at, &mut bytes)?;
        let range = 0..bytes.len();
        let bytes = Bytes::Owned(Arc::new(bytes), range);
        Ok(HostTensor { dtype: self.cuda.half, shape: vec![count], bytes }.to_f32())
    }

    /// A GEMM by some kernels, with some epilogues.
    fn gemm(&mut self, shape: Shape, kernels: &[LinearKernel], modes: &[Mode]) -> Result<()> {
        let Shape { tokens, outputs, inputs } = shape;
        let linear = self.linear(outputs, inputs)?;
        let x = self.rows(tokens, inputs, self.cuda.half)?;
        let mut out = Tensor::default();
        for &mode in modes {
            let residual = match mode {
                Residual => self.rows(tokens, outputs, DType::F32)?,
                HalfResidual => self.rows(tokens, outputs, self.cuda.half)?,
                Bias | Gelu => Tensor::default(),
            };
            let mut by = |by| -> Result<Vec<f32>> {
                let epilogue = match mode {
                    Bias => Epilogue::Bias,
                    Gelu => Epilogue::BiasGelu,
                    Residual | HalfResidual => Epilogue::BiasResidual(&residual),
                };
                self.blank(&mut out, [tokens, outputs])?;
                self.cuda.launch_linear_by(by, &mut out, &x, &linear, epilogue)?;
                self.cuda.download(&out)
            };
            let theirs = by(portable(tokens))?;
            let ours: Vec<Vec<f32>> = kernels.iter().map(|k| by(*k)).collect::<Result<_>>()?;
            let allowed = if matches!(mode, Gelu) { ROUNDED } else { SUMS };
            for (kernel, ours) in kernels.iter().zip(ours) {
                let name = self.cuda.kernel_name(*kernel);
                let problem = format!("{shape}, {mode:?}");
                self.judge(&name, &problem, max_error(&ours, &theirs), allowed);
            }
        }
        Ok(())
    }

    /// More tiles than blocks at a time: every block takes two, and half of them a third, in
    /// clusters of two and alone. Results of all but the last one are written meanwhile.
    fn turns(&mut self) -> Result<()> {
        let processors = self.cuda.launcher.limits().processors as usize;
        let wanted = |blocks: usize| (5 * blocks.max(1)).div_ceil(2);
        let pairs = wanted(processors / 2).isqrt();
        // an odd number of rows of at most 8 has no second block
        let alone = (wanted(processors).isqrt().min(8) - 1) | 1;
        for (rows, tiles, modes) in [
            (2 * pairs, 2 * wanted(processors / 2), [Gelu]),
            (alone, wanted(processors), [HalfResidual]),
        ] {
            // neither fills its last tile
            let tokens = rows * HOPPER_M - 59;
            let outputs = tiles.div_ceil(rows) * HOPPER_N - 120;
            self.gemm(shape(tokens, outputs, FEW_INPUTS), &[LinearKernel::Hopper], &modes)?;
        }
        Ok(())
    }

    /// Queries, and keys and values in the cache, of two sequences whose blocks are in no order.
    fn qkv(&mut self, tokens: usize, head_size: usize, kernels: [LinearKernel; 2]) -> Result<()> {
        let heads = Heads { count: 2, size: head_size, slopes: vec![0.5; 2] };
        let shape = shape(tokens, 3 * heads.width(), 2 * SLICE + 16);
        let qkv = self.linear(shape.outputs, shape.inputs)?;
        let x = self.rows(tokens, shape.inputs, self.cuda.half)?;
        let blocks: Vec<u32> = (0..tokens.div_ceil(BLOCK) as u32 + 2).rev().collect();
        let mut batch = Batch::default();
        batch.push(&[0; 21], 3, &blocks[..2]);
        batch.push(&vec![0; tokens - 21], 0, &blocks[2..]);
        let mut on_device = DeviceBatch::default();
        self.cuda.upload_batch(&batch, &mut on_device);
        let mut queries = Tensor::default();
        let mut by = |by| -> Result<[Vec<f32>; 2]> {
            let cache = self.cuda.cache(self.cuda.half, 1, &heads, blocks.len())?;
            self.blank(&mut queries, [tokens, heads.width()])?;
            self.cuda.launch_qkv_by(by, &mut queries, (&x, &qkv), &on_device, (&cache, 0))?;
            let cached = self.read_halves(cache.memory.at, cache.memory.bytes / 2)?;
            Ok([self.cuda.download(&queries)?, cached])
        };
        let theirs = by(portable(tokens))?;
        let ours = [by(kernels[0])?, by(kernels[1])?];
        for (kernel, ours) in kernels.iter().zip(ours) {
            let name = self.cuda.kernel_name(*kernel);
            for (what, ours, theirs) in
                [("queries", &ours[0], &theirs[0]), ("keys and values", &ours[1], &theirs[1])]
            {
                let problem = format!("{shape}, {what} of heads of {head_size}");
                self.judge(&name, &problem, max_error(ours, theirs), ROUNDED);
            }
        }
        Ok(())
    }

    /// Logits with their softmax statistics, and sampled tokens.
    fn lm_head(&mut self, tokens: usize) -> Result<()> {
        let shape = shape(tokens, 301, INPUTS);
        let weight = self.matrix(shape.outputs, shape.inputs)?;
        let x = self.rows(tokens, shape.inputs, self.cuda.half)?;
        let kernel =
            |family| format!("{family}_hopper_{}_{}", self.cuda.suffix(), tile_tokens(tokens));
        let names = [kernel("lm_head_logits"), kernel("lm_head_sample")];
        let (ours, theirs) = (
            self.logits_by(LinearKernel::Hopper, &x, &weight)?,
            self.logits_by(portable(tokens), &x, &weight)?,
        );
        for (i, what) in ["logits", "softmax statistics"].into_iter().enumerate() {
            let error = max_error(&ours[i], &theirs[i]);
            self.judge(&names[0], &format!("{shape}, {what}"), error, SUMS);
        }
        let (ours, theirs) = (self.sampled(false, &x, &weight)?, self.sampled(true, &x, &weight)?);
        let same = ours.iter().zip(&theirs).filter(|(a, b)| a.0 == b.0);
        let (a, b): (Vec<f32>, Vec<f32>) = same.map(|(a, b)| (a.1, b.1)).unzip();
        let error = max_error(&a, &b);
        self.judge(&names[1], &format!("{shape}, log-probabilities"), error, SUMS);
        // logits that are nearly the same may be in another order
        let differ = (ours.len() - a.len()) as f32 / ours.len() as f32;
        self.judge(&names[1], &format!("{shape}, part of the tokens that differ"), differ, 0.0625);
        Ok(())
    }

    fn logits_by(
        &self,
        by: LinearKernel,
        x: &Tensor<Cuda<L>>,
        weight: &DeviceWeight<L>,
    ) -> Result<[Vec<f32>; 2]> {
        let (tokens, outputs, groups) =
            (x.shape()[0], weight.rows(), 2 * moments_blocks(weight.rows()));
        let launcher = &self.cuda.launcher;
        let logits = Memory::zeroed(launcher, tokens * outputs * 4)?;
        let statistics = Memory::zeroed(launcher, tokens * groups * 4)?;
        let lm_head = LmHead { x, rows: 0..tokens, weight };
        self.cuda.launch_lm_head_by(by, "lm_head_logits", lm_head, |args| {
            args.with(logits.at).with(statistics.at)
        })?;
        let read = |memory: &Memory<L>, count: usize| -> Result<Vec<f32>> {
            let mut numbers = vec![0.0; count];
            launcher.read(memory.at, bytemuck::cast_slice_mut(&mut numbers))?;
            Ok(numbers)
        };
        Ok([read(&logits, tokens * outputs)?, read(&statistics, tokens * groups)?])
    }

    /// A token of each row with its log-probability: the most likely one, one by chance, and one
    /// that is given, in turn.
    fn sampled(
        &self,
        without: bool,
        x: &Tensor<Cuda<L>>,
        weight: &DeviceWeight<L>,
    ) -> Result<Vec<(u32, f32)>> {
        let greedy = Sampling::default();
        let warm = Sampling { temperature: 1.5, seed: 5, repetition_penalty: 1.2, ..greedy };
        let seen: Vec<u32> = (0..weight.rows() as u32).step_by(7).collect();
        let rows: Vec<(usize, SamplingRow)> = (0..x.shape()[0])
            .map(|i| {
                let sampling = if i % 3 == 0 { &greedy } else { &warm };
                let row = SamplingRow { seen: &seen, ..SamplingRow::new(i, sampling, 0, 9) };
                let forced = (i % 3 == 2).then_some(i as u32);
                (i, SamplingRow { forced, ..row })
            })
            .collect();
        let rows: Vec<(usize, &SamplingRow)> = rows.iter().map(|(i, r)| (*i, r)).collect();
        self.cuda.without_hopper.set(without);
        let tokens = self.cuda.sample_now(x, weight, &rows, &mut Vec::new());
        self.cuda.without_hopper.set(false);
        Ok(tokens?.iter().map(|t| (t.token, t.logprob)).collect())
    }

    /// A prompt, and the next part of it up to position 721: twelve steps, three times round the
    /// ring. Keys, values and queries are made, so that every position counts.
    fn attention(&mut self, size: usize) -> Result<()> {
        const LENGTHS: [usize; 2] = [70, 651];
        // one head looks far back
        let heads = Heads { count: 2, size, slopes: vec![0.5, 1.0 / 512.0] };
        let width = heads.width();
        let blocks: Vec<u32> =
            (0..LENGTHS.iter().sum::<usize>().div_ceil(BLOCK) as u32).rev().collect();
        let cache = self.cuda.cache(self.cuda.half, 1, &heads, blocks.len())?;
        let noise = self.noise(cache.memory.bytes / 2);
        let halves = super::weights::to_half(&noise, self.cuda.half);
        self.cuda.launcher.write(cache.memory.at, &halves)?;
        let mut start = 0;
        for length in LENGTHS {
            let mut batch = Batch::default();
            batch.push(&vec![0; length], start, &blocks);
            // scores of about one
            let queries: Vec<f32> = self.noise(length * width).iter().map(|v| 3.0 * v).collect();
            let queries = self.cuda.upload(&queries, width, self.cuda.half)?;
            let [theirs, ours] = [true, false].map(|without| -> Result<Vec<f32>> {
                let (mut on_device, mut out) = (DeviceBatch::default(), Tensor::default());
                self.blank(&mut out, [length, width])?;
                self.cuda.without_hopper.set(without);
                self.cuda.upload_batch(&batch, &mut on_device);
                let done = self.cuda.attend(&mut out, &queries, &on_device, (&cache, 0));
                self.cuda.without_hopper.set(false);
                done?;
                self.cuda.download(&out)
            });
            let name = format!("attention_hopper_{}_{size}", self.cuda.suffix());
            let problem = format!("{length} positions after {start}");
            self.judge(&name, &problem, row_error(&ours?, &theirs?, size), ROWS);
            start += length;
        }
        Ok(())
    }
}

/// How the launches of a chain are done.
#[derive(Clone, Copy, PartialEq)]
enum How {
    /// By the kernels of every GPU.
    Portable,
    /// Each is waited for.
    Awaited,
    /// One after the other, as a forward pass does them.
    Chained,
}

/// A decoder's layer that is applied several times, on two batches of rows in turn: what a kernel
/// reads before it is written is the other batch's, or the layer's before.
struct Chain<L: Launcher> {
    layer: DecoderLayer<Cuda<L>>,
    cache: Cache<L>,
    batch: Batch,
    inputs: [Tensor<Cuda<L>>; 2],
    a: DecoderActivations<Cuda<L>>,
}

/// The largest cluster of at most so many blocks that has a slice for each.
fn divided(inputs: usize, blocks: usize) -> LinearKernel {
    let most = inputs.div_ceil(SLICE).min(blocks);
    cluster(64, (most + 1).next_power_of_two() / 2)
}

impl<L: Launcher> Check<'_, L> {
    /// Launches that depend on each other, none of which the host waits for, give the bits of
    /// launches that it waits for; and these are close to those of the kernels of every GPU.
    fn chain(&mut self, head_size: usize, runs: usize) -> Result<()> {
        let mut chain = self.make_chain(head_size)?;
        let read = |a: &DecoderActivations<Cuda<L>>| self.cuda.download(&a.x);
        self.run_chain(&mut chain, 0, How::Portable)?;
        let portable = read(&chain.a)?;
        let mut expected = Vec::new();
        for input in 0..2 {
            self.run_chain(&mut chain, input, How::Awaited)?;
            expected.push(read(&chain.a)?);
        }
        let mut worst = (0, 0, 0.0);
        let mut pending = None;
        // the copy of one run is waited for when the next one has been launched
        for run in 0..=runs {
            let next = if run < runs {
                self.run_chain(&mut chain, run % 2, How::Chained)?;
                let bytes = expected[0].len() * 4;
                Some((run % 2, self.cuda.launcher.read_later(chain.a.x.at(), bytes)?))
            } else {
                None
            };
            if let Some((input, copy)) = std::mem::replace(&mut pending, next) {
                let bytes = self.cuda.launcher.finish_read(copy)?;
                let expected: &Vec<f32> = &expected[input];
                if bytes != bytemuck::cast_slice::<f32, u8>(expected) {
                    let found: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
                    worst = (worst.0 + 1, run, max_error(&found, expected).max(worst.2));
                }
            }
        }
        let half = self.cuda.suffix();
        let name = format!(
            "linear_cluster_{half}_64, linear_hopper_{half} and attention_hopper_{half}_{head_size}"
        );
        let problem = format!("a chain of {} launches", 1 + 8 * CHAIN_LAYERS);
        let width = chain.a.x.shape()[1];
        self.judge(&name, &problem, row_error(&expected[0], &portable, width), ROWS);
        if worst.0 > 0 {
            self.wrong.push(format!(
                "{name}, {problem} that the host does not wait for: {} of {runs} runs, run {} the \
                last, have other bits than launches that it waits for, a difference of up to \
                {:.2e}, expected the same bits",
                worst.0, worst.1, worst.2
            ));
        }
        Ok(())
    }

    /// A prompt's part and fourteen sequences that go on by a token each: 41 tokens.
    fn make_chain(&mut self, head_size: usize) -> Result<Chain<L>> {
        let count = 288usize.div_ceil(head_size) | 1;
        let slopes = (0..count).map(|h| 0.5 / (1 + h) as f32).collect();
        let heads = Heads { count, size: head_size, slopes };
        let (width, wide) = (heads.width(), INPUTS);
        let mut batch = Batch::default();
        batch.push(&[0; 27], 40, &[0, 1, 2, 3, 4]);
        (0..14).for_each(|i| batch.push(&[0], i as usize, &[5 + i]));
        let tokens = batch.ids.len();
        Ok(Chain {
            layer: DecoderLayer {
                input_norm: self.norm(width)?,
                qkv: self.linear(3 * width, width)?,
                dense: self.linear(width, width)?,
                post_norm: self.norm(width)?,
                up: self.linear(wide, width)?,
                down: self.linear(width, wide)?,
            },
            cache: self.cuda.cache(self.cuda.half, 1, &heads, 19)?,
            batch,
            inputs: [self.rows(tokens, width, DType::F32)?, self.rows(tokens, width, DType::F32)?],
            a: DecoderActivations::default(),
        })
    }

    fn run_chain(&self, chain: &mut Chain<L>, input: usize, how: How) -> Result<()> {
        let Chain { layer, cache, batch, inputs, a } = chain;
        let cuda = self.cuda;
        let kernel = |hopper| if how == How::Portable { LinearKernel::Skinny } else { hopper };
        let settle = |x: &Tensor<Cuda<L>>| match how {
            How::Awaited => cuda.launcher.read(x.at(), &mut [0; 4]),
            How::Portable | How::Chained => Ok(()),
        };
        cuda.without_hopper.set(how == How::Portable);
        // the chained runs go on with what the awaited ones have uploaded
        if how != How::Chained {
            cuda.upload_batch(batch, &mut a.batch);
        }
        let (width, tokens) = (inputs[input].shape()[1], batch.ids.len());
        cuda.launch_layer_norm(&mut a.normed, &inputs[input], (0, tokens), &layer.input_norm)?;
        settle(&a.normed)?;
        for i in 0..CHAIN_LAYERS {
            let (by, cache) = (kernel(divided(width, 4)), (&*cache, 0));
            cuda.launch_qkv_by(by, &mut a.queries, (&a.normed, &layer.qkv), &a.batch, cache)?;
            settle(&a.queries)?;
            cuda.attend(&mut a.attention, &a.queries, &a.batch, cache)?;
            settle(&a.attention)?;
            let before = Epilogue::BiasResidual(if i == 0 { &inputs[input] } else { &a.x });
            let (by, dense) = (kernel(divided(width, 8)), (&a.attention, &layer.dense));
            let next = (&layer.post_norm, &mut a.normed);
            cuda.linear_and_norm_by(by, &mut a.x2, dense, before, next)?;
            settle(&a.x2)?;
            let by = kernel(LinearKernel::Hopper);
            cuda.launch_linear_by(by, &mut a.wide, &a.normed, &layer.up, Epilogue::BiasGelu)?;
            settle(&a.wide)?;
            let (by, down) = (kernel(divided(INPUTS, 8)), (&a.wide, &layer.down));
            let next = (&layer.input_norm, &mut a.normed);
            cuda.linear_and_norm_by(by, &mut a.x, down, Epilogue::BiasResidual(&a.x2), next)?;
            settle(&a.x)?;
        }
        cuda.without_hopper.set(false);
        Ok(())
    }
}

impl<L: Launcher> Cuda<L> {
    /// A linear layer and the norm behind it.
    fn linear_and_norm_by(
        &self,
        by: LinearKernel,
        y: &mut Tensor<Self>,
        of: (&Tensor<Self>, &Linear<Self>),
        epilogue: Epilogue<Self>,
        (norm, normed): (&LayerNorm<Self>, &mut Tensor<Self>),
    ) -> Result<()> {
        self.launch_linear_by(by, y, of.0, of.1, epilogue)?;
        self.launch_layer_norm(normed, y, (0, of.0.shape()[0]), norm)
    }
}
