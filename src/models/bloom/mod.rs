//! BLOOM (arXiv 2211.05100): ALiBi attention, layer norm after the embedding, tanh GELU, tied head.

mod config;
mod model;
pub mod train;

pub use crate::ops::Scratch;
pub use config::{
    BloomConfig, MOST_CONTEXT, MOST_HEADS, MOST_HIDDEN, MOST_LAYERS, MOST_VOCABULARY, Parameter,
    alibi_slopes,
};
pub use model::Bloom;
