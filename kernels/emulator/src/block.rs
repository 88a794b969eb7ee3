//! Runs the blocks of a launch: every thread a fiber, switched where threads wait for each other.

use crate::Shape;
use crate::memory::{Arena, UNWRITTEN};
use crate::registry::Kernel;
use crate::tensor_map::{Swizzle, TensorMap};
use crate::visibility::{Clock, Writer};
use corosensei::stack::{Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes of a thread's stack.
const STACK: usize = 128 * 1024;

/// Threads of a warp.
const WARP: usize = 32;
/// Rounds of all threads before another block or warp is left behind, and before one is after all
/// had to wait for it.
const BEHIND: usize = 64;
const TOGETHER: usize = 4;

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
    /// Counts the runs of kernels on a device, from 1.
    pub number: u64,
    /// The runs before it that may not have ended as it begins.
    pub running: Range<u64>,
    /// What can be seen by whoever reads a word that atomics write, by its address.
    pub flags: Mutex<HashMap<usize, Clock>>,
    /// Whether any thread has waited for the kernels before.
    pub waited: AtomicBool,
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

/// State of a byte of shared memory, beside [`UNWRITTEN`]: written by ordinary stores, and whether
/// a fence has made it visible to TMA and wgmma since; or by TMA with the swizzle whose number is
/// added.
pub const GENERIC: u8 = 2;
pub const FENCED: u8 = 3;
pub const ASYNC: u8 = 8;

/// What reads device memory.
#[derive(Clone, Copy, PartialEq)]
pub enum Reader {
    /// An ordinary load, or a cp.async.
    Thread,
    /// A load through the read-only cache.
    ReadOnly,
    Tma,
}

/// Why a thread does not run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wait {
    Runnable,
    Barrier {
        id: u32,
        count: u32,
        /// Of the source: the lanes of a warp must be at the same one.
        line: u32,
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
    /// For so many registers, which the other warpgroups have to give up.
    Registers(u32),
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
    /// Address and bytes.
    pub accumulators: (usize, usize),
    pub name: *const c_char,
}

/// A TMA copy of a tile that has been issued and not waited for.
pub struct Tile {
    pub to: usize,
    pub map: TensorMap,
    pub row: u32,
    pub column: u32,
    pub barrier: usize,
    /// Whether the thread that asked for it had waited for the kernels before.
    pub waited: bool,
}

pub struct Thread {
    pub coords: ThreadCoords,
    wait: Wait,
    pub copies: Vec<Copy>,
    /// Ends of committed groups in `copies`, oldest first.
    pub groups: Vec<usize>,
    pub wgmma: Vec<Wgmma>,
    /// Wgmma that ran when they were issued and belong to no group yet.
    pub wgmma_issued: usize,
    /// Ends of committed groups in `wgmma`, oldest first.
    pub wgmma_groups: Vec<usize>,
    /// The registers that it gave to wgmma, by address, and what they held at the last wgmma.fence
    /// or when a wgmma had written them.
    pub fenced_registers: Option<HashMap<usize, Vec<u8>>>,
    /// Whether it has waited for the kernels before, or met one that has at a barrier.
    pub waited: bool,
    /// What its last fence of device memory covers.
    pub fenced: Clock,
    /// What it has learnt from flags and no fence has confirmed.
    pub observed: Clock,
}

impl Thread {
    /// Whether there are wgmma that no wait has covered.
    fn wgmma_in_flight(&self) -> bool {
        !self.wgmma.is_empty() || self.wgmma_issued > 0 || !self.wgmma_groups.is_empty()
    }
}

pub struct Block<'a> {
    pub launch: &'a Launch<'a>,
    pub threads: Vec<Thread>,
    /// Holds shared memory, which begins where the threads' coordinates say.
    _shared: Vec<u8>,
    /// State of each byte of shared memory.
    pub states: Vec<u8>,
    /// Its number in the grid.
    pub index: u32,
    /// Which writes of other blocks it sees.
    pub clock: Clock,
    /// How often it has released its writes.
    pub epoch: u32,
    /// Registers of a thread of each warpgroup, and how many threads' worth are free.
    pub registers: Vec<u32>,
    pub free_registers: u32,
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
    /// Who initialized it, until that thread's fence has made it visible to TMA and the cluster.
    pub unfenced: Option<usize>,
}

