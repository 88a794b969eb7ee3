//! `bprompt rewrite`: plain prompts into rich ones, one at a time or files of them.

use super::batch::{self, BatchArgs, FileArgs};
use super::files::is_stdout;
use super::print::{self, note};
use super::rewriter::{Format, Rewriter, RewriterArgs, one_line, record};
use crate::engine::EngineOptions;
use crate::generate::Update;
use crate::random::prompt_seed;
use crate::rewrite::{Candidate, DEFAULT_MIN_KEPT, Rewriting, Source, whole_characters};
use anyhow::{bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::time::Duration;

#[derive(Args)]
pub struct RewriteArgs {
    /// Plain prompts; without them and without --input, standard input has one a line.
    #[arg(value_name = "PROMPT", conflicts_with = "input")]
    prompts: Vec<String>,
    #[command(flatten)]
    files: FileArgs,
    /// How lines are read and results written; by default JSON lines, or text if the output's name
    /// ends in .txt.
    #[arg(long, value_enum, help_heading = "Files")]
    format: Option<Format>,
    /// With --format openai, what requests call the model; its folder's name if not given.
    #[arg(long, value_name = "NAME", requires = "input", help_heading = "Files")]
    served_model_name: Option<String>,
    #[command(flatten)]
    rewriter: RewriterArgs,
    /// One JSON object a prompt: id, prompt, candidates, seed.
    #[arg(long, help_heading = None)]
    json: bool,
    /// Maximum bytes of a prompt, at least 1; longer ones are refused before they take memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536, help_heading = None)]
    max_prompt_bytes: usize,
}

impl RewriteArgs {
    /// How results are written.
    fn format(&self) -> Format {
        // prompts that came without a file are answered as those on the command line are
        let text = self.files.writes_text()
            || (self.files.input.is_empty() && !self.json && is_stdout(&self.files.output));
        self.format.unwrap_or(if text { Format::Text } else { Format::Jsonl })
    }

    /// Whether this is work for files rather than for a few prompts and a terminal.
    fn has_files(&self) -> bool {
        let f = &self.files;
        !f.input.is_empty()
            || self.prompts.is_empty()
            || f.resume
            || f.force
            || self.format.is_some()
            || f.output.as_os_str() != "-"
    }

    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.max_prompt_bytes > 0, "--max-prompt-bytes must be at least 1");
        if self.prompts.is_empty() && self.files.input.is_empty() && std::io::stdin().is_terminal()
        {
            bail!(
                "nothing to rewrite: give a PROMPT, --input FILES, or prompts on standard input; \
                see --help"
            );
        }
        if self.has_files() {
            let args = BatchArgs {
                files: &self.files,
                rewriter: &self.rewriter,
                source: self.files.source(&self.prompts),
                format: self.format(),
                served_model_name: self.served_model_name.as_deref(),
                max_prompt_bytes: self.max_prompt_bytes,
            };
            return batch::run(&args);
        }
        let engine = self.rewriter.engine.options()?;
        self.prompts.iter().try_for_each(|p| batch::check_length(p, self.max_prompt_bytes))?;
        let rewriter = self.rewriter.load(false)?;
        for (i, prompt) in self.prompts.iter().enumerate() {
            self.one(&rewriter, engine, i, prompt)?;
        }
        Ok(())
    }

    /// Rewrites one prompt; a single candidate in text streams, if nothing is demanded of it.
    fn one(
        &self,
        rewriter: &Rewriter,
        engine: EngineOptions,
        id: usize,
        prompt: &str,
    ) -> anyhow::Result<()> {
        let n = rewriter.options.candidates;
        let guard = rewriter.guard.clone();
        let mut options = rewriter.options.clone();
        options.sampling.seed = prompt_seed(options.sampling.seed, id, self.prompts.len());
        let rewriting = Rewriting::new(rewriter.prompter(), prompt, options, guard)?;
        let length = rewriter.prompter().encode(prompt)?.len();
        let cache_tokens = self
            .rewriter
            .engine
            .cache_tokens
            .unwrap_or(rewriter.options.cache_tokens(length, rewriter.loaded.config.context));
        let mut session = rewriter.session(EngineOptions { cache_tokens, ..engine })?;
        let streams = n == 1 && !self.json && rewriting.streams();
        let waiting = Waiting::begin(!streams);
        let mut stream = TextStream::new(print::stdout());
        let rewrite = rewriter.rewrite(&mut *session, rewriting, &mut |update| {
            if let (true, Update::Text { text, .. }) = (streams, update) {
                stream.push(&whole_characters(text));
            }
        })?;
        waiting.end();
        if self.json {
            writeln!(stream.out, "{}", record(json!(id), prompt, &rewrite))?;
        } else if n == 1 {
            stream.finish(&rewrite.candidates[0].text)?;
        } else {
            for c in &rewrite.candidates {
                writeln!(stream.out, "{}", one_line(&c.text))?;
            }
        }
        for c in &rewrite.candidates {
            if let Some(word) = reservation(c) {
                note!("{word}");
            }
        }
        if self.prompts.len() > 1 && !self.json && n > 1 && std::io::stdout().is_terminal() {
            writeln!(stream.out)?;
        }
        Ok(())
    }
}

