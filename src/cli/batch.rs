//! Files of prompts: read ahead, rewritten in ragged batches, written in input order as they finish.
//!
//! Each output line names its input line, lines are only ever appended whole, and `--resume` cuts off
//! what a killed run left unfinished: nothing is lost or written twice.

use super::rewrite::{Format, RewriteArgs, Rewriter, one_line, record};
use crate::engine::EngineOptions;
use crate::engine::session::{Completed, GenerateOptions, Length};
use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Prompts read ahead and sorted by length together.
const WINDOW: usize = 1024;

/// A line of the input.
struct Line {
    /// From 1.
    number: u64,
    id: Value,
    prompt: String,
    ids: Vec<u32>,
    seed: u64,
}

/// Where an earlier run stopped.
#[derive(Default)]
struct Resume {
    /// Last input line whose result is written.
    line: u64,
    seed: Option<u64>,
}

pub fn run(args: &RewriteArgs, input: &Path) -> anyhow::Result<()> {
    let to_stdout = args.output.as_os_str() == "-";
    let format = args.format.unwrap_or(match args.output.extension() {
        Some(e) if e == "txt" => Format::Text,
        _ => Format::Jsonl,
    });
    ensure!(!(args.resume && to_stdout), "--resume needs --output FILE");
    if !to_stdout && !args.resume && !args.force && args.output.exists() {
        bail!("{}: exists already; --resume goes on with it, --force replaces it", args.output.display());
    }
    let reader: Box<dyn Read> = if input.as_os_str() == "-" {
        Box::new(std::io::stdin())
    } else {
        ensure!(!input.is_dir(), "{}: is a folder; expected a file of prompts", input.display());
        Box::new(File::open(input).with_context(|| format!("{}: cannot open", input.display()))?)
    };
    let mut rewriter = args.rewriter()?;
    let resume = match args.resume {
        true => resume(&args.output, format, rewriter.options.candidates)?,
        false => Resume::default(),
    };
    if let (None, Some(seed)) = (args.sampling.seed, resume.seed) {
        rewriter.options.sampling.seed = seed;
    }
    let out: Box<dyn Write> = if to_stdout {
        Box::new(std::io::stdout())
    } else {
        let file =
            OpenOptions::new().create(true).append(args.resume).write(true).truncate(!args.resume).open(&args.output);
        Box::new(file.with_context(|| format!("{}: cannot write", args.output.display()))?)
    };
    let stop = super::interrupt_flag()?;
    let mut lines = Lines {
        reader: BufReader::with_capacity(1 << 20, reader),
        name: if input.as_os_str() == "-" { "standard input".into() } else { input.display().to_string() },
        number: 0,
        skip_bad: args.skip_bad_lines,
        bad: Vec::new(),
        rewriter: &rewriter,
    };
    lines.skip(resume.line)?;
    let report = Report::new(resume.line);
    let mut run = Run {
        out: BufWriter::new(out),
        output_name: if to_stdout { "standard output".into() } else { args.output.display().to_string() },
        format,
        next: Vec::new(),
        finished: BTreeMap::new(),
        written: 0,
    };
    let result = run.all(args, &mut lines, &stop, &report);
    run.flush()?;
    report.bar.finish_and_clear();
    let done = result?;
    if !lines.bad.is_empty() {
        let shown: Vec<String> = lines.bad.iter().take(10).map(u64::to_string).collect();
        let more = if lines.bad.len() > 10 { ", …" } else { "" };
        eprintln!("skipped {} bad lines: {}{more}", lines.bad.len(), shown.join(", "));
    }
    report.summary(run.written);
    if !done {
        eprintln!("interrupted; the same command with --resume goes on");
        std::process::exit(130);
    }
    Ok(())
}

struct Run<'a> {
    out: BufWriter<Box<dyn Write + 'a>>,
    output_name: String,
    format: Format,
    /// Input lines submitted, in order, whose results are not written yet.
    next: Vec<u64>,
    finished: BTreeMap<u64, String>,
    written: u64,
}

