//! The kernel emulator as a device.

use beautiful_prompt::device::{Address, Args, LaunchConfig, Launcher, Limits, TensorMap};
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
    capturing: RefCell<Option<CapturedGraph>>,
    allocation_epoch: Cell<u64>,
    /// Recordings that were made, and how often one was repeated.
    pub recorded: Cell<usize>,
    pub replayed: Cell<usize>,
    /// Copies to the device.
    pub writes: Cell<usize>,
}

type CapturedGraph = Vec<(String, LaunchConfig, Args)>;

/// A GPU with room for a gigabyte, of Hopper's kind or older. `check_order` runs every launch
/// twice, in two orders of threads.
pub fn gpu(check_order: bool, hopper: bool) -> Rc<Emulated> {
    let mut emulator = Emulator::new(1 << 30);
    emulator.check_order = check_order;
    emulator.shared_limit = if hopper { 227 << 10 } else { 99 << 10 };
    let (launched, clusters, capturing, allocation_epoch) = Default::default();
    let (recorded, replayed, writes) = Default::default();
    let (processors, broken) = (Cell::new(4), Cell::new(None));
    Rc::new(Emulated {
        emulator,
        hopper,
        processors,
        broken,
        launched,
        clusters,
        capturing,
        allocation_epoch,
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
        if self.capturing.borrow().is_some() {
            Err(Error::invalid("not while launches are recorded"))
        } else {
            Ok(())
        }
    }
}

impl Launcher for Emulated {
    type CapturedGraph = CapturedGraph;
    type PendingRead = Vec<u8>;

    fn limits(&self) -> Limits {
        Limits {
            shared_bytes: self.emulator.shared_limit,
            processors: self.processors.get(),
            hopper: self.hopper,
        }
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.only_now()?;
        self.allocation_epoch.set(self.allocation_epoch.get() + 1);
        failed(self.emulator.allocate(bytes))
    }
    fn free(&self, at: Address) {
        self.allocation_epoch.set(self.allocation_epoch.get() + 1);
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
    fn finish_read(&self, pending: Vec<u8>) -> Result<Vec<u8>> {
        Ok(pending)
    }
    fn launch(&self, kernel: &str, config: LaunchConfig, args: &Args) -> Result<()> {
        if let Some(capturing) = &mut *self.capturing.borrow_mut() {
            capturing.push((kernel.to_owned(), config, args.clone()));
            return Ok(());
        }
        *self.launched.borrow_mut().entry(kernel.to_owned()).or_default() += 1;
        self.clusters.borrow_mut().insert(config.cluster);
        let shape = kernel_emulator::Shape {
            grid: config.grid,
            threads: config.threads,
            shared_bytes: config.shared_bytes,
            cooperative: config.cooperative,
            cluster: config.cluster,
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
    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<CapturedGraph> {
        *self.capturing.borrow_mut() = Some(Vec::new());
        let done = work();
        let graph = self.capturing.take().expect("begun above");
        self.recorded.set(self.recorded.get() + 1);
        done.map(|()| graph)
    }
    fn replay(&self, graph: &CapturedGraph) -> Result<()> {
        self.replayed.set(self.replayed.get() + 1);
        graph.iter().try_for_each(|(kernel, config, args)| self.launch(kernel, *config, args))
    }
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let started = std::time::Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    }
    fn allocation_epoch(&self) -> u64 {
        self.allocation_epoch.get()
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
