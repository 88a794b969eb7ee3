//! Plain prompts into rich ones that still mean the same.

mod assemble;
mod fidelity;
mod guard;
mod markup;
mod prompter;
mod style;

#[cfg(test)]
mod scaling_tests;

pub use assemble::Source;
pub use fidelity::Fidelity;
pub use guard::{
    Candidate, DEFAULT_MIN_KEPT, GuardOptions, Rewrite, Rewriting, Work, whole_characters,
};
pub use markup::PromptMarkup;
pub use prompter::Prompter;
pub use style::{Additions, Style};
