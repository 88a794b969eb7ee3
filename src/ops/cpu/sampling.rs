//! Sampling on the CPU: penalties, temperature, filters, Gumbel-max, as [`crate::ops::sampling`]
//! says.

use super::simd::Isa;
use crate::ops::sampling::{SampledToken, Sampling, SamplingRow, TopTokens};
use crate::random::{philox, philox16, uniform};

/// log(sum(exp(logits))).
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    let sum: f64 = logits.iter().map(|v| (v - max).exp() as f64).sum();
    (max as f64 + sum.ln()) as f32
}

/// The `count` most likely tokens; of equal ones the lower first.
pub fn top_tokens(logits: &[f32], lse: f32, count: usize) -> TopTokens {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let min = kth_largest(logits, count);
    let mut top: TopTokens = logits
        .iter()
        .enumerate()
        .filter(|l| *l.1 >= min)
        .map(|(t, &v)| (t as u32, v - lse))
        .collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1));
    top.truncate(count);
    top
}

/// Chooses among `logits`, whose log-sum-exp is `lse`. `logits` come back as they were.
pub fn sample_token(logits: &mut [f32], lse: f32, row: &SamplingRow) -> SampledToken {
    let top = top_tokens(logits, lse, row.top);
    if let Some(token) = row.forced {
        return SampledToken { token, logprob: logits[token as usize] - lse, top };
    }
    let s = row.sampling;
    let mut before = Vec::new();
    if s.repetition_penalty != 1.0 {
        for &t in row.seen {
            let v = &mut logits[t as usize];
            before.push((t, *v));
            *v = if *v > 0.0 { *v / s.repetition_penalty } else { *v * s.repetition_penalty };
        }
    }
    for &(t, add) in row.bias {
        let v = &mut logits[t as usize];
        before.push((t, *v));
        *v += add;
    }
    let token = if s.temperature <= 0.0 { argmax(logits) } else { sample(logits, row) };
    for (t, v) in before.into_iter().rev() {
        logits[t as usize] = v;
    }
    SampledToken { token, logprob: logits[token as usize] - lse, top }
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (c, chunk) in logits.chunks(64).enumerate() {
        let max = chunk.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
        if max > best.1 {
            let i = chunk.iter().position(|&v| v == max).unwrap_or(0);
            best = (c * 64 + i, max);
        }
    }
    best.0 as u32
}

fn sample(logits: &[f32], row: &SamplingRow) -> u32 {
    let s = row.sampling;
    let filtered = (s.top_k > 0 && s.top_k < logits.len()) || s.top_p < 1.0 || s.min_p > 0.0;
    if !filtered {
        return sample_all(logits, row);
    }
    let mut noise = Noise::new(row);
    let mut best = Best::new(row);
    let mut kept = filter(logits, s);
    kept.sort_unstable_by_key(|k| k.0); // in order of tokens, so that noise comes in fours
    kept.iter().for_each(|&(t, v)| best.consider(t, v, noise.bits(t)));
    best.token
}

/// The token with the largest logit over temperature plus Gumbel noise, the first one of equals.
struct Best {
    inverse: f32,
    token: u32,
    score: f32,
}

impl Best {
    fn new(row: &SamplingRow) -> Best {
        Best { inverse: 1.0 / row.sampling.temperature, token: 0, score: f32::NEG_INFINITY }
    }

    fn consider(&mut self, token: u32, logit: f32, bits: u32) {
        let score = logit * self.inverse - (-uniform(bits).ln()).ln();
        if score > self.score {
            (self.token, self.score) = (token, score);
        }
    }

    /// What the upper 23 random bits of a token must reach, at least, for it to win with a logit of
    /// at most `max`: noise of t or more takes a number of exp(-exp(-t)) or more. What logarithms
    /// in f32 may be off is allowed for.
    fn min_bits(&self, max: f32) -> u32 {
        /// A little above the noise of the largest random number.
        const MAX_NOISE: f64 = 16.7;
        let noise = (self.score - max * self.inverse) as f64 - 1e-3;
        if noise > MAX_NOISE {
            return 1 << 23;
        }
        ((-(-noise).exp()).exp() * 8_388_608.0 - 1.0) as u32
    }
}

