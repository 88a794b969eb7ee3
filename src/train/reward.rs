//! Reward models: a score of a text, fitted to labels or to preferences.

use super::agreement::{pairwise_accuracy, pearson, spearman};
use super::run::{HeldOut, Pass, Task, Validation};
use crate::error::{Error, Result};
use crate::models::bloom::training::{Backward, Objective};
use crate::ops::Tensor;
use crate::ops::scalar_loss::ScalarLoss;
use crate::ops::token_loss::LossOutput;
use crate::ops::train::{PackedBatch, TrainBackend};
use std::collections::BTreeMap;

/// What labels are shifted and scaled by before they are learnt.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Normalization {
    /// Mean of the labels.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
}

impl Normalization {
    /// Leaves labels as they are.
    pub const NONE: Normalization = Normalization { mean: 0.0, std: 1.0 };

    /// That of some labels; of equal ones the standard deviation is taken as 1.
    pub fn of(labels: &[f64]) -> Normalization {
        let n = labels.len().max(1) as f64;
        let mean = labels.iter().sum::<f64>() / n;
        let std = (labels.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n).sqrt();
        Normalization { mean, std: if std > 0.0 { std } else { 1.0 } }
    }
}

/// Sequences of a reward model's data.
#[derive(Clone, Debug)]
pub enum RewardExamples {
    /// Texts and their labels.
    Labelled(Vec<(Vec<u32>, f64)>),
    /// Pairs of texts of which the first is preferred.
    Preferences(Vec<[Vec<u32>; 2]>),
}

