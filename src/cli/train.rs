//! `bprompt train`: vocabularies and models.

use super::DeviceArgs;
use super::files::check_distinct;
use super::hub::model_folder;
use super::model::{Device, DeviceChoice, driver};
use super::print::{note, print_line};
use super::ranks::Ranks;
use super::within;
use crate::checkpoint::{Companions, MODEL_FILES, TOKENIZER_FILES};
use crate::data::records::{read_prompts, read_training_pairs};
use crate::device::cuda::Driver;
use crate::error::Error;
use crate::memory::MemoryPlan;
use crate::models::bloom::training::{Recompute, TrainModel};
use crate::models::bloom::{BloomCheckpoint, BloomConfig, save_model};
use crate::models::embedded;
use crate::ops::cuda::Cuda;
use crate::ops::train::{Precision, TrainBackend};
use crate::tensor::DType;
use crate::text::template::Template;
use crate::text::{Tokenizer, train_tokenizer};
use crate::train::examples::{Example, example};
use crate::train::memory::{self, Remedies, RunSize};
use crate::train::optimizer::AdamWOptions;
use crate::train::parallel::Communicator;
use crate::train::report::StepMetrics;
use crate::train::schedule::Schedule;
use crate::train::sft::{Observer, Outcome, Sft, SftOptions, difference};
use crate::train::state;
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::rc::Rc;

#[derive(Subcommand)]
pub enum TrainCommand {
    /// Learn a byte-level BPE vocabulary with BLOOM's pre-tokenizer.
    Tokenizer(TokenizerArgs),
    /// Supervised fine-tuning on pairs.
    Sft(Box<SftArgs>),
}

#[derive(Args)]
pub struct TokenizerArgs {
    /// Texts: prompts or pairs (.jsonl, .json), or text with one a line.
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// The tokenizer.json to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of the vocabulary, special ones included; at least 260.
    #[arg(long, default_value_t = 8192)]
    vocab_size: usize,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
}

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
enum SaveDtype {
    F32,
    F16,
    Bf16,
}

#[derive(Args)]
pub struct SftArgs {
    /// Training pairs: records with "raw_prompt" and "prompt" (.jsonl or a .json array).
    #[arg(long, value_name = "FILE")]
    train: PathBuf,
    /// Held-out pairs.
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// Folder of the run: the trained model, checkpoints, metrics.jsonl, loss.svg.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Checkpoint to start from, a folder or org/name of one in Hugging Face's cache; the embedded
    /// model if neither this nor --config is given.
    #[arg(long, value_name = "DIR|NAME", conflicts_with = "config")]
    model: Option<PathBuf>,
    /// Start from random weights of this config.json; needs --tokenizer.
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    config: Option<PathBuf>,
    /// tokenizer.json; by default the one of the model folder.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// Highest learning rate, above 0.
    #[arg(long, default_value_t = 2e-5)]
    learning_rate: f64,
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    schedule: Schedule,
    /// Part of the steps that warms up; 0 for none.
    #[arg(long, default_value_t = 0.03)]
    warmup: f64,
    /// Decay of AdamW's first moment, from 0 to below 1; 0 for none.
    #[arg(long, default_value_t = 0.9)]
    beta1: f32,
    /// Decay of AdamW's second moment, from 0 to below 1; 0 for none.
    #[arg(long, default_value_t = 0.95)]
    beta2: f32,
    /// AdamW's epsilon, above 0.
    #[arg(long, default_value_t = 1e-8)]
    epsilon: f32,
    /// Part of the weights that AdamW takes away at a learning rate of 1; 0 for none.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    /// Largest norm of the gradient, above 0.
    #[arg(long, default_value_t = 1.0)]
    clip: f32,
    /// How often every pair is seen, above 0; parts are possible.
    #[arg(long, default_value_t = 4.0)]
    epochs: f64,
    /// End after this many steps; 0 for no limit.
    #[arg(long, default_value_t = 0)]
    max_steps: u64,
    /// Sequences of an optimizer step, over all ranks; at least 1 each.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Maximum tokens of one forward and backward pass; gradients accumulate over as many as the
    /// batch needs. By default 8192 (32768 on a GPU), or as many as there is memory for.
    #[arg(long)]
    micro_tokens: Option<usize>,
    /// What the backward pass computes again instead of keeping it: the same gradients in less
    /// memory, later.
    #[arg(long, value_enum, default_value_t = RecomputeChoice::None)]
    recompute: RecomputeChoice,
    /// Longer sequences are cut on the right; at least 2.
    #[arg(long, default_value_t = 384)]
    max_tokens: usize,
    /// How products are computed; bf16 rounds their operands, weights and sums stay f32.
    #[arg(long, value_enum, default_value_t = PrecisionChoice::Bf16)]
    precision: PrecisionChoice,
    /// Where to compute; auto takes a GPU if there is one that can.
    #[arg(long = "device", value_enum, default_value_t = DeviceChoice::Auto)]
    #[arg(env = "BPROMPT_DEVICE")]
    device_choice: DeviceChoice,
    /// How the trained model is stored.
    #[arg(long, value_enum, default_value_t = SaveDtype::Bf16)]
    save_dtype: SaveDtype,
    /// Steps between checkpoints; 0 saves none but the last.
    #[arg(long, default_value_t = 500)]
    save_every: u64,
    /// Checkpoints to keep, at least 1.
    #[arg(long, default_value_t = 2)]
    keep: usize,
    /// Steps between validations; 0 validates only at the end.
    #[arg(long, default_value_t = 500)]
    validate_every: u64,
    /// Begins the order of the pairs, and random weights.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    resume: bool,
    /// Leave out pairs that cannot be read or have an empty side, and count them.
    #[arg(long)]
    skip_bad_lines: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl TrainCommand {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            TrainCommand::Tokenizer(args) => args.run(),
            TrainCommand::Sft(args) => args.run(),
        }
    }
}

