//! How a model's flat parameters are divided: into buckets that are summed at a time, and each
//! bucket into the parts of the ranks.

use std::ops::Range;

/// What parts of ranks are multiples of, so that kernels take several elements at a time.
const GRANULARITY: usize = 8;

/// Neighbouring parameters that are summed over the ranks together.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// Which parameters.
    pub range: Range<usize>,
    ranks: usize,
}

impl Bucket {
    /// Elements that every rank has of it.
    pub fn part_len(&self) -> usize {
        self.range.len() / self.ranks / GRANULARITY * GRANULARITY
    }

    /// The few at its end that are left when all parts are alike; they are the last rank's.
    pub fn remainder(&self) -> Range<usize> {
        self.range.start + self.part_len() * self.ranks..self.range.end
    }

    /// The part of a rank.
    pub fn part(&self, rank: usize) -> Range<usize> {
        let first = self.range.start + rank * self.part_len();
        let last = if rank + 1 == self.ranks { self.range.end } else { first + self.part_len() };
        first..last
    }
}

/// All buckets of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    count: usize,
    size: usize,
    ranks: usize,
}

impl Buckets {
    /// Divides `count` parameters into buckets of about `size` for this many ranks.
    pub fn new(count: usize, size: usize, ranks: usize) -> Buckets {
        let parts = ranks * GRANULARITY;
        let size = size.clamp(1, count.max(1)).next_multiple_of(parts);
        Buckets { count, size, ranks }
    }

    /// All parameters.
    pub fn count(&self) -> usize {
        self.count
    }

    /// From the first parameters to the last.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Bucket> + use<> {
        let Buckets { count, size, ranks } = *self;
        let bucket = move |i: usize| Bucket { range: i * size..((i + 1) * size).min(count), ranks };
        (0..count.div_ceil(size)).map(bucket)
    }

    /// In the order in which the backward pass finishes them.
    pub fn from_the_last(&self) -> impl Iterator<Item = Bucket> + use<> {
        self.iter().rev()
    }

    /// A rank's parts of all buckets, those that are neighbours as one.
    pub fn shard(&self, rank: usize) -> Vec<Range<usize>> {
        let mut shard: Vec<Range<usize>> = Vec::new();
        for part in self.iter().map(|b| b.part(rank)).filter(|p| !p.is_empty()) {
            match shard.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => shard.push(part),
            }
        }
        shard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_has_one_owner() {
        for (count, size, ranks) in
            [(1, 1, 1), (1000, usize::MAX, 1), (1000, 64, 2), (1003, 100, 3), (5, 0, 4), (0, 8, 2)]
        {
            let buckets = Buckets::new(count, size, ranks);
            let mut owners = vec![0; count];
            for rank in 0..ranks {
                for range in buckets.shard(rank) {
                    owners[range].iter_mut().for_each(|o| *o += 1);
                }
            }
            assert!(owners.iter().all(|&o| o == 1), "{count} {size} {ranks}");
            for bucket in buckets.iter() {
                assert!(bucket.remainder().len() < ranks * GRANULARITY);
                assert!((0..ranks).all(|r| bucket.part(r).start % GRANULARITY == 0));
            }
        }
        assert_eq!(Buckets::new(1000, usize::MAX, 1).shard(0), vec![0..1000]);
    }

    #[test]
    fn buckets_are_finished_from_the_last_on() {
        let starts: Vec<usize> =
            Buckets::new(100, 40, 1).from_the_last().map(|b| b.range.start).collect();
        assert_eq!(starts, [80, 40, 0]);
    }
}
