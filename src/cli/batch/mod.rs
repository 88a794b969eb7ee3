//! Files of prompts: read ahead, rewritten in ragged batches, written in input order as they
//! finish.
//!
//! Each output line names its input line, results are only ever appended whole, and `--resume` cuts
//! off what a killed run left unfinished: nothing is lost or written twice.

mod args;
mod bad_lines;
mod begin;
mod flight;
pub mod input;
mod openai;
mod output;
mod progress;
mod record;
mod settings;
mod target;

pub use args::{BatchArgs, FileArgs, PromptSource};
pub use bad_lines::{BadLines, guarded};
pub use begin::{Begun, complete, note_interrupted, write_finished};
pub use output::Output;
pub use progress::Progress;
pub use record::{check_length, check_lengths, line_text, object};
pub use settings::Settings;

use super::print::note;
use super::rewriter::{Format, Rewriter, one_line, record};
use crate::engine::EngineOptions;
use crate::generate::{Generate, Length};
use crate::rewrite::{DEFAULT_MIN_KEPT, Prompter, Rewrite, Rewriting, Source};
use anyhow::{Context, ensure};
use flight::{Flight, Job};
use input::{Lines, RawLine};
use output::Written;
use record::{Common, Line};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;
use target::Target;

/// Results that may wait for an earlier one: they take memory.
pub const PENDING: usize = 4096;

/// Bytes that a line of JSON may have besides its prompt.
pub const BESIDE_PROMPT: usize = 1 << 20;

pub fn run(args: &BatchArgs) -> anyhow::Result<()> {
    if !rewrite(args)? {
        std::process::exit(130);
    }
    Ok(())
}

/// Opens the input and the output of a run.
fn begin(args: &BatchArgs) -> anyhow::Result<Begun> {
    let format = args.format;
    let prompts = if format == Format::Openai { 16 } else { 1 };
    let longest = args.max_prompt_bytes.saturating_mul(prompts).saturating_add(BESIDE_PROMPT);
    let options = args.files.line_options(longest, format == Format::Text);
    Begun::open(args.files, args.source, options, &args.rewriter.files())
}

/// Rewrites files; `false` if somebody interrupted.
fn rewrite(args: &BatchArgs) -> anyhow::Result<bool> {
    let format = args.format;
    let mut begun = begin(args)?;
    if format == Format::Openai {
        return openai::run(args, begun);
    }
    let mut rewriter = args.rewriter.load(true)?;
    if let (None, Some(seed)) =
        (args.rewriter.sampling.seed, begun.earlier.as_ref().and_then(|e| e.get("seed").as_u64()))
    {
        rewriter.options.sampling.seed = seed;
    }
    begun.settle(settings(args, &rewriter)?)?;
    let each = if format == Format::Text { rewriter.options.candidates as u64 } else { 1 };
    let written = begun.written(each)?;
    let Begun { target, mut lines, begin, .. } = begun;
    let total = lines.count()?;
    if format == Format::Text {
        lines.skip(written.results)?;
    } else if written.results > 0 {
        skip_written(&mut lines, &common(args, &rewriter), &written, target.name())?;
    }
    let stop = super::interrupt_flag()?;
    let mut progress = Progress::new(written.results, total, "prompts");
    let session = rewriter.session(engine_options(args, &rewriter)?)?;
    let mut run = Run::new(args, &rewriter, target);
    let result = run.all(lines.read_ahead()?, session, &stop, &mut progress);
    let done = write_finished(result, &mut run.out, begin, &progress)?;
    run.report();
    progress.summary(run.out.written);
    if !done {
        note_interrupted();
        return Ok(false);
    }
    ensure!(
        args.source != PromptSource::Stdin
            || run.out.finished > 0
            || !run.bad.lines.is_empty()
            || written.results > 0,
        "standard input holds no prompts; give a PROMPT, --input FILES, or prompts on standard \
        input"
    );
    complete(run.out, &run.bad, begin)?;
    Ok(true)
}

