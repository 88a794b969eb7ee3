//! Training checkpoints: the model in f32 as a Hugging Face folder, the optimizer's moments, and
//! where the run stands. A folder appears whole or not at all.

use super::optimizer::AdamW;
use crate::checkpoint::{Companions, write_atomic, write_atomic_at, write_folder};
use crate::error::{Error, Result};
use crate::models::bloom::training::TrainModel;
use crate::models::bloom::{BloomCheckpoint, save_model};
use crate::ops::train::TrainBackend;
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

/// What a checkpoint holds.
pub struct Saved<'a, F> {
    /// The model.
    pub model: &'a TrainModel<F>,
    /// What else its folder has.
    pub companions: &'a Companions,
    /// The optimizer.
    pub optimizer: &'a AdamW<F>,
}

/// Saves the run as `checkpoints/step-N`, a model folder of its own, and removes all but the newest
/// `keep`.
pub fn save<B: TrainBackend>(
    checkpoints: &Path,
    backend: &B,
    run: Saved<B::Flat>,
    state: &RunState,
    keep: usize,
) -> Result<PathBuf> {
    let Saved { model, companions, optimizer } = run;
    std::fs::create_dir_all(checkpoints).map_err(Error::io(checkpoints, "create"))?;
    let folder = step_folder(checkpoints, state.step);
    if folder.exists() {
        return Ok(folder);
    }
    write_folder(&folder, |folder| {
        companions.write(folder)?;
        save_model(folder, &model.config, &backend.values(&model.values)?, DType::F32)?;
        let (first, second) =
            (backend.values(&optimizer.first)?, backend.values(&optimizer.second)?);
        let view = |v| TensorView::new(Dtype::F32, vec![first.len()], bytemuck::cast_slice(v));
        let first = view(&first).expect("length and shape agree");
        let second = view(&second).expect("length and shape agree");
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

/// Reads a checkpoint back into `model` and `optimizer`, whose sizes must agree.
pub fn load<B: TrainBackend>(
    folder: &Path,
    backend: &B,
    model: &mut TrainModel<B::Flat>,
    optimizer: &mut AdamW<B::Flat>,
) -> Result<RunState> {
    let state = read_state(folder)?;
    let checkpoint = BloomCheckpoint::open(folder)?;
    let count = model.config.parameter_count();
    if checkpoint.config.parameter_count() != count {
        return Err(Error::file(folder, "holds a model of another size than this run's"));
    }
    backend.set_values(&mut model.values, &checkpoint.to_f32()?)?;
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
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        backend.set_values(to, &values)?;
    }
    optimizer.steps = state.step;
    Ok(state)
}
