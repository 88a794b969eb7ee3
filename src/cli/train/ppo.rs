//! `bprompt train ppo`: a policy learns from rewards.

use super::super::hub::model_folder;
use super::super::model::{Device, DeviceChoice, ModelParts};
use super::super::print::{note, print_line};
use super::super::ranks::Ranks;
use super::super::{DeviceArgs, within};
use super::run::{PrecisionChoice, RecomputeChoice, SaveDtype, positive, training_device};
use crate::checkpoint::{Companions, MODEL_FILES, TOKENIZER_FILES};
use crate::data::records::read_policy_prompts;
use crate::engine::Sampling;
use crate::memory::MemoryPlan;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::{TrainModel, training_bytes_per_token};
use crate::models::embedded;
use crate::ops::RolloutBackend;
use crate::ops::cuda::Cuda;
use crate::rewards::{
    CombinedReward, ExternalOptions, Reward, RewardKind, RewardSpec, TextRewardModel,
    TextRewardOptions,
};
use crate::rewrite::Prompter;
use crate::tensor::DType;
use crate::text::Tokenizer;
use crate::text::template::Template;
use crate::train::monitors::MonitorLimits;
use crate::train::optimizer::AdamWOptions;
use crate::train::ppo::estimates::{KlEstimator, Whitening};
use crate::train::ppo::rollout::{PolicyPrompt, RolloutOptions};
use crate::train::ppo::{Algorithm, Ppo, PpoObserver, PpoOptions, PpoOutcome, RoundMetrics};
use crate::train::schedule::Schedule;
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Whose habits the defaults follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Compat {
    /// TRL's: whitening over tokens, minibatches shuffled in each pass
    Trl,
    /// The reference's trlX: whitening over padding too, all passes over a minibatch in a row, its
    /// two mistakes in scoring
    Trlx,
    /// DeepSpeed-Chat's: no whitening, a fixed coefficient of 0.1, rewards clipped at 5
    Deepspeed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RolloutDtype {
    /// As training multiplies
    Train,
    /// 8-bit weights, corrected by truncated importance sampling
    Int8,
}

#[derive(Args)]
pub struct PpoArgs {
    /// The policy to start from: a folder or org/name of one in Hugging Face's cache, or embedded.
    #[arg(long, value_name = "DIR|NAME", default_value = "embedded")]
    policy: PathBuf,
    /// What outputs are rewarded for, with its weight; may be given several times. A folder of a
    /// reward model, fidelity, clip-tokens[=N], repetition, cmd:COMMAND or http://HOST/PATH.
    #[arg(long, value_name = "REWARD:WEIGHT", required = true)]
    reward: Vec<RewardSpec>,
    /// Prompts to continue: records with "raw_prompt" and maybe "prompt", or text with one a line.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Folder of the run: the trained policy, checkpoints, metrics.jsonl, curves.svg, samples.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// v1, v2 or a file with {raw} in it; by default the policy's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// Where advantages come from.
    #[arg(long, value_enum, default_value_t = Algorithm::Ppo)]
    algorithm: Algorithm,
    /// Whose habits the defaults follow.
    #[arg(long, value_enum, default_value_t = Compat::Trl)]
    compat: Compat,
    /// A scorer that is not trained on and is watched for rewards being gamed; as --reward.
    #[arg(long, value_name = "REWARD")]
    watch: Option<RewardSpec>,
    #[command(flatten)]
    rollouts: RolloutArgs,
    #[command(flatten)]
    losses: LossArgs,
    #[command(flatten)]
    updates: UpdateArgs,
    /// Rounds between checkpoints; 0 saves none but the last.
    #[arg(long, default_value_t = 20)]
    save_every: u64,
    /// Checkpoints to keep, at least 1.
    #[arg(long, default_value_t = 2)]
    keep: usize,
    /// Rounds between samples of outputs; 0 for those before and after alone.
    #[arg(long, default_value_t = 20)]
    sample_every: u64,
    /// Prompts of which samples are written.
    #[arg(long, default_value_t = 8)]
    samples: usize,
    /// How the trained policy is stored.
    #[arg(long, value_enum, default_value_t = SaveDtype::Bf16)]
    save_dtype: SaveDtype,
    /// Seed of the order of the prompts and of the noise.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    resume: bool,
    /// Where to compute; auto takes a GPU if there is one that can.
    #[arg(long = "device", value_enum, default_value_t = DeviceChoice::Auto)]
    #[arg(env = "BPROMPT_DEVICE")]
    device_choice: DeviceChoice,
    #[command(flatten)]
    device: DeviceArgs,
}

/// How prompts are continued.
#[derive(Args)]
#[command(next_help_heading = "Rollouts")]
struct RolloutArgs {
    /// Rounds of rollouts and training.
    #[arg(long, default_value_t = 312)]
    rounds: u64,
    /// Rollouts of a round.
    #[arg(long, default_value_t = 64)]
    rollouts: usize,
    /// Candidates of one prompt, which share its computation; by default 1, and 8 where they are
    /// compared with each other.
    #[arg(long)]
    group: Option<usize>,
    /// Maximum tokens of a prompt in its template.
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Leave prompts out that are longer, and count them.
    #[arg(long)]
    skip_long_prompts: bool,
    /// Maximum tokens of a response.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Temperature of the sampling. Losses are of the model's own distribution, which is sampled
    /// from at 1, without top-k and top-p.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Samples from the likeliest tokens only; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Samples from the likeliest tokens that make up this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Makes seen tokens less likely; 1 for none.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Weights that rollouts read.
    #[arg(long, value_enum, default_value_t = RolloutDtype::Train)]
    rollout_dtype: RolloutDtype,
    /// Largest weight of a token that 8-bit weights have sampled.
    #[arg(long, default_value_t = 2.0)]
    importance_cap: f64,
}

/// What is rewarded and what is held against it.
#[derive(Args)]
#[command(next_help_heading = "Rewards and losses")]
struct LossArgs {
    /// Take each reward in standard deviations from its mean so far, before they are added up.
    #[arg(long)]
    normalize_rewards: bool,
    /// Whether a score is that of the output minus that of the data's own rewrite; by default where
    /// all prompts have one.
    #[arg(long)]
    delta_reward: Option<bool>,
    /// Largest absolute reward, 0 for no limit; by default 10.
    #[arg(long)]
    reward_clip: Option<f64>,
    /// Whether rewards are divided by the standard deviation of all so far; by default yes.
    #[arg(long)]
    scale_reward: Option<bool>,
    /// Seconds that an external scorer may take for a round.
    #[arg(long, default_value_t = 600)]
    reward_timeout: u64,
    /// Tokens of a text that reward models read; longer texts are cut on the left.
    #[arg(long, default_value_t = 384)]
    reward_tokens: usize,
    /// Factor of the penalty for moving away from the starting policy, at first; by default 0.05.
    #[arg(long)]
    kl_coefficient: Option<f64>,
    /// Divergence of a response, in nats, that the factor is steered towards; 0 leaves the factor
    /// as it is. By default 6.
    #[arg(long)]
    kl_target: Option<f64>,
    /// Responses over which a whole error moves the factor once.
    #[arg(long, default_value_t = 10_000.0)]
    kl_horizon: f64,
    /// How the divergence is estimated.
    #[arg(long, value_enum, default_value_t = KlEstimator::K1)]
    kl_estimator: KlEstimator,
    /// Whether the penalty is part of the loss instead of the rewards; by default for GRPO.
    #[arg(long)]
    kl_in_loss: Option<bool>,
    /// Discount of later rewards.
    #[arg(long, default_value_t = 1.0)]
    gamma: f64,
    /// Lambda of generalized advantage estimation.
    #[arg(long, default_value_t = 0.95)]
    lambda: f64,
    /// Over what advantages are whitened; by default masked.
    #[arg(long, value_enum)]
    whitening: Option<Whitening>,
    /// How far a ratio of probabilities may be from 1.
    #[arg(long, default_value_t = 0.2)]
    clip_range: f32,
    /// How far a value may be from the old one.
    #[arg(long, default_value_t = 0.2)]
    value_clip_range: f32,
    /// Factor of the values' loss.
    #[arg(long, default_value_t = 0.5)]
    value_coefficient: f32,
    /// Factor of the entropy, a bonus.
    #[arg(long, default_value_t = 0.0)]
    entropy_coefficient: f32,
}

/// How the policy is trained on its rollouts.
#[derive(Args)]
#[command(next_help_heading = "Updates")]
struct UpdateArgs {
    /// Passes over a round's rollouts.
    #[arg(long, default_value_t = 4)]
    ppo_epochs: usize,
    /// Rollouts of an optimizer step.
    #[arg(long, default_value_t = 32)]
    minibatch: usize,
    /// Last layers that are trained; the embedding and the others stay as they are. With as many as
    /// the policy has, all of it is trained.
    #[arg(long, default_value_t = 8)]
    unfrozen_layers: usize,
    /// Highest learning rate, above 0.
    #[arg(long, default_value_t = 5e-6)]
    learning_rate: f64,
    #[arg(long, value_enum, default_value_t = Schedule::Constant)]
    schedule: Schedule,
    /// Part of the rounds that warms up; 0 for none.
    #[arg(long, default_value_t = 0.0)]
    warmup: f64,
    /// Decay of AdamW's first moment.
    #[arg(long, default_value_t = 0.9)]
    beta1: f32,
    /// Decay of AdamW's second moment.
    #[arg(long, default_value_t = 0.95)]
    beta2: f32,
    /// AdamW's epsilon, above 0.
    #[arg(long, default_value_t = 1e-8)]
    epsilon: f32,
    /// Part of the weights that AdamW takes away at a learning rate of 1; 0 for none.
    #[arg(long, default_value_t = 1e-6)]
    weight_decay: f32,
    /// Largest norm of the gradient, above 0.
    #[arg(long, default_value_t = 1.0)]
    clip_norm: f32,
    /// Maximum tokens of one forward and backward pass.
    #[arg(long, default_value_t = 8192)]
    micro_tokens: usize,
    /// What the backward pass computes again instead of keeping it.
    #[arg(long, value_enum, default_value_t = RecomputeChoice::None)]
    recompute: RecomputeChoice,
    /// How products are computed; bf16 rounds their operands, weights and sums stay f32.
    #[arg(long, value_enum, default_value_t = PrecisionChoice::Bf16)]
    precision: PrecisionChoice,
}

/// What a run starts from.
struct Start {
    model: TrainModel,
    tokenizer: Arc<Tokenizer>,
    companions: Companions,
    prompts: Vec<PolicyPrompt>,
}

impl PpoArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let ranks = Ranks::from_env()?;
        ensure!(
            ranks.count() == 1,
            "train ppo runs in one process; start it without a launcher of several ranks"
        );
        self.check()?;
        let start = self.start()?;
        let options = self.options(&start)?;
        options.check()?;
        let (choice, precision) = (self.device_choice, self.updates.precision);
        let config = &start.model.config;
        match training_device((choice, precision), &self.device, config, &ranks)? {
            Device::Cpu(cpu) => self.train_on(&cpu, start, options),
            Device::Cuda(driver) => {
                note!("training on {}", driver.name);
                let cuda = Cuda::new(Rc::new(driver), DType::Bf16, false);
                self.train_on(&cuda, start, options)
            }
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let (r, l, u) = (&self.rollouts, &self.losses, &self.updates);
        within("--rounds", r.rounds, 1.., "[1, ...]")?;
        within("--rollouts", r.rollouts, 1..=1 << 16, "[1, 65536]")?;
        within("--prompt-tokens", r.prompt_tokens, 1..=1 << 20, "[1, 1048576]")?;
        within("--max-new-tokens", r.max_new_tokens, 1..=1 << 20, "[1, 1048576]")?;
        within("--temperature", r.temperature as f64, positive(100.0), "(0, 100]")?;
        within("--top-p", r.top_p as f64, positive(1.0), "(0, 1]")?;
        within("--repetition-penalty", r.repetition_penalty as f64, positive(100.0), "(0, 100]")?;
        within("--importance-cap", r.importance_cap, positive(1e6), "(0, 1e6]")?;
        within("--reward-clip", l.reward_clip.unwrap_or(0.0), 0.0..=1e9, "[0, 1e9]")?;
        within("--reward-timeout", l.reward_timeout, 1..=86400, "[1, 86400]")?;
        within("--reward-tokens", l.reward_tokens, 1..=1 << 20, "[1, 1048576]")?;
        within("--kl-coefficient", l.kl_coefficient.unwrap_or(0.0), 0.0..=1e6, "[0, 1e6]")?;
        within("--kl-target", l.kl_target.unwrap_or(0.0), 0.0..=1e6, "[0, 1e6]")?;
        within("--kl-horizon", l.kl_horizon, positive(1e12), "(0, 1e12]")?;
        within("--gamma", l.gamma, 0.0..=1.0, "[0, 1]")?;
        within("--lambda", l.lambda, 0.0..=1.0, "[0, 1]")?;
        within("--clip-range", l.clip_range as f64, positive(1.0), "(0, 1]")?;
        within("--value-clip-range", l.value_clip_range as f64, positive(1e9), "(0, 1e9]")?;
        within("--value-coefficient", l.value_coefficient, 0.0..=1e6, "[0, 1e6]")?;
        within("--entropy-coefficient", l.entropy_coefficient, 0.0..=1e6, "[0, 1e6]")?;
        within("--ppo-epochs", u.ppo_epochs, 1..=1000, "[1, 1000]")?;
        within("--minibatch", u.minibatch, 1..=1 << 16, "[1, 65536]")?;
        within("--unfrozen-layers", u.unfrozen_layers, 1.., "[1, ...]")?;
        within("--learning-rate", u.learning_rate, positive(1.0), "(0, 1]")?;
        within("--warmup", u.warmup, 0.0..=1.0, "[0, 1]")?;
        within("--beta1", u.beta1, 0.0..1.0, "[0, 1)")?;
        within("--beta2", u.beta2, 0.0..1.0, "[0, 1)")?;
        within("--epsilon", u.epsilon as f64, positive(1.0), "(0, 1]")?;
        within("--weight-decay", u.weight_decay, 0.0..=1.0, "[0, 1]")?;
        within("--clip-norm", u.clip_norm as f64, positive(1e9), "(0, 1e9]")?;
        within("--micro-tokens", u.micro_tokens, 1..=1 << 28, "[1, 268435456]")?;
        within("--keep", self.keep, 1.., "[1, ...]: a checkpoint to go on from has to stay")?;
        ensure!(
            self.resume || !self.output.exists(),
            "{}: exists already; --resume goes on with it, or choose another --output",
            self.output.display()
        );
        ensure!(
            !self.output.exists() || self.output.is_dir(),
            "{}: is a file; --output names the folder of the run",
            self.output.display()
        );
        Ok(())
    }

    /// The policy, its vocabulary and the prompts.
    fn start(&self) -> anyhow::Result<Start> {
        let named = (self.policy != Path::new("embedded")).then_some(self.policy.as_path());
        let ModelParts { checkpoint, tokenizer, template, .. } = ModelParts::open(named)?;
        let template = match (&self.template, template) {
            (Some(name), _) => Template::named(name)?,
            (None, Some(own)) => own,
            (None, None) => Template::named("v1")?,
        };
        let mut companions = Companions::default();
        match named {
            Some(named) => {
                let folder = model_folder(named)?;
                companions.read(&folder, &MODEL_FILES)?;
                companions.read(&folder, &TOKENIZER_FILES)?;
            }
            None => {
                companions.set("generation_config.json", embedded::GENERATION_CONFIG);
                companions.set("tokenizer.json", embedded::TOKENIZER);
            }
        }
        companions.set("template.txt", format!("{}\n", template.text()));
        let tokenizer = Arc::new(tokenizer);
        let prompter = Prompter { tokenizer: tokenizer.clone(), template };
        let prompts = self.prompts(&prompter, &checkpoint.config)?;
        let values = checkpoint.to_f32()?;
        let config = checkpoint.config;
        let frozen = config.layers.saturating_sub(self.updates.unfrozen_layers);
        let model = TrainModel::new(config, values);
        let model = match self.algorithm {
            Algorithm::Ppo => model.with_value_head(self.seed),
            _ => model,
        };
        Ok(Start { model: model.frozen(frozen), tokenizer, companions, prompts })
    }

    fn prompts(
        &self,
        prompter: &Prompter,
        config: &BloomConfig,
    ) -> anyhow::Result<Vec<PolicyPrompt>> {
        let (r, path) = (&self.rollouts, self.prompts.display());
        let whole = r.prompt_tokens + r.max_new_tokens;
        ensure!(
            r.prompt_tokens < config.context,
            "--prompt-tokens {}: the policy's context is {}",
            r.prompt_tokens,
            config.context
        );
        ensure!(
            whole <= config.context,
            "--prompt-tokens {} and --max-new-tokens {} are {whole}, the policy's context is {}",
            r.prompt_tokens,
            r.max_new_tokens,
            config.context
        );
        let (mut prompts, mut long) = (Vec::new(), 0);
        for (place, raw, reference) in read_policy_prompts(&self.prompts)? {
            let ids = prompter.encode(&raw).with_context(|| format!("{path}: {place}"))?;
            if ids.len() > r.prompt_tokens {
                ensure!(
                    r.skip_long_prompts,
                    "{path}: {place} has {} tokens in its template, --prompt-tokens is {}; raise \
                    it, or leave such prompts out with --skip-long-prompts",
                    ids.len(),
                    r.prompt_tokens
                );
                long += 1;
                continue;
            }
            prompts.push(PolicyPrompt { raw, reference, ids });
        }
        if long > 0 {
            note!("{path}: left out {long} prompts of more than {} tokens", r.prompt_tokens);
        }
        ensure!(
            !prompts.is_empty(),
            "{path}: holds no prompts of at most {} tokens",
            r.prompt_tokens
        );
        Ok(prompts)
    }

    /// Whether scores are relative to those of the data's own rewrites.
    fn delta_reward(&self, prompts: &[PolicyPrompt]) -> anyhow::Result<bool> {
        let missing = prompts.iter().filter(|p| p.reference.is_none()).count();
        if self.losses.delta_reward == Some(true) {
            ensure!(
                missing == 0,
                "{}: {missing} of {} prompts have no \"prompt\" of their own, which \
                --delta-reward true compares with",
                self.prompts.display(),
                prompts.len()
            );
        }
        Ok(self.losses.delta_reward.unwrap_or(missing == 0))
    }

    fn sampling(&self, eos: u32) -> RolloutOptions {
        let r = &self.rollouts;
        RolloutOptions {
            sampling: Sampling {
                temperature: r.temperature,
                top_k: r.top_k,
                top_p: r.top_p,
                repetition_penalty: r.repetition_penalty,
                seed: self.seed,
                ..Sampling::default()
            },
            max_new: r.max_new_tokens,
            min_new: 0,
            eos,
            ignore_eos: false,
        }
    }

    fn options(&self, start: &Start) -> anyhow::Result<PpoOptions> {
        let (r, l, u, compat) = (&self.rollouts, &self.losses, &self.updates, self.compat);
        let deepspeed = compat == Compat::Deepspeed;
        let target = l.kl_target.unwrap_or(if deepspeed { 0.0 } else { 6.0 });
        let clip = l.reward_clip.unwrap_or(if deepspeed { 5.0 } else { 10.0 });
        let alone = self.algorithm == Algorithm::Ppo;
        let optimizer = AdamWOptions {
            beta1: u.beta1,
            beta2: u.beta2,
            epsilon: u.epsilon,
            weight_decay: u.weight_decay,
        };
        let mut options = PpoOptions {
            algorithm: self.algorithm,
            rounds: r.rounds,
            rollouts: r.rollouts,
            group: r.group.unwrap_or(if alone { 1 } else { 8 }),
            sampling: self.sampling(start.model.config.eos_token_id),
            rollout_dtype: match (r.rollout_dtype, u.precision) {
                (RolloutDtype::Int8, _) => DType::Int8,
                (RolloutDtype::Train, PrecisionChoice::F32) => DType::F32,
                (RolloutDtype::Train, PrecisionChoice::Bf16) => DType::Bf16,
            },
            importance_cap: r.importance_cap,
            epochs: u.ppo_epochs,
            minibatch: u.minibatch,
            repeat_minibatch: compat == Compat::Trlx,
            micro_tokens: u.micro_tokens,
            optimizer,
            learning_rate: u.learning_rate,
            schedule: u.schedule,
            warmup: u.warmup,
            clip_norm: u.clip_norm,
            gamma: l.gamma,
            lambda: l.lambda,
            clip: l.clip_range,
            value_clip: l.value_clip_range,
            value_coefficient: l.value_coefficient,
            entropy_coefficient: l.entropy_coefficient,
            kl_coefficient: l.kl_coefficient.unwrap_or(if deepspeed { 0.1 } else { 0.05 }),
            kl_target: (target > 0.0).then_some(target),
            kl_horizon: l.kl_horizon,
            kl_estimator: l.kl_estimator,
            kl_in_loss: l.kl_in_loss.unwrap_or(self.algorithm == Algorithm::Grpo),
            whitening: l.whitening.unwrap_or(match compat {
                Compat::Trl => Whitening::Masked,
                Compat::Trlx => Whitening::Padded,
                Compat::Deepspeed => Whitening::None,
            }),
            reward_clip: (clip > 0.0).then_some(clip),
            scale_reward: l.scale_reward.unwrap_or(!deepspeed),
            delta_reward: self.delta_reward(&start.prompts)?,
            reference_quirks: compat == Compat::Trlx,
            precision: u.precision.into(),
            recompute: u.recompute.into(),
            seed: self.seed,
            save_every: self.save_every,
            keep: self.keep,
            sample_every: self.sample_every,
            monitors: MonitorLimits::default(),
            output: self.output.clone(),
            settings: json!({}),
        };
        options.settings = self.settings(&options, start);
        Ok(options)
    }

    /// All that decides the results, which a resumed run must share.
    fn settings(&self, o: &PpoOptions, start: &Start) -> serde_json::Value {
        let mut prompts = crc32fast::Hasher::new();
        for p in &start.prompts {
            prompts.update(p.raw.as_bytes());
            prompts.update(p.reference.as_deref().unwrap_or_default().as_bytes());
            prompts.update(bytemuck::cast_slice(&p.ids));
        }
        let rewards: Vec<String> = self.reward.iter().map(RewardSpec::to_string).collect();
        json!({
            "algorithm": o.algorithm,
            "compat": format!("{:?}", self.compat),
            "policy": crc32fast::hash(bytemuck::cast_slice(&start.model.values)),
            "prompts": prompts.finalize(),
            "rewards": rewards,
            "normalize_rewards": self.losses.normalize_rewards,
            "reward_tokens": self.losses.reward_tokens,
            "watch": self.watch.as_ref().map(RewardSpec::to_string),
            "rounds": o.rounds,
            "rollouts": [o.rollouts, o.group],
            "sampling": format!("{:?}", o.sampling),
            "rollout_dtype": o.rollout_dtype.name(),
            "importance_cap": o.importance_cap,
            "updates": [o.epochs, o.minibatch, o.micro_tokens, start.model.frozen_layers()],
            "optimizer": o.optimizer,
            "learning_rate": [o.learning_rate, o.warmup],
            "schedule": o.schedule,
            "clip": [o.clip, o.value_clip, o.clip_norm],
            "gae": [o.gamma, o.lambda],
            "coefficients": [o.value_coefficient, o.entropy_coefficient],
            "kl": json!([o.kl_coefficient, o.kl_target, o.kl_horizon]),
            "kl_penalty": json!([o.kl_estimator, o.kl_in_loss]),
            "whitening": o.whitening,
            "reward_scaling": json!([o.reward_clip, o.scale_reward, o.delta_reward]),
            "precision": format!("{:?}", o.precision),
            "seed": o.seed,
        })
    }

    /// A reward, wherever it is computed.
    fn open<'a, B: RolloutBackend>(
        &self,
        backend: &'a B,
        spec: &RewardSpec,
    ) -> anyhow::Result<Box<dyn Reward + 'a>> {
        let external = ExternalOptions {
            timeout: Duration::from_secs(self.losses.reward_timeout),
            ..ExternalOptions::default()
        };
        let options = TextRewardOptions {
            dtype: None,
            max_tokens: self.losses.reward_tokens,
            batch_tokens: 8192,
        };
        let load = |folder: &Path| -> crate::error::Result<Box<dyn Reward + 'a>> {
            Ok(Box::new(TextRewardModel::open(backend, folder, None, options)?))
        };
        if let RewardKind::Model(folder) = &spec.kind {
            let folder = model_folder(folder)?;
            return Ok(load(&folder)?);
        }
        Ok(spec.open(&external, load)?)
    }

    /// Says what memory the run takes; fails if it is more than there is.
    fn plan<B: RolloutBackend>(
        &self,
        backend: &B,
        start: &Start,
        options: &PpoOptions,
    ) -> anyhow::Result<()> {
        let (config, model) = (&start.model.config, &start.model);
        let (all, trained) = (model.parameter_count() as f64, model.trained().len() as f64);
        let each = self.rollouts.prompt_tokens + self.rollouts.max_new_tokens;
        let longest = (each * options.rollouts).min(options.micro_tokens.max(each)) as f64;
        let per_token = training_bytes_per_token(config, options.recompute, B::ACTIVATION_BYTES);
        let sequences = (each + 2 * crate::ops::BLOCK) * options.rollouts;
        let cache = config.kv_bytes_per_token(2) as f64 * sequences as f64;
        let copied = !backend.shares_weights(options.rollout_dtype);
        let (of_model, of_pass) =
            ("the policy's size", "--micro-tokens, or take --recompute layer");
        let copy = if copied { 2.0 * all } else { 0.0 };
        let plan = MemoryPlan::new()
            .with("weights", B::PARAMETER_BYTES as f64 * all, of_model)
            .with("weights of rollouts", copy, of_model)
            .with("reference", B::PARAMETER_BYTES as f64 * trained, "--unfrozen-layers")
            .with("gradients", 4.0 * all, of_model)
            .with("AdamW's moments", 8.0 * trained, "--unfrozen-layers")
            .with("activations", per_token * longest, of_pass)
            .with(
                "logits",
                backend.logit_bytes(longest as usize, config.vocab_size) as f64,
                of_pass,
            )
            .with("KV cache", cache, "--rollouts or --max-new-tokens");
        note!("memory: {plan}");
        Ok(match backend.free_memory() {
            Some(free) => plan.check_against(free),
            None => Ok(()),
        }?)
    }

    fn train_on<B: RolloutBackend>(
        &self,
        backend: &B,
        start: Start,
        options: PpoOptions,
    ) -> anyhow::Result<()> {
        let parts = self.reward.iter().map(|spec| Ok((self.open(backend, spec)?, spec.weight)));
        let parts = parts.collect::<anyhow::Result<Vec<_>>>()?;
        let reward = CombinedReward::new(parts, self.losses.normalize_rewards);
        let watch = self.watch.as_ref().map(|spec| self.open(backend, spec)).transpose()?;
        self.plan(backend, &start, &options)?;
        let Start { model, tokenizer, companions, prompts } = start;
        std::fs::create_dir_all(&self.output)
            .with_context(|| format!("{}: cannot create", self.output.display()))?;
        note!(
            "{}: {} parameters, of which {} are trained; {} prompts, {} rounds of {} rollouts",
            options.algorithm.name(),
            model.parameter_count(),
            model.trained().len(),
            prompts.len(),
            options.rounds,
            options.rollouts
        );
        let samples = prompts.iter().take(self.samples).cloned().collect();
        let mut bar = Bar::new(options.rounds);
        let algorithm = options.algorithm;
        let model = model.place(backend)?;
        let mut ppo = Ppo {
            backend,
            model,
            companions,
            tokenizer: &tokenizer,
            prompts,
            samples,
            reward,
            watch,
            options,
        };
        let stop = super::super::interrupt_flag()?;
        let outcome = ppo.run(self.resume, &stop, &mut bar);
        bar.bar.finish_and_clear();
        match outcome? {
            PpoOutcome::Finished => {
                ppo.write_policy(&self.output, self.save_dtype.dtype())?;
                print_line!("{}: {}", self.output.display(), bar.summary(algorithm))?;
                Ok(())
            }
            PpoOutcome::Stopped(folder) => {
                note!(
                    "stopped; saved {}; the same command with --resume goes on",
                    folder.display()
                );
                drop(ppo);
                std::process::exit(130);
            }
            PpoOutcome::Alarmed { folder, message } => {
                bail!("stopped by a monitor: {message}; saved {}", folder.display())
            }
        }
    }
}

