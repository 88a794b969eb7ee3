//! Several rewards as one.

use super::{Reward, ScoredText, check_scores, failed};
use crate::error::{Error, Result};
use crate::files::exact;
use serde::{Deserialize, Serialize};

/// Mean and standard deviation of numbers that come one after the other (Welford).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMoments {
    count: u64,
    #[serde(with = "exact")]
    mean: f64,
    /// Sum of squared distances from the mean.
    #[serde(with = "exact")]
    squares: f64,
}

impl RunningMoments {
    /// Takes in a number.
    pub fn push(&mut self, number: f64) {
        self.count += 1;
        let distance = number - self.mean;
        self.mean += distance / self.count as f64;
        self.squares += distance * (number - self.mean);
    }

    /// Numbers so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 before the first.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Their standard deviation; 0 before the second.
    pub fn std(&self) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            count => (self.squares.max(0.0) / (count - 1) as f64).sqrt(),
        }
    }

    /// How many standard deviations `number` is above the mean; 0 where all numbers are the same.
    fn normalized(&self, number: f64) -> f64 {
        // below this the deviation is the rounding of the sums
        let least = 1e-9 * self.mean.abs().max(1e-9);
        match self.std() {
            std if std > least => (number - self.mean) / std,
            _ => 0.0,
        }
    }
}

/// Where the running statistics of a [`CombinedReward`] stand, for a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CombinedState {
    /// Those of each reward, in order.
    pub parts: Vec<PartState>,
}

/// Where one reward's statistics stand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartState {
    /// The reward's name.
    pub name: String,
    /// Its scores so far.
    pub moments: RunningMoments,
}

/// A batch's scores.
#[derive(Clone, Debug, PartialEq)]
pub struct CombinedScores {
    /// The weighted sum for each rewrite.
    pub total: Vec<f64>,
    /// Each reward's own scores, neither weighted nor normalized: `parts[reward][rewrite]`.
    pub parts: Vec<Vec<f64>>,
}

/// The weighted sum of rewards.
pub struct CombinedReward<'a> {
    parts: Vec<Part<'a>>,
    normalize: bool,
}

struct Part<'a> {
    reward: Box<dyn Reward + 'a>,
    weight: f64,
    moments: RunningMoments,
}

