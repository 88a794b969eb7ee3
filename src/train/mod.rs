//! Training loops and what they are made of.

pub mod optimizer;
pub mod schedule;
