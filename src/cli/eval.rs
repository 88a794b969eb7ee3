//! `bprompt eval`: measures rewrites.

use super::batch::check_lengths;
use super::engine::EngineArgs;
use super::files::check_distinct;
use super::guard::GuardArgs;
use super::model::{ModelArgs, SamplingArgs};
use super::print::{self, note, print_line};
use super::rewriter::Rewriter;
use crate::data::records::{read_pairs, read_prompts};
use crate::eval::facts::{Facts, count_facts, read_facts};
use crate::eval::{EvaluatedRewrite, RewriteReport, report};
use crate::generate::Generate;
use crate::rewrite::{Rewriting, Source};
use crate::text::content_words::words;
use anyhow::ensure;
use clap::Args;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Args)]
pub struct EvalArgs {
    /// Held-out prompts: pairs with "raw_prompt", records with "prompt", text with one a line, or
    /// the first column of a .tsv with a heading.
    #[arg(long, value_name = "FILE", required_unless_present = "facts")]
    input: Option<PathBuf>,
    /// Prompts with the facts that they state, to measure how many survive: JSON lines with
    /// "prompt" and "facts", each fact with "kind" and "keywords".
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "kind"])]
    facts: Option<PathBuf>,
    /// Take only pairs of this kind.
    #[arg(long)]
    kind: Option<String>,
    /// Maximum prompts, at least 1.
    #[arg(long, default_value_t = 300)]
    limit: usize,
    /// Leave out prompts of fewer words; 1 takes all of them.
    #[arg(long, default_value_t = 1)]
    min_words: usize,
    /// Leave out prompts of more words, at least 1.
    #[arg(long, default_value_t = 20)]
    max_words: usize,
    /// Maximum bytes of a prompt, at least 1; longer ones are refused before they take memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536)]
    max_prompt_bytes: usize,
    /// Print the outputs too.
    #[arg(long)]
    show: bool,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    guard: GuardArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl EvalArgs {
    /// Prompts, each once, and the facts that are known of them.
    fn prompts(&self) -> anyhow::Result<(Vec<String>, Vec<Facts>)> {
        let facts = self.facts.as_deref().map(read_facts).transpose()?.unwrap_or_default();
        let all = match &self.input {
            Some(input) => self.read(input)?,
            None => facts.iter().map(|f| f.prompt.clone()).collect(),
        };
        if let Some(read) = self.input.as_ref().or(self.facts.as_ref()) {
            check_lengths(read, &all, self.max_prompt_bytes)?;
        }
        let mut seen = HashSet::new();
        let fits = |p: &String| (self.min_words.max(1)..=self.max_words).contains(&words(p).len());
        let prompts: Vec<String> = all
            .into_iter()
            .filter(|p| fits(p) && seen.insert(p.clone()))
            .take(self.limit)
            .collect();
        let name = self
            .input
            .as_ref()
            .or(self.facts.as_ref())
            .map(|f| f.display().to_string())
            .unwrap_or_default();
        ensure!(
            !prompts.is_empty(),
            "{name}: holds no prompts of {} to {} words",
            self.min_words,
            self.max_words
        );
        Ok((prompts, facts))
    }

    fn read(&self, input: &Path) -> anyhow::Result<Vec<String>> {
        let ending = input.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let all: Vec<String> = if ending == "tsv" {
            let column = |l: &String| l.split('\t').next().unwrap_or_default().trim().to_owned();
            read_prompts(input)?.iter().skip(1).map(column).collect()
        } else if let Some(kind) = &self.kind {
            let pairs = read_pairs(input)?;
            let of_kind = pairs
                .into_iter()
                .filter(|p| p.other.get("kind").and_then(|k| k.as_str()) == Some(kind));
            of_kind.map(|p| p.raw_prompt).collect()
        } else if let Ok(pairs) = read_pairs(input) {
            pairs.into_iter().map(|p| p.raw_prompt).collect()
        } else {
            read_prompts(input)?
        };
        Ok(all)
    }

    pub fn run(self) -> anyhow::Result<()> {
        let read: Vec<&Path> = self.input.iter().chain(&self.facts).map(PathBuf::as_path).collect();
        check_distinct(&[Path::new("-")], &read)?;
        let (prompts, facts) = self.prompts()?;
        let loaded = self.model.load()?;
        let mut options = self.sampling.options(&loaded.defaults, 1)?;
        let guard = self.guard.options(&mut options)?;
        let template = loaded.template(None)?;
        let rewriter = Rewriter { loaded, template, options, guard };
        let mut session = rewriter.session(self.engine.options()?)?;
        let rewrites = self.rewrite_all(&rewriter, &mut *session, prompts)?;
        let mut r = report(&rewrites);
        let outputs: HashMap<&str, &str> =
            rewrites.iter().map(|r| (r.input.as_str(), r.output.as_str())).collect();
        let known = facts.iter().filter_map(|f| Some((f, *outputs.get(f.prompt.as_str())?)));
        r.facts = if facts.is_empty() { vec![] } else { count_facts(known) };
        let counters = session.counters();
        r.tokens_per_step =
            rewrites.iter().map(|r| r.tokens).sum::<usize>() as f64 / counters.steps.max(1) as f64;
        r.drafts_accepted = counters.accepted_tokens as f64 / counters.drafted_tokens.max(1) as f64;
        match self.json {
            true => Ok(print::json(&r)?),
            false => print_report(&r),
        }
    }

    /// Rewrites the prompts, one after the other.
    fn rewrite_all(
        &self,
        rewriter: &Rewriter,
        session: &mut dyn Generate,
        prompts: Vec<String>,
    ) -> anyhow::Result<Vec<EvaluatedRewrite>> {
        let mut rewrites = Vec::new();
        for (i, prompt) in prompts.into_iter().enumerate() {
            let started = Instant::now();
            let (mut options, guard) = (rewriter.options.clone(), rewriter.guard.clone());
            // the same noise for all would make their outputs alike
            options.sampling.seed = options.sampling.seed.wrapping_add(i as u64);
            let rewriting = Rewriting::new(rewriter.prompter(), &prompt, options, guard)?;
            let done = rewriter.rewrite(session, rewriting, &mut |_| {})?;
            let candidate = &done.candidates[0];
            let rewrite = EvaluatedRewrite {
                seconds: started.elapsed().as_secs_f64(),
                output: candidate.text.clone(),
                tokens: done.output_tokens,
                kept: candidate.kept,
                from_model: candidate.source == Source::Model,
                input: prompt,
            };
            if self.show {
                note!("{}\n  {}", rewrite.input, rewrite.output);
            }
            rewrites.push(rewrite);
        }
        Ok(rewrites)
    }
}

