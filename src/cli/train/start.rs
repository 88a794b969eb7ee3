//! What training starts from: weights, a vocabulary, and what else a model's folder holds.

use super::super::hub::model_folder;
use super::super::model::Device;
use super::super::ranks::Ranks;
use super::run::RunArgs;
use crate::checkpoint::{Companions, MODEL_FILES, TOKENIZER_FILES};
use crate::memory::MemoryPlan;
use crate::models::bloom::training::TrainModel;
use crate::models::bloom::{Architecture, BloomCheckpoint, BloomConfig};
use crate::models::embedded;
use crate::text::Tokenizer;
use anyhow::Context;
use clap::Args;
use std::path::{Path, PathBuf};

/// Where the weights come from.
#[derive(Args)]
pub struct StartArgs {
    /// Checkpoint to start from, a folder or org/name of one in Hugging Face's cache; the embedded
    /// model if neither this nor --config is given, or this is "embedded".
    #[arg(long, value_name = "DIR|NAME", conflicts_with = "config")]
    model: Option<PathBuf>,
    /// Start from random weights of this config.json; needs --tokenizer.
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    config: Option<PathBuf>,
    /// tokenizer.json; by default the one of the model folder.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// What training starts from.
pub struct Start {
    pub model: TrainModel,
    /// Until training takes it.
    pub device: Option<Device>,
    /// Ranks on this machine.
    pub local_ranks: usize,
    pub tokenizer: Tokenizer,
    /// What else the model folder holds, with this tokenizer.
    pub companions: Companions,
    /// The model's folder.
    pub folder: Option<PathBuf>,
    /// Whether it is the embedded model.
    pub embedded: bool,
    /// Whether it had been a reward model before.
    pub was_reward_model: bool,
}

impl Start {
    /// Template file that the model's folder holds.
    pub fn own_template(&self) -> Option<PathBuf> {
        self.folder.as_ref().map(|m| m.join("template.txt")).filter(|p| p.exists())
    }
}

/// Fails if the machine has no memory for training so many parameters.
fn check_memory(device: &Device, config: &BloomConfig, ranks: &Ranks) -> anyhow::Result<()> {
    // a GPU has the gradients and moments itself
    let moments = 8.0 / ranks.count() as f64;
    let bytes = if matches!(device, Device::Cpu(_)) { 8.0 + moments } else { 4.0 };
    let bytes = bytes * ranks.local_count() as f64;
    let bytes = bytes * config.parameter_count() as f64;
    let plan = MemoryPlan::new();
    Ok(plan.with("weights, gradients and AdamW's moments", bytes, "the model's size").check()?)
}

impl StartArgs {
    /// The weights, for a device that they are to be trained on. A language model is made into a
    /// reward model where `to` is one.
    pub fn start(&self, run: &RunArgs, ranks: &Ranks, to: Architecture) -> anyhow::Result<Start> {
        let named = self.model.as_deref().filter(|m| *m != Path::new("embedded"));
        let folder = named.map(model_folder).transpose()?;
        let device_for = |c: &BloomConfig| {
            let device = run.device_for(c, ranks)?;
            check_memory(&device, c, ranks)?;
            anyhow::Ok(device)
        };
        let mut was_reward_model = false;
        let (model, device) = match (&folder, &self.config) {
            (_, Some(file)) => {
                let config = BloomConfig { architecture: to, ..BloomConfig::read(file)? };
                let device = device_for(&config).with_context(|| format!("{}", file.display()))?;
                (TrainModel::random(config, run.seed), device)
            }
            (Some(folder), None) => {
                let c = BloomCheckpoint::open(folder)?;
                let device =
                    device_for(&c.config).with_context(|| format!("{}", folder.display()))?;
                was_reward_model = c.config.architecture == Architecture::SequenceClassification;
                (made_into(c, to, run.seed)?, device)
            }
            (None, None) => {
                let c = embedded::checkpoint();
                let device = device_for(&c.config)?;
                (made_into(c, to, run.seed)?, device)
            }
        };
        let (tokenizer, companions) = self.vocabulary(&model.config, folder.as_deref())?;
        let device = Some(device);
        let local_ranks = ranks.local_count();
        let embedded = folder.is_none() && self.config.is_none();
        Ok(Start {
            model,
            device,
            local_ranks,
            tokenizer,
            companions,
            folder,
            embedded,
            was_reward_model,
        })
    }

    /// The tokenizer, and what is saved beside the weights.
    fn vocabulary(
        &self,
        config: &BloomConfig,
        folder: Option<&Path>,
    ) -> anyhow::Result<(Tokenizer, Companions)> {
        let mut companions = Companions::default();
        match (folder, &self.config) {
            (Some(folder), _) => companions.read(folder, &MODEL_FILES)?,
            (None, Some(file)) => companions.read(folder_of(file), &MODEL_FILES)?,
            (None, None) => companions.set("generation_config.json", embedded::GENERATION_CONFIG),
        }
        let path = self.tokenizer.clone().or(folder.map(|f| f.join("tokenizer.json")));
        let Some(path) = &path else {
            companions.set("tokenizer.json", embedded::TOKENIZER);
            return Ok((embedded::tokenizer(), companions));
        };
        let tokenizer = Tokenizer::open(path)?;
        tokenizer.check(config.vocab_size, path)?;
        companions.read(folder_of(path), &TOKENIZER_FILES)?;
        // the file may have another name than in a model folder
        companions.set(
            "tokenizer.json",
            std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?,
        );
        Ok((tokenizer, companions))
    }
}

/// The checkpoint's model as what it is to be.
fn made_into(c: BloomCheckpoint, to: Architecture, seed: u64) -> anyhow::Result<TrainModel> {
    if to == Architecture::CausalLm {
        c.config.expect(to, &c.weights.path)?;
    }
    let model = TrainModel::new(c.config.clone(), c.to_f32()?);
    Ok(if to == Architecture::SequenceClassification {
        model.into_reward_model(seed)
    } else {
        model
    })
}

/// The folder that a file is in.
fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
