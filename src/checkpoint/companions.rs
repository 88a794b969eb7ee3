//! What a model folder holds besides configuration and weights.

use super::write_atomic;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

/// How the model is to be used, and by whom it may be.
pub const MODEL_FILES: [&str; 7] = [
    "generation_config.json",
    "template.txt",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
];

/// How text becomes tokens, as the tokenizers of transformers write it.
pub const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Files that a model made from another one takes over as they are, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Companions {
    files: BTreeMap<String, Vec<u8>>,
}

impl Companions {
    /// Adds those of `names` that `folder` holds.
    pub fn read(&mut self, folder: &Path, names: &[&str]) -> Result<()> {
        for name in names {
            let path = folder.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => self.set(name, bytes),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io(&path, "read")(e)),
            }
        }
        Ok(())
    }

    /// Adds a file, or puts it in the place of the one of that name.
    pub fn set(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.files.insert(name.to_owned(), bytes.into());
    }

    /// Writes all of them into an existing folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|(name, bytes)| write_atomic(&folder.join(name), |w| w.write_all(bytes)))
    }
}
