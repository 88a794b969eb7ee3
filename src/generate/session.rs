//! Prompts in, texts out: the engine with a tokenizer around it.

use super::options::{GenerateOptions, Length};
use super::text::{Growing, Rules, Token};
use crate::engine::{
    Counters, Engine, EngineOptions, Event, FinishReason, Request, TopTokens, Verdict,
};
use crate::error::{Error, Result};
use crate::models::bloom::Bloom;
use crate::ops::DecodeBackend;
use crate::text::Tokenizer;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One continuation.
#[derive(Clone, Debug)]
pub struct Continuation {
    /// The text, without the prompt.
    pub text: String,
    /// The output tokens.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Continuation {
    /// The ids of the output tokens.
    pub fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    /// The log-probability of each output token, in nats.
    pub fn logprobs(&self) -> Vec<f32> {
        self.tokens.iter().map(|t| t.logprob).collect()
    }
}

/// A prompt with all its continuations.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The id that the prompt was queued under.
    pub id: u64,
    /// Token ids of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Log-probability and likely tokens for each of the prompt's tokens but the first, if asked
    /// for.
    pub prompt_scores: Vec<(f32, TopTokens)>,
    /// Tokens of the prompt that were computed before.
    pub cached: usize,
    /// The continuations, as many as were asked for.
    pub candidates: Vec<Continuation>,
}

/// A prompt whose work failed; the others are not concerned.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// The id that the prompt was queued under.
    pub id: u64,
    /// What went wrong.
    pub error: Error,
}

/// What a prompt came to.
pub type PromptResult = std::result::Result<Completed, Failed>;

/// What a step brought.
pub enum Update<'a> {
    /// Computing a prompt begins.
    Started {
        /// The prompt's id.
        id: u64,
    },
    /// New text of a candidate, with the tokens that are certain now; the last one has a `finish`.
    Text {
        /// The prompt's id.
        id: u64,
        /// Which of its candidates, from 0.
        candidate: u32,
        /// Text that follows what was told before.
        text: &'a str,
        /// Tokens that follow those told before.
        tokens: &'a [Token],
        /// Why the candidate ended, if it has.
        finish: Option<FinishReason>,
    },
}

struct Pending<'a> {
    prompt_ids: Vec<u32>,
    prompt_scores: Vec<(f32, TopTokens)>,
    cached: usize,
    candidates: Vec<Growing<'a>>,
    /// Candidates that have not ended.
    growing: usize,
}

/// A session, whatever device it runs on.
pub trait Generate {
    /// Queues a prompt under an id that is not in flight.
    fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()>;
    /// Forgets prompts.
    fn cancel(&mut self, ids: &[u64]);
    /// Forgets all prompts and what was computed for them, whatever state a failure left them in.
    fn reset(&mut self);
    /// One forward pass; prompts that are done come back, and those that failed alone. An error is
    /// one of the device or the model as a whole, after which nothing goes on.
    fn step(&mut self, on_update: &mut dyn FnMut(Update)) -> Result<Vec<PromptResult>>;
    /// Whether nothing is queued or running.
    fn is_idle(&self) -> bool;
    /// Prompts queued or running.
    fn in_flight(&self) -> usize;
    /// Sequences that run.
    fn running(&self) -> usize;
    /// Sequences that wait for room.
    fn waiting(&self) -> usize;
    /// Blocks of the KV cache: held by sequences, and all.
    fn blocks(&self) -> (usize, usize);
    /// What the engine has done so far.
    fn counters(&self) -> Counters;
    /// Tokens chosen so far.
    fn generated_tokens(&self) -> u64;
}

/// An engine with a tokenizer: continues prompts and decodes what comes.
pub struct Session<'a, B: DecodeBackend> {
    engine: Engine<'a, B>,
    tokenizer: &'a Tokenizer,
    context: usize,
    eos: u32,
    pending: HashMap<u64, Pending<'a>>,
    generated_tokens: u64,
}

impl<'a, B: DecodeBackend> Session<'a, B> {
    /// A session without prompts. If tokens are drafted, the drafter is taught common style
    /// phrases.
    ///
    /// # Errors
    /// If the device has no memory for what the options ask for.
    pub fn new(
        backend: &'a B,
        model: &'a Bloom<B>,
        tokenizer: &'a Tokenizer,
        options: EngineOptions,
    ) -> Result<Session<'a, B>> {
        let mut engine = Engine::new(backend, model, options)?;
        if options.draft_tokens > 0 {
            for phrase in include_str!("../../assets/style_phrases.txt").lines() {
                let tokens = tokenizer.encode_literal(&format!(", {phrase},"))?;
                // twice makes a run that is guessed
                (0..2).for_each(|_| engine.expect_run(&tokens));
            }
        }
        Ok(Session {
            engine,
            tokenizer,
            context: model.config.context,
            eos: model.config.eos_token_id,
            pending: HashMap::new(),
            generated_tokens: 0,
        })
    }

    /// Panics if the engine's books do not agree; for tests.
    #[doc(hidden)]
    pub fn check(&self) {
        self.engine.check();
    }
}