/// What the results depend on, under the names of the flags.
fn settings(args: &BatchArgs, rewriter: &Rewriter) -> anyhow::Result<Settings> {
    let Rewriter { loaded, template, options, guard } = rewriter;
    let values = json!({
        "model": loaded.fingerprint,
        "dtype": format!("{:?}", args.rewriter.model.dtype).to_lowercase(),
        "template": template.text(),
        "format": format!("{:?}", args.format).to_lowercase(),
        "shard": args.files.shard.unwrap_or_default().to_string(),
        "candidates": options.candidates,
        "seed": options.sampling.seed,
        "logit-bias": options.bias,
        "stop": options.stops,
        "ignore-eos": options.ignore_eos,
        "keep": options.keep.iter().collect::<Vec<_>>(),
        "ban": args.rewriter.guard.banned()?,
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

/// What holds for all lines.
fn common<'a>(args: &BatchArgs, rewriter: &'a Rewriter) -> Common<'a> {
    Common {
        options: &rewriter.options,
        guard: &rewriter.guard,
        longest: args.max_prompt_bytes,
        same_candidates: args.format == Format::Text,
        alone: matches!(args.source, PromptSource::Prompts([_])),
    }
}

/// Goes to the line behind the last one that was written, and checks that it is the line that was
/// rewritten then.
fn skip_written(
    lines: &mut Lines,
    common: &Common,
    written: &Written,
    output: &str,
) -> anyhow::Result<()> {
    let (number, last) = written.last_record(output)?;
    let line = lines.skip_to(number)?;
    let prompt = line.and_then(|raw| common.parse(raw).ok()).map(|l| l.prompt);
    ensure!(
        prompt.as_deref() == last["prompt"].as_str(),
        "{output}: its last result is that of another prompt than the input's line {number}; is it \
        the same input?"
    );
    Ok(())
}

/// Room for all running sequences, and for at least one of any length.
fn engine_options(args: &BatchArgs, rewriter: &Rewriter) -> anyhow::Result<EngineOptions> {
    let longest = rewriter.loaded.config.context;
    let room = match rewriter.options.length {
        Length::New(n) => n.saturating_add(128),
        Length::Total(n) => n,
    };
    let engine = args.rewriter.engine.options()?;
    let needed = engine.sequences.saturating_mul(room.min(longest)).max(longest);
    Ok(EngineOptions {
        cache_tokens: args.rewriter.engine.cache_tokens.unwrap_or(needed),
        ..engine
    })
}

struct Run<'a> {
    common: Common<'a>,
    prompter: Prompter,
    format: Format,
    /// Sequences that the engine runs at once.
    sequences: usize,
    out: Output,
    bad: BadLines,
    /// Candidates, the sum of what they keep, those that keep little, and those whose text is not
    /// the model's.
    candidates: u64,
    kept: f64,
    low: u64,
    fallbacks: u64,
}

/// Lines as they are read.
pub type Input = Receiver<anyhow::Result<RawLine>>;

