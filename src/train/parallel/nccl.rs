//! Ranks whose GPUs exchange gradients and parameters themselves.

use super::Communicator;
use super::buckets::{Bucket, Buckets};
use super::host::HostCommunicator;
use super::mesh::Mesh;
use crate::device::cuda::Driver;
use crate::device::nccl::Nccl;
use crate::error::{Error, Result};
use crate::ops::cuda::Cuda;
use crate::ops::train::TrainBackend;
use std::rc::Rc;

/// A [`Communicator`] over NCCL; the little that the hosts tell each other goes through a [`Mesh`].
pub struct NcclCommunicator {
    /// Given up first, so that the others learn of it.
    host: HostCommunicator,
    nccl: Nccl,
    place: (usize, usize),
}

impl NcclCommunicator {
    /// Connects the GPUs of ranks that have met.
    ///
    /// # Errors
    /// If a rank lacks the library, or the library cannot connect them.
    pub fn new(driver: &Rc<Driver>, mesh: Mesh) -> Result<NcclCommunicator> {
        let place = (mesh.rank(), mesh.ranks());
        let host = HostCommunicator::new(mesh)?;
        // none where there is no library, so that no rank waits for one that cannot come
        let id = match Nccl::present() {
            true if place.0 == 0 => Nccl::new_id()?.to_vec(),
            true => vec![1],
            false => vec![],
        };
        let ids = host.exchange_bytes(id)?;
        if let Some(rank) = ids.iter().position(Vec::is_empty) {
            return Err(Error::Unsupported(format!(
                "rank {rank} finds no NCCL (libnccl.so): install it (pip install \
                nvidia-nccl-cu13), set a link libnccl.so beside its libnccl.so.2, and \
                LD_LIBRARY_PATH to their folder"
            )));
        }
        let id = ids[0].as_slice().try_into();
        let id = id.map_err(|_| Error::Internal("rank 0 sent no NCCL id".into()))?;
        Ok(NcclCommunicator { nccl: Nccl::connect(driver, id, place)?, host, place })
    }
}

impl Communicator<Cuda<Driver>> for NcclCommunicator {
    fn rank(&self) -> usize {
        self.place.0
    }

    fn ranks(&self) -> usize {
        self.place.1
    }

    fn reduce_scatter(
        &self,
        _: &Cuda<Driver>,
        flat: &mut <Cuda<Driver> as TrainBackend>::Flat,
        bucket: &Bucket,
    ) -> Result<()> {
        self.nccl.fork()?;
        let rest = bucket.remainder();
        self.nccl.together(|| {
            if bucket.part_len() > 0 {
                let at = flat.at(bucket.range.start);
                self.nccl.reduce_scatter(at, bucket.part_len(), self.place.0)?;
            }
            match rest.is_empty() {
                true => Ok(()),
                false => self.nccl.all_reduce(flat.at(rest.start), rest.len()),
            }
        })
    }

    fn wait(&self, _: &Cuda<Driver>, _: &mut <Cuda<Driver> as TrainBackend>::Flat) -> Result<()> {
        self.nccl.join()
    }

    fn all_gather(
        &self,
        b: &Cuda<Driver>,
        flat: &mut <Cuda<Driver> as TrainBackend>::Flat,
        buckets: &Buckets,
    ) -> Result<()> {
        let (rank, ranks) = self.place;
        self.nccl.fork()?;
        self.nccl.together(|| {
            for bucket in buckets.iter() {
                let rest = bucket.remainder();
                if bucket.part_len() > 0 {
                    self.nccl.all_gather(flat.at(bucket.range.start), bucket.part_len(), rank)?;
                }
                if !rest.is_empty() {
                    self.nccl.broadcast(flat.at(rest.start), rest.len(), ranks - 1)?;
                }
            }
            Ok(())
        })?;
        self.nccl.join()?;
        b.refresh_half(flat, 0..buckets.count())
    }

    fn all_reduce(
        &self,
        _: &Cuda<Driver>,
        sums: &mut <Cuda<Driver> as TrainBackend>::Sums,
    ) -> Result<()> {
        self.nccl.fork()?;
        // the loss and the squared norm, which are its first fields
        self.nccl.all_reduce_f64(sums.at, 2)?;
        self.nccl.join()
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.host.gather_bytes(bytes)
    }

    fn exchange(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.host.exchange_bytes(bytes)
    }
}
