//! The lines of one or more files, compressed or not, and which of them are this run's.

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, sync_channel};

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
        let numbers =
            text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((part, parts)) if part >= 1 && part <= parts => Ok(Shard { part, parts }),
            _ => Err("expected i/n with i from 1 to n, such as 2/8".into()),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}/{}", self.part, self.parts)
    }
}

impl Shard {
    fn holds(self, line: u64) -> bool {
        (line - 1) % self.parts == self.part - 1
    }
}

/// What the lines of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineKind {
    /// JSON objects.
    Record,
    /// Prompts as they are; objects with a prompt are taken too.
    Text,
    /// Objects, or prompts as they are: told line by line.
    Either,
}

/// One line that is not empty.
pub struct RawLine {
    /// Over all files, from 1.
    pub number: u64,
    /// File and line, for messages.
    pub place: String,
    pub kind: LineKind,
    pub bytes: Vec<u8>,
    /// Whether it is longer than allowed, and `bytes` only its beginning.
    pub too_long: bool,
}

/// Which lines to read, and how.
#[derive(Clone, Copy, Debug)]
pub struct LineOptions {
    pub shard: Shard,
    /// Maximum bytes of a line.
    pub longest: usize,
    /// Whether lines are text wherever a file's name does not say that they are JSON.
    pub text: bool,
}

/// Reads lines one after the other.
pub struct Lines {
    files: VecDeque<PathBuf>,
    reader: Option<Box<dyn BufRead + Send>>,
    name: String,
    kind: LineKind,
    in_file: u64,
    number: u64,
    options: LineOptions,
    /// Whether the rest of a line that is too long has yet to be passed over.
    within: bool,
}

