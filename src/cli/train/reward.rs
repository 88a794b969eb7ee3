//! `bprompt train reward`: reward models that read text.

use super::super::print::note;
use super::super::ranks::Ranks;
use super::run::{Prepared, RunArgs, Supervised};
use super::start::{Start, StartArgs};
use crate::data::scored::{ScoredRecords, read_scored};
use crate::models::bloom::Architecture;
use crate::ops::train::TrainBackend;
use crate::rewards::reward_tokens;
use crate::text::template::RewardTemplate;
use crate::train::parallel::Communicator;
use crate::train::report::draw_calibration;
use crate::train::reward::{Normalization, RewardExamples, RewardTask, fold_normalization};
use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct RewardArgs {
    /// Texts and their scores: records with "prompt", maybe "raw_prompt", and numbers, or with
    /// "chosen" and "rejected" (.jsonl or a .json array).
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Held-out records of the same kind.
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// The field that holds the score; a file may have several. Without, the records are
    /// preferences.
    #[arg(long, value_name = "FIELD")]
    label: Option<String>,
    /// Learn scores in standard deviations from their mean, which a small set of data needs; the
    /// model that is written gives them in their own unit all the same.
    #[arg(long)]
    normalize_labels: bool,
    #[command(flatten)]
    start: StartArgs,
    /// What the model reads: aesthetic (the prompt alone), pickscore (with the plain prompt before
    /// it) or a file with {prompt}, and maybe {raw}, in it. By default the model's own if it is a
    /// reward model, else aesthetic.
    #[arg(long, value_name = "NAME|FILE")]
    input: Option<String>,
    #[command(flatten)]
    run: RunArgs,
}

impl RewardArgs {
    pub fn run(self) -> anyhow::Result<()> {
        self.run_supervised()
    }

    fn template(&self, start: &Start) -> anyhow::Result<RewardTemplate> {
        let own = start.own_template().filter(|_| start.was_reward_model);
        Ok(match (&self.input, own) {
            (Some(name), _) => RewardTemplate::named(name)?,
            (None, Some(file)) => RewardTemplate::read(&file)?,
            (None, None) => RewardTemplate::named("aesthetic")?,
        })
    }

    fn read(
        &self,
        path: &Path,
        start: &Start,
        template: &RewardTemplate,
    ) -> anyhow::Result<RewardExamples> {
        let records = read_scored(path, self.label.as_deref())?;
        let mut cut = 0;
        let mut ids = |i: usize, raw: &Option<String>, prompt: &str| {
            ensure!(
                raw.is_some() || !template.reads_raw_prompt(),
                "{}: record {} has no \"raw_prompt\", which --input puts before the prompt",
                path.display(),
                i + 1
            );
            let text = template.apply(raw.as_deref().unwrap_or_default(), prompt);
            let vocabulary = (&start.tokenizer, start.model.config.eos_token_id);
            let tokens = reward_tokens(vocabulary, &text, self.run.max_tokens)?;
            cut += usize::from(tokens.cut);
            Ok(tokens.ids)
        };
        let examples = match &records {
            ScoredRecords::Labelled(list) => {
                let list = list.iter().enumerate();
                let list = list.map(|(i, r)| Ok((ids(i, &r.raw_prompt, &r.prompt)?, r.label)));
                RewardExamples::Labelled(list.collect::<anyhow::Result<_>>()?)
            }
            ScoredRecords::Preferences(list) => {
                let pairs = list.iter().enumerate().map(|(i, r)| {
                    let chosen = ids(i, &r.raw_prompt, &r.chosen)?;
                    Ok([chosen, ids(i, &r.raw_prompt, &r.rejected)?])
                });
                RewardExamples::Preferences(pairs.collect::<anyhow::Result<_>>()?)
            }
        };
        if cut > 0 {
            note!(
                "{}: cut the beginnings of {cut} texts that have more than --max-tokens {}",
                path.display(),
                self.run.max_tokens
            );
        }
        Ok(examples)
    }
}

impl Supervised for RewardArgs {
    type Examples = RewardTask;

    fn args(&self) -> &RunArgs {
        &self.run
    }

    fn start(&self, ranks: &Ranks) -> anyhow::Result<Start> {
        self.start.start(&self.run, ranks, Architecture::SequenceClassification)
    }

    fn examples(&self, start: &mut Start) -> anyhow::Result<RewardTask> {
        let template = self.template(start)?;
        start.companions.set("template.txt", format!("{}\n", template.text()));
        let train = self.read(&self.data, start, &template)?;
        let validation = match &self.validation {
            Some(path) => self.read(path, start, &template)?,
            None => RewardExamples::Labelled(vec![]),
        };
        let normalization = match &train {
            RewardExamples::Labelled(list) if self.normalize_labels => {
                Normalization::of(&list.iter().map(|l| l.1).collect::<Vec<_>>())
            }
            _ => Normalization::NONE,
        };
        Ok(RewardTask { train, validation, normalization })
    }

    fn train_on<B: TrainBackend>(
        &self,
        on: (&B, Box<dyn Communicator<B>>),
        start: Start,
        task: RewardTask,
    ) -> anyhow::Result<()> {
        let lengths = |e: &RewardExamples| (0..e.len()).map(|i| e.tokens(i)).collect::<Vec<_>>();
        let normalization = task.normalization;
        let prepared = Prepared {
            lengths: (lengths(&task.train), lengths(&task.validation)),
            settings: json!({ "label": self.label, "normalization": normalization }),
            checksum: task.checksum(),
            task,
        };
        self.run.train(on, start, prepared, |run, validation| {
            let mut values = run.backend.values(&run.model.values)?.into_owned();
            fold_normalization(&mut values, &run.model.config, normalization);
            if let Some(v) = validation.as_ref().filter(|v| !v.predictions.is_empty()) {
                draw_calibration(&self.run.output.join("calibration.svg"), &v.predictions)
                    .context("calibration.svg")?;
            }
            self.run.save(run, &values)?;
            self.run.report(validation.as_ref())
        })
    }
}
