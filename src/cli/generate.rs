//! `bprompt generate`: continues a text as it is, without a template.

use super::batch::check_length;
use super::model::{ModelArgs, SamplingArgs};
use super::print;
use crate::engine::{EngineOptions, Sampling};
use crate::generate::generation_config::GenerationDefaults;
use crate::generate::{Length, Update};
use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;
use std::io::{IsTerminal, Read, Write};

#[derive(Args)]
pub struct GenerateArgs {
    /// Text to continue; without it, that of standard input.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Token ids to continue, separated by commas, instead of a text.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Option<Vec<u32>>,
    /// Print one JSON object: prompt_ids, prompt_logprobs, output_ids, text, logprobs,
    /// finish_reason.
    #[arg(long)]
    json: bool,
    /// Maximum bytes of the text, at least 1; a longer one is refused before it takes memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536)]
    max_prompt_bytes: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl GenerateArgs {
    /// The text of standard input, without the line's end that an editor or `echo` puts there.
    fn standard_input(&self) -> anyhow::Result<String> {
        let stdin = std::io::stdin();
        ensure!(
            !stdin.is_terminal(),
            "nothing to continue: give --prompt TEXT, --prompt-ids, or a text on standard input"
        );
        let mut bytes = Vec::new();
        // a byte more than allowed, with a line's end, is enough to know
        let most = (self.max_prompt_bytes as u64).saturating_add(3);
        stdin.lock().take(most).read_to_end(&mut bytes).context("standard input: cannot read")?;
        ensure!(
            bytes.len() < most as usize,
            "standard input is longer than the {} bytes that --max-prompt-bytes allows",
            self.max_prompt_bytes
        );
        let text = String::from_utf8(bytes).context("standard input: is not UTF-8")?;
        let text =
            text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text);
        ensure!(
            !text.is_empty(),
            "standard input holds no text; give --prompt TEXT, --prompt-ids, or a text there"
        );
        Ok(text.to_owned())
    }

    pub fn run(self) -> anyhow::Result<()> {
        let prompt = match (&self.prompt, &self.prompt_ids) {
            (Some(text), _) => text.clone(),
            (None, Some(_)) => String::new(),
            (None, None) => self.standard_input()?,
        };
        check_length(&prompt, self.max_prompt_bytes)?;
        let loaded = self.model.load()?;
        // a plain interface: the model's distribution as it is, unless flags say otherwise
        let defaults = GenerationDefaults {
            sampling: Sampling { temperature: 1.0, ..Sampling::default() },
            length: Length::New(128),
        };
        let mut options = self.sampling.options(&defaults, 1)?;
        options.prompt_logprobs = self.json;
        let ids = match &self.prompt_ids {
            Some(ids) => ids.clone(),
            None => loaded.tokenizer.encode(&prompt)?,
        };
        let cache_tokens = options.cache_tokens(ids.len(), loaded.config.context);
        let engine = EngineOptions { cache_tokens, ..EngineOptions::default() };
        let mut session = loaded.session(engine)?;
        session.submit(0, ids, &options)?;
        let mut out = print::stdout();
        let mut write_error = None;
        let mut done = Vec::new();
        while !session.is_idle() && write_error.is_none() {
            let outcomes = session.step(&mut |update| {
                if let (false, Update::Text { text, .. }) = (self.json, update) {
                    write_error = write!(out, "{text}").and_then(|()| out.flush()).err();
                }
            })?;
            for outcome in outcomes {
                done.push(outcome?);
            }
        }
        if let Some(e) = write_error {
            return Err(e.into());
        }
        if !self.json {
            writeln!(out)?;
            return Ok(());
        }
        let completed = done.pop().expect("the one prompt is done");
        let candidate = &completed.candidates[0];
        let object = json!({
            "prompt_ids": completed.prompt_ids,
            "prompt_logprobs": completed.prompt_scores.iter().map(|s| s.0).collect::<Vec<f32>>(),
            "output_ids": candidate.token_ids(),
            "text": candidate.text,
            "logprobs": candidate.logprobs(),
            "finish_reason": candidate.finish,
        });
        writeln!(out, "{object}")?;
        Ok(())
    }
}
