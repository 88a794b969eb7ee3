//! Saving a model's tensors as transformers loads them.

use super::{Parameter, write_atomic_at};
use crate::error::Result;
use crate::tensor::DType;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

struct Stored<'a> {
    dtype: DType,
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
            DType::Int8 => Dtype::I8,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.dtype {
            DType::F32 => Cow::Borrowed(bytemuck::cast_slice(self.values)),
            DType::F16 => {
                self.values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
            }
            _ => self.values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.dtype.size()
    }
}

/// Writes `model.safetensors` (in `dtype`: f32, f16 or bf16) into an existing folder. `values`
/// holds all parameters, one after the other.
///
/// # Errors
/// If the file cannot be written; nothing half-written is left.
pub fn save_tensors(
    folder: &Path,
    parameters: Vec<Parameter>,
    values: &[f32],
    dtype: DType,
) -> Result<()> {
    save_tensors_as(&folder.join("model.safetensors"), parameters, values, dtype)
}

/// [`save_tensors`] under another name.
///
/// # Errors
/// As there.
pub fn save_tensors_as(
    path: &Path,
    parameters: Vec<Parameter>,
    values: &[f32],
    dtype: DType,
) -> Result<()> {
    assert_eq!(values.len(), parameters.iter().map(Parameter::len).sum::<usize>());
    let mut start = 0;
    let tensors: Vec<(String, Stored)> = parameters
        .into_iter()
        .map(|p| {
            let values = &values[start..start + p.len()];
            start += p.len();
            (p.name, Stored { dtype, shape: p.shape, values })
        })
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_atomic_at(path, |file| {
        safetensors::serialize_to_file(tensors, Some(metadata), file).map_err(std::io::Error::other)
    })
}
