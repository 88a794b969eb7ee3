//! Policy-gradient training: rollouts by the engine, rewards, and clipped updates (PPO, arXiv
//! 1707.06347; GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740).
//!
//! A round continues prompts by the policy in training, scores the outputs, evaluates the tokens by
//! the policy, its value head and the reference policy, and trains on them. The reference is the
//! policy as the run began: only the layers that are trained exist twice, and the two change places
//! in the flat buffer for the reference's pass.

pub mod estimates;
pub mod experience;
mod metrics;
mod options;
pub mod rollout;
mod round;
mod state;

pub use metrics::{Curves, RoundMetrics};
pub use options::{Algorithm, PpoOptions};
pub use state::VALUE_HEAD;

use super::examples::epoch_order;
use super::monitors::{Action, Monitors};
use super::optimizer::AdamW;
use crate::checkpoint::Companions;
use crate::error::{Error, Result};
use crate::models::bloom::Bloom;
use crate::models::bloom::training::{TrainModel, Workspace};
use crate::ops::RolloutBackend;
use crate::rewards::{CombinedReward, Reward};
use crate::rewrite::Fidelity;
use crate::text::Tokenizer;
use estimates::{KlController, ScoreScaling};
use metrics::MetricsFile;
use rollout::PolicyPrompt;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// A policy-gradient run: what is trained, on what and how.
pub struct Ppo<'a, B: RolloutBackend> {
    /// The backend that computes.
    pub backend: &'a B,
    /// The policy, with a value head for [`Algorithm::Ppo`]; its parameters are updated in place.
    pub model: TrainModel<B::Flat>,
    /// Saved beside the weights.
    pub companions: Companions,
    /// The policy's vocabulary.
    pub tokenizer: &'a Tokenizer,
    /// What is continued in training.
    pub prompts: Vec<PolicyPrompt>,
    /// What is continued for samples to look at.
    pub samples: Vec<PolicyPrompt>,
    /// What outputs are rewarded for.
    pub reward: CombinedReward<'a>,
    /// A scorer that is not trained on, if there is one.
    pub watch: Option<Box<dyn Reward + 'a>>,
    /// Settings of the run.
    pub options: PpoOptions,
}

/// Told how the run goes; used for the progress bar.
pub trait PpoObserver {
    /// Called after each round of the `total` ones.
    fn round(&mut self, total: u64, metrics: &RoundMetrics);

    /// Called with what a monitor has to say.
    fn warn(&mut self, message: &str);
}

/// How a run ended.
#[derive(Debug, PartialEq)]
pub enum PpoOutcome {
    /// All rounds are done.
    Finished,
    /// Somebody asked to stop; the state was saved there.
    Stopped(PathBuf),
    /// A monitor stopped the run; the state was saved there.
    Alarmed {
        /// The checkpoint.
        folder: PathBuf,
        /// What the monitor said.
        message: String,
    },
}

/// What a run carries from round to round.
struct Trainer<B: RolloutBackend> {
    /// Generates by the parameters in training.
    policy: Bloom<B>,
    /// The trained layers as the run began.
    reference: B::Flat,
    optimizer: AdamW<B::Flat>,
    grads: B::Flat,
    sums: B::Sums,
    space: Workspace<B>,
    controller: KlController,
    scaling: ScoreScaling,
    monitors: Monitors,
    /// Scores of the data's own rewrites, by prompt.
    own_scores: HashMap<usize, Vec<f64>>,
    fidelity: Fidelity,
    /// Minibatches without a token to learn from.
    skipped: u64,
}

/// The text that the reference scores: `</s>` is meant to be taken off, but any of its characters
/// are, at both ends.
pub fn reference_text(text: &str) -> &str {
    text.trim_matches(['<', '/', 's', '>'])
}

