//! `bprompt train tokenizer`.

use super::super::files::check_distinct;
use super::super::print::print_line;
use super::super::within;
use crate::data::records::read_prompts;
use crate::text::{Tokenizer, train_tokenizer};
use anyhow::ensure;
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct TokenizerArgs {
    /// Texts: prompts or pairs (.jsonl, .json), or text with one a line.
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// The tokenizer.json to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of the vocabulary, special ones included; at least 260.
    #[arg(long, default_value_t = 8192)]
    vocab_size: usize,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
}

impl TokenizerArgs {
    pub fn run(self) -> anyhow::Result<()> {
        within("--vocab-size", self.vocab_size, 1..=1 << 20, "[260, 1048576]")?;
        let reads: Vec<&Path> = self.input.iter().map(PathBuf::as_path).collect();
        check_distinct(&[&self.output], &reads)?;
        ensure!(
            self.force || !self.output.exists(),
            "{}: exists already; --force replaces it",
            self.output.display()
        );
        let mut texts = Vec::new();
        for file in &self.input {
            texts.extend(read_prompts(file)?);
        }
        train_tokenizer(&texts, self.vocab_size, &self.output)?;
        let tokenizer = Tokenizer::open(&self.output)?;
        let bytes: usize = texts.iter().map(String::len).sum();
        let tokens: usize =
            texts.iter().map(|t| tokenizer.encode_literal(t).map_or(0, |ids| ids.len())).sum();
        print_line!(
            "{}: {} tokens, {:.2} bytes a token on its {} texts",
            self.output.display(),
            tokenizer.vocab_size(),
            bytes as f64 / tokens.max(1) as f64,
            texts.len()
        )?;
        Ok(())
    }
}
