//! Results in the order of their lines, whole or not at all.

use super::target::{Packing, Target};
use anyhow::Context;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

/// Bytes that make a compressed part worth its head, and the time after which even a small one is
/// written.
const PACKED: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes results as soon as all earlier ones are there.
pub struct Output {
    pub target: Target,
    /// Lines whose results are not written yet, in order.
    next: VecDeque<u64>,
    ready: BTreeMap<u64, String>,
    /// Results in their order that wait for a compressed part to be worth it.
    gathered: Vec<u8>,
    gathered_since: Instant,
    /// Prompts that are done, and those of them whose results are written or gathered.
    pub finished: u64,
    pub written: u64,
}

impl Output {
    pub fn new(target: Target) -> Output {
        Output {
            target,
            next: VecDeque::new(),
            ready: BTreeMap::new(),
            gathered: Vec::new(),
            gathered_since: Instant::now(),
            finished: 0,
            written: 0,
        }
    }

    /// A line's result comes after those of all lines expected before.
    pub fn expect(&mut self, line: u64) {
        self.next.push_back(line);
    }

    /// Takes a line's result; one without text is no prompt's.
    pub fn finish(&mut self, line: u64, result: String) {
        self.finished += u64::from(!result.trim().is_empty());
        self.ready.insert(line, result);
    }

    /// Lines expected and not written.
    pub fn pending(&self) -> usize {
        self.next.len()
    }

    /// The last line that is done and waits for earlier ones.
    pub fn last_ready(&self) -> Option<u64> {
        self.ready.last_key_value().map(|(line, _)| *line)
    }

    /// Writes results up to the first that is not there yet.
    pub fn write_ready(&mut self) -> anyhow::Result<()> {
        while let Some(text) = self.next.front().and_then(|n| self.ready.remove(n)) {
            self.next.pop_front();
            if self.gathered.is_empty() {
                self.gathered_since = Instant::now();
            }
            self.gathered.extend_from_slice(text.as_bytes());
            self.written += u64::from(!text.trim().is_empty());
        }
        let waits = self.target.packing != Packing::None
            && self.gathered.len() < PACKED
            && self.gathered_since.elapsed() < PATIENCE;
        if waits { Ok(()) } else { self.flush() }
    }

    /// Writes what is gathered.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let part = self.target.packing.pack(&self.gathered)?;
        self.gathered.clear();
        self.target.write(&part)
    }
}

impl Packing {
    /// A part of a file that can be read by itself.
    fn pack(self, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Packing::None => bytes.to_vec(),
            Packing::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(bytes)?;
                encoder.finish()?
            }
            Packing::Zstd => zstd::encode_all(bytes, 0)?,
        })
    }
}

/// What an interrupted run has written.
#[derive(Debug, Default, PartialEq)]
pub struct Written {
    /// Whole results.
    pub results: u64,
    /// The last line, whole.
    pub last: Vec<u8>,
}

impl Written {
    /// The last record, and the number of its input line.
    pub fn last_record(&self, output: &str) -> anyhow::Result<(u64, Value)> {
        let last: Value = serde_json::from_slice(&self.last).unwrap_or_default();
        let number = last.get("line").and_then(Value::as_u64).filter(|n| *n > 0);
        let number = number.with_context(|| {
            format!(
                "{output}: its last line names no input line; it was not written by this command"
            )
        })?;
        Ok((number, last))
    }

    /// Reads an output, and cuts off what is no whole result of `lines` lines.
    pub fn read(
        file: &mut File,
        name: &str,
        packing: Packing,
        lines: u64,
    ) -> anyhow::Result<Written> {
        file.seek(SeekFrom::Start(0))?;
        let mut scan = Scan { lines, count: 0, bytes: 0, kept: 0, written: Written::default() };
        let mut reader = BufReader::with_capacity(1 << 20, &*file);
        match packing {
            Packing::None => drop(
                scan.lines_of(&mut reader, true).with_context(|| format!("{name}: cannot read"))?,
            ),
            _ => {
                scan.parts(&mut reader, packing).with_context(|| format!("{name}: cannot read"))?
            }
        }
        drop(reader);
        file.set_len(scan.kept).with_context(|| format!("{name}: cannot write"))?;
        file.seek(SeekFrom::End(0))?;
        Ok(scan.written)
    }
}

