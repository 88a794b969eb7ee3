//! BLOOM checkpoints: a configuration and the tensors that it asks for.

use super::BloomConfig;
use crate::checkpoint::{self, Checkpoint, Parameter};
use crate::error::{Error, Result};
use crate::ops::cpu::Cpu;
use crate::ops::cpu::finite;
use crate::ops::cpu::simd::Isa;
use crate::tensor::DType;
use std::collections::BTreeSet;
use std::path::Path;

/// A checkpoint of BLOOM, cheap to copy.
#[derive(Clone)]
pub struct BloomCheckpoint {
    /// Its `config.json`.
    pub config: BloomConfig,
    /// Its tensors, always with the `transformer.` prefix that some checkpoints leave out.
    pub weights: Checkpoint,
}

impl BloomCheckpoint {
    /// Opens a folder; nothing is copied, and every tensor's name and shape is checked.
    ///
    /// # Errors
    /// Names the file or the tensor that is missing or not what it should be.
    pub fn open(folder: &Path) -> Result<BloomCheckpoint> {
        checkpoint::expect_folder(folder)?;
        let config = BloomConfig::read(&folder.join("config.json"))?;
        BloomCheckpoint::new(config, Checkpoint::open(folder)?)
    }

    /// The checkpoint whose parts are these bytes (a `config.json` and a safetensors file).
    ///
    /// # Errors
    /// If they are not what they should be.
    pub fn from_static(
        config: &'static [u8],
        weights: &'static [u8],
        name: &str,
    ) -> Result<BloomCheckpoint> {
        let config = BloomConfig::parse(config).map_err(|e| Error::file(name, e))?;
        BloomCheckpoint::new(config, Checkpoint::from_static(weights, name)?)
    }

    /// Checks that every parameter is there with its shape.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn new(config: BloomConfig, weights: Checkpoint) -> Result<BloomCheckpoint> {
        let weights = weights.renamed(|name| {
            let whole = ["transformer.", "lm_head.", "score."].iter().any(|p| name.starts_with(p));
            if whole { name } else { format!("transformer.{name}") }
        });
        for p in config.parameters() {
            weights.parameter(&p)?;
        }
        Ok(BloomCheckpoint { config, weights })
    }

    /// All parameters in f32, one after the other in the order of the config.
    ///
    /// # Errors
    /// If one holds NaN or infinity.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.config.parameter_count());
        for p in self.config.parameters() {
            let tensor = self.weights.parameter(&p)?;
            finite::check(Isa::detect(), tensor)
                .map_err(|e| e.of_tensor(&self.weights.path, &p.name))?;
            values.extend(tensor.to_f32());
        }
        Ok(values)
    }

    /// Reads all parameters.
    ///
    /// # Errors
    /// If one holds NaN or infinity.
    pub fn check_finite(&self, cpu: &Cpu) -> Result<()> {
        let check = |p: Parameter| {
            finite::check_parallel(cpu, self.weights.parameter(&p)?)
                .map_err(|e| e.of_tensor(&self.weights.path, &p.name))
        };
        self.config.parameters().into_iter().try_for_each(check)
    }

    /// Tensors that the model does not use.
    pub fn unused(&self) -> Vec<&str> {
        let used: BTreeSet<String> = self.config.parameters().into_iter().map(|p| p.name).collect();
        self.weights.tensors.keys().filter(|k| !used.contains(*k)).map(String::as_str).collect()
    }
}

/// Writes `config.json` and `model.safetensors` (in `dtype`: f32, f16 or bf16) into an existing
/// folder. `values` holds all parameters in the order of [`BloomConfig::parameters`].
///
/// # Errors
/// If a file cannot be written; nothing half-written is left.
pub fn save_model(folder: &Path, config: &BloomConfig, values: &[f32], dtype: DType) -> Result<()> {
    checkpoint::save_tensors(folder, config.parameters(), values, dtype)?;
    let text = serde_json::to_string_pretty(&config.to_json(dtype.torch_name()))
        .expect("JSON of numbers and strings");
    checkpoint::write_atomic(&folder.join("config.json"), |w| writeln!(w, "{text}"))
}
