//! The minimum time that a piece of work can take, from what the machine reaches right before and
//! after it.

use super::machine::Machine;
use crate::error::Result;
use crate::tensor::DType;
use serde::Serialize;

/// What a machine reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Peaks {
    /// Bytes a second read from memory, over 1e9.
    pub read_gigabytes_per_second: f64,
    /// FLOP/s of the GEMMs that weights of the type run on, over 1e9.
    pub peak_gigaflops: f64,
}

impl Peaks {
    /// The better of two measurements: what neighbours take away must not flatter a fraction.
    pub fn best(self, other: Peaks) -> Peaks {
        Peaks {
            read_gigabytes_per_second: self
                .read_gigabytes_per_second
                .max(other.read_gigabytes_per_second),
            peak_gigaflops: self.peak_gigaflops.max(other.peak_gigaflops),
        }
    }
}

/// Measures a machine around each figure: what it reaches changes from one minute to the next.
pub struct Gauge<'a, M: Machine> {
    machine: &'a M,
    probe: M::Probe,
    dtype: DType,
    /// The best so far.
    pub best: Peaks,
}

impl<'a, M: Machine> Gauge<'a, M> {
    /// For GEMMs with weights held in `dtype`.
    pub fn new(machine: &'a M, dtype: DType) -> Result<Gauge<'a, M>> {
        let mut gauge = Gauge { machine, probe: machine.probe()?, dtype, best: Peaks::default() };
        gauge.measure()?; // brings threads and memory up to speed
        Ok(gauge)
    }

    /// Measures what the machine reaches now, and keeps the best in [`Gauge::best`].
    pub fn measure(&mut self) -> Result<Peaks> {
        let peaks = Peaks {
            read_gigabytes_per_second: self.machine.bandwidth(&self.probe)? / 1e9,
            peak_gigaflops: self.machine.peak(self.dtype)? / 1e9,
        };
        self.best = self.best.best(peaks);
        Ok(peaks)
    }

    /// Bytes of this process's memory that measuring takes.
    pub fn probe_bytes(&self) -> u64 {
        self.machine.probe_bytes(&self.probe)
    }

    /// Does some work; returns its result, and the best of what the machine reached right before
    /// and after it.
    pub fn around<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<(T, Peaks)> {
        let before = self.measure()?;
        let done = work()?;
        Ok((done, before.best(self.measure()?)))
    }
}

/// What some work has to do at least.
#[derive(Clone, Copy, Debug)]
pub struct MinimumWork {
    /// Read from and written to memory at least once.
    pub bytes: f64,
    /// Multiply-adds counted twice.
    pub flops: f64,
    /// All that it goes through again and again: less than the last cache holds may never come from
    /// memory.
    pub working_set: f64,
}

/// What sets the floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Bytes over the bandwidth of memory.
    Memory,
    /// FLOPs over the peak.
    Compute,
    /// Memory would, but all of it fits into the last cache: the floor says nothing, and there is
    /// no fraction.
    Cache,
    /// Faster than a floor: the machine reached more during the work than right before and after.
    Beyond,
}

/// A time compared with its floor.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Compared {
    /// What sets the floor.
    pub bound: Bound,
    /// The longer of bytes over bandwidth and FLOPs over peak, in seconds.
    #[serde(skip)]
    pub floor: f64,
    /// Floor over time; none where the work's bytes come from a cache.
    pub fraction: Option<f64>,
    /// What the machine reached right before and after the work.
    #[serde(flatten)]
    pub peaks: Peaks,
}

impl Compared {
    /// `seconds` for work with these floors, on a machine whose last cache holds `cache` bytes, if
    /// that is known.
    pub fn new(seconds: f64, work: MinimumWork, peaks: Peaks, cache: Option<usize>) -> Compared {
        let memory = work.bytes / (1e9 * peaks.read_gigabytes_per_second);
        let compute = work.flops / (1e9 * peaks.peak_gigaflops);
        let floor = memory.max(compute);
        let bound = match () {
            () if memory > compute && cache.is_some_and(|c| work.working_set <= c as f64) => {
                Bound::Cache
            }
            () if floor > seconds => Bound::Beyond,
            () if memory > compute => Bound::Memory,
            () => Bound::Compute,
        };
        Compared {
            bound,
            floor,
            fraction: (bound != Bound::Cache).then_some(floor / seconds),
            peaks,
        }
    }

    /// The fraction as tables show it.
    pub fn shown(&self) -> String {
        match (self.bound, self.fraction) {
            (Bound::Beyond, Some(f)) => format!("{:.0}% (beyond)", 100.0 * f),
            (_, Some(f)) => format!("{:.0}%", 100.0 * f),
            (_, None) => "from cache".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEAKS: Peaks = Peaks { read_gigabytes_per_second: 10.0, peak_gigaflops: 100.0 };

    fn compared(seconds: f64, bytes: f64, flops: f64, working_set: f64) -> Compared {
        Compared::new(
            seconds,
            MinimumWork { bytes, flops, working_set },
            PEAKS,
            Some(1_000_000_000),
        )
    }

    #[test]
    fn no_fraction_above_one_goes_without_a_label() {
        let memory = compared(2.0, 10e9, 1e9, 20e9);
        assert_eq!(
            (memory.bound, memory.fraction, memory.shown().as_str()),
            (Bound::Memory, Some(0.5), "50%")
        );
        let compute = compared(2.0, 1e9, 100e9, 20e9);
        assert_eq!((compute.bound, compute.fraction), (Bound::Compute, Some(0.5)));
        // the cache beats memory: 174 % of nothing
        let cached = compared(0.5, 8.7e9, 1e9, 0.9e9);
        assert_eq!(
            (cached.bound, cached.fraction, cached.shown().as_str()),
            (Bound::Cache, None, "from cache")
        );
        // what computes long enough is bound by that, wherever its bytes are
        assert_eq!(compared(2.0, 0.1e9, 100e9, 0.1e9).bound, Bound::Compute);
        let beyond = compared(0.8, 10e9, 1e9, 20e9);
        assert_eq!((beyond.bound, beyond.shown().as_str()), (Bound::Beyond, "125% (beyond)"));
        let unknown = Compared::new(
            0.8,
            MinimumWork { bytes: 10e9, flops: 0.0, working_set: 1.0 },
            PEAKS,
            None,
        );
        assert_eq!(unknown.bound, Bound::Beyond);
    }

    #[test]
    fn the_best_of_two_measurements_is_taken_in_each_part() {
        let other = Peaks { read_gigabytes_per_second: 12.0, peak_gigaflops: 90.0 };
        assert_eq!(
            PEAKS.best(other),
            Peaks { read_gigabytes_per_second: 12.0, peak_gigaflops: 100.0 }
        );
    }
}
