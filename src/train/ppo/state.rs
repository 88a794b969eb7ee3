//! Checkpoints of a run: the policy, its value head, the optimizer, and where all else stands. A
//! folder appears whole or not at all.

use super::{Ppo, Trainer};
use crate::checkpoint::{save_tensors_as, write_atomic, write_folder};
use crate::error::{Error, Result};
use crate::files::{as_read, exact};
use crate::models::bloom::{BloomCheckpoint, save_model};
use crate::ops::RolloutBackend;
use crate::rewards::{CombinedState, RunningMoments};
use crate::tensor::DType;
use crate::train::monitors::{MonitorState, Monitors};
use crate::train::run::difference;
use crate::train::state::{list, read_moments, remove_old, step_folder, write_moments};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Name of the value head's file beside a policy.
pub const VALUE_HEAD: &str = "value_head.safetensors";

/// `state.json`. What is random is a function of the seed and the round.
#[derive(Serialize, Deserialize)]
struct PpoState {
    /// Rounds done.
    round: u64,
    /// Optimizer steps taken.
    steps: u64,
    #[serde(with = "exact")]
    kl_coefficient: f64,
    /// All scores so far.
    scores: RunningMoments,
    rewards: CombinedState,
    monitors: MonitorState,
    skipped: u64,
    settings: Value,
}

impl<B: RolloutBackend> Ppo<'_, B> {
    /// Writes a checkpoint after so many rounds; returns its folder.
    pub(super) fn save(&self, checkpoints: &Path, t: &Trainer<B>, round: u64) -> Result<PathBuf> {
        std::fs::create_dir_all(checkpoints).map_err(Error::io(checkpoints, "create"))?;
        let folder = step_folder(checkpoints, round);
        if folder.exists() {
            return Ok(folder);
        }
        let b = self.backend;
        let state = PpoState {
            round,
            steps: t.optimizer.steps,
            kl_coefficient: t.controller.coefficient,
            scores: t.scaling.moments,
            rewards: self.reward.state(),
            monitors: t.monitors.state().clone(),
            skipped: t.skipped,
            settings: self.options.settings.clone(),
        };
        write_folder(&folder, |folder| {
            self.write_policy(folder, DType::F32)?;
            write_moments(folder, &b.values(&t.optimizer.first)?, &b.values(&t.optimizer.second)?)?;
            let text = serde_json::to_string_pretty(&state).expect("state is JSON");
            write_atomic(&folder.join("state.json"), |w| writeln!(w, "{text}"))
        })?;
        remove_old(checkpoints, self.options.keep)?;
        Ok(folder)
    }

    /// Writes the policy as a plain model folder, and its value head beside it.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_policy(&self, folder: &Path, dtype: DType) -> Result<()> {
        let values = self.backend.values(&self.model.values)?;
        let (policy, head) = values.split_at(self.model.config.parameter_count());
        self.companions.write(folder)?;
        if !head.is_empty() {
            let parameters = self.model.config.value_head_parameters();
            save_tensors_as(&folder.join(VALUE_HEAD), parameters, head, DType::F32)?;
        }
        // the weights come last: a folder that has them has all else
        save_model(folder, &self.model.config, policy, dtype)
    }

    /// Takes up the newest checkpoint, if there is one; returns the rounds that it had done.
    pub(super) fn restore(&mut self, checkpoints: &Path, t: &mut Trainer<B>) -> Result<u64> {
        let Some((_, folder)) = list(checkpoints)?.pop() else { return Ok(0) };
        let path = folder.join("state.json");
        let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
        let state: PpoState = serde_json::from_slice(&text)
            .map_err(|e| Error::file(&path, format!("is no state of such a run: {e}")))?;
        let own = as_read(&self.options.settings);
        if state.settings != own {
            return Err(Error::file(
                &folder,
                format!(
                    "was trained with other settings ({}); --resume needs the same ones",
                    difference(&state.settings, &own)
                ),
            ));
        }
        let b = self.backend;
        let mut values = BloomCheckpoint::open(&folder)?.to_f32()?;
        let count = self.model.parameter_count();
        if count > values.len() {
            values.extend(read_value_head(&folder, count - values.len())?);
        }
        b.set_values(&mut self.model.values, &values)?;
        let moments = self.model.trained().len();
        let all = std::iter::once(0..moments).collect::<Vec<_>>();
        read_moments(&folder, b, &mut t.optimizer, (moments, &all))?;
        t.optimizer.steps = state.steps;
        t.controller.coefficient = state.kl_coefficient;
        t.scaling.moments = state.scores;
        t.skipped = state.skipped;
        self.reward.restore(&state.rewards)?;
        t.monitors = Monitors::resume(self.options.monitors.clone(), state.monitors)?;
        let dtype = self.options.rollout_dtype;
        t.policy.refresh(b, &self.model.values, (dtype, 0))?;
        Ok(state.round)
    }
}

/// A value head's parameters, of which there must be so many.
///
/// # Errors
/// If the file is not what it should be.
fn read_value_head(folder: &Path, count: usize) -> Result<Vec<f32>> {
    let path = folder.join(VALUE_HEAD);
    let bytes = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let fail = |what: String| Error::file(&path, what);
    let file = safetensors::SafeTensors::deserialize(&bytes)
        .map_err(|e| fail(format!("not a whole safetensors file: {e}")))?;
    let mut values = Vec::with_capacity(count);
    for name in ["v_head.0.weight", "v_head.0.bias", "v_head.2.weight", "v_head.2.bias"] {
        let tensor = file.tensor(name).map_err(|_| fail(format!("tensor {name} is missing")))?;
        if tensor.dtype() != safetensors::Dtype::F32 {
            return Err(fail(format!("tensor {name} is not in f32")));
        }
        values.extend(bytemuck::pod_collect_to_vec::<u8, f32>(tensor.data()));
    }
    if values.len() != count {
        return Err(fail(format!("has {} numbers, the policy asks for {count}", values.len())));
    }
    Ok(values)
}
