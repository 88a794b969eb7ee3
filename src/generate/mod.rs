//! Generation: prompts in, texts out, by an engine with a tokenizer around it.

pub mod generation_config;
pub mod options;
pub mod session;
pub mod text;

pub use options::{GenerateOptions, Length};
pub use session::{Completed, Continuation, Failed, Generate, PromptResult, Session, Update};
