//! Policy-gradient training: its arithmetic against TRL's functions (tests/golden/make_ppo.py), a
//! policy with a value head against PyTorch (tests/golden/make_ppo_model.py), and whole runs.

use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::error::Result;
use beautiful_prompt::models::bloom::BloomCheckpoint;
use beautiful_prompt::models::bloom::training::{Backward, Objective, TrainModel, Workspace};
use beautiful_prompt::models::embedded;
use beautiful_prompt::ops::Tensor;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::scalar_loss::{ClippedValue, ScalarLoss};
use beautiful_prompt::ops::token_loss::{ClippedPpo, LossOutput, TokenLoss, TokenStats};
use beautiful_prompt::ops::train::{PackedBatch, Precision, StepSums, TrainBackend};
use beautiful_prompt::rewards::{CombinedReward, Reward, RunningMoments, ScoredText};
use beautiful_prompt::rewrite::Prompter;
use beautiful_prompt::train::monitors::{Action, Threshold};
use beautiful_prompt::train::optimizer::{AdamW, AdamWOptions, StepSize};
use beautiful_prompt::train::ppo::estimates::{
    KlController, KlEstimator, ScoreScaling, Whitening, gae, grpo, rloo, token_rewards,
};
use beautiful_prompt::train::ppo::experience::{LossStats, TokenTerms};
use beautiful_prompt::train::ppo::rollout::PolicyPrompt;
use beautiful_prompt::train::ppo::{
    Algorithm, Ppo, PpoObserver, PpoOptions, PpoOutcome, RoundMetrics,
};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ppo.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn lists(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

#[track_caller]
fn expect(ours: f64, theirs: f64, within: f64, what: &str) {
    let error = (ours - theirs).abs() / theirs.abs().max(1.0);
    assert!(error <= within, "{what}: {ours}, expected {theirs}");
}

#[track_caller]
fn expect_all(ours: &[Vec<f64>], theirs: &[Vec<f64>], within: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours.len(), theirs.len(), "{what}");
        ours.iter().zip(theirs).for_each(|(a, b)| expect(*a, *b, within, what));
    }
}

#[test]
fn rewards_are_trls_for_every_estimator() {
    let golden = golden();
    let of = &golden["rewards"];
    let (log_probs, reference) = (lists(&of["log_probs"]), lists(&of["reference_log_probs"]));
    let (scores, coefficient) = (numbers(&of["scores"]), of["kl_coefficient"].as_f64().unwrap());
    let kl_of = |estimator: KlEstimator| -> Vec<Vec<f64>> {
        let pairs = log_probs.iter().zip(&reference);
        pairs.map(|(l, r)| l.iter().zip(r).map(|(l, r)| estimator.of(l - r)).collect()).collect()
    };
    let rewards_of = |kl: &[Vec<f64>]| -> Vec<Vec<f64>> {
        kl.iter().zip(&scores).map(|(kl, s)| token_rewards(kl, coefficient, *s)).collect()
    };
    let trl = &of["trl"]["whole"];
    for (name, estimator) in
        [("kl", KlEstimator::K1), ("abs", KlEstimator::Abs), ("mse", KlEstimator::K2)]
    {
        let kl = kl_of(estimator);
        expect_all(&kl, &lists(&trl[name]["kl"]), 1e-6, name);
        expect_all(&rewards_of(&kl), &lists(&trl[name]["rewards"]), 1e-6, name);
        let sums: Vec<f64> = kl.iter().map(|kl| kl.iter().sum()).collect();
        let mean = sums.iter().sum::<f64>() / sums.len() as f64;
        expect(mean, trl[name]["controller_kl"].as_f64().unwrap(), 1e-6, name);
    }
    for (name, estimator) in
        [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3)]
    {
        let kl = kl_of(estimator);
        expect_all(&kl, &lists(&of["estimators"][name]["kl"]), 1e-6, name);
        let coefficient = of["kl_coefficient"].as_f64().unwrap();
        let penalties: Vec<Vec<f64>> =
            kl.iter().map(|kl| kl.iter().map(|kl| -coefficient * kl).collect()).collect();
        let theirs = lists(&of["estimators"][name]["rewards"]);
        // theirs may hold the score at the last token
        for (ours, theirs) in penalties.iter().zip(&theirs) {
            let n = ours.len() - 1;
            ours[..n].iter().zip(&theirs[..n]).for_each(|(a, b)| expect(*a, *b, 1e-6, name));
        }
    }
}

