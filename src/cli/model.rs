//! The arguments that choose a model, a device and how to sample, and what they load.

use super::DeviceArgs;
use super::hub::model_folder;
use super::print::note;
use crate::device::cuda::Driver;
use crate::engine::{EngineOptions, Sampling};
use crate::error::Error;
use crate::generate::generation_config::GenerationDefaults;
use crate::generate::{Generate, GenerateOptions, Length, Session};
use crate::memory::MemoryPlan;
use crate::models::bloom::{Architecture, Bloom, BloomCheckpoint, BloomConfig};
use crate::models::embedded;
use crate::ops::cpu::Cpu;
use crate::ops::cuda::{CHAIN_RUNS, Cuda, Persistent};
use crate::tensor::{Bytes, DType};
use crate::text::Tokenizer;
use crate::text::template::Template;
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// The group of options that only matter on a GPU, which a program without kernels for one does not
/// show.
const GPU: &str = "GPU";

fn no_gpu() -> bool {
    crate::device::images::IMAGES.is_empty()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DTypeChoice {
    /// As stored.
    Auto,
    #[value(alias = "float32", alias = "float")]
    F32,
    #[value(alias = "float16", alias = "half")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
    /// Quantized at load, one scale per output row.
    Int8,
}

impl DTypeChoice {
    pub fn dtype(self) -> Option<DType> {
        match self {
            DTypeChoice::Auto => None,
            DTypeChoice::F32 => Some(DType::F32),
            DTypeChoice::F16 => Some(DType::F16),
            DTypeChoice::Bf16 => Some(DType::Bf16),
            DTypeChoice::Int8 => Some(DType::Int8),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

/// Whether decoding steps of few sequences run as one kernel.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
pub enum PersistentChoice {
    /// Where it is faster, when both ways are tried
    Auto,
    Always,
    Never,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and device")]
pub struct ModelArgs {
    /// Model folder as Hugging Face writes it, or org/name[@revision] of one in its cache
    /// (HF_HOME); the embedded demonstration model if not given.
    #[arg(short, long, value_name = "DIR|NAME", env = "BPROMPT_MODEL")]
    pub model: Option<PathBuf>,
    /// How weights are held for computing.
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto)]
    pub dtype: DTypeChoice,
    /// Where to compute; auto takes a GPU if there is one that can.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto, env = "BPROMPT_DEVICE")]
    pub device: DeviceChoice,
    /// Give a prompt the same bits in any batch, at the price of slower prompts and batches; the
    /// CPU always does.
    #[arg(long, env = "BPROMPT_BATCH_INVARIANT", help_heading = GPU, hide = no_gpu())]
    pub batch_invariant: bool,
    /// Launch every kernel by itself instead of repeating recorded steps (CUDA graphs).
    #[arg(long, env = "BPROMPT_NO_CUDA_GRAPHS", help_heading = GPU, hide = no_gpu())]
    pub no_cuda_graphs: bool,
    /// Do decoding steps of up to 8 sequences in one kernel that stays on the processors through
    /// all layers.
    #[arg(long, value_enum, default_value_t = PersistentChoice::Auto, env = "BPROMPT_PERSISTENT")]
    #[arg(help_heading = GPU, hide = no_gpu())]
    pub persistent: PersistentChoice,
    #[command(flatten)]
    pub compute: DeviceArgs,
    /// Whether the weights will be read many times: worth a copy into faster memory.
    #[arg(skip)]
    pub long_running: bool,
}

/// A device, ready for a model.
pub enum Device {
    Cpu(Cpu),
    Cuda(Driver),
}

/// A device's operations, ready for a model.
pub enum ModelBackend {
    Cpu(Cpu),
    Cuda(Box<Cuda<Driver>>),
}

/// A model on its device.
pub enum Placed {
    Cpu(Cpu, Bloom<Cpu>),
    Cuda(Box<Cuda<Driver>>, Bloom<Cuda<Driver>>),
}

/// A model ready to run.
pub struct Loaded {
    placed: Placed,
    pub config: BloomConfig,
    pub tokenizer: Arc<Tokenizer>,
    /// Tells its weights from others, wherever they lie.
    pub fingerprint: String,
    /// The template that comes with the model.
    own_template: Option<Template>,
    pub defaults: GenerationDefaults,
}

impl Loaded {
    pub fn session(&self, options: EngineOptions) -> anyhow::Result<Box<dyn Generate + '_>> {
        Ok(match &self.placed {
            Placed::Cpu(cpu, model) => {
                Box::new(Session::new(cpu, model, &self.tokenizer, options)?)
            }
            Placed::Cuda(cuda, model) => {
                Box::new(Session::new(&**cuda, model, &self.tokenizer, options)?)
            }
        })
    }

    /// The template of that name or file, else the model's own, else the paper's first.
    pub fn template(&self, name: Option<&str>) -> anyhow::Result<Template> {
        match (name, &self.own_template) {
            (Some(name), _) => Ok(Template::named(name)?),
            (None, Some(own)) => Ok(own.clone()),
            (None, None) => Ok(Template::named("v1")?),
        }
    }
}

/// What a model's folder holds, checked, on no device yet.
pub struct ModelParts {
    pub checkpoint: BloomCheckpoint,
    pub tokenizer: Tokenizer,
    /// The template that comes with the model.
    pub template: Option<Template>,
    pub defaults: GenerationDefaults,
}

impl ModelParts {
    /// Those of a folder or of a model in Hugging Face's cache; of the embedded model if `model` is
    /// none.
    pub fn open(model: Option<&Path>) -> anyhow::Result<ModelParts> {
        let Some(model) = model else {
            return Ok(ModelParts {
                checkpoint: embedded::checkpoint(),
                tokenizer: embedded::tokenizer(),
                template: Some(embedded::template()),
                defaults: GenerationDefaults::parse(embedded::GENERATION_CONFIG)
                    .expect("the embedded settings are whole"),
            });
        };
        let folder = model_folder(model)?;
        let checkpoint = BloomCheckpoint::open(&folder)?;
        checkpoint.config.expect(Architecture::CausalLm, &folder)?;
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::open(&path)?;
        tokenizer.check(checkpoint.config.vocab_size, &path)?;
        let template = folder.join("template.txt");
        let template = if template.exists() { Some(Template::read(&template)?) } else { None };
        let defaults = GenerationDefaults::read(&folder.join("generation_config.json"))?;
        Ok(ModelParts { checkpoint, tokenizer, template, defaults })
    }
}

impl ModelArgs {
    pub fn load(&self) -> anyhow::Result<Loaded> {
        let ModelParts { checkpoint, tokenizer, template, defaults } =
            ModelParts::open(self.model.as_deref())?;
        let config = checkpoint.config.clone();
        let fingerprint = fingerprint(&checkpoint);
        let placed = self.place(checkpoint, self.dtype.dtype())?;
        Ok(Loaded {
            placed,
            config,
            tokenizer: Arc::new(tokenizer),
            fingerprint,
            own_template: template,
            defaults,
        })
    }

    /// Prepares the weights of a checkpoint where they are to be used; `dtype` as for
    /// [`Bloom::load`].
    pub fn place(
        &self,
        checkpoint: BloomCheckpoint,
        dtype: Option<DType>,
    ) -> anyhow::Result<Placed> {
        Ok(match self.backend(&checkpoint, dtype)? {
            ModelBackend::Cpu(cpu) => {
                let model = Bloom::load(&cpu, checkpoint, dtype)?;
                Placed::Cpu(cpu, model)
            }
            ModelBackend::Cuda(cuda) => {
                let model = Bloom::load(&*cuda, checkpoint, dtype)?;
                Placed::Cuda(cuda, model)
            }
        })
    }

    /// The backend that a checkpoint is to run on, which has room for its weights in `dtype`.
    pub fn backend(
        &self,
        checkpoint: &BloomCheckpoint,
        dtype: Option<DType>,
    ) -> anyhow::Result<ModelBackend> {
        Ok(match self.device(&checkpoint.config)? {
            Device::Cpu(cpu) => {
                weights_plan(&cpu, checkpoint, dtype)
                    .check()
                    .with_context(|| checkpoint.weights.path.display().to_string())?;
                ModelBackend::Cpu(cpu)
            }
            Device::Cuda(driver) => {
                let stored = checkpoint.weights.tensors.values().next().map(|t| t.dtype);
                let dtype = dtype.filter(|d| *d != DType::Int8).or(stored).unwrap_or(DType::Bf16);
                ModelBackend::Cuda(Box::new(self.cuda(driver, dtype, &checkpoint.config)?))
            }
        })
    }

    /// Where a model is to run.
    pub fn device(&self, config: &BloomConfig) -> anyhow::Result<Device> {
        let driver = driver(self.device, 0, || {
            if self.dtype == DTypeChoice::F32 {
                return Err(Error::invalid(
                    "the CUDA kernels hold weights in 16 or 8 bits; use --dtype bf16",
                ));
            }
            Cuda::<Driver>::supports(config.hidden_size, config.heads)
        })?;
        Ok(match driver {
            Some(driver) => Device::Cuda(driver),
            None => Device::Cpu(self.compute.cpu()?.with_resident_weights(self.long_running)),
        })
    }

    /// The backend of a GPU, for weights in f16, or else in bf16.
    pub fn cuda(
        &self,
        driver: Driver,
        dtype: DType,
        config: &BloomConfig,
    ) -> anyhow::Result<Cuda<Driver>> {
        let half = if dtype == DType::F16 { DType::F16 } else { DType::Bf16 };
        let mut cuda = Cuda::new(Rc::new(driver), half, self.batch_invariant);
        cuda.captures_graphs = !self.no_cuda_graphs;
        cuda.persistent = match self.persistent {
            PersistentChoice::Auto => Persistent::Auto,
            PersistentChoice::Always => Persistent::Always,
            PersistentChoice::Never => Persistent::Never,
        };
        let wrong = cuda.try_hopper(config.attention_heads().size, CHAIN_RUNS)?;
        if let Some(first) = wrong.first() {
            let more = match wrong.len() - 1 {
                0 => String::new(),
                n => format!(" ({n} more)"),
            };
            wrong.iter().for_each(|w| tracing::debug!("{w}"));
            note!(
                "{}: the kernels with Hopper's own instructions are not used, because of wrong \
                results: {first}{more}; please report it",
                cuda.launcher().name
            );
        }
        Ok(cuda)
    }
}

/// The GPU if it is wanted, or if it may be and can be: `check` says what keeps it from the work.
/// On a machine with several, that of this rank.
pub fn driver(
    choice: DeviceChoice,
    local_rank: usize,
    check: impl FnOnce() -> crate::error::Result<()>,
) -> anyhow::Result<Option<Driver>> {
    let possible = || {
        check()?;
        Driver::open_for_rank(local_rank)
    };
    Ok(match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => possible()
            .inspect_err(|e| {
                if Driver::likely() {
                    note!("the GPU is not used: {e}");
                }
            })
            .ok(),
        DeviceChoice::Cuda => Some(possible().context("--device cuda")?),
    })
}

/// A checksum of every tensor's name, shape and type, and of parts of its values: all of them would
/// take long to read.
pub fn fingerprint(checkpoint: &BloomCheckpoint) -> String {
    /// Bytes of a tensor at either end.
    const PART: usize = 1024;
    let mut sum = crc32fast::Hasher::new();
    for (name, tensor) in &checkpoint.weights.tensors {
        sum.update(format!("{name} {:?} {}", tensor.shape, tensor.dtype.name()).as_bytes());
        let bytes: &[u8] = &tensor.bytes;
        sum.update(&bytes[..bytes.len().min(PART)]);
        sum.update(&bytes[bytes.len().saturating_sub(PART)..]);
    }
    format!("weights {:08x}", sum.finalize())
}

/// Refuses sampling settings outside of their ranges; `named` is what the user calls them.
pub fn check_sampling(s: &Sampling, named: impl Fn(&str) -> String) -> anyhow::Result<()> {
    let within = |name: &str, value: f32, ok: bool, range: &str| {
        ensure!(ok, "{} {value} is outside {range}", named(name));
        Ok(())
    };
    within("temperature", s.temperature, (0.0..=100.0).contains(&s.temperature), "[0, 100]")?;
    within("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "(0, 1]")?;
    within("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "[0, 1]")?;
    let penalty = s.repetition_penalty;
    within("repetition_penalty", penalty, penalty > 0.0 && penalty <= 100.0, "(0, 100]")?;
    within(
        "presence_penalty",
        s.presence_penalty,
        (-2.0..=2.0).contains(&s.presence_penalty),
        "[-2, 2]",
    )?;
    within(
        "frequency_penalty",
        s.frequency_penalty,
        (-2.0..=2.0).contains(&s.frequency_penalty),
        "[-2, 2]",
    )
}

/// What the CPU takes for weights besides the pages of mapped files, which the system takes back
/// when it needs them.
fn weights_plan(cpu: &Cpu, checkpoint: &BloomCheckpoint, dtype: Option<DType>) -> MemoryPlan {
    let bytes: f64 = checkpoint
        .config
        .parameters()
        .iter()
        .filter_map(|p| {
            let tensor = checkpoint.weights.tensors.get(&p.name)?;
            let held = dtype.unwrap_or(tensor.dtype);
            let packed = held == DType::Bf16 && cpu.isa().has_bf16();
            // what is in such memory already is laid out where it lies
            let there = held == tensor.dtype && matches!(tensor.bytes, Bytes::HugePages(..));
            let copied = held != tensor.dtype
                || packed
                || (cpu.resident() && matches!(tensor.bytes, Bytes::Mapped(..)));
            (copied && !there).then_some((p.len() * held.size()) as f64)
        })
        .sum();
    MemoryPlan::new().with("weights", bytes, "--dtype to int8 or bf16, or take a smaller model")
}

/// Sampling flags; what is not given comes from the model's recommendation.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// How much chance has a say, from 0 to 100; 0 always takes the most likely token.
    #[arg(long, visible_alias = "temp", value_name = "T")]
    pub temperature: Option<f32>,
    /// Choose among the k most likely tokens; 0 or -1 for all.
    #[arg(long, value_name = "K", value_parser = top_k)]
    pub top_k: Option<usize>,
    /// Choose among the most likely tokens that together have this probability, above 0; 1 for all.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Leave out tokens less likely than this part of the most likely one, from 0 to 1; 0 for none.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Above 1, makes tokens that occurred less likely; 1 for none, 0 is not possible.
    #[arg(long, value_name = "P")]
    pub repetition_penalty: Option<f32>,
    /// What the repetition penalty counts; transformers counts the prompt too.
    #[arg(long, value_enum, default_value_t = PenaltyScope::All)]
    pub penalty_scope: PenaltyScope,
    /// Taken once from the logits of tokens that came out before, from -2 to 2; 0 for none.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub presence_penalty: f32,
    /// Taken from the logits of tokens for each time they came out, from -2 to 2; 0 for none.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub frequency_penalty: f32,
    /// Added to the logit of a token, from -100 to 100; may be given several times.
    #[arg(long, value_name = "ID=VALUE", value_parser = bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Maximum new tokens, at least 1; what the model recommends if not given.
    #[arg(long, visible_alias = "max-new-tokens", value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Makes the result repeatable; random if not given, and 0 is a seed like any other.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// End at this text, which is left out; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on after the end-of-sequence token.
    #[arg(long)]
    pub ignore_eos: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PenaltyScope {
    All,
    Output,
}

/// Reads a number of tokens, of which -1 means all, as 0 does.
fn top_k(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(0),
        _ => text.parse().map_err(|_| "expected a whole number, or 0 or -1 for all tokens".into()),
    }
}

/// Reads `ID=VALUE`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let both = text
        .split_once('=')
        .and_then(|(id, value)| Some((id.trim().parse().ok()?, value.trim().parse().ok()?)));
    both.filter(|(_, value): &(u32, f32)| (-100.0..=100.0).contains(value)).ok_or_else(|| {
        "expected a token's id and a number from -100 to 100, such as 50256=-100".into()
    })
}

impl SamplingArgs {
    /// The settings, with `defaults` where flags are silent, and a seed of the moment if none is
    /// given.
    pub fn options(
        &self,
        defaults: &GenerationDefaults,
        candidates: u32,
    ) -> anyhow::Result<GenerateOptions> {
        let d = defaults.sampling;
        let s = Sampling {
            temperature: self.temperature.unwrap_or(d.temperature),
            top_k: self.top_k.unwrap_or(d.top_k),
            top_p: self.top_p.unwrap_or(d.top_p),
            min_p: self.min_p.unwrap_or(d.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(d.repetition_penalty),
            penalize_prompt: self.penalty_scope == PenaltyScope::All,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed.unwrap_or_else(crate::random::seed),
        };
        check_sampling(&s, |name| format!("--{}", name.replace('_', "-")))?;
        ensure!(self.max_tokens != Some(0), "--max-tokens must be at least 1");
        ensure!((1..=1024).contains(&candidates), "-n {candidates} is outside [1, 1024]");
        // the last of several for a token counts
        let bias: std::collections::BTreeMap<u32, f32> = self.logit_bias.iter().copied().collect();
        Ok(GenerateOptions {
            candidates,
            sampling: s,
            length: self.max_tokens.map_or(defaults.length, Length::New),
            ignore_eos: self.ignore_eos,
            stops: self.stop.clone(),
            bias: bias.into_iter().collect(),
            ..GenerateOptions::default()
        })
    }
}
