//! What the machine can do, measured in the same run as whatever is compared with it.

use crate::device::Launcher;
use crate::device::cuda::Driver;
use crate::error::{Error, Result};
use crate::memory;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::simd::Isa;
use crate::ops::cuda::{Comparison, Cuda};
use crate::simd_fn;
use crate::tensor::{Bytes, DType, Elements};
use std::hint::black_box;
use std::time::Instant;

/// A device and its limits.
pub trait Machine {
    /// Its name, and the instruction set or architecture in use.
    fn describe(&self) -> (String, String);
    /// Threads, or multiprocessors.
    fn threads(&self) -> usize;
    /// What measuring the bandwidth needs.
    type Probe;
    /// Prepares for measuring the bandwidth. It fails if there is no memory for that.
    fn probe(&self) -> Result<Self::Probe>;
    /// Bytes of this process's memory that a probe takes.
    fn probe_bytes(&self, probe: &Self::Probe) -> u64;
    /// Bytes a second read from memory: the best of some passes.
    fn bandwidth(&self, probe: &Self::Probe) -> Result<f64>;
    /// Bytes that the last cache before memory holds, where that is known.
    fn last_cache(&self) -> Option<usize>;
    /// FLOP/s of the GEMMs that weights of this type run on.
    fn peak(&self, dtype: DType) -> Result<f64>;
    /// Seconds that a call of `work` takes, measured over `calls` of them, which get their numbers.
    fn time(&self, calls: usize, work: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64>;
    /// Passes that a GPU has done in two ways, to take the faster one.
    fn comparisons(&self) -> Vec<Comparison> {
        vec![]
    }
}

impl Machine for Cpu {
    fn describe(&self) -> (String, String) {
        (processor(), self.isa().name().to_owned())
    }
    fn threads(&self) -> usize {
        self.threads().count()
    }
    type Probe = Elements<f32>;
    /// In as large pages as weights are.
    fn probe(&self) -> Result<Elements<f32>> {
        let data = Bytes::in_huge_pages(probe_bytes(), |data| data.fill(1))
            .map_err(Error::io("memory", "reserve"))?;
        Ok(Elements::from_bytes(data))
    }
    fn probe_bytes(&self, probe: &Elements<f32>) -> u64 {
        4 * probe.len() as u64
    }
    fn bandwidth(&self, probe: &Elements<f32>) -> Result<f64> {
        Ok(read_bandwidth(self, probe, 2))
    }
    fn last_cache(&self) -> Option<usize> {
        last_cache()
    }
    fn peak(&self, dtype: DType) -> Result<f64> {
        Ok(match dtype {
            DType::Bf16 => peak_bf16(self),
            DType::Int8 => peak_int8(self),
            _ => peak_f32(self),
        })
    }
    /// The median.
    fn time(&self, calls: usize, work: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64> {
        work(0)?;
        let mut timed = |i| {
            let started = Instant::now();
            work(i)?;
            Ok(started.elapsed().as_secs_f64())
        };
        let mut times: Vec<f64> = (0..calls).map(&mut timed).collect::<Result<_>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[calls / 2])
    }
}

impl Machine for Cuda<Driver> {
    fn comparisons(&self) -> Vec<Comparison> {
        self.comparisons()
    }
    fn describe(&self) -> (String, String) {
        let (major, minor) = self.launcher().capability;
        (self.launcher().name.clone(), format!("sm_{major}{minor}"))
    }
    fn threads(&self) -> usize {
        self.launcher().limits().processors as usize
    }
    type Probe = ();
    fn probe(&self) -> Result<()> {
        Ok(())
    }
    fn probe_bytes(&self, _: &()) -> u64 {
        0
    }
    fn bandwidth(&self, _: &()) -> Result<f64> {
        self.read_bandwidth(2 << 30, 20)
    }
    fn last_cache(&self) -> Option<usize> {
        None
    }
    /// Weights of 8 bits are multiplied in 16.
    fn peak(&self, _: DType) -> Result<f64> {
        Cuda::peak(self, 1 << 16, 10)
    }
    fn time(&self, calls: usize, work: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64> {
        self.seconds(calls, work)
    }
}

/// Bytes of a probe: much more than the last cache holds, but no large part of the memory.
pub fn probe_bytes() -> usize {
    let wanted = last_cache().map_or(0, |c| 2 * c).max(1 << 29);
    let max = memory::available().map_or(usize::MAX, |free| free as usize / 8).max(1 << 24);
    wanted.min(max) / 128 * 128
}

/// Bytes of the largest cache of the first processor, where the system tells.
pub fn last_cache() -> Option<usize> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |folder: std::path::PathBuf| {
        let text = std::fs::read_to_string(folder.join("size")).ok()?;
        let text = text.trim();
        let (digits, unit) =
            text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = match unit {
            "" => 1,
            "K" => 1 << 10,
            "M" => 1 << 20,
            "G" => 1 << 30,
            _ => return None,
        };
        digits.parse::<usize>().ok()?.checked_mul(unit)
    };
    caches.flatten().filter_map(|entry| size(entry.path())).max()
}

/// Bytes a second that all threads together read from memory: the best of several passes over
/// `data`.
fn read_bandwidth(cpu: &Cpu, data: &[f32], passes: usize) -> f64 {
    let mut best = 0f64;
    for _ in 0..passes {
        let started = Instant::now();
        // chunks as large as a task of a GEMM
        cpu.threads().run_ranges(data.len(), 1 << 16, |r| {
            black_box(sum(cpu.isa(), &data[r]));
        });
        best = best.max(size_of_val(data) as f64 / started.elapsed().as_secs_f64());
    }
    best
}

simd_fn! {
    fn sum<S>(x: &[f32]) -> f32 {
        let mut sums = [S::splat(0.0); 8];
        for i in (0..x.len() / 128 * 128).step_by(128) {
            for (j, s) in sums.iter_mut().enumerate() {
                *s = S::add(*s, S::load(x.as_ptr().add(i + 16 * j)));
            }
        }
        let mut total = 0.0;
        for s in sums {
            total += S::sum(s);
        }
        total
    }
}

/// FLOP/s of f32 multiply-adds on all threads, from registers.
pub fn peak_f32(cpu: &Cpu) -> f64 {
    const STEPS: usize = 2_000_000;
    // 12 sums of 16 lanes
    rate(cpu, (STEPS * 12 * 16 * 2) as f64, |isa| {
        black_box(fma_loop(isa, STEPS, 1.0 + 1e-9));
    })
}

/// Operations a second of the dot products that bf16 weights run on.
pub fn peak_bf16(cpu: &Cpu) -> f64 {
    dot_peak(cpu, DotKind::Bf16)
}

/// Operations a second of the dot products that int8 weights run on.
pub fn peak_int8(cpu: &Cpu) -> f64 {
    dot_peak(cpu, DotKind::Int8)
}

enum DotKind {
    Bf16,
    Int8,
}

fn rate(cpu: &Cpu, operations: f64, body: impl Fn(Isa) + Sync) -> f64 {
    let threads = cpu.threads().count();
    let mut best = 0f64;
    for _ in 0..3 {
        let started = Instant::now();
        cpu.threads().run(threads, |_| body(cpu.isa()));
        best = best.max(operations * threads as f64 / started.elapsed().as_secs_f64());
    }
    best
}

#[cfg(target_arch = "x86_64")]
fn dot_peak(cpu: &Cpu, kind: DotKind) -> f64 {
    use std::arch::x86_64::*;
    const STEPS: usize = 4_000_000;
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16() -> f32 {
        let mut sums = [_mm512_setzero_ps(); 12];
        // SAFETY: same size, every bit pattern is valid.
        let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(black_box(0x3f80_3f80))) };
        for _ in 0..STEPS {
            for s in &mut sums {
                *s = _mm512_dpbf16_ps(*s, x, x);
            }
        }
        sums.iter().map(|s| _mm512_reduce_add_ps(*s)).sum()
    }
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8() -> i32 {
        let mut sums = [_mm512_setzero_si512(); 12];
        let x = _mm512_set1_epi32(black_box(0x0101_0101));
        for _ in 0..STEPS {
            for s in &mut sums {
                *s = _mm512_dpbusd_epi32(*s, x, x);
            }
        }
        sums.iter().fold(0, |a, s| a.wrapping_add(_mm512_reduce_add_epi32(*s)))
    }
    if !cpu.isa().has_bf16() {
        return peak_f32(cpu);
    }
    match kind {
        DotKind::Bf16 => rate(cpu, (STEPS * 12 * 32 * 2) as f64, |_| {
            // SAFETY: the instruction set was checked above.
            black_box(unsafe { bf16() });
        }),
        DotKind::Int8 => rate(cpu, (STEPS * 12 * 64 * 2) as f64, |_| {
            // SAFETY: the instruction set was checked above.
            black_box(unsafe { int8() });
        }),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn dot_peak(cpu: &Cpu, _: DotKind) -> f64 {
    peak_f32(cpu)
}

simd_fn! {
    fn fma_loop<S>(steps: usize, factor: f32) -> f32 {
        let mut sums = [S::splat(0.0); 12];
        let x = S::splat(black_box(factor));
        for _ in 0..steps {
            for s in &mut sums {
                *s = S::fma(x, x, *s);
            }
        }
        let mut total = 0.0;
        for s in sums {
            total += S::sum(s);
        }
        total
    }
}

/// The maximum memory that this process has held, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Name of the processor, where the system tells.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |n| n.1.to_owned())
}
