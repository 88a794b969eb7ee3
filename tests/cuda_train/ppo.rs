//! A policy with a value head, reward models, and a whole round of PPO.

use crate::emulated::{Emulated, gpu};
use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::error::Result;
use beautiful_prompt::models::bloom::training::{Backward, Objective, TrainModel, Workspace};
use beautiful_prompt::models::bloom::{BloomCheckpoint, BloomConfig, RewardModel, save_model};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::ops::scalar_loss::{ClippedValue, ScalarLoss};
use beautiful_prompt::ops::token_loss::{ClippedPpo, LossOutput, TokenLoss};
use beautiful_prompt::ops::train::{PackedBatch, Precision, TrainBackend};
use beautiful_prompt::ops::{RolloutBackend, Tensor};
use beautiful_prompt::rewards::{CombinedReward, Reward, ScoredText};
use beautiful_prompt::tensor::DType;
use beautiful_prompt::text::{Tokenizer, train_tokenizer};
use beautiful_prompt::train::ppo::rollout::PolicyPrompt;
use beautiful_prompt::train::ppo::{Ppo, PpoObserver, PpoOptions, PpoOutcome, RoundMetrics};
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn cuda(check_order: bool, hopper: bool) -> Cuda<Emulated> {
    Cuda::new(gpu(check_order, hopper), DType::Bf16, false)
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// What a pass with both losses gives.
struct Passed {
    loss: f64,
    values: Vec<f32>,
    grads: Vec<f32>,
}

fn pass<B: TrainBackend>(b: &B, precision: Precision, frozen: usize) -> Result<Passed> {
    let model = TrainModel::random(BloomConfig::new(83, 64, 2, 1), 3).with_value_head(4);
    let model = model.frozen(frozen).place(b)?;
    let mut batch = PackedBatch::default();
    for length in [7, 3, 12] {
        let ids: Vec<u32> = (0..length).map(|t| (t * 29 + length) % 83).collect();
        batch.push(&ids, 2);
    }
    let labels = batch.labels.len();
    let column = |of: &dyn Fn(usize) -> f32| -> Result<Tensor<B>> {
        let mut column = Tensor::default();
        b.upload_column(&mut column, &(0..labels).map(of).collect::<Vec<_>>())?;
        Ok(column)
    };
    let old_log_probs = column(&|i| -4.4 + 0.1 * (i % 3) as f32)?;
    let advantages = column(&|i| [1.0, -0.5, 0.7, -1.2][i % 4])?;
    let old_values = column(&|i| 0.05 * (i % 5) as f32)?;
    let returns = column(&|i| [0.5, -0.2, 1.0][i % 3])?;
    let scale = 1.0 / labels as f32;
    let tokens = TokenLoss::ClippedPpo(ClippedPpo {
        old_log_probs: &old_log_probs,
        advantages: &advantages,
        reference_log_probs: None,
        clip: 0.9,
        kl: 0.0,
        entropy: 0.01,
        scale,
    });
    let scalars = ScalarLoss::ClippedValue(ClippedValue {
        old_values: &old_values,
        returns: &returns,
        clip: 0.2,
        coefficient: 0.5,
        scale,
    });
    let objective = Objective { tokens: Some(&tokens), scalars: Some(&scalars) };
    let (mut grads, mut sums) = (b.zeros(model.parameter_count())?, b.new_sums()?);
    let mut space = Workspace::default();
    let gradients = Some(Backward::to(&mut grads));
    let to = LossOutput { sums: &mut sums, stats: None, gradients };
    model.objective(b, (precision, &batch), &mut space, &objective, to);
    Ok(Passed {
        loss: b.sums(&sums)?.loss,
        values: b.download_column(space.scalars())?,
        grads: b.values(&grads)?.into_owned(),
    })
}

/// Activations and weights have 8 bits of mantissa on one side, as for gradients of language
/// modelling.
#[test]
fn both_losses_have_the_cpus_gradients_within_what_bf16_explains() {
    let cpu = Cpu::new(1, Isa::detect());
    for frozen in [0, 1, 2] {
        let theirs = pass(&cpu, Precision::F32, frozen).unwrap();
        for hopper in [false, true] {
            let ours = pass(&cuda(frozen == 1, hopper), Precision::Bf16, frozen).unwrap();
            assert!((ours.loss / theirs.loss - 1.0).abs() < 2e-2, "{} {}", ours.loss, theirs.loss);
            let error = relative_error(&ours.grads, &theirs.grads);
            assert!(error < 2e-2, "gradients off by {error:e}, {frozen} frozen, hopper {hopper}");
            // the head begins at zero
            assert!(ours.values.iter().all(|v| *v == 0.0));
            let model = TrainModel::random(BloomConfig::new(83, 64, 2, 1), 3).with_value_head(4);
            let first = model.frozen(frozen).trained().start;
            assert!(ours.grads[..first].iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn reward_models_score_as_on_the_cpu_and_alone_as_together() {
    let folder = tempfile::tempdir().unwrap();
    let model = TrainModel::random(BloomConfig::new(83, 64, 2, 1), 5).into_reward_model(7);
    save_model(folder.path(), &model.config, &model.values, DType::F32).unwrap();
    let checkpoint = BloomCheckpoint::open(folder.path()).unwrap();
    let texts: Vec<Vec<u32>> =
        [1, 5, 17, 30].iter().map(|n| (0..*n).map(|t| (t * 31 + n) % 83).collect()).collect();
    let cpu = Cpu::new(1, Isa::detect());
    let mut theirs = RewardModel::load(&cpu, checkpoint.clone(), None, 64).unwrap();
    let theirs = theirs.score(&cpu, &texts).unwrap();
    for hopper in [false, true] {
        let gpu = cuda(false, hopper);
        let mut ours = RewardModel::load(&gpu, checkpoint.clone(), None, 64).unwrap();
        let scores = ours.score(&gpu, &texts).unwrap();
        for (a, b) in scores.iter().zip(&theirs) {
            assert!((a - b).abs() < 2e-2 * b.abs().max(1.0), "{a}, {b}, hopper {hopper}");
        }
    }
}

/// The share of words that begin with an "a".
struct LettersA;

impl Reward for LettersA {
    fn name(&self) -> &str {
        "letters"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        let share = |text: &str| {
            let count = text.chars().count().max(1) as f64;
            text.chars().filter(|c| *c == 'a').count() as f64 / count
        };
        Ok(rewrites.iter().map(|r| share(r.output)).collect())
    }
}

struct Keep(Vec<RoundMetrics>);

impl PpoObserver for Keep {
    fn round(&mut self, _: u64, metrics: &RoundMetrics) {
        self.0.push(metrics.clone());
    }

    fn warn(&mut self, message: &str) {
        panic!("{message}");
    }
}

fn options(output: &Path) -> PpoOptions {
    let mut options = PpoOptions {
        rounds: 2,
        rollouts: 4,
        epochs: 2,
        minibatch: 2,
        micro_tokens: 64,
        learning_rate: 1e-3,
        save_every: 0,
        sample_every: 0,
        ..PpoOptions::recipe(2, output.into())
    };
    options.sampling.max_new = 6;
    options
}

fn run<B: RolloutBackend>(
    b: &B,
    tokenizer: &Tokenizer,
    output: &Path,
) -> (Vec<RoundMetrics>, Vec<f32>) {
    let model = TrainModel::random(BloomConfig::new(300, 64, 2, 1), 3).with_value_head(4);
    let prompt = |text: &str| PolicyPrompt {
        raw: text.into(),
        reference: None,
        ids: tokenizer.encode_literal(text).unwrap(),
    };
    let mut ppo = Ppo {
        backend: b,
        model: model.frozen(1).place(b).unwrap(),
        companions: Companions::default(),
        tokenizer,
        prompts: ["a cat", "a dog in the rain", "stars"].map(prompt).to_vec(),
        samples: vec![],
        reward: CombinedReward::new(vec![(Box::new(LettersA), 1.0)], false),
        watch: None,
        options: options(output),
    };
    let mut keep = Keep(vec![]);
    let outcome = ppo.run(false, &AtomicBool::new(false), &mut keep).unwrap();
    assert_eq!(outcome, PpoOutcome::Finished);
    (keep.0, b.values(&ppo.model.values).unwrap().into_owned())
}

/// Rollouts read the parameters in training: the same bits for both, so that nothing is between the
/// log-probabilities of generation and of training but the order of sums.
#[test]
fn a_whole_run_of_ppo_shares_its_weights_with_its_rollouts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    train_tokenizer(&["a cat and a dog in the rain".to_owned()], 300, &path).unwrap();
    let tokenizer = Tokenizer::open(&path).unwrap();
    for hopper in [false, true] {
        let gpu = cuda(false, hopper);
        let output = folder.path().join(format!("hopper-{hopper}"));
        std::fs::create_dir_all(&output).unwrap();
        let (rounds, values) = run(&gpu, &tokenizer, &output);
        assert_eq!(rounds.len(), 2);
        assert_eq!(rounds[0].get("objective/kl"), 0.0, "the reference is the policy at first");
        assert!(rounds[0].get("rollout/max_log_prob_difference") < 0.05);
        assert!(rounds[1].get("rollout/max_log_prob_difference") < 0.05, "weights are refreshed");
        assert!(rounds[1].get("objective/kl").abs() > 0.0);
        let start = TrainModel::random(BloomConfig::new(300, 64, 2, 1), 3).with_value_head(4);
        let trained = start.frozen(1);
        let first = trained.trained().start;
        assert!(values[..first] == trained.values[..first], "frozen layers stay as they are");
        assert!(values[first..] != trained.values[first..]);
        // the policy is a plain model folder
        let saved = std::fs::read_dir(output.join("checkpoints")).unwrap().next().unwrap().unwrap();
        let saved = BloomCheckpoint::open(&saved.path()).unwrap();
        assert_eq!(saved.to_f32().unwrap(), values[..saved.config.parameter_count()]);
    }
}
