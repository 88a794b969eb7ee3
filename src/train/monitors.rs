//! Monitors of a policy-gradient run: what goes wrong in one while its reward still rises.
//!
//! Each monitor smooths one number and compares it with a limit, most of them relative to the run's
//! own start. It says so once, and again only after the number has come back well within its limit.

use crate::error::{Error, Result};
use crate::files::exact;
use crate::rewards::RunningMoments;
use serde::{Deserialize, Serialize};

/// Part of the way from its usual value to its limit that a number has to come back to before its
/// alarm is over; without it, noise at the limit would raise an alarm again and again.
const CLEARED: f64 = 0.8;

/// Updates after which the share of repeated outputs is a mean of several batches.
const REPEATED_UPDATES: u64 = 5;

/// Updates that the critic gets to learn.
const CRITIC_UPDATES: u64 = 50;

/// Standard deviations by which the trained reward has to be above what it was when the held-out
/// scorer was best. Where both fall, the run is unstable and its reward is not exploited.
const RISE_SINCE_BEST: f64 = 0.5;

const KL: &str = "the KL to the reference";
const ENTROPY: &str = "the entropy";
const LENGTH: &str = "the mean response length";
const REPEATED: &str = "the share of outputs that repeat themselves or others";
const KEPT: &str = "the kept meaning";
const EXPLAINED: &str = "the explained variance";
const REWARD: &str = "the mean reward";
const HELD_OUT: &str = "the held-out scorer's mean";

/// What a run measures at an update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateStats {
    /// Updates so far, this one included.
    pub update: u64,
    /// KL divergence from the reference policy, in nats a response.
    pub kl: f64,
    /// Entropy of the policy, in nats a token.
    pub entropy: f64,
    /// Mean length of the responses, in tokens.
    pub response_length: f64,
    /// Share of the outputs that equal another prompt's output or repeat themselves.
    pub repeated: f64,
    /// Mean part of the prompts' meaning that the outputs keep.
    pub kept_meaning: f64,
    /// Part of the returns' variance that the critic explains; anything that is not finite is
    /// skipped, because returns that are all the same have no variance.
    pub explained_variance: f64,
    /// Mean of the reward that is trained.
    pub reward: f64,
    /// Mean of a scorer that is not trained, where it was asked.
    pub held_out: Option<f64>,
}

/// What to do about an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Say it.
    Warn,
    /// Say it, save a checkpoint and end the run.
    Stop,
}

/// A limit and what happens beyond it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Threshold {
    /// The limit.
    pub limit: f64,
    /// What happens beyond it.
    pub action: Action,
}

/// What monitors compare with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MonitorLimits {
    /// Updates that are a number's start, which limits are relative to.
    pub start_updates: u64,
    /// Weight of an update in the running mean of a number.
    pub smoothing: f64,
    /// The same for the trained reward and the held-out scorer, whose noise is larger in comparison
    /// with their limits.
    pub gap_smoothing: f64,
    /// What to do about a number that is not finite.
    pub not_finite: Action,
    /// Largest KL divergence, in nats a response.
    pub kl: Threshold,
    /// Least entropy, as a share of its start.
    pub entropy: Threshold,
    /// Factor on the mean length's start that it may change by, in both directions.
    pub length: Threshold,
    /// Largest share of repeated outputs.
    pub repeated: Threshold,
    /// How far kept meaning may fall below its start.
    pub kept_meaning: Threshold,
    /// Least explained variance.
    pub explained_variance: Threshold,
    /// How far the held-out scorer may fall below its best while the trained reward has risen by
    /// [`MonitorLimits::reward_rise`], in standard deviations of a batch's mean.
    pub gap: Threshold,
    /// Rise of the trained reward above its start that makes a fall of the held-out scorer reward
    /// hacking, in standard deviations of a batch's mean.
    pub reward_rise: f64,
}

impl Default for MonitorLimits {
    fn default() -> Self {
        let warn = |limit| Threshold { limit, action: Action::Warn };
        MonitorLimits {
            start_updates: 20,
            smoothing: 0.1,
            gap_smoothing: 0.05,
            not_finite: Action::Stop,
            // five times the usual target
            kl: warn(30.0),
            entropy: warn(0.3),
            length: warn(2.0),
            repeated: warn(0.3),
            kept_meaning: warn(0.1),
            explained_variance: warn(0.0),
            // among a thousand updates of noise alone some fall by 1.2
            gap: warn(1.5),
            reward_rise: 2.0,
        }
    }
}

