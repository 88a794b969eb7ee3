//! Where memory lives and how kernels are launched.
//!
//! All of `ops/cuda` is written against [`Launcher`]: the CUDA driver is one, the emulator that the
//! tests use another, so that grids, block sizes, shared memory and the order of arguments are
//! checked on machines without a GPU.

pub mod cuda;
pub mod images;
pub mod nccl;
mod staging;

use crate::error::{Error, Result};
use std::rc::Rc;

/// An address in device memory.
pub type Address = u64;

/// A launch's size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// All blocks are alive together and may wait for each other.
    pub cooperative: bool,
    /// So many blocks, neighbours along x, are a cluster: Hopper's, with barriers and each other's
    /// shared memory. 1: none.
    pub cluster: u32,
}

impl LaunchConfig {
    /// A plain launch.
    pub fn new(grid: [usize; 3], threads: u32, shared_bytes: usize) -> LaunchConfig {
        let grid = grid.map(|n| n as u32);
        LaunchConfig {
            grid,
            threads,
            shared_bytes: shared_bytes as u32,
            cooperative: false,
            cluster: 1,
        }
    }
}

/// What the device allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Shared memory that a block may ask for, in bytes.
    pub shared_bytes: u32,
    /// Streaming multiprocessors.
    pub processors: u32,
    /// Whether kernels that need Hopper's own instructions are to be used.
    pub hopper: bool,
}

/// What Hopper's copy engine needs to know of a matrix.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// How TMA finds the tiles of a matrix of 16-bit elements: the arguments of
/// `cuTensorMapEncodeTiled`, in its order and units, the inner dimension first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorMapConfig {
    /// Where the matrix begins, aligned to 16 bytes.
    pub address: Address,
    /// Elements of a row, and rows.
    pub global_dim: [u64; 2],
    /// Bytes from one row to the next, a multiple of 16.
    pub global_stride: u64,
    /// Elements of a row of a tile, and rows of a tile: at most 256.
    pub box_dim: [u32; 2],
    /// Every so many elements are taken.
    pub element_strides: [u32; 2],
    /// How 16-byte chunks of a tile are permuted in shared memory: not (0), or within 32 (1), 64
    /// (2) or 128 bytes (3).
    pub swizzle: u32,
}

impl TensorMapConfig {
    /// Tiles of `tile_rows` by 64 of the row-major matrix `[rows, cols]`, swizzled by 128 bytes as
    /// wgmma reads them; elements beyond the matrix are zeros.
    pub fn tiles(at: Address, rows: usize, cols: usize, tile_rows: usize) -> TensorMapConfig {
        TensorMapConfig {
            address: at,
            global_dim: [cols as u64, rows as u64],
            global_stride: 2 * cols as u64,
            box_dim: [64, tile_rows as u32],
            element_strides: [1, 1],
            swizzle: 3,
        }
    }
}

/// What a device answers to anything but launches during graph capture.
pub(crate) fn not_capturable(what: &str) -> Error {
    Error::Cuda(format!("{what} was asked for while launches were captured"))
}

/// A device. Work is done in the order in which it is asked for; only reading waits for it.
pub trait Launcher {
    /// Launches that are done together.
    type CapturedGraph;
    /// A copy to the host that nobody waits for yet.
    type PendingRead;

