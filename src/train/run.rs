//! A supervised run: AdamW on the loss of batches of examples, resumable bit for bit, on as many
//! ranks as there are. What an example is, and its loss, is a [`Task`]'s.

use super::examples::epoch_order;
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
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct RunOptions {
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

/// What is learnt from examples.
pub trait Task<B: TrainBackend> {
    /// Examples of one forward and backward pass.
    type Batch;

    /// What a step's line in `metrics.jsonl` calls its loss, for the curve's caption.
    fn loss_name(&self) -> (&'static str, &'static str);

    /// Examples to train on.
    fn count(&self) -> usize;

    /// Tokens of one of them.
    fn tokens(&self, example: usize) -> usize;

    /// What it counts for: the loss of a batch is a mean over so many.
    fn labels(&self, example: usize) -> usize;

    /// Packs some examples into passes of at most `budget` tokens; one may exceed it alone.
    ///
    /// # Errors
    /// If the device has no memory for what is to be predicted.
    fn batches(&self, b: &B, examples: &[usize], budget: usize) -> Result<Vec<Self::Batch>>;

    /// Adds the loss of all labels of a batch to that of `sums`, and with `gradients` the scaled
    /// gradient of that sum to them.
    fn loss(
        &self,
        pass: Pass<B>,
        batch: &Self::Batch,
        gradients: Option<(f32, Backward<B::Flat>)>,
        sums: &mut B::Sums,
    );

    /// What the model does on the held-out examples, if there are any; the same on every rank.
    ///
    /// # Errors
    /// If the device fails, or another rank has ended.
    fn validate(&self, held_out: &mut HeldOut<B>) -> Result<Option<Validation>>;
}

/// What a pass over a batch reads, and its room.
pub struct Pass<'a, B: TrainBackend> {
    /// The backend that computes.
    pub backend: &'a B,
    /// The model.
    pub model: &'a TrainModel<B::Flat>,
    /// Precision of the matrix products.
    pub precision: Precision,
    /// Activations.
    pub space: &'a mut Workspace<B>,
}

/// What validation reads, and its room.
pub struct HeldOut<'a, B: TrainBackend> {
    /// The backend that computes.
    pub backend: &'a B,
    /// The connection to the other ranks.
    pub communicator: &'a dyn Communicator<B>,
    /// The model.
    pub model: &'a TrainModel<B::Flat>,
    /// Precision of the matrix products.
    pub precision: Precision,
    /// Maximum tokens of a pass.
    pub micro_tokens: usize,
    space: &'a mut Workspace<B>,
    /// Sums, which are zero.
    pub sums: &'a mut B::Sums,
}

impl<B: TrainBackend> HeldOut<'_, B> {
    /// A pass of the model.
    pub fn pass(&mut self) -> (Pass<'_, B>, &mut B::Sums) {
        let &mut HeldOut { backend, model, precision, .. } = self;
        (Pass { backend, model, precision, space: self.space }, self.sums)
    }

    /// Those of some examples with these lengths that this rank takes.
    pub fn own(&self, lengths: &[usize]) -> Vec<usize> {
        share(lengths, self.communicator.ranks()).swap_remove(self.communicator.rank())
    }
}

/// What a model does on held-out examples.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Validation {
    /// Mean loss a label.
    pub loss: f64,
    /// What else is measured, by name.
    pub measures: BTreeMap<String, f64>,
    /// Labels, and what was predicted, where there are numbers to predict.
    pub predictions: Vec<(f64, f64)>,
}

/// How a run ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// All steps were taken.
    Finished {
        /// What the model does on the held-out examples in the end, if there are any.
        validation: Option<Validation>,
    },
    /// Somebody asked to stop, on whichever rank; the state was saved there.
    Stopped(PathBuf),
}

/// A run: what is trained, on what and how.
pub struct Run<'a, B: TrainBackend, T: Task<B>> {
    /// The backend that computes.
    pub backend: &'a B,
    /// The connection to the other ranks; [`super::parallel::Alone`] if there are none. All ranks
    /// have the same model, examples and options, and rank 0 alone writes files.
    pub communicator: &'a dyn Communicator<B>,
    /// The model; its parameters are updated in place.
    pub model: TrainModel<B::Flat>,
    /// Saved beside the weights.
    pub companions: Companions,
    /// The examples, and their loss.
    pub task: T,
    /// Settings of the run.
    pub options: RunOptions,
}

