//! What supervised runs of `bprompt train` have in common: settings, memory, ranks, the outcome.

use super::super::model::{Device, DeviceChoice, driver};
use super::super::print::{note, print_line};
use super::super::ranks::Ranks;
use super::super::{DeviceArgs, within};
use super::start::Start;
use crate::device::cuda::Driver;
use crate::error::Error;
use crate::models::bloom::training::{Recompute, TrainModel};
use crate::models::bloom::{BloomConfig, save_model};
use crate::ops::cuda::Cuda;
use crate::ops::train::{Precision, TrainBackend};
use crate::tensor::DType;
use crate::train::memory::{self, Remedies, RunSize};
use crate::train::optimizer::AdamWOptions;
use crate::train::parallel::Communicator;
use crate::train::report::StepMetrics;
use crate::train::run::{Observer, Outcome, Run, RunOptions, Task, Validation, difference};
use crate::train::schedule::Schedule;
use crate::train::state;
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::path::PathBuf;
use std::rc::Rc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrecisionChoice {
    F32,
    Bf16,
}

impl From<PrecisionChoice> for Precision {
    fn from(choice: PrecisionChoice) -> Precision {
        match choice {
            PrecisionChoice::F32 => Precision::F32,
            PrecisionChoice::Bf16 => Precision::Bf16,
        }
    }
}

/// What a training pass computes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecomputeChoice {
    /// Nothing
    None,
    /// Attention, layer norms and GELU
    Attention,
    /// Everything between a layer's input and its output
    Layer,
}