impl MonitorLimits {
    fn action(&self, monitor: Monitor) -> Action {
        match monitor {
            Monitor::NotFinite => self.not_finite,
            Monitor::Kl => self.kl.action,
            Monitor::Entropy => self.entropy.action,
            Monitor::Length => self.length.action,
            Monitor::Repeated => self.repeated.action,
            Monitor::KeptMeaning => self.kept_meaning.action,
            Monitor::ExplainedVariance => self.explained_variance.action,
            Monitor::Gap => self.gap.action,
        }
    }

    /// Refuses limits that no number can be compared with.
    ///
    /// # Errors
    /// If one is; the error says which, and what was expected.
    pub fn check(&self) -> Result<()> {
        let share = |x: f64| x > 0.0 && x <= 1.0;
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let rules = [
            ("start_updates", self.start_updates as f64, self.start_updates >= 2, "2 or more"),
            ("smoothing", self.smoothing, share(self.smoothing), "above 0 and at most 1"),
            ("gap_smoothing", self.gap_smoothing, share(self.gap_smoothing), "above 0, at most 1"),
            ("kl", self.kl.limit, positive(self.kl.limit), "above 0"),
            (
                "entropy",
                self.entropy.limit,
                (0.0..1.0).contains(&self.entropy.limit),
                "a share below 1",
            ),
            ("length", self.length.limit, positive(self.length.limit - 1.0), "a factor above 1"),
            ("repeated", self.repeated.limit, share(self.repeated.limit), "a share above 0"),
            ("kept_meaning", self.kept_meaning.limit, share(self.kept_meaning.limit), "above 0"),
            (
                "explained_variance",
                self.explained_variance.limit,
                self.explained_variance.limit < 1.0,
                "below 1",
            ),
            ("gap", self.gap.limit, positive(self.gap.limit), "above 0"),
            ("reward_rise", self.reward_rise, positive(self.reward_rise), "above 0"),
        ];
        match rules.into_iter().find(|rule| !rule.2) {
            Some((name, value, _, expected)) => Err(Error::invalid(format!(
                "the monitors' limit {name} is {value}, expected {expected}"
            ))),
            None => Ok(()),
        }
    }
}

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Monitor {
    /// Whether all numbers are finite.
    NotFinite,
    /// KL divergence beyond its limit.
    Kl,
    /// Entropy that collapses.
    Entropy,
    /// Mean length that drifts away.
    Length,
    /// Outputs that repeat themselves or others.
    Repeated,
    /// Kept meaning that falls.
    KeptMeaning,
    /// A critic that explains nothing.
    ExplainedVariance,
    /// A trained reward that rises while a held-out scorer falls: reward hacking.
    Gap,
}

/// A number beyond its limit.
#[derive(Clone, Debug, PartialEq)]
pub struct Alarm {
    /// The monitor that raises it.
    pub monitor: Monitor,
    /// What is to happen.
    pub action: Action,
    /// Updates so far.
    pub update: u64,
    /// The smoothed number, in the limit's unit.
    pub value: f64,
    /// Its limit.
    pub limit: f64,
    /// What, where, the limit and the remedy, on one line.
    pub message: String,
}

/// A smoothed number, its start and its noise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Series {
    count: u64,
    start: RunningMoments,
    /// Squares of the differences from one update to the next, which a slow trend does not raise.
    differences: RunningMoments,
    #[serde(with = "exact")]
    previous: f64,
    /// The mean of the start, then a running mean.
    #[serde(with = "exact")]
    smoothed: f64,
}

impl Series {
    fn push(&mut self, number: f64, start_updates: u64, smoothing: f64) {
        if self.count > 0 {
            self.differences.push((number - self.previous).powi(2));
        }
        if self.count < start_updates {
            self.start.push(number);
            self.smoothed = self.start.mean();
        } else {
            self.smoothed += smoothing * (number - self.smoothed);
        }
        self.previous = number;
        self.count += 1;
    }

    /// Standard deviation of an update's number: the start's, or the later noise's if that is
    /// larger. A scorer on the same prompts has little of it before the policy moves.
    fn std(&self) -> f64 {
        let rounding = 1e-9 * self.start.mean().abs().max(1e-9);
        self.start.std().max((self.differences.mean() / 2.0).sqrt()).max(rounding)
    }
}

/// The held-out scorer's best smoothed score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Best {
    update: u64,
    #[serde(with = "exact")]
    held_out: f64,
    /// The trained reward's smoothed score then.
    #[serde(with = "exact")]
    reward: f64,
}

/// Where monitors stand, for a checkpoint: with it a resumed run raises the same alarms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MonitorState {
    kl: Series,
    entropy: Series,
    length: Series,
    repeated: Series,
    kept_meaning: Series,
    explained_variance: Series,
    reward: Series,
    held_out: Series,
    best: Option<Best>,
    active: Vec<Monitor>,
}

/// The monitors of a run.
pub struct Monitors {
    limits: MonitorLimits,
    state: MonitorState,
}