impl<B: DecodeBackend> Generate for Session<'_, B> {
    fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()> {
        let request = request(id, prompt, options, self.eos, self.context)?;
        let rules = Rules {
            stops: options.stops.clone(),
            stop_token_ids: options.stop_token_ids.clone(),
            include_stop: options.include_stop,
            min_new: options.min_new,
            ban: options.ban.clone(),
            keep: options.keep.clone(),
        };
        rules.check()?;
        // what is to be kept is tokenized once, for all candidates
        let candidate = Growing::new(self.tokenizer, Arc::new(rules), self.eos, request.max_new)?;
        let pending = Pending {
            prompt_ids: request.prompt.clone(),
            prompt_scores: vec![],
            cached: 0,
            candidates: vec![candidate; request.candidates as usize],
            growing: request.candidates as usize,
        };
        self.engine.submit(request)?;
        self.pending.insert(id, pending);
        Ok(())
    }

    fn cancel(&mut self, ids: &[u64]) {
        self.engine.cancel(ids);
        for id in ids {
            self.pending.remove(id);
        }
    }

    fn reset(&mut self) {
        self.engine.reset();
        self.pending.clear();
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn running(&self) -> usize {
        self.engine.running()
    }

    fn waiting(&self) -> usize {
        self.engine.waiting()
    }

    fn blocks(&self) -> (usize, usize) {
        (self.engine.blocks_in_use(), self.engine.total_blocks())
    }

    fn counters(&self) -> Counters {
        self.engine.counters()
    }

    fn generated_tokens(&self) -> u64 {
        self.generated_tokens
    }

    fn step(&mut self, on_update: &mut dyn FnMut(Update)) -> Result<Vec<PromptResult>> {
        let mut done = Vec::new();
        let mut failed: Vec<Failed> = Vec::new();
        let pending = &mut self.pending;
        let mut generated = 0;
        let stepped = self.engine.step(&mut |event| {
            let (id, candidate) = match event {
                Event::Started { request, cached } => {
                    if let Some(p) = pending.get_mut(&request) {
                        p.cached = cached;
                    }
                    on_update(Update::Started { id: request });
                    return Verdict::Go;
                }
                Event::Prompt { request, scores } => {
                    if let Some(p) = pending.get_mut(&request) {
                        p.prompt_scores.extend(scores);
                    }
                    return Verdict::Go;
                }
                Event::Token { request, candidate, .. }
                | Event::Ended { request, candidate, .. } => (request, candidate),
            };
            if failed.iter().any(|f| f.id == id) {
                return Verdict::End;
            }
            let Some(p) = pending.get_mut(&id) else { return Verdict::End };
            generated += u64::from(matches!(event, Event::Token { .. }));
            let c = &mut p.candidates[candidate as usize];
            let had_ended = c.finish.is_some();
            // what goes wrong with one text must not end the others
            let grown = catch_unwind(AssertUnwindSafe(|| c.take(event)));
            let grown = grown
                .unwrap_or_else(|_| Err(Error::Internal("a text could not be processed".into())));
            let verdict = match grown {
                Ok(verdict) => verdict,
                Err(error) => {
                    failed.push(Failed { id, error });
                    return Verdict::End;
                }
            };
            let finish = c.finish;
            let (text, tokens) = c.fresh();
            if !text.is_empty() || !tokens.is_empty() || finish.is_some() {
                on_update(Update::Text { id, candidate, text, tokens, finish });
            }
            if finish.is_some() && !had_ended {
                p.growing -= 1;
                if p.growing == 0 {
                    done.push(id);
                }
            }
            verdict
        });
        self.generated_tokens += generated;
        if !failed.is_empty() {
            self.cancel(&failed.iter().map(|f| f.id).collect::<Vec<_>>());
        }
        stepped?;
        let done =
            done.into_iter().filter_map(|id| Some(Ok(completed(id, self.pending.remove(&id)?))));
        Ok(done.chain(failed.into_iter().map(Err)).collect())
    }
}

/// Checks the limits and turns options into a request.
fn request(
    id: u64,
    prompt: Vec<u32>,
    options: &GenerateOptions,
    eos: u32,
    context: usize,
) -> Result<Request> {
    let room = context.saturating_sub(prompt.len());
    if room == 0 {
        return Err(Error::invalid(format!(
            "the prompt has {} tokens and the model's context is {context}; shorten the prompt",
            prompt.len()
        )));
    }
    let max_new = match options.length {
        Length::New(n) => n.min(room),
        Length::Total(n) => n.saturating_sub(prompt.len()).clamp(1, room),
    };
    Ok(Request {
        candidates: options.candidates.max(1),
        sampling: options.sampling,
        bias: options.bias.clone(),
        min_new: options.min_new,
        ignore_eos: options.ignore_eos,
        stop_token_ids: options.stop_token_ids.clone(),
        prompt_logprobs: options.prompt_logprobs,
        top_logprobs: options.top_logprobs,
        deadline: options.deadline,
        owner: options.owner.unwrap_or(id),
        ..Request::new(id, prompt, max_new.max(1), eos)
    })
}

fn completed(id: u64, p: Pending) -> Completed {
    let candidates = p.candidates.into_iter().map(|c| Continuation {
        text: c.text,
        tokens: c.tokens,
        // only prompts whose candidates all have ended are done
        finish: c.finish.unwrap_or(FinishReason::Stop),
    });
    Completed {
        id,
        prompt_ids: p.prompt_ids,
        prompt_scores: p.prompt_scores,
        cached: p.cached,
        candidates: candidates.collect(),
    }
}
