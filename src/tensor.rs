//! Named numbers in somebody's memory: a mapped file, the program itself, or our own.

use half::{bf16, f16};
use memmap2::Mmap;
use std::ops::Range;
use std::sync::Arc;

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with one f32 scale per output row.
    Int8,
}

impl DType {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::Int8 => 1,
        }
    }

    /// Its name in this program's options and output.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::Int8 => "int8",
        }
    }

    /// As `config.json` spells it.
    pub fn torch_name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
            DType::Int8 => "int8",
        }
    }
}

/// Read-only bytes that outlive whoever holds them, without a copy where they were mapped.
#[derive(Clone)]
pub enum Bytes {
    /// A range of a mapped file.
    Mapped(Arc<Mmap>, Range<usize>),
    /// Of no file, in large pages.
    HugePages(Arc<Mmap>, Range<usize>),
    /// Bytes that the program itself contains.
    Static(&'static [u8]),
    /// A range of a vector.
    Owned(Arc<Vec<u8>>, Range<usize>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map, range) | Bytes::HugePages(map, range) => &map[range.clone()],
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes, range) => &bytes[range.clone()],
        }
    }
}

impl Bytes {
    /// Memory of `len` bytes in huge pages, where the system has them: reading all of it misses
    /// the TLB far less than reading a mapped file, whose pages are small. `fill` gets it
    /// zeroed.
    pub fn in_huge_pages(len: usize, fill: impl FnOnce(&mut [u8])) -> std::io::Result<Bytes> {
        let mut memory = memmap2::MmapMut::map_anon(len.max(1))?;
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        fill(&mut memory[..len]);
        Ok(Bytes::HugePages(Arc::new(memory.make_read_only()?), 0..len))
    }

    /// Releases the pages of a part where it is a mapped file's; they come again when it is read.
    pub fn release_pages(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Bytes::Mapped(map, whole) = self {
            assert!(range.start <= range.end && whole.start + range.end <= whole.end);
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is of a file and read-only, so its pages are as they were when
            // they come again.
            let _ = unsafe {
                map.unchecked_advise_range(advice, whole.start + range.start, range.len())
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// A part of these bytes; `range` must lie inside them.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        match self {
            Bytes::Mapped(map, outer) => {
                assert!(range.start <= range.end && outer.start + range.end <= outer.end);
                Bytes::Mapped(map.clone(), outer.start + range.start..outer.start + range.end)
            }
            Bytes::HugePages(map, outer) => {
                assert!(range.start <= range.end && outer.start + range.end <= outer.end);
                Bytes::HugePages(map.clone(), outer.start + range.start..outer.start + range.end)
            }
            Bytes::Static(bytes) => Bytes::Static(&bytes[range]),
            Bytes::Owned(bytes, outer) => {
                assert!(range.start <= range.end && outer.start + range.end <= outer.end);
                Bytes::Owned(bytes.clone(), outer.start + range.start..outer.start + range.end)
            }
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        let all = 0..bytes.len();
        Bytes::Owned(Arc::new(bytes), all)
    }
}

/// A dense row-major tensor as a checkpoint stores it.
#[derive(Clone)]
pub struct HostTensor {
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes of the dimensions, the outermost first.
    pub shape: Vec<usize>,
    /// The elements, little-endian and without padding.
    pub bytes: Bytes,
}

impl HostTensor {
    /// Rows of `cols` numbers in f32.
    pub fn of_rows(x: &[f32], cols: usize) -> HostTensor {
        let bytes: Vec<u8> = bytemuck::cast_slice(x).to_vec();
        let len = bytes.len();
        HostTensor {
            dtype: DType::F32,
            shape: vec![x.len() / cols, cols],
            bytes: Bytes::Owned(Arc::new(bytes), 0..len),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            DType::F32 => self
                .bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            DType::F16 => pairs().map(|b| f16::from_bits(b).to_f32()).collect(),
            DType::Bf16 => pairs().map(|b| bf16::from_bits(b).to_f32()).collect(),
            DType::Int8 => self.bytes.iter().map(|&b| b as i8 as f32).collect(),
        }
    }
}

/// Elements of a plain type, either our own or inside [`Bytes`].
#[derive(Clone)]
pub enum Elements<T: bytemuck::Pod> {
    /// Elements of our own.
    Owned(Arc<Vec<T>>),
    /// Elements inside bytes that are aligned for `T`.
    Shared(Bytes, std::marker::PhantomData<T>),
}

impl<T: bytemuck::Pod> Elements<T> {
    /// Elements of a vector.
    pub fn owned(v: Vec<T>) -> Self {
        Elements::Owned(Arc::new(v))
    }

    /// A view of `bytes` where they are aligned for `T`, else a copy.
    pub fn from_bytes(bytes: Bytes) -> Self {
        match bytemuck::try_cast_slice::<u8, T>(&bytes) {
            Ok(_) => Elements::Shared(bytes, std::marker::PhantomData),
            Err(_) => Elements::owned(bytemuck::pod_collect_to_vec(&bytes)),
        }
    }
}

impl<T: bytemuck::Pod> std::ops::Deref for Elements<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Elements::Owned(v) => v,
            Elements::Shared(bytes, _) => bytemuck::cast_slice(bytes),
        }
    }
}
