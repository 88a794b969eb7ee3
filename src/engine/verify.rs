//! Sampled tokens compared with what was guessed, and taken.

use super::request::{Event, FinishReason, Sink, Verdict};
use super::{Engine, SampledToken};
use crate::ops::DecodeBackend;

impl<B: DecodeBackend> Engine<'_, B> {
    /// Takes sampled tokens while they are what was guessed. Whether the sequence goes on behind
    /// the last of them.
    pub(super) fn accept(
        &mut self,
        at: usize,
        draft: &[u32],
        sampled: &mut [SampledToken],
        sink: Sink,
    ) -> bool {
        let s = &mut self.running[at];
        let guessed = if s.forced.is_empty() { draft.len() } else { 0 };
        let mut accepted = 0;
        let mut goes_on = true;
        for (i, c) in sampled.iter_mut().enumerate() {
            s.push(c.token);
            let forced = !s.forced.is_empty();
            if forced {
                s.forced.pop_front();
            }
            let finish = if !forced && s.request.is_stop(c.token) {
                Some(FinishReason::Stop)
            } else if s.outputs() >= s.request.max_new {
                Some(FinishReason::Length)
            } else {
                None
            };
            let verdict = sink(Event::Token {
                request: s.request.id,
                candidate: s.candidate,
                token: c.token,
                logprob: c.logprob,
                top: std::mem::take(&mut c.top),
                finish,
            });
            let matches = draft.get(i) == Some(&c.token);
            // a token that was guessed is in the cache already
            s.computed += usize::from(matches);
            accepted += usize::from(matches);
            goes_on = verdict == Verdict::Go && finish.is_none();
            match verdict {
                Verdict::Go => s.done = finish.is_some(),
                Verdict::End => s.done = true,
                Verdict::Rewind { keep, ban } => {
                    s.banned.push((s.prompt + keep, ban));
                    self.blocks.release(&s.truncate(keep));
                }
                Verdict::Force { keep, tokens } => {
                    self.blocks.release(&s.truncate(keep));
                    s.forced = tokens.into();
                }
            }
            if !goes_on || !matches {
                break;
            }
        }
        if s.done {
            self.drafter.learn(&s.tokens[s.prompt..]);
        }
        if guessed > 0 {
            s.draft = (accepted + 2).min(self.options.draft_tokens);
            self.drafter.checked(guessed, accepted);
            self.counters.drafts += 1;
            self.counters.drafted_tokens += guessed as u64;
            self.counters.accepted_tokens += accepted as u64;
        }
        goes_on
    }
}