impl Run<'_> {
    /// Rewrites everything; `false` if somebody interrupted.
    fn all(
        &mut self,
        args: &RewriteArgs,
        lines: &mut Lines,
        stop: &AtomicBool,
        report: &Report,
    ) -> anyhow::Result<bool> {
        let rewriter = lines.rewriter;
        let options = &rewriter.options;
        let longest = rewriter.loaded.config.context;
        let room = match options.length {
            Length::New(n) => n + 128,
            Length::Total(n) => n,
        };
        // what all running sequences may need, and at least one request of any length
        let n = options.candidates as usize;
        let engine = EngineOptions {
            cache_tokens: (args.sequences * room.min(longest)).max(n * longest),
            batch_tokens: args.batch_tokens,
            sequences: args.sequences,
            ..EngineOptions::default()
        };
        let mut session = rewriter.session(engine)?;
        let mut running: HashMap<u64, Line> = HashMap::new();
        let mut end = false;
        loop {
            if !end && session.waiting() < WINDOW / 4 {
                let mut window = Vec::new();
                while window.len() < WINDOW {
                    match lines.next()? {
                        Some(line) => window.push(line),
                        None => {
                            end = true;
                            break;
                        }
                    }
                }
                self.next.extend(window.iter().map(|l| l.number));
                window.sort_by_key(|l| (l.ids.len(), l.number));
                for line in window {
                    let mut sampling = options.sampling;
                    sampling.seed = line.seed;
                    let options = GenerateOptions { sampling, ..options.clone() };
                    match session.submit(line.number, line.ids.clone(), &options) {
                        Ok(()) => {
                            running.insert(line.number, line);
                        }
                        Err(e) if lines.skip_bad => {
                            let _ = e;
                            lines.bad.push(line.number);
                            self.finished.insert(line.number, self.blank(options.candidates));
                        }
                        Err(e) => {
                            self.write_ready()?;
                            bail!("{}, line {}: {e}", lines.name, line.number);
                        }
                    }
                }
            }
            if stop.load(Ordering::Relaxed) {
                self.write_ready()?;
                return Ok(false);
            }
            if session.is_idle() && end {
                self.write_ready()?;
                return Ok(true);
            }
            for completed in session.step(&mut |_| {})? {
                let line = running.remove(&completed.id).expect("submitted above");
                self.finished.insert(completed.id, self.render(&line, &completed));
            }
            self.write_ready()?;
            report.update(self.written, session.generated_tokens());
        }
    }

    fn render(&self, line: &Line, completed: &Completed) -> String {
        match self.format {
            Format::Jsonl => {
                let mut object = record(line.id.clone(), &line.prompt, completed, line.seed);
                object["line"] = json!(line.number);
                format!("{object}\n")
            }
            Format::Text => completed.candidates.iter().map(|c| one_line(&c.text) + "\n").collect(),
        }
    }

    /// What stands for a line that was skipped: nothing, or in text as many empty lines as keep the count.
    fn blank(&self, candidates: u32) -> String {
        match self.format {
            Format::Jsonl => String::new(),
            Format::Text => "\n".repeat(candidates as usize),
        }
    }

    /// Writes results up to the first that is not there yet.
    fn write_ready(&mut self) -> anyhow::Result<()> {
        let mut ready = 0;
        while let Some(text) = self.next.get(ready).and_then(|n| self.finished.remove(n)) {
            self.out.write_all(text.as_bytes()).with_context(|| format!("{}: cannot write", self.output_name))?;
            self.written += u64::from(!text.trim().is_empty());
            ready += 1;
        }
        if ready > 0 {
            self.next.drain(..ready);
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        self.out.flush().with_context(|| format!("{}: cannot write", self.output_name))
    }
}

/// The input, line by line.
struct Lines<'a> {
    reader: BufReader<Box<dyn Read>>,
    name: String,
    number: u64,
    skip_bad: bool,
    bad: Vec<u64>,
    rewriter: &'a Rewriter,
}

