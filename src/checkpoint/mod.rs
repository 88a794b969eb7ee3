//! Model folders as Hugging Face writes them, memory-mapped.

mod atomic;
mod companions;
mod pytorch;
mod safetensors;
mod save;

pub use atomic::{write_atomic, write_atomic_at, write_folder};
pub use companions::{Companions, MODEL_FILES, TOKENIZER_FILES};
pub use save::save_model;

use crate::error::{Error, Result};
use crate::files;
use crate::models::bloom::{BloomConfig, Parameter};
use crate::ops::cpu::Cpu;
use crate::ops::cpu::finite;
use crate::ops::cpu::simd::Isa;
use crate::tensor::{Bytes, Tensor};
use memmap2::Mmap;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint, cheap to copy: its configuration and its tensors by name (always with the
/// `transformer.` prefix).
#[derive(Clone)]
pub struct Checkpoint {
    pub config: BloomConfig,
    pub tensors: BTreeMap<String, Tensor>,
    /// What errors name: the folder, or the embedded model.
    pub path: PathBuf,
    /// Tensor files that were read.
    pub files: Vec<PathBuf>,
}

/// Names of the tensor files a folder may hold, the preferred one first.
const LAYOUTS: [(&str, bool); 4] = [
    ("model.safetensors", false),
    ("model.safetensors.index.json", true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
];

impl Checkpoint {
    /// Opens a folder; nothing is copied, and every tensor's name and shape is checked.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        if !folder.is_dir() {
            let found = if folder.exists() { "is a file" } else { "does not exist" };
            return Err(Error::file(
                folder,
                format!("{found}; expected a model folder with config.json and model.safetensors"),
            ));
        }
        let config = BloomConfig::read(&folder.join("config.json"))?;
        let Some((name, sharded)) = LAYOUTS.iter().find(|(n, _)| folder.join(n).exists()) else {
            return Err(Error::file(
                folder,
                "no weights: expected model.safetensors, pytorch_model.bin, or either with \
                .index.json and its shards",
            ));
        };
        let path = folder.join(name);
        let mut files = Vec::new();
        let tensors = if *sharded {
            read_index(folder, &path, &mut files)?
        } else {
            files.push(path.clone());
            read_file(&path)?
        };
        Checkpoint { config, tensors, path: path.clone(), files }.checked()
    }

    /// The checkpoint whose parts are these bytes (a `config.json` and a safetensors file).
    pub fn from_static(
        config: &'static [u8],
        weights: &'static [u8],
        name: &str,
    ) -> Result<Checkpoint> {
        let config = BloomConfig::parse(config).map_err(|e| Error::file(name, e))?;
        let tensors =
            safetensors::read(Bytes::Static(weights)).map_err(|e| Error::file(name, e))?;
        Checkpoint { config, tensors: normalised(tensors), path: name.into(), files: vec![] }
            .checked()
    }

    /// Checks that every parameter is there with its shape.
    fn checked(self) -> Result<Checkpoint> {
        for p in self.config.parameters() {
            self.parameter(&p)?;
        }
        Ok(self)
    }

    /// One tensor of the model.
    pub fn parameter(&self, p: &Parameter) -> Result<&Tensor> {
        let t = self.tensors.get(&p.name).ok_or_else(|| {
            Error::file(&self.path, format!("tensor {} is missing (shape {:?})", p.name, p.shape))
        })?;
        if t.shape != p.shape {
            return Err(Error::file(
                &self.path,
                format!(
                    "tensor {} has shape {:?}, config.json asks for {:?}",
                    p.name, t.shape, p.shape
                ),
            ));
        }
        Ok(t)
    }

    /// [`Checkpoint::parameter`], which is not in the checkpoint any more: whoever lays it out anew
    /// may be its only owner.
    pub fn take(&mut self, p: &Parameter) -> Result<Tensor> {
        self.parameter(p)?;
        Ok(self.tensors.remove(&p.name).expect("it is there"))
    }

    /// All parameters in f32, one after the other in the order of the config; fails if one holds
    /// NaN or infinity.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.config.parameter_count());
        for p in self.config.parameters() {
            let tensor = self.parameter(&p)?;
            finite::check(Isa::detect(), tensor).map_err(|e| e.of_tensor(&self.path, &p.name))?;
            values.extend(tensor.to_f32());
        }
        Ok(values)
    }

    /// Reads all parameters and fails if one holds NaN or infinity.
    pub fn check_finite(&self, cpu: &Cpu) -> Result<()> {
        let check = |p: Parameter| {
            finite::check_parallel(cpu, self.parameter(&p)?)
                .map_err(|e| e.of_tensor(&self.path, &p.name))
        };
        self.config.parameters().into_iter().try_for_each(check)
    }

    /// Tensors that the model does not use.
    pub fn unused(&self) -> Vec<&str> {
        let used: BTreeSet<String> = self.config.parameters().into_iter().map(|p| p.name).collect();
        self.tensors.keys().filter(|k| !used.contains(*k)).map(String::as_str).collect()
    }
}

/// Maps a whole file. Empty files cannot be mapped and are no checkpoint either.
fn map(path: &Path) -> Result<Bytes> {
    let (file, metadata) = files::open(path, "does not exist")?;
    let len = metadata.len() as usize;
    if len == 0 {
        return Err(Error::file(path, "is empty; expected tensors (download or copy it again)"));
    }
    // SAFETY: the usual contract of a mapped file: nobody truncates it while the program runs.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "map"))?;
    match files::instead(&map) {
        Some(what) => Err(Error::file(path, what)),
        None => Ok(Bytes::Mapped(Arc::new(map), 0..len)),
    }
}

fn read_file(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let bytes = map(path)?;
    let tensors = if path.extension().is_some_and(|e| e == "bin") {
        pytorch::read(bytes)
    } else {
        safetensors::read(bytes)
    };
    tensors.map(normalised).map_err(|e| Error::file(path, e))
}

/// Adds the `transformer.` prefix that some checkpoints leave out.
fn normalised(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let name = |n: String| {
        if n.starts_with("transformer.") || n.starts_with("lm_head.") {
            n
        } else {
            format!("transformer.{n}")
        }
    };
    tensors.into_iter().map(|(k, v)| (name(k), v)).collect()
}

fn read_index(
    folder: &Path,
    path: &Path,
    files: &mut Vec<PathBuf>,
) -> Result<BTreeMap<String, Tensor>> {
    let text = files::read(path, "does not exist")?;
    let value: Value =
        serde_json::from_slice(&text).map_err(|e| Error::file(path, format!("not JSON: {e}")))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::file(path, "no \"weight_map\" object"))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\'])).ok_or_else(
            || Error::file(path, format!("weight_map of {tensor} is {file}, expected a file name")),
        )?;
        names.insert(file.to_owned());
    }
    let mut all = BTreeMap::new();
    for name in names {
        let file = folder.join(&name);
        if !file.exists() {
            return Err(Error::file(
                path,
                format!("names the shard {name}, which is not in the folder"),
            ));
        }
        all.append(&mut read_file(&file)?);
        files.push(file);
    }
    let present = normalised(all);
    for tensor in map.keys() {
        let found =
            present.contains_key(tensor) || present.contains_key(&format!("transformer.{tensor}"));
        if !found {
            return Err(Error::file(
                path,
                format!("lists {tensor}, which its shard does not hold"),
            ));
        }
    }
    Ok(present)
}
