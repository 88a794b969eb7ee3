//! What kernels call: the other side of `include/emulated.h`.

use crate::block::{Block, CURRENT, CollectiveOp, Copy, PhaseBarrier, Place, Wait, fault, suspend};
use crate::memory::WRITTEN;
use std::ffi::{c_char, c_void};

/// The running thread's block and number.
///
/// # Safety
/// Only from within a kernel, one borrow at a time.
unsafe fn here() -> (&'static mut Block<'static>, usize) {
    let current = CURRENT.get().expect("only kernels call this");
    (unsafe { &mut *current.block }, current.thread)
}

#[unsafe(no_mangle)]
extern "C" fn emulator_thread() -> *const Place {
    let current = CURRENT.get().expect("only kernels ask where they are");
    // SAFETY: the block is alive while its threads run.
    unsafe { &(&(*current.block).threads)[current.thread].place }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier(id: u32, count: u32) {
    suspend(Wait::Barrier { id, count });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_collective(size: u32, mask: u32, op: CollectiveOp, data: *mut c_void, name: *const c_char) {
    suspend(Wait::Collective { size, mask, op: op as usize, data: data as usize, name });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_yield() {
    suspend(Wait::Runnable);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_copy_async(to: usize, from: usize, bytes: u32, zeros: u32) {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    block.threads[t].copies.push(Copy { to, from, bytes: bytes as usize, zeros: zeros as usize });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_copy_commit() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let end = block.threads[t].copies.len();
    block.threads[t].groups.push(end);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_copy_wait(groups_left: u32) {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    if let Err(message) = block.finish_copies(t, groups_left as usize) {
        fault(&message);
    }
}

/// The barrier object at an address, or a fault if there is none.
fn barrier_at(block: &mut Block<'static>, at: usize) -> *mut PhaseBarrier {
    if !block.barriers.contains_key(&at) {
        fault("a barrier object is used that was not initialized");
    }
    block.barriers.get_mut(&at).expect("looked at above")
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier_init(at: usize, count: u32) {
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    block.barriers.insert(at, PhaseBarrier { expected: count, ..PhaseBarrier::default() });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier_arrive(at: usize, bytes: u32) {
    // SAFETY: called by a kernel; nothing else holds the barrier.
    let barrier = unsafe { &mut *barrier_at(here().0, at) };
    if barrier.arrived == barrier.expected {
        fault("more arrivals at a barrier object than it expects in a phase");
    }
    barrier.bytes += bytes as i64;
    barrier.arrived += 1;
    barrier.settle();
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier_wait(at: usize, parity: u32) {
    // SAFETY: called by a kernel.
    let over = unsafe { (*barrier_at(here().0, at)).parity } != parity;
    // others get a chance either way
    suspend(if over { Wait::Runnable } else { Wait::Phase { barrier: at, parity } });
}

/// A matrix of 16-bit elements and the tiles to copy of it, as [`crate::tensor_map`] writes it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorMap {
    pub magic: u64,
    pub at: u64,
    pub rows: u64,
    pub cols: u64,
    pub tile_rows: u64,
}

impl TensorMap {
    pub const MAGIC: u64 = 0x7465_6e73_6f72_6d70;
}

#[unsafe(no_mangle)]
extern "C" fn emulator_copy_tile(to: usize, map: *const TensorMap, row: u32, column: u32, barrier: usize) {
    // SAFETY: called by a kernel, with one of its arguments.
    let ((block, t), map) = unsafe { (here(), *map) };
    let start = to.wrapping_sub(block.threads[t].place.shared as usize);
    let bytes = map.tile_rows as usize * 128;
    if map.magic != TensorMap::MAGIC {
        fault("a tile is copied with something that is no tensor map");
    }
    if !start.is_multiple_of(1024) || start + bytes > block.states.len() {
        fault(&format!(
            "a tile of {bytes} bytes is copied to shared byte {start}: not aligned to 1024, or out of bounds"
        ));
    }
    for r in 0..map.tile_rows {
        for piece in 0..8u64 {
            let offset = (r * 128 + (piece ^ (r & 7)) * 16) as usize;
            let (y, x) = (row as u64 + r, column as u64 + piece * 8);
            let mut values = [0u16; 8];
            for (i, v) in values.iter_mut().enumerate() {
                if y < map.rows && x + (i as u64) < map.cols {
                    let from = (map.at + (y * map.cols + x + i as u64) * 2) as usize;
                    let found = block.launch.arena.find(from).map(|at| block.launch.arena.access(at, 2, false));
                    match found {
                        // SAFETY: checked just now.
                        Some(Ok(())) => *v = unsafe { *(from as *const u16) },
                        Some(Err(e)) => fault(&format!("a tile's copy reads memory that is {e}")),
                        None => fault("a tile's copy reads outside device memory"),
                    }
                }
            }
            block.states[start + offset..start + offset + 16].fill(WRITTEN);
            // SAFETY: inside shared memory, checked above.
            unsafe { ((to + offset) as *mut [u16; 8]).write_unaligned(values) };
        }
    }
    // SAFETY: as in `emulator_barrier_arrive`.
    let barrier = unsafe { &mut *barrier_at(block, barrier) };
    barrier.bytes -= bytes as i64;
    barrier.settle();
}
