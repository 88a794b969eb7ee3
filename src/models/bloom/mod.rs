//! BLOOM (arXiv 2211.05100): ALiBi attention, layer norm after the embedding, tanh GELU, tied head.

mod config;
mod model;
pub mod train;

pub use crate::ops::Scratch;
pub use config::{BloomConfig, Parameter, alibi_slopes};
pub use model::Bloom;
