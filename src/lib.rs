//! BeautifulPrompt's engine: rewrites plain text-to-image prompts with BLOOM, and trains it.

#![warn(clippy::print_stdout, clippy::print_stderr)] // they panic; see `cli::print`

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod device;
pub mod engine;
pub mod error;
pub mod eval;
pub mod files;
pub mod generate;
pub mod memory;
pub mod models;
pub mod ops;
pub mod random;
pub mod rewrite;
pub mod selftest;
pub mod serve;
pub mod tensor;
pub mod text;
pub mod train;

pub use error::{Error, Result};
