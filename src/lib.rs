//! BeautifulPrompt's engine: rewrites plain text-to-image prompts with BLOOM, and trains it.
//!
//! The program `bprompt` is this library behind a command line. A rewrite in a few lines:
//!
//! ```
//! use beautiful_prompt::engine::EngineOptions;
//! use beautiful_prompt::generate::{Generate, GenerateOptions, Length, Session};
//! use beautiful_prompt::models::{bloom::Bloom, embedded};
//! use beautiful_prompt::ops::cpu::{Cpu, simd::Isa};
//! use beautiful_prompt::rewrite::Prompter;
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let cpu = Cpu::new(1, Isa::detect());
//! let model = Bloom::load(&cpu, embedded::checkpoint(), None)?;
//! let tokenizer = Arc::new(embedded::tokenizer());
//! let prompter = Prompter { tokenizer: tokenizer.clone(), template: embedded::template() };
//! let mut session = Session::new(&cpu, &model, &tokenizer, EngineOptions::default())?;
//! let options = GenerateOptions { length: Length::New(16), ..GenerateOptions::default() };
//! session.submit(0, prompter.encode("a cat in the rain")?, &options)?;
//! while !session.is_idle() {
//!     for done in session.step(&mut |_| {})? {
//!         assert!(!done?.candidates[0].text.is_empty());
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! From the bottom up: [`tensor`] and [`error`]; [`device`], where memory lives and kernels are
//! launched; [`checkpoint`], tensors by name; [`ops`], the operations that models are written in,
//! on the CPU and on CUDA; [`models`]; [`engine`], which schedules requests; [`generate`], texts in
//! and out; [`rewrite`], what keeps the meaning; [`rewards`], what rates it; [`train`], [`serve`],
//! [`eval`] and [`mod@bench`] on top. `examples/custom_model.rs` writes a model of its own in the
//! operations.

#![warn(missing_docs)]
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
pub mod rewards;
pub mod rewrite;
pub mod selftest;
pub mod serve;
pub mod tensor;
pub mod text;
pub mod train;

pub use error::{Error, Result};
