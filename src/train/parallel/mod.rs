//! Data parallelism: ranks with a copy of the model each train on parts of every batch.
//!
//! Gradients are summed over the ranks bucket by bucket, while the backward pass goes on; each rank
//! keeps the moments of a part of the parameters alone, updates that part and sends it to the
//! others (ZeRO's first stage, arXiv 1910.02054). What the ranks send is behind [`Communicator`].

pub mod buckets;
pub mod host;
pub mod mesh;
pub mod nccl;
pub mod world;

use crate::error::Result;
use crate::ops::train::TrainBackend;
use buckets::{Bucket, Buckets};

/// A rank's connection to the others.
///
/// Every rank calls the same operations in the same order. What an operation gives is there when
/// the others have called it too; where results lie on a device, nobody may have waited for it.
pub trait Communicator<B: TrainBackend> {
    /// Which of the ranks this is, from 0 on.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn ranks(&self) -> usize;

    /// Parameters of a bucket that it sends best.
    fn bucket_elements(&self) -> usize {
        8 << 20
    }

    /// Begins to sum a bucket over the ranks: when [`Communicator::wait`] has returned, each rank
    /// has the sums of its own part of it. Until then nothing else may touch the bucket.
    ///
    /// # Errors
    /// If the device or the connection fails.
    fn reduce_scatter(&self, b: &B, flat: &mut B::Flat, bucket: &Bucket) -> Result<()>;

    /// Waits for what [`Communicator::reduce_scatter`] began; later work of the device comes after
    /// it.
    ///
    /// # Errors
    /// If another rank has ended, or the connection fails.
    fn wait(&self, b: &B, flat: &mut B::Flat) -> Result<()>;

    /// Gives every rank's own part of these buckets to all others.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    fn all_gather(&self, b: &B, flat: &mut B::Flat, buckets: &Buckets) -> Result<()>;

    /// Adds the sums of a step up over all ranks, in the same order everywhere.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    fn all_reduce(&self, b: &B, sums: &mut B::Sums) -> Result<()>;

    /// What every rank gave, by rank, at rank 0; nothing at the others.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// What every rank gave, by rank, at all of them.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    fn exchange(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>>;
}

/// The only rank, which has nobody to wait for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl<B: TrainBackend> Communicator<B> for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn bucket_elements(&self) -> usize {
        usize::MAX
    }

    fn reduce_scatter(&self, _: &B, _: &mut B::Flat, _: &Bucket) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: &B, _: &mut B::Flat) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, _: &B, _: &mut B::Flat, _: &Buckets) -> Result<()> {
        Ok(())
    }

    fn all_reduce(&self, _: &B, _: &mut B::Sums) -> Result<()> {
        Ok(())
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes])
    }

    fn exchange(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes])
    }
}

/// The items that each of `ranks` ranks takes of some with these lengths: the longest first, each
/// to the rank with the least so far; in their order. The same on every rank.
pub fn share(lengths: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    let mut longest: Vec<usize> = (0..lengths.len()).collect();
    longest.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut shares = vec![(0, Vec::new()); ranks];
    for i in longest {
        let least = shares.iter_mut().min_by_key(|(sum, items)| (*sum, items.len()));
        let (sum, items) = least.expect("there is a rank");
        *sum += lengths[i];
        items.push(i);
    }
    let sorted = |(_, mut items): (usize, Vec<usize>)| {
        items.sort_unstable();
        items
    };
    shares.into_iter().map(sorted).collect()
}

/// Sums gradients over the ranks as the backward pass finishes them.
pub struct GradientReduction<'a, B: TrainBackend> {
    backend: &'a B,
    communicator: &'a dyn Communicator<B>,
    buckets: &'a Buckets,
    /// Buckets, from the last parameters to the first, that have been begun.
    begun: usize,
    failure: Option<crate::error::Error>,
}

impl<'a, B: TrainBackend> GradientReduction<'a, B> {
    /// Nothing has been begun.
    pub fn new(
        backend: &'a B,
        communicator: &'a dyn Communicator<B>,
        buckets: &'a Buckets,
    ) -> Self {
        GradientReduction { backend, communicator, buckets, begun: 0, failure: None }
    }

    /// The gradients of all parameters from `first` on are final.
    pub fn finished_from(&mut self, grads: &mut B::Flat, first: usize) {
        let due =
            self.buckets.from_the_last().skip(self.begun).take_while(|b| b.range.start >= first);
        for bucket in due {
            self.begun += 1;
            let begun = self.communicator.reduce_scatter(self.backend, grads, &bucket);
            self.failure = self.failure.take().or(begun.err());
        }
    }

    /// All gradients are final; waits for their sums.
    ///
    /// # Errors
    /// What has failed since the first bucket.
    pub fn finish(mut self, grads: &mut B::Flat) -> Result<()> {
        self.finished_from(grads, 0);
        // also what was begun before a failure has to end before the gradients are given up
        let waited = self.communicator.wait(self.backend, grads);
        self.failure.map_or(waited, Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_even_and_in_order() {
        let lengths = [9, 1, 5, 5, 3, 8, 1, 2];
        let shares = share(&lengths, 3);
        let mut all: Vec<usize> = shares.concat();
        all.sort_unstable();
        assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        let tokens: Vec<usize> =
            shares.iter().map(|s| s.iter().map(|&i| lengths[i]).sum()).collect();
        assert!(tokens.iter().max().unwrap() - tokens.iter().min().unwrap() <= 2, "{tokens:?}");
        assert!(shares.iter().all(|s| s.is_sorted()));
        assert_eq!(share(&lengths, 1), vec![(0..lengths.len()).collect::<Vec<_>>()]);
        assert_eq!(share(&[7], 2), vec![vec![0], vec![]]);
    }
}
