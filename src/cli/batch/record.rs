//! A line of the input: a prompt as it is, or an object that holds one, with settings of its own.

use super::input::{LineKind, RawLine};
use crate::cli::model::check_sampling;
use crate::generate::{GenerateOptions, Length};
use crate::random::{Derived, derived_seed};
use crate::rewrite::GuardOptions;
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use anyhow::{Context, anyhow, bail, ensure};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

/// A line of the input that holds a prompt.
#[derive(Clone, Debug)]
pub struct Line {
    pub number: u64,
    pub place: String,
    pub id: Value,
    pub prompt: String,
    pub options: GenerateOptions,
    pub guard: GuardOptions,
}

/// What holds for lines without settings of their own, and for all.
pub struct Common<'a> {
    pub options: &'a GenerateOptions,
    pub guard: &'a GuardOptions,
    /// Maximum bytes of a prompt.
    pub longest: usize,
    /// Whether every line has as many candidates.
    pub same_candidates: bool,
    /// Whether there is one prompt and no file: it has the seed that was asked for.
    pub alone: bool,
}

impl Common<'_> {
    pub fn parse(&self, raw: RawLine) -> anyhow::Result<Line> {
        let text = line_text(&raw, self.longest)?;
        let mut line = Line {
            number: raw.number,
            place: raw.place.clone(),
            id: json!(raw.number - 1),
            prompt: String::new(),
            options: self.options.clone(),
            guard: self.guard.clone(),
        };
        if !self.alone {
            // the same line comes out the same in any part of the input
            let s = &mut line.options.sampling;
            s.seed = derived_seed(s.seed, Derived::Prompt, line.number);
        }
        match object(text, raw.kind)? {
            None => line.prompt = text.to_owned(),
            Some(object) => self.take(&object, &mut line)?,
        }
        check_length(&line.prompt, self.longest)?;
        Ok(line)
    }

    /// Takes a record's prompt and its own settings; fields of other names are other people's.
    fn take(&self, object: &Map<String, Value>, line: &mut Line) -> anyhow::Result<()> {
        let prompt = ["prompt", "raw_prompt"].iter().find_map(|k| object.get(*k));
        let prompt = prompt.and_then(Value::as_str).context("has no text under \"prompt\"")?;
        ensure!(!prompt.contains('\0'), "has a NUL character under \"prompt\"; expected text");
        line.prompt = prompt.to_owned();
        if let Some(id) = object.get("id") {
            line.id = id.clone();
        }
        let fields = Fields(object);
        let options = &mut line.options;
        let s = &mut options.sampling;
        fields.number("temperature", &mut s.temperature)?;
        fields.number("top_p", &mut s.top_p)?;
        fields.number("min_p", &mut s.min_p)?;
        fields.number("repetition_penalty", &mut s.repetition_penalty)?;
        fields.number("presence_penalty", &mut s.presence_penalty)?;
        fields.number("frequency_penalty", &mut s.frequency_penalty)?;
        if let Some(k) = fields.whole("top_k", -1)? {
            s.top_k = k.max(0) as usize;
        }
        if let Some(seed) = fields.get("seed") {
            s.seed =
                seed.as_u64().with_context(|| wrong("seed", seed, "a whole number, 0 or more"))?;
        }
        check_sampling(s, |name| format!("\"{name}\""))?;
        if let Some(n) = fields.whole("n", 1)? {
            ensure!(n <= 1024, "has {n} as \"n\"; expected at most 1024");
            let same = !self.same_candidates || n == i64::from(self.options.candidates);
            ensure!(
                same,
                "has its own \"n\", but text has equally many lines for each prompt; write JSON \
                lines instead"
            );
            options.candidates = n as u32;
        }
        if let Some(tokens) = fields.whole("max_tokens", 1)? {
            options.length = Length::New(tokens as usize);
        }
        if let Some(stops) = fields.texts("stop")? {
            options.stops = stops;
        }
        if let Some(keep) = fields.phrases("keep")? {
            options.keep = Arc::new(Literals::new(&keep));
        }
        if let Some(ban) = fields.phrases("ban")? {
            options.ban = Arc::new(Phrases::checked(ban).map_err(|e| anyhow!("\"ban\" {e}"))?);
        }
        if let Some(kept) = fields.get("min_kept") {
            let part = kept.as_f64().filter(|k| (0.0..=1.0).contains(k));
            let part = part.with_context(|| wrong("min_kept", kept, "a number from 0 to 1"))?;
            line.guard.min_kept = (part > 0.0).then_some(part);
        }
        Ok(())
    }
}

