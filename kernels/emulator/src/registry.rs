//! The kernels, which register themselves as the program starts.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

pub struct Kernel {
    pub name: String,
    pub call: unsafe extern "C" fn(*mut *mut c_void),
    /// Most threads of a block.
    pub threads: u32,
    /// Bytes of each argument.
    pub sizes: Vec<u32>,
}

static KERNELS: Mutex<Vec<&'static Kernel>> = Mutex::new(Vec::new());

pub fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.lock().expect("no registration panics").iter().find(|k| k.name == name).copied()
}

pub fn names() -> Vec<String> {
    KERNELS.lock().expect("no registration panics").iter().map(|k| k.name.clone()).collect()
}

/// # Safety
/// `name` is a C string and `sizes` has `count` elements.
#[unsafe(no_mangle)]
unsafe extern "C" fn emulator_register(
    name: *const c_char,
    call: unsafe extern "C" fn(*mut *mut c_void),
    threads: u32,
    sizes: *const u32,
    count: u32,
) {
    let (name, sizes) = unsafe {
        (
            CStr::from_ptr(name).to_string_lossy().into_owned(),
            std::slice::from_raw_parts(sizes, count as usize).to_vec(),
        )
    };
    let kernel = Box::leak(Box::new(Kernel { name, call, threads, sizes }));
    KERNELS.lock().expect("no registration panics").push(kernel);
}
