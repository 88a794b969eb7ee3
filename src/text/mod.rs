//! Text in and out of the model: tokenizer, templates, content words.

pub mod artists;
pub mod clip;
pub mod content_words;
mod coverage;
pub mod literals;
pub mod mediums;
pub mod phrases;
pub mod template;
mod tokenizer;
mod tokenizer_training;

pub use coverage::straighten;
pub use tokenizer::{Decoder, Tokenizer};
pub use tokenizer_training::{PRE_TOKENIZER_PATTERN, train_tokenizer};
