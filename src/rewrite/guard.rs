//! Rewrites that have to keep a prompt's meaning: candidates in rounds, and what to fall back on.

use super::assemble::{Assembled, Assembler, Draft, Plan, Source, longest_part};
use super::fidelity::Fidelity;
use super::markup::{self, PromptMarkup};
use super::prompter::Prompter;
use super::style::Additions;
use crate::engine::FinishReason;
use crate::error::{Error, Result};
use crate::generate::{Completed, GenerateOptions};
use crate::random::{Derived, derived_seed};
use crate::text::phrases::Phrases;
use serde::Serialize;
use std::borrow::Cow;
use std::sync::Arc;

/// How often banned phrases are looked for in what is left of a prompt.
const MAX_PASSES: usize = 8;

/// Missing words and parts after which it is not tried again.
const HOPELESS: usize = 5;

/// What a rewrite keeps of its prompt, if nobody says otherwise.
pub const DEFAULT_MIN_KEPT: f64 = 0.9;

/// What a rewrite has to satisfy. Words to keep and to ban are among the [`GenerateOptions`].
#[derive(Clone, Debug)]
pub struct GuardOptions {
    /// Least part of the prompt's meaning, from 0 to 1, that a candidate keeps ([`Fidelity`]); any
    /// if nothing.
    pub min_kept: Option<f64>,
    /// How often to generate for it.
    pub rounds: u32,
    /// Maximum tokens that CLIP counts, in each part between BREAKs.
    pub max_clip_tokens: Option<usize>,
    /// Whether to count CLIP tokens without a limit too.
    pub count_clip_tokens: bool,
    /// What may be added.
    pub additions: Additions,
}

impl Default for GuardOptions {
    fn default() -> Self {
        GuardOptions {
            min_kept: Some(DEFAULT_MIN_KEPT),
            rounds: 3,
            max_clip_tokens: None,
            count_clip_tokens: false,
            additions: Additions::default(),
        }
    }
}

impl GuardOptions {
    /// Whether a candidate may turn out to be not good enough.
    pub fn is_strict(&self) -> bool {
        self.min_kept.is_some() || self.max_clip_tokens.is_some()
    }
}

/// One rewrite.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = RewriteCandidate)]
pub struct Candidate {
    /// The rewritten prompt.
    pub text: String,
    /// Where the text comes from.
    pub source: Source,
    /// Why it is not the model's, or not all of it; or what it lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Part of the prompt's meaning that it keeps, from 0 to 1, what is banned aside.
    pub kept: f64,
    /// Words and parts of the prompt that it leaves out.
    pub missing: Vec<String>,
    /// Phrases that say something new.
    pub added: Vec<String>,
    /// Tokens that CLIP counts in the longest part between BREAKs, if they were to be counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_tokens: Option<usize>,
    /// Tokens of the model's text.
    pub tokens: usize,
    /// Sum of the log-probabilities of those tokens, in nats.
    pub logprob: f32,
    /// Why the model's text ended.
    #[serde(rename = "finish_reason")]
    pub finish: FinishReason,
}

/// A prompt with its rewrites.
#[derive(Clone, Debug)]
pub struct Rewrite {
    /// The prompt, without the white space around it.
    pub prompt: String,
    /// Seed of the first round.
    pub seed: u64,
    /// Rounds that were generated.
    pub rounds: u32,
    /// The rewrites, as many as were asked for.
    pub candidates: Vec<Candidate>,
    /// Tokens of the prompts of all rounds.
    pub prompt_tokens: usize,
    /// Prompt tokens that the prefix cache held already.
    pub cached_tokens: usize,
    /// Tokens that the model put out in all rounds.
    pub output_tokens: usize,
}

/// Token ids, and how to continue them.
pub type Work = Vec<(Vec<u32>, GenerateOptions)>;

