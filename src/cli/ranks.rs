//! The ranks that a launcher has started, and how they find each other.

use super::print::note;
use crate::device::cuda::Driver;
use crate::error::Result;
use crate::ops::cpu::Cpu;
use crate::ops::cuda::Cuda;
use crate::train::parallel::host::HostCommunicator;
use crate::train::parallel::mesh::Mesh;
use crate::train::parallel::nccl::NcclCommunicator;
use crate::train::parallel::world::World;
use crate::train::parallel::{Alone, Communicator};
use anyhow::{Context, bail};
use std::rc::Rc;

/// This process's rank, and the connections to the others until a communicator takes them.
pub struct Ranks {
    world: Option<World>,
    mesh: Option<Mesh>,
}

impl Ranks {
    /// What the environment says; nobody is waited for yet.
    pub fn from_env() -> Result<Ranks> {
        Ok(Ranks { world: World::from_env()?, mesh: None })
    }

    /// Whether this is the rank that writes files and says how it goes.
    pub fn is_first(&self) -> bool {
        self.world.as_ref().is_none_or(|w| w.rank == 0)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.world.as_ref().map_or(1, |w| w.ranks)
    }

    /// How many there are on this machine.
    pub fn local_count(&self) -> usize {
        self.world.as_ref().map_or(1, |w| w.local_ranks)
    }

    /// Which one of those on this machine this is.
    pub fn local_rank(&self) -> usize {
        self.world.as_ref().map_or(0, |w| w.local_rank)
    }

    /// What its errors begin with if it is one of several.
    pub fn name(&self) -> Option<String> {
        self.world.as_ref().map(|w| format!("rank {}", w.rank))
    }

    /// Waits for the others.
    pub fn meet(&mut self) -> Result<()> {
        let note = |text: &str| note!("{text}");
        self.mesh = self.world.as_ref().map(|w| Mesh::connect(w, &note)).transpose()?;
        Ok(())
    }

    /// Fails if this is not the same on all ranks as on rank 0.
    pub fn agree(&self, what: &str, value: &str) -> anyhow::Result<()> {
        let Some(mesh) = &self.mesh else { return Ok(()) };
        let all = mesh.exchange(value.as_bytes().to_vec())?;
        let Some(rank) = all.iter().position(|v| *v != all[0]) else { return Ok(()) };
        let [theirs, first] = [rank, 0].map(|r| String::from_utf8_lossy(&all[r]).into_owned());
        bail!("{what} of rank {rank} is {theirs}, that of rank 0 {first}; it must be the same");
    }

    /// The communicator of ranks on CPUs.
    pub fn on_cpu(&mut self) -> Result<Box<dyn Communicator<Cpu>>> {
        Ok(match self.mesh.take() {
            Some(mesh) => Box::new(HostCommunicator::new(mesh)?),
            None => Box::new(Alone),
        })
    }

    /// The communicator of ranks on GPUs.
    pub fn on_cuda(
        &mut self,
        driver: &Rc<Driver>,
    ) -> anyhow::Result<Box<dyn Communicator<Cuda<Driver>>>> {
        Ok(match self.mesh.take() {
            Some(mesh) => Box::new(NcclCommunicator::new(driver, mesh).context("--device cuda")?),
            None => Box::new(Alone),
        })
    }
}
