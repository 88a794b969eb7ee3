//! BLOOM (arXiv 2211.05100): ALiBi attention, layer norm after the embedding, tanh GELU, tied LM
//! head.

mod checkpoint;
mod config;
mod inference;
mod parameters;
pub mod training;

pub use checkpoint::{BloomCheckpoint, save_model};
pub use config::{
    BloomConfig, MAX_CONTEXT, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY, alibi_slopes,
};
pub use inference::Bloom;
pub use parameters::{BloomLayerParameters, BloomParameters};