impl RewardExamples {
    /// How many there are; a pair is one.
    pub fn len(&self) -> usize {
        match self {
            RewardExamples::Labelled(list) => list.len(),
            RewardExamples::Preferences(list) => list.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of an example.
    pub fn tokens(&self, example: usize) -> usize {
        self.texts(example).map(<[u32]>::len).sum()
    }

    /// The texts of an example.
    fn texts(&self, example: usize) -> impl Iterator<Item = &[u32]> {
        let (one, pair) = match self {
            RewardExamples::Labelled(list) => (Some(&list[example].0[..]), None),
            RewardExamples::Preferences(list) => (None, Some(&list[example])),
        };
        one.into_iter().chain(pair.into_iter().flatten().map(Vec::as_slice))
    }

    /// All texts, example by example.
    fn all_texts(&self) -> Vec<&[u32]> {
        (0..self.len()).flat_map(|i| self.texts(i)).collect()
    }
}

/// A reward model's data. Scores are read off the last token of each text.
pub struct RewardTask {
    /// What is trained on.
    pub train: RewardExamples,
    /// What is held out, if anything.
    pub validation: RewardExamples,
    /// Of the labels.
    pub normalization: Normalization,
}

/// Texts of one pass, and their labels.
pub struct RewardBatch<B: TrainBackend> {
    packed: PackedBatch,
    /// Normalized; none of preferences.
    targets: Option<Tensor<B>>,
}

/// Adds a text whose score is read off its last token.
fn push(batch: &mut PackedBatch, ids: &[u32]) {
    batch.ids.extend_from_slice(ids);
    batch.labels.push((batch.ids.len() - 1, 0));
    batch.cu_seqlens.push(batch.ids.len());
}

/// Packs items with these lengths, the longest first, into groups of at most `budget`; one may
/// exceed it alone.
fn pack(items: &[usize], length: impl Fn(usize) -> usize, budget: usize) -> Vec<Vec<usize>> {
    let mut items = items.to_vec();
    items.sort_by_key(|&i| std::cmp::Reverse(length(i)));
    let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in items {
        match groups.last_mut() {
            Some((sum, group)) if *sum + length(i) <= budget => {
                *sum += length(i);
                group.push(i);
            }
            _ => groups.push((length(i), vec![i])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

impl RewardTask {
    /// Tells these examples from others.
    pub fn checksum(&self) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        for examples in [&self.train, &self.validation] {
            for text in examples.all_texts() {
                sum.update(&(text.len() as u64).to_le_bytes());
                sum.update(bytemuck::cast_slice(text));
            }
            if let RewardExamples::Labelled(list) = examples {
                list.iter().for_each(|(_, label)| sum.update(&label.to_le_bytes()));
            }
        }
        sum.finalize()
    }

    /// A text's score as the model gives it, in the labels' unit.
    fn in_labels_unit(&self, score: f32) -> f64 {
        score as f64 * self.normalization.std + self.normalization.mean
    }

    /// Scores of all held-out texts, in the labels' unit, on every rank.
    fn scores<B: TrainBackend>(&self, held_out: &mut HeldOut<B>) -> Result<Vec<f64>> {
        let texts = self.validation.all_texts();
        let own = held_out.own(&texts.iter().map(|t| t.len()).collect::<Vec<_>>());
        let mut sent = Vec::new();
        for group in pack(&own, |i| texts[i].len(), held_out.micro_tokens) {
            let mut batch = PackedBatch::default();
            group.iter().for_each(|&i| push(&mut batch, texts[i]));
            let (pass, sums) = held_out.pass();
            let to = LossOutput { sums, stats: None, gradients: None };
            let nothing = Objective { tokens: None, scalars: None };
            let Pass { backend, model, precision, space } = pass;
            model.objective(backend, (precision, &batch), space, &nothing, to);
            let scores = backend.download_column(space.scalars())?;
            for (&i, score) in group.iter().zip(scores) {
                sent.extend((i as u64).to_le_bytes());
                sent.extend(score.to_le_bytes());
            }
        }
        let mut scores = vec![f64::NAN; texts.len()];
        for rank in held_out.communicator.exchange(sent)? {
            for entry in rank.chunks_exact(12) {
                let (i, score) = entry.split_at(8);
                let i = u64::from_le_bytes(i.try_into().expect("eight bytes")) as usize;
                let score = f32::from_le_bytes(score.try_into().expect("four bytes"));
                *scores.get_mut(i).ok_or_else(|| {
                    Error::Internal(format!("a rank sent the score of text {i}"))
                })? = self.in_labels_unit(score);
            }
        }
        Ok(scores)
    }
}

impl<B: TrainBackend> Task<B> for RewardTask {
    type Batch = RewardBatch<B>;

    fn loss_name(&self) -> (&'static str, &'static str) {
        match &self.train {
            RewardExamples::Labelled(_) if self.normalization == Normalization::NONE => {
                ("squared error of scores", "squared error")
            }
            RewardExamples::Labelled(_) => {
                ("squared error of normalized scores", "squared standard deviations")
            }
            RewardExamples::Preferences(_) => ("loss of preferences", "nats"),
        }
    }

    fn count(&self) -> usize {
        self.train.len()
    }

    fn tokens(&self, example: usize) -> usize {
        self.train.tokens(example)
    }

    fn labels(&self, _: usize) -> usize {
        1
    }

    fn batches(&self, b: &B, examples: &[usize], budget: usize) -> Result<Vec<RewardBatch<B>>> {
        let batch = |group: Vec<usize>| {
            let mut packed = PackedBatch::default();
            group.iter().flat_map(|&i| self.train.texts(i)).for_each(|t| push(&mut packed, t));
            let targets = match &self.train {
                RewardExamples::Preferences(_) => None,
                RewardExamples::Labelled(list) => {
                    let Normalization { mean, std } = self.normalization;
                    let labels: Vec<f32> =
                        group.iter().map(|&i| ((list[i].1 - mean) / std) as f32).collect();
                    let mut targets = Tensor::default();
                    b.upload_column(&mut targets, &labels)?;
                    Some(targets)
                }
            };
            Ok(RewardBatch { packed, targets })
        };
        let groups = pack(examples, |i| self.train.tokens(i), budget);
        groups.into_iter().map(batch).collect()
    }

    fn loss(
        &self,
        Pass { backend, model, precision, space }: Pass<B>,
        batch: &RewardBatch<B>,
        gradients: Option<(f32, Backward<B::Flat>)>,
        sums: &mut B::Sums,
    ) {
        let scale = gradients.as_ref().map_or(0.0, |g| g.0);
        let loss = match &batch.targets {
            Some(targets) => ScalarLoss::Squared { targets, scale },
            None => ScalarLoss::Pairwise { scale },
        };
        let objective = Objective { tokens: None, scalars: Some(&loss) };
        let to = LossOutput { sums, stats: None, gradients: gradients.map(|g| g.1) };
        model.objective(backend, (precision, &batch.packed), space, &objective, to);
    }

    /// The loss, in the unit that is trained in; of labels the correlations, of preferences the
    /// part that is told right.
    fn validate(&self, held_out: &mut HeldOut<B>) -> Result<Option<Validation>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let scores = self.scores(held_out)?;
        let mut measures = BTreeMap::new();
        let mut add = |name: &str, value| measures.insert(format!("validation_{name}"), value);
        let (loss, predictions) = match &self.validation {
            RewardExamples::Labelled(list) => {
                let labels: Vec<f64> = list.iter().map(|l| l.1).collect();
                add("spearman", spearman(&labels, &scores));
                add("pearson", pearson(&labels, &scores));
                add("pairwise_accuracy", pairwise_accuracy(&labels, &scores));
                let squares = labels.iter().zip(&scores).map(|(l, s)| (l - s).powi(2));
                let mse = squares.sum::<f64>() / labels.len() as f64;
                add("mse", mse);
                let pairs = labels.into_iter().zip(scores).collect();
                (mse / self.normalization.std.powi(2), pairs)
            }
            RewardExamples::Preferences(list) => {
                let margins: Vec<f64> = scores.chunks_exact(2).map(|p| p[0] - p[1]).collect();
                let right = |m: &f64| if *m > 0.0 { 1.0 } else { 0.5 * f64::from(*m == 0.0) };
                let n = list.len() as f64;
                add("pairwise_accuracy", margins.iter().map(right).sum::<f64>() / n);
                let loss = |m: &f64| (-m).max(0.0) + (-m.abs()).exp().ln_1p();
                (margins.iter().map(loss).sum::<f64>() / n, Vec::new())
            }
        };
        Ok(Some(Validation { loss, measures, predictions }))
    }
}

/// Lets a model that was trained on normalized labels give scores in the labels' own unit: the
/// head's weights are scaled, and what it lacks for a bias becomes a shift of the final layer norm
/// along them.
pub fn fold_normalization(
    values: &mut [f32],
    config: &crate::models::bloom::BloomConfig,
    n: Normalization,
) {
    let Ok(layout) = config.parameter_tree(crate::models::params::flat_ranges());
    let Some(score) = layout.score else { return };
    let weight: Vec<f64> = values[score.clone()].iter().map(|w| *w as f64 * n.std).collect();
    let squares: f64 = weight.iter().map(|w| w * w).sum();
    if squares > 0.0 {
        let shift = n.mean / squares;
        let bias = &mut values[layout.final_norm.bias.clone()];
        bias.iter_mut().zip(&weight).for_each(|(b, w)| *b += (w * shift) as f32);
    }
    values[score].iter_mut().zip(weight).for_each(|(v, w)| *v = w as f32);
}
