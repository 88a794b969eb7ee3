//! `generation_config.json`: the sampling settings a model recommends.

use super::options::Length;
use crate::engine::Sampling;
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

#[derive(Clone, Debug, Default, Deserialize)]
struct Stored {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<usize>,
    max_length: Option<usize>,
}

impl Stored {
    /// The ranges of the flags of the same names.
    fn check(&self) -> std::result::Result<(), String> {
        let above_zero = |most: f32| move |v: f32| v > 0.0 && v <= most;
        let in_range =
            |name: &str, value: Option<f32>, fits: &dyn Fn(f32) -> bool, range: &str| match value {
                Some(v) if !fits(v) => Err(format!("{name} is {v}, expected a number in {range}")),
                _ => Ok(()),
            };
        in_range("temperature", self.temperature, &|v| (0.0..=100.0).contains(&v), "[0, 100]")?;
        in_range("top_p", self.top_p, &above_zero(1.0), "(0, 1]")?;
        in_range("min_p", self.min_p, &|v| (0.0..=1.0).contains(&v), "[0, 1]")?;
        in_range("repetition_penalty", self.repetition_penalty, &above_zero(100.0), "(0, 100]")
    }
}

/// Sampling and length that hold where a user says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerationDefaults {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Maximum tokens of a continuation.
    pub length: Length,
}

impl Default for GenerationDefaults {
    /// What BeautifulPrompt's model card recommends.
    fn default() -> Self {
        GenerationDefaults {
            sampling: Sampling {
                temperature: 1.0,
                top_k: 50,
                top_p: 0.95,
                repetition_penalty: 1.2,
                ..Sampling::default()
            },
            length: Length::Total(384),
        }
    }
}

impl GenerationDefaults {
    /// Those of a file, if it exists; what it leaves out is as in BeautifulPrompt's card.
    pub fn read(path: &Path) -> Result<GenerationDefaults> {
        if matches!(std::fs::metadata(path), Err(e) if e.kind() == std::io::ErrorKind::NotFound) {
            return Ok(GenerationDefaults::default());
        }
        GenerationDefaults::parse(&crate::files::read(path, "does not exist")?)
            .map_err(|e| Error::file(path, e))
    }

    /// Parses the text of a `generation_config.json`; the error says what is wrong with it.
    pub fn parse(text: &[u8]) -> std::result::Result<GenerationDefaults, String> {
        let s: Stored =
            serde_json::from_slice(text).map_err(|e| format!("not a generation config: {e}"))?;
        s.check()?;
        let d = GenerationDefaults::default();
        let greedy = s.do_sample == Some(false);
        Ok(GenerationDefaults {
            sampling: Sampling {
                temperature: if greedy {
                    0.0
                } else {
                    s.temperature.unwrap_or(d.sampling.temperature)
                },
                top_k: s.top_k.unwrap_or(d.sampling.top_k),
                top_p: s.top_p.unwrap_or(d.sampling.top_p),
                min_p: s.min_p.unwrap_or(d.sampling.min_p),
                repetition_penalty: s.repetition_penalty.unwrap_or(d.sampling.repetition_penalty),
                ..d.sampling
            },
            length: match (s.max_new_tokens, s.max_length) {
                (Some(n), _) => Length::New(n.max(1)),
                // 20 is what transformers writes for "not set"
                (None, Some(n)) if n > 20 => Length::Total(n),
                _ => d.length,
            },
        })
    }
}
