//! What kernels call: the other side of `include/emulated.h`.

use crate::block::{
    Block, CURRENT, CollectiveOp, Copy, Mbarrier, NO_MBARRIER, Schedule, ThreadCoords, Tile, Wait,
    Wgmma, check_operand, fault, here, suspend,
};
use crate::tensor_map::TensorMap;
use std::ffi::{c_char, c_void};

#[unsafe(no_mangle)]
extern "C" fn emulator_thread() -> *const ThreadCoords {
    let current = CURRENT.get().expect("only kernels ask where they are");
    // SAFETY: the block is alive while its threads run.
    unsafe { &(&(*current.block).threads)[current.thread].coords }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier(id: u32, count: u32) {
    suspend(Wait::Barrier { id, count });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_collective(
    size: u32,
    mask: u32,
    op: CollectiveOp,
    data: *mut c_void,
    name: *const c_char,
) {
    suspend(Wait::Collective { size, mask, op: op as usize, data: data as usize, name });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_yield() {
    suspend(Wait::Runnable);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_cluster_barrier() {
    suspend(Wait::Cluster);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_cluster_size() -> u32 {
    // SAFETY: called by a kernel.
    unsafe { here() }.0.launch.shape.cluster
}

/// The address of the same place in the shared memory of another block of the cluster.
#[unsafe(no_mangle)]
extern "C" fn emulator_cluster_shared(at: usize, rank: u32) -> usize {
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    let start = |b: &Block| b.threads[0].coords.shared as usize;
    if block.launch.shape.cluster == 1 && rank == 0 {
        return at;
    }
    let Some(&other) = block.cluster.get(rank as usize) else {
        fault(&format!(
            "asks for shared memory of block {rank} of a cluster of {}",
            block.cluster.len()
        ));
        return 0;
    };
    // SAFETY: blocks of a cluster live as long as each other; nothing of them changes here.
    at - start(block) + start(unsafe { &*other })
}

#[unsafe(no_mangle)]
extern "C" fn emulator_cp_async(to: usize, from: usize, bytes: u32, zeros: u32) {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    block.threads[t].copies.push(Copy { to, from, bytes: bytes as usize, zeros: zeros as usize });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_cp_async_commit_group() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let end = block.threads[t].copies.len();
    block.threads[t].groups.push(end);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_cp_async_wait_group(groups_left: u32) {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    if let Err(message) = block.finish_copies(t, groups_left as usize) {
        fault(&message);
    }
}

/// The mbarrier at an address, or a fault if there is none.
fn mbarrier_at(block: &mut Block<'static>, at: usize) -> *mut Mbarrier {
    if !block.mbarriers.contains_key(&at) {
        fault(NO_MBARRIER);
    }
    block.mbarriers.get_mut(&at).expect("looked at above")
}

#[unsafe(no_mangle)]
extern "C" fn emulator_mbarrier_init(at: usize, count: u32) {
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    block.mbarriers.insert(at, Mbarrier { expected: count, ..Mbarrier::default() });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_mbarrier_arrive(at: usize, bytes: u32) {
    // SAFETY: called by a kernel.
    arrive(unsafe { here() }.0, at, bytes);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_mbarrier_arrive_cluster(at: usize, rank: u32) {
    let there = emulator_cluster_shared(at, rank);
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    let other = block.cluster.get(rank as usize).copied().unwrap_or(block);
    // SAFETY: blocks of a cluster live as long as each other, and no other thread runs.
    let other = unsafe { &mut *other };
    if other.ended() {
        fault("arrives at an mbarrier of a block which has ended");
    }
    arrive(other, there, 0);
}

fn arrive(block: &mut Block<'static>, at: usize, bytes: u32) {
    // SAFETY: nothing else holds the barrier.
    let barrier = unsafe { &mut *mbarrier_at(block, at) };
    if barrier.arrived == barrier.expected {
        fault("more arrivals at an mbarrier than it expects in a phase");
    }
    barrier.bytes += bytes as i64;
    barrier.arrived += 1;
    barrier.settle();
}

#[unsafe(no_mangle)]
extern "C" fn emulator_mbarrier_wait(at: usize, parity: u32) {
    // SAFETY: called by a kernel.
    if let Err(message) = unsafe { here() }.0.finish_tiles(at) {
        fault(&message);
    }
    // SAFETY: as in `emulator_mbarrier_arrive`.
    let over = unsafe { (*mbarrier_at(here().0, at)).parity } != parity;
    // others get a chance either way
    suspend(if over { Wait::Runnable } else { Wait::Phase { barrier: at, parity } });
}

/// TMA may take its time: in the natural order of threads tiles come when somebody
/// waits for them, in the shuffled one at once, so that both a read that does not wait and a copy
/// that does not wait for its place are seen.
#[unsafe(no_mangle)]
extern "C" fn emulator_tma_load(
    to: usize,
    map: *const TensorMap,
    row: u32,
    column: u32,
    barrier: usize,
    blocks: u32,
) {
    // SAFETY: called by a kernel, with one of its arguments.
    let ((block, _), map) = unsafe { (here(), *map) };
    if blocks == 0 {
        return bring(block, Tile { to, map, row, column, barrier });
    }
    for rank in (0..u32::BITS).filter(|r| blocks >> r & 1 == 1) {
        let (to, barrier) =
            (emulator_cluster_shared(to, rank), emulator_cluster_shared(barrier, rank));
        let other = block.cluster.get(rank as usize).copied().unwrap_or(block);
        // SAFETY: blocks of a cluster live as long as each other, and no other thread runs.
        let other = unsafe { &mut *other };
        if other.ended() {
            fault("a tile is copied to a block which has ended");
        }
        bring(other, Tile { to, map, row, column, barrier });
    }
}

fn bring(block: &mut Block<'static>, tile: Tile) {
    if block.launch.schedule == Schedule::Natural {
        block.tiles.push(tile);
    } else if let Err(message) = block.copy_tile(&tile) {
        fault(&message);
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma(op: CollectiveOp, data: *const u8, size: usize, name: *const c_char) {
    // SAFETY: called by a kernel, with what it wants to keep.
    let ((block, t), data) = unsafe { (here(), std::slice::from_raw_parts(data, size).to_vec()) };
    block.threads[t].wgmma.push(Wgmma { op, data, name });
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma_commit_group() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let end = block.threads[t].wgmma.len();
    block.threads[t].wgmma_groups.push(end);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma_wait_group(groups_left: u32) {
    // SAFETY: called by a kernel; the borrow ends before the thread waits.
    let (block, t) = unsafe { here() };
    let thread = &mut block.threads[t];
    let done = thread.wgmma_groups.len().saturating_sub(groups_left as usize);
    let end = if done == 0 { 0 } else { thread.wgmma_groups[done - 1] };
    let issued: Vec<Wgmma> = thread.wgmma.drain(..end).collect();
    thread.wgmma_groups.drain(..done);
    thread.wgmma_groups.iter_mut().for_each(|g| *g -= end);
    for w in &issued {
        suspend(Wait::Collective {
            size: 128,
            mask: u32::MAX,
            op: w.op as usize,
            data: w.data.as_ptr() as usize,
            name: w.name,
        });
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_check(at: usize, bytes: u32) {
    check_operand(at, bytes as usize);
}
