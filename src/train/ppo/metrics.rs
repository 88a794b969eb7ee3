//! What a run leaves to look at: `metrics.jsonl`, a line a round, and curves of it.
//!
//! Names are those of TRL's trainers where these have the same number.

use super::experience::TokenNumbers;
use super::rollout::{PolicyPrompt, Rollout};
use super::round::mean;
use crate::checkpoint::{write_atomic, write_atomic_at};
use crate::error::{Error, Result};
use crate::rewards::CombinedScores;
use crate::rewrite::Fidelity;
use crate::text::content_words::repeated_share;
use crate::train::monitors::UpdateStats;
use plotters::prelude::*;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundMetrics {
    values: Map<String, Value>,
}

impl RoundMetrics {
    pub(super) fn new(round: u64) -> RoundMetrics {
        RoundMetrics { values: Map::from_iter([("round".to_owned(), round.into())]) }
    }

    /// Rounds so far, this one included.
    pub fn round(&self) -> u64 {
        self.values["round"].as_u64().unwrap_or(0)
    }

    /// One of the numbers, by name; NaN where it was not a finite one.
    pub fn get(&self, name: &str) -> f64 {
        self.values.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    pub(super) fn set(&mut self, name: &str, value: f64) {
        let value = serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number);
        self.values.insert(name.to_owned(), value);
    }

    /// The scores: their mean, the means and standard deviations of each reward.
    pub(super) fn scores<'n>(
        &mut self,
        scores: &CombinedScores,
        names: impl Iterator<Item = &'n str>,
        watched: Option<&[f64]>,
    ) {
        let std = |x: &[f64]| {
            let m = mean(x);
            (x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (x.len().max(2) - 1) as f64).sqrt()
        };
        self.set("objective/scores", mean(&scores.total));
        self.set("objective/scores_std", std(&scores.total));
        for (name, part) in names.zip(&scores.parts) {
            self.set(&format!("rewards/{name}/mean"), mean(part));
            self.set(&format!("rewards/{name}/std"), std(part));
        }
        if let Some(watched) = watched {
            self.set("watch/mean", mean(watched));
        }
    }

    /// The outputs' lengths, and what their texts are like.
    pub(super) fn text(&mut self, text: &TextStats, rollouts: &[Rollout]) {
        let lengths: Vec<f64> = rollouts.iter().map(|r| r.response.len() as f64).collect();
        let ended = rollouts.iter().filter(|r| r.ended).count() as f64;
        self.set("completions/mean_length", mean(&lengths));
        self.set("completions/min_length", lengths.iter().copied().fold(f64::MAX, f64::min));
        self.set("completions/max_length", lengths.iter().copied().fold(0.0, f64::max));
        self.set("completions/clipped_ratio", 1.0 - ended / lengths.len().max(1) as f64);
        self.set("val/num_eos_tokens", ended);
        self.set("text/kept_meaning", text.kept_meaning);
        self.set("text/distinct_2", text.distinct_2);
        self.set("text/repetition", text.repetition);
        self.set("text/repeated", text.repeated);
    }

    /// How far the log-probabilities of generation and training are apart.
    pub(super) fn mismatch(&mut self, rollouts: &[Rollout], numbers: &[TokenNumbers]) {
        let (mut sum, mut max, mut count) = (0.0, 0f64, 0.0);
        for (r, n) in rollouts.iter().zip(numbers) {
            for (a, b) in r.log_probs.iter().zip(&n.log_probs) {
                let difference = (a - b).abs() as f64;
                sum += difference.exp();
                max = max.max(difference);
                count += 1.0;
            }
        }
        self.set("rollout/token_mult_prob_error", if count > 0.0 { sum / count } else { 1.0 });
        self.set("rollout/max_log_prob_difference", max);
    }

    /// Seconds of generation, scoring, training and the rest, and tokens a second.
    pub(super) fn times(&mut self, tokens: usize, parts: [Duration; 4]) {
        let names = ["time/rollout", "time/reward", "time/train", "time/other"];
        for (name, part) in names.iter().zip(parts) {
            self.set(name, part.as_secs_f64());
        }
        let whole: f64 = parts.iter().map(Duration::as_secs_f64).sum();
        self.set("perf/tokens_per_second", tokens as f64 / whole.max(1e-9));
        self.set(
            "perf/rollout_tokens_per_second",
            tokens as f64 / parts[0].as_secs_f64().max(1e-9),
        );
        self.set("perf/train_tokens_per_second", tokens as f64 / parts[2].as_secs_f64().max(1e-9));
    }

    /// What monitors look at.
    pub(super) fn for_monitors(&self) -> UpdateStats {
        let watched = self.get("watch/mean");
        UpdateStats {
            update: self.round(),
            kl: self.get("objective/kl"),
            entropy: self.get("policy/entropy_avg"),
            response_length: self.get("completions/mean_length"),
            repeated: self.get("text/repeated"),
            kept_meaning: self.get("text/kept_meaning"),
            explained_variance: self.get("critic/explained_var"),
            reward: self.get("objective/scores"),
            held_out: (!watched.is_nan()).then_some(watched),
        }
    }
}

