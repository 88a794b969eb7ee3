//! Embedding for training.

use super::Cpu;
use super::threads::Disjoint;
use super::train::COLUMNS;

/// Rows of `table` for each id.
pub(super) fn embed(cpu: &Cpu, ids: &[u32], table: &[f32], out: &mut [f32]) {
    let h = out.len() / ids.len().max(1);
    let out = Disjoint::new(out);
    cpu.threads.run_ranges(ids.len(), 64, |r| {
        for t in r {
            let from = ids[t] as usize * h;
            // SAFETY: every token's row is written once.
            unsafe { out.slice(t * h..(t + 1) * h) }.copy_from_slice(&table[from..from + h]);
        }
    });
}

/// Adds each token's gradient to its row of the table's gradient.
pub(super) fn embed_backward(cpu: &Cpu, ids: &[u32], dx: &[f32], dtable: &mut [f32]) {
    let h = dx.len() / ids.len().max(1);
    let out = Disjoint::new(dtable);
    cpu.threads.run(h.div_ceil(COLUMNS), |c| {
        let columns = c * COLUMNS..((c + 1) * COLUMNS).min(h);
        for (t, &id) in ids.iter().enumerate() {
            let row = id as usize * h;
            // SAFETY: every column is written by one task.
            let to = unsafe { out.slice(row + columns.start..row + columns.end) };
            for (a, b) in to.iter_mut().zip(&dx[t * h + columns.start..t * h + columns.end]) {
                *a += b;
            }
        }
    });
}