/// A rewrite on its way: hands out work for the engine and takes what came of it, until it is done.
pub struct Rewriting {
    prompter: Prompter,
    /// The prompt without what is banned.
    wanted: String,
    plans: Vec<Plan>,
    options: GenerateOptions,
    guard: GuardOptions,
    /// What no part may add, once it is known.
    banned: Option<Arc<Phrases>>,
    fidelity: Fidelity,
    good: Vec<Candidate>,
    failed: Vec<Failed>,
    rewrite: Rewrite,
}

/// A candidate that is not good enough, and what the model made of each part.
struct Failed {
    candidate: Candidate,
    drafts: Vec<Option<Draft>>,
}

impl Rewriting {
    /// Fails if the prompt is empty, or holds nothing but what is banned.
    pub fn new(
        prompter: Prompter,
        prompt: &str,
        options: GenerateOptions,
        guard: GuardOptions,
    ) -> Result<Rewriting> {
        let prompt = prompt.trim();
        if prompt.is_empty() {
            return Err(Error::invalid("the prompt is empty; expected a few words"));
        }
        let wanted = without_banned(prompt, &options.ban);
        if wanted.is_empty() {
            return Err(Error::invalid(
                "the prompt holds nothing but banned phrases; expected some other word",
            ));
        }
        let rewrite = Rewrite {
            prompt: prompt.to_owned(),
            seed: options.sampling.seed,
            rounds: 0,
            candidates: vec![],
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
        };
        let chunks = PromptMarkup::parse(&wanted).chunks;
        let mut plans: Vec<Plan> =
            chunks.into_iter().map(|c| Plan::new(c, &prompter.tokenizer)).collect();
        if !markup::says_something(&wanted) {
            // a model would make something up
            plans.iter_mut().for_each(|p| p.reading.clear());
        }
        let (banned, fidelity, good, failed) = Default::default();
        Ok(Rewriting {
            prompter,
            wanted,
            plans,
            options,
            guard,
            banned,
            fidelity,
            good,
            failed,
            rewrite,
        })
    }

    /// About how many bytes of text a round reads and measures.
    pub fn text_bytes(&self) -> usize {
        (self.rewrite.prompt.len() + 256 * self.plans.len())
            .saturating_mul(self.options.candidates.max(1) as usize)
    }

    /// Whether the model's text is the result as it comes.
    pub fn streams(&self) -> bool {
        let plain =
            |p: &Plan| p.stays.is_none() && !p.reading.is_empty() && p.chunk.parts.is_empty();
        self.plans.len() == 1 && plain(&self.plans[0]) && !self.guard.is_strict()
    }

    /// The next round's work, a prompt for each part between BREAKs that has words; none when the
    /// rewrite is done.
    pub fn work(&mut self) -> Result<Work> {
        let wanted = self.options.candidates.max(1) as usize;
        // greedy decoding says the same every time
        let rounds =
            if self.options.sampling.temperature > 0.0 { self.guard.rounds.max(1) } else { 1 };
        // what leaves out so much will not be whole the next time
        let hopeless = !self.failed.is_empty()
            && self.failed.iter().all(|f| f.candidate.missing.len() >= HOPELESS);
        if self.good.len() >= wanted
            || self.rewrite.rounds >= rounds
            || (hopeless && self.good.is_empty())
        {
            return Ok(vec![]);
        }
        let mut work = Work::new();
        let mut keeps = false;
        let banned = self.banned();
        for (plan, seed, reading) in self.readings() {
            let mut options = self.options.clone();
            // seeds of rounds are far from those that people choose
            options.sampling.seed = seed.wrapping_add((self.rewrite.rounds as u64) << 56);
            // once is enough, and where the model's text comes back whole
            if keeps || plan.stays.is_some() {
                options.keep = Default::default();
            }
            keeps |= plan.stays.is_none();
            options.ban = banned.clone();
            work.push((self.prompter.encode(&reading)?, options));
        }
        self.rewrite.rounds += u32::from(!work.is_empty());
        Ok(work)
    }