impl<'a> Run<'a> {
    fn new(args: &BatchArgs, rewriter: &'a Rewriter, target: Target) -> Run<'a> {
        Run {
            common: common(args, rewriter),
            prompter: rewriter.prompter(),
            format: args.format,
            sequences: args.rewriter.engine.sequences,
            out: Output::new(target),
            bad: BadLines::new(args.files.skip_bad_lines),
            candidates: 0,
            kept: 0.0,
            low: 0,
            fallbacks: 0,
        }
    }

    /// Rewrites everything; `false` if somebody interrupted. What is finished is written whatever
    /// happens, and what must be finished before it can be written, too.
    fn all(
        &mut self,
        input: Input,
        session: Box<dyn Generate + '_>,
        stop: &AtomicBool,
        progress: &mut Progress,
    ) -> anyhow::Result<bool> {
        let mut flight = Flight::new(session, self.sequences);
        let mut end = false;
        let mut interrupted = false;
        loop {
            if stop.load(Ordering::Relaxed) && !interrupted {
                interrupted = true;
                let wanted = self.out.last_ready().unwrap_or(0);
                flight.cancel_from(wanted + 1);
                if !flight.jobs.is_empty() {
                    progress.clear();
                    note!(
                        "finishing {} prompts that finished ones wait for; Ctrl-C ends at once",
                        flight.jobs.len()
                    );
                }
            }
            if !end && !interrupted && self.bad.failure.is_none() {
                self.read(&input, &mut flight, &mut end)?;
            }
            if let Some((line, _)) = self.bad.failure {
                flight.cancel_from(line);
            }
            self.out.write_ready()?;
            if flight.session.is_idle() {
                if let Some((_, e)) = self.bad.failure.take() {
                    return Err(e);
                }
                if interrupted || end {
                    return Ok(!interrupted);
                }
                continue;
            }
            match flight.step() {
                Ok(jobs) => jobs.into_iter().for_each(|(job, failed)| match failed {
                    None => self.go_on(&mut flight, job),
                    Some(e) => self.bad_line(&job.line.place, job.line.number, e),
                }),
                Err(e) => self.one_by_one(&mut flight, stop, e)?,
            }
            self.out.write_ready()?;
            progress.update(self.out.finished, flight.tokens());
        }
    }

    /// Reads lines until the engine has enough to do; waits for one only if it has nothing.
    fn read(&mut self, input: &Input, flight: &mut Flight, end: &mut bool) -> anyhow::Result<()> {
        while self.bad.failure.is_none() && flight.has_room() && self.out.pending() < PENDING {
            let line = if flight.session.is_idle() {
                input.recv_timeout(Duration::from_millis(100))
            } else {
                input.try_recv().map_err(|e| match e {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            };
            let line = match line {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    *end = true;
                    break;
                }
            };
            let raw = match line {
                Ok(raw) => raw,
                Err(e) => {
                    // a file that cannot be read on: what was read of it is still finished
                    self.bad.failure = Some((u64::MAX, e));
                    return Ok(());
                }
            };
            let (number, place) = (raw.number, raw.place.clone());
            self.out.expect(number);
            match guarded(|| self.job(raw)) {
                Ok(job) => self.go_on(flight, job),
                Err(e) => self.bad_line(&place, number, e),
            }
            self.out.write_ready()?;
        }
        Ok(())
    }

    fn job(&self, raw: RawLine) -> anyhow::Result<Job> {
        let line = self.common.parse(raw)?;
        let (options, guard) = (line.options.clone(), line.guard.clone());
        let rewriting = Rewriting::new(self.prompter.clone(), &line.prompt, options, guard)?;
        Ok(Job::new(line, rewriting))
    }

    /// Hands in a job's next round, or takes its result.
    fn go_on(&mut self, flight: &mut Flight, mut job: Job) {
        let handed_in = guarded(|| Ok(job.advance()? && flight.hand_in(&mut job)?));
        match handed_in {
            Ok(true) => drop(flight.jobs.insert(job.line.number, job)),
            Ok(false) => self.finish(job),
            Err(e) => self.bad_line(&job.line.place, job.line.number, e),
        }
    }

    /// After the engine failed: what was in flight, each line alone in an empty engine. The line
    /// that it fails at again is bad, and the others get what they would have got.
    fn one_by_one(
        &mut self,
        flight: &mut Flight,
        stop: &AtomicBool,
        cause: anyhow::Error,
    ) -> anyhow::Result<()> {
        /// Lines in a row that cannot all be at fault.
        const HOPELESS: usize = 3;
        let mut jobs = flight.empty().with_context(|| format!("after {cause:#}"))?;
        let mut failures = 0;
        while let Some((_, mut job)) = jobs.pop_first() {
            if self.bad.failure.as_ref().is_some_and(|(line, _)| *line < job.line.number)
                || stop.load(Ordering::Relaxed)
            {
                break;
            }
            match guarded(|| flight.alone(&mut job)) {
                Ok(()) => {
                    failures = 0;
                    self.finish(job);
                }
                Err(e) => {
                    failures += 1;
                    ensure!(
                        failures < HOPELESS,
                        "{}: {e:#}, as at the lines before",
                        job.line.place
                    );
                    self.bad_line(&job.line.place, job.line.number, e);
                    flight.empty()?;
                }
            }
            self.out.write_ready()?;
        }
        Ok(())
    }

    /// Counts a line that cannot be rewritten, or has it end the run.
    fn bad_line(&mut self, place: &str, number: u64, e: anyhow::Error) {
        if !self.bad.skips(place, number, e) {
            return;
        }
        // in text as many empty lines as keep the count
        let blank = match self.format {
            Format::Text => "\n".repeat(self.common.options.candidates as usize),
            _ => String::new(),
        };
        self.out.finish(number, blank);
    }

    fn finish(&mut self, job: Job) {
        let Job { line, rewriting, .. } = job;
        let finished = guarded(|| {
            let rewrite = rewriting.finish();
            Ok((self.render(&line, &rewrite), rewrite))
        });
        match finished {
            Ok((text, rewrite)) => {
                let least = line.guard.min_kept.unwrap_or(DEFAULT_MIN_KEPT);
                self.candidates += rewrite.candidates.len() as u64;
                self.kept += rewrite.candidates.iter().map(|c| c.kept).sum::<f64>();
                self.low += rewrite.candidates.iter().filter(|c| c.kept < least).count() as u64;
                self.fallbacks +=
                    rewrite.candidates.iter().filter(|c| c.source != Source::Model).count() as u64;
                self.out.finish(line.number, text);
            }
            Err(e) => self.bad_line(&line.place, line.number, e),
        }
    }

    fn render(&self, line: &Line, rewrite: &Rewrite) -> String {
        if self.format == Format::Text {
            return rewrite.candidates.iter().map(|c| one_line(&c.text) + "\n").collect();
        }
        let mut object = record(line.id.clone(), &line.prompt, rewrite);
        object["line"] = json!(line.number);
        format!("{object}\n")
    }

    /// Says what was left out, and what does not keep its prompt.
    fn report(&mut self) {
        self.bad.report();
        if self.low + self.fallbacks > 0 {
            let kept = 100.0 * self.kept / self.candidates as f64;
            note!(
                "kept {kept:.1} % of the prompts' meaning; of {} candidates {} fell back on their \
                prompts, {} keep too little",
                self.candidates,
                self.fallbacks,
                self.low
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::rewriter::RewriterArgs;
    use crate::engine::Counters;
    use crate::error::Result;
    use crate::generate::{GenerateOptions, PromptResult, Update};
    use clap::Parser;
    use input::{LineOptions, Shard};
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicUsize;
    use target::Begin;

    /// Token ids by request.
    type Prompts = BTreeMap<u64, Vec<u32>>;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        files: FileArgs,
        #[command(flatten)]
        rewriter: RewriterArgs,
    }

    /// A session that somebody watches: what is in flight before a step, and how many prompts are
    /// done after it.
    struct Watched<'a> {
        inner: Box<dyn Generate + 'a>,
        prompts: Prompts,
        before: &'a dyn Fn(&Prompts),
        after: &'a dyn Fn(usize),
    }

    impl Generate for Watched<'_> {
        fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()> {
            self.prompts.insert(id, prompt.clone());
            self.inner.submit(id, prompt, options)
        }

        fn reset(&mut self) {
            self.prompts.clear();
            self.inner.reset();
        }

        fn cancel(&mut self, ids: &[u64]) {
            self.prompts.retain(|id, _| !ids.contains(id));
            self.inner.cancel(ids);
        }

        fn step(&mut self, on_update: &mut dyn FnMut(Update)) -> Result<Vec<PromptResult>> {
            (self.before)(&self.prompts);
            let outcomes = self.inner.step(on_update)?;
            for completed in outcomes.iter().flatten() {
                self.prompts.remove(&completed.id);
            }
            (self.after)(outcomes.len());
            Ok(outcomes)
        }

        fn is_idle(&self) -> bool {
            self.inner.is_idle()
        }

        fn in_flight(&self) -> usize {
            self.inner.in_flight()
        }

        fn running(&self) -> usize {
            self.inner.running()
        }

        fn waiting(&self) -> usize {
            self.inner.waiting()
        }

        fn blocks(&self) -> (usize, usize) {
            self.inner.blocks()
        }

        fn counters(&self) -> Counters {
            self.inner.counters()
        }

        fn generated_tokens(&self) -> u64 {
            self.inner.generated_tokens()
        }
    }

    const LINES: usize = 12;

    /// Rewrites twelve lines; what came of it, the bad lines, and the output.
    fn watched(
        skip_bad_lines: bool,
        stop: &AtomicBool,
        before: &dyn Fn(&Rewriter, &Prompts),
        after: &dyn Fn(usize),
    ) -> (anyhow::Result<bool>, Vec<u64>, String) {
        let flags = [
            "rewrite",
            "--seed",
            "3",
            "--max-tokens",
            "12",
            "--threads",
            "1",
            "--sequences",
            "4",
            "--min-kept",
            "0",
        ];
        let mut program = Program::try_parse_from(flags).unwrap_or_else(|e| panic!("{e}"));
        program.files.skip_bad_lines = skip_bad_lines;
        let prompts: Vec<String> = (1..=LINES).map(prompt).collect();
        let args = BatchArgs {
            files: &program.files,
            rewriter: &program.rewriter,
            source: PromptSource::Prompts(&prompts),
            format: Format::Jsonl,
            served_model_name: None,
            max_prompt_bytes: 1000,
        };
        let rewriter = args.rewriter.load(false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let options = LineOptions { shard: Shard::default(), longest: 1000, text: false };
        let lines = Lines::of_prompts(&prompts, options);
        let target = Target::open(&path, Begin::New).unwrap();
        let before = |prompts: &Prompts| before(&rewriter, prompts);
        let inner = rewriter.session(engine_options(&args, &rewriter).unwrap()).unwrap();
        let session = Box::new(Watched { inner, prompts: BTreeMap::new(), before: &before, after });
        let mut run = Run::new(&args, &rewriter, target);
        let result = run.all(
            lines.read_ahead().unwrap(),
            session,
            stop,
            &mut Progress::new(0, None, "prompts"),
        );
        (result, run.bad.lines, std::fs::read_to_string(&path).unwrap())
    }

    fn prompt(line: usize) -> String {
        format!("a fox number {line}")
    }

    fn whole() -> String {
        let (result, bad, text) = watched(false, &AtomicBool::new(false), &|_, _| {}, &|_| {});
        assert!(result.unwrap() && bad.is_empty() && text.lines().count() == LINES);
        text
    }

    #[test]
    fn a_line_that_the_engine_fails_at_is_one_bad_line() {
        let fails = |rewriter: &Rewriter, prompts: &Prompts| {
            let poison = rewriter.prompter().encode(&prompt(6)).unwrap();
            assert!(prompts.values().all(|p| *p != poison), "the engine fails at fox 6");
        };
        let whole = whole();
        let (result, bad, text) = watched(true, &AtomicBool::new(false), &fails, &|_| {});
        let others: String = whole
            .split_inclusive('\n')
            .enumerate()
            .filter(|(i, _)| *i != 5)
            .map(|(_, line)| line)
            .collect();
        assert!(result.unwrap() && bad == [6] && text == others, "{text}");
        let (result, _, text) = watched(false, &AtomicBool::new(false), &fails, &|_| {});
        let message = format!("{:#}", result.unwrap_err());
        assert!(
            message.contains("line 6") && message.contains("the engine fails at fox 6"),
            "{message}"
        );
        let before: String = whole.split_inclusive('\n').take(5).collect();
        assert_eq!(text, before, "what came before it is written, and nothing behind it");
    }

    #[test]
    fn an_interrupted_run_writes_what_is_finished() {
        let whole = whole();
        for when in [1, 4, 7] {
            let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
            let after = |n| {
                let done = done.fetch_add(n, Ordering::Relaxed) + n;
                stop.store(done >= when, Ordering::Relaxed);
            };
            let (result, _, text) = watched(false, &stop, &|_, _| {}, &after);
            assert!(!result.unwrap());
            let lines = text.lines().count();
            assert!(lines >= when && whole.starts_with(&text), "after {when}: {lines} lines");
        }
    }
}