impl TokenizerArgs {
    fn run(self) -> anyhow::Result<()> {
        within("--vocab-size", self.vocab_size, 1..=1 << 20, "[260, 1048576]")?;
        let reads: Vec<&Path> = self.input.iter().map(PathBuf::as_path).collect();
        check_distinct(&[&self.output], &reads)?;
        ensure!(
            self.force || !self.output.exists(),
            "{}: exists already; --force replaces it",
            self.output.display()
        );
        let mut texts = Vec::new();
        for file in &self.input {
            texts.extend(read_prompts(file)?);
        }
        train_tokenizer(&texts, self.vocab_size, &self.output)?;
        let tokenizer = Tokenizer::open(&self.output)?;
        let bytes: usize = texts.iter().map(String::len).sum();
        let tokens: usize =
            texts.iter().map(|t| tokenizer.encode_literal(t).map_or(0, |ids| ids.len())).sum();
        print_line!(
            "{}: {} tokens, {:.2} bytes a token on its {} texts",
            self.output.display(),
            tokenizer.vocab_size(),
            bytes as f64 / tokens.max(1) as f64,
            texts.len()
        )?;
        Ok(())
    }
}

/// What training starts from.
struct Start {
    model: TrainModel,
    /// Until training takes it.
    device: Option<Device>,
    /// Ranks on this machine.
    local_ranks: usize,
    tokenizer: Tokenizer,
    template: Template,
    /// What else the model folder holds, with this tokenizer and template.
    companions: Companions,
}

/// Numbers above 0, up to the largest that makes sense for a rate or a norm.
fn positive(most: f64) -> (std::ops::Bound<f64>, std::ops::Bound<f64>) {
    (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(most))
}

impl SftArgs {
    fn start(&self, ranks: &Ranks) -> anyhow::Result<Start> {
        let folder = self.model.as_deref().map(model_folder).transpose()?;
        let own_template = folder.as_ref().map(|m| m.join("template.txt")).filter(|p| p.exists());
        let template = match (&self.template, own_template) {
            (Some(name), _) => Template::named(name)?,
            (None, Some(file)) => Template::read(&file)?,
            (None, None) if self.model.is_none() && self.config.is_none() => embedded::template(),
            (None, None) => Template::named("v1")?,
        };
        let device_for = |c: &BloomConfig| {
            let device = self.device_for(c, ranks)?;
            // a GPU has the gradients and moments itself
            let moments = 8.0 / ranks.count() as f64;
            let bytes = if matches!(device, Device::Cpu(_)) { 8.0 + moments } else { 4.0 };
            let bytes = bytes * ranks.local_count() as f64;
            let bytes = bytes * c.parameter_count() as f64;
            MemoryPlan::new()
                .with("weights, gradients and AdamW's moments", bytes, "the model's size")
                .check()?;
            anyhow::Ok(device)
        };
        let (model, device, default_tokenizer) = match (&folder, &self.config) {
            (_, Some(file)) => {
                let config = BloomConfig::read(file)?;
                let device = device_for(&config).with_context(|| format!("{}", file.display()))?;
                (TrainModel::random(config, self.seed), device, None)
            }
            (Some(folder), None) => {
                let c = BloomCheckpoint::open(folder)?;
                let device =
                    device_for(&c.config).with_context(|| format!("{}", folder.display()))?;
                let values = c.to_f32()?;
                (TrainModel::new(c.config, values), device, Some(folder.join("tokenizer.json")))
            }
            (None, None) => {
                let c = embedded::checkpoint();
                let device = device_for(&c.config)?;
                let values = c.to_f32()?;
                (TrainModel::new(c.config, values), device, None)
            }
        };
        let mut companions = Companions::default();
        match (&folder, &self.config) {
            (Some(folder), _) => companions.read(folder, &MODEL_FILES)?,
            (None, Some(file)) => companions.read(folder_of(file), &MODEL_FILES)?,
            (None, None) => companions.set("generation_config.json", embedded::GENERATION_CONFIG),
        }
        companions.set("template.txt", format!("{}\n", template.text()));
        let path = self.tokenizer.clone().or(default_tokenizer);
        let tokenizer = match &path {
            Some(path) => {
                let tokenizer = Tokenizer::open(path)?;
                tokenizer.check(model.config.vocab_size, path)?;
                companions.read(folder_of(path), &TOKENIZER_FILES)?;
                // the file may have another name than in a model folder
                companions.set(
                    "tokenizer.json",
                    std::fs::read(path)
                        .with_context(|| format!("{}: cannot read", path.display()))?,
                );
                tokenizer
            }
            None => {
                companions.set("tokenizer.json", embedded::TOKENIZER);
                embedded::tokenizer()
            }
        };
        let device = Some(device);
        let local_ranks = ranks.local_count();
        Ok(Start { model, device, local_ranks, tokenizer, template, companions })
    }

