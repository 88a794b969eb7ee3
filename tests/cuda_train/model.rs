//! Whole models: gradients, steps and runs.

use crate::emulated::{Emulated, gpu};
use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::error::Result;
use beautiful_prompt::models::bloom::training::{Backward, Recompute, TrainModel, Workspace};
use beautiful_prompt::models::bloom::{BloomCheckpoint, BloomConfig};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::ops::train::{PackedBatch, Precision, StepSums, TrainBackend};
use beautiful_prompt::tensor::DType;
use beautiful_prompt::train::examples::Example;
use beautiful_prompt::train::optimizer::{AdamW, AdamWOptions, StepSize};
use beautiful_prompt::train::parallel::Alone;
use beautiful_prompt::train::report::StepMetrics;
use beautiful_prompt::train::run::{Observer, Outcome, Run, RunOptions, Validation};
use beautiful_prompt::train::schedule::Schedule;
use beautiful_prompt::train::sft::Sft;
use serde::Deserialize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Deserialize)]
struct Sequence {
    ids: Vec<u32>,
    loss_from: usize,
}

#[derive(Deserialize)]
struct Expected {
    sequences: Vec<Sequence>,
    losses: Vec<f64>,
}

fn golden() -> (TrainModel, Expected, PackedBatch) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/train");
    let checkpoint = BloomCheckpoint::open(&folder).unwrap();
    let values = checkpoint.to_f32().unwrap();
    let text = std::fs::read(folder.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&text).unwrap();
    let mut batch = PackedBatch::default();
    expected.sequences.iter().for_each(|s| batch.push(&s.ids, s.loss_from));
    (TrainModel::new(checkpoint.config, values), expected, batch)
}

fn cuda(check_order: bool, hopper: bool) -> Cuda<Emulated> {
    Cuda::new(gpu(check_order, hopper), DType::Bf16, false)
}

/// Loss and gradients of a batch, and the norm and the parameters after a step with them.
struct Stepped {
    sums: StepSums,
    grads: Vec<f32>,
    values: Vec<f32>,
}

