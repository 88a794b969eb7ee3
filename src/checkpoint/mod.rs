//! Tensors by name, of model folders as Hugging Face writes them, memory-mapped. Knows no model.

mod atomic;
mod companions;
mod parameter;
mod pytorch;
mod safetensors;
mod save;

pub use atomic::{write_atomic, write_atomic_at, write_folder};
pub use companions::{Companions, MODEL_FILES, TOKENIZER_FILES};
pub use parameter::Parameter;
pub use save::{save_tensors, save_tensors_as};

use crate::error::{Error, Result};
use crate::files;
use crate::tensor::{Bytes, HostTensor};
use memmap2::Mmap;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tensors of a checkpoint by name, cheap to copy.
#[derive(Clone)]
pub struct Checkpoint {
    /// By the names that the files have.
    pub tensors: BTreeMap<String, HostTensor>,
    /// What errors name: the file of tensors, or the embedded model.
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

/// Fails if `folder` is no folder.
///
/// # Errors
/// Names what it is instead.
pub fn expect_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let found = if folder.exists() { "is a file" } else { "does not exist" };
    Err(Error::file(
        folder,
        format!("{found}; expected a model folder with config.json and model.safetensors"),
    ))
}

impl Checkpoint {
    /// Opens the tensors of a folder; nothing is copied.
    ///
    /// # Errors
    /// If there are none, or a file is not what it should be.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        expect_folder(folder)?;
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
        Ok(Checkpoint { tensors, path, files })
    }

    /// The tensors of a safetensors file that the program carries.
    ///
    /// # Errors
    /// If it is none.
    pub fn from_static(weights: &'static [u8], name: &str) -> Result<Checkpoint> {
        let tensors =
            safetensors::read(Bytes::Static(weights)).map_err(|e| Error::file(name, e))?;
        Ok(Checkpoint { tensors, path: name.into(), files: vec![] })
    }

    /// Gives tensors other names.
    pub fn renamed(mut self, name: impl Fn(String) -> String) -> Checkpoint {
        self.tensors = self.tensors.into_iter().map(|(k, v)| (name(k), v)).collect();
        self
    }

    /// One tensor of the model.
    pub fn parameter(&self, p: &Parameter) -> Result<&HostTensor> {
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
    pub fn take(&mut self, p: &Parameter) -> Result<HostTensor> {
        self.parameter(p)?;
        Ok(self.tensors.remove(&p.name).expect("it is there"))
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

fn read_file(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    let bytes = map(path)?;
    let tensors = if path.extension().is_some_and(|e| e == "bin") {
        pytorch::read(bytes)
    } else {
        safetensors::read(bytes)
    };
    tensors.map_err(|e| Error::file(path, e))
}

fn read_index(
    folder: &Path,
    path: &Path,
    files: &mut Vec<PathBuf>,
) -> Result<BTreeMap<String, HostTensor>> {
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
    for tensor in map.keys() {
        if !all.contains_key(tensor) {
            return Err(Error::file(
                path,
                format!("lists {tensor}, which its shard does not hold"),
            ));
        }
    }
    Ok(all)
}