    fn examples(&self, path: &Path, start: &Start) -> anyhow::Result<Vec<Example>> {
        let eos = start.model.config.eos_token_id;
        let (pairs, mut bad) = read_training_pairs(path)?;
        if !self.skip_bad_lines && !bad.is_empty() {
            let first = bad.swap_remove(0);
            let more =
                if bad.is_empty() { String::new() } else { format!(", and {} more", bad.len()) };
            bail!("{first}{more}; mend it, or leave such pairs out with --skip-bad-lines");
        }
        let mut examples = Vec::new();
        let mut cut = 0;
        for pair in &pairs {
            let e = example(pair, &start.template, &start.tokenizer, eos, self.max_tokens)?;
            // a sequence whose target was cut off whole teaches nothing
            if e.loss_from < e.ids.len() {
                examples.push(e);
            } else {
                cut += 1;
            }
        }
        if !bad.is_empty() {
            note!(
                "{}: left out {} pairs that cannot be read or have an empty side",
                path.display(),
                bad.len()
            );
        }
        if cut > 0 {
            note!(
                "{}: left out {cut} pairs whose targets begin beyond --max-tokens {}",
                path.display(),
                self.max_tokens
            );
        }
        ensure!(
            !examples.is_empty(),
            "{}: no pair is left that fits into --max-tokens {}",
            path.display(),
            self.max_tokens
        );
        Ok(examples)
    }