/// What has to be said of a rewrite that is not the model's, or that keeps little of its prompt.
fn reservation(c: &Candidate) -> Option<String> {
    match &c.reason {
        Some(reason) if c.source == Source::Model => Some(reason.clone()),
        Some(reason) => Some(format!("fell back on the prompt: {reason}")),
        None if c.kept < DEFAULT_MIN_KEPT => {
            Some(format!("kept {:.2} of the prompt; missing: {}", c.kept, c.missing.join(", ")))
        }
        None => None,
    }
}

/// A sign of life on a terminal while nothing can be shown yet.
struct Waiting(Option<ProgressBar>);

impl Waiting {
    fn begin(shown: bool) -> Waiting {
        let bar = (shown && std::io::stderr().is_terminal())
            .then(|| ProgressBar::new_spinner().with_message("rewriting"));
        if let Some(bar) = &bar {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Waiting(bar)
    }

    fn end(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Prints a text as it grows, without the white space around it.
struct TextStream<W: Write> {
    out: W,
    /// What was printed, and white space that is printed once something follows.
    given: String,
    held: String,
    error: Option<std::io::Error>,
}

impl<W: Write> TextStream<W> {
    fn new(out: W) -> TextStream<W> {
        TextStream { out, given: String::new(), held: String::new(), error: None }
    }

    fn push(&mut self, text: &str) {
        self.held.push_str(text);
        let from =
            if self.given.is_empty() { self.held.len() - self.held.trim_start().len() } else { 0 };
        let end = self.held.trim_end().len();
        if self.error.is_some() || end <= from {
            return;
        }
        let fresh = self.held[from..end].to_owned();
        self.held.drain(..end);
        self.error = self.out.write_all(fresh.as_bytes()).and_then(|()| self.out.flush()).err();
        self.given.push_str(&fresh);
    }

    /// Prints what is left of the whole text.
    fn finish(&mut self, text: &str) -> anyhow::Result<()> {
        if let Some(e) = self.error.take() {
            return Err(e.into());
        }
        let text = text.trim();
        match text.strip_prefix(self.given.as_str()) {
            Some(rest) => writeln!(self.out, "{rest}")?,
            None => writeln!(self.out, "\n{text}")?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_prints_the_text_without_the_space_around_it() {
        for pieces in [
            &[" ", " a", " cat", " \n", ", ", "8k", " \n"][..],
            &[" a cat \n, 8k "],
            &["a cat \n, 8k"],
            &[],
        ] {
            let mut stream = TextStream::new(Vec::new());
            pieces.iter().for_each(|p| stream.push(p));
            stream.finish("a cat \n, 8k").unwrap();
            assert_eq!(String::from_utf8(stream.out).unwrap(), "a cat \n, 8k\n", "{pieces:?}");
        }
    }
}
