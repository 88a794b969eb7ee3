//! Where texts are read and measured: short ones at once, long ones off the threads that answer
//! everybody.

use super::errors::ApiError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// Work on so many bytes takes less than handing it over would be worth.
const SHORT: usize = 8 << 10;

/// Requests whose bodies may wait to be read, where many clients send them.
pub const MAX_WAITING: usize = 256;

/// Runs work on texts, long ones on threads of their own, as many at once as leave the engine room.
pub struct TextPool {
    room: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    most_waiting: usize,
}

impl TextPool {
    /// A pool that refuses requests while so many wait.
    pub fn new(most_waiting: usize) -> TextPool {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        TextPool {
            room: Arc::new(Semaphore::new(cores.div_ceil(2))),
            waiting: Arc::default(),
            most_waiting,
        }
    }

    /// [`TextPool::run`] for a request that has just come: refuses it if too many wait.
    pub async fn admit<T: Send + 'static>(
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
        if waits.0.fetch_add(1, Ordering::Relaxed) >= self.most_waiting {
            return Err(ApiError::busy());
        }
        self.run(bytes, work).await
    }

    /// What `work` on about so many bytes comes to. Fails if it panics, and never for lack of room:
    /// what was begun is finished.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= SHORT {
            return Ok(work());
        }
        let stopped = || ApiError::internal("the server made a mistake; its log says more");
        let permit = self.room.clone().acquire_owned().await.map_err(|_| stopped())?;
        let work = move || {
            // who has gone away leaves the work to be done all the same
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| stopped())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests are refused while too many wait; work that was begun is not.
    #[tokio::test]
    async fn only_what_comes_is_refused() {
        let pool = TextPool { room: Arc::new(Semaphore::new(0)), ..TextPool::new(0) };
        assert_eq!(pool.admit(SHORT + 1, || 1).await.unwrap_err().status.as_u16(), 429);
        assert_eq!(pool.admit(SHORT, || 1).await.unwrap(), 1);
        assert_eq!(pool.waiting.load(Ordering::Relaxed), 0);
        pool.room.add_permits(1);
        assert_eq!(pool.run(SHORT + 1, || 2).await.unwrap(), 2);
    }
}
