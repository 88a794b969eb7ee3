//! One round: rollouts, rewards, the tokens' numbers, updates.

use super::estimates::{gae, grpo, rloo, token_rewards};
use super::experience::{
    LossStats, MicroBatch, Targets, TokenNumbers, TokenTerms, explained, pack,
};
use super::metrics::{RoundMetrics, TextStats};
use super::rollout::{Rollout, generate};
use super::{Algorithm, Ppo, Trainer, reference_text};
use crate::error::{Error, Result};
use crate::models::bloom::training::{Backward, Objective};
use crate::ops::RolloutBackend;
use crate::ops::scalar_loss::{ClippedValue, ScalarLoss};
use crate::ops::token_loss::{ClippedPpo, LossOutput, TokenLoss};
use crate::random::PhiloxStream;
use crate::rewards::{CombinedScores, ScoredText};
use crate::train::optimizer::StepSize;
use std::time::Instant;

/// Streams of random numbers beside the epochs' orders.
const MINIBATCHES: u64 = 1 << 40;

/// What the rollouts of a round are worth.
struct Estimates {
    advantages: Vec<Vec<f64>>,
    returns: Vec<Vec<f64>>,
    /// Divergence from the reference, of each token.
    kl: Vec<Vec<f64>>,
    /// Sum of a response's penalties.
    penalties: Vec<f64>,
}

/// What the updates of a round found.
#[derive(Default)]
struct Updates {
    stats: LossStats,
    gradient_norm: f64,
    steps: u64,
}