impl<B: RolloutBackend> Ppo<'_, B> {
    /// Runs to the end, from the newest checkpoint if `resume`.
    ///
    /// # Errors
    /// If a file cannot be written, the device or a scorer fails, or a step diverges; the newest
    /// checkpoint stays.
    pub fn run(
        &mut self,
        resume: bool,
        stop: &AtomicBool,
        observer: &mut dyn PpoObserver,
    ) -> Result<PpoOutcome> {
        self.options.check()?;
        let checkpoints = self.options.output.join("checkpoints");
        let mut t = self.trainer()?;
        let mut done = if resume { self.restore(&checkpoints, &mut t)? } else { 0 };
        let mut file = MetricsFile::open(&self.options.output, done)?;
        if done == 0 {
            self.write_samples(&t, 0)?;
        }
        let total = self.options.rounds;
        while done < total {
            let metrics =
                self.round(done, &mut t).map_err(|e| self.with_checkpoint(e, &checkpoints))?;
            done += 1;
            let alarms = t.monitors.observe(&metrics.for_monitors());
            file.push(&metrics)?;
            observer.round(total, &metrics);
            alarms.iter().for_each(|a| observer.warn(&a.message));
            let alarm = alarms.into_iter().find(|a| a.action == Action::Stop);
            let due = |every: u64| done == total || (every > 0 && done.is_multiple_of(every));
            if due(self.options.sample_every) {
                self.write_samples(&t, done)?;
            }
            let stopping = stop.load(Ordering::Relaxed);
            if stopping || alarm.is_some() || due(self.options.save_every) {
                let folder = self.save(&checkpoints, &t, done)?;
                file.draw(&self.options.output)?;
                if let Some(alarm) = alarm {
                    return Ok(PpoOutcome::Alarmed { folder, message: alarm.message });
                }
                if stopping && done < total {
                    return Ok(PpoOutcome::Stopped(folder));
                }
            }
        }
        file.draw(&self.options.output)?;
        Ok(PpoOutcome::Finished)
    }

    fn trainer(&self) -> Result<Trainer<B>> {
        let (b, o, model) = (self.backend, &self.options, &self.model);
        b.supports(o.precision)?;
        let (trained, policy) = (model.trained(), model.config.parameter_count());
        let reference = b.parameters(b.read(&model.values, trained.start..policy)?.into_owned())?;
        let shard = std::iter::once(trained).collect();
        Ok(Trainer {
            policy: Bloom::of_parameters(b, &model.config, &model.values, o.rollout_dtype)?,
            reference,
            optimizer: AdamW::of_shard(b, &model.parameters(), o.optimizer, shard)?,
            grads: b.zeros(model.parameter_count())?,
            sums: b.new_sums()?,
            space: Workspace::with_recompute(o.recompute),
            controller: KlController {
                coefficient: o.kl_coefficient,
                target: o.kl_target,
                horizon: o.kl_horizon,
            },
            scaling: ScoreScaling {
                clip: o.reward_clip,
                running: o.scale_reward,
                ..ScoreScaling::default()
            },
            monitors: Monitors::new(o.monitors.clone())?,
            own_scores: HashMap::new(),
            fidelity: Fidelity::default(),
            skipped: 0,
        })
    }

    /// Which prompts a round continues: the data in an order that is a function of the seed alone.
    fn chosen(&self, round: u64) -> Vec<usize> {
        let (count, each) = (self.prompts.len() as u64, self.options.prompts_per_round() as u64);
        let mut order = (u64::MAX, Vec::new());
        let places = round * each..(round + 1) * each;
        places
            .map(|place| {
                let epoch = place / count;
                if order.0 != epoch {
                    order = (epoch, epoch_order(self.prompts.len(), self.options.seed, epoch));
                }
                order.1[(place % count) as usize]
            })
            .collect()
    }

    /// An error, with what is left of the run.
    fn with_checkpoint(&self, error: Error, checkpoints: &Path) -> Error {
        let Ok(mut list) = super::state::list(checkpoints) else { return error };
        match list.pop() {
            Some((_, folder)) => Error::invalid(format!(
                "{error}; the last good checkpoint is {}, --resume goes on from it",
                folder.display()
            )),
            None => error,
        }
    }

    /// Writes what the policy makes of the sample prompts after so many rounds.
    fn write_samples(&self, t: &Trainer<B>, done: u64) -> Result<()> {
        if self.samples.is_empty() {
            return Ok(());
        }
        let all: Vec<usize> = (0..self.samples.len()).collect();
        let model = (self.backend, &t.policy, self.tokenizer);
        let of = (&self.samples[..], &all[..]);
        // the same noise each time, so that what differs is the policy
        let rollouts = rollout::generate(model, of, (1, u64::MAX), &self.options.sampling)?;
        let folder = self.options.output.join("samples");
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        let path = folder.join(format!("round-{done:07}.txt"));
        crate::checkpoint::write_atomic(&path, |w| {
            for (prompt, rollout) in self.samples.iter().zip(&rollouts) {
                writeln!(w, "{}\n    {}\n", prompt.raw, rollout.text.replace('\n', " "))?;
            }
            Ok(())
        })
    }
}
