//! Results in the order of their lines, whole or not at all.

use super::super::print::note;
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

/// Writes results as soon as all earlier ones are there.
pub struct Output {
    out: BufWriter<Box<dyn Write>>,
    name: String,
    /// Lines whose results are not written yet, in order.
    next: VecDeque<u64>,
    finished: BTreeMap<u64, String>,
    pub written: u64,
}

impl Output {
    /// Opens the file, to go on with what it holds or to begin anew; `-` is standard output.
    pub fn open(path: &Path, append: bool) -> anyhow::Result<Output> {
        let stdout = path.as_os_str() == "-";
        let out: Box<dyn Write> = if stdout {
            Box::new(std::io::stdout())
        } else {
            let file = OpenOptions::new().create(true).append(append).write(true).truncate(!append).open(path);
            Box::new(file.with_context(|| format!("{}: cannot write", path.display()))?)
        };
        let name = if stdout { "standard output".into() } else { path.display().to_string() };
        let (next, finished) = Default::default();
        Ok(Output { out: BufWriter::new(out), name, next, finished, written: 0 })
    }

    /// A line's result comes after those of all lines expected before.
    pub fn expect(&mut self, line: u64) {
        self.next.push_back(line);
    }

    pub fn finish(&mut self, line: u64, result: String) {
        self.finished.insert(line, result);
    }

    /// Lines expected and not written.
    pub fn pending(&self) -> usize {
        self.next.len()
    }

    /// Writes results up to the first that is not there yet.
    pub fn write_ready(&mut self) -> anyhow::Result<()> {
        let mut any = false;
        while let Some(text) = self.next.front().and_then(|n| self.finished.remove(n)) {
            self.next.pop_front();
            self.out.write_all(text.as_bytes()).with_context(|| format!("{}: cannot write", self.name))?;
            self.written += u64::from(!text.trim().is_empty());
            any = true;
        }
        if any {
            self.out.flush().with_context(|| format!("{}: cannot write", self.name))?;
        }
        Ok(())
    }
}

/// What an interrupted run has written.
#[derive(Default)]
pub struct Written {
    /// Whole results.
    pub results: u64,
    /// The last line, whole.
    last: Vec<u8>,
}

impl Written {
    /// Reads an output, and cuts off what is no whole result of `lines` lines.
    pub fn read(path: &Path, lines: u64) -> anyhow::Result<Written> {
        if !path.exists() {
            return Ok(Written::default());
        }
        let name = path.display();
        let file = OpenOptions::new().read(true).write(true).open(path);
        let mut file = file.with_context(|| format!("{name}: cannot open"))?;
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        // bytes and lines read, and the bytes up to the last whole result
        let (mut bytes, mut count, mut kept) = (0, 0, 0);
        let mut written = Written::default();
        loop {
            let mut line = Vec::new();
            let n = reader.read_until(b'\n', &mut line).with_context(|| format!("{name}: cannot read"))?;
            if n == 0 || line.last() != Some(&b'\n') {
                break;
            }
            bytes += n as u64;
            count += 1;
            if count % lines == 0 {
                kept = bytes;
                written = Written { results: count / lines, last: line };
            }
        }
        drop(reader);
        file.set_len(kept).with_context(|| format!("{name}: cannot write"))?;
        file.seek(SeekFrom::End(0))?;
        Ok(written)
    }

    /// The input line and the seed of the last result, if there are results.
    pub fn last_line(&self, path: &Path) -> anyhow::Result<Option<(u64, Option<u64>)>> {
        if self.results == 0 {
            return Ok(None);
        }
        let value: Value = serde_json::from_slice(&self.last).unwrap_or_default();
        let line = value.get("line").and_then(Value::as_u64).with_context(|| {
            format!("{}: its last line names no input line; it was not written by this command", path.display())
        })?;
        Ok(Some((line, value.get("seed").and_then(Value::as_u64))))
    }
}

/// Progress on a terminal.
pub struct Report {
    pub bar: ProgressBar,
    started: Instant,
    before: u64,
}

impl Report {
    pub fn new(before: u64) -> Report {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template"));
        Report { bar, started: Instant::now(), before }
    }

    pub fn update(&self, written: u64, tokens: u64) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.bar.set_message(format!(
            "{} prompts  {:.1} prompts/s  {:.0} tokens/s",
            self.before + written,
            written as f64 / seconds,
            tokens as f64 / seconds
        ));
        self.bar.tick();
    }

    pub fn summary(&self, written: u64) {
        self.bar.finish_and_clear();
        if std::io::stderr().is_terminal() {
            let seconds = self.started.elapsed().as_secs_f64();
            note!("{written} prompts in {seconds:.1} s ({:.1} a second)", written as f64 / seconds);
        }
    }
}
