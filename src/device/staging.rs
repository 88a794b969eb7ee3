//! Page-locked memory on the host. Copies from or to ordinary memory wait for the work before them;
//! through this memory neither side waits for the other.

use cudarc::driver::{result, sys};
use std::cell::RefCell;
use std::collections::VecDeque;

/// Longest copy that goes through here. Longer ones are weights, and not in anybody's way.
pub const MAX_COPY: usize = 256 << 10;
/// Copies to the device that may be on their way before the host waits for the oldest.
const SLOTS: usize = 16;

/// A piece of page-locked memory, and when its last copy is done.
pub struct Slot {
    at: *mut u8,
    room: usize,
    event: sys::CUevent,
}

impl Slot {
    fn new(bytes: usize) -> Result<Slot, result::DriverError> {
        let room = bytes.next_power_of_two().max(4096);
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: freed when the slot goes.
        match unsafe { result::malloc_host(room, 0) } {
            Ok(at) => Ok(Slot { at: at.cast(), room, event }),
            Err(e) => {
                // SAFETY: made above.
                let _ = unsafe { result::event::destroy(event) };
                Err(e)
            }
        }
    }

    /// Memory that no copy uses.
    fn bytes(&mut self, len: usize) -> Result<&mut [u8], result::DriverError> {
        // SAFETY: the event is ours; one that was never recorded is over.
        unsafe { result::event::synchronize(self.event)? };
        assert!(len <= self.room);
        // SAFETY: as long as `room`, written by nobody else now.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, len) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: made in `new`; what may still be copied is waited for.
        unsafe {
            let _ = result::event::synchronize(self.event);
            let _ = result::free_host(self.at.cast());
            let _ = result::event::destroy(self.event);
        }
    }
}

#[derive(Default)]
pub struct Staging {
    /// To the device, the oldest copy first.
    written: RefCell<VecDeque<Slot>>,
    /// From the device: slots that are free.
    free: RefCell<Vec<Slot>>,
}

impl Staging {
    /// Frees all of it, while there is a context.
    pub fn clear(&self) {
        self.written.borrow_mut().clear();
        self.free.borrow_mut().clear();
    }

    /// Copies `bytes`, at most [`MAX_COPY`], to the device.
    pub fn write(
        &self,
        at: u64,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), result::DriverError> {
        let mut written = self.written.borrow_mut();
        let oldest = if written.len() < SLOTS { None } else { written.pop_front() };
        let mut slot = match oldest {
            Some(slot) if slot.room >= bytes.len() => slot,
            _ => Slot::new(bytes.len())?,
        };
        let staged = slot.bytes(bytes.len())?;
        staged.copy_from_slice(bytes);
        // SAFETY: the slot stays until the event says that the copy is done.
        unsafe {
            result::memcpy_htod_async(at, staged, stream)?;
            result::event::record(slot.event, stream)?;
        }
        written.push_back(slot);
        Ok(())
    }

    /// Begins a copy to the host.
    pub fn read(
        &self,
        at: u64,
        bytes: usize,
        stream: sys::CUstream,
    ) -> Result<Slot, result::DriverError> {
        let mut free = self.free.borrow_mut();
        let found = free.iter().position(|s| s.room >= bytes);
        let mut slot = match found {
            Some(i) => free.swap_remove(i),
            None => Slot::new(bytes)?,
        };
        let event = slot.event;
        // SAFETY: as in `write`.
        unsafe {
            result::memcpy_dtoh_async(slot.bytes(bytes)?, at, stream)?;
            result::event::record(event, stream)?;
        }
        Ok(slot)
    }

    /// Waits for a copy to the host.
    pub fn finish(&self, mut slot: Slot, bytes: usize) -> Result<Vec<u8>, result::DriverError> {
        let out = slot.bytes(bytes)?.to_vec();
        self.free.borrow_mut().push(slot);
        Ok(out)
    }
}