#[test]
fn log_ratios_of_fifty_stay_finite_and_k3_is_never_negative() {
    for d in [-50.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 50.0] {
        let k3 = KlEstimator::K3.of(d);
        assert!(k3.is_finite() && k3 >= 0.0, "{d}: {k3}");
    }
    assert_eq!(KlEstimator::K1.of(0.0), 0.0);
    // a reward of exactly zero is a reward like others
    assert_eq!(token_rewards(&[0.5, 0.5], 0.1, 0.0), [-0.05, -0.05]);
}

#[test]
fn advantages_are_trls_and_trlxs() {
    for case in golden()["advantages"]["cases"].as_array().unwrap() {
        let (gamma, lambda) = (case["gamma"].as_f64().unwrap(), case["lambda"].as_f64().unwrap());
        let (values, rewards) = (lists(&case["values"]), lists(&case["rewards"]));
        let (advantages, returns): (Vec<_>, Vec<_>) =
            rewards.iter().zip(&values).map(|(r, v)| gae(r, v, gamma, lambda)).unzip();
        expect_all(&returns, &lists(&case["returns"]), 1e-6, "returns");
        expect_all(&advantages, &lists(&case["unwhitened"]), 1e-6, "unwhitened");
        for (name, whitening) in [("trl", Whitening::Masked), ("trlx", Whitening::Padded)] {
            let mut whitened = advantages.clone();
            whitening.apply(&mut whitened);
            expect_all(&whitened, &lists(&case[name]), 1e-5, name);
        }
    }
    // the worked example of three values and one that pads
    let mut padded = vec![vec![1.0, 2.0], vec![3.0]];
    Whitening::Padded.apply(&mut padded);
    expect_all(&padded, &[vec![-0.387, 0.387], vec![1.162]], 1e-3, "padded");
    let mut one = vec![vec![0.7]];
    Whitening::Masked.apply(&mut one);
    assert_eq!(one, [[0.7]], "one number alone has no deviation");
}

#[test]
fn losses_are_trls() {
    let golden = golden();
    for (i, case) in golden["losses"]["cases"].as_array().unwrap().iter().enumerate() {
        let of = |name: &str| lists(&case[name]).concat();
        let number = |name: &str| case[name].as_f64().unwrap();
        if number("mean_ratio") > number("ratio_threshold") {
            continue; // TRL leaves such batches out by a guard of its own
        }
        let (log_probs, old, advantages) = (of("log_probs"), of("old_log_probs"), of("advantages"));
        let (values, old_values, returns) = (of("values"), of("old_values"), of("returns"));
        let mut stats = LossStats::default();
        for t in 0..log_probs.len() {
            let terms = TokenTerms {
                log_prob: log_probs[t],
                old_log_prob: old[t],
                advantage: advantages[t],
                entropy: 0.0,
                value: Some([values[t], old_values[t], returns[t]]),
            };
            stats.add(&terms, (number("clip"), number("value_clip")));
        }
        let within = 1e-5;
        expect(stats.mean(|s| s.policy_loss), number("policy_loss"), within, "policy loss");
        expect(stats.mean(|s| s.value_loss), number("value_loss"), within, "value loss");
        expect(stats.mean(|s| s.clipped), number("policy_clip_fraction"), within, "clipped");
        let fraction = number("value_clip_fraction");
        expect(stats.mean(|s| s.values_clipped), fraction, within, "values clipped");
        expect(stats.mean(|s| s.approximate_kl), number("approximate_kl"), within, "kl");
        expect(stats.mean(|s| s.ratio), number("mean_ratio"), within, "ratio");
        assert!(i < 10);
    }
}

