//! Reward models against transformers' `BloomForSequenceClassification`
//! (tests/golden/make_reward.py), and as the program trains them.

use beautiful_prompt::models::bloom::training::{Backward, Objective, TrainModel, Workspace};
use beautiful_prompt::models::bloom::{
    Architecture, BloomCheckpoint, BloomConfig, RewardModel, save_model,
};
use beautiful_prompt::ops::Tensor;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::scalar_loss::ScalarLoss;
use beautiful_prompt::ops::token_loss::LossOutput;
use beautiful_prompt::ops::train::{PackedBatch, Precision, StepSums, TrainBackend};
use beautiful_prompt::random::PhiloxStream;
use beautiful_prompt::tensor::DType;
use beautiful_prompt::train::optimizer::{AdamW, AdamWOptions, StepSize};
use beautiful_prompt::train::reward::{Normalization, fold_normalization};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Sequence {
    ids: Vec<u32>,
    score: f32,
}

#[derive(Deserialize)]
struct Expected {
    sequences: Vec<Sequence>,
    labels: Vec<f32>,
    mse_loss: f64,
    gradient_norm: f64,
    pairs: Vec<[usize; 2]>,
    pairwise_loss: f64,
    pairwise_gradient_norm: f64,
    losses: Vec<f64>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/reward")
}

fn golden() -> (BloomCheckpoint, Expected) {
    let bytes = std::fs::read(folder().join("expected.json")).unwrap();
    (BloomCheckpoint::open(&folder()).unwrap(), serde_json::from_slice(&bytes).unwrap())
}

fn texts(expected: &Expected) -> Vec<Vec<u32>> {
    expected.sequences.iter().map(|s| s.ids.clone()).collect()
}

/// Texts whose scores are read off their last tokens.
fn packed<'a>(texts: impl IntoIterator<Item = &'a Vec<u32>>) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for ids in texts {
        batch.ids.extend_from_slice(ids);
        batch.labels.push((batch.ids.len() - 1, 0));
        batch.cu_seqlens.push(batch.ids.len());
    }
    batch
}

/// Sum of losses, and the gradients of that times `scale`.
fn gradients(
    cpu: &Cpu,
    model: &TrainModel,
    batch: &PackedBatch,
    loss: &ScalarLoss<Cpu>,
) -> (f64, Vec<f32>) {
    let (mut grads, mut sums) = (vec![0f32; model.values.len()], StepSums::default());
    let objective = Objective { tokens: None, scalars: Some(loss) };
    let gradients = Some(Backward::to(&mut grads));
    let to = LossOutput { sums: &mut sums, stats: None, gradients };
    let batch = (Precision::F32, batch);
    model.objective(cpu, batch, &mut Workspace::default(), &objective, to);
    (sums.loss, grads)
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

#[test]
fn scores_are_those_of_transformers_on_every_instruction_set() {
    let (checkpoint, expected) = golden();
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        let mut model = RewardModel::load(&cpu, checkpoint.clone(), None, 512).unwrap();
        let scores = model.score(&cpu, &texts(&expected)).unwrap();
        for (ours, theirs) in scores.iter().zip(&expected.sequences) {
            assert!((ours - theirs.score).abs() < 2e-5, "{isa:?}: {ours}, {}", theirs.score);
        }
    }
}

#[test]
fn a_score_does_not_depend_on_other_texts() {
    let (checkpoint, expected) = golden();
    let mut random = PhiloxStream::new(3, 0);
    for dtype in [None, Some(DType::Bf16), Some(DType::Int8)] {
        let cpu = Cpu::new(2, Isa::detect());
        // few tokens a pass, and many
        let mut narrow = RewardModel::load(&cpu, checkpoint.clone(), dtype, 48).unwrap();
        let mut wide = RewardModel::load(&cpu, checkpoint.clone(), dtype, 4096).unwrap();
        let mut texts = texts(&expected);
        // </s> and <pad> are tokens like others wherever they stand
        texts.push(vec![2, 9, 2, 3, 3, 11, 2]);
        texts.push(vec![3]);
        for _ in 0..60 {
            let length = 1 + random.below(40);
            texts.push((0..length).map(|_| random.below(97) as u32).collect());
        }
        let together = wide.score(&cpu, &texts).unwrap();
        assert_eq!(together, narrow.score(&cpu, &texts).unwrap());
        for (text, score) in texts.iter().zip(&together) {
            let alone = narrow.score(&cpu, std::slice::from_ref(text)).unwrap();
            assert_eq!(alone[0], *score, "{text:?}");
        }
    }
}

#[test]
fn what_cannot_be_scored_is_named() {
    let (checkpoint, _) = golden();
    let cpu = Cpu::new(1, Isa::detect());
    let mut model = RewardModel::load(&cpu, checkpoint, None, 32).unwrap();
    for (bad, why) in [(vec![], "0 tokens"), (vec![5; 33], "33 tokens"), (vec![97], "vocabulary")] {
        let e = model.score(&cpu, &[vec![1], bad]).unwrap_err().to_string();
        assert!(e.contains(why) && e.contains("text 1"), "{e}");
    }
    assert!(model.score(&cpu, &[]).unwrap().is_empty());
    let language = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/train");
    let language = BloomCheckpoint::open(&language).unwrap();
    let e = RewardModel::load(&cpu, language, None, 32).err().unwrap().to_string();
    assert!(e.contains("expected a reward model"), "{e}");
}

