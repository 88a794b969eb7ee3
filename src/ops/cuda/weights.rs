//! Weight matrices on the device.

use crate::device::{Launcher, Memory};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use half::{bf16, f16};
use std::rc::Rc;

/// `[rows, cols]`, row-major, in 16 bits, or in 8 bits with one scale for each row.
pub struct Matrix<L: Launcher> {
    pub data: Memory<L>,
    scales: Option<Memory<L>>,
    pub rows: usize,
    pub cols: usize,
}

impl<L: Launcher> Matrix<L> {
    pub fn new(launcher: &Rc<L>, tensor: &Tensor, half: DType, int8: bool) -> Result<Matrix<L>> {
        let [rows, cols] = tensor.shape[..] else {
            return Err(Error::invalid(format!("a weight has shape {:?}, expected two dimensions", tensor.shape)));
        };
        assert!(cols.is_multiple_of(16), "see `Cuda::supports`");
        if !int8 && tensor.dtype == half {
            return Ok(Matrix { data: Memory::from_bytes(launcher, &tensor.bytes)?, scales: None, rows, cols });
        }
        // converted and sent in parts, so that a large matrix never exists twice on the host
        let size = if int8 { 1 } else { 2 };
        let data = Memory::new(launcher, rows * cols * size)?;
        let mut scales = Vec::new();
        let part_rows = ((16 << 20) / cols).max(1);
        for first in (0..rows).step_by(part_rows) {
            let range = first..(first + part_rows).min(rows);
            let width = cols * tensor.dtype.size();
            let bytes = tensor.bytes.slice(range.start * width..range.end * width);
            let part = Tensor { dtype: tensor.dtype, shape: vec![range.len(), cols], bytes }.to_f32();
            let converted: Vec<u8> = if int8 {
                part.chunks_exact(cols).flat_map(|row| quantize(row, &mut scales)).collect()
            } else if half == DType::F16 {
                part.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
            } else {
                part.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            };
            launcher.write(data.at + (first * cols * size) as u64, &converted)?;
        }
        let scales = if int8 { Some(Memory::from_bytes(launcher, bytemuck::cast_slice(&scales))?) } else { None };
        Ok(Matrix { data, scales, rows, cols })
    }

    pub fn int8(&self) -> bool {
        self.scales.is_some()
    }

    /// Address of the scales, or 0.
    pub fn scales(&self) -> u64 {
        self.scales.as_ref().map_or(0, |m| m.at)
    }
}

/// A row in whole multiples, at most 127, of its largest element over 127.
fn quantize(row: &[f32], scales: &mut Vec<f32>) -> Vec<u8> {
    let most = row.iter().fold(0f32, |m, v| m.max(v.abs()));
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    scales.push(most / 127.0);
    row.iter().map(|v| (v * inverse).round_ties_even() as i8 as u8).collect()
}
