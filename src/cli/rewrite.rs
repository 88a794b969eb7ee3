//! `bprompt rewrite`: plain prompts into rich ones, one at a time or files of them.

use super::batch;
use super::model::{Loaded, ModelArgs, SamplingArgs};
use crate::engine::EngineOptions;
use crate::engine::session::{Completed, Generate, GenerateOptions, Update};
use crate::text::template::Template;
use anyhow::ensure;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

#[derive(Args)]
pub struct RewriteArgs {
    /// Plain prompts.
    #[arg(value_name = "PROMPT", required_unless_present = "input", conflicts_with = "input")]
    prompts: Vec<String>,
    /// File of prompts, `-` for standard input: JSON lines with "prompt" (and "id", "seed"), or text with one a line.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Where results go, `-` for standard output.
    #[arg(long, value_name = "FILE", requires = "input", default_value = "-")]
    pub output: PathBuf,
    /// How results are written; by default JSON lines, or text if the output's name ends in .txt.
    #[arg(long, value_enum, requires = "input")]
    pub format: Option<Format>,
    /// Go on where an interrupted run stopped.
    #[arg(long, requires = "input")]
    pub resume: bool,
    /// Replace an existing output file.
    #[arg(long, requires = "input", conflicts_with = "resume")]
    pub force: bool,
    /// Leave out input lines that cannot be read, and count them.
    #[arg(long, requires = "input")]
    pub skip_bad_lines: bool,
    /// Most tokens of one forward pass.
    #[arg(long, default_value_t = 512)]
    pub batch_tokens: usize,
    /// Most sequences that run at once.
    #[arg(long, default_value_t = 32)]
    pub sequences: usize,
    /// Candidates for each prompt.
    #[arg(short, long = "candidates", default_value_t = 1)]
    n: u32,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// One JSON object a prompt: id, prompt, candidates, seed.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Jsonl,
    Text,
}

/// A loaded model with the template and settings of the command line.
pub struct Rewriter {
    pub loaded: Loaded,
    pub template: Template,
    pub options: GenerateOptions,
}

impl Rewriter {
    /// Token ids of a plain prompt in its template.
    pub fn encode(&self, prompt: &str) -> anyhow::Result<Vec<u32>> {
        ensure!(!prompt.trim().is_empty(), "the prompt is empty; expected a few words");
        Ok(self.loaded.tokenizer.encode_literal(&self.template.apply(prompt))?)
    }

    pub fn session(&self, engine: EngineOptions) -> anyhow::Result<Box<dyn Generate + '_>> {
        self.loaded.session(engine)
    }
}

impl RewriteArgs {
    pub fn rewriter(&self) -> anyhow::Result<Rewriter> {
        let loaded = self.model.load()?;
        let template = loaded.template(self.template.as_deref())?;
        let options = self.sampling.options(&loaded.defaults, self.n)?;
        Ok(Rewriter { loaded, template, options })
    }

    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.batch_tokens > 0 && self.sequences > 0, "--batch-tokens and --sequences must be at least 1");
        if let Some(input) = self.input.clone() {
            return batch::run(&self, &input);
        }
        let rewriter = self.rewriter()?;
        for (i, prompt) in self.prompts.iter().enumerate() {
            self.one(&rewriter, i, prompt)?;
        }
        Ok(())
    }

    /// Rewrites one prompt; a single candidate in text streams.
    fn one(&self, rewriter: &Rewriter, id: usize, prompt: &str) -> anyhow::Result<()> {
        let ids = rewriter.encode(prompt)?;
        let n = rewriter.options.candidates;
        let engine = EngineOptions {
            cache_tokens: rewriter.options.cache_tokens(ids.len()),
            batch_tokens: self.batch_tokens,
            sequences: self.sequences,
            ..EngineOptions::default()
        };
        let mut session = rewriter.session(engine)?;
        session.submit(0, ids, &rewriter.options)?;
        let mut out = std::io::stdout().lock();
        let streams = n == 1 && !self.json;
        let mut begun = false;
        let mut write_error = None;
        let mut done = Vec::new();
        while !session.is_idle() && write_error.is_none() {
            done.extend(session.step(&mut |update| {
                if let (true, Update::Text { text, .. }) = (streams, update) {
                    let text = if begun { text } else { text.trim_start() };
                    begun |= !text.is_empty();
                    write_error = write!(out, "{text}").and_then(|()| out.flush()).err();
                }
            })?);
        }
        if let Some(e) = write_error {
            return Err(e.into());
        }
        let completed = done.pop().expect("the one prompt is done");
        if self.json {
            let object = record(json!(id), prompt, &completed, rewriter.options.sampling.seed);
            writeln!(out, "{object}")?;
        } else if streams {
            writeln!(out)?;
        } else {
            for c in &completed.candidates {
                writeln!(out, "{}", one_line(&c.text))?;
            }
        }
        if self.prompts.len() > 1 && !self.json && n > 1 && std::io::stdout().is_terminal() {
            writeln!(out)?;
        }
        Ok(())
    }
}

/// The JSON object of a prompt's rewrites.
pub fn record(id: Value, prompt: &str, completed: &Completed, seed: u64) -> Value {
    let candidates: Vec<Value> = completed
        .candidates
        .iter()
        .map(|c| {
            json!({
                "text": c.text.trim(),
                "tokens": c.tokens.len(),
                "finish_reason": c.finish,
                "logprob": c.logprobs().iter().sum::<f32>(),
            })
        })
        .collect();
    json!({ "id": id, "prompt": prompt, "candidates": candidates, "seed": seed })
}

/// A candidate's text where a line stands for a candidate.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
