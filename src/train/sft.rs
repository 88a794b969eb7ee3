//! Supervised fine-tuning: cross-entropy on the target and `</s>`, AdamW, resumable bit for bit, on
//! as many ranks as there are.

use super::examples::{Example, epoch_order, pack};
use super::optimizer::{AdamW, AdamWOptions, StepSize};
use super::parallel::buckets::Buckets;
use super::parallel::{Communicator, GradientReduction, share};
use super::report::{Metrics, StepMetrics};
use super::schedule::Schedule;
use super::state::{self, RunState, Saved};
use crate::checkpoint::Companions;
use crate::error::{Error, Result};
use crate::files::as_read;
use crate::models::bloom::training::{Backward, Recompute, TrainModel, Workspace};
use crate::ops::train::{Precision, TrainBackend};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Settings of a fine-tuning run.
#[derive(Clone, Debug)]
pub struct SftOptions {
    /// Settings of AdamW.
    pub optimizer: AdamWOptions,
    /// Learning rate at the end of the warm-up.
    pub learning_rate: f64,
    /// How the learning rate goes on from there.
    pub schedule: Schedule,
    /// Part of all steps that warms up.
    pub warmup: f64,
    /// Largest norm of the gradient.
    pub clip: f32,
    /// Passes over the training examples; may be a fraction.
    pub epochs: f64,
    /// Ends the run earlier; 0 for no limit.
    pub max_steps: u64,
    /// Sequences of one optimizer step, over all ranks.
    pub batch: usize,
    /// Maximum tokens of one forward and backward pass; a step takes as many passes as it needs.
    pub micro_tokens: usize,
    /// Precision of the matrix products.
    pub precision: Precision,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Seed of the order of the examples.
    pub seed: u64,
    /// Steps between checkpoints; 0 for none but at the end.
    pub save_every: u64,
    /// Steps between validations; 0 for none but at the end.
    pub validate_every: u64,
    /// Newest checkpoints that are kept, at least one.
    pub keep: usize,
    /// Folder of the run.
    pub output: PathBuf,
    /// Settings that a resumed run must share.
    pub settings: serde_json::Value,
}

/// Told about each step, on rank 0; used for the progress bar.
pub trait Observer {
    /// Called after each step of the `total` ones.
    fn step(&mut self, total: u64, metrics: &StepMetrics);
}

/// How a run ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// All steps were taken.
    Finished {
        /// Mean cross-entropy a label over the held-out examples, in nats, if it was computed.
        validation_loss: Option<f64>,
    },
    /// Somebody asked to stop, on whichever rank; the state was saved there.
    Stopped(PathBuf),
}

/// A fine-tuning run: what is trained, on what and how.
pub struct Sft<'a, B: TrainBackend> {
    /// The backend that computes.
    pub backend: &'a B,
    /// The connection to the other ranks; [`super::parallel::Alone`] if there are none. All ranks
    /// have the same model, examples and options, and rank 0 alone writes files.
    pub communicator: &'a dyn Communicator<B>,
    /// The model; its parameters are updated in place.
    pub model: TrainModel<B::Flat>,
    /// Saved beside the weights.
    pub companions: Companions,
    /// Examples that are trained on.
    pub train: Vec<Example>,
    /// Held-out examples; may be empty.
    pub validation: Vec<Example>,
    /// Settings of the run.
    pub options: SftOptions,
}

