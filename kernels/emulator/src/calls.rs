//! What kernels call: the other side of `include/emulated.h`.

use crate::block::{
    Block, CURRENT, CollectiveOp, Copy, FENCED, GENERIC, Mbarrier, NO_MBARRIER, Reader, Schedule,
    ThreadCoords, Tile, Wait, Wgmma, check_operand, fault, here, operand_is_wrong, suspend,
};
use crate::tensor_map::{Swizzle, TensorMap};
use crate::visibility::{Clock, Writer};
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

#[unsafe(no_mangle)]
extern "C" fn emulator_thread() -> *const ThreadCoords {
    let current = CURRENT.get().expect("only kernels ask where they are");
    // SAFETY: the block is alive while its threads run.
    unsafe { &(&(*current.block).threads)[current.thread].coords }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_barrier(id: u32, count: u32, line: u32) {
    suspend(Wait::Barrier { id, count, line });
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
    if let Some(start) = block.launch.arena.find(from)
        && let Err(e) =
            block.check_visible(block.threads[t].waited, start, bytes as usize, Reader::Thread)
    {
        fault(&format!("an asynchronous copy reads {e}"));
    }
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
    let (block, t) = unsafe { here() };
    let barrier = Mbarrier { expected: count, unfenced: Some(t), ..Mbarrier::default() };
    block.mbarriers.insert(at, barrier);
}

/// fence.mbarrier_init and fence.proxy.async of shared memory.
#[unsafe(no_mangle)]
extern "C" fn emulator_fence_mbarrier_init() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    for barrier in block.mbarriers.values_mut().filter(|b| b.unfenced == Some(t)) {
        barrier.unfenced = None;
    }
    emulator_fence_proxy_async();
}

