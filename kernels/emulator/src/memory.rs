//! Device memory: one range of addresses, with a byte of state beside every byte, and beside every
//! two bytes who wrote them last.

use crate::visibility::Writer;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// An address that kernels can use.
pub type Address = u64;

/// State of a byte.
pub const FREE: u8 = 0;
pub const UNWRITTEN: u8 = 1;
pub const WRITTEN: u8 = 2;

/// Between allocations, so that running over the end of one is no access to the next.
const GAP: usize = 4096;

/// Bytes that are written by one block at a time.
const GRANULE: usize = 2;

pub struct Arena {
    base: *mut u8,
    states: *mut u8,
    /// A [`Writer`] for every [`GRANULE`] bytes.
    writers: *mut u8,
    size: usize,
    allocations: Mutex<Allocations>,
}

#[derive(Default)]
struct Allocations {
    top: usize,
    live: Vec<Range<usize>>,
}

// SAFETY: kernels access the memory as CUDA kernels would; the host only between launches.
unsafe impl Send for Arena {}
unsafe impl Sync for Arena {}

/// All live memory at one moment.
pub struct Snapshot {
    parts: Vec<(Range<usize>, Vec<u8>, Vec<u8>)>,
}

fn reserve(size: usize) -> *mut u8 {
    // SAFETY: a new private mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED, "cannot reserve {size} bytes of addresses");
    p.cast()
}

impl Arena {
    pub fn new(size: usize) -> Arena {
        let (base, states, writers) =
            (reserve(size), reserve(size), reserve(Self::writer_bytes(size)));
        Arena { base, states, writers, size, allocations: Mutex::default() }
    }

    /// Bytes of all writers of so many bytes.
    fn writer_bytes(size: usize) -> usize {
        size.div_ceil(GRANULE) * size_of::<Writer>()
    }

    pub fn allocate(&self, bytes: usize) -> Result<Address, String> {
        let mut a = self.allocations.lock().expect("nothing panics with the lock");
        let start = a.top.next_multiple_of(1024) + GAP;
        let end = start + bytes;
        if end + GAP > self.size {
            return Err(format!(
                "out of memory: {bytes} bytes more than the {} of this device",
                self.size
            ));
        }
        a.top = end;
        a.live.push(start..end);
        // SAFETY: inside both mappings. NaNs, whatever type is read.
        unsafe {
            self.base.add(start).write_bytes(0xff, bytes);
            self.states.add(start).write_bytes(UNWRITTEN, bytes);
        }
        Ok(self.base as u64 + start as u64)
    }

    pub fn free(&self, at: Address) {
        let mut a = self.allocations.lock().expect("nothing panics with the lock");
        let start = (at - self.base as u64) as usize;
        if let Some(i) = a.live.iter().position(|r| r.start == start) {
            let range = a.live.swap_remove(i);
            // SAFETY: inside both mappings; whole pages of freed memory go back to the system.
            unsafe {
                self.states.add(range.start).write_bytes(FREE, range.len());
                let (first, last) = (range.start.next_multiple_of(4096), range.end / 4096 * 4096);
                if first < last {
                    let bytes = last - first;
                    libc::madvise(self.base.add(first).cast(), bytes, libc::MADV_DONTNEED);
                    let (first, bytes) = (Self::writer_bytes(first), Self::writer_bytes(bytes));
                    libc::madvise(self.writers.add(first).cast(), bytes, libc::MADV_DONTNEED);
                }
            }
        }
    }

    /// The offset of a range all of whose bytes are allocated.
    fn offset(&self, at: Address, len: usize) -> Result<usize, String> {
        let start = at.wrapping_sub(self.base as u64) as usize;
        if start < self.size
            && len <= self.size - start
            && self.states(start, len).iter().all(|s| *s != FREE)
        {
            Ok(start)
        } else {
            Err(format!("a copy of {len} bytes at {at:#x} is out of bounds"))
        }
    }

