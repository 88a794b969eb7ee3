//! Loss, gradients and AdamW steps against PyTorch's (tests/golden/make_bloom.py, model `train`).

use beautiful_prompt::models::bloom::BloomCheckpoint;
use beautiful_prompt::models::bloom::training::{Backward, TrainModel, Workspace};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::train::{PackedBatch, Precision, StepSums};
use beautiful_prompt::train::optimizer::{AdamW, AdamWOptions, StepSize};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Sequence {
    ids: Vec<u32>,
    loss_from: usize,
}

#[derive(Deserialize)]
struct Expected {
    sequences: Vec<Sequence>,
    gradient_norm: f64,
    losses: Vec<f64>,
}

fn golden() -> (BloomCheckpoint, Expected, PackedBatch) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/train");
    let checkpoint = BloomCheckpoint::open(&folder).unwrap();
    let expected: Expected =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let mut batch = PackedBatch::default();
    for s in &expected.sequences {
        batch.push(&s.ids, s.loss_from);
    }
    (checkpoint, expected, batch)
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

fn gradients(
    cpu: &Cpu,
    precision: Precision,
    model: &TrainModel,
    batch: &PackedBatch,
) -> (f64, Vec<f32>) {
    let mut grads = vec![0f32; model.values.len()];
    let scale = 1.0 / batch.labels.len() as f32;
    let mut sums = StepSums::default();
    let out = Some((scale, Backward::to(&mut grads)));
    model.loss(cpu, (precision, batch), &mut Workspace::default(), out, &mut sums);
    (sums.loss / batch.labels.len() as f64, grads)
}

#[test]
fn every_gradient_is_within_1e_4_of_pytorch_on_every_instruction_set() {
    let (checkpoint, expected, batch) = golden();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/train");
    let bytes = std::fs::read(folder.join("gradients.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        let (loss, grads) = gradients(&cpu, Precision::F32, &model, &batch);
        assert!((loss - expected.losses[0]).abs() < 1e-5 * loss, "{isa:?}: loss {loss}");
        let norm = grads.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        assert!((norm / expected.gradient_norm - 1.0).abs() < 1e-4, "{isa:?}: norm {norm}");
        let mut start = 0;
        for p in model.config.parameters() {
            let ours = &grads[start..start + p.len()];
            start += p.len();
            let theirs: Vec<f32> =
                bytemuck::pod_collect_to_vec(theirs.tensor(&p.name).unwrap().data());
            let error = relative_error(ours, &theirs);
            assert!(error < 1e-4, "{isa:?}: {} off by {error:e}", p.name);
        }
    }
}

#[test]
fn ten_adamw_losses_equal_pytorchs() {
    let (checkpoint, expected, batch) = golden();
    let mut model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    let cpu = Cpu::new(2, Isa::detect());
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&cpu, &model.config.parameters(), options).unwrap();
    for (step, expected) in expected.losses.iter().enumerate() {
        let (loss, grads) = gradients(&cpu, Precision::F32, &model, &batch);
        assert!((loss - expected).abs() < 2e-5 * expected, "step {step}: {loss} for {expected}");
        let mut sums = StepSums { loss, squared_norm: 0.0 };
        optimizer.squared_norm(&cpu, &grads, &mut sums);
        let size = StepSize { learning_rate: 1e-3, max_norm: 1.0 };
        optimizer.step(&cpu, (&mut model.values, &grads), size, &sums);
    }
}

#[test]
fn bf16_products_change_gradients_by_rounding_only() {
    let (checkpoint, expected, batch) = golden();
    let model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    let cpu = Cpu::new(1, Isa::detect());
    let (loss, ours) = gradients(&cpu, Precision::Bf16, &model, &batch);
    let (_, exact) = gradients(&cpu, Precision::F32, &model, &batch);
    // 8 bits of mantissa: 2^-9 per operand, averaged over the sums
    assert!((loss / expected.losses[0] - 1.0).abs() < 2e-3, "{loss}");
    let error = relative_error(&ours, &exact);
    assert!(error < 2e-2, "{error}");
}

#[test]
fn gradients_repeat_bit_for_bit_on_any_number_of_threads() {
    let (checkpoint, _, batch) = golden();
    let model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    for precision in [Precision::F32, Precision::Bf16] {
        let one = gradients(&Cpu::new(1, Isa::detect()), precision, &model, &batch);
        let three = gradients(&Cpu::new(3, Isa::detect()), precision, &model, &batch);
        assert_eq!(one.0.to_bits(), three.0.to_bits());
        assert!(one.1.iter().zip(&three.1).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn residual_after_the_norm_has_the_gradient_of_its_finite_differences() {
    let mut config = beautiful_prompt::models::bloom::BloomConfig::new(50, 32, 2, 2);
    config.residual_post_layer_norm = true;
    config.tied = false;
    let mut model = TrainModel::random(config, 3);
    model.values.iter_mut().for_each(|v| *v *= 6.0);
    let mut batch = PackedBatch::default();
    batch.push(&[4, 8, 15, 16, 23, 42, 7], 2);
    let cpu = Cpu::new(1, Isa::detect());
    let (_, grads) = gradients(&cpu, Precision::F32, &model, &batch);
    let mut loss_at = |i: usize, value: f32| {
        let old = std::mem::replace(&mut model.values[i], value);
        let mut sums = StepSums::default();
        let batch_of = (Precision::F32, &batch);
        model.loss(&cpu, batch_of, &mut Workspace::default(), None, &mut sums);
        model.values[i] = old;
        (sums.loss / batch.labels.len() as f64, old)
    };
    let worst = (0..grads.len()).step_by(173).map(|i| {
        let value = loss_at(i, 0.0).1;
        let (up, down) = (loss_at(i, value + 2e-3).0, loss_at(i, value - 2e-3).0);
        ((up - down) / 4e-3 - grads[i] as f64).abs()
    });
    let worst = worst.fold(0.0, f64::max);
    assert!(worst < 2e-3, "{worst}");
}