#[test]
fn controllers_and_scalings_are_trls_and_trlxs() {
    let golden = golden();
    for case in golden["kl_controller"]["cases"].as_array().unwrap() {
        let number = |name: &str| case[name].as_f64().unwrap();
        let (coefficient, target) = (number("initial"), Some(number("target")));
        let mut controller = KlController { coefficient, target, horizon: number("horizon") };
        for (kl, theirs) in numbers(&case["kl"]).iter().zip(numbers(&case["coefficients"])) {
            controller.update(*kl, number("steps") as usize);
            expect(controller.coefficient, theirs, 1e-12, "controller");
        }
    }
    let scaling = &golden["score_scaling"];
    let batches = lists(&scaling["batches"]);
    let mut moments = RunningMoments::default();
    for (batch, step) in batches.iter().zip(scaling["trl"][0]["steps"].as_array().unwrap()) {
        batch.iter().for_each(|x| moments.push(*x));
        expect(moments.mean(), step["mean"].as_f64().unwrap(), 1e-5, "mean");
        expect(moments.std(), step["std"].as_f64().unwrap(), 1e-5, "std");
    }
    for case in scaling["trlx"].as_array().unwrap() {
        let clip = case["cliprange_reward"].as_f64();
        let mut scaling = ScoreScaling { clip, running: true, moments: RunningMoments::default() };
        for (batch, step) in batches.iter().zip(case["steps"].as_array().unwrap()) {
            let mut scores = batch.clone();
            scaling.apply(&mut scores);
            expect_all(&[scores], &[numbers(&step["scores"])], 1e-9, "scaled scores");
        }
    }
}

#[test]
fn group_advantages_are_trls() {
    let golden = golden();
    let groups = &golden["groups"];
    let rewards = lists(&groups["rewards"]);
    let ours: Vec<Vec<f64>> = rewards.iter().map(|g| rloo(g)).collect();
    expect_all(&ours, &lists(&groups["rloo"]["advantages"]), 1e-12, "rloo");
    let ours: Vec<Vec<f64>> = rewards.iter().map(|g| grpo(g)).collect();
    expect_all(&ours, &lists(&groups["grpo"]["group"]), 1e-9, "grpo");
    let pairs = lists(&groups["pairs"]["rewards"]);
    let ours: Vec<Vec<f64>> = pairs.iter().map(|g| grpo(g)).collect();
    expect_all(&ours, &lists(&groups["pairs"]["grpo_advantages"]), 1e-9, "pairs");
}

#[derive(Deserialize)]
struct Rollout {
    query: Vec<u32>,
    response: Vec<u32>,
    old_log_probs: Vec<f32>,
    old_values: Vec<f32>,
    advantages: Vec<f32>,
    returns: Vec<f32>,
    reference_log_probs: Vec<f32>,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    values: Vec<f32>,
}

struct GoldenPolicy {
    checkpoint: BloomCheckpoint,
    values: Vec<f32>,
    expected: Value,
    rollouts: Vec<Rollout>,
}

fn tensors(file: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/ppo");
    std::fs::read(folder.join(file)).unwrap()
}

fn tensor(bytes: &[u8], name: &str) -> Option<Vec<f32>> {
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    Some(bytemuck::pod_collect_to_vec(file.tensor(name).ok()?.data()))
}

fn policy() -> GoldenPolicy {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom/ppo");
    let checkpoint = BloomCheckpoint::open(&folder).unwrap();
    let mut values = checkpoint.to_f32().unwrap();
    let head = tensors("value_head.safetensors");
    for p in checkpoint.config.value_head_parameters() {
        values.extend(tensor(&head, &p.name).unwrap());
    }
    let expected: Value = serde_json::from_slice(&tensors("expected.json")).unwrap();
    let rollouts = serde_json::from_value(expected["rollouts"].clone()).unwrap();
    GoldenPolicy { checkpoint, values, expected, rollouts }
}

