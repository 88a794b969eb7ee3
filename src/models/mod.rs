//! Model definitions: weights and forward passes, written in the operations of [`crate::ops`].

pub mod bloom;
pub mod embedded;
pub mod params;