fn print_report(r: &RewriteReport) -> anyhow::Result<()> {
    print_line!("prompts                         {}", r.prompts)?;
    print_line!("content words kept              {:.1} %", 100.0 * r.kept_content_words)?;
    print_line!("meaning kept                    {:.1} %", 100.0 * r.kept_meaning)?;
    print_line!("outputs that fell back          {:.1} %", 100.0 * r.fallbacks)?;
    print_line!("outputs that keep all           {:.1} %", 100.0 * r.kept_all)?;
    for k in &r.facts {
        let name = format!("facts kept, {}", k.kind);
        print_line!(
            "{name:32}{:.1} % ({} of {} stated, of {})",
            100.0 * k.share,
            k.kept,
            k.stated,
            k.facts
        )?;
    }
    print_line!("outputs adding 8 or more words  {:.1} %", 100.0 * r.adds_eight_words)?;
    print_line!("outputs repeating 4 words thrice {:.1} %", 100.0 * r.repeats_four_words)?;
    print_line!("distinct tails                  {}", r.variety.distinct_tails)?;
    print_line!("added that 60 phrases make up   {:.1} %", 100.0 * r.variety.commonest_phrases)?;
    print_line!("outputs that add artists        {:.1} %", 100.0 * r.variety.with_artists)?;
    print_line!("outputs of contradicting media  {:.1} %", 100.0 * r.variety.contradictions)?;
    print_line!("both photo and painted          {:.1} %", 100.0 * r.variety.photo_and_painting)?;
    print_line!("words in, out                   {:.1}, {:.1}", r.mean_words_in, r.mean_words_out)?;
    print_line!("tokens a rewrite                {:.1}", r.mean_tokens)?;
    print_line!(
        "tokens a step, drafts accepted   {:.2}, {:.1} %",
        r.tokens_per_step,
        100.0 * r.drafts_accepted
    )?;
    print_line!(
        "seconds a rewrite               {:.3} median, {:.3} slowest",
        r.median_seconds,
        r.slowest_seconds
    )?;
    Ok(())
}