/// What a pass over some of the golden rollouts gives.
struct Pass {
    loss: f64,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    values: Vec<f32>,
}

impl GoldenPolicy {
    fn model(&self, frozen: usize) -> TrainModel {
        let config = self.checkpoint.config.clone();
        TrainModel::new_with_value_head(config, self.values.clone()).frozen(frozen)
    }

    fn setting(&self, name: &str) -> f32 {
        self.expected["settings"][name].as_f64().unwrap() as f32
    }

    /// Adds gradients of the mean loss over the tokens of all rollouts, from a pass over some.
    fn pass(
        &self,
        cpu: &Cpu,
        (model, space): (&TrainModel, &mut Workspace<Cpu>),
        rollouts: &[usize],
        (entropy, kl): (f32, f32),
        grads: &mut Vec<f32>,
    ) -> Pass {
        let all: usize = self.rollouts.iter().map(|r| r.response.len()).sum();
        let scale = 1.0 / all as f32;
        let mut batch = PackedBatch::default();
        for &i in rollouts {
            let r = &self.rollouts[i];
            batch.push(&[&r.query[..], &r.response].concat(), r.query.len());
        }
        let column = |of: fn(&Rollout) -> &Vec<f32>| {
            let numbers: Vec<f32> =
                rollouts.iter().flat_map(|&i| of(&self.rollouts[i])).copied().collect();
            let mut column = Tensor::default();
            cpu.upload_column(&mut column, &numbers).unwrap();
            column
        };
        let (old_log_probs, advantages) = (column(|r| &r.old_log_probs), column(|r| &r.advantages));
        let reference = column(|r| &r.reference_log_probs);
        let (old_values, returns) = (column(|r| &r.old_values), column(|r| &r.returns));
        let tokens = TokenLoss::ClippedPpo(ClippedPpo {
            old_log_probs: &old_log_probs,
            advantages: &advantages,
            reference_log_probs: (kl > 0.0).then_some(&reference),
            clip: self.setting("clip"),
            kl,
            entropy,
            scale,
        });
        let scalars = ScalarLoss::ClippedValue(ClippedValue {
            old_values: &old_values,
            returns: &returns,
            clip: self.setting("value_clip"),
            coefficient: self.setting("vf_coef"),
            scale,
        });
        let objective = Objective { tokens: Some(&tokens), scalars: Some(&scalars) };
        let (mut sums, mut stats) = (StepSums::default(), TokenStats::default());
        let to = LossOutput {
            sums: &mut sums,
            stats: Some(&mut stats),
            gradients: Some(Backward::to(grads)),
        };
        model.objective(cpu, (Precision::F32, &batch), space, &objective, to);
        Pass {
            loss: sums.loss / all as f64,
            log_probs: cpu.download_column(&stats.log_probs).unwrap(),
            entropies: cpu.download_column(&stats.entropies).unwrap(),
            values: cpu.download_column(space.scalars()).unwrap(),
        }
    }
}

const ALL: [usize; 5] = [0, 1, 2, 3, 4];

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