    fn check(&self, ranks: &Ranks) -> anyhow::Result<()> {
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
    fn device_for(&self, config: &BloomConfig, ranks: &Ranks) -> anyhow::Result<Device> {
        let driver = driver(self.device_choice, ranks.local_rank(), || {
            if self.precision == PrecisionChoice::F32 {
                return Err(Error::Unsupported(
                    "the CUDA kernels train with bf16 operands; use --precision bf16".into(),
                ));
            }
            Cuda::<Driver>::supports(config.hidden_size, config.heads)
        })?;
        Ok(match driver {
            Some(driver) => Device::Cuda(driver),
            None => Device::Cpu(self.device.cpu_among(ranks.local_count())?),
        })
    }

    /// The maximum tokens of a pass: as wanted, as in the run that goes on, or as many as there is
    /// memory for on every rank. Says what memory the run takes, and fails if it is more than there
    /// is.
    fn pass_tokens<B: TrainBackend>(
        &self,
        (backend, communicator): (&B, &dyn Communicator<B>),
        start: &Start,
        examples: (&[Example], &[Example]),
    ) -> anyhow::Result<usize> {
        let config = &start.model.config;
        let lengths = |e: &[Example]| e.iter().map(|e| e.ids.len()).collect::<Vec<_>>();
        let (train, held_out) = (lengths(examples.0), lengths(examples.1));
        let longest = train.iter().chain(&held_out).copied().max().unwrap_or(0);
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

    fn run(self) -> anyhow::Result<()> {
        let mut ranks = Ranks::from_env()?;
        let name = ranks.name();
        let result = self.run_as(&mut ranks);
        match name {
            Some(name) => result.context(name),
            None => result,
        }
    }

    /// The run of one rank.
    fn run_as(self, ranks: &mut Ranks) -> anyhow::Result<()> {
        self.check(ranks)?;
        ranks.meet()?;
        let mut start = self.start(ranks)?;
        let train = self.examples(&self.train, &start)?;
        let validation = match &self.validation {
            Some(path) => self.examples(path, &start)?,
            None => vec![],
        };
        match start.device.take().expect("it was chosen with the model") {
            Device::Cpu(cpu) => {
                ranks.agree("the device", "cpu")?;
                self.train_on((&cpu, ranks.on_cpu()?), start, train, validation)
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
                self.train_on((&cuda, communicator), start, train, validation)
            }
        }
    }

    fn train_on<B: TrainBackend>(
        &self,
        (backend, communicator): (&B, Box<dyn Communicator<B>>),
        start: Start,
        train: Vec<Example>,
        validation: Vec<Example>,
    ) -> anyhow::Result<()> {
        let examples = (&train[..], &validation[..]);
        let tokens = self.pass_tokens((backend, &*communicator), &start, examples)?;
        let options = self.options(&start.model, &train, tokens);
        let Start { model, companions, .. } = start;
        check_alike(&*communicator, self.shared_settings(&options, examples), &model.values)?;
        let first = communicator.rank() == 0;
        if first {
            std::fs::create_dir_all(&self.output)
                .with_context(|| format!("{}: cannot create", self.output.display()))?;
        }
        let model = model.place(backend)?;
        let mut sft = Sft {
            backend,
            communicator: &*communicator,
            model,
            companions,
            train,
            validation,
            options,
        };
        if first {
            let (parameters, examples) = (sft.model.config.parameter_count(), sft.train.len());
            note!("{parameters} parameters, {examples} examples, {} steps", sft.total_steps());
        }
        let stop = super::interrupt_flag()?;
        let mut bar = Bar::new(sft.total_steps(), first);
        let outcome = sft.run(self.resume, &stop, &mut bar);
        bar.bar.finish_and_clear();
        match outcome? {
            Outcome::Stopped(folder) => {
                if first {
                    note!(
                        "stopped; saved {}; the same command with --resume goes on",
                        folder.display()
                    );
                }
                drop(sft);
                // the others are told what they still wait for
                drop(communicator);
                std::process::exit(130);
            }
            Outcome::Finished { validation_loss } if first => self.finish(&sft, validation_loss),
            Outcome::Finished { .. } => Ok(()),
        }
    }

    /// All that has to be the same on every rank: what decides the results, and when the ranks have
    /// something to tell each other.
    fn shared_settings(
        &self,
        options: &SftOptions,
        (train, validation): (&[Example], &[Example]),
    ) -> serde_json::Value {
        let sum = |examples: &[Example]| {
            let mut sum = crc32fast::Hasher::new();
            for e in examples {
                sum.update(&(e.loss_from as u64).to_le_bytes());
                sum.update(bytemuck::cast_slice(&e.ids));
            }
            (examples.len(), sum.finalize())
        };
        let mut settings = options.settings.clone();
        settings["train"] = json!(sum(train));
        settings["validation"] = json!(sum(validation));
        settings["save_every"] = json!(options.save_every);
        settings["validate_every"] = json!(options.validate_every);
        settings["resume"] = json!(self.resume);
        settings
    }

    /// What the run does, and the settings that it keeps beside its results.
    fn options(&self, model: &TrainModel, train: &[Example], micro_tokens: usize) -> SftOptions {
        let optimizer = AdamWOptions {
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
        };
        let settings = json!({
            "examples": train.len(),
            "tokens": train.iter().map(|e| e.ids.len()).sum::<usize>(),
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
        SftOptions {
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

    /// Writes the trained model and says how good it is.
    fn finish<B: TrainBackend>(
        &self,
        sft: &Sft<B>,
        validation_loss: Option<f64>,
    ) -> anyhow::Result<()> {
        let dtype = match self.save_dtype {
            SaveDtype::F32 => DType::F32,
            SaveDtype::F16 => DType::F16,
            SaveDtype::Bf16 => DType::Bf16,
        };
        // the weights come last: a folder that has them has all else
        sft.companions.write(&self.output)?;
        let values = sft.backend.values(&sft.model.values)?;
        save_model(&self.output, &sft.model.config, &values, dtype)?;
        match validation_loss {
            Some(loss) => print_line!("{}: validation loss {loss:.4}", self.output.display())?,
            None => print_line!("{}: trained", self.output.display())?,
        }
        Ok(())
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

/// The folder that a file is in.
fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
            self.bar.println(format!("step {}: validation loss {loss:.4}", m.step));
        }
    }
}