/// What a round's outputs are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TextStats {
    /// Mean part of the plain prompts' meaning that is kept.
    kept_meaning: f64,
    /// Different pairs of neighbouring words over all such pairs of all outputs.
    distinct_2: f64,
    /// Mean part of an output's groups of three words that it has more than once.
    repetition: f64,
    /// Part of the outputs that equal another prompt's or repeat themselves.
    repeated: f64,
}

impl TextStats {
    pub fn of(prompts: &[PolicyPrompt], rollouts: &[Rollout], fidelity: &Fidelity) -> TextStats {
        let kept = |r: &Rollout| fidelity.score(&prompts[r.prompt].raw, &r.text).0;
        let (mut pairs, mut all_pairs) = (HashSet::new(), 0);
        let mut repetitions = Vec::with_capacity(rollouts.len());
        let mut first_of: HashMap<&str, (usize, bool)> = HashMap::new();
        for r in rollouts {
            let words: Vec<&str> = r.text.split_whitespace().collect();
            for pair in words.windows(2) {
                pairs.insert((pair[0], pair[1]));
                all_pairs += 1;
            }
            repetitions.push(repeated_share(&r.text, 3));
            let (prompt, shared) = first_of.entry(&r.text).or_insert((r.prompt, false));
            *shared |= *prompt != r.prompt;
        }
        let repeated = rollouts.iter().zip(&repetitions);
        let repeated = repeated.filter(|(r, own)| first_of[r.text.as_str()].1 || **own > 0.5);
        TextStats {
            kept_meaning: mean(&rollouts.iter().map(kept).collect::<Vec<_>>()),
            distinct_2: pairs.len() as f64 / all_pairs.max(1) as f64,
            repetition: mean(&repetitions),
            repeated: repeated.count() as f64 / rollouts.len().max(1) as f64,
        }
    }
}

/// The open `metrics.jsonl` of a run, and what it holds.
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
    rounds: Vec<RoundMetrics>,
}

impl MetricsFile {
    /// Opens the file of a run that has done so many rounds; lines of later ones are taken away.
    pub fn open(output: &Path, done: u64) -> Result<MetricsFile> {
        let path = output.join("metrics.jsonl");
        let (mut rounds, mut kept) = (Vec::new(), String::new());
        if done > 0 && path.exists() {
            let text = std::fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
            for (i, line) in text.split_inclusive('\n').enumerate() {
                match serde_json::from_str::<Map<String, Value>>(line) {
                    Ok(values) => {
                        let round = values.get("round").and_then(Value::as_u64);
                        if round.is_some_and(|r| r <= done) {
                            rounds.push(RoundMetrics { values });
                            kept.push_str(line.trim_end());
                            kept.push('\n');
                        }
                    }
                    // a crash may have cut the last line
                    Err(_) if !line.ends_with('\n') => {}
                    Err(e) => {
                        let what = format!("line {} is no metrics: {e}", i + 1);
                        return Err(Error::file(&path, what));
                    }
                }
            }
        }
        write_atomic(&path, |w| w.write_all(kept.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path, "open"))?;
        Ok(MetricsFile { path, file, rounds })
    }

    /// Appends a round to the file.
    pub fn push(&mut self, metrics: &RoundMetrics) -> Result<()> {
        let mut line = serde_json::to_string(&metrics.values).expect("numbers are JSON");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path, "write"))?;
        self.rounds.push(metrics.clone());
        Ok(())
    }

    /// Draws `curves.svg`.
    pub fn draw(&self, output: &Path) -> Result<()> {
        Curves(&self.rounds).draw(&output.join("curves.svg"))
    }
}