impl From<RecomputeChoice> for Recompute {
    fn from(choice: RecomputeChoice) -> Recompute {
        match choice {
            RecomputeChoice::None => Recompute::None,
            RecomputeChoice::Attention => Recompute::Attention,
            RecomputeChoice::Layer => Recompute::Layer,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SaveDtype {
    F32,
    F16,
    Bf16,
}

impl SaveDtype {
    pub fn dtype(self) -> DType {
        match self {
            SaveDtype::F32 => DType::F32,
            SaveDtype::F16 => DType::F16,
            SaveDtype::Bf16 => DType::Bf16,
        }
    }
}

/// How a run goes, whatever it learns.
#[derive(Args)]
pub struct RunArgs {
    /// Folder of the run: the trained model, checkpoints, metrics.jsonl, loss.svg.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Highest learning rate, above 0.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    pub schedule: Schedule,
    /// Part of the steps that warms up; 0 for none.
    #[arg(long, default_value_t = 0.03)]
    pub warmup: f64,
    /// Decay of AdamW's first moment, from 0 to below 1; 0 for none.
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f32,
    /// Decay of AdamW's second moment, from 0 to below 1; 0 for none.
    #[arg(long, default_value_t = 0.95)]
    pub beta2: f32,
    /// AdamW's epsilon, above 0.
    #[arg(long, default_value_t = 1e-8)]
    pub epsilon: f32,
    /// Part of the weights that AdamW takes away at a learning rate of 1; 0 for none.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f32,
    /// Largest norm of the gradient, above 0.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f32,
    /// How often every pair is seen, above 0; parts are possible.
    #[arg(long, default_value_t = 4.0)]
    pub epochs: f64,
    /// End after this many steps; 0 for no limit.
    #[arg(long, default_value_t = 0)]
    pub max_steps: u64,
    /// Sequences of an optimizer step, over all ranks; at least 1 each.
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// Maximum tokens of one forward and backward pass; gradients accumulate over as many as the
    /// batch needs. By default 8192 (32768 on a GPU), or as many as there is memory for.
    #[arg(long)]
    pub micro_tokens: Option<usize>,
    /// What the backward pass computes again instead of keeping it: the same gradients in less
    /// memory, later.
    #[arg(long, value_enum, default_value_t = RecomputeChoice::None)]
    pub recompute: RecomputeChoice,
    /// Longer sequences are cut on the right; at least 2.
    #[arg(long, default_value_t = 384)]
    pub max_tokens: usize,
    /// How products are computed; bf16 rounds their operands, weights and sums stay f32.
    #[arg(long, value_enum, default_value_t = PrecisionChoice::Bf16)]
    pub precision: PrecisionChoice,
    /// Where to compute; auto takes a GPU if there is one that can.
    #[arg(long = "device", value_enum, default_value_t = DeviceChoice::Auto)]
    #[arg(env = "BPROMPT_DEVICE")]
    pub device_choice: DeviceChoice,
    /// How the trained model is stored.
    #[arg(long, value_enum, default_value_t = SaveDtype::Bf16)]
    pub save_dtype: SaveDtype,
    /// Steps between checkpoints; 0 saves none but the last.
    #[arg(long, default_value_t = 500)]
    pub save_every: u64,
    /// Checkpoints to keep, at least 1.
    #[arg(long, default_value_t = 2)]
    pub keep: usize,
    /// Steps between validations; 0 validates only at the end.
    #[arg(long, default_value_t = 500)]
    pub validate_every: u64,
    /// Begins the order of the pairs, and random weights.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Numbers above 0, up to the largest that makes sense for a rate or a norm.
pub fn positive(most: f64) -> (std::ops::Bound<f64>, std::ops::Bound<f64>) {
    (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(most))
}

/// Where a model is to be trained: on this rank's GPU, or its share of the cores.
pub fn training_device(
    (choice, precision): (DeviceChoice, PrecisionChoice),
    device: &DeviceArgs,
    config: &BloomConfig,
    ranks: &Ranks,
) -> anyhow::Result<Device> {
    let driver = driver(choice, ranks.local_rank(), || {
        if precision == PrecisionChoice::F32 {
            return Err(Error::Unsupported(
                "the CUDA kernels train with bf16 operands; use --precision bf16".into(),
            ));
        }
        Cuda::<Driver>::supports(config.hidden_size, config.heads)
    })?;
    Ok(match driver {
        Some(driver) => Device::Cuda(driver),
        None => Device::Cpu(device.cpu_among(ranks.local_count())?),
    })
}

/// A supervised command: its examples, and what it does on either device.
pub trait Supervised {
    /// What the run learns.
    type Examples;

    /// The arguments of the run.
    fn args(&self) -> &RunArgs;

    /// What training starts from.
    fn start(&self, ranks: &Ranks) -> anyhow::Result<Start>;

    /// The examples to train on, and the held-out ones; may change what training starts from.
    fn examples(&self, start: &mut Start) -> anyhow::Result<Self::Examples>;

    /// Trains on a device.
    fn train_on<B: TrainBackend>(
        &self,
        on: (&B, Box<dyn Communicator<B>>),
        start: Start,
        examples: Self::Examples,
    ) -> anyhow::Result<()>;

    /// The whole run.
    fn run_supervised(&self) -> anyhow::Result<()> {
        let mut ranks = Ranks::from_env()?;
        let name = ranks.name();
        let result = self.run_as(&mut ranks);
        match name {
            Some(name) => result.context(name),
            None => result,
        }
    }

    /// The run of one rank.
    fn run_as(&self, ranks: &mut Ranks) -> anyhow::Result<()> {
        self.args().check(ranks)?;
        ranks.meet()?;
        let mut start = self.start(ranks)?;
        let examples = self.examples(&mut start)?;
        match start.device.take().expect("it was chosen with the model") {
            Device::Cpu(cpu) => {
                ranks.agree("the device", "cpu")?;
                self.train_on((&cpu, ranks.on_cpu()?), start, examples)
            }
            Device::Cuda(driver) => {
                ranks.agree("the device", "cuda")?;
                if ranks.is_first() {
                    let each = if ranks.count() > 1 { " or its like, for each rank" } else { "" };
                    note!("training on {}{each}", driver.name);
                }
                let driver = Rc::new(driver);
                let communicator = ranks.on_cuda(&driver)?;
                let cuda = Cuda::new(driver, DType::Bf16, false);
                self.train_on((&cuda, communicator), start, examples)
            }
        }
    }
}

/// A run that is about to begin.
pub struct Prepared<T> {
    /// The examples, and their loss.
    pub task: T,
    /// Tokens of each example to train on, and of each held-out one.
    pub lengths: (Vec<usize>, Vec<usize>),
    /// Settings of this kind of run that a resumed run must share.
    pub settings: serde_json::Value,
    /// Tells examples from others, so that all ranks are known to have the same.
    pub checksum: u32,
}

impl RunArgs {
    pub fn check(&self, ranks: &Ranks) -> anyhow::Result<()> {
        within("--learning-rate", self.learning_rate, positive(1.0), "(0, 1]")?;
        within("--warmup", self.warmup, 0.0..=1.0, "[0, 1]")?;
        within("--beta1", self.beta1, 0.0..1.0, "[0, 1)")?;
        within("--beta2", self.beta2, 0.0..1.0, "[0, 1)")?;
        within("--epsilon", self.epsilon as f64, positive(1.0), "(0, 1]")?;
        within("--weight-decay", self.weight_decay, 0.0..=1.0, "[0, 1]")?;
        within("--clip", self.clip as f64, positive(1e9), "(0, 1e9]")?;
        within("--epochs", self.epochs, positive(1e6), "(0, 1e6]")?;
        within("--batch", self.batch, 1..=1 << 20, "[1, 1048576]")?;
        let count = ranks.count();
        ensure!(
            self.batch >= count,
            "--batch {}: is less than one for each of {count} ranks",
            self.batch
        );
        if let Some(tokens) = self.micro_tokens {
            within("--micro-tokens", tokens, 1..=1 << 28, "[1, 268435456]")?;
        }
        within("--max-tokens", self.max_tokens, 2..=1 << 20, "[2, 1048576]")?;
        within("--keep", self.keep, 1.., "[1, ...]: a checkpoint to go on from has to stay")?;
        // rank 0 makes it
        ensure!(
            self.resume || !self.output.exists() || !ranks.is_first(),
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

    /// Where a model is to be trained: on this rank's GPU, or its share of the cores.
    pub fn device_for(&self, config: &BloomConfig, ranks: &Ranks) -> anyhow::Result<Device> {
        training_device((self.device_choice, self.precision), &self.device, config, ranks)
    }

    /// The maximum tokens of a pass: as wanted, as in the run that goes on, or as many as there is
    /// memory for on every rank. Says what memory the run takes, and fails if it is more than there
    /// is.
    fn pass_tokens<B: TrainBackend>(
        &self,
        (backend, communicator): (&B, &dyn Communicator<B>),
        start: &Start,
        (train, held_out): (&[usize], &[usize]),
    ) -> anyhow::Result<usize> {
        let config = &start.model.config;
        let longest = train.iter().chain(held_out).copied().max().unwrap_or(0);
        let ranks = communicator.ranks();
        let all = train.iter().sum::<usize>().min(longest * self.batch.div_ceil(ranks));
        let needed = all.max(held_out.iter().sum()).max(longest);
        let recompute = self.recompute.into();
        // on the CPU the values are there already
        let there = if B::PARAMETER_BYTES == 4 { 4 * config.parameter_count() as u64 } else { 0 };
        // which ranks on CPUs of one machine share
        let shared = if B::ACTIVATION_BYTES == 4 { start.local_ranks as u64 } else { 1 };
        let available = backend.free_memory().map_or(u64::MAX, |free| free / shared + there);
        let fitting = |recompute, most: usize| {
            let recompute = (recompute, ranks);
            memory::tokens_that_fit(backend, config, recompute, (longest, most), available)
        };
        let usual = if B::ACTIVATION_BYTES == 4 { 8192 } else { 32768 };
        let wanted = match self.micro_tokens {
            Some(tokens) => tokens,
            None => match self.resumed_micro_tokens()? {
                Some(tokens) => tokens,
                None if needed <= usual && fitting(recompute, needed) == Some(needed) => usual,
                None => fitting(recompute, usual).unwrap_or(longest),
            },
        };
        let wanted = least(communicator, wanted)?;
        let tokens = wanted.min(needed).max(longest);
        let size = RunSize { tokens, recompute, ranks };
        let remedies = Remedies {
            model: "the model's size",
            pass: "--micro-tokens or --max-tokens, or take --recompute layer",
        };
        let plan = memory::plan(backend, config, size, remedies);
        if communicator.rank() == 0 {
            note!("memory{}: {plan}", if ranks > 1 { " of a rank" } else { "" });
        }
        plan.check_against(available).with_context(|| {
            let fits = match fitting(Recompute::Layer, wanted) {
                Some(tokens) => format!("--micro-tokens {tokens} --recompute layer would fit"),
                None => "no setting would fit".to_owned(),
            };
            format!(
                "training {} parameters on {} tokens at once ({fits})",
                config.parameter_count(),
                size.tokens
            )
        })?;
        Ok(wanted)
    }

    /// What a run that goes on had chosen.
    fn resumed_micro_tokens(&self) -> anyhow::Result<Option<usize>> {
        if !self.resume {
            return Ok(None);
        }
        let saved = state::newest_settings(&self.output.join("checkpoints"))?;
        let tokens = saved.as_ref().and_then(|s| s["micro_tokens"].as_u64());
        Ok(tokens.map(|tokens| tokens as usize))
    }

    /// The whole of a run on a device. `finish` gets the trained model and what was measured on
    /// held-out examples, on the rank that writes files.
    pub fn train<B: TrainBackend, T: Task<B>>(
        &self,
        (backend, communicator): (&B, Box<dyn Communicator<B>>),
        start: Start,
        prepared: Prepared<T>,
        finish: impl FnOnce(&Run<B, T>, Option<Validation>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Prepared { task, lengths, settings, checksum } = prepared;
        let tokens =
            self.pass_tokens((backend, &*communicator), &start, (&lengths.0, &lengths.1))?;
        let options = self.options(&start.model, &lengths.0, (tokens, settings));
        let Start { model, companions, .. } = start;
        let shared = self.shared_settings(&options, (checksum, lengths.1.len()));
        check_alike(&*communicator, shared, &model.values)?;
        let first = communicator.rank() == 0;
        if first {
            std::fs::create_dir_all(&self.output)
                .with_context(|| format!("{}: cannot create", self.output.display()))?;
        }
        let model = model.place(backend)?;
        let communicator_of = &*communicator;
        let mut run =
            Run { backend, communicator: communicator_of, model, companions, task, options };
        if first {
            let (parameters, examples) = (run.model.parameter_count(), run.task.count());
            note!("{parameters} parameters, {examples} examples, {} steps", run.total_steps());
        }
        let stop = super::super::interrupt_flag()?;
        let mut bar = Bar::new(run.total_steps(), first);
        let outcome = run.run(self.resume, &stop, &mut bar);
        bar.bar.finish_and_clear();
        match outcome? {
            Outcome::Stopped(folder) => {
                if first {
                    note!(
                        "stopped; saved {}; the same command with --resume goes on",
                        folder.display()
                    );
                }
                drop(run);
                // the others are told what they still wait for
                drop(communicator);
                std::process::exit(130);
            }
            Outcome::Finished { validation } if first => finish(&run, validation),
            Outcome::Finished { .. } => Ok(()),
        }
    }

    /// All that has to be the same on every rank: what decides the results, and when the ranks have
    /// something to tell each other.
    fn shared_settings(
        &self,
        options: &RunOptions,
        (checksum, held_out): (u32, usize),
    ) -> serde_json::Value {
        let mut settings = options.settings.clone();
        settings["data"] = json!(checksum);
        settings["held_out"] = json!(held_out);
        settings["save_every"] = json!(options.save_every);
        settings["validate_every"] = json!(options.validate_every);
        settings["resume"] = json!(self.resume);
        settings
    }

    /// What the run does, and the settings that it keeps beside its results.
    fn options(
        &self,
        model: &TrainModel,
        lengths: &[usize],
        (micro_tokens, own): (usize, serde_json::Value),
    ) -> RunOptions {
        let optimizer = AdamWOptions {
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
        };
        let mut settings = json!({
            "examples": lengths.len(),
            "tokens": lengths.iter().sum::<usize>(),
            "parameters": model.values.len(),
            "optimizer": optimizer,
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "clip": self.clip,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "batch": self.batch,
            "micro_tokens": micro_tokens,
            "precision": format!("{:?}", self.precision),
            "seed": self.seed,
        });
        for (name, value) in own.as_object().into_iter().flatten() {
            settings[name] = value.clone();
        }
        RunOptions {
            optimizer,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            warmup: self.warmup,
            clip: self.clip,
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch: self.batch,
            micro_tokens,
            precision: self.precision.into(),
            recompute: self.recompute.into(),
            seed: self.seed,
            save_every: self.save_every,
            validate_every: self.validate_every,
            keep: self.keep,
            output: self.output.clone(),
            settings,
        }
    }

    /// Writes the trained model, with these parameters.
    pub fn save<B: TrainBackend, T: Task<B>>(
        &self,
        run: &Run<B, T>,
        values: &[f32],
    ) -> anyhow::Result<()> {
        let dtype = self.save_dtype.dtype();
        // the weights come last: a folder that has them has all else
        run.companions.write(&self.output)?;
        Ok(save_model(&self.output, &run.model.config, values, dtype)?)
    }

    /// Says what the trained model does on held-out examples.
    pub fn report(&self, validation: Option<&Validation>) -> anyhow::Result<()> {
        let output = self.output.display();
        let Some(v) = validation else { return Ok(print_line!("{output}: trained")?) };
        let mut text = format!("validation loss {:.4}", v.loss);
        for (name, value) in &v.measures {
            let name = name.trim_start_matches("validation_").replace('_', " ");
            text.push_str(&format!(", {name} {value:.4}"));
        }
        Ok(print_line!("{output}: {text}")?)
    }
}

/// The least that a rank wants.
fn least<B: TrainBackend>(c: &dyn Communicator<B>, here: usize) -> anyhow::Result<usize> {
    let all = c.exchange((here as u64).to_le_bytes().to_vec())?;
    let numbers = all.iter().filter_map(|v| Some(u64::from_le_bytes(v[..].try_into().ok()?)));
    Ok(numbers.min().map_or(here, |least| least as usize))
}

/// Fails if ranks have been started with other settings or weights than rank 0.
fn check_alike<B: TrainBackend>(
    c: &dyn Communicator<B>,
    mut settings: serde_json::Value,
    values: &[f32],
) -> anyhow::Result<()> {
    if c.ranks() == 1 {
        return Ok(());
    }
    settings["weights"] = json!(crc32fast::hash(bytemuck::cast_slice(values)));
    let all = c.exchange(settings.to_string().into_bytes())?;
    let Some(other) = all.iter().position(|s| *s != all[0]) else { return Ok(()) };
    let read = |rank: usize| serde_json::from_slice(&all[rank]).unwrap_or_default();
    bail!(
        "rank {other} was started with other settings than rank 0 ({}); start all ranks with the \
        same command and files",
        difference(&read(other), &read(0))
    );
}

struct Bar {
    bar: ProgressBar,
}

impl Bar {
    fn new(total: u64, shown: bool) -> Bar {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left")
            .expect("a fixed template");
        let bar = if shown { ProgressBar::new(total) } else { ProgressBar::hidden() };
        Bar { bar: bar.with_style(style) }
    }
}

impl Observer for Bar {
    fn step(&mut self, _total: u64, m: &StepMetrics) {
        self.bar.set_position(m.step);
        self.bar.set_message(format!("loss {:.3}  {:.0} tokens/s", m.loss, m.tokens_per_second));
        if let Some(loss) = m.validation_loss {
            let measures = m.validation.iter().map(|(name, value)| {
                format!(", {} {value:.3}", name.trim_start_matches("validation_"))
            });
            let measures: String = measures.collect();
            self.bar.println(format!("step {}: validation loss {loss:.4}{measures}", m.step));
        }
    }
}