impl Lines<'_> {
    fn raw(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        let n = self.reader.read_until(b'\n', &mut bytes).with_context(|| format!("{}: cannot read", self.name))?;
        if n == 0 {
            return Ok(None);
        }
        self.number += 1;
        while bytes.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
            bytes.pop();
        }
        Ok(Some(bytes))
    }

    fn skip(&mut self, lines: u64) -> anyhow::Result<()> {
        for _ in 0..lines {
            if self.raw()?.is_none() {
                bail!("{}: has fewer lines than the output has results; is it the same input?", self.name);
            }
        }
        Ok(())
    }

    /// The next line that holds a prompt.
    fn next(&mut self) -> anyhow::Result<Option<Line>> {
        loop {
            let Some(bytes) = self.raw()? else { return Ok(None) };
            if bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            match self.parse(&bytes) {
                Ok(line) => return Ok(Some(line)),
                Err(_) if self.skip_bad => self.bad.push(self.number),
                Err(e) => bail!("{}, line {}: {e:#}; --skip-bad-lines goes on", self.name, self.number),
            }
        }
    }

    fn parse(&self, bytes: &[u8]) -> anyhow::Result<Line> {
        let text = std::str::from_utf8(bytes).context("is not UTF-8")?.trim_start_matches('\u{feff}');
        let default_id = json!(self.number - 1);
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
        let ids = self.rewriter.encode(&prompt)?;
        Ok(Line { number: self.number, id, prompt, ids, seed })
    }
}

/// Cuts an unfinished last line off the output and finds where to go on.
fn resume(path: &Path, format: Format, candidates: u32) -> anyhow::Result<Resume> {
    if !path.exists() {
        return Ok(Resume::default());
    }
    let name = path.display();
    let mut file =
        OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("{name}: cannot open"))?;
    let mut reader = BufReader::with_capacity(1 << 20, &file);
    let (mut whole, mut lines, mut last) = (0u64, 0u64, Vec::new());
    // byte offset after the last complete result
    let mut kept = 0u64;
    loop {
        let mut bytes = Vec::new();
        let n = reader.read_until(b'\n', &mut bytes).with_context(|| format!("{name}: cannot read"))?;
        if n == 0 || bytes.last() != Some(&b'\n') {
            break;
        }
        whole += n as u64;
        lines += 1;
        if format == Format::Jsonl || lines.is_multiple_of(candidates as u64) {
            kept = whole;
            last = bytes;
        }
    }
    drop(reader);
    file.set_len(kept).with_context(|| format!("{name}: cannot write"))?;
    file.seek(SeekFrom::End(0))?;
    if kept == 0 {
        return Ok(Resume::default());
    }
    if format == Format::Text {
        return Ok(Resume { line: lines / candidates as u64, seed: None });
    }
    let value: Value = serde_json::from_slice(&last).unwrap_or_default();
    let line = value.get("line").and_then(Value::as_u64);
    let line =
        line.with_context(|| format!("{name}: its last line names no input line; it was not written by this command"))?;
    Ok(Resume { line, seed: value.get("seed").and_then(Value::as_u64) })
}

struct Report {
    bar: ProgressBar,
    started: Instant,
    before: u64,
}

impl Report {
    fn new(before: u64) -> Report {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template"));
        Report { bar, started: Instant::now(), before }
    }

    fn update(&self, written: u64, tokens: u64) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.bar.set_message(format!(
            "{} prompts  {:.1} prompts/s  {:.0} tokens/s",
            self.before + written,
            written as f64 / seconds,
            tokens as f64 / seconds
        ));
        self.bar.tick();
    }

    fn summary(&self, written: u64) {
        if std::io::stderr().is_terminal() {
            let seconds = self.started.elapsed().as_secs_f64();
            eprintln!("{written} prompts in {seconds:.1} s ({:.1} a second)", written as f64 / seconds);
        }
    }
}
