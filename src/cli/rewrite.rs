//! `bprompt rewrite`: plain prompts into rich ones, one at a time or files of them.

use super::batch::{self, Settings, Shard};
use super::engine::EngineArgs;
use super::files::is_stdout;
use super::guard::GuardArgs;
use super::model::{Loaded, ModelArgs, SamplingArgs};
use super::print::{self, note};
use crate::engine::EngineOptions;
use crate::engine::session::{Completed, Generate, GenerateOptions, Update};
use crate::random::prompt_seed;
use crate::rewrite::{
    Candidate, DEFAULT_MIN_KEPT, GuardOptions, Prompter, Rewrite, Rewriting, Source as TextSource,
    whole_characters,
};
use crate::text::template::Template;
use anyhow::{bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Args)]
pub struct RewriteArgs {
    /// Plain prompts; without them and without --input, standard input has one a line.
    #[arg(value_name = "PROMPT", conflicts_with = "input")]
    prompts: Vec<String>,
    /// Candidates for each prompt, at least 1.
    #[arg(short, long = "candidates", visible_alias = "n", value_name = "N", default_value_t = 1)]
    n: u32,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    pub template: Option<String>,
    /// One JSON object a prompt: id, prompt, candidates, seed.
    #[arg(long)]
    json: bool,
    /// Most bytes of a prompt, at least 1; longer ones are refused before they take memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536)]
    pub max_prompt_bytes: usize,
    #[command(flatten)]
    pub files: FileArgs,
    #[command(flatten)]
    guard: GuardArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

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
        let model = ModelArgs { long_running: self.has_files(), ..self.model.clone() };
        let loaded = model.load()?;
        let template = loaded.template(self.template.as_deref())?;
        let mut options = self.sampling.options(&loaded.defaults, self.n)?;
        let guard = self.guard.options(&mut options)?;
        Ok(Rewriter { loaded, template, options, guard })
    }

    /// How results are written.
    pub fn format(&self) -> Format {
        let name = self.files.output.to_string_lossy().to_lowercase();
        let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        // prompts that came without a file are answered as those on the command line are
        let text = name.ends_with(".txt")
            || (self.files.input.is_empty() && !self.json && is_stdout(&self.files.output));
        self.files.format.unwrap_or(if text { Format::Text } else { Format::Jsonl })
    }

    /// Files that are read beside the input.
    pub fn other_files(&self) -> Vec<PathBuf> {
        let template = self.template.iter().filter(|t| Path::new(t).is_file()).map(PathBuf::from);
        self.guard.files().into_iter().chain(self.model.model.clone()).chain(template).collect()
    }

    /// What the results depend on, under the names of the flags.
    pub fn settings(&self, rewriter: &Rewriter, format: Format) -> anyhow::Result<Settings> {
        let Rewriter { loaded, template, options, guard } = rewriter;
        let values = json!({
            "model": loaded.fingerprint,
            "dtype": format!("{:?}", self.model.dtype).to_lowercase(),
            "template": template.text(),
            "format": format!("{format:?}").to_lowercase(),
            "shard": self.files.shard.unwrap_or_default().to_string(),
            "candidates": options.candidates,
            "seed": options.sampling.seed,
            "logit-bias": options.bias,
            "stop": options.stops,
            "ignore-eos": options.ignore_eos,
            "keep": options.keep.iter().collect::<Vec<_>>(),
            "ban": self.guard.banned()?,
            "min-kept": guard.min_kept,
            "rounds": guard.rounds,
            "max-clip-tokens": guard.max_clip_tokens,
            "style": guard.additions.style.as_ref().map(|s| s.to_string()),
            "no-artists": guard.additions.no_artists,
            "any-medium": guard.additions.any_medium,
            "variety": guard.additions.variety,
        });
        let Value::Object(values) = values else { unreachable!("an object was written above") };
        let mut settings = Settings(values);
        settings.add_sampling(&options.sampling, options.length);
        Ok(settings)
    }

    /// Whether this is work for files rather than for a few prompts and a terminal.
    fn has_files(&self) -> bool {
        let f = &self.files;
        !f.input.is_empty()
            || self.prompts.is_empty()
            || f.resume
            || f.force
            || f.format.is_some()
            || f.output.as_os_str() != "-"
    }

    /// Where prompts come from.
    pub fn source(&self) -> batch::Source<'_> {
        match (self.prompts.is_empty(), self.files.input.is_empty()) {
            (false, _) => batch::Source::Prompts(&self.prompts),
            (true, false) => batch::Source::Files(&self.files.input),
            (true, true) => batch::Source::Stdin,
        }
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
            return batch::run(&self);
        }
        let engine = self.engine.options()?;
        self.prompts.iter().try_for_each(|p| batch::check_length(p, self.max_prompt_bytes))?;
        let rewriter = self.rewriter()?;
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
        Some(reason) if c.source == TextSource::Model => Some(reason.clone()),
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

/// The JSON object of a prompt's rewrites.
pub fn record(id: Value, prompt: &str, rewrite: &Rewrite) -> Value {
    json!({ "id": id, "prompt": prompt, "candidates": rewrite.candidates, "seed": rewrite.seed })
}

/// A candidate's text where a line stands for a candidate.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
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
