//! A persistent pool of threads for short parallel loops.
//!
//! A forward pass of a small batch is a few hundred loops of some tens of microseconds, so a
//! worker spins for a moment before it sleeps, and handing out a loop allocates nothing. Indices
//! are taken one at a time from a shared counter: results never depend on which thread took which.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(60);

type Body = *const (dyn Fn(usize) + Sync);

/// The loop being run.
#[derive(Clone, Copy)]
struct Job {
    body: Body,
    count: u32,
    epoch: u32,
}

struct Shared {
    /// Number of the loop in the high half, next index in the low half: a worker that comes late
    /// cannot take an index of a loop it has not seen.
    ticket: AtomicU64,
    finished: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    job: Mutex<Job>,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `Job::body` is only called for an index taken from `ticket`, and the caller of
// `Threads::run` waits until every index that was taken is finished.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// The pool. `run` may be called from one thread at a time; nested calls run on the caller alone.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    busy: AtomicBool,
}

impl Threads {
    /// A pool of `count` threads, the caller's included; 0 means one for each core.
    pub fn new(count: usize) -> Threads {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let count = if count == 0 { cores } else { count };
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            finished: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            job: Mutex::new(Job { body: &|_| {}, count: 0, epoch: 0 }),
            sleeping: Mutex::new(0),
            wake: Condvar::new(),
        });
        let workers = (1..count)
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("worker-{i}"))
                    .spawn(move || work(&shared))
                    .expect("cannot start a worker thread")
            })
            .collect();
        Threads { shared, workers, busy: AtomicBool::new(false) }
    }

    /// Threads of the pool, the caller's included.
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(i)` once for every `i < count`, on all threads; returns when all are done.
    pub fn run(&self, count: usize, body: impl Fn(usize) + Sync) {
        if count <= 1 || self.workers.is_empty() || self.busy.swap(true, Acquire) {
            (0..count).for_each(body);
            return;
        }
        let shared = &*self.shared;
        let erased: &(dyn Fn(usize) + Sync) = &body;
        let job = {
            let mut job = shared.job.lock().unwrap_or_else(|e| e.into_inner());
            *job = Job {
                // SAFETY: only the lifetime is erased; see `Shared`.
                body: unsafe {
                    std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Body>(erased)
                },
                count: u32::try_from(count).expect("a loop of fewer than 2^32 turns"),
                epoch: job.epoch.wrapping_add(1),
            };
            shared.finished.store(0, Relaxed);
            shared.ticket.store((job.epoch as u64) << 32, SeqCst);
            *job
        };
        if *shared.sleeping.lock().unwrap_or_else(|e| e.into_inner()) > 0 {
            shared.wake.notify_all();
        }
        take(shared, job);
        // a worker that lost its core in the middle of an index needs it back more than this loop
        // does
        let mut turns = 0u32;
        while shared.finished.load(Acquire) != count {
            turns += 1;
            if turns.is_multiple_of(2048) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        self.busy.store(false, Release);
        assert!(!shared.panicked.swap(false, Relaxed), "a task of a parallel loop panicked");
    }

    /// [`Threads::run`] over contiguous ranges of `0..total`, each at least `grain` long and as
    /// many as keep the threads evenly loaded.
    pub fn run_ranges(
        &self,
        total: usize,
        grain: usize,
        body: impl Fn(std::ops::Range<usize>) + Sync,
    ) {
        let parts = (total / grain.max(1)).clamp(1, 4 * self.count());
        self.run(parts, |i| body(total * i / parts..total * (i + 1) / parts));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        {
            let _guard = self.shared.sleeping.lock();
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Runs indices of `job` until there are none left.
fn take(shared: &Shared, job: Job) {
    loop {
        let ticket = shared.ticket.load(Acquire);
        if (ticket >> 32) as u32 != job.epoch || ticket as u32 >= job.count {
            return;
        }
        if shared.ticket.compare_exchange_weak(ticket, ticket + 1, AcqRel, Relaxed).is_err() {
            continue;
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: the index was taken, so the caller waits for it: the body is alive.
            unsafe { (*job.body)(ticket as u32 as usize) }
        }));
        if result.is_err() {
            shared.panicked.store(true, Relaxed);
        }
        shared.finished.fetch_add(1, Release);
    }
}

fn work(shared: &Shared) {
    let mut seen = 0u32;
    let epoch = |shared: &Shared| (shared.ticket.load(SeqCst) >> 32) as u32;
    loop {
        let idle = Instant::now();
        while epoch(shared) == seen && !shared.stop.load(Relaxed) {
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            if idle.elapsed() > SPIN {
                let mut sleeping = shared.sleeping.lock().unwrap_or_else(|e| e.into_inner());
                *sleeping += 1;
                while epoch(shared) == seen && !shared.stop.load(SeqCst) {
                    sleeping = shared.wake.wait(sleeping).unwrap_or_else(|e| e.into_inner());
                }
                *sleeping -= 1;
            }
        }
        if shared.stop.load(SeqCst) {
            return;
        }
        let job = *shared.job.lock().unwrap_or_else(|e| e.into_inner());
        seen = job.epoch;
        take(shared, job);
    }
}

/// A mutable slice that loop bodies on several threads write to in disjoint places.
#[derive(Clone, Copy)]
pub struct Disjoint<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: access goes through `slice`, whose contract is that ranges in use never overlap.
unsafe impl<T: Send> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    /// Shares `data` out; it must stay alive and untouched while this is in use.
    pub fn new(data: &mut [T]) -> Self {
        Disjoint { data: data.as_mut_ptr(), len: data.len() }
    }

    /// Elements of the slice.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two live slices may overlap, and the slice this was made from must be alive.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn slice(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        std::slice::from_raw_parts_mut(self.data.add(range.start), range.len())
    }

    /// A pointer to element `start`, from which `extent` elements lie inside the slice: for tiles
    /// whose rows interleave with another thread's.
    #[inline(always)]
    pub fn tile(&self, start: usize, extent: usize) -> *mut T {
        assert!(start <= self.len && extent <= self.len - start);
        self.data.wrapping_add(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_index_runs_once_however_many_threads() {
        for threads in 1..5 {
            let pool = Threads::new(threads);
            for count in [0, 1, 2, 7, 1000] {
                let hits: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
                pool.run(count, |i| {
                    hits[i].fetch_add(1, Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_sleeping_pool_wakes_and_a_panic_reaches_the_caller() {
        let pool = Threads::new(3);
        std::thread::sleep(SPIN * 20);
        let sum = AtomicU32::new(0);
        pool.run(100, |i| {
            sum.fetch_add(i as u32, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 4950);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, |i| assert!(i != 40, "deliberate"));
        }));
        assert!(panicked.is_err());
        pool.run(10, |_| {});
    }
}