    /// What no part may add. A medium named in one part is that of all, and what one part says may
    /// stand in each.
    fn banned(&mut self) -> Arc<Phrases> {
        if let Some(banned) = &self.banned {
            return banned.clone();
        }
        let mut whole = self.wanted.clone();
        for (_, _, reading) in self.readings() {
            whole.push_str(", ");
            whole.push_str(&reading);
        }
        let banned =
            self.guard.additions.banned(&whole, self.options.sampling.seed, &self.options.ban);
        self.banned.insert(Arc::new(banned)).clone()
    }

    /// The parts that have words, each with its seed and what the model is given to read.
    fn readings(&self) -> impl Iterator<Item = (&Plan, u64, Cow<'_, str>)> {
        let parts = self.plans.iter().filter(|p| !p.reading.is_empty());
        parts.enumerate().map(|(part, plan)| {
            let seed = match part {
                0 => self.options.sampling.seed,
                part => derived_seed(self.options.sampling.seed, Derived::Part, part as u64),
            };
            (plan, seed, self.guard.additions.named(&plan.reading, seed))
        })
    }

    /// Takes what came of a round, in the order of its work.
    pub fn take(&mut self, completed: &[Completed]) {
        for c in completed {
            self.rewrite.prompt_tokens += c.prompt_ids.len();
            self.rewrite.cached_tokens += c.cached;
            self.rewrite.output_tokens +=
                c.candidates.iter().map(|c| c.tokens.len()).sum::<usize>();
        }
        for i in 0..completed.first().map_or(0, |c| c.candidates.len()) {
            self.judge(completed, i);
        }
    }

    /// What it has come to.
    pub fn finish(mut self) -> Rewrite {
        let wanted = self.options.candidates.max(1) as usize;
        if self.good.len() > wanted {
            // the likeliest of them
            self.good.sort_by(|a, b| score(b).total_cmp(&score(a)));
        }
        self.good.truncate(wanted);
        let mut failed = std::mem::take(&mut self.failed);
        failed.sort_by(|a, b| {
            let (a, b) = (&a.candidate, &b.candidate);
            b.kept.total_cmp(&a.kept).then(score(b).total_cmp(&score(a)))
        });
        for failed in failed.into_iter().take(wanted - self.good.len()) {
            let repaired = self.fall_back(failed);
            self.good.push(repaired);
        }
        if self.good.is_empty() {
            // not even a prompt for the model
            let nothing: Vec<Option<Draft>> = self.plans.iter().map(|_| None).collect();
            let mut input = self.assembler().assemble(&nothing, false);
            input.reason.get_or_insert("there are no words to rewrite".to_owned());
            let mut input = self.measured(input, (0, 0.0, FinishReason::Stop));
            if let (Some(fault), Some(reason)) = (self.fault(&input), &mut input.reason) {
                *reason = format!("{reason}; the input {fault}");
            }
            self.good = vec![input; wanted];
        }
        Rewrite { candidates: self.good, ..self.rewrite }
    }

