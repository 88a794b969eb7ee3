//! Training on a CUDA device.

pub(crate) mod attention;