impl<'a> CombinedReward<'a> {
    /// A sum of rewards with their weights. If they are normalized, each score is taken relative to
    /// the mean and in units of the standard deviation of all scores of its reward so far, those of
    /// the same batch included.
    pub fn new(parts: Vec<(Box<dyn Reward + 'a>, f64)>, normalize: bool) -> CombinedReward<'a> {
        let part = |(reward, weight)| Part { reward, weight, moments: RunningMoments::default() };
        CombinedReward { parts: parts.into_iter().map(part).collect(), normalize }
    }

    /// The rewards' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|p| p.reward.name())
    }

    /// The rewards' weights, in order.
    pub fn weights(&self) -> impl Iterator<Item = f64> {
        self.parts.iter().map(|p| p.weight)
    }

    /// Each reward's own scores of a batch, neither weighted nor normalized:
    /// `[reward][rewrite]`.
    ///
    /// # Errors
    /// If a reward fails, or gives anything but a finite number for each rewrite.
    pub fn parts(&mut self, rewrites: &[ScoredText]) -> Result<Vec<Vec<f64>>> {
        let score = |part: &mut Part| {
            let scores = part.reward.score(rewrites)?;
            check_scores(part.reward.name(), &scores, rewrites.len())?;
            Ok(scores)
        };
        self.parts.iter_mut().map(score).collect()
    }

    /// Adds up what [`CombinedReward::parts`] gave, or what has become of it.
    ///
    /// # Errors
    /// If a sum is too large. Statistics are then those before the batch.
    pub fn combine(&mut self, parts: Vec<Vec<f64>>) -> Result<CombinedScores> {
        let mut moments: Vec<RunningMoments> = self.parts.iter().map(|p| p.moments).collect();
        let mut total = vec![0.0; parts.first().map_or(0, Vec::len)];
        for ((part, moments), scores) in self.parts.iter().zip(&mut moments).zip(&parts) {
            scores.iter().for_each(|score| moments.push(*score));
            for (sum, score) in total.iter_mut().zip(scores) {
                let score = if self.normalize { moments.normalized(*score) } else { *score };
                *sum += part.weight * score;
            }
            if total.iter().any(|sum| !sum.is_finite()) || !moments.squares.is_finite() {
                return Err(failed(
                    part.reward.name(),
                    "its scores are too large to add up; give it a smaller scale",
                ));
            }
        }
        self.parts.iter_mut().zip(moments).for_each(|(part, moments)| part.moments = moments);
        Ok(CombinedScores { total, parts })
    }

    /// [`CombinedReward::parts`], added up.
    ///
    /// # Errors
    /// As for the two.
    pub fn score(&mut self, rewrites: &[ScoredText]) -> Result<CombinedScores> {
        let parts = self.parts(rewrites)?;
        self.combine(parts)
    }

    /// Where the statistics stand.
    pub fn state(&self) -> CombinedState {
        let state = |p: &Part| PartState { name: p.reward.name().to_owned(), moments: p.moments };
        CombinedState { parts: self.parts.iter().map(state).collect() }
    }

    /// Goes on with the statistics of an earlier run.
    ///
    /// # Errors
    /// If they are of other rewards.
    pub fn restore(&mut self, state: &CombinedState) -> Result<()> {
        if !self.names().eq(state.parts.iter().map(|p| p.name.as_str())) {
            let list = |names: &mut dyn Iterator<Item = &str>| names.collect::<Vec<_>>().join(", ");
            return Err(Error::invalid(format!(
                "the run to resume has the rewards {}, not {}; give it the same --reward flags, in \
                 the same order",
                list(&mut state.parts.iter().map(|p| p.name.as_str())),
                list(&mut self.names()),
            )));
        }
        for (part, state) in self.parts.iter_mut().zip(&state.parts) {
            part.moments = state.moments;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives numbers that are in the outputs, times a factor.
    struct Parsed(&'static str, f64);

    impl Reward for Parsed {
        fn name(&self) -> &str {
            self.0
        }

        fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
            Ok(rewrites.iter().map(|r| r.output.parse::<f64>().unwrap() * self.1).collect())
        }
    }

    fn batch(reward: &mut CombinedReward, outputs: &[&str]) -> Result<CombinedScores> {
        let rewrites: Vec<ScoredText> =
            outputs.iter().map(|output| ScoredText { raw_prompt: "", output }).collect();
        reward.score(&rewrites)
    }

    fn two(normalize: bool) -> CombinedReward<'static> {
        let parts: Vec<(Box<dyn Reward>, f64)> =
            vec![(Box::new(Parsed("a", 1.0)), 0.5), (Box::new(Parsed("b", -100.0)), 2.0)];
        CombinedReward::new(parts, normalize)
    }

    #[test]
    fn sums_are_weighted_and_parts_kept() {
        let scores = batch(&mut two(false), &["1", "2"]).unwrap();
        assert_eq!(scores.total, [0.5 - 200.0, 1.0 - 400.0]);
        assert_eq!(scores.parts, [[1.0, 2.0], [-100.0, -200.0]]);
        assert_eq!(batch(&mut two(true), &[]).unwrap().total, [0.0; 0]);
    }

    #[test]
    fn normalized_parts_have_the_scale_of_their_weights() {
        let mut reward = two(true);
        let scores = batch(&mut reward, &["1", "2", "3"]).unwrap();
        assert_eq!(scores.total, [-0.5 + 2.0, 0.0, 0.5 - 2.0], "std of 1, 2, 3 is 1");
        // over 1, 2, 3, 10: mean 4, squared distances of 50 in all
        let later = batch(&mut reward, &["10"]).unwrap();
        assert!((later.total[0] + 1.5 * 6.0 / (50f64 / 3.0).sqrt()).abs() < 1e-12, "{later:?}");
        let mut constant = two(true);
        assert_eq!(batch(&mut constant, &["0.1"; 1000]).unwrap().total, [0.0; 1000]);
    }

    #[test]
    fn state_comes_back_with_the_same_bits() {
        let mut reward = two(true);
        batch(&mut reward, &["0.1", "0.7", "1e-7", "12345.678"]).unwrap();
        let text = serde_json::to_string(&reward.state()).unwrap();
        let mut resumed = two(true);
        resumed.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(resumed.state(), reward.state());
        let next = ["0.3", "-4.1"];
        assert_eq!(batch(&mut resumed, &next).unwrap(), batch(&mut reward, &next).unwrap());
        let mut one = CombinedReward::new(vec![(Box::new(Parsed("a", 1.0)), 1.0)], true);
        let error = one.restore(&reward.state()).unwrap_err().to_string();
        assert!(error.starts_with("the run to resume has the rewards a, b, not a;"), "{error}");
        let mut broken = serde_json::to_value(reward.state()).unwrap();
        for bad in ["NaN", "inf", "", "x"] {
            broken["parts"][0]["moments"]["mean"] = bad.into();
            let error = serde_json::from_value::<CombinedState>(broken.clone()).unwrap_err();
            assert!(error.to_string().contains("is no finite number"), "{error}");
        }
    }

    #[test]
    fn bad_scores_are_refused_and_leave_no_trace() {
        let mut reward = two(true);
        let before = reward.state();
        for (outputs, expected) in
            [(["1", "NaN"], "reward a: score 2 of 2"), (["1e200", "-1e200"], "too large")]
        {
            let error = batch(&mut reward, &outputs).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(reward.state(), before);
    }

    #[test]
    fn moments_are_those_of_the_numbers() {
        let mut moments = RunningMoments::default();
        assert_eq!((moments.mean(), moments.std()), (0.0, 0.0));
        // far from zero, where a sum of squares would lose the deviation
        [4.0, 7.0, 13.0, 16.0].iter().for_each(|x| moments.push(1e9 + x));
        assert_eq!((moments.count(), moments.mean()), (4, 1e9 + 10.0));
        assert!((moments.std() - 30f64.sqrt()).abs() < 1e-6);
    }
}