#[test]
fn a_policys_losses_and_every_gradient_are_pytorchs() {
    let golden = policy();
    let theirs = tensors("gradients.safetensors");
    let (entropy, kl) = (golden.setting("entropy_coef"), golden.setting("kl_coef"));
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for (name, prefix, coefficients, frozen) in [
            ("plain", "", (0.0, 0.0), 0),
            ("entropy", "entropy.", (entropy, 0.0), 0),
            ("kl", "kl.", (0.0, kl), 0),
            ("frozen", "frozen.", (0.0, 0.0), 2),
        ] {
            let model = golden.model(frozen);
            let mut grads = vec![0f32; model.values.len()];
            let space = &mut Workspace::default();
            let pass = golden.pass(&cpu, (&model, space), &ALL, coefficients, &mut grads);
            let loss = golden.expected[name]["loss"].as_f64().unwrap();
            expect(pass.loss, loss, 1e-5, name);
            let norm = grads.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            let expected = golden.expected[name]["gradient_norm"].as_f64().unwrap();
            expect(norm, expected, 1e-4, name);
            let mut compared = 0;
            let mut start = 0;
            for p in model.parameters() {
                let ours = &grads[start..start + p.len()];
                let trained = start >= model.trained().start;
                start += p.len();
                assert!(trained || ours.iter().all(|g| *g == 0.0), "{} is frozen", p.name);
                let Some(theirs) = tensor(&theirs, &format!("{prefix}{}", p.name)) else {
                    continue;
                };
                let error = relative_error(ours, &theirs);
                assert!(error < 1e-4, "{isa:?} {name}: {} off by {error:e}", p.name);
                compared += 1;
            }
            assert!(compared >= 5, "{name}");
            let theirs = |of: fn(&Rollout) -> &Vec<f32>| -> Vec<f32> {
                golden.rollouts.iter().flat_map(of).copied().collect()
            };
            for (ours, theirs) in [
                (&pass.log_probs, theirs(|r| &r.log_probs)),
                (&pass.entropies, theirs(|r| &r.entropies)),
                (&pass.values, theirs(|r| &r.values)),
            ] {
                let most = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
                assert!(most.fold(0.0, f32::max) < 2e-5, "{isa:?} {name}");
            }
        }
    }
}

#[test]
fn three_steps_end_with_pytorchs_parameters() {
    let golden = policy();
    let theirs = tensors("after_steps.safetensors");
    let cpu = Cpu::new(2, Isa::detect());
    for (prefix, name, frozen) in [("", "plain", 0), ("frozen.", "frozen", 2)] {
        let mut model = golden.model(frozen);
        let options = AdamWOptions {
            beta1: golden.setting("beta1"),
            beta2: golden.setting("beta2"),
            epsilon: golden.setting("epsilon"),
            weight_decay: golden.setting("weight_decay"),
        };
        let shard = std::iter::once(model.trained()).collect();
        let mut optimizer = AdamW::of_shard(&cpu, &model.parameters(), options, shard).unwrap();
        let losses = numbers(&golden.expected[name]["losses"]);
        let mut space = Workspace::default();
        for (step, expected) in losses.iter().enumerate() {
            let mut grads = vec![0f32; model.values.len()];
            let of = (&model, &mut space);
            let loss = golden.pass(&cpu, of, &ALL, (0.0, 0.0), &mut grads).loss;
            expect(loss, *expected, 1e-4, name);
            if step == 3 {
                break;
            }
            let mut sums = StepSums { loss, ..StepSums::default() };
            optimizer.squared_norm(&cpu, &grads, &mut sums);
            let learning_rate = golden.setting("learning_rate");
            let size = StepSize { learning_rate, max_norm: golden.setting("max_norm") };
            optimizer.step(&cpu, (&mut model.values, &grads), size, &sums);
        }
        let mut start = 0;
        for p in model.parameters() {
            let ours = &model.values[start..start + p.len()];
            let before = &golden.values[start..start + p.len()];
            let trained = start >= model.trained().start;
            start += p.len();
            assert!(trained || ours == before, "{} is frozen", p.name);
            // the keys' biases have no gradient but rounding's, of which Adam makes whole steps
            if p.name.ends_with("query_key_value.bias") {
                continue;
            }
            let Some(theirs) = tensor(&theirs, &format!("{prefix}{}", p.name)) else { continue };
            let error = relative_error(ours, &theirs);
            assert!(error < 1e-4, "{prefix}{} off by {error:e}", p.name);
        }
    }
}

