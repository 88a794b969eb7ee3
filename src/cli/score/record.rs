//! A line of the input: a text as it is, or an object that holds one or several; and the line of
//! its scores.

use crate::cli::batch::input::RawLine;
use crate::cli::batch::{check_length, line_text, object};
use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// What a line holds to be scored.
#[derive(Clone, Debug, PartialEq)]
pub struct TextRecord {
    pub id: Value,
    pub custom_id: Option<Value>,
    /// The plain prompt that the texts were made of, if it is known.
    pub raw_prompt: Option<String>,
    pub texts: Texts,
}

/// The texts of a line.
#[derive(Clone, Debug, PartialEq)]
pub enum Texts {
    /// One that is the line itself.
    Line(String),
    /// That of a record.
    One(String),
    /// A rewrite's candidates.
    Candidates(Vec<String>),
}

impl Texts {
    pub fn all(&self) -> &[String] {
        match self {
            Texts::Line(text) | Texts::One(text) => std::slice::from_ref(text),
            Texts::Candidates(texts) => texts,
        }
    }
}

impl TextRecord {
    /// Reads a line whose texts have at most `longest` bytes each.
    pub fn parse(raw: &RawLine, longest: usize) -> anyhow::Result<TextRecord> {
        let line = line_text(raw, longest)?;
        let mut record = TextRecord {
            id: json!(raw.number - 1),
            custom_id: None,
            raw_prompt: None,
            texts: Texts::Line(String::new()),
        };
        match object(line, raw.kind)? {
            None => record.texts = Texts::Line(line.to_owned()),
            Some(object) => record.take(&object)?,
        }
        let texts = record.texts.all();
        ensure!(!texts.is_empty(), "has no texts under \"candidates\"");
        for (i, text) in texts.iter().enumerate() {
            let which = match &record.texts {
                Texts::Candidates(_) => format!(" as candidate {}", i + 1),
                _ => String::new(),
            };
            ensure!(!text.trim().is_empty(), "has an empty text{which}");
            check_length(text, longest)?;
        }
        record.raw_prompt.iter().try_for_each(|raw| check_length(raw, longest))?;
        Ok(record)
    }

    /// Takes the texts of a record. One with candidates is a rewrite, whose prompt is the plain
    /// one.
    fn take(&mut self, object: &Map<String, Value>) -> anyhow::Result<()> {
        if let Some(id) = object.get("id") {
            self.id = id.clone();
        }
        self.custom_id = object.get("custom_id").cloned();
        let raw_prompt = text(object, "raw_prompt")?;
        match object.get("candidates").filter(|c| !c.is_null()) {
            Some(candidates) => {
                self.texts = Texts::Candidates(candidate_texts(candidates)?);
                self.raw_prompt = match raw_prompt {
                    Some(raw) => Some(raw),
                    None => text(object, "prompt")?,
                };
            }
            None => {
                let prompt = text(object, "prompt")?;
                let prompt = prompt.context("has no text under \"prompt\", and no candidates")?;
                self.texts = Texts::One(prompt);
                self.raw_prompt = raw_prompt;
            }
        }
        Ok(())
    }

    /// The line of these scores, each with all digits that tell it from others.
    pub fn render(&self, line: u64, scores: &[f32]) -> anyhow::Result<String> {
        #[derive(Serialize)]
        struct Scored<'a> {
            line: u64,
            id: &'a Value,
            #[serde(skip_serializing_if = "Option::is_none")]
            custom_id: &'a Option<Value>,
            #[serde(skip_serializing_if = "Option::is_none")]
            score: Option<f32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            scores: Option<&'a [f32]>,
        }
        let several = matches!(self.texts, Texts::Candidates(_));
        let scored = Scored {
            line,
            id: &self.id,
            custom_id: &self.custom_id,
            score: scores.first().copied().filter(|_| !several),
            scores: several.then_some(scores),
        };
        Ok(serde_json::to_string(&scored)? + "\n")
    }

    /// Whether a line of scores is one of this record.
    pub fn is_scored_by(&self, scored: &Value) -> bool {
        let several = matches!(self.texts, Texts::Candidates(_));
        let scores = scored.get("scores").and_then(Value::as_array).map(Vec::len);
        scored.get("id") == Some(&self.id)
            && scored.get("custom_id") == self.custom_id.as_ref()
            && scores == several.then_some(self.texts.all().len())
    }
}