impl<B: TrainBackend, T: Task<B>> Run<'_, B, T> {
    fn steps_per_epoch(&self) -> u64 {
        self.task.count().div_ceil(self.options.batch) as u64
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
        let names = self.task.loss_name();
        let draw = |m: &Option<Metrics>| m.as_ref().map_or(Ok(()), |m| m.draw(&curve, names));
        let total = self.total_steps();
        let warmup = (total as f64 * self.options.warmup).ceil() as u64;
        let per_epoch = self.steps_per_epoch();
        let mut scratch = self.scratch(buckets)?;
        let mut order = (u64::MAX, Vec::new());
        let mut validation = None;
        while done < total {
            let started = Instant::now();
            let epoch = done / per_epoch;
            if order.0 != epoch {
                order = (epoch, epoch_order(self.task.count(), self.options.seed, epoch));
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
            let validated = due(self.options.validate_every);
            if validated {
                validation = self.validate(&mut scratch)?;
            }
            let fresh = validation.as_ref().filter(|_| validated);
            let stepped = StepMetrics {
                step: done,
                epoch: done as f64 / per_epoch as f64,
                loss,
                learning_rate: rate,
                gradient_norm: norm,
                tokens,
                tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
                validation_loss: fresh.map(|v| v.loss),
                validation: fresh.map(|v| v.measures.clone()).unwrap_or_default(),
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
        Ok(Outcome::Finished { validation })
    }

    fn buckets(&self) -> Buckets {
        let (count, c) = (self.model.parameter_count(), self.communicator);
        Buckets::new(count, c.bucket_elements(), c.ranks())
    }

    fn optimizer(&self, buckets: &Buckets) -> Result<AdamW<B::Flat>> {
        let parameters = self.model.parameters();
        let shard = buckets.shard(self.communicator.rank());
        AdamW::of_shard(self.backend, &parameters, self.options.optimizer, shard)
    }

    fn scratch(&self, buckets: Buckets) -> Result<Scratch<B>> {
        self.backend.supports(self.options.precision)?;
        let grads = self.backend.zeros(self.model.parameter_count())?;
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
        let (b, c, task) = (self.backend, self.communicator, &self.task);
        let lengths: Vec<usize> = examples.iter().map(|&i| task.tokens(i)).collect();
        let own = share(&lengths, c.ranks()).swap_remove(c.rank());
        let own: Vec<usize> = own.into_iter().map(|i| examples[i]).collect();
        let batches = task.batches(b, &own, self.options.micro_tokens)?;
        let labels = examples.iter().map(|&i| task.labels(i)).sum::<usize>().max(1);
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
            let (model, precision) = (&self.model, self.options.precision);
            task.loss(
                Pass { backend: b, model, precision, space },
                batch,
                Some((scale, out)),
                sums,
            );
        }
        reduction.finish(grads)?;
        optimizer.squared_norm(b, grads, sums);
        c.all_reduce(b, sums)?;
        let size = StepSize { learning_rate: rate, max_norm: self.options.clip };
        optimizer.step(b, (&mut self.model.values, grads), size, sums);
        c.all_gather(b, &mut self.model.values, buckets)?;
        let sums = b.sums(sums)?;
        let tokens = lengths.iter().sum();
        Ok(Step { loss: sums.loss / labels as f64, norm: sums.norm(), tokens })
    }

    /// What the model does on the held-out examples.
    fn validate(&self, scratch: &mut Scratch<B>) -> Result<Option<Validation>> {
        self.backend.clear_sums(&mut scratch.sums);
        self.task.validate(&mut HeldOut {
            backend: self.backend,
            communicator: self.communicator,
            model: &self.model,
            precision: self.options.precision,
            micro_tokens: self.options.micro_tokens,
            space: &mut scratch.space,
            sums: &mut scratch.sums,
        })
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
    /// Mean loss a label.
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
