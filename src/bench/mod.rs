//! What `bprompt bench` measures, and the floors it compares with.

pub mod floor;
pub mod kernels;
pub mod llm;
pub mod machine;
pub mod ppo;
pub mod serve;
pub mod train;
pub mod train_kernels;
