//! Weight matrices as products read them.

#[cfg(target_arch = "x86_64")]
use super::bf16::Packed;
use super::int8::Int8;
use crate::error::{Error, Result};
use crate::ops::Weight;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::finite::{self, NotFinite};
use crate::ops::cpu::resident::into_resident;
use crate::ops::cpu::rows::{narrow_bf16, narrow_f16};
use crate::ops::cpu::simd::Isa;
use crate::tensor::{Bytes, DType, Elements, HostTensor};
use bytemuck::Pod;
use half::{bf16, f16};

/// Rows after whose conversion a mapped file's memory is given back.
const GIVE_BACK: usize = 1024;

/// A matrix of plain elements, mapped where the file's alignment allows.
pub struct Plain<E: Pod> {
    pub data: Elements<E>,
    rows: usize,
    cols: usize,
}

/// `[rows, cols]`, row-major.
pub enum Matrix {
    /// Elements in f32.
    F32(Plain<f32>),
    /// Elements in f16.
    F16(Plain<f16>),
    /// Elements in bf16.
    Bf16(Plain<bf16>),
    /// Elements in bf16, in the order in which BF16 dot products read them.
    #[cfg(target_arch = "x86_64")]
    Bf16Packed(super::bf16::Packed),
    /// 8-bit integers with one f32 scale per row.
    Int8(Int8),
}

impl Matrix {
    /// Prepares a tensor for products, and fails with [`Error::Weights`] if it holds what is no
    /// number. One that is stored in `dtype` already (or if that is `None`) and lies in a mapped
    /// file stays there, unless [`Cpu::resident`] or its layout says otherwise.
    pub fn new(cpu: &Cpu, tensor: HostTensor, dtype: Option<DType>) -> Result<Matrix> {
        let [rows, cols] = tensor.shape[..] else {
            return Err(Error::invalid(format!(
                "a weight has shape {:?}, expected two dimensions",
                tensor.shape
            )));
        };
        let dtype = dtype.unwrap_or(tensor.dtype);
        let reserved = |r: std::io::Result<Bytes>| r.map_err(Error::io("memory", "reserve"));
        // as stored, and after a conversion
        let (found, overflow) = (NotFinite::default(), NotFinite::default());
        let converted = dtype != tensor.dtype;
        let bytes = if converted {
            // row by row, so that a large matrix never exists twice in f32
            let width = cols * tensor.dtype.size();
            let row = |i: usize| {
                let bytes = tensor.bytes.slice(i * width..(i + 1) * width);
                found.look(cpu.isa, tensor.dtype, i * cols, &bytes);
                if i.is_multiple_of(GIVE_BACK) {
                    tensor.bytes.give_back(i.saturating_sub(GIVE_BACK) * width..i * width);
                }
                HostTensor { dtype: tensor.dtype, shape: vec![cols], bytes }.to_f32()
            };
            if dtype == DType::Int8 {
                let matrix =
                    Int8::new(cpu, rows, cols, row).map_err(Error::io("memory", "reserve"))?;
                found.result(&tensor.shape, finite::STORED)?;
                return Ok(Matrix::Int8(matrix));
            }
            let bytes = reserved(Bytes::resident(rows * cols * dtype.size(), |out| {
                for (i, out) in out.chunks_exact_mut(cols * dtype.size()).enumerate() {
                    narrow(cpu.isa, &row(i), dtype, out);
                    overflow.look(cpu.isa, dtype, i * cols, out);
                }
            }))?;
            found.result(&tensor.shape, finite::STORED)?;
            overflow.result(&tensor.shape, &finite::overflowed(dtype))?;
            bytes
        } else {
            tensor.bytes.clone()
        };
        #[cfg(target_arch = "x86_64")]
        if dtype == DType::Bf16 && cpu.isa.has_bf16() {
            // nobody else's any more, so that it is laid out where it lies
            drop(tensor.bytes);
            let packed = Packed::new(cpu, bytes, [rows, cols], &found)
                .map_err(Error::io("memory", "reserve"))?;
            found.result(&tensor.shape, finite::STORED)?;
            return Ok(Matrix::Bf16Packed(packed));
        }
        let bytes = match bytes {
            Bytes::Mapped(..) if cpu.resident => {
                reserved(into_resident(cpu, bytes, 1 << 20, |at, from, to| {
                    found.look(cpu.isa, dtype, at / dtype.size(), from);
                    to.copy_from_slice(from);
                }))?
            }
            bytes if converted => bytes,
            bytes => {
                let stored = HostTensor { dtype, shape: tensor.shape.clone(), bytes };
                finite::check_parallel(cpu, &stored)?;
                stored.bytes
            }
        };
        found.result(&tensor.shape, finite::STORED)?;
        Ok(match dtype {
            DType::F32 => Matrix::F32(Plain { data: Elements::from_bytes(bytes), rows, cols }),
            DType::F16 => Matrix::F16(Plain { data: Elements::from_bytes(bytes), rows, cols }),
            DType::Bf16 => Matrix::Bf16(Plain { data: Elements::from_bytes(bytes), rows, cols }),
            DType::Int8 => return Err(Error::invalid("int8 weights are made at load, not read")),
        })
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
            #[cfg(target_arch = "x86_64")]
            Matrix::Bf16Packed(m) => m.read_row(row, out),
            Matrix::Int8(m) => m.read_row(row, out),
        }
    }
}

/// Writes `x` in the stored type.
fn narrow(isa: Isa, x: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F16 => narrow_f16(isa, x, bytemuck::cast_slice_mut(out)),
        DType::Bf16 => narrow_bf16(isa, x, bytemuck::cast_slice_mut(out)),
        _ => out.copy_from_slice(bytemuck::cast_slice(x)),
    }
}

impl Weight for Matrix {
    fn rows(&self) -> usize {
        match self {
            Matrix::F32(m) => m.rows,
            Matrix::F16(m) => m.rows,
            Matrix::Bf16(m) => m.rows,
            #[cfg(target_arch = "x86_64")]
            Matrix::Bf16Packed(m) => m.rows(),
            Matrix::Int8(m) => m.rows(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Matrix::F32(m) => m.cols,
            Matrix::F16(m) => m.cols,
            Matrix::Bf16(m) => m.cols,
            #[cfg(target_arch = "x86_64")]
            Matrix::Bf16Packed(m) => m.cols(),
            Matrix::Int8(m) => m.cols(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Matrix::F32(_) => DType::F32,
            Matrix::F16(_) => DType::F16,
            Matrix::Bf16(_) => DType::Bf16,
            #[cfg(target_arch = "x86_64")]
            Matrix::Bf16Packed(_) => DType::Bf16,
            Matrix::Int8(_) => DType::Int8,
        }
    }
}