/// [`sample`] among all tokens. Logarithms are left to those that the best one so far does not beat
/// by their random bits alone.
fn sample_all(logits: &[f32], row: &SamplingRow) -> u32 {
    /// Four tokens for each of sixteen counters.
    const CHUNK: usize = 64;
    let isa = Isa::detect();
    let mut words = [[0; 16]; 4];
    let mut best = Best::new(row);
    for (i, chunk) in logits.chunks(CHUNK).enumerate() {
        let max = chunk.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
        let min = best.min_bits(max);
        if min >= 1 << 23 {
            continue;
        }
        let first = i * CHUNK;
        philox16(
            isa,
            row.sampling.seed,
            (first / 4) as u32,
            [row.position, row.candidate, 0],
            &mut words,
        );
        let largest = words.iter().flatten().fold(0, |m: u32, &w| m.max(w));
        if largest >> 9 < min {
            continue;
        }
        for (j, &logit) in chunk.iter().enumerate() {
            let bits = words[j % 4][j / 4];
            if bits >> 9 >= min {
                best.consider((first + j) as u32, logit, bits);
            }
        }
    }
    best.token
}

/// Tokens that the filters leave, with their logits.
fn filter(logits: &[f32], s: &Sampling) -> Vec<(u32, f32)> {
    let min = if s.top_k > 0 && s.top_k < logits.len() {
        kth_largest(logits, s.top_k)
    } else {
        f32::NEG_INFINITY
    };
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    let inverse = 1.0 / s.temperature;
    let weight = |v: f32| (((v - max) * inverse) as f64).exp();
    let mut kept: Vec<(u32, f32)> = logits
        .iter()
        .enumerate()
        .filter(|(_, v)| **v >= min)
        .map(|(t, &v)| (t as u32, v))
        .collect();
    if s.top_p < 1.0 {
        let total: f64 = kept.iter().map(|k| weight(k.1)).sum();
        // what is lighter than this adds up to less than 1 - top_p and falls away in any case
        let light = total * (1.0 - s.top_p as f64) / kept.len() as f64;
        kept.retain(|k| weight(k.1) >= light || k.1 == max);
        kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut before = 0.0;
        let keep = kept.iter().take_while(|k| {
            let inside = before < s.top_p as f64 * total;
            before += weight(k.1);
            inside
        });
        let keep = keep.count().max(1);
        kept.truncate(keep);
    }
    if s.min_p > 0.0 {
        kept.retain(|k| weight(k.1) >= s.min_p as f64);
    }
    kept
}

fn kth_largest(logits: &[f32], k: usize) -> f32 {
    // a short list of the largest so far: almost all logits fail one comparison
    if k <= 256 {
        let mut top: Vec<f32> = Vec::with_capacity(k + 1);
        let mut min = f32::NEG_INFINITY;
        for &v in logits {
            if v > min || top.len() < k {
                let at = top.partition_point(|&t| t >= v);
                top.insert(at, v);
                top.truncate(k);
                if top.len() == k {
                    min = top[k - 1];
                }
            }
        }
        return top[k - 1];
    }
    let mut copy = logits.to_vec();
    let (_, v, _) = copy.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    *v
}

/// Random bits for the tokens of one choice; four tokens share a Philox block.
struct Noise {
    seed: u64,
    candidate: u32,
    position: u32,
    block: u32,
    words: [u32; 4],
}

impl Noise {
    fn new(row: &SamplingRow) -> Noise {
        Noise {
            seed: row.sampling.seed,
            candidate: row.candidate,
            position: row.position,
            block: u32::MAX,
            words: [0; 4],
        }
    }

    /// The token's random bits.
    fn bits(&mut self, token: u32) -> u32 {
        if token / 4 != self.block {
            self.block = token / 4;
            self.words = philox(self.seed, [self.block, self.position, self.candidate, 0]);
        }
        self.words[(token % 4) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sampling: &Sampling, position: u32) -> SamplingRow<'_> {
        SamplingRow::new(0, sampling, 0, position)
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits: Vec<f32> = vec![2.0, 1.0, 0.0, -1.0, 0.5];
        let s = Sampling { temperature: 0.8, seed: 11, ..Default::default() };
        let n = 40_000;
        let mut counts = [0; 5];
        for p in 0..n {
            counts[sample_token(&mut logits.clone(), 0.0, &row(&s, p)).token as usize] += 1;
        }
        let total: f64 = logits.iter().map(|v| (*v as f64 / 0.8).exp()).sum();
        for (c, v) in counts.iter().zip(&logits) {
            let expected = (*v as f64 / 0.8).exp() / total;
            // four deviations of a binomial share
            let tolerance = 4.0 * (expected * (1.0 - expected) / n as f64).sqrt();
            assert!((*c as f64 / n as f64 - expected).abs() < tolerance, "{counts:?}");
        }
    }

