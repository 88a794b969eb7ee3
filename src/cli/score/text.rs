//! `bprompt score text`: texts, a few or files of them, by a reward model.

use super::record::{TextRecord, Texts};
use crate::cli::batch::input::RawLine;
use crate::cli::batch::{
    BESIDE_PROMPT, BadLines, Begun, FileArgs, Input, Output, PENDING, Progress, PromptSource,
    Settings, complete, guarded, note_interrupted, write_finished,
};
use crate::cli::files::is_stdout;
use crate::cli::hub::model_folder;
use crate::cli::model::{
    DTypeChoice, DeviceChoice, ModelArgs, ModelBackend, PersistentChoice, fingerprint,
};
use crate::cli::print::note;
use crate::cli::rewriter::one_line;
use crate::cli::{DeviceArgs, interrupt_flag, within};
use crate::ops::{BLOCK, DecodeBackend};
use crate::rewards::{ScoredText, TextRewardModel, TextRewardOptions, TextRewardParts};
use crate::text::template::RewardTemplate;
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

#[derive(Args)]
pub struct ScoreTextArgs {
    /// Texts to score; without them and without --input, standard input has one a line.
    #[arg(value_name = "TEXT", conflicts_with = "input")]
    texts: Vec<String>,
    #[command(flatten)]
    files: FileArgs,
    /// How lines are read and scores written: JSON lines, or text with the score, a tab and the
    /// text; by default JSON lines, or text if the output's name ends in .txt.
    #[arg(long, value_enum, help_heading = "Files")]
    format: Option<ScoreFormat>,
    /// Maximum bytes of a text, at least 1; longer ones are refused before they take memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536, help_heading = "Files")]
    max_prompt_bytes: usize,
    #[command(flatten)]
    model: RewardModelArgs,
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScoreFormat {
    Jsonl,
    Text,
    /// Nothing but the scores, as texts without a file are answered.
    #[value(skip)]
    Scores,
}

/// The reward model, and where and how it computes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and device")]
struct RewardModelArgs {
    /// Folder of a reward model as `bprompt train reward` or Hugging Face writes it
    /// (BloomForSequenceClassification), or org/name[@revision] of one in its cache (HF_HOME).
    #[arg(short, long, value_name = "DIR|NAME")]
    model: PathBuf,
    /// What the model reads: aesthetic (the text alone), pickscore (with the plain prompt before
    /// it) or a file with {prompt}, and maybe {raw}, in it; by default the model's own.
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// Maximum tokens of a text, at least 1; the beginnings of longer ones are cut.
    #[arg(long, value_name = "N", default_value_t = 384)]
    max_tokens: usize,
    /// Maximum tokens of one forward pass, at least 1; no score depends on it.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    batch_tokens: usize,
    /// How weights are held for computing.
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto)]
    dtype: DTypeChoice,
    /// Where to compute; auto takes a GPU if there is one that can.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto, env = "BPROMPT_DEVICE")]
    device: DeviceChoice,
    #[command(flatten)]
    compute: DeviceArgs,
}

impl RewardModelArgs {
    fn options(&self) -> anyhow::Result<TextRewardOptions> {
        within("--max-tokens", self.max_tokens, 1..=1 << 20, "[1, 1048576]")?;
        within("--batch-tokens", self.batch_tokens, 1..=1 << 20, "[1, 1048576]")?;
        Ok(TextRewardOptions {
            dtype: self.dtype.dtype(),
            max_tokens: self.max_tokens,
            batch_tokens: self.batch_tokens,
        })
    }

    fn open(&self) -> anyhow::Result<TextRewardParts> {
        let template = self.template.as_deref().map(RewardTemplate::named);
        let template = template.transpose().context("--template")?;
        Ok(TextRewardParts::open(&model_folder(&self.model)?, template)?)
    }

