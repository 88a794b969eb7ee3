//! Plain prompts into rich ones that still mean the same.

mod assemble;
mod guard;
mod kept;
mod style;
mod verbatim;

#[cfg(test)]
mod scaling_tests;

pub use guard::{
    Candidate, DEFAULT_MIN_KEPT, GuardOptions, Rewrite, Rewriting, Source, Work, whole_characters,
};
pub use kept::Kept;
pub use style::{Additions, Style};
pub use verbatim::Verbatim;

use crate::error::{Error, Result};
use crate::text::Tokenizer;
use crate::text::template::Template;
use std::sync::Arc;

/// Puts plain prompts into a model's template.
#[derive(Clone)]
pub struct Prompter {
    pub tokenizer: Arc<Tokenizer>,
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
