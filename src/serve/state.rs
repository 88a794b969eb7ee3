//! What all handlers share.

use super::errors::ApiError;
use super::metrics::Metrics;
use super::worker::Engine;
use crate::models::bloom::BloomConfig;
use crate::models::generation_config::GenerationDefaults;
use crate::rewrite::Prompter;
use crate::text::Tokenizer;
use axum::extract::State;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub type StateArc = State<Arc<Shared>>;

pub struct Shared {
    pub engine: Engine,
    pub tokenizer: Arc<Tokenizer>,
    pub prompter: Prompter,
    pub defaults: GenerationDefaults,
    pub config: BloomConfig,
    /// What the model is called.
    pub name: String,
    pub created: u64,
    pub metrics: Arc<Metrics>,
    /// Longest time for a request.
    pub request_timeout: Option<Duration>,
    pub api_keys: Vec<String>,
    pub draining: AtomicBool,
}

impl Shared {
    /// Fails if a request asks for another model than there is.
    pub fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if name != self.name && !name.is_empty() => Err(ApiError::model_not_found(name, &self.name)),
            _ => Ok(()),
        }
    }

    /// Token ids of a plain prompt in the model's template; the error says what is wrong with it.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>, String> {
        self.prompter.encode(prompt).map_err(|e| e.to_string())
    }
}
