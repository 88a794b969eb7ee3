//! Runs the blocks of a launch: every thread a fiber, switched where threads wait for each other.

use crate::Shape;
use crate::memory::{Arena, UNWRITTEN, WRITTEN};
use crate::registry::Kernel;
use crate::tensor_map::TensorMap;
use corosensei::stack::{Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a thread's stack.
const STACK: usize = 128 * 1024;

/// Rounds of all threads before another block is left behind.
const BEHIND: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    Natural,
    /// Threads take turns in an order drawn anew from this seed each time.
    Shuffled(u64),
}

pub struct Launch<'a> {
    pub kernel: &'static Kernel,
    pub shape: Shape,
    pub args: Vec<Vec<u8>>,
    pub arena: &'a Arena,
    pub schedule: Schedule,
    pub fault: Mutex<Option<String>>,
}

/// Where a thread is, as kernels see it; laid out as in `include/emulated.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ThreadCoords {
    pub thread: [u32; 3],
    pub block: [u32; 3],
    block_size: [u32; 3],
    grid_size: [u32; 3],
    pub shared: *mut u8,
    shared_bytes: u32,
}

pub type CollectiveOp = unsafe extern "C" fn(*mut *mut c_void, u32);

/// Why a thread does not run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wait {
    Runnable,
    Barrier {
        id: u32,
        count: u32,
    },
    Collective {
        size: u32,
        mask: u32,
        op: usize,
        data: usize,
        name: *const c_char,
    },
    /// Until the phase of the mbarrier at this address is no longer of this parity.
    Phase {
        barrier: usize,
        parity: u32,
    },
    /// At the barrier of the cluster.
    Cluster,
    Ended,
    Fault,
}

/// An argument's bytes, aligned as any type wants.
#[derive(Clone)]
#[repr(C, align(128))]
struct Argument([u8; 128]);

/// A cp.async that has been issued and not waited for.
pub struct Copy {
    pub to: usize,
    pub from: usize,
    pub bytes: usize,
    pub zeros: usize,
}

/// A wgmma that has been issued and not waited for: what a thread gives to it.
pub struct Wgmma {
    pub op: CollectiveOp,
    pub data: Vec<u8>,
    pub name: *const c_char,
}

/// A TMA copy of a tile that has been issued and not waited for.
pub struct Tile {
    pub to: usize,
    pub map: TensorMap,
    pub row: u32,
    pub column: u32,
    pub barrier: usize,
}

pub struct Thread {
    pub coords: ThreadCoords,
    wait: Wait,
    pub copies: Vec<Copy>,
    /// Ends of committed groups in `copies`, oldest first.
    pub groups: Vec<usize>,
    pub wgmma: Vec<Wgmma>,
    /// Ends of committed groups in `wgmma`, oldest first.
    pub wgmma_groups: Vec<usize>,
}

pub struct Block<'a> {
    pub launch: &'a Launch<'a>,
    pub threads: Vec<Thread>,
    /// Holds shared memory, which begins where the threads' coordinates say.
    _shared: Vec<u8>,
    /// State of each byte of shared memory.
    pub states: Vec<u8>,
    /// By address.
    pub mbarriers: BTreeMap<usize, Mbarrier>,
    pub tiles: Vec<Tile>,
    /// Where the arguments and the list of their addresses lie.
    pub arguments: [Range<usize>; 2],
    /// All blocks of the cluster by rank; none if there are no clusters.
    pub cluster: Vec<*mut Block<'static>>,
}

/// A phase ends when all arrivals and all bytes have come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mbarrier {
    pub expected: u32,
    pub arrived: u32,
    pub bytes: i64,
    pub parity: u32,
}

impl Mbarrier {
    pub fn settle(&mut self) {
        if self.arrived == self.expected && self.bytes == 0 {
            self.parity ^= 1;
            self.arrived = 0;
        }
    }
}

/// The thread that runs on this machine's thread.
#[derive(Clone, Copy)]
pub struct Current {
    pub block: *mut Block<'static>,
    pub thread: usize,
    yielder: *const Yielder<(), Wait>,
    pub stacks: (usize, usize),
}