/// A progress bar, and what the first and the last rounds were like.
struct Bar {
    bar: ProgressBar,
    first: Option<RoundMetrics>,
    last: Option<RoundMetrics>,
}

impl Bar {
    fn new(total: u64) -> Bar {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left")
            .expect("a fixed template");
        Bar { bar: ProgressBar::new(total).with_style(style), first: None, last: None }
    }

    fn summary(&self, algorithm: Algorithm) -> String {
        let (Some(first), Some(last)) = (&self.first, &self.last) else {
            return format!("{}, no round left to do", algorithm.name());
        };
        let of = |name: &str| format!("{:.3} -> {:.3}", first.get(name), last.get(name));
        format!(
            "{}, rounds {} to {}: reward {}, kept meaning {}, KL {:.2}",
            algorithm.name(),
            first.round(),
            last.round(),
            of("objective/scores"),
            of("text/kept_meaning"),
            last.get("objective/kl")
        )
    }
}

impl PpoObserver for Bar {
    fn round(&mut self, _total: u64, m: &RoundMetrics) {
        self.bar.set_position(m.round());
        self.bar.set_message(format!(
            "reward {:.3}  KL {:.2}  kept {:.3}  {:.0} tokens/s",
            m.get("objective/scores"),
            m.get("objective/kl"),
            m.get("text/kept_meaning"),
            m.get("perf/tokens_per_second")
        ));
        self.first.get_or_insert_with(|| m.clone());
        self.last = Some(m.clone());
    }

    fn warn(&mut self, message: &str) {
        self.bar.suspend(|| note!("{message}"));
    }
}