/// A line's text, if it is text and not far longer than `longest` bytes.
pub fn line_text(raw: &RawLine, longest: usize) -> anyhow::Result<&str> {
    ensure!(!raw.too_long, too_long(longest, None));
    text(&raw.bytes)
}

/// A line's text, if it is text.
pub fn text(bytes: &[u8]) -> anyhow::Result<&str> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let wide = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
        let remedy = if wide { "; it looks like UTF-16, convert the file to UTF-8" } else { "" };
        anyhow!("is not UTF-8 from its byte {} on{remedy}", e.valid_up_to() + 1)
    })?;
    ensure!(!text.contains('\0'), "has a NUL character; expected text");
    Ok(text)
}

/// The object that a line is, or `None` if it is a prompt as it stands.
pub fn object(text: &str, kind: LineKind) -> anyhow::Result<Option<Map<String, Value>>> {
    let looks = text.trim_start().starts_with('{');
    match (serde_json::from_str::<Value>(text), kind) {
        (Ok(Value::Object(object)), _) => Ok(Some(object)),
        // a number or a quotation may well be a prompt where lines are text
        (_, LineKind::Text) => Ok(None),
        (Ok(other), _) => {
            let what = match other {
                Value::Array(_) => "array",
                Value::String(_) => "string",
                Value::Number(_) => "number",
                _ => "constant",
            };
            bail!(
                "is a JSON {what}; expected an object such as {{\"prompt\": \"a cat\"}} (--format \
                text takes lines as they are)"
            )
        }
        (Err(e), LineKind::Either) if looks => Err(e).context("is not JSON"),
        (Err(_), LineKind::Either) => Ok(None),
        (Err(e), LineKind::Record) => Err(e).context(
            "is not JSON, as its file's name says; expected an object such as \
                {\"prompt\": \"a cat\"}",
        ),
    }
}

/// Refuses a prompt before anything is done with it that takes memory.
pub fn check_length(prompt: &str, longest: usize) -> anyhow::Result<()> {
    ensure!(prompt.len() <= longest, too_long(longest, Some(prompt.len())));
    Ok(())
}

/// Refuses a file's prompts if one of them is too long.
pub fn check_lengths(file: &Path, prompts: &[String], longest: usize) -> anyhow::Result<()> {
    let mut numbered = prompts.iter().enumerate();
    numbered.try_for_each(|(i, prompt)| {
        check_length(prompt, longest)
            .with_context(|| format!("{}, prompt {}", file.display(), i + 1))
    })
}

fn too_long(longest: usize, found: Option<usize>) -> String {
    match found {
        Some(bytes) => {
            format!("has a prompt of {bytes} bytes; --max-prompt-bytes allows {longest}")
        }
        None => format!(
            "is far longer than the {longest} bytes that --max-prompt-bytes allows a prompt"
        ),
    }
}

fn wrong(name: &str, value: &Value, expected: &str) -> String {
    let mut value = value.to_string();
    if let Some((at, _)) = value.char_indices().nth(60) {
        value.replace_range(at.., "…");
    }
    format!("has {value} as \"{name}\"; expected {expected}")
}

