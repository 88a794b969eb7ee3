//! Rounds of PPO on random weights: rollouts, scoring by a reward that costs nothing, training.

use super::floor::{Compared, Gauge, MinimumWork, Peaks};
use super::machine::Machine;
use crate::checkpoint::Companions;
use crate::error::{Error, Result};
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::TrainModel;
use crate::models::embedded;
use crate::ops::RolloutBackend;
use crate::ops::train::Precision;
use crate::random::PhiloxStream;
use crate::rewards::{CombinedReward, Reward, ScoredText};
use crate::tensor::DType;
use crate::train::ppo::rollout::PolicyPrompt;
use crate::train::ppo::{Ppo, PpoObserver, PpoOptions, RoundMetrics};
use serde::Serialize;
use std::sync::atomic::AtomicBool;

/// What to measure: a random policy and random prompts.
#[derive(Clone, Copy, Debug)]
pub struct PpoBenchOptions {
    /// Size of the hidden states.
    pub hidden: usize,
    /// Layers of the policy.
    pub layers: usize,
    /// Heads of attention in each layer.
    pub heads: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Rollouts of a round.
    pub rollouts: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens of each response.
    pub new_tokens: usize,
    /// Passes over a round's rollouts.
    pub epochs: usize,
    /// Rollouts of an optimizer step.
    pub minibatch: usize,
    /// Last layers that are trained.
    pub unfrozen_layers: usize,
    /// Precision of the GEMMs, and type of the weights that rollouts read.
    pub precision: Precision,
    /// Rounds that are measured; 0 counts as 1.
    pub repeats: usize,
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
pub struct PpoReport {
    /// Number of the policy's parameters, and of those that are trained.
    pub parameters: [usize; 2],
    /// Precision of the GEMMs.
    pub precision: &'static str,
    /// Instruction set, or the GPU's architecture.
    pub isa: String,
    /// Threads, or the GPU's multiprocessors.
    pub threads: usize,
    /// Name of the processor or GPU.
    pub processor: String,
    /// Of the best round.
    pub rollouts_per_second: f64,
    /// Seconds of the best round: rollouts, scoring, training, the rest.
    pub seconds: [f64; 4],
    /// Part of the round that is neither generation, scoring nor training.
    pub other_share: f64,
    /// Multiply-adds counted twice: rollouts, the two passes without gradients, training.
    pub flops: [f64; 3],
    /// Minimum seconds of a round: all FLOPs at the peak that was measured around it.
    #[serde(flatten)]
    pub compared: Compared,
}

/// A score for each rollout, different ones, in no time.
struct Constant;

impl Reward for Constant {
    fn name(&self) -> &str {
        "constant"
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        Ok((0..rewrites.len()).map(|i| (i % 7) as f64).collect())
    }
}

/// Keeps the times of the fastest round after the first, which allocates.
#[derive(Default)]
struct Fastest([f64; 4]);

impl PpoObserver for Fastest {
    fn round(&mut self, _: u64, m: &RoundMetrics) {
        let times =
            ["time/rollout", "time/reward", "time/train", "time/other"].map(|name| m.get(name));
        let sum = |t: &[f64; 4]| t.iter().sum::<f64>();
        if m.round() > 1 && (self.0 == [0.0; 4] || sum(&times) < sum(&self.0)) {
            self.0 = times;
        }
    }

    fn warn(&mut self, _: &str) {}
}

/// FLOPs of a round: of rollouts, of passes without gradients, of training. The layers that are not
/// trained are computed once for all of training.
fn flops(o: &PpoBenchOptions) -> [f64; 3] {
    let (h, new) = (o.hidden as f64, o.new_tokens as f64);
    let tokens = o.prompt_tokens as f64 + new;
    let layer = 24.0 * h * h + 4.0 * h * (tokens + 1.0) / 2.0;
    let trained = o.unfrozen_layers.min(o.layers) as f64;
    let frozen = o.layers as f64 - trained;
    let head = 2.0 * h * o.vocab as f64;
    let value = 4.0 * h * h;
    let all = (frozen + trained) * layer * tokens;
    // without the gradient of the LM head's weights where these are frozen with the embedding
    let head_passes = if frozen > 0.0 { 2.0 } else { 3.0 };
    let step = 3.0 * trained * layer * tokens + new * (head_passes * head + 3.0 * value);
    let evaluated = all + trained * layer * tokens + new * 2.0 * (head + value);
    let rollouts = o.rollouts as f64;
    [all + new * head, evaluated, o.epochs as f64 * step].map(|f| rollouts * f)
}

/// Measures rounds of PPO on a device.
///
/// # Errors
/// If the device has not the memory that they take.
pub fn run<B: RolloutBackend + Machine>(backend: &B, o: PpoBenchOptions) -> Result<PpoReport> {
    let mut config = BloomConfig::new(o.vocab, o.hidden, o.layers, o.heads);
    config.context = config.context.max(o.prompt_tokens + o.new_tokens);
    let mut words = PhiloxStream::new(1, 1);
    let mut prompt = |i: usize| PolicyPrompt {
        raw: format!("prompt {i}"),
        reference: None,
        ids: (0..o.prompt_tokens).map(|_| words.below(o.vocab) as u32).collect(),
    };
    let prompts: Vec<PolicyPrompt> = (0..o.rollouts).map(&mut prompt).collect();
    let (dtype, precision) = match o.precision {
        Precision::F32 => (DType::F32, "f32"),
        Precision::Bf16 => (DType::Bf16, "bf16"),
    };
    let folder = tempfile::tempdir().map_err(Error::io("a temporary folder", "create"))?;
    let mut options = PpoOptions {
        rounds: 1 + o.repeats.max(1) as u64,
        rollouts: o.rollouts,
        epochs: o.epochs,
        minibatch: o.minibatch,
        precision: o.precision,
        rollout_dtype: dtype,
        save_every: u64::MAX,
        sample_every: u64::MAX,
        ..PpoOptions::recipe(config.eos_token_id, folder.path().to_owned())
    };
    options.sampling.max_new = o.new_tokens;
    options.sampling.ignore_eos = true;
    let model = TrainModel::random(config, 1).with_value_head(1);
    let model = model.frozen(o.layers.saturating_sub(o.unfrozen_layers));
    let parameters = [model.parameter_count(), model.trained().len()];
    let tokenizer = embedded::tokenizer();
    let mut ppo = Ppo {
        backend,
        model: model.place(backend)?,
        companions: Companions::default(),
        tokenizer: &tokenizer,
        prompts,
        samples: vec![],
        reward: CombinedReward::new(vec![(Box::new(Constant), 1.0)], false),
        watch: None,
        options,
    };
    let mut fastest = Fastest::default();
    let mut gauge = Gauge::new(backend, dtype)?;
    let (outcome, reached) =
        gauge.around(|| ppo.run(false, &AtomicBool::new(false), &mut fastest))?;
    let (_, peaks) = (outcome, Peaks::default().best(reached));
    let seconds: f64 = fastest.0.iter().sum();
    let flops = flops(&o);
    let work = MinimumWork { bytes: 0.0, flops: flops.iter().sum(), working_set: 0.0 };
    let (processor, isa) = backend.describe();
    Ok(PpoReport {
        parameters,
        precision,
        isa,
        threads: backend.threads(),
        processor,
        rollouts_per_second: o.rollouts as f64 / seconds,
        seconds: fastest.0,
        other_share: fastest.0[3] / seconds,
        flops,
        compared: Compared::new(seconds, work, peaks, None),
    })
}
