//! BLOOM (arXiv 2211.05100): ALiBi attention, layer norm after the embedding, tanh GELU, tied LM
//! head.

mod checkpoint;
mod config;
mod heads;
mod inference;
mod parameters;
mod reward;
pub mod training;
mod workspace;

pub use checkpoint::{BloomCheckpoint, save_model};
pub use config::{
    Architecture, BloomConfig, MAX_CONTEXT, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY,
    alibi_slopes,
};
pub use heads::ScalarHead;
pub use inference::Bloom;
pub use parameters::{BloomLayerParameters, BloomParameters};
pub use reward::RewardModel;
