//! Prompts in, texts out: the engine with a tokenizer around it.

use super::text::TextStream;
use super::{Engine, EngineOptions, Event, Finish, Request, Sampling};
use crate::error::{Error, Result};
use crate::models::bloom::Bloom;
use crate::ops::{BLOCK, Backend};
use crate::text::Tokenizer;
use std::collections::HashMap;

/// How to continue a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub candidates: u32,
    pub sampling: Sampling,
    pub length: Length,
    pub ignore_eos: bool,
    pub prompt_logprobs: bool,
}

impl GenerateOptions {
    /// Positions of the KV cache that a prompt of so many tokens may take alone, with all its candidates.
    pub fn cache_tokens(&self, prompt: usize) -> usize {
        let new = match self.length {
            Length::New(n) => n,
            Length::Total(n) => n.saturating_sub(prompt).max(1),
        };
        // whole blocks: the last of the prompt and the last of the output may be begun ones
        (prompt + new + 2 * BLOCK) * self.candidates.max(1) as usize
    }
}

/// When a continuation is long enough.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// New tokens.
    New(usize),
    /// Tokens with the prompt's.
    Total(usize),
}

/// One continuation.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub finish: Finish,
}

/// A prompt with all its continuations.
#[derive(Clone, Debug)]
pub struct Completed {
    pub id: u64,
    pub prompt_ids: Vec<u32>,
    pub prompt_logprobs: Vec<f32>,
    pub candidates: Vec<Candidate>,
}

struct Growing<'a> {
    stream: TextStream<'a>,
    token_ids: Vec<u32>,
    logprobs: Vec<f32>,
    finish: Option<Finish>,
}

struct Pending<'a> {
    prompt_ids: Vec<u32>,
    prompt_logprobs: Vec<f32>,
    candidates: Vec<Growing<'a>>,
}

/// A session, whatever device it runs on.
pub trait Generate {
    /// Queues a prompt under an id that is not in flight.
    fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()>;
    /// One forward pass. `on_text` is told of new text of `(id, candidate)`; prompts that are done come back.
    fn step(&mut self, on_text: &mut dyn FnMut(u64, u32, &str)) -> Result<Vec<Completed>>;
    fn is_idle(&self) -> bool;
    /// Prompts queued or running.
    fn in_flight(&self) -> usize;
    /// Prompts that wait for room.
    fn waiting(&self) -> usize;
    /// Tokens computed so far, prompts included.
    fn computed_tokens(&self) -> u64;
    /// Tokens chosen so far.
    fn generated_tokens(&self) -> u64;
}

pub struct Session<'a, B: Backend> {
    engine: Engine<'a, B>,
    tokenizer: &'a Tokenizer,
    stops: &'a [String],
    context: usize,
    eos: u32,
    pending: HashMap<u64, Pending<'a>>,
    generated_tokens: u64,
}

impl<'a, B: Backend> Session<'a, B> {
    pub fn new(
        backend: &'a B,
        model: &'a Bloom<B>,
        tokenizer: &'a Tokenizer,
        stops: &'a [String],
        options: EngineOptions,
    ) -> Result<Session<'a, B>> {
        Ok(Session {
            engine: Engine::new(backend, model, options)?,
            tokenizer,
            stops,
            context: model.config.context,
            eos: model.config.eos_token_id,
            pending: HashMap::new(),
            generated_tokens: 0,
        })
    }
}

impl<B: Backend> Generate for Session<'_, B> {
    fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()> {
        let request = request(id, prompt, options, self.eos, self.context)?;
        let pending = Pending {
            prompt_ids: request.prompt.clone(),
            prompt_logprobs: vec![],
            candidates: (0..request.candidates)
                .map(|_| Growing {
                    stream: TextStream::new(self.tokenizer, self.stops),
                    token_ids: vec![],
                    logprobs: vec![],
                    finish: None,
                })
                .collect(),
        };
        self.engine.submit(request)?;
        self.pending.insert(id, pending);
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn waiting(&self) -> usize {
        self.engine.waiting()
    }

    fn computed_tokens(&self) -> u64 {
        self.engine.computed_tokens
    }

    fn step(&mut self, on_text: &mut dyn FnMut(u64, u32, &str)) -> Result<Vec<Completed>> {
        let mut done = Vec::new();
        let mut failed = None;
        let (pending, eos) = (&mut self.pending, self.eos);
        let mut generated = 0;
        self.engine.step(&mut |event| match event {
            Event::Prompt { request, logprobs } => {
                if let Some(p) = pending.get_mut(&request) {
                    p.prompt_logprobs.extend(logprobs);
                }
                true
            }
            Event::Token { request, candidate, token, logprob, finish } => {
                generated += 1;
                let p = pending.get_mut(&request).expect("every request was submitted here");
                let c = &mut p.candidates[candidate as usize];
                match c.push(token, logprob, finish, eos) {
                    Ok(text) if !text.is_empty() => on_text(request, candidate, &text),
                    Ok(_) => {}
                    Err(e) => failed = Some(e),
                }
                let goes_on = c.finish.is_none();
                if p.candidates.iter().all(|c| c.finish.is_some()) {
                    done.push(request);
                }
                goes_on
            }
        })?;
        self.generated_tokens += generated;
        if let Some(e) = failed {
            return Err(e);
        }
        Ok(done.into_iter().map(|id| completed(id, self.pending.remove(&id).expect("just seen"))).collect())
    }

    fn generated_tokens(&self) -> u64 {
        self.generated_tokens
    }
}

/// Checks the limits and turns options into a request.
fn request(id: u64, prompt: Vec<u32>, options: &GenerateOptions, eos: u32, context: usize) -> Result<Request> {
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
        id,
        prompt,
        candidates: options.candidates.max(1),
        sampling: options.sampling,
        max_new: max_new.max(1),
        eos,
        ignore_eos: options.ignore_eos,
        prompt_logprobs: options.prompt_logprobs,
    })
}

impl Growing<'_> {
    /// Adds a token; returns the text that it makes certain.
    fn push(&mut self, token: u32, logprob: f32, finish: Option<Finish>, eos: u32) -> Result<String> {
        self.token_ids.push(token);
        self.logprobs.push(logprob);
        let mut text = if token == eos { String::new() } else { self.stream.push(token)? };
        if finish.is_some() {
            text.push_str(&self.stream.finish()?);
        }
        self.finish = if self.stream.stopped { Some(Finish::Stop) } else { finish };
        Ok(text)
    }
}

fn completed(id: u64, p: Pending) -> Completed {
    let candidates = p.candidates.into_iter().map(|c| Candidate {
        text: c.stream.text,
        token_ids: c.token_ids,
        logprobs: c.logprobs,
        finish: c.finish.expect("only whole prompts complete"),
    });
    Completed { id, prompt_ids: p.prompt_ids, prompt_logprobs: p.prompt_logprobs, candidates: candidates.collect() }
}
