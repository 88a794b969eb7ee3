//! The kernel emulator as a device.

use beautiful_prompt::device::{
    Address, Args, LaunchConfig, Launcher, Limits, TensorMap, TensorMapConfig,
};
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
    /// Told of every launch when it is done, and may change what it wrote.
    pub spoil: RefCell<Option<Spoil>>,
    /// The captures that succeed.
    pub captures: Cell<Captures>,
    /// Captures that failed.
    pub refused: Cell<usize>,
    /// Kernels that are known by this and their own names are launched instead of the others.
    pub mutant: Cell<&'static str>,
    /// Changes what tensor maps are made of.
    pub mapped: Cell<fn(TensorMapConfig) -> TensorMapConfig>,
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

#[derive(Clone, Copy, PartialEq)]
#[allow(dead_code)] // each test has its own
pub enum Captures {
    All,
    /// Those of kernels that do not overlap.
    InOrder,
    None,
}

/// Changes what a launch wrote.
pub type Spoil = Box<dyn Fn(&Launched)>;

/// A launch that is done.
#[allow(dead_code)] // each test uses its own
pub struct Launched<'a> {
    pub emulator: &'a Emulator,
    pub kernel: &'a str,
    pub config: LaunchConfig,
    args: &'a [Vec<u8>],
}

#[allow(dead_code)] // each test uses its own
impl Launched<'_> {
    /// A word of an argument.
    pub fn word(&self, argument: usize, offset: usize) -> u32 {
        let bytes = &self.args[argument][offset..offset + 4];
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    /// An address in an argument.
    pub fn address(&self, argument: usize, offset: usize) -> Address {
        self.word(argument, offset) as u64 | (self.word(argument, offset + 4) as u64) << 32
    }

    /// Adds to an f32 in device memory.
    pub fn add(&self, at: Address, value: f32) {
        let mut bytes = [0; 4];
        self.emulator.read(at, &mut bytes).unwrap();
        self.emulator.write(at, &(f32::from_le_bytes(bytes) + value).to_le_bytes()).unwrap();
    }

    /// Writes a number that is large in both 16-bit types.
    pub fn enlarge(&self, at: Address) {
        self.emulator.write(at, &[0x00, 0x50]).unwrap();
    }
}

/// A GPU with room for a gigabyte, of Hopper's kind or older. `check_order` runs every launch
/// twice, in two orders of threads.
pub fn gpu(check_order: bool, hopper: bool) -> Rc<Emulated> {
    let mut emulator = Emulator::new(1 << 30);
    emulator.check_order = check_order;
    emulator.shared_limit = if hopper { 227 << 10 } else { 99 << 10 };
    let (launched, clusters, capturing, allocation_epoch) = Default::default();
    let (recorded, replayed, writes, refused) = Default::default();
    let (processors, spoil) = (Cell::new(4), RefCell::default());
    let (mutant, mapped) = (Cell::new(""), Cell::new(std::convert::identity as fn(_) -> _));
    Rc::new(Emulated {
        emulator,
        hopper,
        processors,
        spoil,
        captures: Cell::new(Captures::All),
        refused,
        mutant,
        mapped,
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
    fn free_memory(&self) -> Option<u64> {
        Some(1 << 30)
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
            dependent: self.hopper && !config.cooperative,
        };
        let args: Vec<Vec<u8>> = args.iter().map(|a| a.to_vec()).collect();
        let mutant = format!("{}{kernel}", self.mutant.get());
        let name = if Emulator::has(&mutant) { &mutant } else { kernel };
        let bytes: Vec<&[u8]> = args.iter().map(|a| &a[..]).collect();
        failed(self.emulator.launch(name, shape, &bytes))?;
        if let Some(spoil) = &*self.spoil.borrow() {
            spoil(&Launched { emulator: &self.emulator, kernel, config, args: &args });
        }
        Ok(())
    }
    fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<()>,
        overlap: bool,
    ) -> Result<CapturedGraph> {
        *self.capturing.borrow_mut() = Some(Vec::new());
        let done = work();
        let graph = self.capturing.take().expect("begun above");
        let captures = self.captures.get();
        if captures == Captures::None || captures == Captures::InOrder && overlap {
            self.refused.set(self.refused.get() + 1);
            return Err(Error::invalid("such launches are not captured here"));
        }
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
    fn tensor_map(&self, config: &TensorMapConfig) -> Result<TensorMap> {
        let &TensorMapConfig {
            address,
            global_dim,
            global_stride,
            box_dim,
            element_strides,
            swizzle,
        } = &self.mapped.get()(*config);
        let config = kernel_emulator::TensorMapConfig {
            address,
            global_dim,
            global_stride,
            box_dim,
            element_strides,
            swizzle,
        };
        failed(kernel_emulator::tensor_map(&config)).map(TensorMap)
    }
}