    fn assembler(&self) -> Assembler<'_> {
        Assembler {
            plans: &self.plans,
            known: self.fidelity.known(&self.wanted),
            keep: &self.options.keep,
            max_clip_tokens: self.guard.max_clip_tokens,
        }
    }

    /// Takes the `i`-th candidate of a round, if it is good enough.
    fn judge(&mut self, completed: &[Completed], i: usize) {
        let streams = self.streams();
        let mut texts = completed.iter().map(|c| &c.candidates[i]);
        let (mut tokens, mut logprob, mut finish) = (0, 0.0, FinishReason::Stop);
        let mut drafts = vec![];
        for plan in &self.plans {
            let Some(c) = (!plan.reading.is_empty()).then(|| texts.next()).flatten() else {
                drafts.push(None);
                continue;
            };
            tokens += c.tokens.len();
            logprob += c.tokens.iter().map(|t| t.logprob.max(-9999.0)).sum::<f32>();
            finish = if c.finish == FinishReason::Stop { finish } else { c.finish };
            drafts.push(Some(match streams {
                // what was given out stands
                true => Draft { text: whole_characters(&c.text).trim().to_owned(), cut: false },
                false => Draft::new(&c.text, c.finish != FinishReason::Stop),
            }));
        }
        let model = (tokens, logprob, finish);
        let mut candidate = match streams {
            true => {
                let text = drafts[0].as_ref().map(|d| d.text.clone()).unwrap_or_default();
                self.measured(Assembled { text, source: Source::Model, reason: None }, model)
            }
            false => self.measured(self.assembler().assemble(&drafts, false), model),
        };
        match self.fault(&candidate) {
            None => self.good.push(candidate),
            // nothing takes back what was given out
            Some(fault) if streams => {
                candidate.reason = Some(fault);
                self.good.push(candidate);
            }
            Some(fault) => {
                candidate.reason = Some(fault);
                self.failed.push(Failed { candidate, drafts });
            }
        }
    }

    /// What a candidate lacks, checked in the text that is returned.
    fn fault(&self, c: &Candidate) -> Option<String> {
        let held = self.options.keep.missing(&c.text);
        if self.guard.min_kept.is_some_and(|least| c.kept < least) {
            Some(format!("kept {:.2} of the prompt; missing: {}", c.kept, c.missing.join(", ")))
        } else if let (Some(most), Some(n)) = (self.guard.max_clip_tokens, c.clip_tokens)
            && n > most
        {
            Some(format!("has {n} CLIP tokens"))
        } else if !held.is_empty() {
            Some(format!("lacks {}", held.join(", ")))
        } else {
            let banned = self.options.ban.find(&c.text)?;
            Some(format!("holds \"{}\"", &c.text[banned]))
        }
    }

    /// The input with what a candidate added, as far as there is room.
    fn fall_back(&self, failed: Failed) -> Candidate {
        let model = (failed.candidate.tokens, failed.candidate.logprob, failed.candidate.finish);
        let assemble = |drafts: &[Option<Draft>]| {
            let mut text = self.assembler().assemble(drafts, true);
            text.reason = failed.candidate.reason.clone();
            self.measured(text, model)
        };
        let mut c = assemble(&failed.drafts);
        if self.fault(&c).is_some() {
            // what was added may be at fault
            let nothing: Vec<Option<Draft>> = self.plans.iter().map(|_| None).collect();
            c = assemble(&nothing);
        }
        if let (Some(fault), Some(reason)) = (self.fault(&c), &mut c.reason) {
            *reason = format!("{reason}; the input alone {fault}");
        }
        c
    }

    fn measured(
        &self,
        text: Assembled,
        (tokens, logprob, finish): (usize, f32, FinishReason),
    ) -> Candidate {
        let Assembled { text, source, reason } = text;
        let (kept, missing) = self.fidelity.score(&self.wanted, &text);
        let added = self.fidelity.added(&self.wanted, &text);
        let counts = self.guard.count_clip_tokens || self.guard.max_clip_tokens.is_some();
        let clip_tokens = counts.then(|| longest_part(&text));
        Candidate {
            text,
            source,
            reason,
            kept,
            missing,
            added,
            clip_tokens,
            tokens,
            logprob,
            finish,
        }
    }
}

/// A prompt without what is banned: tags and choices that hold some of it go whole.
fn without_banned(prompt: &str, ban: &Phrases) -> String {
    let mut text = prompt.to_owned();
    // a part that goes may bring words of a phrase together
    for _ in 0..MAX_PASSES {
        let gone = ban.spans(&text);
        if gone.is_empty() {
            return text;
        }
        text = markup::without(&text, &gone);
    }
    ban.strip(&text)
}

/// A piece of the model's text as it is given out: without the replacement character of bytes that
/// make none.
pub fn whole_characters(text: &str) -> Cow<'_, str> {
    match text.contains(char::REPLACEMENT_CHARACTER) {
        true => Cow::Owned(text.replace(char::REPLACEMENT_CHARACTER, "")),
        false => Cow::Borrowed(text),
    }
}

/// Mean log-probability of the model's tokens.
fn score(c: &Candidate) -> f32 {
    c.logprob / c.tokens.max(1) as f32
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