/// A record's fields; null is as good as nothing.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn number(&self, name: &str, to: &mut f32) -> anyhow::Result<()> {
        if let Some(value) = self.get(name) {
            *to = value.as_f64().with_context(|| wrong(name, value, "a number"))? as f32;
        }
        Ok(())
    }

    fn whole(&self, name: &str, least: i64) -> anyhow::Result<Option<i64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_i64().filter(|n| *n >= least);
        Ok(Some(
            number.with_context(|| {
                wrong(name, value, &format!("a whole number of at least {least}"))
            })?,
        ))
    }

    /// One text or a list of them.
    fn texts(&self, name: &str) -> anyhow::Result<Option<Vec<String>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let texts = match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        Ok(Some(texts.with_context(|| wrong(name, value, "a text or a list of texts"))?))
    }

    /// A list of phrases, or one text with commas between them.
    fn phrases(&self, name: &str) -> anyhow::Result<Option<Vec<String>>> {
        let split =
            |text: &String| text.split(',').map(str::trim).map(str::to_owned).collect::<Vec<_>>();
        let texts = self.texts(name)?;
        Ok(texts.map(|t| if self.0[name].is_string() { split(&t[0]) } else { t }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8], kind: LineKind) -> Result<Line, String> {
        let (options, guard) = Default::default();
        let common = Common {
            options: &options,
            guard: &guard,
            longest: 40,
            same_candidates: false,
            alone: false,
        };
        let raw = RawLine {
            number: 5,
            place: "in, line 5".into(),
            kind,
            bytes: text.to_vec(),
            too_long: false,
        };
        common.parse(raw).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn prompts_and_records_are_told_apart() {
        use LineKind::{Either, Record, Text};
        let prompt = |text: &str, kind| parse(text.as_bytes(), kind).map(|l| l.prompt);
        for kind in [Either, Record, Text] {
            assert_eq!(prompt(r#"{"prompt": "a cat", "other": [1]}"#, kind), Ok("a cat".into()));
            assert!(
                prompt(r#"{"other": 1}"#, kind).unwrap_err().contains("no text under \"prompt\"")
            );
        }
        for (text, what) in [
            ("[\"a cat\"]", "array"),
            ("\"a cat\"", "string"),
            ("42", "number"),
            ("null", "constant"),
        ] {
            assert!(prompt(text, Either).unwrap_err().contains(what));
            assert!(prompt(text, Record).unwrap_err().contains("expected an object"));
            assert_eq!(prompt(text, Text), Ok(text.into()), "text is text");
        }
        assert_eq!(prompt("{red|blue} cat", Text), Ok("{red|blue} cat".into()));
        assert_eq!(prompt("[rain], a cat", Either), Ok("[rain], a cat".into()));
        assert!(prompt("{\"prompt\": ", Either).unwrap_err().contains("is not JSON"));
        assert!(prompt("a cat", Record).unwrap_err().contains("is not JSON"));
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        for (bytes, word) in [
            (&b"a \xff cat"[..], "not UTF-8 from its byte 3"),
            (b"\xff\xfea\0", "UTF-16"),
            (b"a\0cat", "NUL"),
            (br#"{"prompt": "a\u0000cat"}"#, "NUL"),
            (
                b"0123456789012345678901234567890123456789x",
                "41 bytes; --max-prompt-bytes allows 40",
            ),
        ] {
            let message = parse(bytes, LineKind::Either).unwrap_err();
            assert!(message.contains(word) && message.lines().count() == 1, "{message}");
        }
    }

    #[test]
    fn records_have_settings_of_their_own() {
        let record = br#"{"prompt": "a cat", "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": -1,
            "min_p": 0.1, "seed": 8, "repetition_penalty": 1.1, "presence_penalty": 1,
            "frequency_penalty": -1, "max_tokens": 9, "stop": "x", "keep": "red umbrella, fog",
            "ban": ["art"], "min_kept": 0.5, "id": null, "wind": 3}"#;
        let line = parse(record, LineKind::Record).unwrap();
        let (o, s) = (&line.options, &line.options.sampling);
        assert_eq!((o.candidates, o.length, s.top_k, s.seed), (3, Length::New(9), 0, 8));
        assert_eq!((s.temperature, s.top_p, s.min_p, s.repetition_penalty), (0.5, 0.9, 0.1, 1.1));
        assert_eq!((s.presence_penalty, s.frequency_penalty), (1.0, -1.0));
        assert_eq!((o.stops.as_slice(), line.guard.min_kept), (&["x".to_owned()][..], Some(0.5)));
        assert_eq!(o.keep.missing("fog"), ["red umbrella"]);
        assert!(o.ban.find("an art").is_some());
        for (field, word) in [
            (r#""n": 0"#, "at least 1"),
            (r#""n": 2000"#, "at most 1024"),
            (r#""temperature": "hot""#, "has \"hot\" as \"temperature\"; expected a number"),
            (r#""temperature": -1"#, "\"temperature\" -1"),
            (r#""top_p": 0"#, "\"top_p\""),
            (r#""top_k": 1.5"#, "\"top_k\""),
            (r#""max_tokens": 0"#, "\"max_tokens\""),
            (r#""seed": -1"#, "\"seed\""),
            (r#""min_kept": 2"#, "\"min_kept\""),
            (r#""stop": 5"#, "\"stop\""),
            (r#""keep": [1]"#, "\"keep\""),
            (r#""presence_penalty": 3"#, "\"presence_penalty\""),
        ] {
            let message =
                parse(format!("{{\"prompt\": \"a cat\", {field}}}").as_bytes(), LineKind::Record)
                    .unwrap_err();
            assert!(message.contains(word) && message.lines().count() == 1, "{message}");
        }
    }
}
