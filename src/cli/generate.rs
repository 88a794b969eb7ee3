//! `bprompt generate`: continues a text as it is, without a template.

use super::model::{ModelArgs, SamplingArgs};
use super::print;
use crate::engine::session::{Length, Update};
use crate::engine::{EngineOptions, Sampling};
use crate::models::generation_config::GenerationDefaults;
use clap::Args;
use serde_json::json;
use std::io::Write;

#[derive(Args)]
pub struct GenerateArgs {
    /// Text to continue.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_ids", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Token ids to continue, separated by commas, instead of a text.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Option<Vec<u32>>,
    /// Print one JSON object: prompt_ids, prompt_logprobs, output_ids, text, logprobs, finish_reason.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl GenerateArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let loaded = self.model.load()?;
        // a plain interface: the model's distribution as it is, unless flags say otherwise
        let defaults = GenerationDefaults {
            sampling: Sampling { temperature: 1.0, ..Sampling::default() },
            length: Length::New(128),
        };
        let mut options = self.sampling.options(&defaults, 1)?;
        options.prompt_logprobs = self.json;
        let ids = match (&self.prompt, &self.prompt_ids) {
            (Some(text), _) => loaded.tokenizer.encode(text)?,
            (None, Some(ids)) => ids.clone(),
            (None, None) => unreachable!("the parser asks for one of them"),
        };
        let engine = EngineOptions { cache_tokens: options.cache_tokens(ids.len()), ..EngineOptions::default() };
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