#[test]
fn gradients_of_both_losses_are_pytorchs() {
    let (checkpoint, expected) = golden();
    let bytes = std::fs::read(folder().join("gradients.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    let texts = texts(&expected);
    let count = texts.len() as f32;
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        let mut targets = Tensor::default();
        cpu.upload_column(&mut targets, &expected.labels).unwrap();
        let loss = ScalarLoss::Squared { targets: &targets, scale: 1.0 / count };
        let squared = gradients(&cpu, &model, &packed(&texts), &loss);
        let paired = packed(expected.pairs.iter().flatten().map(|&i| &texts[i]));
        let pairs = expected.pairs.len() as f32;
        let loss = ScalarLoss::Pairwise { scale: 1.0 / pairs };
        let pairwise = gradients(&cpu, &model, &paired, &loss);
        for (prefix, (loss, grads), (n, of, norm)) in [
            ("", squared, (count, expected.mse_loss, expected.gradient_norm)),
            (
                "pairwise.",
                pairwise,
                (pairs, expected.pairwise_loss, expected.pairwise_gradient_norm),
            ),
        ] {
            let loss = loss / n as f64;
            assert!((loss / of - 1.0).abs() < 1e-5, "{isa:?} {prefix}: loss {loss}, {of}");
            let ours = grads.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            assert!((ours / norm - 1.0).abs() < 1e-4, "{isa:?} {prefix}: norm {ours}, {norm}");
            let mut start = 0;
            for p in model.parameters() {
                let ours = &grads[start..start + p.len()];
                start += p.len();
                let name = format!("{prefix}{}", p.name);
                let theirs: Vec<f32> =
                    bytemuck::pod_collect_to_vec(theirs.tensor(&name).unwrap().data());
                if name == "pairwise.transformer.ln_f.bias" {
                    // a shift of both texts' hidden states changes no preference
                    assert!(ours.iter().all(|g| g.abs() < 1e-6), "{isa:?}: {ours:?}");
                    continue;
                }
                let error = relative_error(ours, &theirs);
                assert!(error < 1e-4, "{isa:?}: {name} off by {error:e}");
            }
        }
    }
}

#[test]
fn ten_steps_have_the_losses_of_pytorch() {
    let (checkpoint, expected) = golden();
    let cpu = Cpu::new(2, Isa::detect());
    let mut model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&cpu, &model.parameters(), options).unwrap();
    let (texts, count) = (texts(&expected), expected.labels.len() as f32);
    let mut targets = Tensor::default();
    cpu.upload_column(&mut targets, &expected.labels).unwrap();
    for theirs in &expected.losses {
        let loss = ScalarLoss::Squared { targets: &targets, scale: 1.0 / count };
        let (loss, grads) = gradients(&cpu, &model, &packed(&texts), &loss);
        let ours = loss / count as f64;
        assert!((ours / theirs - 1.0).abs() < 1e-3, "{ours}, {theirs}");
        let mut sums = StepSums { loss, ..StepSums::default() };
        optimizer.squared_norm(&cpu, &grads, &mut sums);
        let size = StepSize { learning_rate: 1e-3, max_norm: 1.0 };
        optimizer.step(&cpu, (&mut model.values, &grads), size, &sums);
    }
}

#[test]
fn gradients_agree_with_finite_differences_of_both_losses() {
    // of a head alone in f32: of each number that goes into it
    let cpu = Cpu::new(2, Isa::detect());
    let config = BloomConfig::new(40, 24, 2, 3);
    let model = TrainModel::random(config, 5).into_reward_model(7);
    assert_eq!(model.config.architecture, Architecture::SequenceClassification);
    let texts: Vec<Vec<u32>> =
        (0..6).map(|i| (0..3 + i).map(|t| (7 * t + i) % 40).collect()).collect();
    let batch = packed(&texts);
    let mut targets = Tensor::default();
    cpu.upload_column(&mut targets, &[0.5, -1.0, 2.0, 0.0, 0.3, -0.7]).unwrap();
    let losses = [
        ScalarLoss::Squared { targets: &targets, scale: 1.0 },
        ScalarLoss::Pairwise { scale: 1.0 },
    ];
    for loss in &losses {
        let (_, grads) = gradients(&cpu, &model, &batch, loss);
        let last = model.trained().end - 24;
        for at in [0, 24 * 40 + 3, last - 5, last, last + 23] {
            let value = |by: f32| {
                let mut moved = TrainModel::new(model.config.clone(), model.values.clone());
                moved.values[at] += by;
                gradients(&cpu, &moved, &batch, loss).0
            };
            let step = 2e-3;
            let numeric = (value(step) - value(-step)) / (2.0 * step as f64);
            let ours = grads[at] as f64;
            assert!((numeric - ours).abs() < 2e-3 + 2e-2 * ours.abs(), "{at}: {numeric}, {ours}");
        }
    }
}

#[test]
fn normalized_labels_leave_no_trace_in_the_saved_model() {
    let cpu = Cpu::new(2, Isa::detect());
    let model = TrainModel::random(BloomConfig::new(40, 24, 2, 3), 5).into_reward_model(7);
    let save = |values: &[f32]| {
        let folder = tempfile::tempdir().unwrap();
        save_model(folder.path(), &model.config, values, DType::F32).unwrap();
        let checkpoint = BloomCheckpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.config.architecture, Architecture::SequenceClassification);
        let mut model = RewardModel::load(&cpu, checkpoint, None, 64).unwrap();
        let texts = vec![vec![1, 2, 3], vec![9; 20], vec![30, 31]];
        model.score(&cpu, &texts).unwrap()
    };
    let normalization = Normalization::of(&[20.0, 21.5, 18.25, 19.0]);
    let mut folded = model.values.clone();
    fold_normalization(&mut folded, &model.config, normalization);
    for (raw, normalized) in save(&folded).into_iter().zip(save(&model.values)) {
        let expected = normalized as f64 * normalization.std + normalization.mean;
        assert!((raw as f64 - expected).abs() < 1e-4, "{raw}, {expected}");
    }
}