    fn backend(&self, parts: &TextRewardParts, long_running: bool) -> anyhow::Result<ModelBackend> {
        let args = ModelArgs {
            model: Some(self.model.clone()),
            dtype: self.dtype,
            device: self.device,
            // a text's score is that of the text alone
            batch_invariant: true,
            // passes seldom have the same shape twice
            no_cuda_graphs: true,
            persistent: PersistentChoice::Never,
            compute: self.compute.clone(),
            long_running,
        };
        args.backend(&parts.checkpoint, self.dtype.dtype())
    }

    /// Files that are read for it.
    fn files(&self) -> Vec<PathBuf> {
        let template = self.template.iter().filter(|t| Path::new(t).is_file()).map(PathBuf::from);
        template.chain([self.model.clone()]).collect()
    }
}

impl ScoreTextArgs {
    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.max_prompt_bytes > 0, "--max-prompt-bytes must be at least 1");
        if self.source() == PromptSource::Stdin && std::io::stdin().is_terminal() {
            bail!(
                "nothing to score: give a TEXT, --input FILES, or texts on standard input; see \
                --help"
            );
        }
        if !self.score()? {
            std::process::exit(130);
        }
        Ok(())
    }

    fn source(&self) -> PromptSource<'_> {
        self.files.source(&self.texts)
    }

    fn format(&self) -> ScoreFormat {
        let default = if self.files.writes_text() {
            ScoreFormat::Text
        } else if self.files.input.is_empty() && is_stdout(&self.files.output) {
            ScoreFormat::Scores
        } else {
            ScoreFormat::Jsonl
        };
        self.format.unwrap_or(default)
    }

    /// Scores texts; `false` if somebody interrupted.
    fn score(&self) -> anyhow::Result<bool> {
        let options = self.model.options()?;
        // a line may be a rewrite of several candidates
        let longest = self.max_prompt_bytes.saturating_mul(16).saturating_add(BESIDE_PROMPT);
        let lines = self.files.line_options(longest, self.format() != ScoreFormat::Jsonl);
        let mut begun = Begun::open(&self.files, self.source(), lines, &self.model.files())?;
        let parts = self.model.open()?;
        ensure!(
            !(matches!(self.source(), PromptSource::Prompts(_))
                && parts.template.reads_raw_prompt()),
            "{}: its template reads the plain prompt before the text; give JSON lines with \
            \"prompt\" and \"raw_prompt\" by --input, or another --template",
            self.model.model.display()
        );
        begun.settle(self.settings(&parts))?;
        let long_running = !matches!(self.source(), PromptSource::Prompts(_));
        match self.model.backend(&parts, long_running)? {
            ModelBackend::Cpu(cpu) => {
                self.score_on(TextRewardModel::load(&cpu, parts, options)?, begun)
            }
            ModelBackend::Cuda(cuda) => {
                self.score_on(TextRewardModel::load(&*cuda, parts, options)?, begun)
            }
        }
    }

    /// What the scores depend on, under the names of the flags.
    fn settings(&self, parts: &TextRewardParts) -> Settings {
        let values = [
            ("model", json!(fingerprint(&parts.checkpoint))),
            ("dtype", json!(format!("{:?}", self.model.dtype).to_lowercase())),
            ("template", json!(parts.template.text())),
            ("max-tokens", json!(self.model.max_tokens)),
            ("format", json!(format!("{:?}", self.format()).to_lowercase())),
            ("shard", json!(self.files.shard.unwrap_or_default().to_string())),
        ];
        let mut settings = Settings::default();
        settings.0.extend(values.map(|(flag, value)| (flag.to_owned(), value)));
        settings
    }

    fn score_on<B: DecodeBackend>(
        &self,
        model: TextRewardModel<B>,
        mut begun: Begun,
    ) -> anyhow::Result<bool> {
        let written = begun.written(1)?;
        let Begun { target, mut lines, begin, .. } = begun;
        let total = lines.count()?;
        if self.format() != ScoreFormat::Jsonl {
            lines.skip(written.results)?;
        } else if written.results > 0 {
            let (number, last) = written.last_record(target.name())?;
            let raw = lines.skip_to(number)?;
            let record = raw.and_then(|raw| TextRecord::parse(&raw, self.max_prompt_bytes).ok());
            ensure!(
                record.is_some_and(|record| record.is_scored_by(&last)),
                "{}: its last result is that of another record than the input's line {number}; is \
                it the same input?",
                target.name()
            );
        }
        let stop = interrupt_flag()?;
        let mut progress = Progress::new(written.results, total, "lines");
        let mut run = Run {
            model,
            format: self.format(),
            longest: self.max_prompt_bytes,
            batch_tokens: self.model.batch_tokens,
            gathered: vec![],
            ids: vec![],
            gathered_tokens: 0,
            out: Output::new(target),
            bad: BadLines::new(self.files.skip_bad_lines),
            tokens: 0,
            cut: 0,
        };
        let result = run.all(lines.read_ahead()?, &stop, &mut progress);
        let done = write_finished(result, &mut run.out, begin, &progress)?;
        run.report();
        progress.summary(run.out.written);
        if !done {
            note_interrupted();
            return Ok(false);
        }
        self.check_not_empty(&run.out, &run.bad, written.results)?;
        complete(run.out, &run.bad, begin)?;
        Ok(true)
    }

    /// Refuses an input without texts, but for a part of one.
    fn check_not_empty(&self, out: &Output, bad: &BadLines, before: u64) -> anyhow::Result<()> {
        let empty = out.finished == 0 && bad.lines.is_empty() && before == 0;
        ensure!(
            !empty || self.files.shard.is_some(),
            "{} no texts",
            match self.source() {
                PromptSource::Files(files) => format!("--input {}: holds", files.join(" ")),
                _ => "standard input holds".to_owned(),
            }
        );
        Ok(())
    }
}

