//! The arguments of the engine.

use super::within;
use crate::engine::EngineOptions;
use anyhow::ensure;
use clap::Args;

/// How much the engine does at once.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Maximum tokens of one forward pass, at least 1.
    #[arg(long, value_name = "N", default_value_t = 512, env = "BPROMPT_BATCH_TOKENS")]
    pub batch_tokens: usize,
    /// Maximum sequences that run at once, at least 1.
    #[arg(long, value_name = "N", default_value_t = 32, env = "BPROMPT_SEQUENCES")]
    pub sequences: usize,
    /// Positions that the KV cache holds, at least 1; room for all sequences if not given.
    #[arg(long, value_name = "N", env = "BPROMPT_CACHE_TOKENS")]
    pub cache_tokens: Option<usize>,
    /// Compute every prompt from its beginning.
    #[arg(long, env = "BPROMPT_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Maximum tokens guessed ahead of a sequence, which changes no result; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 4, env = "BPROMPT_DRAFT_TOKENS")]
    pub draft_tokens: usize,
}

impl EngineArgs {
    pub fn options(&self) -> anyhow::Result<EngineOptions> {
        within("--batch-tokens", self.batch_tokens, 1..=1 << 30, "[1, 1073741824]")?;
        within("--sequences", self.sequences, 1..=1 << 20, "[1, 1048576]")?;
        ensure!(self.cache_tokens != Some(0), "--cache-tokens must be at least 1");
        ensure!(
            self.draft_tokens <= 64,
            "--draft-tokens {} is too many; 64 at most",
            self.draft_tokens
        );
        Ok(EngineOptions {
            cache_tokens: self.cache_tokens.unwrap_or(self.sequences.saturating_mul(512)),
            batch_tokens: self.batch_tokens,
            sequences: self.sequences,
            prefix_cache: !self.no_prefix_cache,
            draft_tokens: self.draft_tokens,
        })
    }
}