/// The text under a name, if there is one; null is as good as nothing.
fn text(object: &Map<String, Value>, name: &str) -> anyhow::Result<Option<String>> {
    let Some(value) = object.get(name).filter(|v| !v.is_null()) else { return Ok(None) };
    let text = value.as_str().with_context(|| format!("has no text under \"{name}\""))?;
    ensure!(!text.contains('\0'), "has a NUL character under \"{name}\"; expected text");
    Ok(Some(text.to_owned()))
}

fn candidate_texts(candidates: &Value) -> anyhow::Result<Vec<String>> {
    let Some(list) = candidates.as_array() else {
        bail!("has no list under \"candidates\"; expected what `bprompt rewrite` writes");
    };
    list.iter()
        .enumerate()
        .map(|(i, candidate)| {
            let object = candidate.as_object();
            let text = object.map(|object| text(object, "text")).transpose();
            let text = text.with_context(|| format!("candidate {}", i + 1))?.flatten();
            text.with_context(|| format!("has no text under \"text\" of candidate {}", i + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::batch::input::LineKind;

    fn parse(line: &str, kind: LineKind) -> Result<TextRecord, String> {
        let raw = RawLine {
            number: 5,
            place: "in, line 5".into(),
            kind,
            bytes: line.as_bytes().to_vec(),
            too_long: false,
        };
        TextRecord::parse(&raw, 40).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn lines_records_and_rewrites_hold_their_texts() {
        let plain = parse(" a cat, 8k", LineKind::Text).unwrap();
        assert_eq!((&plain.id, plain.raw_prompt), (&json!(4), None));
        assert_eq!(plain.texts, Texts::Line(" a cat, 8k".into()));
        let record = r#"{"prompt": "a cat, 8k", "raw_prompt": "a cat", "id": "x", "score": 3}"#;
        let record = parse(record, LineKind::Either).unwrap();
        assert_eq!((&record.id, record.raw_prompt.as_deref()), (&json!("x"), Some("a cat")));
        assert_eq!(record.texts, Texts::One("a cat, 8k".into()));
        assert_eq!(record.render(7, &[0.1]).unwrap(), "{\"line\":7,\"id\":\"x\",\"score\":0.1}\n");
        let rewrite = r#"{"id": 0, "custom_id": "r", "prompt": "a cat",
            "candidates": [{"text": "a cat, 8k", "kept": 1}, {"text": "a cat, 4k"}]}"#;
        let rewrite = parse(rewrite, LineKind::Record).unwrap();
        assert_eq!(rewrite.raw_prompt.as_deref(), Some("a cat"));
        assert_eq!(rewrite.texts.all(), ["a cat, 8k", "a cat, 4k"]);
        let line = rewrite.render(1, &[1.0, -2.5]).unwrap();
        assert_eq!(line, "{\"line\":1,\"id\":0,\"custom_id\":\"r\",\"scores\":[1.0,-2.5]}\n");
        let scored: Value = serde_json::from_str(&line).unwrap();
        assert!(rewrite.is_scored_by(&scored) && !record.is_scored_by(&scored));
    }

    #[test]
    fn what_holds_no_text_is_named() {
        for (line, word) in [
            (r#"{"text": "a cat"}"#, "no text under \"prompt\""),
            (r#"{"prompt": 3}"#, "no text under \"prompt\""),
            (r#"{"prompt": " "}"#, "an empty text"),
            (r#"{"prompt": "a\u0000cat"}"#, "NUL"),
            (r#"{"prompt": "a cat", "raw_prompt": 5}"#, "no text under \"raw_prompt\""),
            (r#"{"candidates": []}"#, "no texts under \"candidates\""),
            (r#"{"candidates": "a cat"}"#, "no list under \"candidates\""),
            (r#"{"candidates": [{"text": "a"}, {"txt": "b"}]}"#, "of candidate 2"),
            (r#"{"candidates": [{"text": "a"}, {"text": ""}]}"#, "candidate 2"),
            (
                r#"{"prompt": "0123456789012345678901234567890123456789x"}"#,
                "41 bytes; --max-prompt-bytes allows 40",
            ),
        ] {
            let message = parse(line, LineKind::Record).unwrap_err();
            assert!(message.contains(word) && message.lines().count() == 1, "{message}");
        }
    }
}
