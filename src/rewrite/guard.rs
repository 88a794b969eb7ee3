//! Rewrites that have to keep a prompt's meaning: candidates in rounds, and what to fall back on.

use super::{Kept, Prompter, Verbatim};
use crate::engine::Finish;
use crate::engine::session::{Completed, GenerateOptions};
use crate::error::{Error, Result};
use crate::text::clip::clip_tokens;
use serde::Serialize;

/// What a rewrite has to satisfy. Words to keep and to ban are among the [`GenerateOptions`].
#[derive(Clone, Debug)]
pub struct GuardOptions {
    /// Least part of the prompt's meaning, from 0 to 1, that a candidate keeps ([`Kept`]).
    pub min_kept: Option<f64>,
    /// How often to generate for it.
    pub rounds: u32,
    /// Most tokens that CLIP counts, in each part between BREAKs.
    pub max_clip_tokens: Option<usize>,
    /// Whether to count CLIP tokens without a limit too.
    pub count_clip_tokens: bool,
}

impl Default for GuardOptions {
    fn default() -> Self {
        GuardOptions { min_kept: None, rounds: 3, max_clip_tokens: None, count_clip_tokens: false }
    }
}

impl GuardOptions {
    /// Whether a candidate may turn out to be not good enough.
    pub fn is_strict(&self) -> bool {
        self.min_kept.is_some() || self.max_clip_tokens.is_some()
    }
}

/// Where a candidate's text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    Model,
    /// The input, with phrases that the model added.
    Phrases,
    /// The input alone.
    Input,
}

/// One rewrite.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = RewriteCandidate)]
pub struct Candidate {
    pub text: String,
    pub source: Source,
    /// Why it is not the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Part of the prompt's meaning that it keeps, and what it leaves out.
    pub kept: f64,
    pub missing: Vec<String>,
    /// Phrases that say something new.
    pub added: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_tokens: Option<usize>,
    /// Tokens and log-probability of the model's text.
    pub tokens: usize,
    pub logprob: f32,
    #[serde(rename = "finish_reason")]
    pub finish: Finish,
}

/// A prompt with its rewrites.
#[derive(Clone, Debug)]
pub struct Rewrite {
    pub prompt: String,
    pub seed: u64,
    pub rounds: u32,
    pub candidates: Vec<Candidate>,
    /// Tokens of all rounds: prompts, those of them that were computed before, and outputs.
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub output_tokens: usize,
}

/// Token ids, and how to continue them.
pub type Work = Vec<(Vec<u32>, GenerateOptions)>;

/// A rewrite on its way: hands out work for the engine and takes what came of it, until it is done.
pub struct Rewriting {
    prompter: Prompter,
    verbatim: Verbatim,
    options: GenerateOptions,
    guard: GuardOptions,
    kept: Kept,
    good: Vec<Candidate>,
    failed: Vec<Candidate>,
    rewrite: Rewrite,
}

impl Rewriting {
    pub fn new(prompter: Prompter, prompt: &str, options: GenerateOptions, guard: GuardOptions) -> Result<Rewriting> {
        if prompt.trim().is_empty() {
            return Err(Error::invalid("the prompt is empty; expected a few words"));
        }
        let rewrite = Rewrite {
            prompt: prompt.trim().to_owned(),
            seed: options.sampling.seed,
            rounds: 0,
            candidates: vec![],
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
        };
        let verbatim = Verbatim::parse(prompt);
        Ok(Rewriting {
            prompter,
            verbatim,
            options,
            guard,
            kept: Kept::default(),
            good: vec![],
            failed: vec![],
            rewrite,
        })
    }

    /// Whether the model's text is the result as it comes.
    pub fn streams(&self) -> bool {
        self.verbatim.is_plain() && !self.guard.is_strict()
    }

