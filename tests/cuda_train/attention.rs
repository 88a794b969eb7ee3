//! Attention over packed sequences, forward and backward.

use crate::emulated;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::{Cuda, TrainSequences};
use beautiful_prompt::ops::train::{AttentionOutput, TrainBackend};
use beautiful_prompt::ops::{Heads, Tensor};
use beautiful_prompt::random::Normal;
use beautiful_prompt::tensor::DType;
use emulated::Emulated;
use kernel_emulator::Emulator;
use std::collections::BTreeSet;
use std::rc::Rc;

/// A batch of sequences, and the heads that attend to them.
#[derive(Clone)]
struct Case {
    half: DType,
    heads: Heads,
    cu_seqlens: Vec<usize>,
    /// Standard deviation of queries, and about that of scores.
    spread: f32,
}

impl Case {
    fn new(half: DType, count: usize, size: usize, lengths: &[usize]) -> Case {
        let slopes = (0..count).map(|h| 0.5f32.powi(1 + 3 * h as i32)).collect();
        let mut cu_seqlens = vec![0];
        lengths.iter().for_each(|n| cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + n));
        Case { half, heads: Heads { count, size, slopes }, cu_seqlens, spread: 1.0 }
    }

    fn tokens(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1]
    }

    /// Normal numbers for `qkv` and `dy`.
    fn inputs(&self) -> (Vec<f32>, Vec<f32>) {
        let mut normal = Normal::new(7, self.heads.size as u64);
        let (n, size) = (self.tokens() * self.heads.width(), self.heads.size);
        let of = |i| if i / size % 3 == 0 { self.spread } else { 1.0 };
        let qkv = (0..3 * n).map(|i| normal.sample() * of(i)).collect();
        (qkv, (0..n).map(|_| normal.sample()).collect())
    }
}

/// Everything that goes into attention and comes out of it.
#[derive(PartialEq)]
struct Results {
    qkv: Vec<f32>,
    dy: Vec<f32>,
    y: Vec<f32>,
    lse: Vec<f32>,
    dqkv: Vec<f32>,
}

fn on_gpu(case: &Case, (qkv, dy): (&[f32], &[f32]), device: &Rc<Emulated>) -> Results {
    let cuda = Cuda::new(device.clone(), case.half, false);
    let width = case.heads.width();
    let qkv = cuda.upload(qkv, 3 * width, case.half).unwrap();
    let dy = cuda.upload(dy, width, case.half).unwrap();
    let mut sequences = TrainSequences::default();
    cuda.upload_train_sequences(&mut sequences, &case.heads, &case.cu_seqlens).unwrap();
    let mut y = AttentionOutput::default();
    cuda.attention_train_forward(&mut y, &qkv, &case.heads, &sequences).unwrap();
    let mut dqkv = Tensor::default();
    let forward = (&qkv, &y);
    cuda.attention_train_backward(&mut dqkv, &dy, forward, &case.heads, &sequences).unwrap();
    let read = |x| cuda.download(x).unwrap();
    Results { qkv: read(&qkv), dy: read(&dy), y: read(&y.y), lse: read(&y.lse), dqkv: read(&dqkv) }
}

/// The same on the CPU, from the same 16-bit inputs; the backward pass from `gpu`'s results.
fn on_cpu(case: &Case, gpu: &Results) -> Results {
    let cpu = Cpu::new(1, Isa::detect());
    let (width, at) = (case.heads.width(), &case.cu_seqlens);
    let qkv = cpu.upload(&gpu.qkv, 3 * width);
    let dy = cpu.upload(&gpu.dy, width);
    let mut y = AttentionOutput::default();
    cpu.attention_forward(&mut y, &qkv, &case.heads, at);
    let same = AttentionOutput {
        y: cpu.upload(&gpu.y, width),
        lse: cpu.upload(&gpu.lse, case.heads.count),
    };
    let mut dqkv = Tensor::default();
    cpu.attention_backward(&mut dqkv, &dy, (&qkv, &same), &case.heads, at);
    Results {
        qkv: gpu.qkv.clone(),
        dy: gpu.dy.clone(),
        y: y.y.buffer().clone(),
        lse: y.lse.buffer().clone(),
        dqkv: dqkv.buffer().clone(),
    }
}

/// The sums of magnitudes behind every result: what its terms add up to if none cancels another.
struct Magnitudes {
    y: Vec<f64>,
    dqkv: Vec<f64>,
}

/// One sequence's part of `magnitudes`, in one head.
fn add_magnitudes(case: &Case, r: &Results, head: usize, sequence: &[usize], m: &mut Magnitudes) {
    let (count, size) = (case.heads.count, case.heads.size);
    let at = |token: usize| (token * count + head) * size;
    let part = |token: usize, part: usize| 3 * at(token) + part * size;
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a[..size].iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
    };
    let scale = 1.0 / (size as f64).sqrt();
    for i in sequence[0]..sequence[1] {
        let (q, dy, y) = (&r.qkv[part(i, 0)..], &r.dy[at(i)..], &r.y[at(i)..]);
        let expected = dot(dy, y);
        for j in sequence[0]..=i {
            let (k, v) = (&r.qkv[part(j, 1)..], &r.qkv[part(j, 2)..]);
            let bias = case.heads.slopes[head] as f64 * (j as f64 - i as f64);
            let p = (dot(q, k) * scale + bias - r.lse[i * count + head] as f64).exp();
            // The difference of two dot products in f32 has their error, however small it is; 2^-7
            // units of f16's rounding are far more than that.
            let sum: f64 = (0..size).map(|d| (dy[d] * v[d]).abs() as f64).sum();
            let ds = p * scale * ((dot(dy, v) - expected).abs() + sum / 128.0);
            for d in 0..size {
                let magnitude = |x: &[f32]| x[d].abs() as f64;
                m.y[at(i) + d] += p * magnitude(v);
                m.dqkv[part(i, 0) + d] += ds * magnitude(k);
                m.dqkv[part(j, 1) + d] += ds * magnitude(q);
                m.dqkv[part(j, 2) + d] += p * magnitude(dy);
            }
        }
    }
}

