//! Weights moved to memory in huge pages, whose addresses miss the TLB far less.

use super::Cpu;
use super::threads::Disjoint;
use crate::tensor::Bytes;
use std::cell::RefCell;
use std::sync::Arc;

/// Minimum bytes of a task, after which mapped pages are released.
const TASK: usize = 4 << 20;

thread_local! {
    /// A part before it is written over.
    static BEFORE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Moves `bytes` to memory in huge pages, where `write` puts them part by part, each of `part`
/// bytes (the last one may have fewer); it gets a part's place among the bytes, the part, and where
/// to. They never take memory twice: of a mapped file, pages are released on the way; what is in
/// such memory already and nobody else's is written over.
pub fn into_huge_pages(
    cpu: &Cpu,
    bytes: Bytes,
    part: usize,
    write: impl Fn(usize, &[u8], &mut [u8]) + Sync,
) -> std::io::Result<Bytes> {
    let len = bytes.len();
    let task = part * TASK.div_ceil(part);
    let ranges = |i: usize| i * task..((i + 1) * task).min(len);
    let shared = match bytes {
        Bytes::HugePages(map, range) if range == (0..map.len()) => match Arc::try_unwrap(map) {
            Ok(map) => {
                let mut map = map.make_mut()?;
                let out = Disjoint::new(&mut map[..]);
                cpu.threads.run(len.div_ceil(task), |i| {
                    BEFORE.with_borrow_mut(|before| {
                        // SAFETY: every task has its own range.
                        for (n, to) in unsafe { out.slice(ranges(i)) }.chunks_mut(part).enumerate()
                        {
                            before.clear();
                            before.extend_from_slice(to);
                            write(i * task + n * part, before, to);
                        }
                    });
                });
                return Ok(Bytes::HugePages(Arc::new(map.make_read_only()?), range));
            }
            Err(map) => Bytes::HugePages(map, range),
        },
        other => other,
    };
    Bytes::in_huge_pages(len, |out| {
        let out = Disjoint::new(out);
        cpu.threads.run(len.div_ceil(task), |i| {
            let range = ranges(i);
            // SAFETY: every task has its own range.
            let to = unsafe { out.slice(range.clone()) };
            for (n, (from, to)) in
                shared[range.clone()].chunks(part).zip(to.chunks_mut(part)).enumerate()
            {
                write(i * task + n * part, from, to);
            }
            shared.release_pages(range);
        });
    })
}