    /// The next round's work, a prompt for each part between BREAKs that has words; none when the rewrite is done.
    pub fn work(&mut self) -> Result<Work> {
        let wanted = self.options.candidates.max(1) as usize;
        // greedy decoding says the same every time
        let rounds = if self.options.sampling.temperature > 0.0 { self.guard.rounds.max(1) } else { 1 };
        if self.good.len() >= wanted || self.rewrite.rounds >= rounds {
            return Ok(vec![]);
        }
        let mut work = Work::new();
        for chunk in self.verbatim.chunks.iter().filter(|c| !c.plain.is_empty()) {
            let mut options = self.options.clone();
            // seeds of rounds are far from those that people choose
            options.sampling.seed = options.sampling.seed.wrapping_add((self.rewrite.rounds as u64) << 56);
            if !work.is_empty() {
                options.keep = Default::default(); // once is enough
            }
            work.push((self.prompter.encode(&chunk.plain)?, options));
        }
        self.rewrite.rounds += 1;
        Ok(work)
    }

    /// Takes what came of a round, in the order of its work.
    pub fn take(&mut self, completed: &[Completed]) {
        for c in completed {
            self.rewrite.prompt_tokens += c.prompt_ids.len();
            self.rewrite.cached_tokens += c.cached;
            self.rewrite.output_tokens += c.candidates.iter().map(|c| c.tokens.len()).sum::<usize>();
        }
        for i in 0..completed.first().map_or(0, |c| c.candidates.len()) {
            let (good, candidate) = self.candidate(completed, i);
            if good { self.good.push(candidate) } else { self.failed.push(candidate) }
        }
    }

    /// What it has come to.
    pub fn finish(mut self) -> Rewrite {
        let wanted = self.options.candidates.max(1) as usize;
        if self.guard.is_strict() {
            // the likeliest first
            self.good.sort_by(|a, b| score(b).total_cmp(&score(a)));
        }
        self.good.truncate(wanted);
        self.failed.sort_by(|a, b| b.kept.total_cmp(&a.kept).then(score(b).total_cmp(&score(a))));
        for failed in std::mem::take(&mut self.failed).into_iter().take(wanted - self.good.len()) {
            let repaired = self.fall_back(failed);
            self.good.push(repaired);
        }
        if self.good.is_empty() {
            let reason = "there are no words to rewrite".to_owned();
            let input = self.measured(self.rewrite.prompt.clone(), Source::Input, Some(reason), None);
            self.good.push(input);
        }
        Rewrite { candidates: self.good, ..self.rewrite }
    }

    /// The `i`-th candidate of a round, and whether it is good enough.
    fn candidate(&self, completed: &[Completed], i: usize) -> (bool, Candidate) {
        let mut parts = completed.iter().map(|c| &c.candidates[i]);
        let mut texts: Vec<String> = vec![];
        let (mut tokens, mut logprob, mut finish) = (0, 0.0, Finish::Stop);
        for chunk in &self.verbatim.chunks {
            if chunk.plain.is_empty() {
                texts.push(String::new());
                continue;
            }
            let c = parts.next().expect("one prompt for each part with words");
            texts.push(c.text.trim().to_owned());
            tokens += c.tokens.len();
            logprob += c.tokens.iter().map(|t| t.logprob.max(-9999.0)).sum::<f32>();
            finish = if c.finish == Finish::Stop { finish } else { c.finish };
        }
        let restored = |texts: &[String]| match self.verbatim.is_plain() {
            true => texts[0].clone(),
            false => self.verbatim.restore(texts),
        };
        let mut text = restored(&texts);
        if let Some(most) = self.guard.max_clip_tokens {
            for i in 0..texts.len() {
                while clip_tokens(Verbatim::parse(&text).chunks.get(i).map_or("", |c| &c.plain)) > most {
                    let Some(shorter) = self.shortened(&texts[i]) else { break };
                    texts[i] = shorter;
                    text = restored(&texts);
                }
            }
        }
        let model = Some((tokens, logprob, finish));
        let mut candidate = self.measured(text, Source::Model, None, model);
        let kept = self.guard.min_kept.is_none_or(|least| candidate.kept >= least);
        let fits = self.guard.max_clip_tokens.is_none_or(|most| candidate.clip_tokens.is_none_or(|n| n <= most));
        let held = self.options.keep.missing(&candidate.text);
        if !kept {
            let missing = candidate.missing.join(", ");
            candidate.reason = Some(format!("kept {:.2} of the prompt; missing: {missing}", candidate.kept));
        } else if !fits {
            candidate.reason = Some(format!("has {} CLIP tokens", candidate.clip_tokens.unwrap_or_default()));
        } else if !held.is_empty() {
            candidate.reason = Some(format!("lacks {}", held.join(", ")));
        }
        (candidate.reason.is_none(), candidate)
    }

