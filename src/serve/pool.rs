//! Where texts are read and measured: short ones at once, long ones off the threads that answer everybody.

use super::errors::ApiError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// Work on so many bytes takes less than handing it over would be worth.
const SHORT: usize = 8 << 10;

/// Most pieces of work that wait; each holds a request's body.
const MOST_WAITING: usize = 256;

/// Runs work on texts, long ones on threads of their own, as many at once as leave the engine room.
pub struct TextPool {
    room: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl Default for TextPool {
    fn default() -> TextPool {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        TextPool { room: Arc::new(Semaphore::new(cores.div_ceil(2))), waiting: Arc::default() }
    }
}

impl TextPool {
    /// What `work` on about so many bytes comes to. Fails if it panics, or if too much waits.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        struct Waits(Arc<AtomicUsize>);
        impl Drop for Waits {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        if bytes <= SHORT {
            return Ok(work());
        }
        let waits = Waits(self.waiting.clone());
        if waits.0.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            return Err(ApiError::busy());
        }
        let stopped = || ApiError::internal("the server made a mistake; its log says more");
        let permit = self.room.clone().acquire_owned().await.map_err(|_| stopped())?;
        drop(waits);
        let work = move || {
            // who has gone away leaves the work to be done all the same
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| stopped())
    }
}
