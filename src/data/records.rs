//! Reading and writing lists of prompts and of pairs: JSON arrays, JSON lines and plain text.

use crate::checkpoint::write_atomic;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// A training pair in the reference's format; scores and other fields are carried along.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The plain prompt.
    pub raw_prompt: String,
    /// The rich prompt: what a rewriter should make of the plain one.
    pub prompt: String,
    /// All other fields.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// The values of a JSON array or of JSON lines, with the line (from 1) or the index of each.
pub(crate) fn values(path: &Path) -> Result<Vec<(String, Value)>> {
    records(path)?.into_iter().map(|(place, value)| Ok((place, value?))).collect()
}

/// [`values`], of which some may be unreadable.
fn records(path: &Path) -> Result<Vec<(String, Result<Value>)>> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line =
            e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count()
                + 1;
        Error::file(path, format!("line {line} is not UTF-8"))
    })?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("not a JSON array: {e}")))?;
        return Ok(list
            .into_iter()
            .enumerate()
            .map(|(i, v)| (format!("element {}", i + 1), Ok(v)))
            .collect());
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let records = lines.map(|(i, line)| {
        let place = format!("line {}", i + 1);
        let value = serde_json::from_str(line)
            .map_err(|e| Error::file(path, format!("{place} is not JSON: {e}")));
        (place, value)
    });
    Ok(records.collect())
}

/// Pairs to train on, both sides of which say something. What is wrong with the others is in the
/// second list.
pub fn read_training_pairs(path: &Path) -> Result<(Vec<Pair>, Vec<Error>)> {
    let (mut pairs, mut bad) = (Vec::new(), Vec::new());
    for (place, value) in records(path)? {
        match value.and_then(|v| pair(path, &place, v)) {
            Ok(p) if p.raw_prompt.trim().is_empty() => {
                bad.push(Error::file(path, format!("{place} has an empty \"raw_prompt\"")));
            }
            Ok(p) if p.prompt.trim().is_empty() => {
                bad.push(Error::file(path, format!("{place} has an empty \"prompt\"")));
            }
            Ok(p) => pairs.push(p),
            Err(e) => bad.push(e),
        }
    }
    if pairs.is_empty() && bad.is_empty() {
        return Err(Error::file(path, "holds no pairs"));
    }
    Ok((pairs, bad))
}

fn pair(path: &Path, place: &str, value: Value) -> Result<Pair> {
    serde_json::from_value(value).map_err(|e| {
        let expected = r#"{"raw_prompt": …, "prompt": …}"#;
        Error::file(path, format!("{place}: {e}; expected {expected}"))
    })
}

/// Pairs with `raw_prompt` and `prompt`.
pub fn read_pairs(path: &Path) -> Result<Vec<Pair>> {
    let pairs = values(path)?
        .into_iter()
        .map(|(place, v)| pair(path, &place, v))
        .collect::<Result<Vec<Pair>>>()?;
    if pairs.is_empty() {
        return Err(Error::file(path, "holds no pairs"));
    }
    Ok(pairs)
}

/// Prompts: one a line in a text file, else the `prompt` of each record (or the strings
/// themselves).
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let json = path.extension().is_some_and(|e| e == "json" || e == "jsonl");
    if !json {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        return Ok(text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .map(str::to_owned)
            .collect());
    }
    values(path)?
        .into_iter()
        .map(|(place, v)| match &v {
            Value::String(s) => Ok(s.clone()),
            Value::Object(o) => match o.get("prompt") {
                Some(Value::String(s)) => Ok(s.clone()),
                _ => Err(Error::file(path, format!("{place} has no text under \"prompt\""))),
            },
            _ => Err(Error::file(
                path,
                format!("{place} is neither text nor an object with \"prompt\""),
            )),
        })
        .collect()
}

/// Where it stands, a plain prompt, and its rich one where the record has that.
pub type PolicyRecord = (String, String, Option<String>);

/// Plain prompts for a policy to continue: records with `raw_prompt` and maybe `prompt`, records
/// with `prompt` alone, texts, or a text file with one a line.
///
/// # Errors
/// Names the first that is none, or is empty.
pub fn read_policy_prompts(path: &Path) -> Result<Vec<PolicyRecord>> {
    let json = path.extension().is_some_and(|e| e == "json" || e == "jsonl");
    let records = if json {
        let of = |(place, value): (String, Value)| {
            let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
            let (raw, prompt) = (text("raw_prompt"), text("prompt"));
            let found = match (value.as_str(), raw, prompt) {
                (Some(text), _, _) => (text.to_owned(), None),
                (None, Some(raw), prompt) => (raw, prompt),
                (None, None, Some(prompt)) => (prompt, None),
                (None, None, None) => {
                    let what = "has neither \"raw_prompt\" nor \"prompt\"";
                    return Err(Error::file(path, format!("{place} {what}")));
                }
            };
            Ok((place, found.0, found.1))
        };
        values(path)?.into_iter().map(of).collect::<Result<Vec<_>>>()?
    } else {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines.map(|(i, line)| (format!("line {}", i + 1), line.trim().to_owned(), None)).collect()
    };
    match records.iter().find(|(_, raw, _)| raw.trim().is_empty()) {
        Some((place, ..)) => Err(Error::file(path, format!("{place} has an empty prompt"))),
        None if records.is_empty() => Err(Error::file(path, "holds no prompts")),
        None => Ok(records),
    }
}

/// Writes a JSON array if the name ends in `.json`, else JSON lines.
pub fn write_pairs(path: &Path, pairs: &[Pair]) -> Result<()> {
    write_atomic(path, |w| {
        if path.extension().is_some_and(|e| e == "json") {
            serde_json::to_writer_pretty(&mut *w, pairs)?;
            return writeln!(w);
        }
        for pair in pairs {
            serde_json::to_writer(&mut *w, pair)?;
            writeln!(w)?;
        }
        Ok(())
    })
}
