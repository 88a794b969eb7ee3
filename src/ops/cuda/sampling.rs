//! The head, and choosing tokens.

use super::linear::{HEAD_ROWS, head_blocks};
use super::{Buffer, Cuda, Matrix, Sent};
use crate::device::{Args, Launcher, Memory};
use crate::engine::{Chosen, SampleRow, choose, log_sum_exp};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// As in `kernels/sampling.cu`.
const MERGE_THREADS: u32 = 256;
/// As in `kernels/sampling_filtered.cu`: threads, shared memory before the bits of seen tokens, the largest top-k (half of the
/// list there), and the token of a choice that was not made.
const LISTED_THREADS: u32 = 512;
const LISTED_SHARED: usize = 2048 * 16 + 16 * 256 * 4 + 16 * 8 + 16 * PARTIAL + 8 + 16;
const MOST_LISTED: usize = 1024;
const TOO_MANY: u32 = 0xffff_fffe;
/// Bytes of a `Partial`.
const PARTIAL: usize = 20;

/// Memory of the steps that follow the layers, kept from pass to pass.
pub(super) struct Scratch<L: Launcher> {
    pub rows: Sent<L>,
    choices: Sent<L>,
    changes: Sent<L>,
    logits: Option<Memory<L>>,
    partials: Option<Memory<L>>,
    chosen: Option<Memory<L>>,
}

impl<L: Launcher> Default for Scratch<L> {
    fn default() -> Self {
        let (rows, choices, changes) = Default::default();
        Scratch { rows, choices, changes, logits: None, partials: None, chosen: None }
    }
}

/// `Choice` of `kernels/include/choice.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Choice {
    row: u32,
    inverse_temperature: f32,
    penalty: f32,
    changes_start: u32,
    changes_count: u32,
    forced: u32,
    seed_low: u32,
    seed_high: u32,
    candidate: u32,
    position: u32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
}

/// `Choices` of `kernels/include/choice.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Choices {
    list: u64,
    changes: u64,
    partials: u64,
    count: u32,
    blocks: u32,
}

/// `Change` of `kernels/include/choice.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Change {
    token: u32,
    bias: f32,
}

/// Marks a token that the penalty counts; and ends a list, or stands for no token.
const SEEN: u32 = 0x8000_0000;
const NONE: u32 = u32::MAX;

/// Where a choice is made.
enum Way {
    /// With the head's products.
    Fused,
    /// From logits in device memory.
    Listed,
    Host,
}

impl Way {
    fn of(row: &SampleRow, vocabulary: usize) -> Way {
        let s = row.sampling;
        let top_k = s.top_k > 0 && s.top_k < vocabulary;
        if row.top > MOST_LISTED {
            Way::Host
        } else if row.forced.is_some() || s.temperature <= 0.0 || !(top_k || s.top_p < 1.0 || s.min_p > 0.0) {
            Way::Fused
        } else if top_k && s.top_k > MOST_LISTED {
            Way::Host
        } else {
            Way::Listed
        }
    }
}

/// Tokens whose logits a choice changes, in order, each once.
fn changed(row: &SampleRow) -> Vec<Change> {
    let mut list: Vec<Change> = row.bias.iter().map(|&(token, bias)| Change { token, bias }).collect();
    if row.sampling.repetition_penalty != 1.0 {
        list.extend(row.seen.iter().map(|&token| Change { token: token | SEEN, bias: 0.0 }));
    }
    // a seen token comes after its bias, and takes it over
    list.sort_unstable_by_key(|c| (c.token & !SEEN, c.token));
    list.dedup_by(|next, kept| {
        let same = next.token & !SEEN == kept.token & !SEEN;
        if same {
            *kept = Change { token: next.token | kept.token, bias: next.bias + kept.bias };
        }
        same
    });
    list
}

impl<L: Launcher> Cuda<L> {
    /// Products of all rows of `x` with the head, on the host.
    pub(super) fn head_logits(&self, x: &Buffer<L>, head: &Matrix<L>, out: &mut Vec<f32>) -> Result<()> {
        let mut scratch = self.scratch.borrow_mut();
        out.resize(x.rows * head.rows, 0.0);
        for (part, out) in out.chunks_mut(HEAD_ROWS * head.rows).enumerate() {
            let rows = part * HEAD_ROWS..part * HEAD_ROWS + out.len() / head.rows;
            let at = self.place(&mut scratch.logits, out.len() * 4)?;
            self.head("head_logits", x, rows, head, |args| args.with(at))?;
            self.launcher.read(at, bytemuck::cast_slice_mut(out))?;
        }
        Ok(())
    }

