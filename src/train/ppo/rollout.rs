//! Rollouts: prompts continued by the policy, as ordinary requests to the engine.

use crate::engine::{Engine, EngineOptions, Event, Request, Sampling, Verdict};
use crate::error::{Error, Result};
use crate::models::bloom::Bloom;
use crate::ops::{BLOCK, RolloutBackend};
use crate::random::{Derived, derived_seed};
use crate::text::Tokenizer;

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyPrompt {
    /// The plain prompt.
    pub raw: String,
    /// What the data has for its rewrite, if anything.
    pub reference: Option<String>,
    /// The plain prompt in the policy's template.
    pub ids: Vec<u32>,
}

/// A continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Which of the run's prompts.
    pub prompt: usize,
    /// The sampled tokens, `</s>` included where it was reached.
    pub response: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Log-probability of each token by the weights that sampled it.
    pub log_probs: Vec<f32>,
    /// Whether the response ends with `</s>`.
    pub ended: bool,
}

/// How prompts are continued.
#[derive(Clone, Debug)]
pub struct RolloutOptions {
    /// How tokens are sampled; the seed is that of the whole run.
    pub sampling: Sampling,
    /// Maximum tokens of a response.
    pub max_new: usize,
    /// Fewest tokens of a response.
    pub min_new: usize,
    /// Ends the text, and is learnt like other tokens.
    pub eos: u32,
    /// Continues behind the end of the text, as measurements do.
    pub ignore_eos: bool,
}

/// Continues each of the chosen prompts `candidates` times; a prompt's candidates share its
/// computation and are neighbours in the result. `round` decides the noise.
///
/// # Errors
/// If a prompt cannot run, or the device fails.
pub fn generate<B: RolloutBackend>(
    (backend, policy, tokenizer): (&B, &Bloom<B>, &Tokenizer),
    (prompts, chosen): (&[PolicyPrompt], &[usize]),
    (candidates, round): (usize, u64),
    options: &RolloutOptions,
) -> Result<Vec<Rollout>> {
    let room = |p: usize| (prompts[p].ids.len() + options.max_new).next_multiple_of(BLOCK) + BLOCK;
    let whole: usize = chosen.iter().map(|&p| room(p) * candidates).sum();
    let sequences = (chosen.len() * candidates).max(1);
    let mut engine = Engine::new(
        backend,
        policy,
        EngineOptions {
            cache_tokens: whole.max(BLOCK),
            // what a step of all sequences and one prompt takes
            batch_tokens: sequences.max(512),
            sequences,
            prefix_cache: true,
            draft_tokens: 0,
        },
    )?;
    let empty = |p: usize| Rollout {
        prompt: p,
        response: Vec::new(),
        text: String::new(),
        log_probs: Vec::new(),
        ended: false,
    };
    let mut rollouts: Vec<Rollout> = chosen
        .iter()
        .flat_map(|&p| std::iter::repeat_with(move || empty(p)).take(candidates))
        .collect();
    let of_round = derived_seed(options.sampling.seed, Derived::Rollout, round);
    for (i, &p) in chosen.iter().enumerate() {
        let seed = derived_seed(of_round, Derived::Prompt, i as u64 + 1);
        let ids = prompts[p].ids.clone();
        let request = Request {
            candidates: candidates as u32,
            sampling: Sampling { seed, ..options.sampling },
            min_new: options.min_new,
            ignore_eos: options.ignore_eos,
            ..Request::new(i as u64, ids, options.max_new, options.eos)
        };
        engine.submit(request).map_err(|e| Error::invalid(format!("prompt {}: {e}", p + 1)))?;
    }
    while !engine.is_idle() {
        engine.step(&mut |event| {
            if let Event::Token { request, candidate, token, logprob, .. } = event {
                let rollout = &mut rollouts[request as usize * candidates + candidate as usize];
                rollout.response.push(token);
                rollout.log_probs.push(logprob);
            }
            Verdict::Go
        })?;
    }
    for rollout in &mut rollouts {
        rollout.ended = rollout.response.last() == Some(&options.eos);
        rollout.text = tokenizer.decode(&rollout.response)?.trim().to_owned();
    }
    Ok(rollouts)
}
