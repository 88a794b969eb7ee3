//! The kernel emulator as a device.

use beautiful_prompt::device::{Address, Args, Launcher, Limits, Shape, TensorMap};
use beautiful_prompt::error::{Error, Result};
use kernel_emulator::Emulator;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

pub struct Emulated {
    pub emulator: Emulator,
    /// Whether this is a Hopper GPU.
    pub hopper: bool,
    /// Launches of each kernel.
    pub launched: RefCell<BTreeMap<String, usize>>,
}

/// A GPU with room for a gigabyte, of Hopper's kind or older. `check_order` runs every launch twice, in two orders of
/// threads.
pub fn gpu(check_order: bool, hopper: bool) -> Rc<Emulated> {
    let mut emulator = Emulator::new(1 << 30);
    emulator.check_order = check_order;
    Rc::new(Emulated { emulator, hopper, launched: RefCell::default() })
}

fn failed<T>(r: std::result::Result<T, String>) -> Result<T> {
    r.map_err(Error::invalid)
}

impl Launcher for Emulated {
    fn limits(&self) -> Limits {
        Limits { shared_bytes: self.emulator.shared_limit, processors: 4, hopper: self.hopper }
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        failed(self.emulator.allocate(bytes))
    }
    fn free(&self, at: Address) {
        self.emulator.free(at);
    }
    fn write(&self, at: Address, bytes: &[u8]) -> Result<()> {
        failed(self.emulator.write(at, bytes))
    }
    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        failed(self.emulator.write(at, &vec![0; bytes]))
    }
    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()> {
        failed(self.emulator.read(at, bytes))
    }
    fn launch(&self, kernel: &str, shape: Shape, args: &Args) -> Result<()> {
        *self.launched.borrow_mut().entry(kernel.to_owned()).or_default() += 1;
        let shape = kernel_emulator::Shape {
            grid: shape.grid,
            threads: shape.threads,
            shared_bytes: shape.shared_bytes,
            cooperative: false,
        };
        failed(self.emulator.launch(kernel, shape, &args.iter().collect::<Vec<_>>()))
    }
    fn tensor_map(&self, at: Address, rows: usize, cols: usize, tile_rows: usize) -> Result<TensorMap> {
        Ok(TensorMap(kernel_emulator::tensor_map(at, rows, cols, tile_rows)))
    }
}
