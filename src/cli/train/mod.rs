//! `bprompt train`: vocabularies and models.

mod ppo;
mod reward;
mod run;
mod sft;
mod start;
mod tokenizer;

pub use run::{PrecisionChoice, RecomputeChoice};

use clap::Subcommand;

#[derive(Subcommand)]
pub enum TrainCommand {
    /// Learn a byte-level BPE vocabulary with BLOOM's pre-tokenizer.
    Tokenizer(tokenizer::TokenizerArgs),
    /// Supervised fine-tuning on pairs.
    Sft(Box<sft::SftArgs>),
    /// Fit a reward model to scores of texts, or to preferences among them.
    Reward(Box<reward::RewardArgs>),
    /// Have a policy learn from rewards: PPO, GRPO or RLOO, with rollouts by the engine.
    Ppo(Box<ppo::PpoArgs>),
}

impl TrainCommand {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            TrainCommand::Tokenizer(args) => args.run(),
            TrainCommand::Sft(args) => args.run(),
            TrainCommand::Reward(args) => args.run(),
            TrainCommand::Ppo(args) => args.run(),
        }
    }
}

/// The defaults in which the commands differ; the arguments are the same.
pub fn with_defaults(train: clap::Command) -> clap::Command {
    train.mut_subcommand("reward", |reward| {
        reward
            .mut_arg("learning_rate", |a| a.default_value("1e-5"))
            .mut_arg("weight_decay", |a| a.default_value("1e-3"))
            .mut_arg("epochs", |a| a.default_value("1"))
            .mut_arg("max_tokens", |a| a.help("Longer texts are cut on the left; at least 2"))
    })
}
