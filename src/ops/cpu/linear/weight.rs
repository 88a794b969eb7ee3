//! Weight matrices as the linear operation reads them.

#[cfg(target_arch = "x86_64")]
use super::bf16::Bf16Weight;
use super::int8::Int8Weight;
use crate::error::{Error, Result};
use crate::ops::Weight;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::finite::{self, NotFinite};
use crate::ops::cpu::huge_pages::into_huge_pages;
use crate::ops::cpu::rows::{f32_to_bf16, f32_to_f16};
use crate::ops::cpu::simd::Isa;
use crate::tensor::{Bytes, DType, Elements, HostTensor};
use bytemuck::Pod;
use half::{bf16, f16};

/// Rows after whose conversion a mapped file's pages are released.
const RELEASE_ROWS: usize = 1024;

/// A matrix of plain elements, mapped where the file's alignment allows.
pub struct RowMajor<E: Pod> {
    pub data: Elements<E>,
    rows: usize,
    cols: usize,
}

/// `[rows, cols]`, row-major.
pub enum CpuWeight {
    /// Elements in f32.
    F32(RowMajor<f32>),
    /// Elements in f16.
    F16(RowMajor<f16>),
    /// Elements in bf16.
    Bf16(RowMajor<bf16>),
    /// Elements in bf16, in the order in which BF16 dot products read them.
    #[cfg(target_arch = "x86_64")]
    Bf16Packed(super::bf16::Bf16Weight),
    /// 8-bit integers with one f32 scale per row.
    Int8(Int8Weight),
}

impl CpuWeight {
    /// Prepares a tensor for the linear operation, and fails with [`Error::Weights`] if it holds
    /// what is no number. One that is stored in `dtype` already (or if that is `None`) and lies in
    /// a mapped file stays there, unless [`Cpu::resident`] or its layout says otherwise.
    pub fn new(cpu: &Cpu, tensor: HostTensor, dtype: Option<DType>) -> Result<CpuWeight> {
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
                if i.is_multiple_of(RELEASE_ROWS) {
                    tensor.bytes.release_pages(i.saturating_sub(RELEASE_ROWS) * width..i * width);
                }
                HostTensor { dtype: tensor.dtype, shape: vec![cols], bytes }.to_f32()
            };
            if dtype == DType::Int8 {
                let matrix = Int8Weight::new(cpu, rows, cols, row)
                    .map_err(Error::io("memory", "reserve"))?;
                found.result(&tensor.shape, finite::STORED)?;
                return Ok(CpuWeight::Int8(matrix));
            }
            let bytes = reserved(Bytes::in_huge_pages(rows * cols * dtype.size(), |out| {
                for (i, out) in out.chunks_exact_mut(cols * dtype.size()).enumerate() {
                    convert(cpu.isa, &row(i), dtype, out);
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
            let packed = Bf16Weight::new(cpu, bytes, [rows, cols], &found)
                .map_err(Error::io("memory", "reserve"))?;
            found.result(&tensor.shape, finite::STORED)?;
            return Ok(CpuWeight::Bf16Packed(packed));
        }
        let bytes = match bytes {
            Bytes::Mapped(..) if cpu.resident => {
                reserved(into_huge_pages(cpu, bytes, 1 << 20, |at, from, to| {
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
        CpuWeight::row_major(bytes, dtype, rows, cols)
    }

    fn row_major(bytes: Bytes, dtype: DType, rows: usize, cols: usize) -> Result<CpuWeight> {
        Ok(match dtype {
            DType::F32 => {
                CpuWeight::F32(RowMajor { data: Elements::from_bytes(bytes), rows, cols })
            }
            DType::F16 => {
                CpuWeight::F16(RowMajor { data: Elements::from_bytes(bytes), rows, cols })
            }
            DType::Bf16 => {
                CpuWeight::Bf16(RowMajor { data: Elements::from_bytes(bytes), rows, cols })
            }
            DType::Int8 => return Err(Error::invalid("int8 weights are made at load, not read")),
        })
    }

    /// Bytes that one call reads.
    pub fn bytes(&self) -> usize {
        let scales = if let CpuWeight::Int8(m) = self { 8 * m.rows() } else { 0 };
        self.rows() * self.cols() * self.dtype().size() + scales
    }

    /// Copies a row in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols()..(row + 1) * self.cols();
        fn copy<T: Copy>(from: &[T], to: &mut [f32], f: impl Fn(T) -> f32) {
            to.iter_mut().zip(from).for_each(|(t, v)| *t = f(*v));
        }
        match self {
            CpuWeight::F32(m) => out.copy_from_slice(&m.data[range]),
            CpuWeight::F16(m) => copy(&m.data[range], out, f16::to_f32),
            CpuWeight::Bf16(m) => copy(&m.data[range], out, bf16::to_f32),
            #[cfg(target_arch = "x86_64")]
            CpuWeight::Bf16Packed(m) => m.read_row(row, out),
            CpuWeight::Int8(m) => m.read_row(row, out),
        }
    }
}

/// Writes `x` in the stored type.
fn convert(isa: Isa, x: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F16 => f32_to_f16(isa, x, bytemuck::cast_slice_mut(out)),
        DType::Bf16 => f32_to_bf16(isa, x, bytemuck::cast_slice_mut(out)),
        _ => out.copy_from_slice(bytemuck::cast_slice(x)),
    }
}

impl Weight for CpuWeight {
    fn rows(&self) -> usize {
        match self {
            CpuWeight::F32(m) => m.rows,
            CpuWeight::F16(m) => m.rows,
            CpuWeight::Bf16(m) => m.rows,
            #[cfg(target_arch = "x86_64")]
            CpuWeight::Bf16Packed(m) => m.rows(),
            CpuWeight::Int8(m) => m.rows(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            CpuWeight::F32(m) => m.cols,
            CpuWeight::F16(m) => m.cols,
            CpuWeight::Bf16(m) => m.cols,
            #[cfg(target_arch = "x86_64")]
            CpuWeight::Bf16Packed(m) => m.cols(),
            CpuWeight::Int8(m) => m.cols(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            CpuWeight::F32(_) => DType::F32,
            CpuWeight::F16(_) => DType::F16,
            CpuWeight::Bf16(_) => DType::Bf16,
            #[cfg(target_arch = "x86_64")]
            CpuWeight::Bf16Packed(_) => DType::Bf16,
            CpuWeight::Int8(_) => DType::Int8,
        }
    }
}
