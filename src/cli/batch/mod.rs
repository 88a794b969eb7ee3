//! Files of prompts: read ahead, rewritten in ragged batches, written in input order as they finish.
//!
//! Each output line names its input line, lines are only ever appended whole, and `--resume` cuts off
//! what a killed run left unfinished: nothing is lost or written twice.

mod input;
mod openai;
mod output;

pub use input::Shard;

use super::print::note;
use super::rewrite::{Format, RewriteArgs, Rewriter, one_line, record};
use crate::engine::EngineOptions;
use crate::engine::session::{Completed, Generate, GenerateOptions, Length};
use crate::rewrite::{Rewrite, Rewriting, Source};
use anyhow::{Context, bail, ensure};
use input::{Lines, RawLine};
use output::{Output, Report, Written};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// Prompts read ahead and sorted by length together.
const WINDOW: usize = 1024;

/// A line of the input that holds a prompt.
struct Line {
    number: u64,
    place: String,
    id: Value,
    prompt: String,
    seed: u64,
}

/// A line on its way.
struct Job {
    line: Line,
    rewriting: Rewriting,
    /// What came of the round's work, in its order.
    parts: Vec<Option<Completed>>,
}

pub fn run(args: &RewriteArgs) -> anyhow::Result<()> {
    let to_stdout = args.output.as_os_str() == "-";
    let by_name = match args.output.extension() {
        Some(e) if e == "txt" => Format::Text,
        _ => Format::Jsonl,
    };
    let format = args.format.unwrap_or(by_name);
    ensure!(!(args.resume && to_stdout), "--resume needs --output FILE");
    if !to_stdout && !args.resume && !args.force && args.output.exists() {
        bail!("{}: exists already; --resume goes on with it, --force replaces it", args.output.display());
    }
    let mut lines = Lines::open(&args.input, args.shard.unwrap_or_default())?;
    if format == Format::Openai {
        return openai::run(args, lines);
    }
    let mut rewriter = args.rewriter()?;
    let mut before = 0;
    if args.resume {
        let each = if format == Format::Text { rewriter.options.candidates as u64 } else { 1 };
        let written = Written::read(&args.output, each)?;
        before = written.results;
        if format == Format::Text {
            lines.skip(written.results)?;
        } else if let Some((line, seed)) = written.last_line(&args.output)? {
            lines.skip_to(line)?;
            if let (None, Some(seed)) = (args.sampling.seed, seed) {
                rewriter.options.sampling.seed = seed;
            }
        }
    }
    let out = Output::open(&args.output, args.resume)?;
    let stop = super::interrupt_flag()?;
    let report = Report::new(before);
    let mut run = Run { args, rewriter: &rewriter, format, lines, out, bad: vec![], kept: 0.0, fallbacks: 0 };
    let result = run.all(&stop, &report);
    run.out.write_ready()?;
    report.bar.finish_and_clear();
    let done = result?;
    if !run.bad.is_empty() {
        let shown: Vec<String> = run.bad.iter().take(10).map(u64::to_string).collect();
        let more = if run.bad.len() > 10 { ", …" } else { "" };
        note!("skipped {} bad lines: {}{more}", run.bad.len(), shown.join(", "));
    }
    if rewriter.guard.is_strict() && run.out.written > 0 {
        let candidates = run.out.written as f64 * rewriter.options.candidates as f64;
        let (kept, fallbacks) = (100.0 * run.kept / candidates, run.fallbacks);
        note!("kept {kept:.1} % of the prompts' meaning; {fallbacks} candidates fell back on their prompts");
    }
    report.summary(run.out.written);
    if !done {
        note!("interrupted; the same command with --resume goes on");
        std::process::exit(130);
    }
    Ok(())
}

/// What the engine works on.
struct Flight<'a> {
    session: Box<dyn Generate + 'a>,
    /// The session's prompts: line and part.
    prompts: HashMap<u64, (u64, usize)>,
    next: u64,
}

impl Flight<'_> {
    /// Hands in a job's next round; `false` if there is none.
    fn hand_in(&mut self, job: &mut Job) -> crate::error::Result<bool> {
        let work = job.rewriting.work()?;
        job.parts = vec![None; work.len()];
        let first = self.next;
        for (part, (ids, options)) in work.into_iter().enumerate() {
            if let Err(e) = self.session.submit(self.next, ids, &options) {
                for id in first..self.next {
                    self.session.cancel(id);
                    self.prompts.remove(&id);
                }
                return Err(e);
            }
            self.prompts.insert(self.next, (job.line.number, part));
            self.next += 1;
        }
        Ok(!job.parts.is_empty())
    }
}

struct Run<'a> {
    args: &'a RewriteArgs,
    rewriter: &'a Rewriter,
    format: Format,
    lines: Lines,
    out: Output,
    /// Lines that cannot be read.
    bad: Vec<u64>,
    /// Sum over candidates, and those whose text is not the model's.
    kept: f64,
    fallbacks: u64,
}

