//! Sampling on the device.

use super::abi::{
    self, ABSENT, LogitChange, SEEN, SamplingArgs, SamplingJob, SoftmaxStats, TOO_MANY, TopRequest,
};
use super::lm_head::{LmHead, moments_blocks};
use super::{CachedUpload, Cuda, DeviceWeight};
use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use crate::ops::cpu::sampling::{log_sum_exp, sample_token};
use crate::ops::sampling::{SampledToken, SamplingRow};
use crate::ops::{Tensor, Weight as _};
use bytemuck::Zeroable;

const MERGE_THREADS: u32 = abi::MERGE_THREADS as u32;
/// Threads, shared memory before the bits of seen tokens, and the largest top-k of choices from a
/// list.
const LISTED_THREADS: u32 = abi::FILTERED_THREADS as u32;
const LISTED_SHARED: usize = abi::FILTERED_SHARED_BYTES;
const MAX_LISTED: usize = abi::FILTERED_MAX_LISTED;
const PARTIAL: usize = size_of::<abi::PartialSample>();

/// Memory of the steps that follow the layers, kept from pass to pass.
pub(super) struct Scratch<L: Launcher> {
    pub rows: CachedUpload<L>,
    choices: CachedUpload<L>,
    changes: CachedUpload<L>,
    logits: Option<Memory<L>>,
    /// Softmax statistics of the logits, for each block of the LM head.
    softmax_stats: Option<Memory<L>>,
    partials: Option<Memory<L>>,
    tops: Option<Memory<L>>,
    /// Results of this step's choices and of the step's before, in turn.
    chosen: [Option<Memory<L>>; 2],
    turn: usize,
}

impl<L: Launcher> Scratch<L> {
    /// Where the last choices are, or 0.
    pub fn last_sampled(&self) -> u64 {
        self.chosen[self.turn].as_ref().map_or(0, |m| m.at)
    }
}

impl<L: Launcher> Default for Scratch<L> {
    fn default() -> Self {
        let (rows, choices, changes) = Default::default();
        Scratch {
            rows,
            choices,
            changes,
            logits: None,
            softmax_stats: None,
            partials: None,
            tops: None,
            chosen: [None, None],
            turn: 0,
        }
    }
}

/// Told of the first row whose logits are in scratch memory, and of the choices from there that
/// want a list of likely tokens.
type Topped<'t, L> = &'t mut dyn FnMut(&mut Scratch<L>, usize, &[usize]) -> Result<()>;

/// Where a token is sampled.
enum SampledBy {
    /// With the LM head's GEMM.
    Fused,
    /// From logits in device memory.
    Listed,
    Host,
}

impl SampledBy {
    fn of(row: &SamplingRow, vocabulary: usize) -> SampledBy {
        let s = row.sampling;
        let top_k = s.top_k > 0 && s.top_k < vocabulary;
        if row.top > MAX_LISTED {
            SampledBy::Host
        } else if row.forced.is_some()
            || s.temperature <= 0.0
            || !(top_k || s.top_p < 1.0 || s.min_p > 0.0)
        {
            SampledBy::Fused
        } else {
            SampledBy::Listed
        }
    }
}

/// Tokens whose logits a choice changes, in order, each once.
fn changed(row: &SamplingRow) -> Vec<LogitChange> {
    let mut list: Vec<LogitChange> =
        row.bias.iter().map(|&(token, bias)| LogitChange { token, bias }).collect();
    if row.sampling.repetition_penalty != 1.0 {
        list.extend(row.seen.iter().map(|&token| LogitChange { token: token | SEEN, bias: 0.0 }));
    }
    // a seen token comes after its bias, and takes it over
    list.sort_unstable_by_key(|c| (c.token & !SEEN, c.token));
    list.dedup_by(|next, kept| {
        let same = next.token & !SEEN == kept.token & !SEEN;
        if same {
            *kept = LogitChange { token: next.token | kept.token, bias: next.bias + kept.bias };
        }
        same
    });
    list
}

impl<L: Launcher> Cuda<L> {
    /// Logits of all rows of `x`, on the host.
    pub(super) fn lm_head_logits(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let mut scratch = self.scratch.borrow_mut();
        out.resize(x.shape()[0] * lm_head.rows(), 0.0);
        let max_rows = self.lm_head_rows();
        for (part, out) in out.chunks_mut(max_rows * lm_head.rows()).enumerate() {
            let rows = part * max_rows..part * max_rows + out.len() / lm_head.rows();
            let at = self.place(&mut scratch.logits, out.len() * 4)?;
            let lm_head_rows = LmHead { x, rows, weight: lm_head };
            self.launch_lm_head("lm_head_logits", lm_head_rows, |args| args.with(at).with(0u64))?;
            self.launcher.read(at, bytemuck::cast_slice_mut(out))?;
        }
        Ok(())
    }

    /// Whether the device makes such a choice by itself.
    pub(super) fn on_device(row: &SamplingRow) -> bool {
        // whatever the vocabulary: a top-k beyond it is no limit, and seldom asked for
        row.top == 0
            && row.forced.is_none()
            && !matches!(SampledBy::of(row, usize::MAX), SampledBy::Host)
    }

