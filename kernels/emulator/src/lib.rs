//! Runs CUDA kernels on the CPU, one fiber a thread, and reports what they do wrong.
//!
//! The kernels are this project's `kernels/*.cu`, compiled as C++ against `include/emulated.h`. A
//! launch takes what a driver would: a name, a grid, a block size, bytes of shared memory and
//! arguments by address. It reports, with kernel, block and thread:
//!
//! - a barrier that not all threads reach, and any other deadlock;
//! - lanes of a warp that meet in different operations;
//! - accesses out of bounds of device or shared memory, and to freed memory;
//! - reads of memory that nothing wrote;
//! - reads of what an earlier kernel writes that may still run, before the wait for it;
//! - reads of what another block of the launch wrote, without fence and flag between;
//! - operands of TMA and wgmma without the fences that these need, with other swizzles than their
//!   descriptors say, and registers given away that the block does not have;
//! - results that change with the order in which threads run (a missing barrier), if
//!   [`Emulator::check_order`] is set;
//! - arguments, block sizes and shared memory that do not fit the kernel.

mod block;
mod calls;
mod check;
mod memory;
pub mod mutant;
mod registry;
mod tensor_map;
mod visibility;

pub use memory::Address;
pub use tensor_map::{TensorMapConfig, tensor_map};

use block::{Launch, Schedule};
use memory::Arena;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A device of its own: its memory, and how launches are scheduled.
pub struct Emulator {
    arena: Arc<Arena>,
    /// Runs each launch twice from the same memory, in the natural and in a shuffled order, and
    /// compares.
    pub check_order: bool,
    /// Threads of this machine that run blocks.
    pub workers: usize,
    /// Shared memory that a block may ask for.
    pub shared_limit: u32,
    launches: AtomicU64,
    /// Runs of kernels so far; a launch whose order is checked has two.
    runs: AtomicU64,
    /// The first run that may not have ended when a dependent launch begins.
    window: AtomicU64,
}

/// What a launch needs; sizes as in CUDA.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
    /// All blocks are alive together and may wait for each other.
    pub cooperative: bool,
    /// So many blocks, neighbours along x, are a cluster: alive together, with barriers and each
    /// other's shared memory. 1: none.
    pub cluster: u32,
    /// It may begin before the launches before it have ended (programmatic dependent launch).
    pub dependent: bool,
}

impl Emulator {
    /// A device with room for `bytes`; memory is only taken as it is used.
    pub fn new(bytes: usize) -> Emulator {
        Emulator {
            arena: Arc::new(Arena::new(bytes)),
            check_order: false,
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
            shared_limit: 227 * 1024,
            launches: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            window: AtomicU64::new(1),
        }
    }

    /// Reserves memory that nothing has written yet.
    pub fn allocate(&self, bytes: usize) -> Result<Address, String> {
        self.arena.allocate(bytes)
    }

    pub fn free(&self, at: Address) {
        self.arena.free(at);
    }

    /// Copies wait for all launches before them, and launches for the copies before them.
    pub fn write(&self, at: Address, bytes: &[u8]) -> Result<(), String> {
        self.all_launches_have_ended();
        self.arena.write(at, bytes)
    }

    pub fn read(&self, at: Address, bytes: &mut [u8]) -> Result<(), String> {
        self.all_launches_have_ended();
        self.arena.read(at, bytes)
    }

    fn all_launches_have_ended(&self) {
        self.window.store(self.runs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Launches done so far.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Names of all kernels, the faulty ones of this crate's own tests included.
    pub fn kernels() -> Vec<String> {
        registry::names()
    }

    /// Whether there is a kernel of this name.
    pub fn has(kernel: &str) -> bool {
        registry::find(kernel).is_some()
    }

    /// Runs a kernel to its end. Each argument is its bytes.
    pub fn launch(&self, kernel: &str, shape: Shape, args: &[&[u8]]) -> Result<(), String> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        let entry = registry::find(kernel).ok_or_else(|| format!("there is no kernel {kernel}"))?;
        let sizes: Vec<u32> = args.iter().map(|a| a.len() as u32).collect();
        if sizes != entry.sizes {
            return Err(format!(
                "{kernel}: arguments of {:?} bytes were given, it takes {:?}",
                sizes, entry.sizes
            ));
        }
        if shape.threads == 0 || shape.threads > entry.threads {
            return Err(format!(
                "{kernel}: {} threads a block, it is built for {}",
                shape.threads, entry.threads
            ));
        }
        if shape.shared_bytes > self.shared_limit {
            return Err(format!(
                "{kernel}: {} bytes of shared memory, the device has {} a block",
                shape.shared_bytes, self.shared_limit
            ));
        }
        if shape.grid.contains(&0) || shape.grid[1] > 65535 || shape.grid[2] > 65535 {
            return Err(format!("{kernel}: no grid of {:?} blocks", shape.grid));
        }
        if !(1..=8).contains(&shape.cluster) || !shape.grid[0].is_multiple_of(shape.cluster) {
            return Err(format!(
                "{kernel}: no clusters of {} in a grid of {:?} blocks",
                shape.cluster, shape.grid
            ));
        }
        if !shape.dependent {
            self.all_launches_have_ended();
        }
        let first = self.runs.load(Ordering::Relaxed) + 1;
        let run = |schedule| {
            let launch = Launch {
                kernel: entry,
                shape,
                args: args.iter().map(|a| a.to_vec()).collect(),
                arena: &self.arena,
                schedule,
                fault: Mutex::new(None),
                number: self.runs.fetch_add(1, Ordering::Relaxed) + 1,
                running: self.window.load(Ordering::Relaxed)..first,
                flags: Mutex::default(),
                waited: AtomicBool::new(false),
            };
            launch.run(self.workers)
        };
        if !self.check_order {
            return run(Schedule::Natural);
        }
        let before = self.arena.snapshot();
        run(Schedule::Natural)?;
        let natural = self.arena.snapshot();
        self.arena.restore(&before);
        run(Schedule::Shuffled(self.launches() * 7919 + 1))?;
        match self.arena.first_difference(&natural) {
            None => Ok(()),
            Some(at) => Err(format!(
                "{kernel}: the result depends on the order of threads (first in {at}): a barrier \
                is missing"
            )),
        }
    }
}
