//! BLOOM (arXiv 2211.05100): ALiBi attention, layer norm after the embedding, tanh GELU, tied head.

mod config;
pub mod train;

pub use config::{BloomConfig, Parameter, alibi_slopes};