impl<B: TrainBackend> Sft<'_, B> {
    fn steps_per_epoch(&self) -> u64 {
        self.train.len().div_ceil(self.options.batch) as u64
    }

    /// All optimizer steps of the run.
    pub fn total_steps(&self) -> u64 {
        let steps = ((self.steps_per_epoch() as f64 * self.options.epochs).ceil() as u64).max(1);
        if self.options.max_steps > 0 { steps.min(self.options.max_steps) } else { steps }
    }

    /// Runs to the end, from the newest checkpoint if `resume`, which all ranks read.
    ///
    /// # Errors
    /// If a file cannot be written, the device fails, a step diverges, or another rank has ended.
    pub fn run(
        &mut self,
        resume: bool,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Outcome> {
        let checkpoints = self.options.output.join("checkpoints");
        let buckets = self.buckets();
        let mut optimizer = self.optimizer(&buckets)?;
        let mut done = if resume { self.restore(&checkpoints, &mut optimizer)? } else { 0 };
        let mut metrics = self.metrics(done)?;
        let curve = self.options.output.join("loss.svg");
        let draw = |m: &Option<Metrics>| m.as_ref().map_or(Ok(()), |m| m.draw(&curve));
        let total = self.total_steps();
        let warmup = (total as f64 * self.options.warmup).ceil() as u64;
        let per_epoch = self.steps_per_epoch();
        let mut scratch = self.scratch(buckets)?;
        let mut order = (u64::MAX, Vec::new());
        let mut validation_loss = None;
        while done < total {
            let started = Instant::now();
            let epoch = done / per_epoch;
            if order.0 != epoch {
                order = (epoch, epoch_order(self.train.len(), self.options.seed, epoch));
            }
            let first = (done % per_epoch) as usize * self.options.batch;
            let chosen = &order.1[first..(first + self.options.batch).min(order.1.len())];
            let rate =
                self.options.learning_rate * self.options.schedule.factor(done, warmup, total);
            let Step { loss, norm, tokens } =
                self.step(chosen, &mut scratch, &mut optimizer, rate as f32)?;
            if !loss.is_finite() || !norm.is_finite() {
                draw(&metrics)?;
                return Err(Error::invalid(self.diverged(done + 1, loss, norm)?));
            }
            done += 1;
            let due = |every: u64| done == total || (every > 0 && done.is_multiple_of(every));
            if due(self.options.validate_every) && !self.validation.is_empty() {
                validation_loss = Some(self.validation_loss(&mut scratch)?);
            }
            let stepped = StepMetrics {
                step: done,
                epoch: done as f64 / per_epoch as f64,
                loss,
                learning_rate: rate,
                gradient_norm: norm,
                tokens,
                tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
                validation_loss: validation_loss.filter(|_| due(self.options.validate_every)),
            };
            if let Some(metrics) = &mut metrics {
                observer.step(total, &stepped);
                metrics.push(stepped)?;
            }
            let stopping = self.any(stop.load(Ordering::Relaxed))?;
            if stopping || due(self.options.save_every) {
                let folder = self.save(&checkpoints, (&optimizer, &scratch.buckets), done)?;
                draw(&metrics)?;
                // a launcher may end all ranks as soon as one of them ends
                self.any(false)?;
                if stopping && done < total {
                    return Ok(Outcome::Stopped(folder));
                }
            }
        }
        draw(&metrics)?;
        Ok(Outcome::Finished { validation_loss })
    }

    fn buckets(&self) -> Buckets {
        let (count, c) = (self.model.config.parameter_count(), self.communicator);
        Buckets::new(count, c.bucket_elements(), c.ranks())
    }

    fn optimizer(&self, buckets: &Buckets) -> Result<AdamW<B::Flat>> {
        let parameters = self.model.config.parameters();
        let shard = buckets.shard(self.communicator.rank());
        AdamW::of_shard(self.backend, &parameters, self.options.optimizer, shard)
    }

    fn scratch(&self, buckets: Buckets) -> Result<Scratch<B>> {
        self.backend.supports(self.options.precision)?;
        let grads = self.backend.zeros(self.model.config.parameter_count())?;
        let space = Workspace::with_recompute(self.options.recompute);
        Ok(Scratch { space, grads, sums: self.backend.new_sums()?, buckets })
    }

    /// The run's metrics, on the rank that writes them.
    fn metrics(&self, done: u64) -> Result<Option<Metrics>> {
        let path = self.options.output.join("metrics.jsonl");
        (self.communicator.rank() == 0).then(|| Metrics::open(&path, done)).transpose()
    }

    /// Whether it is so on any of the ranks.
    fn any(&self, here: bool) -> Result<bool> {
        let all = self.communicator.exchange(vec![here as u8])?;
        Ok(all.iter().any(|there| there == &[1]))
    }

    /// Writes a checkpoint after `step` steps, on rank 0; returns its folder.
    fn save(
        &self,
        checkpoints: &Path,
        (optimizer, buckets): (&AdamW<B::Flat>, &Buckets),
        step: u64,
    ) -> Result<PathBuf> {
        let (b, c) = (self.backend, self.communicator);
        let first = state::gather_moments(b, c, buckets, &optimizer.first)?;
        let second = state::gather_moments(b, c, buckets, &optimizer.second)?;
        let (Some(first), Some(second)) = (first, second) else {
            return Ok(state::step_folder(checkpoints, step));
        };
        let state = RunState { step, settings: self.options.settings.clone() };
        let values = b.values(&self.model.values)?;
        let (config, companions) = (&self.model.config, &self.companions);
        let saved = Saved { config, companions, values, first, second };
        state::save(checkpoints, &saved, &state, self.options.keep)
    }

    /// The folder of the newest checkpoint that rank 0 sees, if there is one.
    fn newest_checkpoint(&self, checkpoints: &Path) -> Result<Option<PathBuf>> {
        let newest = state::list(checkpoints)?.pop().map_or(u64::MAX, |(step, _)| step);
        let seen = self.communicator.exchange(newest.to_le_bytes().to_vec())?;
        let first = seen[0].as_slice().try_into().map(u64::from_le_bytes);
        let step = first.map_err(|_| Error::Internal("rank 0 sent no step".into()))?;
        Ok((step != u64::MAX).then(|| state::step_folder(checkpoints, step)))
    }

    /// Takes up the newest checkpoint, if there is one; returns the steps that it had taken.
    fn restore(&mut self, checkpoints: &Path, optimizer: &mut AdamW<B::Flat>) -> Result<u64> {
        let Some(folder) = self.newest_checkpoint(checkpoints)? else { return Ok(0) };
        if self.communicator.rank() > 0 && !folder.is_dir() {
            let what = "is not there, but rank 0 has it; all ranks have to see the output folder";
            return Err(Error::file(&folder, what));
        }
        let saved = state::load(&folder, self.backend, &mut self.model, optimizer)?;
        if saved.settings != as_read(&self.options.settings) {
            return Err(Error::file(
                &folder,
                format!(
                    "was trained with other settings ({}); --resume needs the same ones",
                    difference(&saved.settings, &as_read(&self.options.settings))
                ),
            ));
        }
        Ok(saved.step)
    }

    /// A step of the optimizer by the gradient of the mean loss over the labels of some examples.
    fn step(
        &mut self,
        examples: &[usize],
        scratch: &mut Scratch<B>,
        optimizer: &mut AdamW<B::Flat>,
        rate: f32,
    ) -> Result<Step> {
        let (b, c) = (self.backend, self.communicator);
        let examples: Vec<&Example> = examples.iter().map(|&i| &self.train[i]).collect();
        let batches = pack(self.own(&examples).into_iter(), self.options.micro_tokens);
        let labels = examples.iter().map(|e| e.labels()).sum::<usize>().max(1);
        let Scratch { space, grads, sums, buckets } = scratch;
        b.clear(grads);
        b.clear_sums(sums);
        let scale = 1.0 / labels as f32;
        let mut reduction = GradientReduction::new(b, c, buckets);
        for (i, batch) in batches.iter().enumerate() {
            // what the last pass does not touch any more is summed over the ranks meanwhile
            let mut finished = |grads: &mut B::Flat, first| {
                if i + 1 == batches.len() {
                    reduction.finished_from(grads, first);
                }
            };
            let out = Backward::to(grads).on_finished(&mut finished);
            self.model.loss(b, (self.options.precision, batch), space, Some((scale, out)), sums);
        }
        reduction.finish(grads)?;
        optimizer.squared_norm(b, grads, sums);
        c.all_reduce(b, sums)?;
        let size = StepSize { learning_rate: rate, max_norm: self.options.clip };
        optimizer.step(b, (&mut self.model.values, grads), size, sums);
        c.all_gather(b, &mut self.model.values, buckets)?;
        let sums = b.sums(sums)?;
        let tokens = examples.iter().map(|e| e.ids.len()).sum();
        Ok(Step { loss: sums.loss / labels as f64, norm: sums.norm(), tokens })
    }

    /// Those of some examples that this rank takes.
    fn own<'e>(&self, examples: &[&'e Example]) -> Vec<&'e Example> {
        let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
        let own = share(&lengths, self.communicator.ranks()).swap_remove(self.communicator.rank());
        own.into_iter().map(|i| examples[i]).collect()
    }

    /// Mean cross-entropy a label over the held-out examples.
    fn validation_loss(&self, scratch: &mut Scratch<B>) -> Result<f64> {
        let b = self.backend;
        let examples: Vec<&Example> = self.validation.iter().collect();
        let labels = examples.iter().map(|e| e.labels()).sum::<usize>();
        b.clear_sums(&mut scratch.sums);
        for batch in pack(self.own(&examples).into_iter(), self.options.micro_tokens) {
            let batch = (self.options.precision, &batch);
            self.model.loss(b, batch, &mut scratch.space, None, &mut scratch.sums);
        }
        self.communicator.all_reduce(b, &mut scratch.sums)?;
        Ok(b.sums(&scratch.sums)?.loss / labels.max(1) as f64)
    }

    fn diverged(&self, step: u64, loss: f64, norm: f64) -> Result<String> {
        let kept = match state::list(&self.options.output.join("checkpoints"))?.pop() {
            Some((_, folder)) => format!("the last good checkpoint is {}", folder.display()),
            None => "no checkpoint had been written yet".into(),
        };
        Ok(format!(
            "step {step}: loss {loss}, gradient norm {norm}; {kept}; lower --learning-rate or \
            --clip, or raise --warmup"
        ))
    }
}

/// What a run needs in every step.
struct Scratch<B: TrainBackend> {
    space: Workspace<B>,
    grads: B::Flat,
    sums: B::Sums,
    buckets: Buckets,
}

/// What a step of the optimizer was like.
struct Step {
    /// Mean cross-entropy a label.
    loss: f64,
    /// Norm of its gradient, before clipping.
    norm: f64,
    tokens: usize,
}

/// The names of settings whose values differ.
pub(crate) fn difference(a: &serde_json::Value, b: &serde_json::Value) -> String {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return "all".into() };
    let names =
        a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))).filter(|k| a.get(*k) != b.get(*k));
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}