thread_local! {
    pub static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
    /// The block whose threads' common operation runs, and what is wrong with it.
    static OPERATING: Cell<Option<*const Block<'static>>> = const { Cell::new(None) };
    static WRONG: Cell<Option<String>> = const { Cell::new(None) };
}

/// The running thread's block and number.
///
/// # Safety
/// Only from within a kernel, one borrow at a time.
pub unsafe fn here() -> (&'static mut Block<'static>, usize) {
    let current = CURRENT.get().expect("only kernels call this");
    (unsafe { &mut *current.block }, current.thread)
}

/// Checks what a common operation reads of shared memory.
pub fn check_operand(at: usize, bytes: usize) {
    let Some(block) = OPERATING.get() else { return };
    // SAFETY: set for as long as the operation runs.
    let block = unsafe { &*block };
    let start = at.wrapping_sub(block.threads[0].coords.shared as usize);
    let states = block.states.get(start..start.saturating_add(bytes));
    let what = match states {
        None => format!(
            "reads an operand at byte {start} of shared memory, which has {}",
            block.states.len()
        ),
        Some(s) if s.contains(&UNWRITTEN) => {
            format!("reads an operand at byte {start} of shared memory, which nothing wrote")
        }
        Some(_) => return,
    };
    WRONG.set(Some(WRONG.take().unwrap_or(what)));
}

/// Gives the processor away until `wait` is over.
pub fn suspend(wait: Wait) {
    let current = CURRENT.get().expect("only kernels wait");
    // SAFETY: the yielder lives as long as the fiber, which is running.
    unsafe { (*current.yielder).suspend(wait) };
}

/// Reports a fault of the running thread, which does not go on.
pub fn fault(message: &str) {
    let current = CURRENT.get().expect("only kernels have faults");
    // SAFETY: the block outlives its threads.
    let block = unsafe { &*current.block };
    let coords = block.threads[current.thread].coords;
    block.launch.report(format!(
        "{}: block {:?}, thread {}: {message}",
        block.launch.kernel.name, coords.block, coords.thread[0]
    ));
    loop {
        suspend(Wait::Fault);
    }
}

/// A part of one mapping that holds all stacks of the resident blocks.
struct Piece {
    base: StackPointer,
    limit: StackPointer,
}

// SAFETY: the mapping outlives the fibers; pieces do not overlap.
unsafe impl Stack for Piece {
    fn base(&self) -> StackPointer {
        self.base
    }
    fn limit(&self) -> StackPointer {
        self.limit
    }
}

struct Stacks {
    at: *mut c_void,
    bytes: usize,
}

impl Stacks {
    fn new(threads: usize) -> Stacks {
        let bytes = threads * STACK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert!(at != libc::MAP_FAILED, "cannot map {bytes} bytes of stacks");
        Stacks { at, bytes }
    }

    fn range(&self) -> (usize, usize) {
        (self.at as usize, self.at as usize + self.bytes)
    }

    fn piece(&self, i: usize) -> Piece {
        let low = self.at as usize + i * STACK;
        let pointer = |p| StackPointer::new(p).expect("a mapping is not at zero");
        Piece { base: pointer(low + STACK), limit: pointer(low) }
    }
}

impl Drop for Stacks {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}

