//! `bprompt completions` and `bprompt man`: what shells and readers of manuals want.

use super::{command, print};
use anyhow::Context;
use clap::Args;
use clap_complete::Shell;
use std::io::Write;
use std::path::PathBuf;

#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell that is to complete commands and flags.
    #[arg(value_enum)]
    shell: Shell,
}

impl CompletionsArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command(), "bprompt", &mut script);
        Ok(print::stdout().write_all(&script)?)
    }
}

#[derive(Args)]
pub struct ManArgs {
    /// Write a page for the program and one for every command into this folder, instead of the
    /// program's to standard output.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl ManArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let Some(folder) = self.output else {
            let mut page = Vec::new();
            clap_mangen::Man::new(command()).render(&mut page)?;
            return Ok(print::stdout().write_all(&page)?);
        };
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("{}: cannot create", folder.display()))?;
        clap_mangen::generate_to(command(), &folder)
            .with_context(|| format!("{}: cannot write", folder.display()))
    }
}
