//! The arguments that hold a rewrite to its prompt.

use crate::engine::session::GenerateOptions;
use crate::rewrite::GuardOptions;
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use anyhow::{Context, ensure};
use clap::Args;
use std::path::Path;
use std::sync::Arc;

#[derive(Args, Clone, Debug)]
pub struct GuardArgs {
    /// Words or phrases that every rewrite must hold, separated by commas.
    #[arg(long, value_name = "PHRASES", value_delimiter = ',')]
    pub keep: Vec<String>,
    /// Words or phrases that no rewrite may hold, separated by commas; or a file with one a line.
    #[arg(long, value_name = "PHRASES|FILE")]
    pub ban: Vec<String>,
    /// Least part of the prompt's meaning that a rewrite keeps, from 0 to 1; else it falls back on the prompt.
    #[arg(long, value_name = "PART")]
    pub min_kept: Option<f64>,
    /// How often to generate before falling back.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Most tokens as CLIP counts them; 77 fill Stable Diffusion's text encoder.
    #[arg(long, value_name = "TOKENS")]
    pub max_clip_tokens: Option<usize>,
}

impl GuardArgs {
    /// The guard, with the phrases to keep and to ban put into `options`.
    pub fn options(&self, options: &mut GenerateOptions) -> anyhow::Result<GuardOptions> {
        if let Some(kept) = self.min_kept {
            ensure!((0.0..=1.0).contains(&kept), "--min-kept {kept} is outside [0, 1]");
        }
        ensure!((1..=100).contains(&self.rounds), "--rounds {} is outside [1, 100]", self.rounds);
        if let Some(n) = self.max_clip_tokens {
            ensure!(n >= 3, "--max-clip-tokens {n} is too few; the first and the last token always count");
        }
        let mut ban = Vec::new();
        for item in &self.ban {
            match Path::new(item).is_file() {
                true => {
                    let text = std::fs::read_to_string(item).with_context(|| format!("--ban {item}: cannot read"))?;
                    ban.extend(text.lines().map(str::to_owned));
                }
                false => ban.extend(item.split(',').map(str::to_owned)),
            }
        }
        options.keep = Arc::new(Literals::new(&self.keep));
        options.ban = Arc::new(Phrases::new(ban));
        Ok(GuardOptions {
            min_kept: self.min_kept,
            rounds: self.rounds,
            max_clip_tokens: self.max_clip_tokens,
            count_clip_tokens: false,
        })
    }
}