    /// A text without its last phrase that holds none of the words to keep; phrases at the end say the least.
    fn shortened(&self, text: &str) -> Option<String> {
        let phrases: Vec<&str> = text.split(',').collect();
        let held = |text: &str| self.options.keep.missing(text).len();
        (1..phrases.len()).rev().find_map(|i| {
            let shorter = [&phrases[..i], &phrases[i + 1..]].concat().join(",");
            (held(&shorter) == held(text)).then_some(shorter)
        })
    }

    /// The input with what a candidate added, as far as there is room.
    fn fall_back(&self, failed: Candidate) -> Candidate {
        let ban = &self.options.ban;
        let prompt = &self.rewrite.prompt;
        let mut input = if ban.find(prompt).is_some() { ban.strip(prompt) } else { prompt.clone() };
        let keep = self.options.keep.missing(&input);
        if !keep.is_empty() {
            input = format!("{input}, {}", keep.join(", "));
        }
        let mut phrases: Vec<&str> = failed.added.iter().map(String::as_str).collect();
        // what is about the same things may contradict the input; special parts stand in it already
        phrases.retain(|p| Verbatim::parse(p).is_plain() && self.kept.is_apart(prompt, p));
        let join = |phrases: &[&str]| [&[input.as_str()], phrases].concat().join(", ");
        if let Some(most) = self.guard.max_clip_tokens {
            while !phrases.is_empty() && longest_part(&join(&phrases)) > most {
                phrases.pop();
            }
        }
        let source = if phrases.is_empty() { Source::Input } else { Source::Phrases };
        let text = join(&phrases);
        let model = Some((failed.tokens, failed.logprob, failed.finish));
        let mut c = self.measured(text, source, failed.reason, model);
        if let (Some(most), Some(reason), Some(n)) = (self.guard.max_clip_tokens, &mut c.reason, c.clip_tokens)
            && n > most
        {
            *reason = format!("{reason}; the input alone has {n} CLIP tokens");
        }
        c
    }

    fn measured(
        &self,
        text: String,
        source: Source,
        reason: Option<String>,
        model: Option<(usize, f32, Finish)>,
    ) -> Candidate {
        let (kept, missing) = self.kept.measure(&self.rewrite.prompt, &text);
        let added = self.kept.added(&self.rewrite.prompt, &text);
        let (tokens, logprob, finish) = model.unwrap_or((0, 0.0, Finish::Stop));
        let counts = self.guard.count_clip_tokens || self.guard.max_clip_tokens.is_some();
        Candidate {
            clip_tokens: counts.then(|| longest_part(&text)),
            text,
            source,
            reason,
            kept,
            missing,
            added,
            tokens,
            logprob,
            finish,
        }
    }
}

/// CLIP tokens of the longest part between BREAKs, without what image programs take out.
fn longest_part(text: &str) -> usize {
    Verbatim::parse(text).chunks.iter().map(|c| clip_tokens(&c.plain)).max().unwrap_or(2)
}

/// Mean log-probability of the model's tokens.
fn score(c: &Candidate) -> f32 {
    c.logprob / c.tokens.max(1) as f32
}