/// Whoever fences has met the threads that stored at a barrier, or stores alone.
#[unsafe(no_mangle)]
extern "C" fn emulator_fence_proxy_async() {
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    block.states.iter_mut().filter(|s| **s == GENERIC).for_each(|s| *s = FENCED);
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
    if let Some(Err(message)) = other.mbarriers.get(&there).map(Mbarrier::check_fenced) {
        fault(&message);
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
    let ((block, t), map) = unsafe { (here(), *map) };
    let waited = block.threads[t].waited;
    if blocks == 0 {
        return bring(block, Tile { to, map, row, column, barrier, waited });
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
        bring(other, Tile { to, map, row, column, barrier, waited });
    }
}

fn bring(block: &mut Block<'static>, tile: Tile) {
    if block.launch.schedule == Schedule::Natural {
        block.tiles.push(tile);
    } else if let Err(message) = block.copy_tile(&tile) {
        fault(&message);
    }
}

/// The registers that a thread gives to wgmma: their addresses and bytes.
type Registers = [(usize, usize); 2];

fn content(&(at, bytes): &(usize, usize)) -> Vec<u8> {
    // SAFETY: the arrays are on the stack of the fiber, which is as large for as long as it runs.
    // They may be out of scope when a later fence looks at them; nobody uses what is there then.
    unsafe { std::slice::from_raw_parts(at as *const u8, bytes).to_vec() }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma_fence() {
    together(c"wgmma.fence");
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let registers = block.threads[t].fenced_registers.get_or_insert_default();
    registers.iter_mut().for_each(|(&at, bytes)| *bytes = content(&(at, bytes.len())));
}

/// A warp's threads have to execute the instruction together. The natural order of threads leaves
/// that unchecked, which is quicker.
fn together(name: &'static CStr) {
    extern "C" fn nothing(_: *mut *mut c_void, _: u32) {}
    // SAFETY: called by a kernel.
    if unsafe { here() }.0.launch.schedule != Schedule::Natural {
        emulator_collective(32, u32::MAX, nothing, std::ptr::null_mut(), name.as_ptr());
    }
}

/// wgmma takes its time: in the natural order of threads it happens when somebody waits for it, in
/// the shuffled one at once, so that both a use of its results that comes too early and a change of
/// its operands are seen. In the shuffled order each warp takes its rows by itself, since nothing
/// but a barrier has one warp wait until another has read the operands.
#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma(
    op: CollectiveOp,
    data: *const u8,
    size: usize,
    registers: *const Registers,
    name: *const c_char,
) {
    // SAFETY: called by a kernel, with what it wants to keep.
    let ((block, t), registers) = unsafe { (here(), (*registers).to_vec()) };
    // SAFETY: as above.
    let data = unsafe { std::slice::from_raw_parts(data, size).to_vec() };
    let thread = &mut block.threads[t];
    let Some(fenced) = &mut thread.fenced_registers else {
        return fault("wgmma without a wgmma.fence before");
    };
    for r in registers.iter().filter(|r| r.1 > 0) {
        let now = content(r);
        if *fenced.entry(r.0).or_insert_with(|| now.clone()) != now {
            fault("wgmma reads registers that were changed after the last wgmma.fence");
        }
    }
    let wgmma = Wgmma { op, data, accumulators: registers[0], name };
    if block.launch.schedule == Schedule::Natural {
        thread.wgmma.push(wgmma);
    } else {
        run_wgmma(&wgmma);
        thread.wgmma_issued += 1;
    }
}

fn run_wgmma(wgmma: &Wgmma) {
    // SAFETY: called by a kernel.
    let natural = unsafe { here() }.0.launch.schedule == Schedule::Natural;
    suspend(Wait::Collective {
        size: if natural { 128 } else { 32 },
        mask: if natural { 0 } else { u32::MAX },
        op: wgmma.op as usize,
        data: wgmma.data.as_ptr() as usize,
        name: wgmma.name,
    });
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    if let Some(fenced) = &mut block.threads[t].fenced_registers {
        fenced.insert(wgmma.accumulators.0, content(&wgmma.accumulators));
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma_commit_group() {
    together(c"wgmma.commit_group");
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let thread = &mut block.threads[t];
    thread.wgmma_groups.push(thread.wgmma.len());
    thread.wgmma_issued = 0;
}

#[unsafe(no_mangle)]
extern "C" fn emulator_wgmma_wait_group(groups_left: u32) {
    together(c"wgmma.wait_group");
    // SAFETY: called by a kernel; the borrow ends before the thread waits.
    let (block, t) = unsafe { here() };
    let thread = &mut block.threads[t];
    let done = thread.wgmma_groups.len().saturating_sub(groups_left as usize);
    let end = if done == 0 { 0 } else { thread.wgmma_groups[done - 1] };
    let issued: Vec<Wgmma> = thread.wgmma.drain(..end).collect();
    thread.wgmma_groups.drain(..done);
    thread.wgmma_groups.iter_mut().for_each(|g| *g -= end);
    issued.iter().for_each(run_wgmma);
}

/// Checks, for a wgmma, bytes of shared memory whose swizzle the descriptor says.
#[unsafe(no_mangle)]
extern "C" fn emulator_check_operand(at: usize, bytes: u32, swizzle: u32) {
    check_operand(at, bytes as usize, Swizzle::ALL[swizzle as usize & 3]);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_operand_is_wrong(what: *const c_char) {
    // SAFETY: a literal of the vocabulary.
    operand_is_wrong(unsafe { CStr::from_ptr(what) }.to_string_lossy().into_owned());
}

/// A warpgroup's threads get `count` registers each from here on: fewer if it gives some up, which
/// others may then take.
#[unsafe(no_mangle)]
extern "C" fn emulator_setmaxnreg(count: u32, increase: bool) {
    extern "C" fn same(_: *mut *mut c_void, _: u32) {}
    let name = if increase { c"setmaxnreg.inc" } else { c"setmaxnreg.dec" };
    suspend(Wait::Collective {
        size: 128,
        mask: u32::MAX,
        op: same as *const () as usize,
        data: 0,
        name: name.as_ptr(),
    });
    // SAFETY: called by a kernel; no borrow lives while it waits, here and below.
    let (block, t) = unsafe { here() };
    let group = t / 128;
    if block.launch.kernel.blocks == 0 {
        fault(
            "setmaxnreg in a kernel whose launch bounds do not say how many blocks share registers",
        );
    }
    if !(24..=256).contains(&count) || !count.is_multiple_of(8) {
        fault(&format!("setmaxnreg for {count} registers: no multiple of 8 from 24 to 256"));
    }
    if t % 128 != 0 {
        return;
    }
    let has = block.registers[group];
    if increase && count < has || !increase && count > has {
        fault(&format!("setmaxnreg to {count} registers, where the warpgroup has {has}"));
    }
    block.registers[group] = count;
    if !increase {
        block.free_registers += (has - count) * 128;
        return;
    }
    let more = (count - has) * 128;
    loop {
        // SAFETY: as above.
        let (block, _) = unsafe { here() };
        if block.free_registers >= more {
            block.free_registers -= more;
            return;
        }
        suspend(Wait::Registers(more));
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulator_griddep_wait() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    block.threads[t].waited = true;
    block.launch.waited.store(true, Ordering::Relaxed);
}

#[unsafe(no_mangle)]
extern "C" fn emulator_device_fence() {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    block.release(t);
}

/// Adds to a word of device memory and returns what it held. Whoever releases first publishes what
/// the block has written.
#[unsafe(no_mangle)]
extern "C" fn emulator_atomic_add(at: usize, n: u32, release: bool) -> u32 {
    let Some(word) = word_for_atomics(at, true) else { return 0 };
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    if release {
        block.release(t);
    }
    let mut flags = block.launch.flags.lock().expect("nothing panics with the lock");
    let flag: &mut Clock = flags.entry(at).or_default();
    let thread = &mut block.threads[t];
    thread.observed.merge(flag);
    flag.merge(&thread.fenced);
    word.fetch_add(n, Ordering::AcqRel)
}

/// Loads a word of device memory that others change by atomics, and sees what they released.
#[unsafe(no_mangle)]
extern "C" fn emulator_atomic_load_acquire(at: usize) -> u32 {
    let Some(word) = word_for_atomics(at, false) else { return 0 };
    // SAFETY: called by a kernel.
    let (block, _) = unsafe { here() };
    let flags = block.launch.flags.lock().expect("nothing panics with the lock");
    if let Some(flag) = flags.get(&at) {
        block.clock.merge(flag);
    }
    word.load(Ordering::Acquire)
}

fn word_for_atomics(at: usize, write: bool) -> Option<&'static AtomicU32> {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let launch = block.launch;
    let Some(start) = launch.arena.find(at).filter(|_| at.is_multiple_of(4)) else {
        fault("an atomic operation out of bounds of device memory, or on no whole word");
        return None;
    };
    if let Err(e) = launch.arena.access(start, 4, false) {
        fault(&format!("an atomic operation on device memory that is {e}"));
    }
    if !block.threads[t].waited {
        fault("an atomic operation before griddep_wait: kernels before may still use the word");
    }
    if write {
        launch.arena.note_writer(start, 4, Writer::atomic(launch.number, block.index));
    }
    // SAFETY: a word of the device's memory, which lives as long as the launch.
    Some(unsafe { AtomicU32::from_ptr(at as *mut u32) })
}

/// Checks a load through the read-only cache.
#[unsafe(no_mangle)]
extern "C" fn emulator_check_read_only(at: usize, bytes: u32) {
    // SAFETY: called by a kernel.
    let (block, t) = unsafe { here() };
    let Some(start) = block.launch.arena.find(at) else { return };
    let waited = block.threads[t].waited;
    if let Err(e) = block.check_visible(waited, start, bytes as usize, Reader::ReadOnly) {
        fault(&format!("read of {e}"));
    }
}
