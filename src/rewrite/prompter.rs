//! Prompts as a model is asked.

use crate::error::{Error, Result};
use crate::text::Tokenizer;
use crate::text::template::Template;
use std::sync::Arc;

/// Puts plain prompts into a model's template.
#[derive(Clone)]
pub struct Prompter {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The template that prompts are put into.
    pub template: Template,
}

impl Prompter {
    /// Token ids of a plain prompt in its template.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        if prompt.trim().is_empty() {
            return Err(Error::invalid("the prompt is empty; expected a few words"));
        }
        self.tokenizer.encode_literal(&self.template.apply(prompt))
    }
}