/// Curves of a run over its rounds.
pub struct Curves<'a>(pub &'a [RoundMetrics]);

/// What has a chart of its own, each with the lines in it.
const CHARTS: [(&str, &[&str]); 15] = [
    ("reward", &["objective/scores", "objective/rlhf_reward"]),
    ("KL divergence a response", &["objective/kl"]),
    ("KL coefficient", &["kl_coefficient"]),
    ("entropy a token", &["policy/entropy_avg"]),
    ("clipped ratios", &["policy/clipfrac_avg", "val/clipfrac_avg"]),
    ("explained variance", &["critic/explained_var"]),
    ("value loss", &["loss/value_avg"]),
    ("policy loss", &["loss/policy_avg"]),
    ("gradient norm", &["policy/grad_norm"]),
    ("response length", &["completions/mean_length"]),
    ("kept meaning", &["text/kept_meaning"]),
    ("distinct-2", &["text/distinct_2"]),
    ("repetition", &["text/repetition", "text/repeated"]),
    ("held-out scorer", &["watch/mean"]),
    (
        "tokens/s",
        &[
            "perf/tokens_per_second",
            "perf/rollout_tokens_per_second",
            "perf/train_tokens_per_second",
        ],
    ),
];

impl Curves<'_> {
    /// Draws them as an SVG file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn draw(&self, path: &Path) -> Result<()> {
        write_atomic_at(path, |file| self.draw_to(file).map_err(std::io::Error::other))
    }

    /// The charts that there are numbers for, with one for each reward.
    fn charts(&self) -> Vec<(String, Vec<String>)> {
        let mut charts: Vec<(String, Vec<String>)> = CHARTS
            .iter()
            .map(|(caption, lines)| {
                ((*caption).to_owned(), lines.iter().map(|l| (*l).to_owned()).collect())
            })
            .collect();
        if let Some(first) = self.0.first() {
            let names = first
                .values
                .keys()
                .filter_map(|k| k.strip_prefix("rewards/").and_then(|k| k.strip_suffix("/mean")));
            charts.extend(names.map(|n| {
                let short: String =
                    n.chars().rev().take(28).collect::<Vec<_>>().into_iter().rev().collect();
                (short, vec![format!("rewards/{n}/mean")])
            }));
        }
        let known = |line: &String| self.0.iter().any(|m| m.get(line).is_finite());
        charts.retain(|(_, lines)| lines.iter().any(known));
        charts
    }

    fn draw_to(&self, path: &Path) -> std::result::Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let charts = self.charts();
        let rows = charts.len().div_ceil(3).max(1);
        let area = SVGBackend::new(path, (1140, 240 * rows as u32)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| text(&e))?;
        for (area, (caption, lines)) in area.split_evenly((rows, 3)).iter().zip(&charts) {
            let series: Vec<Vec<(f64, f64)>> = lines
                .iter()
                .map(|line| {
                    let points = self.0.iter().map(|m| (m.round() as f64, m.get(line)));
                    points.filter(|p| p.1.is_finite()).collect()
                })
                .collect();
            let all = || series.iter().flatten().map(|p| p.1);
            let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max));
            let margin = ((high - low) * 0.08).max(1e-6 * high.abs()).max(1e-9);
            let last = self.0.last().map_or(1.0, |m| m.round() as f64).max(1.0);
            let mut chart = ChartBuilder::on(area)
                .caption(caption, ("sans-serif", 14))
                .margin(6)
                .x_label_area_size(22)
                .y_label_area_size(52)
                .build_cartesian_2d(0.0..last, low - margin..high + margin)
                .map_err(|e| text(&e))?;
            let mut mesh = chart.configure_mesh();
            mesh.x_labels(5).y_labels(5).light_line_style(WHITE).draw().map_err(|e| text(&e))?;
            for (points, color) in series.into_iter().zip([BLUE, RED, GREEN]) {
                chart.draw_series(LineSeries::new(points, color)).map_err(|e| text(&e))?;
            }
        }
        area.present().map_err(|e| text(&e))
    }
}
