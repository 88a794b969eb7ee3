//! What tokens are sampled from.

use super::SamplingRow;
use super::sequence::{Sequence, SequenceId};
use crate::ops::DecodeBackend;

/// A token to sample, with what it is sampled from.
pub(super) struct SamplingJob {
    /// Running sequence, and how many guesses and unknown tokens come before it.
    pub at: usize,
    ahead: usize,
    /// Token of the batch.
    row: usize,
    /// Tokens that count as seen, if they are not just the sequence's.
    seen: Option<Vec<u32>>,
    /// The job of the step before whose token comes first, and is not known yet.
    pending_token: Option<usize>,
    bias: Vec<(u32, f32)>,
}

impl SamplingJob {
    /// The job after the tokens of the running sequence `s` and these guesses, or after a token
    /// that is not known yet.
    pub fn new(
        (at, s): (usize, &Sequence),
        ahead: &[u32],
        pending_token: Option<usize>,
        row: usize,
    ) -> SamplingJob {
        let sampling = &s.request.sampling;
        let seen = (sampling.repetition_penalty != 1.0 && !ahead.is_empty()).then(|| {
            let mut seen = s.seen.clone();
            for t in ahead {
                if !seen.contains(t) {
                    seen.push(*t);
                }
            }
            seen
        });
        let more = ahead.len() + usize::from(pending_token.is_some());
        SamplingJob { at, ahead: more, row, seen, pending_token, bias: bias(s, ahead, more) }
    }
}

/// What is added to the logits after these guesses, `more` tokens behind the sequence's own, each
/// token once.
fn bias(s: &Sequence, ahead: &[u32], more: usize) -> Vec<(u32, f32)> {
    let sampling = &s.request.sampling;
    let mut bias = s.request.bias.clone();
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        let mut counts = s.counts.clone();
        ahead.iter().for_each(|&t| *counts.entry(t).or_default() += 1);
        let penalty = |n: u32| sampling.presence_penalty + sampling.frequency_penalty * n as f32;
        bias.extend(counts.into_iter().map(|(t, n)| (t, -penalty(n))));
    }
    let position = s.tokens.len() + more;
    bias.extend(s.banned.iter().filter(|b| b.0 == position).map(|b| (b.1, f32::NEG_INFINITY)));
    if s.outputs() + more < s.request.min_new {
        let stops = s.request.stop_token_ids.iter().chain([&s.request.eos]);
        bias.extend(stops.map(|&t| (t, f32::NEG_INFINITY)));
    }
    bias.sort_by_key(|b| b.0);
    bias.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        kept.1 += if same { next.1 } else { 0.0 };
        same
    });
    bias
}

/// The jobs as a backend takes them.
pub(super) fn sampling_rows<'j>(
    running: &'j [Sequence],
    jobs: &'j [SamplingJob],
) -> Vec<SamplingRow<'j>> {
    let row = |job: &'j SamplingJob| {
        let s = &running[job.at];
        SamplingRow {
            row: job.row,
            sampling: &s.request.sampling,
            seen: job.seen.as_deref().unwrap_or(&s.seen),
            pending: job.pending_token.filter(|_| s.request.sampling.repetition_penalty != 1.0),
            bias: &job.bias,
            forced: s.forced.get(job.ahead).copied(),
            top: s.request.top_logprobs,
            candidate: s.candidate,
            position: (s.tokens.len() + job.ahead) as u32,
        }
    };
    jobs.iter().map(row).collect()
}

/// A step whose tokens are being sampled.
pub(super) struct InFlightStep<B: DecodeBackend> {
    pub pending: B::PendingSamples,
    /// Whose token each job samples; `None` if it is not wanted any more.
    pub targets: Vec<Option<SequenceId>>,
}

impl<B: DecodeBackend> InFlightStep<B> {
    pub fn new(
        pending: B::PendingSamples,
        running: &[Sequence],
        jobs: &[SamplingJob],
    ) -> InFlightStep<B> {
        let targets = jobs.iter().map(|job| Some(running[job.at].id())).collect();
        InFlightStep { pending, targets }
    }
}