    fn states(&self, start: usize, len: usize) -> &[u8] {
        // SAFETY: callers have checked the range.
        unsafe { std::slice::from_raw_parts(self.states.add(start), len) }
    }

    pub fn write(&self, at: Address, bytes: &[u8]) -> Result<(), String> {
        let start = self.offset(at, bytes.len())?;
        // SAFETY: checked above.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(start), bytes.len());
            self.states.add(start).write_bytes(WRITTEN, bytes.len());
        }
        Ok(())
    }

    pub fn read(&self, at: Address, bytes: &mut [u8]) -> Result<(), String> {
        let start = self.offset(at, bytes.len())?;
        if let Some(i) = self.states(start, bytes.len()).iter().position(|s| *s != WRITTEN) {
            return Err(format!(
                "the host reads {} bytes, of which byte {i} was never written",
                bytes.len()
            ));
        }
        // SAFETY: checked above.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(start), bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    /// Whether the address belongs to the device at all, and if so, where.
    #[inline]
    pub fn find(&self, at: usize) -> Option<usize> {
        let start = at.wrapping_sub(self.base as usize);
        (start < self.size).then_some(start)
    }

    /// Checks an access of a kernel and notes what it writes.
    #[inline]
    pub fn access(&self, start: usize, len: usize, write: bool) -> Result<(), &'static str> {
        if len > self.size - start {
            return Err("out of bounds");
        }
        for i in start..start + len {
            // SAFETY: inside the mapping. Threads race as the kernels do.
            unsafe {
                match self.states.add(i).read() {
                    FREE => return Err("out of bounds or freed"),
                    UNWRITTEN if !write => return Err("never written"),
                    UNWRITTEN => self.states.add(i).write(WRITTEN),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Who wrote the granules of a range last.
    #[inline]
    pub fn writers_of(&self, start: usize, len: usize) -> &[AtomicU64] {
        let first = start / GRANULE;
        let count = (start + len).min(self.size).div_ceil(GRANULE) - first;
        // SAFETY: inside the mapping, whose zeros are writers too.
        unsafe { std::slice::from_raw_parts(self.writers.cast::<AtomicU64>().add(first), count) }
    }

    #[inline]
    pub fn note_writer(&self, start: usize, len: usize, writer: Writer) {
        self.writers_of(start, len).iter().for_each(|w| w.store(writer.0, Ordering::Relaxed));
    }

    pub fn snapshot(&self) -> Snapshot {
        let a = self.allocations.lock().expect("nothing panics with the lock");
        let bytes = |p: *mut u8, r: &Range<usize>| {
            // SAFETY: a live allocation.
            unsafe { std::slice::from_raw_parts(p.add(r.start), r.len()).to_vec() }
        };
        Snapshot {
            parts: a
                .live
                .iter()
                .map(|r| (r.clone(), bytes(self.base, r), bytes(self.states, r)))
                .collect(),
        }
    }

    pub fn restore(&self, snapshot: &Snapshot) {
        for (range, data, states) in &snapshot.parts {
            // SAFETY: allocations do not change between a snapshot and its use.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    data.as_ptr(),
                    self.base.add(range.start),
                    range.len(),
                );
                std::ptr::copy_nonoverlapping(
                    states.as_ptr(),
                    self.states.add(range.start),
                    range.len(),
                );
            }
        }
    }

    /// Where memory differs from the snapshot, in words.
    pub fn first_difference(&self, snapshot: &Snapshot) -> Option<String> {
        snapshot.parts.iter().find_map(|(range, data, _)| {
            // SAFETY: as for `restore`.
            let now =
                unsafe { std::slice::from_raw_parts(self.base.add(range.start), range.len()) };
            let i = now.iter().zip(data).position(|(a, b)| a != b)?;
            Some(format!("byte {i} of an allocation of {}", range.len()))
        })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: all were mapped in `new` with these sizes.
        unsafe {
            libc::munmap(self.base.cast(), self.size);
            libc::munmap(self.states.cast(), self.size);
            libc::munmap(self.writers.cast(), Self::writer_bytes(self.size));
        }
    }
}
