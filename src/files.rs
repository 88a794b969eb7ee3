//! Files that somebody brings: what they are instead, where they are not what they should be; and
//! what a file makes of values.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Largest file that is read whole: far above every tokenizer and index.
const MAX_BYTES: u64 = 1 << 30;

/// Opens a file for reading; `missing` is said of one that is not there.
pub fn open(path: &Path, missing: &str) -> Result<(File, Metadata)> {
    let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::file(path, missing),
        _ => Error::io(path, "open")(e),
    })?;
    // before it is opened, because opening a pipe waits for somebody to write to it
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a folder" } else { "no regular file" };
        return Err(Error::file(path, format!("is {what}, expected a file")));
    }
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    Ok((file, metadata))
}

/// Reads a small file whole; `missing` is said of one that is not there.
pub fn read(path: &Path, missing: &str) -> Result<Vec<u8>> {
    let (file, metadata) = open(path, missing)?;
    if metadata.len() > MAX_BYTES {
        return Err(Error::file(
            path,
            format!("has {} bytes, expected at most {MAX_BYTES}", metadata.len()),
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io(path, "read"))?;
    match instead(&bytes) {
        Some(what) => Err(Error::file(path, what)),
        None => Ok(bytes),
    }
}

/// What the content of a model's file is instead, where its first bytes tell.
pub fn instead(bytes: &[u8]) -> Option<String> {
    let head = &bytes[..bytes.len().min(512)];
    if head.starts_with(b"version https://git-lfs") {
        let text = String::from_utf8_lossy(head);
        let size = text.lines().find_map(|l| l.strip_prefix("size "));
        let size = size.map_or(String::new(), |s| format!(" of {} bytes", s.trim()));
        return Some(format!(
            "is a Git LFS pointer in place of a file{size}; `git lfs pull` in its folder fetches it"
        ));
    }
    if bytes.is_empty() {
        return Some("is empty; download or copy it again".into());
    }
    let text = head.trim_ascii_start().to_ascii_lowercase();
    if text.starts_with(b"<!doctype") || text.starts_with(b"<html") || text.starts_with(b"<?xml") {
        return Some("is a web page that was saved in place of the file; download it again".into());
    }
    if head.len() >= 16 && head.iter().all(|&b| b == 0) {
        return Some(
            "begins with zeros, as an unfinished download does; download or copy it again".into(),
        );
    }
    None
}

/// Settings as a file brings them back: reading may change the last digit of a number.
pub fn as_read(settings: &Value) -> Value {
    serde_json::from_str(&settings.to_string()).unwrap_or_else(|_| settings.clone())
}

/// For `#[serde(with = "exact")]`: a finite number as text that reads back with the same bits,
/// which a number in JSON may not do.
pub mod exact {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the number in as few digits as tell it from its neighbours.
    pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:?}"))
    }

    /// Reads what [`serialize`] wrote, and nothing that is not finite.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(D::Error::custom(format!("{text:?} is no finite number"))),
        }
    }
}
