//! `bprompt score`: scores of what prompts became.

mod record;
mod text;

use clap::Subcommand;

#[derive(Subcommand)]
pub enum ScoreCommand {
    /// Score texts by a reward model that reads them.
    Text(Box<text::ScoreTextArgs>),
}

impl ScoreCommand {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            ScoreCommand::Text(args) => args.run(),
        }
    }
}

/// The help in which the arguments for files differ from those of `bprompt rewrite`.
pub fn with_help(score: clap::Command) -> clap::Command {
    const INPUT: &str = "Files of texts, or patterns such as \"part-*.jsonl.gz\"; `-` for standard \
        input. JSON lines with \"prompt\", maybe \"raw_prompt\", and \"id\", or as `bprompt \
        rewrite` writes them, or text with one a line; plain, gzip or zstd";
    score.mut_subcommand("text", |text| text.mut_arg("input", |a| a.help(INPUT)))
}
