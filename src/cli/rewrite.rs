//! `bprompt rewrite`: plain prompts into rich ones, one at a time or files of them.

use super::batch::{self, Shard};
use super::engine::EngineArgs;
use super::guard::GuardArgs;
use super::model::{Loaded, ModelArgs, SamplingArgs};
use super::print::{self, note};
use crate::engine::EngineOptions;
use crate::engine::session::{Completed, Generate, GenerateOptions, Update};
use crate::rewrite::{GuardOptions, Prompter, Rewrite, Rewriting};
use crate::text::template::Template;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

#[derive(Args)]
pub struct RewriteArgs {
    /// Plain prompts.
    #[arg(value_name = "PROMPT", required_unless_present = "input", conflicts_with = "input")]
    prompts: Vec<String>,
    /// Files of prompts, or patterns such as "part-*.jsonl.gz"; `-` for standard input. JSON lines with "prompt" (and "id", "seed"), or
    /// text with one a line; plain, gzip or zstd.
    #[arg(long, value_name = "FILES", num_args = 1..)]
    pub input: Vec<String>,
    /// Where results go, `-` for standard output.
    #[arg(long, value_name = "FILE", requires = "input", default_value = "-")]
    pub output: PathBuf,
    /// How lines are read and results written; by default JSON lines, or text if the output's name ends in .txt.
    #[arg(long, value_enum, requires = "input")]
    pub format: Option<Format>,
    /// Take every n-th line alone, from the i-th on: one of n parts for n machines.
    #[arg(long, value_name = "I/N", requires = "input")]
    pub shard: Option<Shard>,
    /// Go on where an interrupted run stopped.
    #[arg(long, requires = "input")]
    pub resume: bool,
    /// Replace an existing output file.
    #[arg(long, requires = "input", conflicts_with = "resume")]
    pub force: bool,
    /// Leave out input lines that cannot be read, and count them.
    #[arg(long, requires = "input")]
    pub skip_bad_lines: bool,
    /// Candidates for each prompt.
    #[arg(short, long = "candidates", default_value_t = 1)]
    n: u32,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    pub template: Option<String>,
    /// One JSON object a prompt: id, prompt, candidates, seed.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    guard: GuardArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

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

impl RewriteArgs {
    pub fn rewriter(&self) -> anyhow::Result<Rewriter> {
        let model = ModelArgs { long_running: !self.input.is_empty(), ..self.model.clone() };
        let loaded = model.load()?;
        let template = loaded.template(self.template.as_deref())?;
        let mut options = self.sampling.options(&loaded.defaults, self.n)?;
        let guard = self.guard.options(&mut options)?;
        Ok(Rewriter { loaded, template, options, guard })
    }

    pub fn run(self) -> anyhow::Result<()> {
        if !self.input.is_empty() {
            return batch::run(&self);
        }
        let engine = self.engine.options()?;
        let rewriter = self.rewriter()?;
        for (i, prompt) in self.prompts.iter().enumerate() {
            self.one(&rewriter, engine, i, prompt)?;
        }
        Ok(())
    }

    /// Rewrites one prompt; a single candidate in text streams, if nothing is demanded of it.
    fn one(&self, rewriter: &Rewriter, engine: EngineOptions, id: usize, prompt: &str) -> anyhow::Result<()> {
        let n = rewriter.options.candidates;
        let guard = rewriter.guard.clone();
        let rewriting = Rewriting::new(rewriter.prompter(), prompt, rewriter.options.clone(), guard)?;
        let length = rewriter.prompter().encode(prompt)?.len();
        let cache_tokens = self.engine.cache_tokens.unwrap_or(rewriter.options.cache_tokens(length));
        let mut session = rewriter.session(EngineOptions { cache_tokens, ..engine })?;
        let mut out = print::stdout();
        let streams = n == 1 && !self.json && rewriting.streams();
        let mut begun = false;
        let mut write_error = None;
        let rewrite = rewriter.rewrite(&mut *session, rewriting, &mut |update| {
            if let (true, None, Update::Text { text, .. }) = (streams, &write_error, update) {
                let text = if begun { text } else { text.trim_start() };
                begun |= !text.is_empty();
                write_error = write!(out, "{text}").and_then(|()| out.flush()).err();
            }
        })?;
        if let Some(e) = write_error {
            return Err(e.into());
        }
        if self.json {
            writeln!(out, "{}", record(json!(id), prompt, &rewrite))?;
        } else if streams {
            writeln!(out)?;
        } else {
            for c in &rewrite.candidates {
                writeln!(out, "{}", one_line(&c.text))?;
                if let (Some(reason), true) = (&c.reason, std::io::stderr().is_terminal()) {
                    note!("  ({reason})");
                }
            }
        }
        if self.prompts.len() > 1 && !self.json && n > 1 && std::io::stdout().is_terminal() {
            writeln!(out)?;
        }
        Ok(())
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
