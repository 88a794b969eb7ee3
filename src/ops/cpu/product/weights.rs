//! Weight matrices as products read them.

use super::int8::Int8;
use crate::error::{Error, Result};
use crate::tensor::{Buffer, DType, Tensor};
use bytemuck::Pod;
use half::{bf16, f16};

/// A matrix of plain elements, mapped where the file's alignment allows.
pub struct Plain<E: Pod> {
    pub data: Buffer<E>,
    rows: usize,
    cols: usize,
}

/// `[rows, cols]`, row-major.
pub enum Matrix {
    F32(Plain<f32>),
    F16(Plain<f16>),
    Bf16(Plain<bf16>),
    Int8(Int8),
}

impl Matrix {
    /// Keeps the tensor's own memory if it is stored in `dtype` already (or if that is `None`).
    pub fn new(tensor: &Tensor, dtype: Option<DType>) -> Result<Matrix> {
        let [rows, cols] = tensor.shape[..] else {
            return Err(Error::invalid(format!("a weight has shape {:?}, expected two dimensions", tensor.shape)));
        };
        let dtype = dtype.unwrap_or(tensor.dtype);
        if dtype == tensor.dtype {
            let bytes = tensor.bytes.clone();
            return Ok(match dtype {
                DType::F32 => Matrix::F32(Plain { data: Buffer::from_bytes(bytes), rows, cols }),
                DType::F16 => Matrix::F16(Plain { data: Buffer::from_bytes(bytes), rows, cols }),
                DType::Bf16 => Matrix::Bf16(Plain { data: Buffer::from_bytes(bytes), rows, cols }),
                DType::Int8 => return Err(Error::invalid("int8 weights are made at load, not read")),
            });
        }
        // converted row by row, so that a large matrix never exists twice in f32
        let row = |i: usize| {
            let width = cols * tensor.dtype.size();
            let bytes = tensor.bytes.slice(i * width..(i + 1) * width);
            Tensor { dtype: tensor.dtype, shape: vec![cols], bytes }.to_f32()
        };
        let rows_of = || (0..rows).map(row);
        Ok(match dtype {
            DType::F32 => {
                let mut data = Vec::with_capacity(rows * cols);
                rows_of().for_each(|r| data.extend(r));
                Matrix::F32(Plain { data: Buffer::owned(data), rows, cols })
            }
            DType::F16 => {
                let mut data = Vec::with_capacity(rows * cols);
                rows_of().for_each(|r| data.extend(r.into_iter().map(f16::from_f32)));
                Matrix::F16(Plain { data: Buffer::owned(data), rows, cols })
            }
            DType::Bf16 => {
                let mut data = Vec::with_capacity(rows * cols);
                rows_of().for_each(|r| data.extend(r.into_iter().map(bf16::from_f32)));
                Matrix::Bf16(Plain { data: Buffer::owned(data), rows, cols })
            }
            DType::Int8 => Matrix::Int8(Int8::new(rows, cols, row).map_err(Error::io("memory", "reserve"))?),
        })
    }

    pub fn rows(&self) -> usize {
        match self {
            Matrix::F32(m) => m.rows,
            Matrix::F16(m) => m.rows,
            Matrix::Bf16(m) => m.rows,
            Matrix::Int8(m) => m.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Matrix::F32(m) => m.cols,
            Matrix::F16(m) => m.cols,
            Matrix::Bf16(m) => m.cols,
            Matrix::Int8(m) => m.cols(),
        }
    }

    pub fn dtype(&self) -> DType {
        match self {
            Matrix::F32(_) => DType::F32,
            Matrix::F16(_) => DType::F16,
            Matrix::Bf16(_) => DType::Bf16,
            Matrix::Int8(_) => DType::Int8,
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        let scales = if let Matrix::Int8(m) = self { 8 * m.rows() } else { 0 };
        self.rows() * self.cols() * self.dtype().size() + scales
    }

    /// Copies a row in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols()..(row + 1) * self.cols();
        fn copy<T: Copy>(from: &[T], to: &mut [f32], f: impl Fn(T) -> f32) {
            to.iter_mut().zip(from).for_each(|(t, v)| *t = f(*v));
        }
        match self {
            Matrix::F32(m) => out.copy_from_slice(&m.data[range]),
            Matrix::F16(m) => copy(&m.data[range], out, f16::to_f32),
            Matrix::Bf16(m) => copy(&m.data[range], out, bf16::to_f32),
            Matrix::Int8(m) => m.read_row(row, out),
        }
    }
}
