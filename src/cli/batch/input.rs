//! The lines of one or more files, compressed or not, and which of them are this run's.

use anyhow::{Context, bail, ensure};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::str::FromStr;

/// The `part`-th of `parts` equal parts of the input, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    part: u64,
    parts: u64,
}

impl Default for Shard {
    fn default() -> Self {
        Shard { part: 1, parts: 1 }
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((part, parts)) if part >= 1 && part <= parts => Ok(Shard { part, parts }),
            _ => Err("expected i/n with i from 1 to n, such as 2/8".into()),
        }
    }
}

impl Shard {
    fn holds(self, line: u64) -> bool {
        (line - 1) % self.parts == self.part - 1
    }
}

/// One line that is not empty.
pub struct RawLine {
    /// Over all files, from 1.
    pub number: u64,
    /// File and line, for messages.
    pub place: String,
    pub bytes: Vec<u8>,
}

/// Reads lines one after the other.
pub struct Lines {
    files: VecDeque<PathBuf>,
    reader: Option<Box<dyn BufRead>>,
    name: String,
    in_file: u64,
    number: u64,
    shard: Shard,
}

impl Lines {
    /// Opens files by names and patterns such as `part-*.jsonl.gz`; `-` is standard input. What does not exist is found out
    /// now.
    pub fn open(inputs: &[String], shard: Shard) -> anyhow::Result<Lines> {
        let mut files = VecDeque::new();
        for input in inputs {
            let path = PathBuf::from(input);
            if input == "-" {
                files.push_back(path);
                continue;
            }
            if !path.exists() && input.contains(['*', '?', '[']) {
                let found = glob::glob(input).with_context(|| format!("--input {input}"))?;
                let before = files.len();
                for file in found {
                    files.push_back(file.with_context(|| format!("--input {input}"))?);
                }
                ensure!(files.len() > before, "--input {input}: no file matches");
                continue;
            }
            ensure!(
                !path.is_dir(),
                "{input}: is a folder; expected a file of prompts, or a pattern such as {input}/*.jsonl"
            );
            File::open(&path).with_context(|| format!("{input}: cannot open"))?;
            files.push_back(path);
        }
        Ok(Lines { files, reader: None, name: String::new(), in_file: 0, number: 0, shard })
    }

    fn next_file(&mut self) -> anyhow::Result<bool> {
        let Some(path) = self.files.pop_front() else { return Ok(false) };
        self.in_file = 0;
        let stdin = path.as_os_str() == "-";
        self.name = if stdin { "standard input".into() } else { path.display().to_string() };
        let file: Box<dyn Read> = match stdin {
            true => Box::new(std::io::stdin()),
            false => Box::new(File::open(&path).with_context(|| format!("{}: cannot open", self.name))?),
        };
        let mut file = BufReader::with_capacity(1 << 20, file);
        let head = file.fill_buf().with_context(|| format!("{}: cannot read", self.name))?;
        self.reader = Some(match head {
            [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(1 << 20, flate2::bufread::MultiGzDecoder::new(file))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let decoder = zstd::stream::read::Decoder::with_buffer(file);
                Box::new(BufReader::with_capacity(
                    1 << 20,
                    decoder.with_context(|| format!("{}: cannot read", self.name))?,
                ))
            }
            _ => Box::new(file),
        });
        Ok(true)
    }

    /// The next line of any kind.
    fn raw(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        loop {
            if self.reader.is_none() && !self.next_file()? {
                return Ok(None);
            }
            let reader = self.reader.as_mut().expect("opened above");
            let mut bytes = Vec::new();
            let n = reader.read_until(b'\n', &mut bytes).with_context(|| format!("{}: cannot read", self.name))?;
            if n == 0 {
                self.reader = None;
                continue;
            }
            self.in_file += 1;
            self.number += 1;
            while bytes.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
                bytes.pop();
            }
            return Ok(Some(bytes));
        }
    }

    /// The next line of this run that is not empty.
    pub fn next(&mut self) -> anyhow::Result<Option<RawLine>> {
        while let Some(bytes) = self.raw()? {
            if self.shard.holds(self.number) && !bytes.iter().all(u8::is_ascii_whitespace) {
                let place = format!("{}, line {}", self.name, self.in_file);
                return Ok(Some(RawLine { number: self.number, place, bytes }));
            }
        }
        Ok(None)
    }

    /// Skips all lines up to number `line`.
    pub fn skip_to(&mut self, line: u64) -> anyhow::Result<()> {
        while self.number < line {
            if self.raw()?.is_none() {
                bail!("{}: has fewer lines than the output has results; is it the same input?", self.name);
            }
        }
        Ok(())
    }

    /// Skips so many of this run's lines.
    pub fn skip(&mut self, lines: u64) -> anyhow::Result<()> {
        for _ in 0..lines {
            if self.next()?.is_none() {
                bail!("{}: has fewer lines than the output has results; is it the same input?", self.name);
            }
        }
        Ok(())
    }
}