    /// See [`crate::ops::Backend::sample`]. Choices over the whole vocabulary are made where the products are; those by rank
    /// or probability, and lists of likely tokens, from logits in device memory; what is rare (a top-k above 1024, or a top-p that
    /// more tokens take to reach) on the host.
    pub(super) fn choose(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        rows: &[(usize, &SampleRow)],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>> {
        let mut chosen = vec![Chosen::default(); rows.len()];
        let mut on_host = Vec::new();
        for first in (0..x.rows).step_by(HEAD_ROWS) {
            let range = first..(first + HEAD_ROWS).min(x.rows);
            let here = |i: &usize| range.contains(&rows[*i].0);
            let ways = (0..rows.len()).filter(here).map(|i| (i, Way::of(rows[i].1, head.rows)));
            let (mut fused, mut listed) = (Vec::new(), Vec::new());
            for (i, way) in ways {
                match way {
                    Way::Fused => fused.push(i),
                    Way::Listed => listed.push(i),
                    Way::Host => on_host.push(i),
                }
            }
            if !fused.is_empty() {
                self.choose_fused(x, head, range.clone(), rows, &fused, &mut chosen)?;
            }
            let topped: Vec<usize> = fused.iter().chain(&listed).copied().filter(|&i| rows[i].1.top > 0).collect();
            if !listed.is_empty() || !topped.is_empty() {
                let mut scratch = self.scratch.borrow_mut();
                let logits = self.place(&mut scratch.logits, range.len() * head.rows * 4)?;
                self.head("head_logits", x, range.clone(), head, |args| args.with(logits))?;
                on_host.extend(self.choose_listed(&mut scratch, head, range.start, rows, &listed, &mut chosen)?);
                on_host.extend(self.list_top(&mut scratch, head, range.start, rows, &topped, &mut chosen)?);
            }
        }
        on_host.sort_unstable();
        on_host.dedup();
        if !on_host.is_empty() {
            self.head_logits(x, head, logits)?;
            for i in on_host {
                let (row, choice) = rows[i];
                let logits = &mut logits[row * head.rows..(row + 1) * head.rows];
                let lse = log_sum_exp(logits);
                chosen[i] = choose(logits, lse, choice);
            }
        }
        Ok(chosen)
    }

    /// Chooses from the logits in scratch memory; returns what the host has to choose.
    fn choose_listed(
        &self,
        scratch: &mut Scratch<L>,
        head: &Matrix<L>,
        first_row: usize,
        rows: &[(usize, &SampleRow)],
        part: &[usize],
        chosen: &mut [Chosen],
    ) -> Result<Vec<usize>> {
        if part.is_empty() {
            return Ok(vec![]);
        }
        let (list, changes) = self.send_choices(scratch, first_row, rows, part)?;
        let logits = scratch.logits.as_ref().map_or(0, |m| m.at);
        let out = self.place(&mut scratch.chosen, part.len() * 8)?;
        let args = Args::new().with(out).with(logits).with(list).with(changes).with(head.rows as u32);
        let shared = LISTED_SHARED + head.rows.div_ceil(32) * 4;
        self.launch("choose_filtered", [part.len(), 1, 1], LISTED_THREADS, shared, args)?;
        self.receive(out, part, chosen)
    }

    /// Lists the likeliest tokens from the logits in scratch memory; returns what the host has to list.
    fn list_top(
        &self,
        scratch: &mut Scratch<L>,
        head: &Matrix<L>,
        first_row: usize,
        rows: &[(usize, &SampleRow)],
        part: &[usize],
        chosen: &mut [Chosen],
    ) -> Result<Vec<usize>> {
        // `Top` of the kernel
        let wanted = |&i: &usize| [(rows[i].0 - first_row) as u32, rows[i].1.top.min(head.rows) as u32];
        let tops: Vec<[u32; 2]> = part.iter().map(wanted).collect();
        let Some(most) = tops.iter().map(|t| t[1] as usize).max() else { return Ok(vec![]) };
        let list = self.send(&mut scratch.choices, bytemuck::cast_slice(&tops))?;
        let logits = scratch.logits.as_ref().map_or(0, |m| m.at);
        let out = self.place(&mut scratch.chosen, part.len() * most * 8)?;
        let args = Args::new().with(out).with(logits).with(list).with(most as u32).with(head.rows as u32);
        self.launch("list_top", [part.len(), 1, 1], LISTED_THREADS, LISTED_SHARED, args)?;
        let mut results = vec![[0u32; 2]; part.len() * most];
        self.launcher.read(out, bytemuck::cast_slice_mut(&mut results))?;
        let mut left = Vec::new();
        for ((&i, top), results) in part.iter().zip(&tops).zip(results.chunks_exact(most)) {
            let results = &results[..top[1] as usize];
            if results.iter().any(|r| r[0] == TOO_MANY) {
                left.push(i);
            }
            chosen[i].top = results.iter().map(|r| (r[0], f32::from_bits(r[1]))).collect();
        }
        Ok(left)
    }

    /// Reads tokens and log-probabilities; returns the choices that were not made.
    fn receive(&self, at: u64, part: &[usize], chosen: &mut [Chosen]) -> Result<Vec<usize>> {
        let mut results = vec![[0u32; 2]; part.len()];
        self.launcher.read(at, bytemuck::cast_slice_mut(&mut results))?;
        let mut left = Vec::new();
        for (&i, [token, logprob]) in part.iter().zip(results) {
            chosen[i] = Chosen { token, logprob: f32::from_bits(logprob), ..Chosen::default() };
            if token == TOO_MANY {
                left.push(i);
            }
        }
        Ok(left)
    }

    /// Writes the choices and the tokens whose logits they change to the device.
    fn send_choices(
        &self,
        scratch: &mut Scratch<L>,
        first_row: usize,
        rows: &[(usize, &SampleRow)],
        part: &[usize],
    ) -> Result<(u64, u64)> {
        let mut changes: Vec<Change> = Vec::new();
        let list: Vec<Choice> = part
            .iter()
            .map(|&i| {
                let (row, r) = rows[i];
                let s = r.sampling;
                let start = changes.len();
                changes.extend(changed(r));
                let count = changes.len() - start;
                changes.push(Change { token: NONE, bias: 0.0 }); // ends the list for the kernel's search
                Choice {
                    row: (row - first_row) as u32,
                    inverse_temperature: if s.temperature > 0.0 { 1.0 / s.temperature } else { 0.0 },
                    penalty: s.repetition_penalty,
                    changes_start: start as u32,
                    changes_count: count as u32,
                    forced: r.forced.unwrap_or(NONE),
                    seed_low: s.seed as u32,
                    seed_high: (s.seed >> 32) as u32,
                    candidate: r.candidate,
                    position: r.position,
                    top_k: s.top_k as u32,
                    top_p: s.top_p,
                    min_p: s.min_p,
                }
            })
            .collect();
        let list = self.send(&mut scratch.choices, bytemuck::cast_slice(&list))?;
        Ok((list, self.send(&mut scratch.changes, bytemuck::cast_slice(&changes))?))
    }

    fn choose_fused(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        range: Range<usize>,
        rows: &[(usize, &SampleRow)],
        part: &[usize],
        chosen: &mut [Chosen],
    ) -> Result<()> {
        let blocks = head_blocks(head.rows);
        let mut scratch = self.scratch.borrow_mut();
        let (list, changes) = self.send_choices(&mut scratch, range.start, rows, part)?;
        let partials = self.place(&mut scratch.partials, part.len() * blocks * PARTIAL)?;
        let choices = Choices { list, changes, partials, count: part.len() as u32, blocks: blocks as u32 };
        self.head("head_choice", x, range, head, |args| args.with(choices))?;
        let at = self.place(&mut scratch.chosen, part.len() * 8)?;
        let shared = MERGE_THREADS as usize / 32 * PARTIAL;
        self.launch("merge_choices", [part.len(), 1, 1], MERGE_THREADS, shared, Args::new().with(choices).with(at))?;
        self.receive(at, part, chosen)?;
        Ok(())
    }
}
