//! A model with the template and settings of a command line, and how its rewrites are written.

use super::engine::EngineArgs;
use super::guard::GuardArgs;
use super::model::{Loaded, ModelArgs, SamplingArgs};
use crate::engine::EngineOptions;
use crate::generate::{Completed, Generate, GenerateOptions, Update};
use crate::rewrite::{GuardOptions, Prompter, Rewrite, Rewriting};
use crate::text::template::Template;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What rewrites are made with.
#[derive(Args)]
pub struct RewriterArgs {
    /// Candidates for each prompt, at least 1.
    #[arg(short, long = "candidates", visible_alias = "n", value_name = "N", default_value_t = 1)]
    #[arg(help_heading = None)]
    n: u32,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE", help_heading = None)]
    pub template: Option<String>,
    #[command(flatten)]
    pub guard: GuardArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

impl RewriterArgs {
    /// Loads the model, for a few prompts or for a long run.
    pub fn load(&self, long_running: bool) -> anyhow::Result<Rewriter> {
        let model = ModelArgs { long_running, ..self.model.clone() };
        let loaded = model.load()?;
        let template = loaded.template(self.template.as_deref())?;
        let mut options = self.sampling.options(&loaded.defaults, self.n)?;
        let guard = self.guard.options(&mut options)?;
        Ok(Rewriter { loaded, template, options, guard })
    }

    /// Files that are read for it.
    pub fn files(&self) -> Vec<PathBuf> {
        let template = self.template.iter().filter(|t| Path::new(t).is_file()).map(PathBuf::from);
        self.guard.files().into_iter().chain(self.model.model.clone()).chain(template).collect()
    }
}

/// How prompts are read and results written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Jsonl,
    Text,
    /// OpenAI's batch files: requests with custom_id, url and body; answers in the same way.
    Openai,
}

/// A loaded model with the template and settings of the command line.
pub struct Rewriter {
    pub loaded: Loaded,
    pub template: Template,
    pub options: GenerateOptions,
    pub guard: GuardOptions,
}

impl Rewriter {
    pub fn prompter(&self) -> Prompter {
        Prompter { tokenizer: self.loaded.tokenizer.clone(), template: self.template.clone() }
    }

    pub fn session(&self, engine: EngineOptions) -> anyhow::Result<Box<dyn Generate + '_>> {
        self.loaded.session(engine)
    }

    /// Rewrites one prompt, alone.
    pub fn rewrite(
        &self,
        session: &mut dyn Generate,
        mut rewriting: Rewriting,
        on_update: &mut dyn FnMut(Update),
    ) -> anyhow::Result<Rewrite> {
        loop {
            let work = rewriting.work()?;
            if work.is_empty() {
                return Ok(rewriting.finish());
            }
            for (part, (ids, options)) in work.into_iter().enumerate() {
                session.submit(part as u64, ids, &options)?;
            }
            let mut done: Vec<Completed> = Vec::new();
            while !session.is_idle() {
                for outcome in session.step(on_update)? {
                    done.push(outcome?);
                }
            }
            done.sort_by_key(|c| c.id);
            rewriting.take(&done);
        }
    }
}

/// The JSON object of a prompt's rewrites.
pub fn record(id: Value, prompt: &str, rewrite: &Rewrite) -> Value {
    json!({ "id": id, "prompt": prompt, "candidates": rewrite.candidates, "seed": rewrite.seed })
}

/// A candidate's text where a line stands for a candidate.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
