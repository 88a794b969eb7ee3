//! What memory a piece of work will take, and whether there is as much: known beforehand, because a
//! system that runs out of memory ends the program without a word.

use crate::error::{Error, Result};
use std::path::Path;

/// The memory that a piece of work will take, part by part, in bytes. Sizes are f64, so that no
/// product of sizes overflows.
#[derive(Clone, Debug, Default)]
pub struct MemoryPlan {
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
struct Part {
    what: &'static str,
    bytes: f64,
    /// What makes it smaller.
    flags: &'static str,
}

impl MemoryPlan {
    /// A plan without parts.
    pub fn new() -> MemoryPlan {
        MemoryPlan::default()
    }

    /// Adds a part of so many bytes, and the flags that a user can lower for it.
    pub fn with(mut self, what: &'static str, bytes: f64, flags: &'static str) -> MemoryPlan {
        self.parts.push(Part { what, bytes, flags });
        self
    }

    /// The sum of all parts, in bytes.
    pub fn bytes(&self) -> f64 {
        self.parts.iter().map(|p| p.bytes).sum()
    }

    /// Fails if this machine has not so much memory left for this process.
    pub fn check(&self) -> Result<()> {
        available().map_or(Ok(()), |available| self.check_against(available))
    }

    /// [`MemoryPlan::check`] with `available` bytes.
    pub fn check_against(&self, available: u64) -> Result<()> {
        let needed = self.bytes();
        if needed <= available as f64 {
            return Ok(());
        }
        let mut parts: Vec<&Part> = self.parts.iter().collect();
        parts.sort_by(|a, b| b.bytes.total_cmp(&a.bytes));
        let list: Vec<String> =
            parts.iter().map(|p| format!("{} {}", p.what, size(p.bytes))).collect();
        let remedy = parts.first().map_or(String::new(), |p| format!("lower {}", p.flags));
        Err(Error::OutOfMemory {
            needed: size(needed),
            parts: list.join(", "),
            available: size(available as f64),
            remedy,
        })
    }
}

impl std::fmt::Display for MemoryPlan {
    /// The parts in their order.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<String> =
            self.parts.iter().map(|p| format!("{} {}", p.what, size(p.bytes))).collect();
        f.write_str(&parts.join(", "))
    }
}

/// Bytes in a unit that people read.
fn size(bytes: f64) -> String {
    let units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
    let mut unit = 0;
    let mut value = bytes;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if value >= 1e6 {
        format!("{value:.1e} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Bytes that this process can still take: what the machine has free, what its control groups allow
/// and what its limit of addresses leaves, where the system tells.
pub fn available() -> Option<u64> {
    [machine(), control_groups(), addresses()].into_iter().flatten().min()
}

/// Free memory, and caches that the system gives up.
fn machine() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// The number of a line such as `MemAvailable:  22604072 kB`, in bytes.
fn kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What the tightest control group leaves, of both versions.
fn control_groups() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least: Option<u64> = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (root, limit, usage) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        // a container sees its own group as the root, so the folders of the path may not be there
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            let folder = Path::new(root).join(folder);
            let number = |name: &str| {
                std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok()
            };
            let (Some(limit), Some(usage)) = (number(limit), number(usage)) else { continue };
            let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
            let reclaimable: u64 = stat
                .lines()
                .filter_map(|l| {
                    l.strip_prefix("active_file ").or_else(|| l.strip_prefix("inactive_file "))
                })
                .filter_map(|n| n.trim().parse::<u64>().ok())
                .sum();
            let left = limit.saturating_sub(usage.saturating_sub(reclaimable));
            least = Some(least.map_or(left, |l| l.min(left)));
        }
    }
    least
}

/// What `ulimit -v` leaves.
#[cfg(target_os = "linux")]
fn addresses() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is ours, and all of it is written.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    if read != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    let used = kilobytes("/proc/self/status", "VmSize:")?;
    Some(limit.rlim_cur.saturating_sub(used))
}

#[cfg(not(target_os = "linux"))]
fn addresses() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_beyond_the_memory_names_its_parts_the_limit_and_the_flag_of_the_largest() {
        let plan = MemoryPlan::new().with("weights", 2e9, "--shape").with(
            "KV cache",
            1.5e12,
            "--batch or --context",
        );
        assert!(plan.check_against(1_600_000_000_000).is_ok());
        let e = plan.check_against(24_000_000_000).unwrap_err();
        assert!(matches!(e, Error::OutOfMemory { .. }));
        assert_eq!(plan.to_string(), "weights 2.0 GB, KV cache 1.5 TB");
        assert_eq!(
            e.to_string(),
            "needs 1.5 TB of memory (KV cache 1.5 TB, weights 2.0 GB), but 24.0 GB are left here; \
            lower --batch or --context"
        );
        let absurd = MemoryPlan::new()
            .with("KV cache", 1e30, "--batch")
            .check_against(u64::MAX)
            .unwrap_err();
        assert!(absurd.to_string().contains("1.0e15 PB"), "{absurd}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_tells_what_it_has() {
        let left = available().unwrap();
        assert!(left > 1 << 20 && left < 1 << 50, "{left}");
    }
}