impl Launch<'_> {
    pub fn run(&self, workers: usize) -> Result<(), String> {
        let [x, y, z] = self.shape.grid.map(|n| n as usize);
        let count = x * y * z;
        let block_at = |i: usize| [(i % x) as u32, (i / x % y) as u32, (i / x / y) as u32];
        let threads = self.shape.threads as usize;
        if self.shape.cooperative {
            let stacks = Stacks::new(count * threads);
            self.run_resident_blocks(&stacks, &(0..count).map(block_at).collect::<Vec<_>>());
        } else {
            let next = AtomicUsize::new(0);
            let cluster = self.shape.cluster as usize;
            let work = || {
                let stacks = Stacks::new(cluster * threads);
                loop {
                    let i = next.fetch_add(cluster, Ordering::Relaxed);
                    if i >= count || self.fault.lock().expect("no panic with the lock").is_some() {
                        break;
                    }
                    self.run_resident_blocks(
                        &stacks,
                        &(i..i + cluster).map(block_at).collect::<Vec<_>>(),
                    );
                }
            };
            if workers.min(count) <= 1 {
                work();
            } else {
                std::thread::scope(|s| {
                    for _ in 0..workers.min(count) {
                        s.spawn(work);
                    }
                });
            }
        }
        match self.fault.lock().expect("no panic with the lock").take() {
            None => Ok(()),
            Some(message) => Err(message),
        }
    }

    /// Keeps the first fault.
    fn report(&self, message: String) {
        self.fault.lock().expect("no panic with the lock").get_or_insert(message);
    }

    fn block(&self, coords: [u32; 3], arguments: [Range<usize>; 2]) -> Box<Block<'_>> {
        let bytes = self.shape.shared_bytes as usize;
        let mut shared = vec![0xffu8; bytes + 1024];
        let shared_at = shared.as_ptr().align_offset(1024);
        let start = shared[shared_at..].as_mut_ptr();
        let thread = |i| Thread {
            coords: ThreadCoords {
                thread: [i, 0, 0],
                block: coords,
                block_size: [self.shape.threads, 1, 1],
                grid_size: self.shape.grid,
                shared: start,
                shared_bytes: bytes as u32,
            },
            wait: Wait::Runnable,
            copies: vec![],
            groups: vec![],
            wgmma: vec![],
            wgmma_groups: vec![],
        };
        Box::new(Block {
            launch: self,
            threads: (0..self.shape.threads).map(thread).collect(),
            states: vec![UNWRITTEN; bytes],
            _shared: shared,
            mbarriers: BTreeMap::new(),
            tiles: vec![],
            arguments,
            cluster: vec![],
        })
    }

    /// Runs blocks that are resident on the device together, and may therefore wait for each other.
    fn run_resident_blocks(&self, stacks: &Stacks, coords: &[[u32; 3]]) {
        // arguments (at most 128 bytes each, aligned), then the list of their addresses
        let mut args = vec![Argument([0; 128]); self.args.len()];
        for (to, from) in args.iter_mut().zip(&self.args) {
            to.0[..from.len()].copy_from_slice(from);
        }
        let base = args.as_mut_ptr() as usize;
        let addresses: Vec<usize> =
            (0..args.len()).map(|i| base + i * size_of::<Argument>()).collect();
        let list = addresses.as_ptr() as usize;
        let range = base..base + args.len() * size_of::<Argument>();
        let lists = list..list + addresses.len() * 8;
        let mut blocks: Vec<Box<Block>> =
            coords.iter().map(|c| self.block(*c, [range.clone(), lists.clone()])).collect();
        let pointers: Vec<*mut Block<'static>> =
            blocks.iter_mut().map(|b| std::ptr::from_mut::<Block>(b).cast()).collect();
        if self.shape.cluster > 1 {
            blocks.iter_mut().for_each(|b| b.cluster = pointers.clone());
        }
        let per_block = self.shape.threads as usize;
        let call = self.kernel.call;
        let mut fibers: Vec<Option<Coroutine<(), Wait, (), Piece>>> = (0..pointers.len()
            * per_block)
            .map(|i| {
                let (block, thread, range) =
                    (pointers[i / per_block] as usize, i % per_block, stacks.range());
                Some(Coroutine::with_stack(stacks.piece(i), move |yielder, ()| {
                    let current = Current {
                        block: block as *mut Block<'static>,
                        thread,
                        yielder,
                        stacks: range,
                    };
                    YIELDERS.with_borrow_mut(|y| y[i] = Some(current));
                    CURRENT.set(Some(current));
                    // SAFETY: sizes and number of the arguments were compared with the kernel's.
                    unsafe { call(list as *mut *mut c_void) };
                }))
            })
            .collect();
        YIELDERS.with_borrow_mut(|y| {
            y.clear();
            y.resize(fibers.len(), None);
        });
        let mut order: Vec<usize> = (0..fibers.len()).collect();
        let mut random = match self.schedule {
            Schedule::Natural => 0,
            Schedule::Shuffled(seed) => seed | 1,
        };
        let mut left = fibers.len();
        // in the shuffled order one block after the other is left behind for a while, as far as the
        // others can go on without it
        let mut behind = None;
        'rounds: for round in 0.. {
            if left == 0 {
                break;
            }
            if random != 0 {
                shuffle(&mut order, &mut random);
                if round % BEHIND == 0 && pointers.len() > 1 {
                    behind = Some(random as usize % pointers.len());
                }
            }
            let mut ran = false;
            for &i in &order {
                if behind == Some(i / per_block) {
                    continue;
                }
                // SAFETY: no fiber runs now.
                let block = pointers[i / per_block];
                let block = unsafe { &mut *block };
                let t = i % per_block;
                if let Wait::Phase { barrier, .. } = block.threads[t].wait
                    && let Err(message) = block.finish_tiles(barrier)
                {
                    self.report(format!("{}: {message}", block.name()));
                    break 'rounds;
                }
                if let Wait::Phase { barrier, parity } = block.threads[t].wait
                    && block.mbarriers.get(&barrier).is_some_and(|b| b.parity != parity)
                {
                    block.threads[t].wait = Wait::Runnable;
                }
                if block.threads[t].wait != Wait::Runnable {
                    continue;
                }
                ran = true;
                let fiber = fibers[i].as_mut().expect("a runnable thread has its fiber");
                CURRENT.set(YIELDERS.with_borrow(|y| y[i]));
                let result = fiber.resume(());
                CURRENT.set(None);
                let wait = match result {
                    CoroutineResult::Yield(wait) => wait,
                    CoroutineResult::Return(()) => {
                        left -= 1;
                        fibers[i] = None;
                        Wait::Ended
                    }
                };
                block.threads[t].wait = wait;
                let problem = match wait {
                    Wait::Fault => break 'rounds,
                    Wait::Barrier { id, count } => block.arrive(id, count),
                    Wait::Collective { size, .. } => block.meet(t, size as usize),
                    Wait::Ended if !block.threads[t].wgmma.is_empty() => Some(format!(
                        "{}, thread {t}: it ends before its wgmma are waited for",
                        block.name()
                    )),
                    _ => None,
                };
                if let Some(message) = problem {
                    self.report(message);
                    break 'rounds;
                }
            }
            if !ran && left > 0 {
                if behind.take().is_some() {
                    continue;
                }
                // whoever has ended is not waited for
                let at_barrier = |t: &Thread| matches!(t.wait, Wait::Cluster | Wait::Ended);
                if blocks.iter().all(|b| b.threads.iter().all(at_barrier)) {
                    let waiting = blocks
                        .iter_mut()
                        .flat_map(|b| &mut b.threads)
                        .filter(|t| t.wait == Wait::Cluster);
                    waiting.for_each(|t| t.wait = Wait::Runnable);
                    continue;
                }
                let stuck = blocks.iter().find_map(|b| b.stuck());
                self.report(
                    stuck.unwrap_or_else(|| format!("{}: no thread can run", self.kernel.name)),
                );
                break;
            }
        }
        if left == 0
            && let Some(block) = blocks.iter().find(|b| !b.tiles.is_empty())
        {
            self.report(format!("{}: it ends while a TMA copy is in flight", block.name()));
        }
        for fiber in fibers.iter_mut().flatten() {
            if fiber.started() && !fiber.done() {
                // SAFETY: kernels own nothing that needs to be dropped.
                unsafe { fiber.force_reset() };
            }
        }
    }
}

