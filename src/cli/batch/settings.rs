//! The settings that an output was made with, kept beside it as `NAME.settings.json`, so that
//! `--resume` mixes nothing.

use super::target::settings_path;
use crate::checkpoint::write_atomic;
use crate::engine::Sampling;
use crate::files::as_read;
use crate::generate::Length;
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Values by the flags that set them.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Settings(pub Map<String, Value>);

impl Settings {
    /// What an output was made with, if that is known.
    pub fn read(output: &Path) -> anyhow::Result<Option<Settings>> {
        let path = settings_path(output);
        if !path.exists() {
            return Ok(None);
        }
        let text =
            std::fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let values = serde_json::from_slice(&text);
        Ok(Some(Settings(
            values.with_context(|| format!("{}: expected a JSON object", path.display()))?,
        )))
    }

    pub fn write(&self, output: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(&self.0).expect("settings are JSON");
        Ok(write_atomic(&settings_path(output), |w| writeln!(w, "{text}"))?)
    }

    /// Adds how tokens are drawn, and how many.
    pub fn add_sampling(&mut self, s: &Sampling, length: Length) {
        let length = match length {
            Length::New(n) => json!(n),
            Length::Total(n) => json!(format!("{n} with the prompt")),
        };
        let values = [
            ("temperature", json!(s.temperature)),
            ("top-k", json!(s.top_k)),
            ("top-p", json!(s.top_p)),
            ("min-p", json!(s.min_p)),
            ("repetition-penalty", json!(s.repetition_penalty)),
            ("penalty-scope", json!(if s.penalize_prompt { "all" } else { "output" })),
            ("presence-penalty", json!(s.presence_penalty)),
            ("frequency-penalty", json!(s.frequency_penalty)),
            ("max-tokens", length),
        ];
        self.0.extend(values.map(|(flag, value)| (flag.to_owned(), value)));
    }

    pub fn get(&self, flag: &str) -> &Value {
        self.0.get(flag).unwrap_or(&Value::Null)
    }

    /// Refuses to go on with an output that was begun with other settings, and names the first of
    /// them. Inputs may have become more.
    pub fn check(&self, begun: &Settings, output: &str) -> anyhow::Result<()> {
        let flags = self.0.keys().chain(begun.0.keys().filter(|k| !self.0.contains_key(*k)));
        for flag in flags {
            let (before, now) = (begun.get(flag), &as_read(self.get(flag)));
            let more_inputs = || match (before.as_array(), now.as_array()) {
                (Some(before), Some(now)) => flag == "input" && now.starts_with(before),
                _ => false,
            };
            if before != now && !more_inputs() {
                bail!(
                    "{output}: was begun with other settings: --{flag} {} then, {} now; give it as \
                    it was, or begin anew \
                     with --force",
                    shown(before),
                    shown(now)
                );
            }
        }
        Ok(())
    }
}

/// A value on one short line.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => "not set".to_owned(),
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    };
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_differs_is_named() {
        let of = |value: Value| Settings(value.as_object().unwrap().clone());
        let begun = of(json!({ "seed": 3, "stop": [], "input": [{ "name": "a" }] }));
        begun.check(&begun, "out").unwrap();
        of(json!({ "seed": 3, "stop": [], "input": [{ "name": "a" }, { "name": "b" }] }))
            .check(&begun, "out")
            .unwrap();
        for (now, flag) in [
            (json!({ "seed": 4, "stop": [], "input": [{ "name": "a" }] }), "--seed 3 then, 4 now"),
            (json!({ "seed": 3, "stop": ["x"], "input": [{ "name": "a" }] }), "--stop"),
            (json!({ "seed": 3, "stop": [], "input": [{ "name": "b" }] }), "--input"),
            (json!({ "seed": 3, "input": [{ "name": "a" }] }), "--stop [] then, not set now"),
            (
                json!({ "seed": 3, "stop": [], "input": [{ "name": "a" }], "style": "photo" }),
                "--style not set",
            ),
        ] {
            let message = of(now).check(&begun, "out").unwrap_err().to_string();
            assert!(message.contains(flag) && message.lines().count() == 1, "{message}");
        }
    }
}
