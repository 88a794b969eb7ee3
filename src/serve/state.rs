//! What all handlers share.

use super::engine::EngineHandle;
use super::errors::ApiError;
use super::metrics::ServerMetrics;
use super::pool::TextPool;
use crate::generate::generation_config::GenerationDefaults;
use crate::models::bloom::BloomConfig;
use crate::rewrite::Prompter;
use crate::text::Tokenizer;
use axum::extract::State;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub type StateArc = State<Arc<Shared>>;

/// The model that is served, and how it is served.
pub struct Shared {
    /// Where prompts are handed in.
    pub engine: EngineHandle,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Puts plain prompts into the model's template.
    pub prompter: Prompter,
    /// Settings for what a request leaves open.
    pub defaults: GenerationDefaults,
    /// The model's configuration.
    pub config: BloomConfig,
    /// What the model is called.
    pub name: String,
    /// When the server was started, in seconds since the Unix epoch.
    pub created: u64,
    /// What `/metrics` tells.
    pub metrics: Arc<ServerMetrics>,
    /// Longest time for a request.
    pub request_timeout: Option<Duration>,
    /// How long the engine may stand still before it counts as stuck.
    pub stall_timeout: Option<Duration>,
    /// Keys of which a request must bring one; none are asked for if this is empty.
    pub api_keys: Vec<String>,
    /// Whether the server is shutting down.
    pub draining: AtomicBool,
    /// Where long texts are read.
    pub texts: TextPool,
    /// Bytes of the vocabulary's longest token.
    pub longest_token: usize,
}

impl Shared {
    /// Fails if a request asks for another model than there is.
    pub fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if name != self.name && !name.is_empty() => {
                Err(ApiError::model_not_found(name, &self.name))
            }
            _ => Ok(()),
        }
    }

    /// Fails, without reading it, if a text is longer than the longest tokens could make the
    /// model's whole context.
    pub fn check_length(&self, field: &str, text: &str) -> Result<(), ApiError> {
        let (bytes, context) = (text.len(), self.config.context);
        if bytes <= context.saturating_mul(self.longest_token.max(1)) {
            return Ok(());
        }
        let message = format!(
            "{field} has {bytes} bytes, more than the model's context of {context} tokens can hold"
        );
        Err(ApiError::field(field, message))
    }

    /// What keeps the server from serving, if something does.
    pub fn trouble(&self) -> Option<String> {
        self.engine.trouble(self.stall_timeout)
    }

    /// Token ids of a plain prompt in the model's template; the error says what is wrong with it.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>, String> {
        self.prompter.encode(prompt).map_err(|e| e.to_string())
    }
}
