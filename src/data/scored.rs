//! Texts with scores, and texts of which one is preferred: what reward models learn from.

use super::records::values;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// A rich prompt, the plain one that it was made of, and what somebody or something says of it.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelledPrompt {
    /// The plain prompt, where the record has one.
    pub raw_prompt: Option<String>,
    /// The rich prompt.
    pub prompt: String,
    /// Its score.
    pub label: f64,
}

/// Two rich prompts of which one is better.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// The plain prompt, where the record has one.
    pub raw_prompt: Option<String>,
    /// The better one.
    pub chosen: String,
    /// The other one.
    pub rejected: String,
}

/// The records of a file, which are all of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum ScoredRecords {
    /// `{"prompt", label, ...}`.
    Labelled(Vec<LabelledPrompt>),
    /// `{"chosen", "rejected", ...}`.
    Preferences(Vec<Preference>),
}

impl ScoredRecords {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            ScoredRecords::Labelled(list) => list.len(),
            ScoredRecords::Preferences(list) => list.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Reads labelled prompts, whose score is the field `label`, or preferences, if there is no label
/// and the first record is one.
///
/// # Errors
/// Names the first record that is not what it should be.
pub fn read_scored(path: &Path, label: Option<&str>) -> Result<ScoredRecords> {
    let values = values(path)?;
    let Some((place, first)) = values.first() else {
        return Err(Error::file(path, "holds no records"));
    };
    let preferences = first.get("chosen").is_some() && first.get("rejected").is_some();
    let fail = |place: &str, what: String| Error::file(path, format!("{place} {what}"));
    match label {
        None if preferences => {
            let list = values.iter().map(|(place, value)| {
                let record = Record::of(value).map_err(|e| fail(place, e))?;
                let text = |name| record.text(name).map_err(|e| fail(place, e));
                let raw_prompt = record.raw_prompt().map_err(|e| fail(place, e))?;
                Ok(Preference { raw_prompt, chosen: text("chosen")?, rejected: text("rejected")? })
            });
            Ok(ScoredRecords::Preferences(list.collect::<Result<_>>()?))
        }
        None => Err(fail(place, format!("{}; name it with --label", numbers_of(first)))),
        Some(label) => {
            let list = values
                .iter()
                .map(|(place, value)| labelled(value, label).map_err(|e| fail(place, e)));
            Ok(ScoredRecords::Labelled(list.collect::<Result<_>>()?))
        }
    }
}

fn labelled(value: &Value, label: &str) -> std::result::Result<LabelledPrompt, String> {
    let record = Record::of(value)?;
    let number = match record.0.get(label) {
        Some(Value::Number(n)) => n.as_f64().filter(|n| n.is_finite()),
        Some(other) => return Err(format!("has {other} under \"{label}\", expected a number")),
        None => return Err(format!("has no \"{label}\" ({})", numbers_of(value))),
    };
    let label =
        number.ok_or_else(|| format!("has a number under \"{label}\" that is too large"))?;
    Ok(LabelledPrompt { raw_prompt: record.raw_prompt()?, prompt: record.text("prompt")?, label })
}

/// What a record could be labelled by.
fn numbers_of(value: &Value) -> String {
    let fields = value.as_object().into_iter().flatten().filter(|(_, v)| v.is_number());
    let names: Vec<&str> = fields.map(|(name, _)| name.as_str()).collect();
    match names.is_empty() {
        true => "has no field with a number, which a label is".into(),
        false => format!("has these numbers: {}", names.join(", ")),
    }
}

struct Record<'a>(&'a Map<String, Value>);

impl Record<'_> {
    fn of(value: &Value) -> std::result::Result<Record<'_>, String> {
        value.as_object().map(Record).ok_or_else(|| "is no JSON object".into())
    }

    fn text(&self, name: &str) -> std::result::Result<String, String> {
        match self.0.get(name) {
            Some(Value::String(s)) if !s.trim().is_empty() => Ok(s.clone()),
            Some(Value::String(_)) => Err(format!("has an empty \"{name}\"")),
            _ => Err(format!("has no text under \"{name}\"")),
        }
    }

    fn raw_prompt(&self) -> std::result::Result<Option<String>, String> {
        match self.0.get("raw_prompt") {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.text("raw_prompt").map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, label: Option<&str>) -> std::result::Result<ScoredRecords, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scored.jsonl");
        std::fs::write(&path, text).unwrap();
        read_scored(&path, label).map_err(|e| e.to_string())
    }

    #[test]
    fn labels_and_preferences_are_told_apart() {
        let text = "{\"prompt\":\"a\",\"quality\":0,\"taste\":2.5}\n\n\
            {\"raw_prompt\":\"b\",\"prompt\":\"b, c\",\"quality\":-1}\n";
        let ScoredRecords::Labelled(list) = read(text, Some("quality")).unwrap() else { panic!() };
        assert_eq!(list.iter().map(|l| l.label).collect::<Vec<_>>(), [0.0, -1.0]);
        assert_eq!(list[1].raw_prompt.as_deref(), Some("b"));
        let text = "{\"chosen\":\"a\",\"rejected\":\"b\"}";
        assert!(matches!(read(text, None), Ok(ScoredRecords::Preferences(l)) if l.len() == 1));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, label, why) in [
            ("", Some("x"), "holds no records"),
            ("{\"prompt\":\"a\",\"x\":1}\n{\"prompt\":\"b\"}", Some("x"), "line 2 has no \"x\""),
            ("{\"prompt\":\"a\",\"x\":\"1\"}", Some("x"), "expected a number"),
            ("{\"prompt\":\"a\",\"x\":1}", None, "numbers: x; name it with --label"),
            ("{\"prompt\":\" \",\"x\":1}", Some("x"), "empty \"prompt\""),
            ("{\"prompt\":\"a\",\"x\":1,\"raw_prompt\":3}", Some("x"), "no text under"),
            ("[1]", Some("x"), "element 1 is no JSON object"),
            (
                "{\"chosen\":\"a\",\"rejected\":\"b\"}\n{\"chosen\":\"a\"}",
                None,
                "line 2 has no text",
            ),
        ] {
            let e = read(text, label).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
