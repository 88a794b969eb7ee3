//! What a run over files is asked to do.

use super::input::{LineOptions, Shard};
use super::target::Begin;
use crate::cli::rewriter::{Format, RewriterArgs};
use clap::Args;
use std::path::PathBuf;

/// Files of lines, and where their results go.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct FileArgs {
    /// Files of prompts, or patterns such as "part-*.jsonl.gz"; `-` for standard input. JSON lines
    /// with "prompt" and, if they want, "id" and settings of their own, or text with one a line;
    /// plain, gzip or zstd.
    #[arg(short, long, value_name = "FILES", num_args = 1..)]
    pub input: Vec<String>,
    /// Where results go, `-` for standard output; compressed if the name ends in .gz or .zst.
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
    /// Take every n-th line alone, from the i-th on: one of n parts for n machines.
    #[arg(long, value_name = "I/N", requires = "input")]
    pub shard: Option<Shard>,
    /// Go on where an interrupted run stopped, with the same settings.
    #[arg(long)]
    pub resume: bool,
    /// Replace an existing output file, once the results are whole.
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
    /// Leave out bad input lines, and count them.
    #[arg(long)]
    pub skip_bad_lines: bool,
}

impl FileArgs {
    /// Where lines come from, if these are on the command line.
    pub fn source<'a>(&'a self, prompts: &'a [String]) -> PromptSource<'a> {
        match (prompts.is_empty(), self.input.is_empty()) {
            (false, _) => PromptSource::Prompts(prompts),
            (true, false) => PromptSource::Files(&self.input),
            (true, true) => PromptSource::Stdin,
        }
    }

    /// Whether the output's name says that results are text.
    pub fn writes_text(&self) -> bool {
        let name = self.output.to_string_lossy().to_lowercase();
        let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        name.ends_with(".txt")
    }

    /// How lines are read: of at most `longest` bytes, as text or as their files' names say.
    pub fn line_options(&self, longest: usize, text: bool) -> LineOptions {
        LineOptions { shard: self.shard.unwrap_or_default(), longest, text }
    }

    /// How the run meets what is there.
    pub fn begin(&self) -> Begin {
        match (self.resume, self.force) {
            (true, _) => Begin::Resume,
            (_, true) => Begin::Replace,
            _ => Begin::New,
        }
    }
}

/// Where prompts come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PromptSource<'a> {
    Files(&'a [String]),
    /// Nobody said where from.
    Stdin,
    /// The command line.
    Prompts(&'a [String]),
}

/// A run over files of prompts.
pub struct BatchArgs<'a> {
    pub files: &'a FileArgs,
    pub rewriter: &'a RewriterArgs,
    pub source: PromptSource<'a>,
    pub format: Format,
    /// What requests of OpenAI's batch files call the model.
    pub served_model_name: Option<&'a str>,
    pub max_prompt_bytes: usize,
}