fn magnitudes(case: &Case, r: &Results) -> Magnitudes {
    let mut m = Magnitudes { y: vec![0.0; r.y.len()], dqkv: vec![0.0; r.qkv.len()] };
    for head in 0..case.heads.count {
        case.cu_seqlens.windows(2).for_each(|s| add_magnitudes(case, r, head, s, &mut m));
    }
    m
}

/// The largest error, as a part of what is allowed.
///
/// Kernels round to 16 bits what they sum (probabilities, and gradients of scores) and the result,
/// each with a relative error of at most half a unit in the last place, which a sum of terms that
/// cancel keeps in proportion to their magnitudes. All else is in f32 and exponentials are exact to
/// some 2^-20, for which a tenth more than that is allowed.
fn worst(half: DType, ours: &[f32], theirs: &[f32], magnitudes: &[f64]) -> f64 {
    assert_eq!((ours.len(), theirs.len()), (magnitudes.len(), magnitudes.len()));
    let rounding = if half == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
    let mut worst = 0.0;
    for ((ours, theirs), magnitude) in ours.iter().zip(theirs).zip(magnitudes) {
        let allowed = 1.1 * rounding * (magnitude + theirs.abs() as f64) + 1e-7;
        let part = (*ours as f64 - *theirs as f64).abs() / allowed;
        worst = if part > worst || part.is_nan() { part } else { worst };
    }
    worst
}

fn check(case: &Case, check_order: bool, hopper: bool) -> BTreeSet<String> {
    let device = emulated::gpu(check_order, hopper);
    let (qkv, dy) = case.inputs();
    let gpu = on_gpu(case, (&qkv, &dy), &device);
    let cpu = on_cpu(case, &gpu);
    let m = magnitudes(case, &gpu);
    let name = format!("{} {:?} {:?}", case.half.name(), case.heads, case.cu_seqlens);
    let y = worst(case.half, &gpu.y, &cpu.y, &m.y);
    let dqkv = worst(case.half, &gpu.dqkv, &cpu.dqkv, &m.dqkv);
    assert!(y <= 1.0, "{name}: y is off by {y:.2} of what is allowed");
    assert!(dqkv <= 1.0, "{name}: dqkv is off by {dqkv:.2} of what is allowed");
    // sums of exponentials are in f32
    for (ours, theirs) in gpu.lse.iter().zip(&cpu.lse) {
        assert!((ours - theirs).abs() <= 1e-5 * (1.0 + theirs.abs()), "{name}: {ours} {theirs}");
    }
    device.launched.borrow().keys().cloned().collect()
}

/// All kernels, with lengths around the edges of tiles and of steps.
#[test]
fn every_kernel_agrees_with_the_cpu() {
    let mut launched = BTreeSet::new();
    for size in [32, 64, 80, 96, 128] {
        let case = Case::new(DType::Bf16, 1, size, &[66, 1, 31]);
        launched.extend(check(&case, false, false));
        launched.extend(check(&case, false, true));
    }
    let missed: Vec<String> = Emulator::kernels()
        .into_iter()
        .filter(|k| k.starts_with("attention_train_") && !launched.contains(k))
        .collect();
    assert!(missed.is_empty(), "never launched: {missed:?}");
}

#[test]
fn sequences_of_all_lengths_agree_with_the_cpu() {
    for hopper in [false, true] {
        let lengths = [1, 63, 64, 65, 2, 130, 33, 1];
        check(&Case::new(DType::Bf16, 3, 32, &lengths), false, hopper);
        // weights beyond the first maximum, so that sums are rescaled, and stages that are reused
        let case = Case::new(DType::Bf16, 2, 32, &[200]);
        check(&Case { spread: 6.0, ..case }, false, hopper);
    }
}

/// Every launch runs twice, with its threads in different orders.
#[test]
fn the_order_of_threads_does_not_matter() {
    check(&Case::new(DType::Bf16, 2, 32, &[70, 3]), true, false);
    check(&Case::new(DType::Bf16, 1, 80, &[140, 3]), true, true);
}

/// Two runs have equal bits, and a sequence's results do not depend on its neighbours.
#[test]
fn results_repeat() {
    let case = Case::new(DType::Bf16, 2, 32, &[70, 35]);
    let (qkv, dy) = case.inputs();
    for hopper in [false, true] {
        let run = |case, inputs| on_gpu(case, inputs, &emulated::gpu(false, hopper));
        let first = run(&case, (&qkv, &dy));
        assert!(first == run(&case, (&qkv, &dy)), "two runs differ");
        let (alone, behind) = (Case { cu_seqlens: vec![0, 35], ..case.clone() }, 70 * 64);
        let alone = run(&alone, (&qkv[3 * behind..], &dy[behind..]));
        let equal = |a: &[f32], b: &[f32]| a.len() < b.len() && b.ends_with(a);
        assert!(equal(&alone.y, &first.y), "y differs without a neighbour");
        assert!(equal(&alone.lse, &first.lse), "lse differs without a neighbour");
        assert!(equal(&alone.dqkv, &first.dqkv), "dqkv differs without a neighbour");
    }
}
