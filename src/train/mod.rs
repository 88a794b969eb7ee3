//! Training loops and what they are made of.

pub mod agreement;
pub mod examples;
pub mod memory;
pub mod monitors;
pub mod optimizer;
pub mod parallel;
pub mod ppo;
pub mod report;
pub mod reward;
pub mod run;
pub mod schedule;
pub mod sft;
pub mod state;