    /// See [`crate::ops::DecodeBackend::sample`]. Choices over the whole vocabulary are made where
    /// the GEMM is; those by rank or probability, and lists of likely tokens, from logits in
    /// device memory; lists of more than 1024 likely tokens are the host's.
    pub(super) fn sample_now(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        rows: &[(usize, &SamplingRow)],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<SampledToken>> {
        let mut chosen = vec![SampledToken::default(); rows.len()];
        let mut on_host: Vec<usize> = (0..rows.len())
            .filter(|&i| matches!(SampledBy::of(rows[i].1, lm_head.rows()), SampledBy::Host))
            .collect();
        let at = self.launch_sampling(x, lm_head, rows, &mut |scratch, first_row, part| {
            on_host.extend(self.list_top(
                scratch,
                lm_head,
                (first_row, part),
                rows,
                &mut chosen,
            )?);
            Ok(())
        })?;
        if on_host.len() < rows.len() {
            let mut results = vec![abi::SampledToken::zeroed(); rows.len()];
            self.launcher.read(at, bytemuck::cast_slice_mut(&mut results))?;
            for (i, r) in results.into_iter().enumerate() {
                (chosen[i].token, chosen[i].logprob) = (r.token, r.logprob);
            }
        }
        if !on_host.is_empty() {
            self.lm_head_logits(x, lm_head, logits)?;
            for i in on_host {
                let (row, choice) = rows[i];
                let logits = &mut logits[row * lm_head.rows()..(row + 1) * lm_head.rows()];
                let lse = log_sum_exp(logits);
                chosen[i] = sample_token(logits, lse, choice);
            }
        }
        Ok(chosen)
    }

    /// See [`crate::ops::DecodeBackend::sample_async`].
    pub(super) fn start_sampling(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        rows: &[(usize, &SamplingRow)],
    ) -> Result<L::PendingRead> {
        let at = self.launch_sampling(x, lm_head, rows, &mut |_, _, _| Ok(()))?;
        self.launcher.read_later(at, rows.len() * size_of::<abi::SampledToken>())
    }

    /// See [`crate::ops::DecodeBackend::wait`].
    pub(super) fn finish_sampling(&self, pending: L::PendingRead) -> Result<Vec<SampledToken>> {
        let bytes = self.launcher.finish_read(pending)?;
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let chosen = |b: &[u8]| SampledToken {
            token: word(b),
            logprob: f32::from_bits(word(&b[4..])),
            ..SampledToken::default()
        };
        Ok(bytes.chunks_exact(8).map(chosen).collect())
    }

    /// Launches all choices that the device makes, and has `topped` list likely tokens where they
    /// are wanted, from the logits in scratch memory. Returns where the results will be, those of
    /// the host's choices not written.
    fn launch_sampling(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        rows: &[(usize, &SamplingRow)],
        topped: Topped<L>,
    ) -> Result<u64> {
        let mut scratch = self.scratch.borrow_mut();
        let scratch = &mut *scratch;
        let previous = scratch.last_sampled();
        scratch.turn ^= 1;
        let out = &mut scratch.chosen[scratch.turn];
        let at = self.place(out, rows.len() * size_of::<abi::SampledToken>())?;
        if rows.iter().any(|r| matches!(SampledBy::of(r.1, lm_head.rows()), SampledBy::Host)) {
            self.launcher.zero(at, rows.len() * size_of::<abi::SampledToken>())?;
        }
        let max_rows = self.lm_head_rows();
        for first in (0..x.shape()[0]).step_by(max_rows) {
            let range = first..(first + max_rows).min(x.shape()[0]);
            let here = |i: &usize| range.contains(&rows[*i].0);
            let (mut fused, mut listed) = (Vec::new(), Vec::new());
            for i in (0..rows.len()).filter(here) {
                match SampledBy::of(rows[i].1, lm_head.rows()) {
                    SampledBy::Fused => fused.push(i),
                    SampledBy::Listed => listed.push(i),
                    SampledBy::Host => {}
                }
            }
            if !fused.is_empty() {
                let (list, changes) = self.send_choices(scratch, range.start, rows, &fused)?;
                let blocks = self.lm_head_blocks(range.len(), lm_head);
                let partials = self.place(&mut scratch.partials, fused.len() * blocks * PARTIAL)?;
                let (count, blocks) = (fused.len() as u32, blocks as u32);
                let choices =
                    SamplingArgs { jobs: list, changes, previous, partials, count, blocks };
                let lm_head_rows = LmHead { x, rows: range.clone(), weight: lm_head };
                self.launch_lm_head("lm_head_sample", lm_head_rows, |args| args.with(choices))?;
                let shared = MERGE_THREADS as usize / 32 * PARTIAL;
                let args = Args::new().with(choices).with(at);
                self.launch("merge_samples", [fused.len(), 1, 1], MERGE_THREADS, shared, args)?;
            }
            let wanted: Vec<usize> =
                fused.iter().chain(&listed).copied().filter(|&i| rows[i].1.top > 0).collect();
            if !listed.is_empty() || !wanted.is_empty() {
                let logits = self.place(&mut scratch.logits, range.len() * lm_head.rows() * 4)?;
                let softmax_stats = self.place(
                    &mut scratch.softmax_stats,
                    range.len() * moments_blocks(lm_head.rows()) * size_of::<SoftmaxStats>(),
                )?;
                let lm_head_rows = LmHead { x, rows: range.clone(), weight: lm_head };
                self.launch_lm_head("lm_head_logits", lm_head_rows, |args| {
                    args.with(logits).with(softmax_stats)
                })?;
                if !listed.is_empty() {
                    let (list, changes) = self.send_choices(scratch, range.start, rows, &listed)?;
                    let args = Args::new()
                        .with(at)
                        .with(logits)
                        .with(softmax_stats)
                        .with(list)
                        .with(changes)
                        .with(previous);
                    let shared = LISTED_SHARED + lm_head.rows().div_ceil(32) * 4;
                    let grid = [listed.len(), 1, 1];
                    self.launch(
                        "sample_filtered",
                        grid,
                        LISTED_THREADS,
                        shared,
                        args.with(lm_head.rows() as u32),
                    )?;
                }
                topped(scratch, range.start, &wanted)?;
            }
        }
        Ok(at)
    }

    /// Lists the likeliest tokens from the logits in scratch memory; returns what the host has to
    /// list.
    fn list_top(
        &self,
        scratch: &mut Scratch<L>,
        lm_head: &DeviceWeight<L>,
        (first_row, part): (usize, &[usize]),
        rows: &[(usize, &SamplingRow)],
        chosen: &mut [SampledToken],
    ) -> Result<Vec<usize>> {
        let wanted = |&i: &usize| TopRequest {
            row: (rows[i].0 - first_row) as u32,
            count: rows[i].1.top.min(lm_head.rows()) as u32,
        };
        let tops: Vec<TopRequest> = part.iter().map(wanted).collect();
        let Some(max_top) = tops.iter().map(|t| t.count as usize).max() else { return Ok(vec![]) };
        let list = self.send(&mut scratch.choices, bytemuck::cast_slice(&tops))?;
        let logits = scratch.logits.as_ref().map_or(0, |m| m.at);
        let out =
            self.place(&mut scratch.tops, part.len() * max_top * size_of::<abi::SampledToken>())?;
        let softmax_stats = scratch.softmax_stats.as_ref().map_or(0, |m| m.at);
        let args =
            Args::new().with(out).with(logits).with(softmax_stats).with(list).with(max_top as u32);
        self.launch(
            "top_logprobs",
            [part.len(), 1, 1],
            LISTED_THREADS,
            LISTED_SHARED,
            args.with(lm_head.rows() as u32),
        )?;
        let mut results = vec![abi::SampledToken::zeroed(); part.len() * max_top];
        self.launcher.read(out, bytemuck::cast_slice_mut(&mut results))?;
        let mut left = Vec::new();
        for ((&i, top), results) in part.iter().zip(&tops).zip(results.chunks_exact(max_top)) {
            let results = &results[..top.count as usize];
            if results.iter().any(|r| r.token == TOO_MANY) {
                left.push(i);
            }
            chosen[i].top = results.iter().map(|r| (r.token, r.logprob)).collect();
        }
        Ok(left)
    }

    /// Writes the choices and the tokens whose logits they change to the device.
    fn send_choices(
        &self,
        scratch: &mut Scratch<L>,
        first_row: usize,
        rows: &[(usize, &SamplingRow)],
        part: &[usize],
    ) -> Result<(u64, u64)> {
        let mut changes: Vec<LogitChange> = Vec::new();
        let list: Vec<SamplingJob> = part
            .iter()
            .map(|&i| {
                let (row, r) = rows[i];
                let s = r.sampling;
                let start = changes.len();
                changes.extend(changed(r));
                let count = changes.len() - start;
                // ends the list for the kernel's search
                changes.push(LogitChange { token: ABSENT, bias: 0.0 });
                SamplingJob {
                    row: (row - first_row) as u32,
                    inverse_temperature: if s.temperature > 0.0 {
                        1.0 / s.temperature
                    } else {
                        0.0
                    },
                    penalty: s.repetition_penalty,
                    changes_start: start as u32,
                    changes_count: count as u32,
                    forced: r.forced.unwrap_or(ABSENT),
                    seed_low: s.seed as u32,
                    seed_high: (s.seed >> 32) as u32,
                    candidate: r.candidate,
                    position: r.position,
                    top_k: s.top_k as u32,
                    top_p: s.top_p,
                    min_p: s.min_p,
                    pending: r.pending.map_or(ABSENT, |c| c as u32),
                    slot: i as u32,
                }
            })
            .collect();
        let list = self.send(&mut scratch.choices, bytemuck::cast_slice(&list))?;
        Ok((list, self.send(&mut scratch.changes, bytemuck::cast_slice(&changes))?))
    }
}