/// A number with its name, its limit in the same unit, and how far the number is on the way from
/// its usual value, at 0, to its limit, at 1.
#[derive(Default)]
struct Reading {
    name: &'static str,
    value: f64,
    limit: f64,
    severity: f64,
}

impl Monitors {
    /// The monitors of a run that begins.
    ///
    /// # Errors
    /// As [`MonitorLimits::check`].
    pub fn new(limits: MonitorLimits) -> Result<Monitors> {
        Monitors::resume(limits, MonitorState::default())
    }

    /// The monitors of a run that goes on.
    ///
    /// # Errors
    /// As [`MonitorLimits::check`].
    pub fn resume(limits: MonitorLimits, state: MonitorState) -> Result<Monitors> {
        limits.check()?;
        Ok(Monitors { limits, state })
    }

    /// Where they stand.
    pub fn state(&self) -> &MonitorState {
        &self.state
    }

    /// The alarms that have been raised and are not over.
    pub fn active(&self) -> &[Monitor] {
        &self.state.active
    }

    /// Takes in an update; gives the alarms that it raises, and none that is active already.
    pub fn observe(&mut self, stats: &UpdateStats) -> Vec<Alarm> {
        let not_finite = self.push(stats).unwrap_or_default();
        let mut alarms = Vec::new();
        let readings = self.readings();
        for (monitor, reading) in [(Monitor::NotFinite, not_finite)].into_iter().chain(readings) {
            if self.turns_on(monitor, reading.severity) {
                alarms.push(Alarm {
                    monitor,
                    action: self.limits.action(monitor),
                    update: stats.update,
                    value: reading.value,
                    limit: reading.limit,
                    message: format!(
                        "update {}: {}",
                        stats.update,
                        self.message(monitor, &reading)
                    ),
                });
            }
        }
        alarms
    }

    /// Takes the numbers in; gives the first that is not finite, which is left out.
    fn push(&mut self, stats: &UpdateStats) -> Option<Reading> {
        let (state, limits) = (&mut self.state, &self.limits);
        let mut bad = None;
        let mut push = |series: &mut Series, name, number: f64, smoothing| {
            if number.is_finite() {
                series.push(number, limits.start_updates, smoothing);
            } else {
                let reading =
                    Reading { name, value: number, limit: f64::MAX, severity: f64::INFINITY };
                bad.get_or_insert(reading);
            }
        };
        let (smoothing, slow) = (limits.smoothing, limits.gap_smoothing);
        push(&mut state.kl, KL, stats.kl, smoothing);
        push(&mut state.entropy, ENTROPY, stats.entropy, smoothing);
        push(&mut state.length, LENGTH, stats.response_length, smoothing);
        push(&mut state.repeated, REPEATED, stats.repeated, smoothing);
        push(&mut state.kept_meaning, KEPT, stats.kept_meaning, smoothing);
        if stats.explained_variance.is_finite() {
            // a batch whose returns hardly differ would outweigh all others
            let explained = stats.explained_variance.clamp(-1.0, 1.0);
            push(&mut state.explained_variance, EXPLAINED, explained, smoothing);
        }
        push(&mut state.reward, REWARD, stats.reward, slow);
        if let Some(held_out) = stats.held_out {
            push(&mut state.held_out, HELD_OUT, held_out, slow);
            self.find_best(stats.update);
        }
        bad
    }

    /// Remembers the held-out scorer's best once both scores have their starts.
    fn find_best(&mut self, update: u64) {
        let state = &mut self.state;
        let (reward, held_out) = (&state.reward, &state.held_out);
        let started = held_out.count.min(reward.count) >= self.limits.start_updates;
        if started && state.best.as_ref().is_none_or(|best| held_out.smoothed > best.held_out) {
            let (held_out, reward) = (held_out.smoothed, reward.smoothed);
            state.best = Some(Best { update, held_out, reward });
        }
    }

    /// Whether an alarm begins. NaN is no severity.
    fn turns_on(&mut self, monitor: Monitor, severity: f64) -> bool {
        let active = &mut self.state.active;
        let was = active.contains(&monitor);
        if was && severity < CLEARED {
            active.retain(|other| *other != monitor);
        } else if !was && severity > 1.0 {
            active.push(monitor);
            return true;
        }
        false
    }

