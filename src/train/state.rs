//! Training checkpoints: the model in f32 as a Hugging Face folder, the optimizer's moments, and
//! where the run stands. A folder appears whole or not at all.

use super::optimizer::AdamW;
use crate::checkpoint::{Companions, write_atomic, write_atomic_at, write_folder};
use crate::error::{Error, Result};
use crate::models::bloom::training::TrainModel;
use crate::models::bloom::{BloomCheckpoint, save_model};
use crate::tensor::DType;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
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

/// Saves the run as `checkpoints/step-N`, a model folder of its own, and removes all but the newest
/// `keep`.
pub fn save(
    checkpoints: &Path,
    model: &TrainModel,
    companions: &Companions,
    optimizer: &AdamW,
    state: &RunState,
    keep: usize,
) -> Result<PathBuf> {
    std::fs::create_dir_all(checkpoints).map_err(Error::io(checkpoints, "create"))?;
    let folder = step_folder(checkpoints, state.step);
    if folder.exists() {
        return Ok(folder);
    }
    write_folder(&folder, |folder| {
        companions.write(folder)?;
        save_model(folder, &model.config, &model.values, DType::F32)?;
        let view =
            |v| TensorView::new(Dtype::F32, vec![model.values.len()], bytemuck::cast_slice(v));
        let first = view(&optimizer.first).expect("length and shape agree");
        let second = view(&optimizer.second).expect("length and shape agree");
        write_atomic_at(&folder.join("optimizer.safetensors"), |file| {
            let tensors = [("first", first), ("second", second)];
            safetensors::serialize_to_file(tensors, None, file).map_err(std::io::Error::other)
        })?;
        let text = serde_json::to_string_pretty(state).expect("settings are JSON");
        write_atomic(&folder.join("state.json"), |w| writeln!(w, "{text}"))
    })?;
    let mut old = list(checkpoints)?;
    old.truncate(old.len().saturating_sub(keep.max(1)));
    for (_, folder) in old {
        let _ = std::fs::remove_dir_all(folder);
    }
    Ok(folder)
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

/// Reads a checkpoint back into `model` and `optimizer`, whose sizes must agree.
pub fn load(folder: &Path, model: &mut TrainModel, optimizer: &mut AdamW) -> Result<RunState> {
    let path = folder.join("state.json");
    let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let state: RunState = serde_json::from_slice(&text)
        .map_err(|e| Error::file(&path, format!("not a training state: {e}")))?;
    let checkpoint = BloomCheckpoint::open(folder)?;
    let values = checkpoint.to_f32()?;
    if values.len() != model.values.len() {
        return Err(Error::file(folder, "holds a model of another size than this run's"));
    }
    model.values = values;
    let path = folder.join("optimizer.safetensors");
    let bytes = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let file = safetensors::SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::file(&path, format!("not a whole safetensors file: {e}")))?;
    for (name, to) in [("first", &mut optimizer.first), ("second", &mut optimizer.second)] {
        let tensor = file
            .tensor(name)
            .map_err(|_| Error::file(&path, format!("tensor {name} is missing")))?;
        if tensor.dtype() != Dtype::F32 || tensor.data().len() != to.len() * 4 {
            return Err(Error::file(&path, format!("tensor {name} does not fit the model")));
        }
        *to = bytemuck::pod_collect_to_vec(tensor.data());
    }
    optimizer.steps = state.step;
    Ok(state)
}
