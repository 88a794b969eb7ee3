//! The kernels, which register themselves as the program starts.

use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::sync::Mutex;

pub struct Kernel {
    pub name: String,
    pub call: unsafe extern "C" fn(*mut *mut c_void),
    /// Most threads of a block.
    pub threads: u32,
    /// Blocks that fit on a multiprocessor at a time, by the kernel's launch bounds; 0: not said.
    pub blocks: u32,
    /// Bytes of each argument.
    pub sizes: Vec<u32>,
    /// Where the program or library lies that it is a part of, with its constants.
    pub image: Range<usize>,
}

impl Kernel {
    /// Registers that a thread has when the kernel begins, as far as its launch bounds say.
    pub fn registers(&self) -> u32 {
        const OF_PROCESSOR: u32 = 65536;
        (OF_PROCESSOR / (self.threads * self.blocks.max(1)) / 8 * 8).min(248)
    }
}

static KERNELS: Mutex<Vec<&'static Kernel>> = Mutex::new(Vec::new());

pub fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.lock().expect("no registration panics").iter().find(|k| k.name == name).copied()
}

pub fn names() -> Vec<String> {
    KERNELS.lock().expect("no registration panics").iter().map(|k| k.name.clone()).collect()
}

/// # Safety
/// `name` is a C string, `sizes` has `count` elements, and `image` is there.
#[unsafe(no_mangle)]
unsafe extern "C" fn emulator_register(
    name: *const c_char,
    call: unsafe extern "C" fn(*mut *mut c_void),
    threads: u32,
    blocks: u32,
    sizes: *const u32,
    count: u32,
    image: *const [usize; 2],
) {
    let (name, sizes, [start, end]) = unsafe {
        (
            CStr::from_ptr(name).to_string_lossy().into_owned(),
            std::slice::from_raw_parts(sizes, count as usize).to_vec(),
            *image,
        )
    };
    let image = start..end;
    let kernel = Box::leak(Box::new(Kernel { name, call, threads, blocks, sizes, image }));
    KERNELS.lock().expect("no registration panics").push(kernel);
}
