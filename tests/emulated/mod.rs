//! The kernel emulator as a device.

use beautiful_prompt::device::{Address, Args, Launcher, Limits, Shape, TensorMap};
use beautiful_prompt::error::{Error, Result};
use kernel_emulator::Emulator;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

pub struct Emulated {
    pub emulator: Emulator,
    /// Whether this is a Hopper GPU.
    pub hopper: bool,
    /// Multiprocessors that it has: kernels divide their work by them.
    pub processors: Cell<u32>,
    /// Kernels whose names begin so compute less than they should: the fourth argument is one less.
    pub broken: Cell<Option<&'static str>>,
    /// Launches of each kernel.
    pub launched: RefCell<BTreeMap<String, usize>>,
    /// Sizes of their clusters.
    pub clusters: RefCell<BTreeSet<u32>>,
    recording: RefCell<Option<Recording>>,
    changes: Cell<u64>,
    /// Recordings that were made, and how often one was repeated.
    pub recorded: Cell<usize>,
    pub replayed: Cell<usize>,
    /// Copies to the device.
    pub writes: Cell<usize>,
}

type Recording = Vec<(String, Shape, Args)>;

/// A GPU with room for a gigabyte, of Hopper's kind or older. `check_order` runs every launch
/// twice, in two orders of threads.
pub fn gpu(check_order: bool, hopper: bool) -> Rc<Emulated> {
    let mut emulator = Emulator::new(1 << 30);
    emulator.check_order = check_order;
    emulator.shared_limit = if hopper { 227 << 10 } else { 99 << 10 };
    let (launched, clusters, recording, changes) = Default::default();
    let (recorded, replayed, writes) = Default::default();
    let (processors, broken) = (Cell::new(4), Cell::new(None));
    Rc::new(Emulated {
        emulator,
        hopper,
        processors,
        broken,
        launched,
        clusters,
        recording,
        changes,
        recorded,
        replayed,
        writes,
    })
}

fn failed<T>(r: std::result::Result<T, String>) -> Result<T> {
    r.map_err(Error::invalid)
}

impl Emulated {
    fn only_now(&self) -> Result<()> {
        if self.recording.borrow().is_some() {
            Err(Error::invalid("not while launches are recorded"))
        } else {
            Ok(())
        }
    }
}

impl Launcher for Emulated {
    type Recording = Recording;
    type Reading = Vec<u8>;

    fn limits(&self) -> Limits {
        Limits {
            shared_bytes: self.emulator.shared_limit,
            processors: self.processors.get(),
            hopper: self.hopper,
        }
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.only_now()?;
        self.changes.set(self.changes.get() + 1);
        failed(self.emulator.allocate(bytes))
    }
    fn free(&self, at: Address) {
        self.changes.set(self.changes.get() + 1);
        self.emulator.free(at);
    }
    fn write(&self, at: Address, bytes: &[u8]) -> Result<()> {
        self.only_now()?;
        self.writes.set(self.writes.get() + 1);
        failed(self.emulator.write(at, bytes))
    }
    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        self.write(at, &vec![0; bytes])
    }
    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()> {
        self.only_now()?;
        failed(self.emulator.read(at, bytes))
    }
    fn read_later(&self, at: Address, bytes: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; bytes];
        self.read(at, &mut out).map(|()| out)
    }
    fn finish_read(&self, reading: Vec<u8>) -> Result<Vec<u8>> {
        Ok(reading)
    }
    fn launch(&self, kernel: &str, shape: Shape, args: &Args) -> Result<()> {
        if let Some(recording) = &mut *self.recording.borrow_mut() {
            recording.push((kernel.to_owned(), shape, args.clone()));
            return Ok(());
        }
        *self.launched.borrow_mut().entry(kernel.to_owned()).or_default() += 1;
        self.clusters.borrow_mut().insert(shape.cluster);
        let shape = kernel_emulator::Shape {
            grid: shape.grid,
            threads: shape.threads,
            shared_bytes: shape.shared_bytes,
            cooperative: shape.cooperative,
            cluster: shape.cluster,
        };
        let mut args: Vec<Vec<u8>> = args.iter().map(|a| a.to_vec()).collect();
        if self.broken.get().is_some_and(|b| kernel.starts_with(b)) {
            args[3][0] -= 1;
        }
        failed(self.emulator.launch(
            kernel,
            shape,
            &args.iter().map(|a| &a[..]).collect::<Vec<_>>(),
        ))
    }
    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Recording> {
        *self.recording.borrow_mut() = Some(Vec::new());
        let done = work();
        let recording = self.recording.take().expect("begun above");
        self.recorded.set(self.recorded.get() + 1);
        done.map(|()| recording)
    }
    fn replay(&self, recording: &Recording) -> Result<()> {
        self.replayed.set(self.replayed.get() + 1);
        recording.iter().try_for_each(|(kernel, shape, args)| self.launch(kernel, *shape, args))
    }
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let started = std::time::Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    }
    fn changes(&self) -> u64 {
        self.changes.get()
    }
    fn tensor_map(
        &self,
        at: Address,
        rows: usize,
        cols: usize,
        tile_rows: usize,
    ) -> Result<TensorMap> {
        Ok(TensorMap(kernel_emulator::tensor_map(at, rows, cols, tile_rows)))
    }
}
