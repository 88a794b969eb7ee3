//! `bprompt selftest`: every CUDA kernel on this machine's GPU against the CPU.

use super::print::print_line;
use crate::device::cuda::Driver;
use crate::selftest::{KernelCheck, Shapes, run};
use crate::tensor::DType;
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::rc::Rc;

#[derive(Args, Clone, Debug)]
pub struct SelftestArgs {
    /// The device to test.
    #[arg(long, value_enum, default_value_t = TestedDevice::Cuda)]
    device: TestedDevice,
    /// Small shapes only: quick enough under compute-sanitizer.
    #[arg(long)]
    small: bool,
    /// Begins the random numbers and shapes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print every case, not only each operation's worst.
    #[arg(long)]
    all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TestedDevice {
    Cuda,
}

impl SelftestArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let driver = Rc::new(Driver::open().context("selftest")?);
        let (major, minor) = driver.capability;
        print_line!(
            "{}, compute capability {major}.{minor}, {} MiB",
            driver.name,
            driver.memory_bytes >> 20
        )?;
        let mut worst: BTreeMap<&'static str, KernelCheck> = BTreeMap::new();
        let (mut cases, mut failures) = (0, 0);
        let mut unwritten = None;
        let mut each = |o: KernelCheck| {
            cases += 1;
            failures += usize::from(!o.passed());
            if self.all || !o.passed() {
                unwritten = unwritten.take().or(print(&o).err());
            }
            let ratio = |o: &KernelCheck| o.error / o.allowed.max(1e-30);
            if worst.get(o.operation).is_none_or(|w| ratio(w) < ratio(&o)) {
                worst.insert(o.operation, o);
            }
        };
        for half in [DType::Bf16, DType::F16] {
            run(&driver, half, &Shapes::small(self.seed), &mut each)?;
            run(&driver, half, &Shapes::random(self.seed), &mut each)?;
            if !self.small {
                run(&driver, half, &Shapes::real(self.seed), &mut each)?;
            }
        }
        unwritten.map_or(Ok(()), Err)?;
        print_line!("worst of each operation:")?;
        worst.values().try_for_each(print)?;
        ensure!(
            failures == 0,
            "selftest: {failures} of {cases} cases are wrong on {}",
            driver.name
        );
        print_line!("{cases} cases passed")?;
        Ok(())
    }
}

fn print(o: &KernelCheck) -> std::io::Result<()> {
    let verdict = if o.passed() { "ok" } else { "WRONG" };
    print_line!(
        "{verdict:5} {:28} error {:9.2e} of {:8.2e} allowed  {}",
        o.operation,
        o.error,
        o.allowed,
        o.case
    )
}