#[test]
fn gradients_depend_neither_on_micro_batches_nor_on_the_order_of_packing() {
    let golden = policy();
    let cpu = Cpu::new(2, Isa::detect());
    let model = golden.model(0);
    let gradients = |parts: &[&[usize]]| {
        let mut grads = vec![0f32; model.values.len()];
        let mut space = Workspace::default();
        for part in parts {
            golden.pass(&cpu, (&model, &mut space), part, (0.01, 0.1), &mut grads);
        }
        grads
    };
    let whole = gradients(&[&ALL]);
    let parts: [&[&[usize]]; 3] =
        [&[&[0], &[1], &[2], &[3], &[4]], &[&[4, 2], &[0, 1, 3]], &[&[3, 4, 0, 1, 2]]];
    for parts in parts {
        let error = relative_error(&gradients(parts), &whole);
        assert!(error < 1e-6, "{parts:?} off by {error:e}");
    }
}

#[test]
fn a_trunk_that_is_kept_gives_the_same_bits() {
    let golden = policy();
    let cpu = Cpu::new(2, Isa::detect());
    for frozen in [1, 2, 3] {
        let model = golden.model(frozen);
        let mut space = Workspace::default();
        let mut first = vec![0f32; model.values.len()];
        let a = golden.pass(&cpu, (&model, &mut space), &ALL, (0.01, 0.1), &mut first);
        let trunk = space.take_trunk(frozen);
        // something else goes through the same memory meanwhile
        golden.pass(&cpu, (&model, &mut space), &[1], (0.0, 0.0), &mut vec![0.0; first.len()]);
        space.put_trunk(frozen, trunk);
        let mut second = vec![0f32; model.values.len()];
        let b = golden.pass(&cpu, (&model, &mut space), &ALL, (0.01, 0.1), &mut second);
        assert_eq!((a.loss, a.log_probs, a.values), (b.loss, b.log_probs, b.values));
        assert!(first == second, "{frozen} frozen layers");
    }
}

/// The share of commas among an output's characters, which a policy learns to raise in a few
/// rounds.
struct Commas;

impl Reward for Commas {
    fn name(&self) -> &str {
        "commas"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        let share = |text: &str| {
            let commas = text.chars().filter(|c| *c == ',').count();
            10.0 * commas as f64 / text.chars().count().max(20) as f64
        };
        Ok(rewrites.iter().map(|r| share(r.output)).collect())
    }
}

/// As `Commas` in the first round, then so large that squares overflow in f32.
struct Overflow(u32);

impl Reward for Overflow {
    fn name(&self) -> &str {
        "commas"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        self.0 += 1;
        let scores = Commas.score(rewrites)?;
        Ok(scores.into_iter().map(|s| if self.0 > 1 { 1e30 * (s + 1.0) } else { s }).collect())
    }
}

/// Keeps what a run says, and raises the flag after so many rounds.
struct Watch<'a> {
    rounds: Vec<RoundMetrics>,
    warnings: Vec<String>,
    stop: &'a AtomicBool,
    stop_after: u64,
}

