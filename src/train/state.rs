//! Training checkpoints: the model in f32 as a Hugging Face folder, the optimizer's moments, and
//! where the run stands. A folder appears whole or not at all.

use super::optimizer::AdamW;
use super::parallel::Communicator;
use super::parallel::buckets::Buckets;
use crate::checkpoint::{Companions, write_atomic, write_atomic_at, write_folder};
use crate::error::{Error, Result};
use crate::models::bloom::training::TrainModel;
use crate::models::bloom::{BloomCheckpoint, BloomConfig, save_model};
use crate::ops::train::TrainBackend;
use crate::tensor::DType;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// `state.json`: the step, and the settings that must be the same when the run goes on.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RunState {
    /// Optimizer steps taken.
    pub step: u64,
    /// Settings of the run.
    pub settings: Value,
}

/// The folder of the checkpoint after `step` steps.
pub fn step_folder(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("step-{step:07}"))
}

/// What a checkpoint holds.
pub struct Saved<'a> {
    /// The model's shape.
    pub config: &'a BloomConfig,
    /// What else its folder has.
    pub companions: &'a Companions,
    /// Its parameters.
    pub values: Cow<'a, [f32]>,
    /// AdamW's first moments of all of them.
    pub first: Cow<'a, [f32]>,
    /// AdamW's second moments.
    pub second: Cow<'a, [f32]>,
}

/// All moments of a model, at rank 0, from those that the ranks have of their shards; nothing at
/// the others.
///
/// # Errors
/// If another rank has ended.
pub fn gather_moments<'a, B: TrainBackend>(
    backend: &B,
    communicator: &dyn Communicator<B>,
    buckets: &Buckets,
    moments: &'a B::Flat,
) -> Result<Option<Cow<'a, [f32]>>> {
    let own = backend.values(moments)?;
    if communicator.ranks() == 1 {
        return Ok(Some(own));
    }
    let shards = communicator.gather(bytemuck::cast_slice(&own).to_vec())?;
    if shards.is_empty() {
        return Ok(None);
    }
    let mut all = vec![0f32; buckets.count()];
    for (rank, shard) in shards.iter().enumerate() {
        let mut left = &shard[..];
        for range in buckets.shard(rank) {
            let out: &mut [u8] = bytemuck::cast_slice_mut(&mut all[range]);
            let (part, rest) = left.split_at_checked(out.len()).ok_or_else(|| {
                Error::Internal(format!("rank {rank} sent fewer moments than it has"))
            })?;
            out.copy_from_slice(part);
            left = rest;
        }
        if !left.is_empty() {
            return Err(Error::Internal(format!("rank {rank} sent more moments than it has")));
        }
    }
    Ok(Some(all.into()))
}

/// Saves the run as `checkpoints/step-N`, a model folder of its own, and removes all but the newest
/// `keep`.
pub fn save(checkpoints: &Path, run: &Saved, state: &RunState, keep: usize) -> Result<PathBuf> {
    std::fs::create_dir_all(checkpoints).map_err(Error::io(checkpoints, "create"))?;
    let folder = step_folder(checkpoints, state.step);
    if folder.exists() {
        return Ok(folder);
    }
    write_folder(&folder, |folder| {
        run.companions.write(folder)?;
        save_model(folder, run.config, &run.values, DType::F32)?;
        write_moments(folder, &run.first, &run.second)?;
        let text = serde_json::to_string_pretty(state).expect("settings are JSON");
        write_atomic(&folder.join("state.json"), |w| writeln!(w, "{text}"))
    })?;
    remove_old(checkpoints, keep)?;
    Ok(folder)
}

/// Writes AdamW's moments into a checkpoint's folder.
pub(super) fn write_moments(folder: &Path, first: &[f32], second: &[f32]) -> Result<()> {
    let (first, second) = (tensor(first), tensor(second));
    write_atomic_at(&folder.join("optimizer.safetensors"), |file| {
        let tensors = [("first", first), ("second", second)];
        safetensors::serialize_to_file(tensors, None, file).map_err(std::io::Error::other)
    })
}

/// Removes all checkpoints but the newest `keep`.
pub(super) fn remove_old(checkpoints: &Path, keep: usize) -> Result<()> {
    let mut old = list(checkpoints)?;
    old.truncate(old.len().saturating_sub(keep.max(1)));
    for (_, folder) in old {
        let _ = std::fs::remove_dir_all(folder);
    }
    Ok(())
}

fn tensor(values: &[f32]) -> TensorView<'_> {
    let bytes = bytemuck::cast_slice(values);
    TensorView::new(Dtype::F32, vec![values.len()], bytes).expect("length and shape agree")
}

/// Checkpoints by step, the newest last.
pub fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let Ok(entries) = std::fs::read_dir(checkpoints) else { return Ok(vec![]) };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|e| {
            let path = e.ok()?.path();
            let step = path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// The settings of the run whose newest checkpoint is there, if one is.
pub fn newest_settings(checkpoints: &Path) -> Result<Option<Value>> {
    let newest = list(checkpoints)?.pop();
    newest.map(|(_, folder)| Ok(read_state(&folder)?.settings)).transpose()
}

fn read_state(folder: &Path) -> Result<RunState> {
    let path = folder.join("state.json");
    let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::file(&path, format!("not a training state: {e}")))
}

/// Reads a checkpoint back into `model` and `optimizer`, which takes the moments of its shard;
/// sizes must agree, the number of ranks need not.
pub fn load<B: TrainBackend>(
    folder: &Path,
    backend: &B,
    model: &mut TrainModel<B::Flat>,
    optimizer: &mut AdamW<B::Flat>,
) -> Result<RunState> {
    let state = read_state(folder)?;
    let checkpoint = BloomCheckpoint::open(folder)?;
    let count = model.parameter_count();
    if checkpoint.config.parameter_count() != count {
        return Err(Error::file(folder, "holds a model of another size than this run's"));
    }
    backend.set_values(&mut model.values, &checkpoint.to_f32()?)?;
    let shard = optimizer.shard().to_vec();
    read_moments(folder, backend, optimizer, (count, &shard))?;
    optimizer.steps = state.step;
    Ok(state)
}

/// Reads those of `count` moments of a checkpoint's folder that lie in some ranges.
pub(super) fn read_moments<B: TrainBackend>(
    folder: &Path,
    backend: &B,
    optimizer: &mut AdamW<B::Flat>,
    (count, ranges): (usize, &[Range<usize>]),
) -> Result<()> {
    let path = folder.join("optimizer.safetensors");
    let bytes = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let file = safetensors::SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::file(&path, format!("not a whole safetensors file: {e}")))?;
    for (name, to) in [("first", &mut optimizer.first), ("second", &mut optimizer.second)] {
        let tensor = file
            .tensor(name)
            .map_err(|_| Error::file(&path, format!("tensor {name} is missing")))?;
        if tensor.dtype() != Dtype::F32 || tensor.data().len() != count * 4 {
            return Err(Error::file(&path, format!("tensor {name} does not fit the model")));
        }
        let parts = ranges.iter().map(|r| &tensor.data()[4 * r.start..4 * r.end]);
        let values: Vec<f32> = parts.flat_map(bytemuck::pod_collect_to_vec::<u8, f32>).collect();
        backend.set_values(to, &values)?;
    }
    Ok(())
}
