//! Training's operations: the same numbers through both backends.

use super::{EPS, Test, error};
use crate::device::Launcher;
use crate::error::Result;
use crate::models::bloom::alibi_slopes;
use crate::ops::cpu::Cpu;
use crate::ops::cuda::{Cuda, Flat};
use crate::ops::scalar_loss::{ClippedValue, ScalarLoss};
use crate::ops::token_loss::{ClippedPpo, LossGradients, LossOutput, TokenLoss, TokenStats};
use crate::ops::train::{
    AdamWBuffers, AdamWStep, AttentionOutput, LinearBackward, NormBackward, NormOutput,
    OptimizerGroup, Params, Precision, ProjectionBackward, TrainBackend,
};
use crate::ops::{Affine, Heads, Projection, Tensor};
use crate::tensor::DType;
use std::ops::Range;

/// What is tried of training.
#[derive(Clone, Debug, Default)]
pub struct TrainShapes {
    /// `(tokens, outputs, inputs)` of linear layers, outputs multiples of 8, inputs of 16.
    pub linears: Vec<[usize; 3]>,
    /// Heads and head sizes of attention.
    pub heads: Vec<(usize, usize)>,
    /// Lengths of packed sequences.
    pub lengths: Vec<usize>,
    /// `(labels, vocabulary, width)` of LM heads.
    pub lm_heads: Vec<[usize; 3]>,
}

/// The same numbers on the device and in the CPU's memory.
type Tensors<L> = (Tensor<Cuda<L>>, Tensor<Cpu>);
/// The same parameters, gradients or moments.
type Flats<L> = (Flat<L>, Vec<f32>);

/// What losses at the LM head are tried with on one backend.
struct Labels<'a, B: TrainBackend> {
    b: &'a B,
    x: Tensor<B>,
    targets: &'a [u32],
    p: Params<'a, B::Flat>,
    lm_head: &'a Range<usize>,
    /// Numbers in (-1, 1), two for each label.
    noise: &'a [f32],
}

/// What comes of a loss.
struct Losses<B: TrainBackend> {
    sum: f64,
    stats: TokenStats<B>,
    dx: Tensor<B>,
    grads: B::Flat,
}

impl<B: TrainBackend> Labels<'_, B> {
    fn losses(&self, loss: &TokenLoss<B>) -> Result<Losses<B>> {
        let (mut dx, mut logits, mut stats) = Default::default();
        let (mut grads, mut sums) = (self.b.zeros(self.lm_head.len())?, self.b.new_sums()?);
        let gradients = Some(LossGradients { dx: &mut dx, grads: Some(&mut grads) });
        let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients };
        let x = (&self.x, &mut logits);
        self.b.lm_head_loss(x, self.targets, (self.p, self.lm_head), loss, to);
        Ok(Losses { sum: self.b.sums(&sums)?.loss, stats, dx, grads })
    }

    fn column(&self, values: impl Iterator<Item = f32>) -> Result<Tensor<B>> {
        let mut column = Tensor::default();
        self.b.upload_column(&mut column, &values.collect::<Vec<f32>>())?;
        Ok(column)
    }

    /// Every kind of loss. Ratios of probabilities are the same on all backends, so that they
    /// clip the same labels.
    fn all(&self) -> Result<[Losses<B>; 3]> {
        let cross_entropy = self.losses(&TokenLoss::CrossEntropy { scale: 0.25 })?;
        let log_probs = self.b.download_column(&cross_entropy.stats.log_probs)?;
        let offsets = [0.5, -0.5, 0.05, -0.05].into_iter().cycle();
        let old = self.column(log_probs.iter().zip(offsets).map(|(l, o)| l + o))?;
        let (some, others) = self.noise.split_at(log_probs.len());
        let reference = self.column(log_probs.iter().zip(others).map(|(l, o)| l + o))?;
        let some = self.column(some.iter().copied())?;
        let others = self.column(others.iter().copied())?;
        let ppo = ClippedPpo {
            old_log_probs: &old,
            advantages: &some,
            reference_log_probs: Some(&reference),
            clip: 0.2,
            kl: 0.3,
            entropy: 0.1,
            scale: 0.25,
        };
        let given = TokenLoss::Given { log_probs: &some, entropies: Some(&others) };
        Ok([cross_entropy, self.losses(&TokenLoss::ClippedPpo(ppo))?, self.losses(&given)?])
    }
}