impl PpoObserver for Watch<'_> {
    fn round(&mut self, _: u64, metrics: &RoundMetrics) {
        self.rounds.push(metrics.clone());
        if metrics.round() == self.stop_after {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn warn(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }
}

const PROMPTS: [&str; 5] = [
    "a cat in the rain",
    "an old house by the sea",
    "two dogs",
    "portrait of a queen",
    "a red car",
];

fn options(output: &Path) -> PpoOptions {
    let mut options = PpoOptions {
        rounds: 4,
        rollouts: 8,
        epochs: 2,
        minibatch: 4,
        learning_rate: 1e-4,
        save_every: 1,
        sample_every: 0,
        settings: serde_json::json!({ "of": "tests" }),
        ..PpoOptions::recipe(2, output.into())
    };
    options.sampling.max_new = 12;
    options
}

struct Ended {
    outcome: Result<PpoOutcome>,
    rounds: Vec<RoundMetrics>,
    warnings: Vec<String>,
    values: Vec<f32>,
}

/// A run of the embedded model.
fn run(options: PpoOptions, reward: Box<dyn Reward>, resume: bool, stop_after: u64) -> Ended {
    let cpu = Cpu::new(2, Isa::detect());
    let tokenizer = Arc::new(embedded::tokenizer());
    let prompter = Prompter { tokenizer: tokenizer.clone(), template: embedded::template() };
    let prompt = |raw: &str| PolicyPrompt {
        raw: raw.into(),
        reference: Some(format!("{raw}, detailed")),
        ids: prompter.encode(raw).unwrap(),
    };
    let prompts = PROMPTS.map(prompt).to_vec();
    let checkpoint = embedded::checkpoint();
    let model = TrainModel::new(checkpoint.config.clone(), checkpoint.to_f32().unwrap());
    let model = match options.algorithm {
        Algorithm::Ppo => model.with_value_head(1),
        _ => model,
    };
    std::fs::create_dir_all(&options.output).unwrap();
    let mut ppo = Ppo {
        backend: &cpu,
        model: model.frozen(4),
        companions: Companions::default(),
        tokenizer: &tokenizer,
        samples: prompts[..2].to_vec(),
        prompts,
        reward: CombinedReward::new(vec![(reward, 1.0)], false),
        watch: None,
        options,
    };
    let stop = AtomicBool::new(false);
    let mut watch = Watch { rounds: vec![], warnings: vec![], stop: &stop, stop_after };
    let outcome = ppo.run(resume, &stop, &mut watch);
    let Watch { rounds, warnings, .. } = watch;
    Ended { outcome, rounds, warnings, values: ppo.model.values }
}

/// The lines of a run's metrics without what depends on the clock.
fn lines(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            let map = value.as_object_mut().unwrap();
            map.retain(|name, _| !name.starts_with("time/") && !name.starts_with("perf/"));
            value
        })
        .collect()
}

#[test]
fn a_run_that_stops_and_goes_on_is_the_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    for algorithm in [Algorithm::Ppo, Algorithm::Grpo] {
        let group = if algorithm == Algorithm::Ppo { 1 } else { 4 };
        let of = |output: &Path| PpoOptions { algorithm, group, ..options(output) };
        let expected = run(of(&whole), Box::new(Commas), false, u64::MAX);
        assert_eq!(expected.outcome.unwrap(), PpoOutcome::Finished);
        let first = run(of(&cut), Box::new(Commas), false, 2);
        assert!(matches!(first.outcome.unwrap(), PpoOutcome::Stopped(_)));
        // a crash may leave a line of a round that no checkpoint has, cut in the middle
        let metrics = cut.join("metrics.jsonl");
        let mut text = std::fs::read_to_string(&metrics).unwrap();
        text.push_str("{\"round\":3,\"objective/kl\":0.5}\n{\"round\":4,");
        std::fs::write(&metrics, text).unwrap();
        let second = run(of(&cut), Box::new(Commas), true, u64::MAX);
        assert_eq!(second.outcome.unwrap(), PpoOutcome::Finished);
        assert_eq!(second.rounds.len(), 2);
        assert_eq!(lines(&cut), lines(&whole), "{algorithm:?}");
        assert!(second.values == expected.values, "{algorithm:?}");
        // other settings are refused
        let mut other = of(&cut);
        other.settings = serde_json::json!({ "of": "others" });
        let e = run(other, Box::new(Commas), true, u64::MAX).outcome.unwrap_err().to_string();
        assert!(e.contains("other settings (of)"), "{e}");
        let saved = BloomCheckpoint::open(&cut.join("checkpoints/step-0000004")).unwrap();
        assert!(saved.to_f32().unwrap() == second.values[..saved.config.parameter_count()]);
        std::fs::remove_dir_all(&cut).unwrap();
        std::fs::remove_dir_all(&whole).unwrap();
    }
}

