//! Groups of texts that share most of their words: MinHash over word pairs, bands to find
//! candidates, exact Jaccard similarity to confirm them.

use crate::random::philox;
use crate::text::content_words::words;
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Bands of rows of the signature: a pair of similarity s meets with chance 1 - (1 - s^4)^10,
/// 0.48 at 0.5 and 0.99 at 0.8.
const BANDS: usize = 10;
const ROWS: usize = 4;

/// Disjoint sets.
pub struct SimilarGroups {
    parent: Vec<usize>,
}

impl SimilarGroups {
    /// Sets of one member each, from 0 to `count - 1`.
    pub fn new(count: usize) -> SimilarGroups {
        SimilarGroups { parent: (0..count).collect() }
    }

    /// The representative of the set of `i`: its smallest member.
    pub fn find(&mut self, mut i: usize) -> usize {
        while self.parent[i] != i {
            self.parent[i] = self.parent[self.parent[i]];
            i = self.parent[i];
        }
        i
    }

    /// Merges the sets of `a` and `b`.
    pub fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.parent[a.max(b)] = a.min(b);
    }
}

fn hash(value: impl Hash) -> u64 {
    // DefaultHasher::new has fixed keys: results are the same in every run
    let mut h = DefaultHasher::new();
    value.hash(&mut h);
    h.finish()
}

fn shingles(text: &str) -> HashSet<u64> {
    let words = words(text);
    if words.len() < 2 {
        return words.iter().map(hash).collect();
    }
    words.windows(2).map(hash).collect()
}

/// Pairs `(i, j, similarity)` with i < j of texts whose sets of word pairs have a Jaccard
/// similarity of `least` or more, as far as the bands find them.
pub fn similar_pairs(texts: &[&str], least: f64) -> Vec<(usize, usize, f64)> {
    let sets: Vec<HashSet<u64>> = texts.iter().map(|t| shingles(t)).collect();
    let mut buckets: HashMap<(usize, u64), Vec<usize>> = HashMap::new();
    for (i, set) in sets.iter().enumerate() {
        if set.is_empty() {
            continue;
        }
        let mut signature = [u32::MAX; BANDS * ROWS];
        for &s in set {
            for (block, four) in signature.chunks_exact_mut(4).enumerate() {
                for (least, h) in four.iter_mut().zip(philox(s, [block as u32, 0, 0, 0])) {
                    *least = (*least).min(h);
                }
            }
        }
        for (band, rows) in signature.chunks_exact(ROWS).enumerate() {
            buckets.entry((band, hash(rows))).or_default().push(i);
        }
    }
    let mut candidates = HashSet::new();
    for members in buckets.values() {
        // in a crowded bucket neighbours suffice: groups are joined along the chain
        for pair in members.windows(2) {
            candidates.insert((pair[0], pair[1]));
        }
        if members.len() <= 50 {
            for (k, &i) in members.iter().enumerate() {
                candidates.extend(members[k + 1..].iter().map(|&j| (i, j)));
            }
        }
    }
    let mut found: Vec<(usize, usize, f64)> = candidates
        .into_iter()
        .filter_map(|(i, j)| {
            let common = sets[i].intersection(&sets[j]).count();
            let similarity = common as f64 / (sets[i].len() + sets[j].len() - common) as f64;
            (similarity >= least).then_some((i, j, similarity))
        })
        .collect();
    found.sort_by_key(|p| (p.0, p.1));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reworded_copies_are_found_and_strangers_are_not() {
        let texts = [
            "a castle on a hill at sunset, highly detailed, digital painting, trending on \
            artstation",
            "portrait of an old sailor, oil on canvas",
            "a castle on a hill at sunset, highly detailed, digital painting, trending on \
            artstation, 8k",
        ];
        let pairs = similar_pairs(&texts, 0.7);
        assert_eq!(pairs.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>(), [(0, 2)]);
        let mut groups = SimilarGroups::new(3);
        groups.join(2, 0);
        assert_eq!((groups.find(2), groups.find(1)), (0, 1));
    }
}