/// Two parameters, one behind the other.
fn affine(weight: usize, bias: usize) -> Affine<Range<usize>> {
    Affine { weight: 0..weight, bias: weight..weight + bias }
}

impl<L: Launcher> Test<'_, L> {
    pub(super) fn train(&mut self, shapes: &TrainShapes) -> Result<()> {
        for &[tokens, outputs, inputs] in &shapes.linears {
            self.train_linear(tokens, outputs, inputs)?;
            self.train_rows(tokens, inputs)?;
            self.train_norm(tokens, inputs)?;
            self.train_head(tokens, inputs)?;
        }
        for &(count, size) in &shapes.heads {
            self.train_attention(count, size, &shapes.lengths)?;
        }
        for &[labels, vocabulary, width] in &shapes.lm_heads {
            self.train_loss(labels, vocabulary, width)?;
            self.train_step(vocabulary * width)?;
        }
        Ok(())
    }

    fn tensors(&mut self, rows: usize, width: usize, dtype: DType) -> Result<Tensors<L>> {
        let x = self.noise(rows * width);
        Ok((self.cuda.upload(&x, width, dtype)?, self.cpu.upload(&x, width)))
    }

    /// Parameters in (-1, 1), of which there are a multiple of 8.
    fn parameters(&mut self, count: usize) -> Result<Flats<L>> {
        let values = self.noise(count.next_multiple_of(8));
        Ok((self.cuda.parameters(values.clone())?, values))
    }

    /// Gradients that are there before something is added to them.
    fn gradients(&mut self, count: usize) -> Result<Flats<L>> {
        let values = self.noise(count.next_multiple_of(8));
        let mut ours = self.cuda.zeros(values.len())?;
        self.cuda.set_values(&mut ours, &values)?;
        Ok((ours, values))
    }

    fn compare(
        &mut self,
        operation: &'static str,
        case: &str,
        (ours, theirs): &Tensors<L>,
        allowed: f32,
    ) -> Result<()> {
        let e = error(&self.cuda.download(ours)?, theirs.buffer());
        self.report(operation, case.to_owned(), e, allowed);
        Ok(())
    }

    fn compare_flats(
        &mut self,
        operation: &'static str,
        case: &str,
        (ours, theirs): &Flats<L>,
        allowed: f32,
    ) -> Result<()> {
        let e = error(&self.cuda.values(ours)?, theirs);
        self.report(operation, case.to_owned(), e, allowed);
        Ok(())
    }

    /// The same terms summed in another order, in f32.
    fn sums(terms: usize) -> f32 {
        3e-6 * (terms as f32).sqrt()
    }

    fn train_linear(&mut self, tokens: usize, outputs: usize, inputs: usize) -> Result<()> {
        let case = format!("{tokens} x {inputs} to {outputs}");
        let at = affine(outputs * inputs, outputs);
        let (values, cpu_values) = self.parameters(at.bias.end)?;
        let p = Params { values: &values, precision: Precision::Bf16 };
        let cpu_p = Params { values: &cpu_values, precision: Precision::F32 };
        let x = self.tensors(tokens, inputs, self.half)?;
        let u = self.tensors(tokens, inputs, self.half)?;
        let residual = self.tensors(tokens, outputs, DType::F32)?;
        let mut y: Tensors<L> = Default::default();
        self.cuda.linear_forward(&mut y.0, &x.0, (p, &at), None);
        self.cpu.linear_forward(&mut y.1, &x.1, (cpu_p, &at), None);
        self.compare("linear_forward", &case, &y, self.rounding())?;
        self.cuda.linear_forward(&mut y.0, &x.0, (p, &at), Some(&residual.0));
        self.cpu.linear_forward(&mut y.1, &x.1, (cpu_p, &at), Some(&residual.1));
        self.compare("linear_forward + residual", &case, &y, Self::sums(inputs))?;
        self.cuda.gelu_forward(&mut y.0, &u.0);
        self.cpu.gelu_forward(&mut y.1, &u.1);
        self.compare("gelu_forward", &case, &y, self.rounding())?;
        let mut grads = self.gradients(at.bias.end)?;
        // the gradient is in 16 bits or in f32, of the input or of what is before a GELU
        for (dtype, gelu) in [(self.half, true), (DType::F32, false)] {
            let dy = self.tensors(tokens, outputs, dtype)?;
            let ours = LinearBackward { dy: &dy.0, x: &x.0, before_gelu: gelu.then_some(&u.0) };
            let theirs = LinearBackward { dy: &dy.1, x: &x.1, before_gelu: gelu.then_some(&u.1) };
            let mut dx: Tensors<L> = Default::default();
            self.cuda.linear_backward(&mut dx.0, &mut grads.0, ours, (p, &at));
            self.cpu.linear_backward(&mut dx.1, &mut grads.1, theirs, (cpu_p, &at));
            let name = if gelu { "linear_backward + GELU" } else { "linear_backward" };
            self.compare(name, &case, &dx, self.rounding())?;
        }
        self.compare_flats("gradients of weights", &case, &grads, Self::sums(tokens))
    }

    /// Rows that are gathered, scattered, added, embedded.
    fn train_rows(&mut self, tokens: usize, width: usize) -> Result<()> {
        let case = format!("{tokens} x {width}");
        let x = self.tensors(tokens, width, self.half)?;
        let rows: Vec<usize> = (0..tokens).filter(|i| i % 3 != 1).rev().collect();
        let (mut some, mut all): (Tensors<L>, Tensors<L>) = Default::default();
        self.cuda.gather_rows(&mut some.0, &x.0, &rows);
        self.cpu.gather_rows(&mut some.1, &x.1, &rows);
        self.compare("gather_rows", &case, &some, 0.0)?;
        self.cuda.scatter_rows(&mut all.0, &some.0, &rows, tokens + 2);
        self.cpu.scatter_rows(&mut all.1, &some.1, &rows, tokens + 2);
        self.compare("scatter_rows", &case, &all, 0.0)?;
        let more = self.tensors(tokens + 2, width, DType::F32)?;
        self.cuda.add(&mut all.0, &more.0);
        self.cpu.add(&mut all.1, &more.1);
        self.compare("add", &case, &all, self.rounding())?;
        let vocabulary = 11;
        let ids: Vec<u32> = (0..tokens).map(|_| self.words.below(vocabulary) as u32).collect();
        let (table, norm) = (0..vocabulary * width, affine(width, width));
        let (values, cpu_values) = self.parameters(table.end)?;
        let p = Params { values: &values, precision: Precision::Bf16 };
        let cpu_p = Params { values: &cpu_values, precision: Precision::F32 };
        let (mut y, mut cpu_y) = (NormOutput::default(), NormOutput::default());
        let mut embedded: Tensors<L> = Default::default();
        let out = (&mut y, &mut embedded.0);
        self.cuda.embedding_norm_forward(out, &ids, (p, &table), &norm, EPS);
        let out = (&mut cpu_y, &mut embedded.1);
        self.cpu.embedding_norm_forward(out, &ids, (cpu_p, &table), &norm, EPS);
        self.compare("embedding_forward", &case, &embedded, 0.0)?;
        self.compare("embedding_norm_forward", &case, &(y.y, cpu_y.y), 1e-5)?;
        let mut grads = self.gradients(table.end)?;
        let dx = self.tensors(tokens, width, DType::F32)?;
        self.cuda.embedding_backward(&mut grads.0, &dx.0, &ids, &table);
        self.cpu.embedding_backward(&mut grads.1, &dx.1, &ids, &table);
        self.compare_flats("embedding_backward", &case, &grads, 1e-6)
    }

    /// A head that gives one number a row, its losses, and an exchange of parameters.
    fn train_head(&mut self, rows: usize, width: usize) -> Result<()> {
        let case = format!("{rows} x {width}");
        let at = Projection { weight: 0..width, bias: Some(width..width + 1) };
        let mut values = self.parameters(width + 1)?;
        let mut x = self.tensors(rows, width, self.half)?;
        self.cuda.relu(&mut x.0);
        self.cpu.relu(&mut x.1);
        self.compare("relu", &case, &x, 0.0)?;
        let more = self.tensors(rows, width, self.half)?;
        let mut sum = self.tensors(rows, width, self.half)?;
        self.cuda.add(&mut sum.0, &more.0);
        self.cpu.add(&mut sum.1, &more.1);
        self.compare("add in 16 bits", &case, &sum, self.rounding())?;
        let p = Params { values: &values.0, precision: Precision::Bf16 };
        let cpu_p = Params { values: &values.1, precision: Precision::F32 };
        let mut y: Tensors<L> = Default::default();
        self.cuda.projection_forward(&mut y.0, &x.0, (p, &at));
        self.cpu.projection_forward(&mut y.1, &x.1, (cpu_p, &at));
        self.compare("projection_forward", &case, &y, Self::sums(width))?;
        let (mut grads, dy) = (self.gradients(width + 1)?, self.tensors(rows, 1, DType::F32)?);
        for after_relu in [false, true] {
            let mut dx: Tensors<L> = Default::default();
            let ours = ProjectionBackward { dy: &dy.0, x: &x.0, after_relu };
            self.cuda.projection_backward(&mut dx.0, &mut grads.0, ours, (p, &at));
            let theirs = ProjectionBackward { dy: &dy.1, x: &x.1, after_relu };
            self.cpu.projection_backward(&mut dx.1, &mut grads.1, theirs, (cpu_p, &at));
            self.compare("projection_backward", &case, &dx, self.rounding())?;
        }
        self.compare_flats("gradients of a projection", &case, &grads, Self::sums(rows))?;
        let mut other = self.parameters(width)?;
        let first = values.1.len() - other.1.len();
        self.cuda.swap(&mut values.0, first, &mut other.0);
        self.cpu.swap(&mut values.1, first, &mut other.1);
        self.compare_flats("swap", &case, &values, 0.0)?;
        self.compare_flats("swap", &case, &other, 0.0)?;
        self.scalar_losses(rows.next_multiple_of(2), &case)
    }

    fn scalar_losses(&mut self, rows: usize, case: &str) -> Result<()> {
        let y = self.tensors(rows, 1, DType::F32)?;
        let old = self.tensors(rows, 1, DType::F32)?;
        let targets = self.tensors(rows, 1, DType::F32)?;
        let (scale, clip, coefficient) = (0.3, 0.4, 0.5);
        let clipped =
            ClippedValue { old_values: &old.0, returns: &targets.0, clip, coefficient, scale };
        let cpu_clipped =
            ClippedValue { old_values: &old.1, returns: &targets.1, clip, coefficient, scale };
        let losses = [
            ScalarLoss::Squared { targets: &targets.0, scale },
            ScalarLoss::Pairwise { scale },
            ScalarLoss::ClippedValue(clipped),
        ];
        let cpu_losses = [
            ScalarLoss::Squared { targets: &targets.1, scale },
            ScalarLoss::Pairwise { scale },
            ScalarLoss::ClippedValue(cpu_clipped),
        ];
        let names = ["squared_loss", "pairwise_loss", "clipped_value_loss"];
        for ((loss, cpu_loss), name) in losses.iter().zip(&cpu_losses).zip(names) {
            let (mut sums, mut cpu_sums) = (self.cuda.new_sums()?, self.cpu.new_sums()?);
            let mut dy: Tensors<L> = Default::default();
            // with and without gradients: the loss is there twice
            self.cuda.scalar_loss(None, &y.0, loss, &mut sums);
            self.cuda.scalar_loss(Some(&mut dy.0), &y.0, loss, &mut sums);
            self.cpu.scalar_loss(None, &y.1, cpu_loss, &mut cpu_sums);
            self.cpu.scalar_loss(Some(&mut dy.1), &y.1, cpu_loss, &mut cpu_sums);
            self.compare(name, case, &dy, 1e-6)?;
            let off = (self.cuda.sums(&sums)?.loss / cpu_sums.loss - 1.0).abs() as f32;
            self.report(name, case.to_owned(), off, 1e-6);
        }
        Ok(())
    }

    fn train_norm(&mut self, tokens: usize, width: usize) -> Result<()> {
        let case = format!("{tokens} x {width}");
        let at = affine(width, width);
        let (values, cpu_values) = self.parameters(at.bias.end)?;
        let p = Params { values: &values, precision: Precision::Bf16 };
        let cpu_p = Params { values: &cpu_values, precision: Precision::F32 };
        let x = self.tensors(tokens, width, DType::F32)?;
        let residual = self.tensors(tokens, width, DType::F32)?;
        let (mut y, mut cpu_y) = (NormOutput::default(), NormOutput::default());
        self.cuda.layer_norm_forward(&mut y, &x.0, (p, &at), EPS);
        self.cpu.layer_norm_forward(&mut cpu_y, &x.1, (cpu_p, &at), EPS);
        let e = error(&self.cuda.download(&y.y)?, cpu_y.y.buffer());
        self.report("layer_norm_forward", case.clone(), e, self.rounding());
        let mut grads = self.gradients(at.bias.end)?;
        for (dtype, residual) in [(self.half, None), (DType::F32, Some(&residual))] {
            let dy = self.tensors(tokens, width, dtype)?;
            let ours =
                NormBackward { dy: &dy.0, x: &x.0, output: &y, residual: residual.map(|r| &r.0) };
            let theirs = NormBackward {
                dy: &dy.1,
                x: &x.1,
                output: &cpu_y,
                residual: residual.map(|r| &r.1),
            };
            let mut dx: Tensors<L> = Default::default();
            self.cuda.layer_norm_backward(&mut dx.0, &mut grads.0, ours, (p, &at));
            self.cpu.layer_norm_backward(&mut dx.1, &mut grads.1, theirs, (cpu_p, &at));
            self.compare("layer_norm_backward", &case, &dx, 1e-5)?;
        }
        self.compare_flats("gradients of a norm", &case, &grads, Self::sums(tokens) + 1e-5)
    }

    fn train_attention(&mut self, count: usize, size: usize, lengths: &[usize]) -> Result<()> {
        let heads = Heads { count, size, slopes: alibi_slopes(count) };
        let mut cu_seqlens = vec![0];
        lengths.iter().for_each(|n| cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + n));
        let tokens = cu_seqlens[lengths.len()];
        let case = format!("{count} x {size}, {} sequences, {tokens} tokens", lengths.len());
        let qkv = self.tensors(tokens, 3 * heads.width(), self.half)?;
        let dy = self.tensors(tokens, heads.width(), self.half)?;
        let (mut y, mut cpu_y) = (AttentionOutput::default(), AttentionOutput::default());
        self.cuda.attention_forward(&mut y, &qkv.0, &heads, &cu_seqlens);
        self.cpu.attention_forward(&mut cpu_y, &qkv.1, &heads, &cu_seqlens);
        // probabilities and the result are rounded
        let e = error(&self.cuda.download(&y.y)?, cpu_y.y.buffer());
        self.report("attention_forward", case.clone(), e, 2.0 * self.rounding());
        let e = error(&self.cuda.download(&y.lse)?, cpu_y.lse.buffer());
        self.report("log-sum-exp", case.clone(), e, 1e-5);
        let mut dqkv: Tensors<L> = Default::default();
        self.cuda.attention_backward(&mut dqkv.0, &dy.0, (&qkv.0, &y), &heads, &cu_seqlens);
        let forward = (&qkv.1, &cpu_y);
        self.cpu.attention_backward(&mut dqkv.1, &dy.1, forward, &heads, &cu_seqlens);
        // and so are the gradients of scores
        self.compare("attention_backward", &case, &dqkv, 3.0 * self.rounding())
    }

    fn train_loss(&mut self, labels: usize, vocabulary: usize, width: usize) -> Result<()> {
        let case = format!("{labels} x {width} to {vocabulary} tokens");
        let table = 0..vocabulary * width;
        let (values, cpu_values) = self.parameters(table.end)?;
        let p = Params { values: &values, precision: Precision::Bf16 };
        let cpu_p = Params { values: &cpu_values, precision: Precision::F32 };
        // logits of a few units; a power of two keeps the numbers exact
        let scale = (4.0 / (width as f32).sqrt()).log2().round().exp2();
        let x: Vec<f32> = self.noise(labels * width).iter().map(|v| v * scale).collect();
        let x = (self.cuda.upload(&x, width, self.half)?, self.cpu.upload(&x, width));
        let targets: Vec<u32> = (0..labels).map(|_| self.words.below(vocabulary) as u32).collect();
        let noise = self.noise(2 * labels);
        let (lm_head, targets, noise) = (&table, &targets[..], &noise[..]);
        let ours = Labels { b: &self.cuda, x: x.0, targets, p, lm_head, noise }.all()?;
        let theirs = Labels { b: &self.cpu, x: x.1, targets, p: cpu_p, lm_head, noise }.all()?;
        let names = ["cross-entropy", "PPO", "given"];
        let magnitude = theirs[0].sum.abs();
        for ((ours, theirs), name) in ours.into_iter().zip(theirs).zip(names) {
            let case = format!("{case}, {name}");
            // logits are rounded, and many of them average out
            let off = ((ours.sum - theirs.sum).abs() / magnitude) as f32;
            self.report("loss", case.clone(), off, self.rounding());
            let (stats, cpu_stats) = (ours.stats, theirs.stats);
            let log_probs = (stats.log_probs, cpu_stats.log_probs);
            self.compare("loss: log-probabilities", &case, &log_probs, self.rounding())?;
            let entropies = (stats.entropies, cpu_stats.entropies);
            self.compare("loss: entropies", &case, &entropies, self.rounding())?;
            let (dx, grads) = ((ours.dx, theirs.dx), (ours.grads, theirs.grads));
            let allowed = 4.0 * self.rounding();
            self.compare("loss: gradient of the rows", &case, &dx, allowed)?;
            self.compare_flats("loss: gradient of the LM head", &case, &grads, allowed)?;
        }
        Ok(())
    }

    /// Clipping, and two steps of AdamW.
    fn train_step(&mut self, count: usize) -> Result<()> {
        let case = format!("{count} parameters");
        let mut values = self.parameters(count)?;
        let count = values.1.len();
        let grads = self.gradients(count)?;
        let zeros = |test: &Self| Ok((test.cuda.zeros(count)?, vec![0.0; count]));
        let (mut first, mut second): (Flats<L>, Flats<L>) = (zeros(self)?, zeros(self)?);
        let (mut sums, mut cpu_sums) = (self.cuda.new_sums()?, self.cpu.new_sums()?);
        let part = count / 24 * 8;
        // the moments of the second group come first
        let groups = [
            OptimizerGroup { range: 0..part, moments: count - part, decays: true },
            OptimizerGroup { range: part..count, moments: 0, decays: false },
        ];
        self.cuda.squared_norm(&grads.0, &groups, &mut sums);
        self.cpu.squared_norm(&grads.1, &groups, &mut cpu_sums);
        let off = (self.cuda.sums(&sums)?.norm() / cpu_sums.norm() - 1.0).abs() as f32;
        // up to 1024 squares are added in f32
        self.report("squared_norm", case.clone(), off, 3e-6);
        for root in [0.3, 0.4] {
            let step = AdamWStep {
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                step_size: 1e-2,
                root,
                keep: 0.999,
                max_norm: 0.1,
            };
            let mut buffers = AdamWBuffers {
                values: &mut values.0,
                grads: &grads.0,
                first: &mut first.0,
                second: &mut second.0,
            };
            self.cuda.adamw(&mut buffers, &groups, &step, &sums);
            let mut buffers = AdamWBuffers {
                values: &mut values.1,
                grads: &grads.1,
                first: &mut first.1,
                second: &mut second.1,
            };
            self.cpu.adamw(&mut buffers, &groups, &step, &cpu_sums);
        }
        self.compare_flats("adamw: parameters", &case, &values, 1e-6)?;
        self.compare_flats("adamw: first moments", &case, &first, 2e-6)?;
        self.compare_flats("adamw: second moments", &case, &second, 4e-6)
    }
}