impl Mbarrier {
    /// # Errors
    /// If TMA or another block uses it before they are sure to find it initialized.
    pub fn check_fenced(&self) -> Result<(), String> {
        match self.unfenced {
            None => Ok(()),
            Some(t) => Err(format!(
                "an mbarrier is used by TMA or the cluster, without a fence (fence_mbarrier_init) \
                of thread {t}, which initialized it"
            )),
        }
    }

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

/// Checks what a wgmma reads of shared memory, which its descriptor says to be swizzled so.
pub fn check_operand(at: usize, bytes: usize, swizzle: Swizzle) {
    let Some(block) = OPERATING.get() else { return };
    // SAFETY: set for as long as the operation runs.
    let block = unsafe { &*block };
    let start = at.wrapping_sub(block.threads[0].coords.shared as usize);
    let reads = format_args!("reads an operand at byte {start} of shared memory");
    let what = match block.states.get(start..start.saturating_add(bytes)) {
        None => format!("{reads}, which has {}", block.states.len()),
        Some(s) if s.contains(&UNWRITTEN) => format!("{reads}, which nothing wrote"),
        Some(s) if s.contains(&GENERIC) => {
            format!("{reads}, which was stored without a fence between the proxies")
        }
        Some(s) => match s.iter().find(|s| **s >= ASYNC && **s != ASYNC + swizzle as u8) {
            None => return,
            Some(s) => format!(
                "{reads}, which TMA wrote with a swizzle of {} bytes; the descriptor says {}",
                Swizzle::ALL[(s - ASYNC) as usize].span(),
                swizzle.span()
            ),
        },
    };
    operand_is_wrong(what);
}

/// Notes what is wrong with the common operation that runs.
pub fn operand_is_wrong(what: String) {
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
            None if self.shape.dependent && !self.waited.load(Ordering::Relaxed) => Err(format!(
                "{}: no thread waits for the kernels before (griddep_wait), so that it can end \
                before them",
                self.kernel.name
            )),
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
            wgmma_issued: 0,
            wgmma_groups: vec![],
            fenced_registers: None,
            waited: !self.shape.dependent,
            fenced: Clock::default(),
            observed: Clock::default(),
        };
        let [x, y, _] = self.shape.grid;
        let warpgroups = self.shape.threads.div_ceil(128) as usize;
        Box::new(Block {
            launch: self,
            threads: (0..self.shape.threads).map(thread).collect(),
            states: vec![UNWRITTEN; bytes],
            index: coords[0] + x * (coords[1] + y * coords[2]),
            clock: Clock::default(),
            epoch: 0,
            registers: vec![self.kernel.registers(); warpgroups],
            free_registers: 0,
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
        // in the shuffled order blocks and warps are left behind for a while, one at a time, as far
        // as the others can go on without it
        let (mut behind, mut next) = (0..0, 0);
        'rounds: for round in 0.. {
            if left == 0 {
                break;
            }
            if random != 0 {
                shuffle(&mut order, &mut random);
                if round >= next {
                    next = round + BEHIND;
                    let whole = pointers.len() > 1 && random >> 40 & 1 == 1;
                    let size = if whole { per_block } else { WARP.min(per_block) };
                    let i = random as usize % order.len();
                    let first = i - i % per_block % size;
                    behind = first..(first + size).min(i - i % per_block + per_block);
                }
            }
            let mut ran = false;
            for &i in &order {
                if behind.contains(&i) {
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
                if let Wait::Registers(count) = block.threads[t].wait
                    && count <= block.free_registers
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
                    Wait::Barrier { id, count, .. } => block.arrive(id, count),
                    Wait::Collective { size, .. } => block.meet(t, size as usize),
                    Wait::Ended if block.threads[t].wgmma_in_flight() => Some(format!(
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
                if !std::mem::take(&mut behind).is_empty() {
                    next = round + TOGETHER;
                    continue;
                }
                // whoever has ended is not waited for
                let at_barrier = |t: &Thread| matches!(t.wait, Wait::Cluster | Wait::Ended);
                if blocks.iter().all(|b| b.threads.iter().all(at_barrier)) {
                    end_cluster_barrier(&mut blocks);
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

/// Lets all threads of a cluster go on. They see what any of them saw or wrote before.
fn end_cluster_barrier(blocks: &mut [Box<Block>]) {
    let mut all = Clock::default();
    for block in blocks.iter_mut() {
        all.merge(&block.clock);
        all.see(block.index, block.epoch);
        block.epoch += 1;
    }
    let waited = blocks.iter().any(|b| b.threads.iter().any(|t| t.waited));
    for block in blocks {
        block.clock = all.clone();
        for t in block.threads.iter_mut().filter(|t| t.wait == Wait::Cluster) {
            t.wait = Wait::Runnable;
            t.waited |= waited;
        }
    }
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
        let counts_otherwise = |t: &Thread| match t.wait {
            Wait::Barrier { id: i, count: c, .. } => i == id && c != count,
            _ => false,
        };
        if self.threads.iter().any(counts_otherwise) {
            return Some(format!(
                "{}: threads come to barrier {id} with different counts",
                self.name()
            ));
        }
        if self.threads.iter().filter(|t| here(t)).count() < count as usize {
            return None;
        }
        for (warp, lanes) in self.threads.chunks(32).enumerate() {
            let mut waits = lanes.iter().map(|t| t.wait).filter(|w| *w != Wait::Ended);
            let first = waits.next();
            if lanes.iter().any(here) && waits.any(|w| Some(w) != first) {
                return Some(format!(
                    "{}: lanes of warp {warp} come to barrier {id} on different ways: it is \
                    .aligned",
                    self.name()
                ));
            }
        }
        let waited = self.threads.iter().any(|t| here(t) && t.waited);
        for t in self.threads.iter_mut().filter(|t| here(t)) {
            t.wait = Wait::Runnable;
            t.waited |= waited;
        }
        None
    }

    /// Whether a thread may read this device memory, as far as its writers go.
    pub fn check_visible(
        &self,
        waited: bool,
        start: usize,
        len: usize,
        reader: Reader,
    ) -> Result<(), String> {
        let (launch, mut checked) = (self.launch, Writer::default());
        for writer in launch.arena.writers_of(start, len) {
            let writer = Writer(writer.load(Ordering::Relaxed));
            if writer == checked {
                continue;
            }
            checked = writer;
            let other = writer.block() != self.index;
            let what = if writer.launch() == launch.number {
                match reader {
                    Reader::ReadOnly => {
                        "this launch wrote, through the read-only cache, which may hold it as it \
                        was"
                    }
                    Reader::Tma => "this launch wrote, and no fence is between the proxies",
                    Reader::Thread if writer.is_atomic() => {
                        "this launch changes by atomics, by an ordinary load"
                    }
                    Reader::Thread if other && !self.clock.sees(writer) => {
                        "another block wrote, without a fence and a flag between"
                    }
                    Reader::Thread => continue,
                }
            } else if !waited && launch.running.contains(&writer.launch()) {
                "a kernel before writes, which may still run: griddep_wait comes too late"
            } else {
                continue;
            };
            return Err(format!("{len} bytes of device memory that {what}"));
        }
        Ok(())
    }

    /// Publishes the writes of this block so far: what a fence of thread `t` covers.
    pub fn release(&mut self, t: usize) {
        let thread = &mut self.threads[t];
        self.clock.merge(&thread.observed);
        thread.observed = Clock::default();
        thread.fenced = self.clock.clone();
        thread.fenced.see(self.index, self.epoch);
        self.epoch += 1;
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
                // other warps of a warpgroup may still be on their way to it
                Wait::Collective { size: s, .. } if s as usize != size && i / 32 != t / 32 => {
                    return None;
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
        // whoever waits for registers keeps the others waiting
        let registers = waiting.iter().find(|t| matches!(t.wait, Wait::Registers(_)));
        let first = registers.or(waiting.first())?;
        let what = match first.wait {
            Wait::Barrier { id, count, .. } => format!("at barrier {id} for {count}"),
            Wait::Collective { name, mask, .. } => format!("in {} with mask {mask:#x}", text(name)),
            Wait::Phase { barrier, parity } => format!(
                "for the end of a phase of parity {parity} of the mbarrier at shared byte \
                {}, which is {:?}",
                barrier.wrapping_sub(self.threads[0].coords.shared as usize),
                self.mbarriers.get(&barrier)
            ),
            Wait::Cluster => "at the cluster's barrier".to_owned(),
            Wait::Registers(count) => format!(
                "in setmaxnreg for {count} registers more, of which {} are free",
                self.free_registers
            ),
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
        let swizzle = map.swizzle()?;
        let start = tile.to.wrapping_sub(self.threads[0].coords.shared as usize);
        let row_bytes = map.tile_cols * 2;
        let bytes = (map.tile_rows * row_bytes) as usize;
        if !start.is_multiple_of(1024) || start + bytes > self.states.len() {
            return Err(format!(
                "a tile of {bytes} bytes is copied to shared byte {start}: not aligned to 1024, or \
                out of bounds"
            ));
        }
        for r in 0..map.tile_rows {
            for piece in 0..row_bytes / 16 {
                let offset = swizzle.place((r * row_bytes + piece * 16) as usize);
                let (y, x) = (tile.row as u64 + r, tile.column as u64 + piece * 8);
                let mut values = [0u16; 8];
                let inside =
                    if y < map.rows { map.cols.saturating_sub(x).min(8) as usize } else { 0 };
                if inside > 0 {
                    let from = (map.address + y * map.stride + x * 2) as usize;
                    let arena = self.launch.arena;
                    let at = arena.find(from).ok_or("a TMA copy reads outside device memory")?;
                    arena
                        .access(at, 2 * inside, false)
                        .map_err(|e| format!("a TMA copy reads memory that is {e}"))?;
                    self.check_visible(tile.waited, at, 2 * inside, Reader::Tma)
                        .map_err(|e| format!("a TMA copy reads {e}"))?;
                    // SAFETY: checked just now.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            from as *const u16,
                            values.as_mut_ptr(),
                            inside,
                        );
                    }
                }
                self.states[start + offset..start + offset + 16].fill(ASYNC + swizzle as u8);
                // SAFETY: inside shared memory, checked above.
                unsafe { ((tile.to + offset) as *mut [u16; 8]).write_unaligned(values) };
            }
        }
        let barrier = self.mbarriers.get_mut(&tile.barrier).ok_or(NO_MBARRIER)?;
        barrier.check_fenced()?;
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
            self.states[at..at + c.bytes + c.zeros].fill(GENERIC);
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
