//! The head, and choosing tokens.

use super::linear::{HEAD_ROWS, head_blocks};
use super::{Buffer, Cuda, Matrix};
use crate::device::{Args, Launcher, Memory};
use crate::engine::{Chosen, SampleRow, Sampling, choose};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};

/// As in `kernels/sampling.cu`.
const MERGE_THREADS: u32 = 256;
/// Bytes of a `Partial`.
const PARTIAL: usize = 20;

/// Memory of the steps that follow the layers, kept from pass to pass.
pub(super) struct Scratch<L: Launcher> {
    pub rows: Option<Memory<L>>,
    logits: Option<Memory<L>>,
    choices: Option<Memory<L>>,
    seen: Option<Memory<L>>,
    partials: Option<Memory<L>>,
    chosen: Option<Memory<L>>,
}

impl<L: Launcher> Default for Scratch<L> {
    fn default() -> Self {
        Scratch { rows: None, logits: None, choices: None, seen: None, partials: None, chosen: None }
    }
}

/// `Choice` of `kernels/include/choice.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Choice {
    row: u32,
    inverse_temperature: f32,
    penalty: f32,
    seen_start: u32,
    seen_count: u32,
    seed_low: u32,
    seed_high: u32,
    candidate: u32,
    position: u32,
    unused: [u32; 3],
}

/// `Choices` of `kernels/include/choice.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Choices {
    list: u64,
    seen: u64,
    partials: u64,
    count: u32,
    blocks: u32,
}

/// Whether a choice looks at all logits at once.
fn filtered(s: &Sampling, vocabulary: usize) -> bool {
    s.temperature > 0.0 && ((s.top_k > 0 && s.top_k < vocabulary) || s.top_p < 1.0 || s.min_p > 0.0)
}

impl<L: Launcher> Cuda<L> {
    /// Products of all rows of `x` with the head, on the host.
    pub(super) fn head_logits(&self, x: &Buffer<L>, head: &Matrix<L>, out: &mut Vec<f32>) -> Result<()> {
        let mut scratch = self.scratch.borrow_mut();
        out.resize(x.rows * head.rows, 0.0);
        for (part, out) in out.chunks_mut(HEAD_ROWS * head.rows).enumerate() {
            let rows = part * HEAD_ROWS..part * HEAD_ROWS + out.len() / head.rows;
            self.grow(&mut scratch.logits, out.len() * 4)?;
            let at = scratch.logits.as_ref().map_or(0, |m| m.at);
            self.head("head_logits", x, rows, head, |args| args.with(at))?;
            self.launcher.read(at, bytemuck::cast_slice_mut(out))?;
        }
        Ok(())
    }

    /// See [`crate::ops::Backend::sample`]. Choices over the whole vocabulary are made where the products are; those by rank or
    /// probability (top-k, top-p, min-p) on the host.
    pub(super) fn choose(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        rows: &[(usize, &SampleRow)],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>> {
        let mut chosen = vec![Chosen::default(); rows.len()];
        let (on_host, fused): (Vec<usize>, Vec<usize>) =
            (0..rows.len()).partition(|i| filtered(rows[*i].1.sampling, head.rows));
        for first in (0..x.rows).step_by(HEAD_ROWS) {
            let range = first..(first + HEAD_ROWS).min(x.rows);
            let part: Vec<usize> = fused.iter().copied().filter(|i| range.contains(&rows[*i].0)).collect();
            if !part.is_empty() {
                self.choose_fused(x, head, range, rows, &part, &mut chosen)?;
            }
        }
        if !on_host.is_empty() {
            self.head_logits(x, head, logits)?;
            for i in on_host {
                let (row, choice) = rows[i];
                let logits = &mut logits[row * head.rows..(row + 1) * head.rows];
                let most = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
                let sum: f64 = logits.iter().map(|v| ((v - most) as f64).exp()).sum();
                chosen[i] = choose(logits, most + sum.ln() as f32, choice);
            }
        }
        Ok(chosen)
    }

    fn choose_fused(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        range: std::ops::Range<usize>,
        rows: &[(usize, &SampleRow)],
        part: &[usize],
        chosen: &mut [Chosen],
    ) -> Result<()> {
        let mut seen: Vec<u32> = Vec::new();
        let list: Vec<Choice> = part
            .iter()
            .map(|&i| {
                let (row, r) = rows[i];
                let s = r.sampling;
                let start = seen.len();
                if s.repetition_penalty != 1.0 {
                    seen.extend_from_slice(r.seen);
                    seen[start..].sort_unstable();
                }
                let count = seen.len() - start;
                seen.push(u32::MAX); // ends the list for the kernel's search
                Choice {
                    row: (row - range.start) as u32,
                    inverse_temperature: if s.temperature > 0.0 { 1.0 / s.temperature } else { 0.0 },
                    penalty: s.repetition_penalty,
                    seen_start: start as u32,
                    seen_count: count as u32,
                    seed_low: s.seed as u32,
                    seed_high: (s.seed >> 32) as u32,
                    candidate: r.candidate,
                    position: r.position,
                    unused: [0; 3],
                }
            })
            .collect();
        let blocks = head_blocks(head.rows);
        let mut scratch = self.scratch.borrow_mut();
        let send = |memory: &mut Option<Memory<L>>, bytes: &[u8]| -> Result<u64> {
            self.grow(memory, bytes.len())?;
            let at = memory.as_ref().map_or(0, |m| m.at);
            self.launcher.write(at, bytes)?;
            Ok(at)
        };
        let choices = Choices {
            list: send(&mut scratch.choices, bytemuck::cast_slice(&list))?,
            seen: send(&mut scratch.seen, bytemuck::cast_slice(&seen))?,
            partials: {
                self.grow(&mut scratch.partials, list.len() * blocks * PARTIAL)?;
                scratch.partials.as_ref().map_or(0, |m| m.at)
            },
            count: list.len() as u32,
            blocks: blocks as u32,
        };
        self.head("head_choice", x, range, head, |args| args.with(choices))?;
        self.grow(&mut scratch.chosen, list.len() * 8)?;
        let at = scratch.chosen.as_ref().map_or(0, |m| m.at);
        let shared = MERGE_THREADS as usize / 32 * PARTIAL;
        self.launch("merge_choices", [list.len(), 1, 1], MERGE_THREADS, shared, Args::new().with(choices).with(at))?;
        let mut results = vec![[0u32; 2]; list.len()];
        self.launcher.read(at, bytemuck::cast_slice_mut(&mut results))?;
        for (&i, [token, logprob]) in part.iter().zip(results) {
            chosen[i] = Chosen { token, logprob: f32::from_bits(logprob) };
        }
        Ok(())
    }
}
