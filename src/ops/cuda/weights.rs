//! Weight matrices on the device.

use crate::device::{Address, Launcher, Memory};
use crate::error::{Error, Result};
use crate::ops::Weight;
use crate::ops::cpu::finite;
use crate::ops::cpu::linear::quantize_offset;
use crate::ops::cpu::rows::{f32_to_bf16, f32_to_f16};
use crate::ops::cpu::simd::Isa;
use crate::tensor::{DType, HostTensor};
use half::{bf16, f16};
use std::rc::Rc;

/// `[rows, cols]`, row-major, in 16 bits, or in 8 bits with one scale for each row.
pub struct DeviceWeight<L: Launcher> {
    /// The elements, in two's complement where they have 8 bits.
    pub data: Memory<L>,
    scales: Option<Memory<L>>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl<L: Launcher> DeviceWeight<L> {
    /// Copies a matrix to the device, converted to `half` (f16 or bf16), or quantized if `int8`.
    ///
    /// # Errors
    /// If the tensor is no matrix, an element is not finite or overflows in `half`, or the device
    /// has no memory for it.
    ///
    /// # Panics
    /// If the columns are no multiple of 16.
    pub fn new(
        launcher: &Rc<L>,
        tensor: &HostTensor,
        half: DType,
        int8: bool,
    ) -> Result<DeviceWeight<L>> {
        let [rows, cols] = tensor.shape[..] else {
            return Err(Error::invalid(format!(
                "a weight has shape {:?}, expected two dimensions",
                tensor.shape
            )));
        };
        assert!(cols.is_multiple_of(16), "see `Cuda::supports`");
        finite::check(Isa::detect(), tensor)?;
        if !int8 && tensor.dtype == half {
            return Ok(DeviceWeight {
                data: Memory::from_bytes(launcher, &tensor.bytes)?,
                scales: None,
                rows,
                cols,
                dtype: half,
            });
        }
        // converted and sent in parts, so that a large matrix never exists twice on the host
        let size = if int8 { 1 } else { 2 };
        let data = Memory::new(launcher, rows * cols * size)?;
        let mut scales = Vec::new();
        let overflow = finite::NotFinite::default();
        let part_rows = ((16 << 20) / cols).max(1);
        for first in (0..rows).step_by(part_rows) {
            let range = first..(first + part_rows).min(rows);
            let width = cols * tensor.dtype.size();
            let bytes = tensor.bytes.slice(range.start * width..range.end * width);
            let part =
                HostTensor { dtype: tensor.dtype, shape: vec![range.len(), cols], bytes }.to_f32();
            let converted =
                if int8 { quantize(&part, cols, &mut scales) } else { to_half(&part, half) };
            if !int8 {
                overflow.look(Isa::detect(), half, first * cols, &converted);
            }
            launcher.write(data.at + (first * cols * size) as u64, &converted)?;
        }
        overflow.result(&tensor.shape, &finite::overflowed(half))?;
        let scales = if int8 {
            Some(Memory::from_bytes(launcher, bytemuck::cast_slice(&scales))?)
        } else {
            None
        };
        let dtype = if int8 { DType::Int8 } else { half };
        Ok(DeviceWeight { data, scales, rows, cols, dtype })
    }

    /// A matrix of shape `[rows, cols]` in the 16-bit type `half` that lies in other memory.
    pub fn view(
        launcher: &Rc<L>,
        at: Address,
        [rows, cols]: [usize; 2],
        half: DType,
    ) -> DeviceWeight<L> {
        let data = Memory::view(launcher, at, rows * cols * 2);
        DeviceWeight { data, scales: None, rows, cols, dtype: half }
    }

    /// Whether the elements are 8-bit integers.
    pub fn int8(&self) -> bool {
        self.scales.is_some()
    }

    /// Address of the scales, or 0.
    pub fn scales(&self) -> u64 {
        self.scales.as_ref().map_or(0, |m| m.at)
    }
}

impl<L: Launcher> Weight for DeviceWeight<L> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Rows of `cols` as the CPU quantizes them, and a scale for each.
fn quantize(x: &[f32], cols: usize, scales: &mut Vec<f32>) -> Vec<u8> {
    let mut out = vec![0; x.len()];
    for (row, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
        scales.push(quantize_offset(Isa::detect(), row, out));
        out.iter_mut().for_each(|q| *q = q.wrapping_sub(128));
    }
    out
}

/// Numbers in the 16-bit type `half`, as bytes.
pub(super) fn to_half(x: &[f32], half: DType) -> Vec<u8> {
    if half == DType::F16 {
        let mut out = vec![f16::ZERO; x.len()];
        f32_to_f16(Isa::detect(), x, &mut out);
        bytemuck::cast_slice(&out).to_vec()
    } else {
        let mut out = vec![bf16::ZERO; x.len()];
        f32_to_bf16(Isa::detect(), x, &mut out);
        bytemuck::cast_slice(&out).to_vec()
    }
}