/// A line whose texts are encoded.
struct Job {
    number: u64,
    place: String,
    record: TextRecord,
}

struct Run<'m, B: DecodeBackend> {
    model: TextRewardModel<'m, B>,
    format: ScoreFormat,
    /// Maximum bytes of a text.
    longest: usize,
    /// Maximum tokens of a pass.
    batch_tokens: usize,
    /// Lines of the next pass, the tokens of their texts, and the positions that these take.
    gathered: Vec<Job>,
    ids: Vec<Vec<u32>>,
    gathered_tokens: usize,
    out: Output,
    bad: BadLines,
    /// Tokens that were scored.
    tokens: u64,
    /// Texts whose beginnings were cut.
    cut: u64,
}

impl<B: DecodeBackend> Run<'_, B> {
    /// Scores everything; `false` if somebody interrupted. What is scored is written whatever
    /// happens.
    fn all(
        &mut self,
        input: Input,
        stop: &AtomicBool,
        progress: &mut Progress,
    ) -> anyhow::Result<bool> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            // a pass that is not full waits a moment for more, as long as they come
            let patience = if self.gathered.is_empty() { 100 } else { 5 };
            match input.recv_timeout(Duration::from_millis(patience)) {
                Ok(Ok(raw)) => self.take(raw)?,
                Ok(Err(e)) => {
                    // a file that cannot be read on: what was read of it is still scored
                    self.score()?;
                    return Err(e);
                }
                Err(RecvTimeoutError::Timeout) => self.score()?,
                Err(RecvTimeoutError::Disconnected) => {
                    self.score()?;
                    return self.bad.failure.take().map_or(Ok(true), |(_, e)| Err(e));
                }
            }
            if self.bad.failure.is_some() {
                self.score()?;
                return self.bad.failure.take().map_or(Ok(true), |(_, e)| Err(e));
            }
            progress.update(self.out.finished, self.tokens);
        }
    }

    /// Adds a line to the next pass, and makes that pass first if there is no room for it.
    fn take(&mut self, raw: RawLine) -> anyhow::Result<()> {
        self.out.expect(raw.number);
        match guarded(|| self.encode(&raw)) {
            Ok((record, ids)) => {
                // a text takes whole blocks of the KV cache
                let tokens: usize = ids.iter().map(|ids| ids.len().next_multiple_of(BLOCK)).sum();
                if self.gathered_tokens + tokens > self.batch_tokens {
                    self.score()?;
                }
                self.gathered_tokens += tokens;
                self.ids.extend(ids);
                self.gathered.push(Job { number: raw.number, place: raw.place, record });
            }
            Err(e) => self.bad_line(&raw.place, raw.number, e),
        }
        if self.out.pending() >= PENDING {
            self.score()?;
        }
        Ok(())
    }

    fn encode(&mut self, raw: &RawLine) -> anyhow::Result<(TextRecord, Vec<Vec<u32>>)> {
        let record = TextRecord::parse(raw, self.longest)?;
        let texts = record.texts.all();
        ensure!(
            self.format == ScoreFormat::Jsonl || texts.len() == 1,
            "has {} candidates, but text has one line for each input line; write JSON lines \
            instead (--format jsonl)",
            texts.len()
        );
        if self.model.reads_raw_prompt() && record.raw_prompt.is_none() {
            match record.texts {
                Texts::Line(_) => bail!(
                    "is a text alone, but the template reads the plain prompt before it; give \
                    JSON lines with \"prompt\" and \"raw_prompt\", or another --template"
                ),
                _ => bail!("has no \"raw_prompt\", which the template reads before the text"),
            }
        }
        let raw_prompt = record.raw_prompt.as_deref().unwrap_or_default();
        let encode = |text: &String| self.model.encode(ScoredText { raw_prompt, output: text });
        let tokens = texts.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        self.cut += tokens.iter().filter(|t| t.cut).count() as u64;
        Ok((record, tokens.into_iter().map(|t| t.ids).collect()))
    }

    /// Scores what is gathered, and writes it.
    fn score(&mut self) -> anyhow::Result<()> {
        let (jobs, ids) = (std::mem::take(&mut self.gathered), std::mem::take(&mut self.ids));
        self.gathered_tokens = 0;
        if let Some(first) = jobs.first() {
            let scored = guarded(|| Ok(self.model.score_ids(&ids)?));
            let scores = scored.with_context(|| format!("{}, or a line behind it", first.place))?;
            self.tokens += ids.iter().map(|ids| ids.len() as u64).sum::<u64>();
            let mut rest = &scores[..];
            for job in &jobs {
                let (own, others) = rest.split_at(job.record.texts.all().len());
                rest = others;
                match self.render(job, own) {
                    Ok(line) => self.out.finish(job.number, line),
                    Err(e) => self.bad_line(&job.place, job.number, e),
                }
            }
        }
        self.out.write_ready()
    }

    fn render(&self, job: &Job, scores: &[f32]) -> anyhow::Result<String> {
        if let Some(odd) = scores.iter().find(|s| !s.is_finite()) {
            bail!("has the score {odd}; expected a number");
        }
        match self.format {
            ScoreFormat::Jsonl => job.record.render(job.number, scores),
            ScoreFormat::Text => {
                Ok(format!("{}\t{}\n", scores[0], one_line(&job.record.texts.all()[0])))
            }
            ScoreFormat::Scores => Ok(format!("{}\n", scores[0])),
        }
    }

    /// Counts a line without a score, or has it end the run.
    fn bad_line(&mut self, place: &str, number: u64, e: anyhow::Error) {
        if self.bad.skips(place, number, e) {
            // in text an empty line, which keeps the count
            let blank = if self.format == ScoreFormat::Jsonl { "" } else { "\n" };
            self.out.finish(number, blank.to_owned());
        }
    }

    /// Says what was left out.
    fn report(&mut self) {
        self.bad.report();
        if self.cut > 0 {
            note!(
                "cut the beginnings of {} texts that have more than {} tokens (--max-tokens)",
                self.cut,
                self.model.max_tokens()
            );
        }
    }
}
