//! What the compiler calls before every access to memory.

use crate::block::{Block, CURRENT, GENERIC, Reader, fault};
use crate::memory::UNWRITTEN;
use crate::visibility::Writer;

/// Checks an access to a block's shared memory from byte `start` on, which is in it.
fn check_shared(block: &mut Block, start: usize, len: usize, write: bool) {
    if start + len > block.states.len() {
        let what = if write { "write" } else { "read" };
        fault(&format!(
            "{what} of {len} bytes at byte {start} of shared memory, which has {}",
            block.states.len()
        ));
    }
    let states = &mut block.states[start..start + len];
    if write {
        states.fill(GENERIC);
    } else if states.contains(&UNWRITTEN) {
        fault(&format!(
            "read of {len} bytes at byte {start} of shared memory, which nothing wrote"
        ));
    }
}

/// Checks an access to device memory from its byte `start` on.
fn check_device(block: &mut Block, thread: usize, start: usize, len: usize, write: bool) {
    let (launch, waited) = (block.launch, block.threads[thread].waited);
    let what = if write { "write" } else { "read" };
    if let Err(e) = launch.arena.access(start, len, write) {
        fault(&format!("{what} of {len} bytes of device memory that is {e}"));
    }
    if !write {
        if let Err(e) = block.check_visible(waited, start, len, Reader::Thread) {
            fault(&format!("read of {e}"));
        }
        return;
    }
    if !waited {
        fault("a write to device memory before griddep_wait: kernels before may still use it");
    }
    launch.arena.note_writer(start, len, Writer::new(launch.number, block.index, block.epoch));
}

fn check(at: usize, len: usize, write: bool) {
    let Some(current) = CURRENT.get() else { return };
    if at >= current.stacks.0 && at < current.stacks.1 {
        return;
    }
    // SAFETY: the block is alive while its threads run; the borrow ends before they switch.
    let block = unsafe { &mut *current.block };
    let start = at.wrapping_sub(block.threads[current.thread].coords.shared as usize);
    let what = if write { "write" } else { "read" };
    if start < block.states.len() {
        return check_shared(block, start, len, write);
    }
    for &other in &block.cluster {
        // SAFETY: blocks of a cluster live as long as each other, and no other thread runs.
        let other = unsafe { &mut *other };
        let start = at.wrapping_sub(other.threads[0].coords.shared as usize);
        if start < other.states.len() {
            if other.ended() {
                fault(&format!(
                    "{what} of shared memory of block {:?}, which has ended",
                    other.threads[0].coords.block
                ));
            }
            return check_shared(other, start, len, write);
        }
    }
    if let Some(start) = block.launch.arena.find(at) {
        return check_device(block, current.thread, start, len, write);
    }
    // what the kernel asks of the emulator itself: its arguments, its coordinates, constants
    let own = block.arguments.iter().any(|r| r.contains(&at))
        || block.threads.as_ptr_range().contains(&(at as *const _));
    if write || !(block.launch.kernel.image.contains(&at) || own) {
        fault(&format!(
            "{what} of {len} bytes out of bounds of shared and device memory ({start} past shared \
            memory's start)"
        ));
    }
}

macro_rules! checks {
    ($($load:ident $store:ident $len:literal;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $load(at: usize) {
            check(at, $len, false);
        }
        #[unsafe(no_mangle)]
        extern "C" fn $store(at: usize) {
            check(at, $len, true);
        }
    )*};
}
checks! {
    __asan_load1_noabort __asan_store1_noabort 1;
    __asan_load2_noabort __asan_store2_noabort 2;
    __asan_load4_noabort __asan_store4_noabort 4;
    __asan_load8_noabort __asan_store8_noabort 8;
    __asan_load16_noabort __asan_store16_noabort 16;
}

#[unsafe(no_mangle)]
extern "C" fn __asan_loadN_noabort(at: usize, len: usize) {
    check(at, len, false);
}

#[unsafe(no_mangle)]
extern "C" fn __asan_storeN_noabort(at: usize, len: usize) {
    check(at, len, true);
}

#[unsafe(no_mangle)]
extern "C" fn __asan_handle_no_return() {}

/// Around the registration of kernels, before any of them runs.
#[unsafe(no_mangle)]
extern "C" fn __asan_before_dynamic_init(_: usize) {}

#[unsafe(no_mangle)]
extern "C" fn __asan_after_dynamic_init() {}