#[test]
fn the_first_round_has_no_divergence_and_ratios_of_one_whatever_is_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = PpoOptions { rounds: 1, epochs: 1, minibatch: 8, ..options(folder.path()) };
    options.sampling.sampling.temperature = 0.7;
    options.sampling.sampling.top_k = 50;
    options.sampling.sampling.repetition_penalty = 1.2;
    let ended = run(options, Box::new(Commas), false, u64::MAX);
    ended.outcome.unwrap();
    let m = &ended.rounds[0];
    assert_eq!(m.get("objective/kl"), 0.0);
    assert_eq!(m.get("objective/non_score_reward"), 0.0);
    assert_eq!((m.get("val/ratio"), m.get("val/ratio_var")), (1.0, 0.0));
    assert_eq!(m.get("policy/clipfrac_avg"), 0.0);
    assert_eq!(m.get("policy/approxkl_avg"), 0.0);
}

#[test]
fn every_algorithm_raises_its_reward() {
    for (algorithm, group) in [(Algorithm::Ppo, 1), (Algorithm::Grpo, 4), (Algorithm::Rloo, 4)] {
        let folder = tempfile::tempdir().unwrap();
        let options = PpoOptions {
            algorithm,
            group,
            rounds: 12,
            rollouts: 16,
            learning_rate: 5e-4,
            save_every: 0,
            kl_coefficient: 0.01,
            ..options(folder.path())
        };
        let ended = run(options, Box::new(Commas), false, u64::MAX);
        ended.outcome.unwrap();
        let mean = |rounds: &[RoundMetrics]| {
            rounds.iter().map(|m| m.get("objective/scores")).sum::<f64>() / rounds.len() as f64
        };
        let (first, last) = (mean(&ended.rounds[..3]), mean(&ended.rounds[9..]));
        assert!(last > 1.3 * first, "{algorithm:?}: {first} to {last}");
        for file in ["curves.svg", "metrics.jsonl", "samples/round-0000000.txt"] {
            assert!(folder.path().join(file).metadata().unwrap().len() > 50, "{file}");
        }
    }
}

#[test]
fn groups_of_one_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for algorithm in [Algorithm::Grpo, Algorithm::Rloo] {
        let options = PpoOptions { algorithm, group: 1, ..options(folder.path()) };
        let e = options.check().unwrap_err().to_string();
        assert!(e.contains("--group 1") && e.contains("at least 2"), "{e}");
    }
    let e = PpoOptions { rollouts: 10, group: 4, ..options(folder.path()) }.check().unwrap_err();
    assert!(e.to_string().contains("no multiple"), "{e}");
}

#[test]
fn what_is_no_number_names_the_step_and_the_tensor_and_leaves_the_last_good_state() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, rounds| PpoOptions {
        rounds,
        reward_clip: None,
        scale_reward: false,
        ..options(&folder.path().join(name))
    };
    let good = run(of("good", 1), Box::new(Commas), false, u64::MAX);
    good.outcome.unwrap();
    let bad = run(of("bad", 3), Box::new(Overflow(0)), false, u64::MAX);
    let e = bad.outcome.unwrap_err().to_string();
    assert!(e.contains("round 2, update 1: loss inf"), "{e}");
    assert!(e.contains("step-0000001"), "{e}");
    assert!(bad.values == good.values, "the step was not taken");
}

#[test]
fn a_monitor_stops_a_run_and_leaves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = PpoOptions { save_every: 0, ..options(folder.path()) };
    options.monitors.start_updates = 2;
    options.kl_estimator = KlEstimator::K3;
    options.monitors.kl = Threshold { limit: 1e-9, action: Action::Stop };
    let ended = run(options, Box::new(Commas), false, u64::MAX);
    let PpoOutcome::Alarmed { folder, message } = ended.outcome.unwrap() else {
        panic!("no alarm was raised")
    };
    assert!(folder.join("state.json").is_file() && !message.contains('\n'), "{message}");
    assert!(ended.warnings.contains(&message));
}