impl Lines {
    /// Opens files by names and patterns such as `part-*.jsonl.gz`; `-` is standard input. What
    /// does not exist is found out now.
    pub fn open(inputs: &[String], options: LineOptions) -> anyhow::Result<Lines> {
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
                    let file = file.with_context(|| format!("--input {input}"))?;
                    if !file.is_dir() {
                        files.push_back(file);
                    }
                }
                ensure!(files.len() > before, "--input {input}: no file matches");
                continue;
            }
            ensure!(
                !path.is_dir(),
                "{input}: is a folder; expected a file of prompts, or a pattern such as \
                {input}/*.jsonl"
            );
            let metadata =
                std::fs::metadata(&path).with_context(|| format!("{input}: cannot open"))?;
            if metadata.is_file() {
                File::open(&path).with_context(|| format!("{input}: cannot open"))?;
            }
            files.push_back(path);
        }
        Ok(Lines::of(files, options))
    }

    fn of(files: VecDeque<PathBuf>, options: LineOptions) -> Lines {
        let (name, kind) = (String::new(), LineKind::Either);
        Lines { files, reader: None, name, kind, in_file: 0, number: 0, options, within: false }
    }

    /// Prompts that are there already, each a line.
    pub fn of_prompts(prompts: &[String], options: LineOptions) -> Lines {
        let records: String =
            prompts.iter().map(|p| json!({ "prompt": p }).to_string() + "\n").collect();
        let reader: Box<dyn BufRead + Send> = Box::new(std::io::Cursor::new(records));
        let lines = Lines::of(VecDeque::new(), options);
        Lines {
            reader: Some(reader),
            name: "the command line's prompts".into(),
            kind: LineKind::Record,
            ..lines
        }
    }

    /// The files that are still to be read.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    /// What tells these files from others: their names and beginnings. Files that were appended to
    /// since are the same.
    pub fn identity(&self, known: &Value) -> anyhow::Result<Value> {
        /// Bytes of a file's beginning.
        const HEAD: u64 = 64 << 10;
        let mut identity = vec![];
        for (i, file) in self.files().enumerate() {
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let metadata = std::fs::metadata(file).ok().filter(|m| m.is_file());
            let Some(metadata) = metadata else {
                identity.push(json!({ "name": name }));
                continue;
            };
            let bytes = known[i]["bytes"].as_u64().unwrap_or(HEAD).min(HEAD).min(metadata.len());
            let mut head = Vec::new();
            let read = File::open(file).and_then(|f| f.take(bytes).read_to_end(&mut head));
            read.with_context(|| format!("{}: cannot read", file.display()))?;
            identity.push(json!({ "name": name, "bytes": bytes, "crc32": crc32fast::hash(&head) }));
        }
        Ok(Value::Array(identity))
    }

    /// How many lines there are, where that is quick to know: in regular files that are neither
    /// compressed nor huge.
    pub fn count(&self) -> anyhow::Result<Option<u64>> {
        /// Bytes that are read in a moment.
        const MAX_BYTES: u64 = 1 << 30;
        if self.reader.is_some() {
            return Ok(None);
        }
        let mut bytes = 0;
        for file in self.files() {
            let Some(metadata) = std::fs::metadata(file).ok().filter(|m| m.is_file()) else {
                return Ok(None);
            };
            bytes += metadata.len();
            let mut head = Vec::new();
            let read = File::open(file).and_then(|f| f.take(4).read_to_end(&mut head));
            if bytes > MAX_BYTES || read.is_err() || is_packed(&head) {
                return Ok(None);
            }
        }
        let mut all = Lines::of(self.files.clone(), self.options);
        let mut count = 0;
        while all.next()?.is_some() {
            count += 1;
        }
        Ok(Some(count))
    }

    fn next_file(&mut self) -> anyhow::Result<bool> {
        let Some(path) = self.files.pop_front() else { return Ok(false) };
        self.in_file = 0;
        let stdin = path.as_os_str() == "-";
        self.name = if stdin { "standard input".into() } else { path.display().to_string() };
        self.kind = kind(&path, self.options.text);
        let file: Box<dyn Read + Send> = match stdin {
            true => Box::new(std::io::stdin()),
            false => {
                Box::new(File::open(&path).with_context(|| format!("{}: cannot open", self.name))?)
            }
        };
        let mut file = BufReader::with_capacity(1 << 20, file);
        let head = file.fill_buf().with_context(|| format!("{}: cannot read", self.name))?;
        let mut reader: Box<dyn BufRead + Send> = match head {
            [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(
                1 << 20,
                flate2::bufread::MultiGzDecoder::new(file),
            )),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let decoder = zstd::stream::read::Decoder::with_buffer(file);
                let decoder = decoder.with_context(|| format!("{}: cannot read", self.name))?;
                Box::new(BufReader::with_capacity(1 << 20, decoder))
            }
            _ => Box::new(file),
        };
        // a byte order mark is no part of the first prompt
        let head = reader.fill_buf().with_context(|| format!("{}: cannot read", self.name))?;
        if head.starts_with(b"\xef\xbb\xbf") {
            reader.consume(3);
        }
        self.reader = Some(reader);
        Ok(true)
    }

    /// The next line of any kind, without its end, and whether it is longer than allowed.
    fn raw(&mut self) -> anyhow::Result<Option<(Vec<u8>, bool)>> {
        loop {
            if self.reader.is_none() && !self.next_file()? {
                return Ok(None);
            }
            let reader = self.reader.as_mut().expect("opened above");
            let cannot_read = || format!("{}: cannot read", self.name);
            if std::mem::take(&mut self.within) {
                read_line(reader, None).with_context(cannot_read)?;
            }
            let (mut bytes, end) =
                read_line(reader, Some(self.options.longest)).with_context(cannot_read)?;
            if bytes.is_empty() && end == LineEnd::File {
                self.reader = None;
                continue;
            }
            self.in_file += 1;
            self.number += 1;
            self.within = end == LineEnd::TooLong;
            while bytes.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
                bytes.pop();
            }
            return Ok(Some((bytes, self.within)));
        }
    }

    /// The next line of this run that is not empty.
    pub fn next(&mut self) -> anyhow::Result<Option<RawLine>> {
        while let Some((bytes, too_long)) = self.raw()? {
            if self.options.shard.holds(self.number)
                && (too_long || !bytes.iter().all(u8::is_ascii_whitespace))
            {
                let place = format!("{}, line {}", self.name, self.in_file);
                return Ok(Some(RawLine {
                    number: self.number,
                    place,
                    kind: self.kind,
                    bytes,
                    too_long,
                }));
            }
        }
        Ok(None)
    }

    /// Skips all lines up to number `line`; the last of them comes back.
    pub fn skip_to(&mut self, line: u64) -> anyhow::Result<Option<RawLine>> {
        let mut last = None;
        while self.number < line {
            let Some((bytes, too_long)) = self.raw()? else { return self.shorter() };
            let place = format!("{}, line {}", self.name, self.in_file);
            last = Some(RawLine { number: self.number, place, kind: self.kind, bytes, too_long });
        }
        Ok(last)
    }

    /// Skips so many of this run's lines.
    pub fn skip(&mut self, lines: u64) -> anyhow::Result<()> {
        for _ in 0..lines {
            if self.next()?.is_none() {
                self.shorter::<()>()?;
            }
        }
        Ok(())
    }

    fn shorter<T>(&self) -> anyhow::Result<T> {
        bail!("{}: has fewer lines than the output has results; is it the same input?", self.name);
    }

    /// Reads on a thread of its own, so that nobody waits for a pipe that is slow.
    pub fn read_ahead(mut self) -> anyhow::Result<Receiver<anyhow::Result<RawLine>>> {
        let (lines, received) = sync_channel(64);
        std::thread::Builder::new().name("input".into()).spawn(move || {
            while let Some(line) = self.next().transpose() {
                let failed = line.is_err();
                if lines.send(line).is_err() || failed {
                    break;
                }
            }
        })?;
        Ok(received)
    }
}