fn step<B: TrainBackend>(
    b: &B,
    model: TrainModel,
    batch: &PackedBatch,
    (precision, recompute): (Precision, Recompute),
) -> Result<Stepped> {
    let mut model = model.place(b)?;
    let mut grads = b.zeros(model.config.parameter_count())?;
    let (mut space, mut sums) = (Workspace::with_recompute(recompute), b.new_sums()?);
    let scale = 1.0 / batch.labels.len() as f32;
    let out = Some((scale, Backward::to(&mut grads)));
    model.loss(b, (precision, batch), &mut space, out, &mut sums);
    let host = b.values(&grads)?.into_owned();
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(b, &model.config.parameters(), options)?;
    optimizer.squared_norm(b, &grads, &mut sums);
    optimizer.step(b, (&mut model.values, &grads), SIZE, &sums);
    let values = b.values(&model.values)?.into_owned();
    Ok(Stepped { sums: b.sums(&sums)?, grads: host, values })
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

const SIZE: StepSize = StepSize { learning_rate: 1e-3, max_norm: 0.5 };
const BF16: (Precision, Recompute) = (Precision::Bf16, Recompute::None);

/// Activations, weights and gradients of activations have 8 bits of mantissa: each rounding is off
/// by up to 2^-9, and a gradient has come through some twenty of them.
#[test]
fn gradients_are_pytorchs_within_what_bf16_explains() {
    let (model, expected, batch) = golden();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/train");
    let bytes = std::fs::read(folder.join("gradients.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let parameters = model.config.parameters();
    for hopper in [false, true] {
        let (model, _, _) = golden();
        let ours = step(&cuda(false, hopper), model, &batch, BF16).unwrap();
        let loss = ours.sums.loss / batch.labels.len() as f64;
        assert!((loss / expected.losses[0] - 1.0).abs() < 2e-3, "{loss}");
        let mut start = 0;
        for p in &parameters {
            let part = &ours.grads[start..start + p.len()];
            start += p.len();
            let data = theirs.tensor(&p.name).unwrap();
            let error = relative_error(part, &bytemuck::pod_collect_to_vec(data.data()));
            assert!(error < 2e-2, "{} off by {error:e}, hopper {hopper}", p.name);
        }
    }
}

/// The CPU's norm and AdamW do to the same gradients what the kernels do.
#[test]
fn a_step_is_the_cpus() {
    let (model, _, batch) = golden();
    let (ours, cpu) = (cuda(false, false), Cpu::new(1, Isa::detect()));
    let count = model.config.parameter_count();
    let stepped = step(&ours, model, &batch, BF16).unwrap();
    let (mut model, _, _) = golden();
    let mut sums = StepSums { loss: stepped.sums.loss, squared_norm: 0.0 };
    let grads = stepped.grads.clone();
    assert_eq!(grads.len(), count);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&cpu, &model.config.parameters(), options).unwrap();
    optimizer.squared_norm(&cpu, &grads, &mut sums);
    assert!((sums.norm() / stepped.sums.norm() - 1.0).abs() < 1e-6 && sums.norm() > 0.5);
    optimizer.step(&cpu, (&mut model.values, &grads), SIZE, &sums);
    let error = relative_error(&stepped.values, &model.values);
    assert!(error < 1e-6, "{error:e}");
}

/// No kernel sums in an order that threads decide, and what is computed again has the same bits.
#[test]
fn gradients_repeat_bit_for_bit_whatever_is_computed_again() {
    let run = |check_order, hopper, recompute| {
        let (model, _, batch) = golden();
        let options = (Precision::Bf16, recompute);
        let s = step(&cuda(check_order, hopper), model, &batch, options).unwrap();
        (s.sums, bytemuck::cast_vec::<f32, u32>(s.grads), bytemuck::cast_vec::<f32, u32>(s.values))
    };
    for hopper in [false, true] {
        let once = run(false, hopper, Recompute::None);
        assert!(once == run(true, hopper, Recompute::Layer));
        assert!(once == run(false, hopper, Recompute::Attention));
    }
}

/// A residual that branches off behind the norms, an LM head of its own, and a vocabulary of an odd
/// size, beside the CPU.
#[test]
fn every_kind_of_model_has_the_cpus_gradients() {
    for (post_norm, tied, vocabulary) in [(true, false, 51), (false, true, 51)] {
        let mut config = BloomConfig::new(vocabulary, 64, 2, 1);
        config.residual_post_layer_norm = post_norm;
        config.tied = tied;
        let model = || {
            let mut model = TrainModel::random(config.clone(), 3);
            model.values.iter_mut().for_each(|v| *v *= 4.0);
            model
        };
        let mut batch = PackedBatch::default();
        batch.push(&[4, 8, 15, 16, 23, 42, 7], 2);
        batch.push(&[9, 8, 50], 1);
        let exact = (Precision::F32, Recompute::None);
        let theirs = step(&Cpu::new(1, Isa::detect()), model(), &batch, exact).unwrap();
        let ours = step(&cuda(false, true), model(), &batch, BF16).unwrap();
        assert!((ours.sums.loss / theirs.sums.loss - 1.0).abs() < 5e-3);
        let error = relative_error(&ours.grads, &theirs.grads);
        assert!(error < 2e-2, "{error:e}");
    }
}

/// A gradient that is no number: the parameters stay as they are, and the host is told.
#[test]
fn nonsense_changes_no_parameter() {
    let (model, _, batch) = golden();
    let before = model.values.clone();
    let b = cuda(false, false);
    let mut model = model.place(&b).unwrap();
    let mut grads = b.zeros(before.len()).unwrap();
    let mut sums = b.new_sums().unwrap();
    let out = Some((f32::NAN, Backward::to(&mut grads)));
    model.loss(&b, (Precision::Bf16, &batch), &mut Workspace::default(), out, &mut sums);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&b, &model.config.parameters(), options).unwrap();
    optimizer.squared_norm(&b, &grads, &mut sums);
    optimizer.step(&b, (&mut model.values, &grads), SIZE, &sums);
    assert_eq!(b.values(&model.values).unwrap(), &before[..]);
    let sums = b.sums(&sums).unwrap();
    assert!(sums.norm().is_nan() && sums.loss.is_finite());
}

/// Sequences whose tokens go up by three.
pub fn examples(starts: std::ops::Range<u32>) -> Vec<Example> {
    let ids = |start| (0..9).map(|i| 4 + (start + 3 * i) % 40).collect();
    starts.map(|start| Example { ids: ids(start), loss_from: 3 }).collect()
}

pub fn options(output: &Path) -> RunOptions {
    RunOptions {
        optimizer: AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.01 },
        learning_rate: 1e-2,
        schedule: Schedule::Cosine,
        warmup: 0.1,
        clip: 1.0,
        epochs: 6.0,
        max_steps: 0,
        batch: 10,
        micro_tokens: 64,
        precision: Precision::Bf16,
        recompute: Recompute::None,
        seed: 42,
        save_every: 0,
        validate_every: 0,
        keep: 2,
        output: output.into(),
        settings: serde_json::json!({}),
    }
}

fn sft<'a>(backend: &'a Cuda<Emulated>, output: &Path) -> Run<'a, Cuda<Emulated>, Sft> {
    let model = TrainModel::random(BloomConfig::new(44, 32, 1, 1), 1).place(backend).unwrap();
    Run {
        backend,
        communicator: &Alone,
        model,
        companions: Companions::default(),
        task: Sft { train: examples(0..20), validation: examples(20..23) },
        options: options(output),
    }
}

/// Raises the flag after so many steps.
struct StopAfter<'a>(u64, &'a AtomicBool);

impl Observer for StopAfter<'_> {
    fn step(&mut self, _: u64, metrics: &StepMetrics) {
        if metrics.step == self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_run_learns_and_an_interrupted_one_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, resume: bool, stop_after: u64| {
        let backend = cuda(false, false);
        let stop = AtomicBool::new(false);
        let mut sft = sft(&backend, &folder.path().join(name));
        std::fs::create_dir_all(&sft.options.output).unwrap();
        let outcome = sft.run(resume, &stop, &mut StopAfter(stop_after, &stop)).unwrap();
        (outcome, backend.values(&sft.model.values).unwrap().into_owned())
    };
    let (whole, values) = run("whole", false, u64::MAX);
    let Outcome::Finished { validation: Some(Validation { loss, .. }) } = whole else {
        panic!("{whole:?}")
    };
    // ln(44) is 3.8
    assert!(loss < 3.0, "{loss}");
    let (first, _) = run("parts", false, 3);
    assert!(matches!(first, Outcome::Stopped(_)));
    let (rest, resumed) = run("parts", true, u64::MAX);
    assert_eq!(rest, whole);
    assert!(values.iter().zip(&resumed).all(|(a, b)| a.to_bits() == b.to_bits()));
}
