//! What a training run leaves to look at: `metrics.jsonl` and the loss curve.

use crate::checkpoint::{write_atomic, write_atomic_at};
use crate::error::{Error, Result};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps taken, this one included.
    pub step: u64,
    /// Passes over the training examples so far, this step included.
    pub epoch: f64,
    /// Mean loss a label.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Euclidean norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens of the step's sequences.
    pub tokens: usize,
    /// `tokens` over the seconds that the step took, validation included.
    pub tokens_per_second: f64,
    /// Mean loss a label over the held-out examples, where it was computed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub validation_loss: Option<f64>,
    /// What else was measured on the held-out examples, by name.
    #[serde(flatten)]
    pub validation: BTreeMap<String, f64>,
}

/// The open `metrics.jsonl` of a run, and what it holds.
pub struct Metrics {
    path: PathBuf,
    file: File,
    /// The steps so far, in order.
    pub steps: Vec<StepMetrics>,
}

impl Metrics {
    /// Opens the file of a run that has taken `done` steps; lines of later steps are taken away.
    pub fn open(path: &Path, done: u64) -> Result<Metrics> {
        let mut steps: Vec<StepMetrics> = Vec::new();
        // lines stay as they were written, so that an interrupted run leaves the same file as an
        // undisturbed one
        let mut kept = String::new();
        if done > 0 && path.exists() {
            let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
            for (i, line) in text.split_inclusive('\n').enumerate() {
                match serde_json::from_str::<StepMetrics>(line) {
                    Ok(step) if step.step > done => {}
                    Ok(step) => {
                        steps.push(step);
                        kept.push_str(line.trim_end());
                        kept.push('\n');
                    }
                    // a crash may have cut the last line
                    Err(_) if !line.ends_with('\n') => {}
                    Err(e) => {
                        return Err(Error::file(
                            path,
                            format!("line {} is no metrics: {e}", i + 1),
                        ));
                    }
                }
            }
        }
        write_atomic(path, |w| w.write_all(kept.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io(path, "open"))?;
        Ok(Metrics { path: path.into(), file, steps })
    }

    /// Appends a step to the file and to `steps`.
    pub fn push(&mut self, step: StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(&step).expect("numbers are JSON");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path, "write"))?;
        self.steps.push(step);
        Ok(())
    }

    /// Draws training and validation loss over steps, under a caption and with a unit.
    pub fn draw(&self, path: &Path, names: (&str, &str)) -> Result<()> {
        write_atomic_at(path, |file| draw(&self.steps, file, names).map_err(std::io::Error::other))
    }
}

fn draw(
    steps: &[StepMetrics],
    path: &Path,
    (caption, unit): (&str, &str),
) -> std::result::Result<(), String> {
    let points: Vec<(f64, f64)> = steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    let held_out = steps.iter().filter_map(|s| Some((s.step as f64, s.validation_loss?)));
    let held_out: Vec<(f64, f64)> = held_out.collect();
    let most = points.iter().chain(&held_out).map(|p| p.1).fold(0.1, f64::max) * 1.05;
    let last = points.last().map_or(1.0, |p| p.0).max(1.0);
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let area = SVGBackend::new(path, (900, 500)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..last, 0.0..most)
        .map_err(|e| text(&e))?;
    chart.configure_mesh().x_desc("step").y_desc(unit).draw().map_err(|e| text(&e))?;
    for (name, points, color) in [("training", points, BLUE), ("validation", held_out, RED)] {
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points, color))
            .map_err(|e| text(&e))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart.configure_series_labels().border_style(BLACK).draw().map_err(|e| text(&e))?;
    area.present().map_err(|e| text(&e))
}

/// Draws what a model predicted over what it should have said: the means of ten groups of equal
/// size by prediction, and the line on which a calibrated model's would lie.
pub fn draw_calibration(path: &Path, predictions: &[(f64, f64)]) -> Result<()> {
    let mut sorted: Vec<(f64, f64)> = predictions.to_vec();
    sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mean = |group: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        group.iter().map(of).sum::<f64>() / group.len() as f64
    };
    let groups = sorted.chunks(sorted.len().div_ceil(10).max(1));
    let points: Vec<(f64, f64)> =
        groups.map(|group| (mean(group, |p| p.1), mean(group, |p| p.0))).collect();
    write_atomic_at(path, |file| calibration(&points, file).map_err(std::io::Error::other))
}

fn calibration(points: &[(f64, f64)], path: &Path) -> std::result::Result<(), String> {
    let all = || points.iter().flat_map(|p| [p.0, p.1]);
    let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max));
    let margin = ((high - low) * 0.05).max(1e-3);
    let range = low - margin..high + margin;
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let area = SVGBackend::new(path, (560, 560)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption("held-out labels by predicted score", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(range.clone(), range.clone())
        .map_err(|e| text(&e))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("mean predicted").y_desc("mean label").draw().map_err(|e| text(&e))?;
    let diagonal = [(range.start, range.start), (range.end, range.end)];
    chart.draw_series(LineSeries::new(diagonal, BLACK.mix(0.3))).map_err(|e| text(&e))?;
    chart.draw_series(LineSeries::new(points.to_vec(), BLUE)).map_err(|e| text(&e))?;
    let dots = points.iter().map(|&p| Circle::new(p, 4, BLUE.filled()));
    chart.draw_series(dots).map_err(|e| text(&e))?;
    area.present().map_err(|e| text(&e))
}
