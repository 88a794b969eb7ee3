//! What the device can do at best, measured.

use super::Cuda;
use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use std::time::Instant;

const THREADS: usize = super::abi::PEAK_THREADS;

impl<L: Launcher> Cuda<L> {
    /// Bytes a second that the device reads from its memory: the best of several passes over
    /// `bytes`, much more than its L2 holds.
    pub fn read_bandwidth(&self, bytes: usize, passes: usize) -> Result<f64> {
        let data = Memory::zeroed(&self.launcher, bytes)?;
        let out = Memory::zeroed(&self.launcher, 4)?;
        let blocks = 8 * self.launcher.limits().processors as usize;
        self.best(passes, bytes as f64, &out, || {
            let args = Args::new().with(out.at).with(data.at).with((bytes / 16) as u32);
            self.launch("peak_read", [blocks, 1, 1], THREADS as u32, 0, args)
        })
    }

    /// FLOP/s of the tensor cores in the 16-bit type, from registers, by the instructions of every
    /// GPU since Ampere.
    pub fn peak(&self, steps: u32, passes: usize) -> Result<f64> {
        let blocks = 4 * self.launcher.limits().processors as usize;
        let out = Memory::zeroed(&self.launcher, blocks * THREADS * 4)?;
        let flops = blocks as f64 * (THREADS / 32) as f64 * 8.0 * steps as f64 * 4096.0;
        self.best(passes, flops, &out, || {
            let args = Args::new().with(out.at).with(steps);
            self.launch(
                &format!("peak_mma_{}", self.suffix()),
                [blocks, 1, 1],
                THREADS as u32,
                0,
                args,
            )
        })
    }

    /// Seconds of the device's own time that one of `calls` calls of `work` takes, by its clock;
    /// the best of three runs. Calls that only launch are captured as a graph, so that the host's
    /// time does not count.
    pub fn seconds(&self, calls: usize, work: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64> {
        let mut all = || {
            (0..calls).try_for_each(&mut *work)?;
            self.check()
        };
        all()?; // buffers have their sizes after this
        let graph = self
            .launcher
            .capture(&mut all, true)
            .or_else(|_| self.launcher.capture(&mut all, false));
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let seconds = match &graph {
                Ok(r) => self.launcher.timed(&mut || self.launcher.replay(r))?,
                Err(_) => self.launcher.timed(&mut all)?,
            };
            best = best.min(seconds);
        }
        Ok(best / calls as f64)
    }

    /// `amount` a second at the best of several launches, each of which is waited for.
    fn best(
        &self,
        passes: usize,
        amount: f64,
        out: &Memory<L>,
        launch: impl Fn() -> Result<()>,
    ) -> Result<f64> {
        let mut word = [0; 4];
        launch()?;
        self.launcher.read(out.at, &mut word)?;
        let mut best = 0f64;
        for _ in 0..passes {
            let started = Instant::now();
            launch()?;
            self.launcher.read(out.at, &mut word)?;
            best = best.max(amount / started.elapsed().as_secs_f64());
        }
        Ok(best)
    }
}