    /// All numbers that there are enough updates of.
    fn readings(&self) -> Vec<(Monitor, Reading)> {
        let (limits, state) = (&self.limits, &self.state);
        let started = |series: &Series| series.count >= limits.start_updates;
        let mut readings = Vec::new();
        let mut add = |monitor, name, usual: f64, series: &Series, limit: f64| {
            let value = series.smoothed;
            let severity = (value - usual) / (limit - usual);
            readings.push((monitor, Reading { name, value, limit, severity }));
        };
        add(Monitor::Kl, KL, 0.0, &state.kl, limits.kl.limit);
        if started(&state.entropy) {
            // a policy without entropy at its start cannot lose any
            let start = state.entropy.start.mean();
            add(Monitor::Entropy, ENTROPY, start, &state.entropy, limits.entropy.limit * start);
        }
        if state.repeated.count >= REPEATED_UPDATES {
            add(Monitor::Repeated, REPEATED, 0.0, &state.repeated, limits.repeated.limit);
        }
        if started(&state.kept_meaning) {
            let start = state.kept_meaning.start.mean();
            let least = start - limits.kept_meaning.limit;
            add(Monitor::KeptMeaning, KEPT, start, &state.kept_meaning, least);
        }
        if state.explained_variance.count > CRITIC_UPDATES {
            let least = limits.explained_variance.limit;
            add(Monitor::ExplainedVariance, EXPLAINED, 1.0, &state.explained_variance, least);
        }
        if started(&state.length) {
            let (start, value) = (state.length.start.mean(), state.length.smoothed);
            let factor = limits.length.limit;
            let limit = if value < start { start / factor } else { start * factor };
            let severity = (value / start).ln().abs() / factor.ln();
            readings.push((Monitor::Length, Reading { name: LENGTH, value, limit, severity }));
        }
        readings.extend(self.gap().map(|reading| (Monitor::Gap, reading)));
        readings
    }

    /// How far the held-out scorer has fallen below its best, in standard deviations, while the
    /// trained reward rises.
    fn gap(&self) -> Option<Reading> {
        let (reward, held_out) = (&self.state.reward, &self.state.held_out);
        let best = self.state.best.as_ref()?;
        let limit = self.limits.gap.limit;
        let value = (best.held_out - held_out.smoothed) / held_out.std();
        let rise = (reward.smoothed - reward.start.mean()) / reward.std();
        let since_best = (reward.smoothed - best.reward) / reward.std();
        let severity =
            (value / limit).min(rise / self.limits.reward_rise).min(since_best / RISE_SINCE_BEST);
        Some(Reading { name: HELD_OUT, value, limit, severity })
    }

    /// What is beyond its limit, and the remedy.
    fn message(&self, monitor: Monitor, reading: &Reading) -> String {
        let (name, state) = (reading.name, &self.state);
        let (value, limit) = (short(reading.value), short(reading.limit));
        let start = |series: &Series| short(series.start.mean());
        match monitor {
            Monitor::NotFinite => format!(
                "{name} is {}, expected a finite number; resume from the last checkpoint with a \
                 lower --learning-rate",
                reading.value
            ),
            Monitor::Kl => format!(
                "{name} is {value} nats a response, above {limit}; lower \
                 --learning-rate or --kl-target"
            ),
            Monitor::Entropy => format!(
                "{name} is {value} nats a token, below {limit}, from {} at its start, so the \
                 policy collapses; raise --entropy-coefficient or lower --learning-rate",
                start(&state.entropy)
            ),
            Monitor::Length => {
                let (side, remedy) = match reading.value < reading.limit {
                    true => ("below", "add --reward fidelity or another that pays for content"),
                    false => ("above", "add --reward clip-tokens or lower --max-new-tokens"),
                };
                format!(
                    "{name} is {value} tokens, {side} {limit}, from {} at its \
                     start; {remedy}",
                    start(&state.length)
                )
            }
            Monitor::Repeated => format!(
                "{name} is {value}, above {limit}; \
                 add --reward repetition or raise --entropy-coefficient"
            ),
            Monitor::KeptMeaning => format!(
                "{name} is {value}, below {limit}, from {} at its start; add --reward \
                 fidelity or raise its weight",
                start(&state.kept_meaning)
            ),
            Monitor::ExplainedVariance => format!(
                "{name} is {value}, below {limit}, so the values are worse than \
                 none; raise --value-coefficient or lower --learning-rate"
            ),
            Monitor::Gap => self.gap_message(&value, &limit),
        }
    }

    fn gap_message(&self, value: &str, limit: &str) -> String {
        let reward = &self.state.reward;
        let rise = (reward.smoothed - reward.start.mean()) / reward.std();
        let best = self.state.best.as_ref().map_or(0, |best| best.update);
        format!(
            "the held-out scorer has fallen by {value} standard deviations since update {best}, \
             more than {limit}, while the trained reward has risen by {}, so the policy exploits \
             its reward; go back to a checkpoint of about update {best}, lower --kl-target or add \
             a --reward for what is lost",
            short(rise)
        )
    }
}

/// A number with up to three decimals.
fn short(number: f64) -> String {
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
#[path = "monitors_tests.rs"]
mod tests;