struct Scan {
    /// Lines of a result.
    lines: u64,
    /// Lines and bytes read, and the bytes up to the last whole result.
    count: u64,
    bytes: u64,
    kept: u64,
    written: Written,
}

impl Scan {
    /// Counts lines up to the end; `false` if the last one has none. In a plain file every whole
    /// result may be kept.
    fn lines_of(&mut self, reader: &mut dyn BufRead, plain: bool) -> std::io::Result<bool> {
        loop {
            let mut line = Vec::new();
            let n = reader.read_until(b'\n', &mut line)?;
            if n == 0 || line.last() != Some(&b'\n') {
                return Ok(n == 0);
            }
            self.count += 1;
            if plain {
                self.bytes += n as u64;
            }
            if self.count.is_multiple_of(self.lines) {
                self.written = Written { results: self.count / self.lines, last: line };
                if plain {
                    self.kept = self.bytes;
                }
            }
        }
    }

    /// Counts the lines of compressed parts, up to the first that is not whole.
    fn parts(&mut self, reader: &mut BufReader<&File>, packing: Packing) -> std::io::Result<()> {
        while !reader.fill_buf()?.is_empty() {
            let before = (self.count, std::mem::take(&mut self.written));
            let whole = match packing {
                Packing::Gzip => {
                    let mut part = BufReader::new(flate2::bufread::GzDecoder::new(&mut *reader));
                    self.lines_of(&mut part, false)
                }
                _ => zstd::stream::read::Decoder::with_buffer(&mut *reader).and_then(|part| {
                    self.lines_of(&mut BufReader::new(part.single_frame()), false)
                }),
            };
            let ends = self.count.is_multiple_of(self.lines);
            // parts are written whole, so what does not read as one was cut while it was written
            if !matches!(whole, Ok(true)) || !ends {
                (self.count, self.written) = before;
                break;
            }
            if self.written == Written::default() {
                self.written = before.1;
            }
            let mut file: &File = reader.get_ref();
            self.kept = file.stream_position()? - reader.buffer().len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// All bytes of a file.
    fn unpacked(bytes: &[u8], packing: Packing) -> Vec<u8> {
        let mut out = Vec::new();
        match packing {
            Packing::None => out.extend_from_slice(bytes),
            Packing::Gzip => {
                flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut out).unwrap();
            }
            Packing::Zstd => out = zstd::decode_all(bytes).unwrap(),
        }
        out
    }

    /// Cut anywhere, a file keeps whole results, and what is appended afterwards reads as one file.
    #[test]
    fn a_file_cut_anywhere_keeps_its_whole_results() {
        let f = tempfile::tempdir().unwrap();
        let path = f.path().join("out");
        let results: Vec<String> = (0..6).map(|i| format!("result {i}\nand more\n")).collect();
        for packing in [Packing::None, Packing::Gzip, Packing::Zstd] {
            let whole: Vec<u8> = results
                .chunks(2)
                .flat_map(|p| packing.pack(p.concat().as_bytes()).unwrap())
                .collect();
            let mut most = 0;
            for cut in 0..=whole.len() {
                std::fs::write(&path, &whole[..cut]).unwrap();
                let mut file = File::options().read(true).append(true).open(&path).unwrap();
                let written = Written::read(&mut file, "out", packing, 2).unwrap();
                let kept = written.results as usize;
                assert!(kept >= most && kept <= 6, "{packing:?} cut at {cut}: {kept}");
                most = kept;
                assert_eq!(written.last, if kept > 0 { b"and more\n".to_vec() } else { vec![] });
                file.write_all(&packing.pack(results[kept..].concat().as_bytes()).unwrap())
                    .unwrap();
                let bytes = unpacked(&std::fs::read(&path).unwrap(), packing);
                assert_eq!(
                    String::from_utf8(bytes).unwrap(),
                    results.concat(),
                    "{packing:?} cut at {cut}"
                );
            }
            assert_eq!(most, 6);
        }
    }
}
