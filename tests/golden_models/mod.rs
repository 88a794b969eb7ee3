//! The golden models (tests/golden/make_bloom.py) and what transformers made of them.

use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::models::bloom::BloomCheckpoint;
use beautiful_prompt::ops::DecoderActivations;
use beautiful_prompt::ops::{BLOCK, Batch, DecodeBackend};
use serde::Deserialize;
use std::path::PathBuf;

pub const MODELS: [&str; 4] =
    ["f32_six_heads", "bf16_sharded", "f16_pytorch_sharded", "bf16_pytorch"];

#[derive(Deserialize)]
struct Expected {
    prompt_ids: Vec<u32>,
}

/// The checkpoint, a prompt's ids, and the logits of all its positions.
pub fn open(name: &str) -> (BloomCheckpoint, Vec<u32>, Vec<f32>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom").join(name);
    let report: Expected =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = bytemuck::pod_collect_to_vec(file.tensor("logits").unwrap().data());
    (BloomCheckpoint::open(&folder).unwrap(), report.prompt_ids, logits)
}

/// Largest difference over the largest magnitude.
pub fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let most = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / most
}

/// Logits of every position, fed in spans of at most `chunk` tokens.
pub fn logits<B: DecodeBackend>(
    backend: &B,
    model: &Bloom<B>,
    ids: &[u32],
    chunk: usize,
) -> Vec<f32> {
    let blocks = ids.len().div_ceil(BLOCK);
    // blocks in an unusual order, as a cache in use would hand them out
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let mut cache = model.cache(backend, blocks).unwrap();
    let mut scratch = DecoderActivations::default();
    let (mut all, mut some) = (Vec::new(), Vec::new());
    for start in (0..ids.len()).step_by(chunk) {
        let part = &ids[start..(start + chunk).min(ids.len())];
        let mut batch = Batch::default();
        batch.push(part, start, &table);
        model.forward(backend, &batch, &mut cache, &mut scratch);
        let rows: Vec<usize> = (0..part.len()).collect();
        model.logits(backend, &rows, &mut scratch, &mut some).unwrap();
        all.extend_from_slice(&some);
    }
    all
}