    /// What the device allows.
    fn limits(&self) -> Limits;
    /// Bytes of its memory that are left, if that is known.
    fn free_memory(&self) -> Option<u64>;
    /// Reserves `bytes` bytes, whose content is undefined.
    ///
    /// # Errors
    /// [`Error::DeviceOutOfMemory`] if there is no room for them.
    fn allocate(&self, bytes: usize) -> Result<Address>;
    /// Gives up memory that [`Launcher::allocate`] reserved.
    fn free(&self, at: Address);
    /// Copies `bytes` to the device.
    fn write(&self, at: Address, bytes: &[u8]) -> Result<()>;
    /// Sets `bytes` bytes to zero.
    fn zero(&self, at: Address, bytes: usize) -> Result<()>;
    /// Waits for all work so far and fills `bytes` from the device; work that failed is reported
    /// here.
    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()>;
    /// [`Launcher::read`] of what is there once all that was asked for so far is done; later work
    /// does not have to be waited for.
    fn read_later(&self, at: Address, bytes: usize) -> Result<Self::PendingRead>;
    /// Waits for a copy of [`Launcher::read_later`] and returns its bytes.
    fn finish_read(&self, pending: Self::PendingRead) -> Result<Vec<u8>>;
    /// Starts the kernel of this name, and does not wait for it.
    fn launch(&self, kernel: &str, config: LaunchConfig, args: &Args) -> Result<()>;
    /// Keeps the launches of `work` instead of doing them; it may ask for nothing but launches.
    /// Without `overlap` each kernel begins when the one before has ended.
    fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<()>,
        overlap: bool,
    ) -> Result<Self::CapturedGraph>;
    /// Does what was captured, with the arguments of then.
    fn replay(&self, graph: &Self::CapturedGraph) -> Result<()>;
    /// Seconds by the device's clock from the first to the last thing that `work` asks for; waits
    /// for it.
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
    /// How often memory has been reserved or freed: for as long as this stays, addresses in
    /// captured graphs hold.
    fn allocation_epoch(&self) -> u64;
    /// Encodes a tensor map.
    ///
    /// # Errors
    /// If it breaks one of the driver's rules.
    fn tensor_map(&self, config: &TensorMapConfig) -> Result<TensorMap>;
}

/// Arguments of a launch, each aligned to 64 bytes.
#[derive(Clone, Default)]
pub struct Args {
    lines: Vec<TensorMap>,
    /// First line and bytes of each.
    parts: Vec<(usize, usize)>,
}

impl Args {
    /// No arguments.
    pub fn new() -> Args {
        Args::default()
    }

    /// Adds a value as its bytes; structs are laid out as the kernel's.
    pub fn with<T: bytemuck::NoUninit>(mut self, value: T) -> Args {
        let bytes = bytemuck::bytes_of(&value);
        let first = self.lines.len();
        self.lines.resize(first + bytes.len().div_ceil(size_of::<TensorMap>()), TensorMap([0; 16]));
        bytemuck::cast_slice_mut(&mut self.lines[first..])[..bytes.len()].copy_from_slice(bytes);
        self.parts.push((first, bytes.len()));
        self
    }

    /// The bytes of each argument, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.parts
            .iter()
            .map(|&(first, bytes)| &bytemuck::cast_slice(&self.lines[first..])[..bytes])
    }
}

/// Device memory that is freed with this value, unless it is a view of other memory.
pub struct Memory<L: Launcher> {
    launcher: Rc<L>,
    owned: bool,
    /// Where it begins.
    pub at: Address,
    /// Its size in bytes.
    pub bytes: usize,
}

impl<L: Launcher> Memory<L> {
    /// Reserves `bytes` bytes, whose content is undefined.
    pub fn new(launcher: &Rc<L>, bytes: usize) -> Result<Memory<L>> {
        let at = launcher.allocate(bytes)?;
        Ok(Memory { launcher: launcher.clone(), owned: true, at, bytes })
    }

    /// A part of other memory, which must live as long as this is used.
    pub fn view(launcher: &Rc<L>, at: Address, bytes: usize) -> Memory<L> {
        Memory { launcher: launcher.clone(), owned: false, at, bytes }
    }

    /// Memory that holds a copy of `bytes`.
    pub fn from_bytes(launcher: &Rc<L>, bytes: &[u8]) -> Result<Memory<L>> {
        let memory = Memory::new(launcher, bytes.len())?;
        launcher.write(memory.at, bytes)?;
        Ok(memory)
    }

    /// Memory of `bytes` zero bytes.
    pub fn zeroed(launcher: &Rc<L>, bytes: usize) -> Result<Memory<L>> {
        let memory = Memory::new(launcher, bytes)?;
        launcher.zero(memory.at, bytes)?;
        Ok(memory)
    }
}

impl<L: Launcher> Drop for Memory<L> {
    fn drop(&mut self) {
        if self.owned {
            self.launcher.free(self.at);
        }
    }
}
