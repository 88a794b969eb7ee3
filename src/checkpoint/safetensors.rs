//! Files in the safetensors format.

use crate::tensor::{Bytes, DType, HostTensor};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;

/// All tensors of a file; the error says what is wrong with it.
pub fn read(bytes: Bytes) -> Result<BTreeMap<String, HostTensor>, String> {
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| format!("not a whole safetensors file: {e} (download or copy it again)"))?;
    let base = bytes.as_ptr() as usize;
    file.iter()
        .map(|(name, view)| {
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => {
                    return Err(format!(
                        "tensor {name} has dtype {other:?}, expected F32, F16 or BF16"
                    ));
                }
            };
            let start = view.data().as_ptr() as usize - base;
            let bytes = bytes.slice(start..start + view.data().len());
            Ok((name.to_owned(), HostTensor { dtype, shape: view.shape().to_vec(), bytes }))
        })
        .collect()
}
