//! How far predictions agree with labels.

/// Pearson's correlation; 0 where either side does not vary.
pub fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
    let (mx, my) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(y) {
        xy += (a - mx) * (b - my);
        xx += (a - mx) * (a - mx);
        yy += (b - my) * (b - my);
    }
    if xx > 0.0 && yy > 0.0 { xy / (xx * yy).sqrt() } else { 0.0 }
}

/// Ranks from 1, with their mean for those that are equal.
fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
    let mut ranks = vec![0.0; x.len()];
    let mut first = 0;
    for equal in order.chunk_by(|&a, &b| x[a] == x[b]) {
        let rank = first as f64 + (equal.len() as f64 + 1.0) / 2.0;
        equal.iter().for_each(|&i| ranks[i] = rank);
        first += equal.len();
    }
    ranks
}

/// Spearman's correlation of ranks; 0 where either side does not vary.
pub fn spearman(x: &[f64], y: &[f64]) -> f64 {
    pearson(&ranks(x), &ranks(y))
}

/// Of the pairs with different labels, the part whose predictions are in the labels' order; equal
/// predictions count one half. 0.5 if all labels are equal.
pub fn pairwise_accuracy(labels: &[f64], predictions: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..labels.len()).collect();
    order.sort_by(|&a, &b| labels[a].total_cmp(&labels[b]));
    // twice the rank of a prediction is a whole number from 2 on, equal for equal ones
    let places: Vec<usize> = ranks(predictions).iter().map(|r| (2.0 * r) as usize).collect();
    let mut below = Counts::new(2 * labels.len() + 1);
    let (mut pairs, mut right, mut seen) = (0.0, 0.0, 0);
    for equal in order.chunk_by(|&a, &b| labels[a] == labels[b]) {
        for &i in equal {
            let (lower, with_ties) = (below.up_to(places[i] - 1), below.up_to(places[i]));
            right += lower as f64 + 0.5 * (with_ties - lower) as f64;
            pairs += seen as f64;
        }
        equal.iter().for_each(|&i| below.add(places[i]));
        seen += equal.len();
    }
    if pairs > 0.0 { right / pairs } else { 0.5 }
}

/// How many numbers up to a limit have been counted: a Fenwick tree.
struct Counts(Vec<usize>);

impl Counts {
    fn new(largest: usize) -> Counts {
        Counts(vec![0; largest + 1])
    }

    fn add(&mut self, mut number: usize) {
        while number < self.0.len() {
            self.0[number] += 1;
            number += number & number.wrapping_neg();
        }
    }

    fn up_to(&self, mut number: usize) -> usize {
        let mut count = 0;
        while number > 0 {
            count += self.0[number];
            number &= number - 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::PhiloxStream;

    #[test]
    fn a_small_case_with_ties() {
        let (x, y) = ([1.0, 2.0, 2.0, 4.0, 7.0, -3.0], [0.5, 1.5, 3.0, 3.0, 2.5, 0.0]);
        assert!((pearson(&x, &y) - 0.758_295_770_538_014_9).abs() < 1e-12, "{}", pearson(&x, &y));
        let rho = spearman(&x, &y);
        assert!((rho - 0.75).abs() < 1e-12, "{rho}");
        assert_eq!(pearson(&x, &[1.0; 6]), 0.0);
    }

    #[test]
    fn pairs_are_counted_as_one_by_one() {
        let mut random = PhiloxStream::new(1, 0);
        for n in [0, 1, 2, 7, 60] {
            let mut draw = || (0..n).map(|_| random.below(9) as f64).collect::<Vec<_>>();
            let (labels, predictions) = (draw(), draw());
            let (mut pairs, mut right) = (0.0, 0.0);
            for i in 0..n {
                for j in (0..n).filter(|&j| labels[j] > labels[i]) {
                    pairs += 1.0;
                    right += match predictions[j].total_cmp(&predictions[i]) {
                        std::cmp::Ordering::Greater => 1.0,
                        std::cmp::Ordering::Equal => 0.5,
                        std::cmp::Ordering::Less => 0.0,
                    };
                }
            }
            let expected = if pairs > 0.0 { right / pairs } else { 0.5 };
            assert_eq!(pairwise_accuracy(&labels, &predictions), expected);
        }
    }
}