    /// Beside the definition, over flat and steep logits, with ties, forbidden tokens and a last
    /// chunk that is not whole.
    #[test]
    fn shortcuts_choose_the_same_token() {
        let mut words = crate::random::PhiloxStream::new(3, 4);
        for case in 0..60 {
            let n = [1, 5, 64, 200, 3001][case % 5];
            let steep = [0.0, 1.0, 30.0][case % 3];
            let mut logits: Vec<f32> =
                (0..n).map(|_| (words.uniform() * steep * 8.0).round() / 8.0).collect();
            logits[n / 2] = f32::NEG_INFINITY;
            let s = Sampling {
                temperature: [0.3, 1.0, 1.7][case / 3 % 3],
                seed: case as u64,
                ..Default::default()
            };
            let r = row(&s, case as u32);
            let (mut noise, mut plain) = (Noise::new(&r), Best::new(&r));
            logits
                .iter()
                .enumerate()
                .for_each(|(t, &v)| plain.consider(t as u32, v, noise.bits(t as u32)));
            assert_eq!(sample_all(&logits, &r), plain.token, "{case}");
        }
    }

    #[test]
    fn filters_keep_what_transformers_keeps() {
        let logits = [3.0, 3.0, 2.0, 1.0, 0.0, -5.0];
        let s = Sampling { temperature: 1.0, ..Default::default() };
        let kept = |s: Sampling| {
            let mut k: Vec<u32> = filter(&logits, &s).iter().map(|k| k.0).collect();
            k.sort();
            k
        };
        assert_eq!(kept(Sampling { top_k: 1, ..s }), [0, 1], "ties with the k-th stay");
        assert_eq!(kept(Sampling { top_k: 3, ..s }), [0, 1, 2]);
        // probabilities 0.391, 0.391, 0.144, 0.053, 0.0195, 0.0001
        assert_eq!(kept(Sampling { top_p: 0.39, ..s }), [0]);
        assert_eq!(kept(Sampling { top_p: 0.8, ..s }), [0, 1, 2]);
        assert_eq!(kept(Sampling { top_p: 0.98, ..s }), [0, 1, 2, 3], "the first four have 0.9805");
        assert_eq!(kept(Sampling { top_p: 0.99, ..s }), [0, 1, 2, 3, 4]);
        assert_eq!(kept(Sampling { min_p: 0.3, ..s }), [0, 1, 2]);
        assert_eq!(kept(Sampling { top_k: 4, top_p: 0.5, min_p: 0.9, ..s }), [0, 1]);
        let large: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32).collect();
        assert_eq!(kth_largest(&large, 3), 997.0);
        assert_eq!(kth_largest(&large, 500), 500.0);
    }

    #[test]
    fn penalties_push_seen_tokens_down_and_leave_logits_alone() {
        let mut logits = [1.0, 0.9, -0.1, -0.2];
        let s = Sampling { repetition_penalty: 1.2, ..Default::default() };
        let r = SamplingRow { seen: &[0], ..row(&s, 0) };
        assert_eq!(sample_token(&mut logits, 0.0, &r).token, 1);
        assert_eq!(logits, [1.0, 0.9, -0.1, -0.2]);
        let mut negative = [-0.1, -0.11];
        assert_eq!(sample_token(&mut negative, 0.0, &r).token, 1);
    }

    #[test]
    fn biases_forced_tokens_and_likely_ones() {
        let mut logits = [1.0, 0.9, -0.1, 0.9];
        let lse = log_sum_exp(&logits);
        let s = Sampling { repetition_penalty: 1.2, ..Default::default() };
        let r = SamplingRow {
            seen: &[0],
            bias: &[(0, f32::NEG_INFINITY), (3, 0.5)],
            top: 3,
            ..row(&s, 0)
        };
        let c = sample_token(&mut logits, lse, &r);
        assert_eq!((c.token, c.logprob), (3, 0.9 - lse), "the log-probability is the model's own");
        assert_eq!(c.top, [(0, 1.0 - lse), (1, 0.9 - lse), (3, 0.9 - lse)]);
        assert_eq!(logits, [1.0, 0.9, -0.1, 0.9]);
        let c = sample_token(&mut logits, lse, &SamplingRow { forced: Some(2), ..r });
        assert_eq!((c.token, c.logprob), (2, -0.1 - lse));
        let warm = Sampling { temperature: 1.0, ..s };
        let r = SamplingRow {
            bias: &[(0, f32::NEG_INFINITY), (1, -f32::INFINITY), (3, -1e9)],
            ..row(&warm, 0)
        };
        assert!(
            (0..50)
                .all(|p| sample_token(&mut logits, lse, &SamplingRow { position: p, ..r }).token
                    == 2)
        );
    }
}
