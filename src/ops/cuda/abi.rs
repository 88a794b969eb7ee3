//! What host and device share: the Rust side of `kernels/include/abi.h`, which is made from it as
//! this crate is built. Addresses of device memory are `u64`.

#![allow(dead_code)] // some constants and fields are the device's alone

include!(concat!(env!("OUT_DIR"), "/abi.rs"));

const _: () = assert!(CACHE_BLOCK == crate::ops::BLOCK);
const _: () = assert!(MAX_LOG_RATIO as f32 == crate::ops::token_loss::MAX_LOG_RATIO);