impl Run<'_> {
    /// Rewrites everything; `false` if somebody interrupted.
    fn all(&mut self, stop: &AtomicBool, report: &Report) -> anyhow::Result<bool> {
        let session = self.rewriter.session(self.engine_options()?)?;
        let mut flight = Flight { session, prompts: HashMap::new(), next: 0 };
        let mut jobs: HashMap<u64, Job> = HashMap::new();
        let mut end = false;
        loop {
            // results that wait for an earlier one take memory too
            if !end && flight.session.waiting() < WINDOW / 4 && self.out.pending() < 4 * WINDOW {
                for mut job in self.window(&mut end)? {
                    match flight.hand_in(&mut job) {
                        Ok(true) => drop(jobs.insert(job.line.number, job)),
                        Ok(false) => self.finish(job),
                        Err(e) => {
                            self.out.write_ready()?;
                            self.bad_line(&job.line.place, job.line.number, e.into())?;
                        }
                    }
                }
            }
            if stop.load(Ordering::Relaxed) {
                self.out.write_ready()?;
                return Ok(false);
            }
            if flight.session.is_idle() && end {
                self.out.write_ready()?;
                return Ok(true);
            }
            for outcome in flight.session.step(&mut |_| {})? {
                let completed = outcome?;
                let (number, part) = flight.prompts.remove(&completed.id).expect("handed in above");
                let job = jobs.get_mut(&number).expect("its parts are in flight");
                job.parts[part] = Some(completed);
                if job.parts.iter().any(Option::is_none) {
                    continue;
                }
                let parts: Vec<Completed> = std::mem::take(&mut job.parts).into_iter().flatten().collect();
                job.rewriting.take(&parts);
                if !flight.hand_in(job)? {
                    let job = jobs.remove(&number).expect("looked at above");
                    self.finish(job);
                }
            }
            self.out.write_ready()?;
            report.update(self.out.written, flight.session.generated_tokens());
        }
    }

    /// Room for all running sequences, and for at least one of any length.
    fn engine_options(&self) -> anyhow::Result<EngineOptions> {
        let longest = self.rewriter.loaded.config.context;
        let room = match self.rewriter.options.length {
            Length::New(n) => n + 128,
            Length::Total(n) => n,
        };
        let engine = self.args.engine.options()?;
        let needed = (engine.sequences * room.min(longest)).max(longest);
        Ok(EngineOptions { cache_tokens: self.args.engine.cache_tokens.unwrap_or(needed), ..engine })
    }

    /// The next lines, those of like length together.
    fn window(&mut self, end: &mut bool) -> anyhow::Result<Vec<Job>> {
        let mut window: Vec<Job> = Vec::new();
        while window.len() < WINDOW {
            let Some(raw) = self.lines.next()? else {
                *end = true;
                break;
            };
            let (number, place) = (raw.number, raw.place.clone());
            self.out.expect(number);
            match self.job(raw) {
                Ok(job) => window.push(job),
                Err(e) => self.bad_line(&place, number, e)?,
            }
        }
        window.sort_by_key(|j| (j.line.prompt.len(), j.line.number));
        Ok(window)
    }

    fn job(&self, raw: RawLine) -> anyhow::Result<Job> {
        let line = self.parse(raw)?;
        let mut options: GenerateOptions = self.rewriter.options.clone();
        options.sampling.seed = line.seed;
        let rewriting = Rewriting::new(self.rewriter.prompter(), &line.prompt, options, self.rewriter.guard.clone())?;
        Ok(Job { line, rewriting, parts: vec![] })
    }

    fn parse(&self, raw: RawLine) -> anyhow::Result<Line> {
        let text = std::str::from_utf8(&raw.bytes).context("is not UTF-8")?.trim_start_matches('\u{feff}');
        let default_id = json!(raw.number - 1);
        let mut seed = self.rewriter.options.sampling.seed;
        let (id, prompt) = if text.trim_start().starts_with('{') {
            let value: Value = serde_json::from_str(text).context("is not JSON")?;
            let prompt = ["prompt", "raw_prompt"].iter().find_map(|k| value.get(*k)?.as_str());
            let prompt = prompt.context("has no text under \"prompt\"")?.to_owned();
            if let Some(own) = value.get("seed") {
                seed = own.as_u64().with_context(|| format!("has the seed {own}, expected a whole number"))?;
            }
            (value.get("id").cloned().unwrap_or(default_id), prompt)
        } else {
            (default_id, text.to_owned())
        };
        Ok(Line { number: raw.number, place: raw.place, id, prompt, seed })
    }

    /// Counts a line that cannot be rewritten, or ends the run.
    fn bad_line(&mut self, place: &str, number: u64, e: anyhow::Error) -> anyhow::Result<()> {
        if !self.args.skip_bad_lines {
            bail!("{place}: {e:#}; --skip-bad-lines goes on");
        }
        self.bad.push(number);
        // in text as many empty lines as keep the count
        let blank = match self.format {
            Format::Text => "\n".repeat(self.rewriter.options.candidates as usize),
            _ => String::new(),
        };
        self.out.finish(number, blank);
        Ok(())
    }

    fn finish(&mut self, job: Job) {
        let line = job.line;
        let rewrite = job.rewriting.finish();
        self.kept += rewrite.candidates.iter().map(|c| c.kept).sum::<f64>();
        self.fallbacks += rewrite.candidates.iter().filter(|c| c.source != Source::Model).count() as u64;
        self.out.finish(line.number, self.render(&line, &rewrite));
    }

    fn render(&self, line: &Line, rewrite: &Rewrite) -> String {
        if self.format == Format::Text {
            return rewrite.candidates.iter().map(|c| one_line(&c.text) + "\n").collect();
        }
        let mut object = record(line.id.clone(), &line.prompt, rewrite);
        object["line"] = json!(line.number);
        format!("{object}\n")
    }
}
