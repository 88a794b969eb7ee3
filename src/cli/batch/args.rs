//! What a run over files is asked to do.

use super::input::Shard;
use crate::cli::rewriter::{Format, RewriterArgs};
use clap::Args;
use std::path::PathBuf;

/// Files of prompts, and where their results go.
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
    /// How lines are read and results written; by default JSON lines, or text if the output's name
    /// ends in .txt.
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Take every n-th line alone, from the i-th on: one of n parts for n machines.
    #[arg(long, value_name = "I/N", requires = "input")]
    pub shard: Option<Shard>,
    /// Go on where an interrupted run stopped, with the same settings.
    #[arg(long)]
    pub resume: bool,
    /// Replace an existing output file, once the results are whole.
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
    /// Leave out input lines that cannot be rewritten, and count them.
    #[arg(long)]
    pub skip_bad_lines: bool,
    /// With --format openai, what requests call the model; its folder's name if not given.
    #[arg(long, value_name = "NAME", requires = "input")]
    pub served_model_name: Option<String>,
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
    pub max_prompt_bytes: usize,
}