fn is_packed(head: &[u8]) -> bool {
    head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

/// What a file's name says about its lines.
fn kind(path: &Path, text: bool) -> LineKind {
    let name = path.to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    if [".jsonl", ".ndjson", ".json"].iter().any(|ending| name.ends_with(ending)) {
        LineKind::Record
    } else if text || name.ends_with(".txt") {
        LineKind::Text
    } else {
        LineKind::Either
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineEnd {
    Line,
    File,
    TooLong,
}

/// Reads up to the end of the line, or only one byte more than `longest`; `None` passes over the
/// rest of the line.
fn read_line(
    reader: &mut dyn BufRead,
    longest: Option<usize>,
) -> std::io::Result<(Vec<u8>, LineEnd)> {
    let mut line = Vec::new();
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if available.is_empty() {
            return Ok((line, LineEnd::File));
        }
        let end = available.iter().position(|&b| b == b'\n');
        let length = end.map_or(available.len(), |at| at + 1);
        let Some(longest) = longest else {
            reader.consume(length);
            if end.is_some() {
                return Ok((line, LineEnd::Line));
            }
            continue;
        };
        // the line's end does not count
        let room = longest + 1 - line.len().min(longest + 1);
        let text = end.unwrap_or(length);
        if text >= room && text + line.len() > longest {
            line.extend_from_slice(&available[..room]);
            reader.consume(room);
            return Ok((line, LineEnd::TooLong));
        }
        line.extend_from_slice(&available[..length]);
        reader.consume(length);
        if end.is_some() {
            return Ok((line, LineEnd::Line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut_and_passed_over() {
        for capacity in [1, 2, 3, 7, 64] {
            let f = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(f.path(), "abcde\r\n123456789012345\n\nabcdef\nabcdefg\nx").unwrap();
            let file = BufReader::with_capacity(capacity, File::open(f.path()).unwrap());
            let options = LineOptions { shard: Shard::default(), longest: 6, text: true };
            let mut lines = Lines::of(VecDeque::new(), options);
            lines.reader = Some(Box::new(file));
            let mut found = vec![];
            while let Some(line) = lines.next().unwrap() {
                found.push((line.number, String::from_utf8(line.bytes).unwrap(), line.too_long));
            }
            let of = |number: u64, text: &str, too_long| (number, text.to_owned(), too_long);
            let expected = [
                of(1, "abcde", false),
                of(2, "1234567", true),
                of(4, "abcdef", false),
                of(5, "abcdefg", true),
                of(6, "x", false),
            ];
            assert_eq!(found, expected, "{capacity} bytes at a time");
        }
    }

    #[test]
    fn names_say_what_lines_are() {
        let of = |name: &str, text| kind(Path::new(name), text);
        assert_eq!(of("a/B.JSONL.gz", true), LineKind::Record);
        assert_eq!(of("a.txt.zst", false), LineKind::Text);
        assert_eq!((of("-", false), of("-", true)), (LineKind::Either, LineKind::Text));
    }
}