impl<B: RolloutBackend> Ppo<'_, B> {
    pub(super) fn round(&mut self, round: u64, t: &mut Trainer<B>) -> Result<RoundMetrics> {
        let started = Instant::now();
        let chosen = self.chosen(round);
        let model = (self.backend, &t.policy, self.tokenizer);
        let prompts = (&self.prompts[..], &chosen[..]);
        let rollouts =
            generate(model, prompts, (self.options.group, round), &self.options.sampling)?;
        let generated = started.elapsed();
        let (scores, watched) = self.score(&rollouts, t)?;
        let scored = started.elapsed();
        let mut minibatches = self.minibatches(round, &rollouts);
        let numbers = self.evaluate(&mut minibatches, &rollouts, t)?;
        let mut scaled = scores.total.clone();
        t.scaling.apply(&mut scaled);
        let estimates = self.estimate(&rollouts, &numbers, (&scores, &scaled), t);
        self.upload(&mut minibatches, &rollouts, &numbers, &estimates)?;
        let divergences: Vec<f64> = estimates.kl.iter().map(|kl| kl.iter().sum()).collect();
        let divergence = mean(&divergences);
        let coefficient = t.controller.coefficient;
        let rate = self.learning_rate(round);
        let updates = self.update(&mut minibatches, (round, rate), (&rollouts, divergence), t)?;
        if !self.options.repeat_minibatch {
            t.controller.update(divergence, rollouts.len());
        }
        let refresh = (self.options.rollout_dtype, self.model.frozen_layers());
        t.policy.refresh(self.backend, &self.model.values, refresh)?;
        let ended = started.elapsed();
        let text = TextStats::of(&self.prompts, &rollouts, &t.fidelity);
        let mut m = RoundMetrics::new(round + 1);
        m.scores(&scores, self.reward.names(), watched.as_deref());
        m.text(&text, &rollouts);
        if self.options.group > 1 {
            let groups = scores.total.chunks_exact(self.options.group);
            let equal = |group: &[f64]| f64::from(group.iter().all(|s| *s == group[0]));
            m.set("frac_reward_zero_std", mean(&groups.map(equal).collect::<Vec<_>>()));
        }
        m.set("objective/kl", divergence);
        m.set("objective/entropy", entropy_of_responses(&numbers));
        m.set("objective/non_score_reward", mean(&estimates.penalties));
        m.set("objective/rlhf_reward", mean(&scaled) + mean(&estimates.penalties));
        m.set("kl_coefficient", coefficient);
        m.set("critic/explained_var", explained(&numbers, &estimates.returns));
        self.losses(&mut m, &updates);
        m.mismatch(&rollouts, &numbers);
        m.set("lr", rate);
        m.set("episode", ((round + 1) * rollouts.len() as u64) as f64);
        m.set("skipped_minibatches", t.skipped as f64);
        let tokens: usize = rollouts.iter().map(|r| r.response.len()).sum();
        m.times(tokens, [generated, scored - generated, ended - scored, started.elapsed() - ended]);
        Ok(m)
    }

    fn learning_rate(&self, round: u64) -> f64 {
        let (o, total) = (&self.options, self.options.rounds);
        let warmup = (total as f64 * o.warmup).ceil() as u64;
        // the first round warms up too: a rate of zero would waste it
        o.learning_rate * o.schedule.factor(round + u64::from(warmup > 0), warmup, total + 1)
    }

    /// Scores of the outputs, minus those of the data's own rewrites if so wanted; and what the
    /// scorer says that is not trained on.
    fn score(
        &mut self,
        rollouts: &[Rollout],
        t: &mut Trainer<B>,
    ) -> Result<(CombinedScores, Option<Vec<f64>>)> {
        let quirks = self.options.reference_quirks;
        let of = |raw_prompt, text| {
            let output = if quirks { reference_text(text) } else { text };
            ScoredText { raw_prompt, output }
        };
        let prompts = &self.prompts;
        let texts: Vec<ScoredText> =
            rollouts.iter().map(|r| of(prompts[r.prompt].raw.as_str(), r.text.as_str())).collect();
        let mut parts = self.reward.parts(&texts)?;
        if self.options.delta_reward {
            let mut missing: Vec<usize> = rollouts.iter().map(|r| r.prompt).collect();
            missing.sort_unstable();
            missing.dedup();
            missing.retain(|p| !t.own_scores.contains_key(p));
            let own = |p: &usize| {
                of(&prompts[*p].raw, prompts[*p].reference.as_deref().unwrap_or_default())
            };
            let own: Vec<ScoredText> = missing.iter().map(own).collect();
            if !own.is_empty() {
                let own = self.reward.parts(&own)?;
                for (i, p) in missing.into_iter().enumerate() {
                    t.own_scores.insert(p, own.iter().map(|part| part[i]).collect());
                }
            }
            for (part, scores) in parts.iter_mut().enumerate() {
                let own = rollouts.iter().map(|r| t.own_scores[&r.prompt][part]);
                scores.iter_mut().zip(own).for_each(|(score, own)| *score -= own);
            }
        }
        let mut scores = self.reward.combine(parts)?;
        if quirks && !self.options.delta_reward {
            // a length term was meant; it is the batch's size for everybody, and cancels where the
            // score of the data's own rewrite is taken off
            scores.total.iter_mut().for_each(|s| *s += 0.01 * rollouts.len() as f64);
        }
        let watched = self.watch.as_mut().map(|w| w.score(&texts)).transpose()?;
        Ok((scores, watched))
    }

    /// The round's rollouts in minibatches, each in passes. Which are together is drawn once a
    /// round, so that what the frozen layers give is computed once.
    fn minibatches(&self, round: u64, rollouts: &[Rollout]) -> Vec<Vec<MicroBatch<B>>> {
        let mut order: Vec<usize> = (0..rollouts.len()).collect();
        PhiloxStream::new(self.options.seed, MINIBATCHES + round).shuffle(&mut order);
        order
            .chunks(self.options.minibatch)
            .map(|chosen| pack((&self.prompts, rollouts), chosen, self.options.micro_tokens))
            .collect()
    }

    /// What the policy, its value head and the reference policy say of all tokens.
    fn evaluate(
        &mut self,
        minibatches: &mut [Vec<MicroBatch<B>>],
        rollouts: &[Rollout],
        t: &mut Trainer<B>,
    ) -> Result<Vec<TokenNumbers>> {
        let b = self.backend;
        let mut numbers = vec![TokenNumbers::default(); rollouts.len()];
        let has_values = self.options.algorithm == Algorithm::Ppo;
        b.clear_sums(&mut t.sums);
        for micro in minibatches.iter_mut().flatten() {
            self.statistics(micro, t);
            micro.download(b, &micro.stats.log_probs, rollouts, |i, x| {
                numbers[i].log_probs = x.to_vec();
            })?;
            micro.download(b, &micro.stats.entropies, rollouts, |i, x| {
                numbers[i].entropies = x.to_vec();
            })?;
            if has_values {
                micro
                    .download(b, &micro.values, rollouts, |i, x| numbers[i].values = x.to_vec())?;
            }
        }
        let first = self.model.trained().start;
        b.swap(&mut self.model.values, first, &mut t.reference);
        let mut evaluated = Ok(());
        for micro in minibatches.iter_mut().flatten() {
            self.statistics(micro, t);
            let taken = micro.download(b, &micro.stats.log_probs, rollouts, |i, x| {
                numbers[i].reference = x.to_vec();
            });
            evaluated = evaluated.and(taken);
        }
        // also after an error: the parameters in training are what a checkpoint is made of
        b.swap(&mut self.model.values, first, &mut t.reference);
        evaluated.map(|()| numbers)
    }

    /// A pass without gradients.
    fn statistics(&self, micro: &mut MicroBatch<B>, t: &mut Trainer<B>) {
        let frozen = self.model.frozen_layers();
        if let Some(trunk) = micro.trunk.take() {
            t.space.put_trunk(frozen, trunk);
        }
        let objective =
            Objective { tokens: Some(&TokenLoss::CrossEntropy { scale: 0.0 }), scalars: None };
        let stats = Some(&mut micro.stats);
        let to = LossOutput { sums: &mut t.sums, stats, gradients: None };
        let batch = (self.options.precision, &micro.packed);
        self.model.objective(self.backend, batch, &mut t.space, &objective, to);
        micro.values = t.space.take_scalars();
        if frozen > 0 {
            micro.trunk = Some(t.space.take_trunk(frozen));
        }
    }

    /// Advantages and returns of all tokens.
    fn estimate(
        &self,
        rollouts: &[Rollout],
        numbers: &[TokenNumbers],
        (scores, scaled): (&CombinedScores, &[f64]),
        t: &Trainer<B>,
    ) -> Estimates {
        let o = &self.options;
        let coefficient = if o.kl_in_loss { 0.0 } else { t.controller.coefficient };
        let estimate = |estimator: super::estimates::KlEstimator, n: &TokenNumbers| -> Vec<f64> {
            let pairs = n.log_probs.iter().zip(&n.reference);
            pairs.map(|(l, r)| estimator.of((l - r) as f64)).collect()
        };
        let kl: Vec<Vec<f64>> = numbers.iter().map(|n| estimate(o.kl_estimator, n)).collect();
        let sum = |kl: &Vec<f64>| -coefficient * kl.iter().sum::<f64>();
        let penalties: Vec<f64> = kl.iter().map(sum).collect();
        let constant = |of: &[f64]| -> Vec<Vec<f64>> {
            rollouts.iter().zip(of).map(|(r, a)| vec![*a; r.response.len()]).collect()
        };
        let (mut advantages, returns) = match o.algorithm {
            Algorithm::Ppo => {
                let pairs = kl.iter().zip(scaled).zip(numbers).map(|((kl, score), n)| {
                    let rewards = token_rewards(kl, coefficient, *score);
                    let values: Vec<f64> = n.values.iter().map(|v| *v as f64).collect();
                    gae(&rewards, &values, o.gamma, o.lambda)
                });
                pairs.unzip()
            }
            Algorithm::Grpo => {
                // each reward counts within its group before they are summed
                let mut sum = vec![0.0; rollouts.len()];
                for (part, weight) in scores.parts.iter().zip(self.reward.weights()) {
                    let of = part.chunks_exact(o.group).flat_map(grpo);
                    sum.iter_mut().zip(of).for_each(|(s, a)| *s += weight * a);
                }
                (constant(&sum), Vec::new())
            }
            Algorithm::Rloo => {
                let totals: Vec<f64> = scaled.iter().zip(&penalties).map(|(s, p)| s + p).collect();
                let of: Vec<f64> = totals.chunks_exact(o.group).flat_map(rloo).collect();
                (constant(&of), Vec::new())
            }
        };
        if o.algorithm == Algorithm::Ppo {
            o.whitening.apply(&mut advantages);
        }
        self.weigh(rollouts, numbers, &mut advantages);
        Estimates { advantages, returns, kl, penalties }
    }

    /// Where other weights have sampled than those in training, a token counts by how much likelier
    /// these make it, up to a limit (truncated importance sampling).
    fn weigh(&self, rollouts: &[Rollout], numbers: &[TokenNumbers], advantages: &mut [Vec<f64>]) {
        if self.options.rollout_dtype != crate::tensor::DType::Int8 {
            return;
        }
        for ((r, n), advantages) in rollouts.iter().zip(numbers).zip(advantages) {
            for ((a, new), old) in advantages.iter_mut().zip(&n.log_probs).zip(&r.log_probs) {
                *a *= ((new - old) as f64).exp().min(self.options.importance_cap);
            }
        }
    }

    fn upload(
        &self,
        minibatches: &mut [Vec<MicroBatch<B>>],
        rollouts: &[Rollout],
        numbers: &[TokenNumbers],
        estimates: &Estimates,
    ) -> Result<()> {
        let b = self.backend;
        let f32s = |lists: &[Vec<f64>]| -> Vec<Vec<f32>> {
            lists.iter().map(|l| l.iter().map(|x| *x as f32).collect()).collect()
        };
        let (advantages, returns) = (f32s(&estimates.advantages), f32s(&estimates.returns));
        debug_assert!(rollouts.iter().zip(&advantages).all(|(r, a)| r.response.len() == a.len()));
        for micro in minibatches.iter_mut().flatten() {
            let MicroBatch { rollouts, targets, .. } = micro;
            let Targets { old_log_probs, advantages: a, reference, old_values, returns: r } =
                targets;
            MicroBatch::upload(b, rollouts, old_log_probs, |i| &numbers[i].log_probs)?;
            MicroBatch::upload(b, rollouts, a, |i| &advantages[i])?;
            MicroBatch::upload(b, rollouts, reference, |i| &numbers[i].reference)?;
            if self.options.algorithm == Algorithm::Ppo {
                MicroBatch::upload(b, rollouts, old_values, |i| &numbers[i].values)?;
                MicroBatch::upload(b, rollouts, r, |i| &returns[i])?;
            }
        }
        Ok(())
    }

    /// All passes over the round's minibatches.
    fn update(
        &mut self,
        minibatches: &mut [Vec<MicroBatch<B>>],
        (round, rate): (u64, f64),
        (rollouts, divergence): (&[Rollout], f64),
        t: &mut Trainer<B>,
    ) -> Result<Updates> {
        let (count, epochs) = (minibatches.len(), self.options.epochs);
        let mut order: Vec<usize> = Vec::with_capacity(count * epochs);
        if self.options.repeat_minibatch {
            order.extend((0..count).flat_map(|i| std::iter::repeat_n(i, epochs)));
        } else {
            let mut random = PhiloxStream::new(self.options.seed, 2 * MINIBATCHES + round);
            for _ in 0..epochs {
                let mut epoch: Vec<usize> = (0..count).collect();
                random.shuffle(&mut epoch);
                order.extend(epoch);
            }
        }
        let mut updates = Updates::default();
        for i in order {
            let minibatch = &mut minibatches[i];
            let tokens: usize = minibatch.iter().map(|m| m.packed.labels.len()).sum();
            if tokens == 0 {
                t.skipped += 1;
                continue;
            }
            let norm = self.step(minibatch, tokens, rate, t).map_err(|e| match e {
                Error::Invalid(what) => {
                    let step = updates.steps + 1;
                    Error::invalid(format!("round {}, update {step}: {what}", round + 1))
                }
                e => e,
            })?;
            updates.gradient_norm += norm;
            updates.steps += 1;
            for micro in minibatch.iter() {
                self.take_stats(micro, rollouts, &mut updates.stats)?;
            }
            if self.options.repeat_minibatch {
                t.controller.update(divergence, self.options.minibatch);
            }
        }
        Ok(updates)
    }

    /// A step of the optimizer by the gradient of the mean loss over a minibatch's tokens; returns
    /// the gradient's norm.
    fn step(
        &mut self,
        minibatch: &mut [MicroBatch<B>],
        tokens: usize,
        rate: f64,
        t: &mut Trainer<B>,
    ) -> Result<f64> {
        let (b, o) = (self.backend, &self.options);
        b.clear(&mut t.grads);
        b.clear_sums(&mut t.sums);
        let scale = 1.0 / tokens as f32;
        let kl = if o.kl_in_loss { t.controller.coefficient as f32 } else { 0.0 };
        for micro in minibatch.iter_mut() {
            let frozen = self.model.frozen_layers();
            if let Some(trunk) = micro.trunk.take() {
                t.space.put_trunk(frozen, trunk);
            }
            let MicroBatch { packed, targets, stats, .. } = micro;
            let tokens = TokenLoss::ClippedPpo(ClippedPpo {
                old_log_probs: &targets.old_log_probs,
                advantages: &targets.advantages,
                reference_log_probs: o.kl_in_loss.then_some(&targets.reference),
                clip: o.clip,
                kl,
                entropy: o.entropy_coefficient,
                scale,
            });
            let values =
                (o.algorithm == Algorithm::Ppo).then_some(ScalarLoss::ClippedValue(ClippedValue {
                    old_values: &targets.old_values,
                    returns: &targets.returns,
                    clip: o.value_clip,
                    coefficient: o.value_coefficient,
                    scale,
                }));
            let objective = Objective { tokens: Some(&tokens), scalars: values.as_ref() };
            let gradients = Some(Backward::to(&mut t.grads));
            let to = LossOutput { sums: &mut t.sums, stats: Some(stats), gradients };
            self.model.objective(b, (o.precision, packed), &mut t.space, &objective, to);
            micro.values = t.space.take_scalars();
            if frozen > 0 {
                micro.trunk = Some(t.space.take_trunk(frozen));
            }
        }
        t.optimizer.squared_norm(b, &t.grads, &mut t.sums);
        let size = StepSize { learning_rate: rate as f32, max_norm: o.clip_norm };
        t.optimizer.step(b, (&mut self.model.values, &t.grads), size, &t.sums);
        let sums = b.sums(&t.sums)?;
        if !sums.finite() {
            return Err(self.diverged(&t.grads, sums.loss));
        }
        Ok(sums.norm())
    }

    /// Names what is no number; the step was not taken.
    fn diverged(&self, grads: &B::Flat, loss: f64) -> Error {
        let mut start = 0;
        for p in self.model.parameters() {
            let range = start..start + p.len();
            start = range.end;
            match self.backend.read(grads, range) {
                Ok(values) if values.iter().all(|v| v.is_finite()) => {}
                Ok(_) => {
                    return Error::invalid(format!(
                        "loss {loss}, and the gradient of {} is no number; lower --learning-rate \
                        or --clip-norm",
                        p.name
                    ));
                }
                Err(e) => return e,
            }
        }
        Error::invalid(format!("loss {loss}; lower --learning-rate or --reward-clip"))
    }

    /// Adds up what a minibatch's last pass found.
    fn take_stats(
        &self,
        micro: &MicroBatch<B>,
        rollouts: &[Rollout],
        to: &mut LossStats,
    ) -> Result<()> {
        let (b, o) = (self.backend, &self.options);
        let column = |x| b.download_column(x);
        let (log_probs, entropies) =
            (column(&micro.stats.log_probs)?, column(&micro.stats.entropies)?);
        let old = column(&micro.targets.old_log_probs)?;
        let advantages = column(&micro.targets.advantages)?;
        let values = match o.algorithm {
            Algorithm::Ppo => Some([
                column(&micro.values)?,
                column(&micro.targets.old_values)?,
                column(&micro.targets.returns)?,
            ]),
            _ => None,
        };
        debug_assert_eq!(
            log_probs.len(),
            micro.rollouts.iter().map(|&i| rollouts[i].response.len()).sum::<usize>()
        );
        for i in 0..log_probs.len() {
            let terms = TokenTerms {
                log_prob: log_probs[i] as f64,
                old_log_prob: old[i] as f64,
                advantage: advantages[i] as f64,
                entropy: entropies[i] as f64,
                value: values.as_ref().map(|v| [v[0][i], v[1][i], v[2][i]].map(|x| x as f64)),
            };
            to.add(&terms, (o.clip as f64, o.value_clip as f64));
        }
        Ok(())
    }

    fn losses(&self, m: &mut RoundMetrics, updates: &Updates) {
        let s = &updates.stats;
        m.set("loss/policy_avg", s.mean(|s| s.policy_loss));
        m.set("policy/approxkl_avg", s.mean(|s| s.approximate_kl));
        m.set("policy/clipfrac_avg", s.mean(|s| s.clipped));
        m.set("policy/entropy_avg", s.mean(|s| s.entropy));
        m.set("policy/grad_norm", updates.gradient_norm / updates.steps.max(1) as f64);
        m.set("val/ratio", s.mean(|s| s.ratio));
        m.set("val/ratio_var", s.ratio_variance());
        if self.options.algorithm == Algorithm::Ppo {
            m.set("loss/value_avg", s.mean(|s| s.value_loss));
            m.set("val/clipfrac_avg", s.mean(|s| s.values_clipped));
        }
    }
}

pub(super) fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// Mean over responses of the sum of their tokens' entropies.
fn entropy_of_responses(numbers: &[TokenNumbers]) -> f64 {
    let sum = |n: &TokenNumbers| n.entropies.iter().map(|e| *e as f64).sum::<f64>();
    mean(&numbers.iter().map(sum).collect::<Vec<_>>())
}
