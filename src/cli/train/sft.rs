//! `bprompt train sft`: supervised fine-tuning on pairs.

use super::super::print::note;
use super::super::ranks::Ranks;
use super::run::{Prepared, RunArgs, Supervised};
use super::start::{Start, StartArgs};
use crate::data::records::read_training_pairs;
use crate::models::bloom::Architecture;
use crate::models::embedded;
use crate::ops::train::TrainBackend;
use crate::text::template::Template;
use crate::train::examples::{Example, example};
use crate::train::parallel::Communicator;
use crate::train::sft::Sft;
use anyhow::{bail, ensure};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct SftArgs {
    /// Training pairs: records with "raw_prompt" and "prompt" (.jsonl or a .json array).
    #[arg(long, value_name = "FILE")]
    train: PathBuf,
    /// Held-out pairs.
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    #[command(flatten)]
    start: StartArgs,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Leave out pairs that cannot be read or have an empty side, and count them.
    #[arg(long)]
    skip_bad_lines: bool,
}

impl SftArgs {
    pub fn run(self) -> anyhow::Result<()> {
        self.run_supervised()
    }

    /// The template that pairs are put into.
    fn template(&self, start: &Start) -> anyhow::Result<Template> {
        Ok(match (&self.template, start.own_template()) {
            (Some(name), _) => Template::named(name)?,
            (None, Some(file)) => Template::read(&file)?,
            (None, None) if start.embedded => embedded::template(),
            (None, None) => Template::named("v1")?,
        })
    }

    fn read(
        &self,
        path: &Path,
        start: &Start,
        template: &Template,
    ) -> anyhow::Result<Vec<Example>> {
        let eos = start.model.config.eos_token_id;
        let (pairs, mut bad) = read_training_pairs(path)?;
        if !self.skip_bad_lines && !bad.is_empty() {
            let first = bad.swap_remove(0);
            let more =
                if bad.is_empty() { String::new() } else { format!(", and {} more", bad.len()) };
            bail!("{first}{more}; mend it, or leave such pairs out with --skip-bad-lines");
        }
        let mut examples = Vec::new();
        let mut cut = 0;
        for pair in &pairs {
            let e = example(pair, template, &start.tokenizer, eos, self.run.max_tokens)?;
            // a sequence whose target was cut off whole teaches nothing
            if e.loss_from < e.ids.len() {
                examples.push(e);
            } else {
                cut += 1;
            }
        }
        if !bad.is_empty() {
            note!(
                "{}: left out {} pairs that cannot be read or have an empty side",
                path.display(),
                bad.len()
            );
        }
        if cut > 0 {
            note!(
                "{}: left out {cut} pairs whose targets begin beyond --max-tokens {}",
                path.display(),
                self.run.max_tokens
            );
        }
        ensure!(
            !examples.is_empty(),
            "{}: no pair is left that fits into --max-tokens {}",
            path.display(),
            self.run.max_tokens
        );
        Ok(examples)
    }
}

impl Supervised for SftArgs {
    type Examples = Sft;

    fn args(&self) -> &RunArgs {
        &self.run
    }

    fn start(&self, ranks: &Ranks) -> anyhow::Result<Start> {
        self.start.start(&self.run, ranks, Architecture::CausalLm)
    }

    fn examples(&self, start: &mut Start) -> anyhow::Result<Sft> {
        let template = self.template(start)?;
        start.companions.set("template.txt", format!("{}\n", template.text()));
        let train = self.read(&self.train, start, &template)?;
        let validation = match &self.validation {
            Some(path) => self.read(path, start, &template)?,
            None => vec![],
        };
        Ok(Sft { train, validation })
    }

    fn train_on<B: TrainBackend>(
        &self,
        on: (&B, Box<dyn Communicator<B>>),
        start: Start,
        task: Sft,
    ) -> anyhow::Result<()> {
        let lengths = |e: &[Example]| e.iter().map(|e| e.ids.len()).collect::<Vec<_>>();
        let mut sum = crc32fast::Hasher::new();
        for e in task.train.iter().chain(&task.validation) {
            sum.update(&(e.loss_from as u64).to_le_bytes());
            sum.update(bytemuck::cast_slice(&e.ids));
        }
        let prepared = Prepared {
            lengths: (lengths(&task.train), lengths(&task.validation)),
            settings: json!({}),
            checksum: sum.finalize(),
            task,
        };
        self.run.train(on, start, prepared, |run, validation| {
            self.run.save(run, &run.backend.values(&run.model.values)?)?;
            self.run.report(validation.as_ref())
        })
    }
}
