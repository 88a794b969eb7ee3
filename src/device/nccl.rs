//! NVIDIA's collective communication library (NCCL), through cudarc, which looks for it at run
//! time.

use super::Address;
use super::cuda::{Driver, failed};
use crate::error::{Error, Result};
use cudarc::driver::{result, sys as driver_sys};
use cudarc::nccl::{result as nccl, sys};
use std::ffi::CStr;
use std::rc::Rc;

/// Bytes of the name by which ranks find each other.
pub const ID_BYTES: usize = 128;

/// This rank's place among GPUs that exchange memory, and a stream on which they do, beside the
/// driver's own.
pub struct Nccl {
    driver: Rc<Driver>,
    comm: sys::ncclComm_t,
    stream: driver_sys::CUstream,
    /// The driver's work so far is done.
    ready: driver_sys::CUevent,
    /// The exchanges so far are done.
    done: driver_sys::CUevent,
}

/// Names what failed and the library's reason.
fn refused(what: &'static str) -> impl FnOnce(nccl::NcclError) -> Error {
    move |e| {
        // SAFETY: the library answers with text of its own for every code.
        let reason = unsafe { CStr::from_ptr(sys::ncclGetErrorString(e.0)) };
        Error::Cuda(format!(
            "NCCL: {what}: {}; NCCL_DEBUG=INFO says more",
            reason.to_string_lossy()
        ))
    }
}

impl Nccl {
    /// Whether the library is on this machine.
    pub fn present() -> bool {
        // SAFETY: only looks whether the library is there; without it the calls below would panic.
        unsafe { sys::is_culib_present() }
    }

    /// A new name by which ranks find each other; one of them asks for it.
    ///
    /// # Errors
    /// If the library finds no network.
    pub fn new_id() -> Result<[u8; ID_BYTES]> {
        let id = nccl::get_uniqueid().map_err(refused("no unique id"))?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Meets the other ranks; waits until all are there.
    ///
    /// # Errors
    /// If the library cannot connect them.
    pub fn connect(
        driver: &Rc<Driver>,
        id: [u8; ID_BYTES],
        (rank, ranks): (usize, usize),
    ) -> Result<Nccl> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let mut comm = std::ptr::null_mut();
        // SAFETY: the context of the driver's GPU is current, and the communicator is written
        // before it is used.
        unsafe { nccl::comm_init_rank(&mut comm, ranks as i32, id, rank as i32) }
            .map_err(refused("the ranks cannot be connected (each needs a GPU of its own)"))?;
        use driver_sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as UNTIMED;
        let event = || result::event::create(UNTIMED).map_err(failed("no event"));
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("no stream"))?;
        Ok(Nccl { driver: driver.clone(), comm, stream, ready: event()?, done: event()? })
    }

    /// Exchanges that are asked for from now on wait for the driver's work so far.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn fork(&self) -> Result<()> {
        self.order(self.ready, self.driver.stream(), self.stream)
    }

    /// The driver's work from now on waits for the exchanges so far.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn join(&self) -> Result<()> {
        self.order(self.done, self.stream, self.driver.stream())
    }

    fn order(
        &self,
        event: driver_sys::CUevent,
        before: driver_sys::CUstream,
        after: driver_sys::CUstream,
    ) -> Result<()> {
        use driver_sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT as DEFAULT;
        // SAFETY: event and streams live as long as this and its driver.
        unsafe {
            result::event::record(event, before).map_err(failed("an event"))?;
            result::stream::wait_event(after, event, DEFAULT).map_err(failed("an event"))
        }
    }

    /// Does several exchanges in one launch.
    ///
    /// # Errors
    /// Of the exchanges, or if the library fails.
    pub fn together(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        nccl::group_start().map_err(refused("a group of exchanges"))?;
        let done = work();
        // the group has to end whatever became of its parts
        let ended = nccl::group_end().map_err(refused("a group of exchanges"));
        done.and(ended.map(drop))
    }

    /// Sums `ranks * count` f32 from `at` on over the ranks; each has the sums of its own `count`
    /// of them in their place.
    ///
    /// # Errors
    /// If the library cannot begin. It waits without an end for a rank that has gone.
    pub fn reduce_scatter(&self, at: Address, count: usize, rank: usize) -> Result<()> {
        let own = at + (4 * rank * count) as u64;
        let (float, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        // SAFETY: whoever asks has so much memory there, which lives until it has waited.
        unsafe {
            nccl::reduce_scatter(at as _, own as _, count, float, sum, self.comm, self.stream())
        }
        .map_err(refused("reduce-scatter"))?;
        Ok(())
    }

    /// Gives each rank's own `count` f32 of the `ranks * count` from `at` on to all.
    ///
    /// # Errors
    /// As [`Nccl::reduce_scatter`].
    pub fn all_gather(&self, at: Address, count: usize, rank: usize) -> Result<()> {
        let own = at + (4 * rank * count) as u64;
        let float = sys::ncclDataType_t::ncclFloat32;
        // SAFETY: as for reduce_scatter.
        unsafe { nccl::all_gather(own as _, at as _, count, float, self.comm, self.stream()) }
            .map_err(refused("all-gather"))?;
        Ok(())
    }

    /// Sums `count` f32 over the ranks, for all of them.
    ///
    /// # Errors
    /// As [`Nccl::reduce_scatter`].
    pub fn all_reduce(&self, at: Address, count: usize) -> Result<()> {
        self.all_reduce_as(at, count, sys::ncclDataType_t::ncclFloat32)
    }

    /// Sums `count` f64 over the ranks, for all of them.
    ///
    /// # Errors
    /// As [`Nccl::reduce_scatter`].
    pub fn all_reduce_f64(&self, at: Address, count: usize) -> Result<()> {
        self.all_reduce_as(at, count, sys::ncclDataType_t::ncclFloat64)
    }

    fn all_reduce_as(&self, at: Address, count: usize, of: sys::ncclDataType_t) -> Result<()> {
        let sum = sys::ncclRedOp_t::ncclSum;
        // SAFETY: as for reduce_scatter.
        unsafe { nccl::all_reduce(at as _, at as _, count, of, sum, self.comm, self.stream()) }
            .map_err(refused("all-reduce"))?;
        Ok(())
    }

    /// Gives `count` f32 of the rank `from` to all.
    ///
    /// # Errors
    /// As [`Nccl::reduce_scatter`].
    pub fn broadcast(&self, at: Address, count: usize, from: usize) -> Result<()> {
        let float = sys::ncclDataType_t::ncclFloat32;
        // SAFETY: as for reduce_scatter.
        unsafe {
            nccl::broadcast(at as _, at as _, count, float, from as i32, self.comm, self.stream())
        }
        .map_err(refused("broadcast"))?;
        Ok(())
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.cast()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // results have been read by now, or the run has failed: then other ranks may never come,
        // and what waits for them has to end
        // SAFETY: all were made in `connect` and are given up; what fails here has failed before.
        unsafe {
            let _ = nccl::comm_abort(self.comm);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::event::destroy(self.ready);
            let _ = result::event::destroy(self.done);
            let _ = result::stream::destroy(self.stream);
        }
    }
}