thread_local! {
    /// What [`CURRENT`] is while each fiber of the resident blocks runs; set when it starts.
    static YIELDERS: RefCell<Vec<Option<Current>>> = const { RefCell::new(Vec::new()) };
}

fn shuffle(order: &mut [usize], state: &mut u64) {
    for i in (1..order.len()).rev() {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        order.swap(i, (*state % (i as u64 + 1)) as usize);
    }
}

impl Block<'_> {
    fn name(&self) -> String {
        format!("{}: block {:?}", self.launch.kernel.name, self.threads[0].coords.block)
    }

    /// A thread has come to a barrier: lets all go if it was the last.
    fn arrive(&mut self, id: u32, count: u32) -> Option<String> {
        let here = |t: &Thread| matches!(t.wait, Wait::Barrier { id: other, .. } if other == id);
        if count as usize > self.threads.len() || !count.is_multiple_of(32) {
            return Some(format!(
                "{}: barrier {id} for {count} of {} threads",
                self.name(),
                self.threads.len()
            ));
        }
        if self
            .threads
            .iter()
            .any(|t| matches!(t.wait, Wait::Barrier { id: i, count: c } if i == id && c != count))
        {
            return Some(format!(
                "{}: threads come to barrier {id} with different counts",
                self.name()
            ));
        }
        if self.threads.iter().filter(|t| here(t)).count() == count as usize {
            self.threads.iter_mut().filter(|t| here(t)).for_each(|t| t.wait = Wait::Runnable);
        }
        None
    }

    /// A thread has come to an operation of its warp or warpgroup: runs it if it was the last.
    fn meet(&mut self, t: usize, size: usize) -> Option<String> {
        let first = t / size * size;
        let group = first..(first + size).min(self.threads.len());
        let Wait::Collective { mask, op, name, .. } = self.threads[t].wait else { return None };
        let expected = |i: usize| size != 32 || mask >> (i % 32) & 1 == 1;
        if !expected(t) {
            return Some(format!(
                "{}, thread {t}: it is not in its own mask {mask:#x}",
                self.name()
            ));
        }
        let mut data = vec![std::ptr::null_mut::<c_void>(); size];
        for i in group.clone().filter(|i| expected(*i)) {
            match self.threads[i].wait {
                Wait::Collective { mask: m, op: o, data: d, .. } if m == mask && o == op => {
                    data[i - first] = d as *mut c_void;
                }
                Wait::Collective { name: other, .. } => {
                    return Some(format!(
                        "{}: thread {t} is in {}, thread {i} of the same group in {}",
                        self.name(),
                        text(name),
                        text(other)
                    ));
                }
                _ => return None,
            }
        }
        OPERATING.set(Some(std::ptr::from_ref::<Block>(self).cast()));
        // SAFETY: all lanes wait, so their data is alive.
        unsafe { std::mem::transmute::<usize, CollectiveOp>(op)(data.as_mut_ptr(), mask) };
        OPERATING.set(None);
        if let Some(what) = WRONG.take() {
            return Some(format!("{}: {} {what}", self.name(), text(name)));
        }
        for i in group.filter(|i| expected(*i)) {
            self.threads[i].wait = Wait::Runnable;
        }
        None
    }

    /// Why nothing goes on in this block.
    fn stuck(&self) -> Option<String> {
        let waiting: Vec<&Thread> = self.threads.iter().filter(|t| t.wait != Wait::Ended).collect();
        let first = waiting.first()?;
        let what = match first.wait {
            Wait::Barrier { id, count } => format!("at barrier {id} for {count}"),
            Wait::Collective { name, mask, .. } => format!("in {} with mask {mask:#x}", text(name)),
            Wait::Phase { barrier, parity } => format!(
                "for the end of a phase of parity {parity} of the mbarrier at shared byte \
                {}, which is {:?}",
                barrier.wrapping_sub(self.threads[0].coords.shared as usize),
                self.mbarriers.get(&barrier)
            ),
            Wait::Cluster => "at the cluster's barrier".to_owned(),
            _ => "for nothing".to_owned(),
        };
        let ended = self.threads.len() - waiting.len();
        let same = waiting
            .iter()
            .filter(|t| std::mem::discriminant(&t.wait) == std::mem::discriminant(&first.wait));
        Some(format!(
            "{}: deadlock: {} threads wait as thread {} does, {what}; {ended} of {} have ended",
            self.name(),
            same.count(),
            first.coords.thread[0],
            self.threads.len()
        ))
    }

    /// Whether all its threads have ended.
    pub fn ended(&self) -> bool {
        self.threads.iter().all(|t| t.wait == Wait::Ended)
    }

    /// Brings the tiles whose bytes arrive at this mbarrier.
    pub fn finish_tiles(&mut self, barrier: usize) -> Result<(), String> {
        while let Some(i) = self.tiles.iter().position(|t| t.barrier == barrier) {
            let tile = self.tiles.remove(i);
            self.copy_tile(&tile)?;
        }
        Ok(())
    }

    pub fn copy_tile(&mut self, tile: &Tile) -> Result<(), String> {
        let map = tile.map;
        let start = tile.to.wrapping_sub(self.threads[0].coords.shared as usize);
        let bytes = map.tile_rows as usize * 128;
        if map.magic != TensorMap::MAGIC {
            return Err("TMA is given something that is no tensor map".to_owned());
        }
        if !start.is_multiple_of(1024) || start + bytes > self.states.len() {
            return Err(format!(
                "a tile of {bytes} bytes is copied to shared byte {start}: not aligned to 1024, or \
                out of bounds"
            ));
        }
        for r in 0..map.tile_rows {
            for piece in 0..8u64 {
                let offset = (r * 128 + (piece ^ (r & 7)) * 16) as usize;
                let (y, x) = (tile.row as u64 + r, tile.column as u64 + piece * 8);
                let mut values = [0u16; 8];
                for (i, v) in values.iter_mut().enumerate() {
                    if y < map.rows && x + (i as u64) < map.cols {
                        let from = (map.at + (y * map.cols + x + i as u64) * 2) as usize;
                        let arena = self.launch.arena;
                        let at =
                            arena.find(from).ok_or("a TMA copy reads outside device memory")?;
                        arena
                            .access(at, 2, false)
                            .map_err(|e| format!("a TMA copy reads memory that is {e}"))?;
                        // SAFETY: checked just now.
                        *v = unsafe { *(from as *const u16) };
                    }
                }
                self.states[start + offset..start + offset + 16].fill(WRITTEN);
                // SAFETY: inside shared memory, checked above.
                unsafe { ((tile.to + offset) as *mut [u16; 8]).write_unaligned(values) };
            }
        }
        let barrier = self.mbarriers.get_mut(&tile.barrier).ok_or(NO_MBARRIER)?;
        barrier.bytes -= bytes as i64;
        barrier.settle();
        Ok(())
    }

    /// Does the oldest copies of a thread until `groups_left` groups are left.
    pub fn finish_copies(&mut self, thread: usize, groups_left: usize) -> Result<(), String> {
        let t = &mut self.threads[thread];
        let done = t.groups.len().saturating_sub(groups_left);
        if done == 0 {
            return Ok(());
        }
        let end = t.groups[done - 1];
        let copies: Vec<Copy> = t.copies.drain(..end).collect();
        t.groups.drain(..done);
        t.groups.iter_mut().for_each(|g| *g -= end);
        for c in copies {
            if c.bytes > 0 {
                let start = self
                    .launch
                    .arena
                    .find(c.from)
                    .ok_or("an asynchronous copy reads outside device memory")?;
                let checked = self.launch.arena.access(start, c.bytes, false);
                checked.map_err(|e| {
                    format!("an asynchronous copy of {} bytes reads memory that is {e}", c.bytes)
                })?;
            }
            let shared = self.threads[thread].coords.shared as usize;
            let at = c.to.wrapping_sub(shared);
            if at > self.states.len() || c.bytes + c.zeros > self.states.len() - at {
                return Err("an asynchronous copy writes outside shared memory".to_owned());
            }
            self.states[at..at + c.bytes + c.zeros].fill(WRITTEN);
            // SAFETY: both ranges were checked.
            unsafe {
                std::ptr::copy_nonoverlapping(c.from as *const u8, c.to as *mut u8, c.bytes);
                (c.to as *mut u8).add(c.bytes).write_bytes(0, c.zeros);
            }
        }
        Ok(())
    }
}

pub const NO_MBARRIER: &str = "an mbarrier is used that was not initialized";

fn text(name: *const c_char) -> String {
    // SAFETY: names are literals of the vocabulary.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}
