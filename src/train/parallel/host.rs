//! Ranks that exchange gradients through the memory of the host: any backend, over any [`Mesh`].

use super::Communicator;
use super::buckets::{Bucket, Buckets};
use super::mesh::Mesh;
use crate::error::{Error, Result};
use crate::ops::train::{StepSums, TrainBackend};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce(&Mesh) + Send>;

/// A [`Communicator`] over a [`Mesh`], with a thread of its own that sends, receives and sums while
/// the backward pass goes on.
pub struct HostCommunicator {
    rank: usize,
    ranks: usize,
    bucket_elements: usize,
    /// Until it ends.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// The sums of this rank's parts that have not been waited for.
    begun: RefCell<Vec<Receiver<Result<PartSum>>>>,
}

/// Where a part begins, and its sums.
type PartSum = (usize, Vec<f32>);

impl HostCommunicator {
    /// A communicator over these connections.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(mesh: Mesh) -> Result<HostCommunicator> {
        HostCommunicator::with_buckets(mesh, 1 << 20)
    }

    /// A communicator whose buckets have about this many parameters.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn with_buckets(mesh: Mesh, bucket_elements: usize) -> Result<HostCommunicator> {
        let (rank, ranks) = (mesh.rank(), mesh.ranks());
        let (jobs, work) = channel::<Job>();
        let thread = std::thread::Builder::new().name("communicator".into());
        let thread = thread.spawn(move || work.iter().for_each(|job| job(&mesh)));
        let thread = thread.map_err(|e| Error::Internal(format!("no thread could start: {e}")))?;
        let (jobs, thread, begun) = (Some(jobs), Some(thread), RefCell::default());
        Ok(HostCommunicator { rank, ranks, bucket_elements, jobs, thread, begun })
    }

    fn start(&self, job: impl FnOnce(&Mesh) + Send + 'static) -> Result<()> {
        let jobs = self.jobs.as_ref().expect("the thread works as long as this is there");
        jobs.send(Box::new(job)).map_err(|_| gone())
    }

    /// Has the thread do a piece of work, and waits for what comes of it.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Mesh) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (done, result) = channel();
        self.start(move |mesh| drop(done.send(work(mesh))))?;
        result.recv().map_err(|_| gone())?
    }

    /// [`Communicator::gather`], for any backend.
    ///
    /// # Errors
    /// As for that.
    pub fn gather_bytes(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.run(move |mesh| mesh.gather(bytes))
    }

    /// [`Communicator::exchange`], for any backend.
    ///
    /// # Errors
    /// As for that.
    pub fn exchange_bytes(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.run(move |mesh| mesh.exchange(bytes))
    }
}

impl Drop for HostCommunicator {
    /// Ends the thread, whose connections write what they still have.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn gone() -> Error {
    Error::Internal("the thread that talks to the other ranks has ended".into())
}

/// This rank's part of a bucket, summed over the ranks in their order, so that the sum does not
/// depend on which of them was faster.
fn reduce(mesh: &Mesh, bucket: &Bucket, values: &[f32]) -> Result<Vec<f32>> {
    let of = |rank: usize| {
        let Range { start, end } = bucket.part(rank);
        &values[start - bucket.range.start..end - bucket.range.start]
    };
    for rank in mesh.others() {
        mesh.send(rank, bytemuck::cast_slice(of(rank)).to_vec())?;
    }
    let own = of(mesh.rank());
    let mut sum: Option<Vec<f32>> = None;
    for rank in 0..mesh.ranks() {
        let part = if rank == mesh.rank() { own.to_vec() } else { floats(mesh, rank, own.len())? };
        match &mut sum {
            Some(sum) => sum.iter_mut().zip(&part).for_each(|(sum, v)| *sum += v),
            None => sum = Some(part),
        }
    }
    Ok(sum.unwrap_or_default())
}

/// The next message of a rank, which is `count` numbers.
fn floats(mesh: &Mesh, rank: usize, count: usize) -> Result<Vec<f32>> {
    let values: Vec<f32> = numbers(&mesh.receive(rank)?)?;
    if values.len() == count {
        return Ok(values);
    }
    let got = values.len();
    Err(Error::Internal(format!("rank {rank} sent {got} numbers where {count} were expected")))
}

fn numbers<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Result<Vec<T>> {
    if !bytes.len().is_multiple_of(size_of::<T>()) {
        return Err(Error::Internal("a rank sent a part of a number".into()));
    }
    Ok(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
}

impl<B: TrainBackend> Communicator<B> for HostCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn bucket_elements(&self) -> usize {
        self.bucket_elements
    }

    fn reduce_scatter(&self, b: &B, flat: &mut B::Flat, bucket: &Bucket) -> Result<()> {
        let values = b.read(flat, bucket.range.clone())?.into_owned();
        let (bucket, (reducing, reduced)) = (bucket.clone(), channel());
        self.start(move |mesh| {
            let first = bucket.part(mesh.rank()).start;
            let sum = reduce(mesh, &bucket, &values).map(|sum| (first, sum));
            // nobody waits any more only if this rank has failed
            let _ = reducing.send(sum);
        })?;
        self.begun.borrow_mut().push(reduced);
        Ok(())
    }

    fn wait(&self, b: &B, flat: &mut B::Flat) -> Result<()> {
        for reduced in self.begun.take() {
            let (first, sum) = reduced.recv().map_err(|_| gone())??;
            b.write(flat, first, &sum)?;
        }
        Ok(())
    }

    fn all_gather(&self, b: &B, flat: &mut B::Flat, buckets: &Buckets) -> Result<()> {
        for bucket in buckets.iter() {
            let own = b.read(flat, bucket.part(self.rank))?.into_owned();
            let sizes: Vec<usize> = (0..self.ranks).map(|r| bucket.part(r).len()).collect();
            let parts = self.run(move |mesh| {
                for rank in mesh.others() {
                    mesh.send(rank, bytemuck::cast_slice(&own).to_vec())?;
                }
                let others = mesh.others().map(|r| Ok((r, floats(mesh, r, sizes[r])?)));
                others.collect::<Result<Vec<_>>>()
            })?;
            for (rank, values) in parts {
                b.write(flat, bucket.part(rank).start, &values)?;
            }
        }
        Ok(())
    }

    fn all_reduce(&self, b: &B, sums: &mut B::Sums) -> Result<()> {
        let own = b.sums(sums)?;
        let own = bytemuck::cast_slice(&[own.loss, own.squared_norm]).to_vec();
        let mut total = StepSums::default();
        for bytes in self.exchange_bytes(own)? {
            let values: Vec<f64> = numbers(&bytes)?;
            let &[loss, squared_norm] = &values[..] else {
                return Err(Error::Internal("a rank sent other sums than a step's".into()));
            };
            total.loss += loss;
            total.squared_norm += squared_norm;
        }
        b.set_sums(sums, total)
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.gather_bytes(bytes)
    }

    fn exchange(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.exchange_bytes(bytes)
    }
}
