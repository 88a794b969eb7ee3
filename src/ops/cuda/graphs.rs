//! Forward passes that are launched as a whole.
//!
//! A decoding step is some hundred launches of a few microseconds each, as much time on the host as the GPU needs for the work.
//! Steps of one shape differ in nothing but what lies in device memory: the second one is recorded (a CUDA graph), the
//! others repeat the recording with a single launch. A recording holds addresses, so any change of the device's memory
//! ends all of them.

use super::{Cuda, Pass, attention};
use crate::device::Launcher;
use std::collections::HashMap;

/// Most tokens of a pass that is recorded; longer ones are not bound by their launches.
const TOKENS: usize = 256;
/// Most recordings that are kept.
const MOST: usize = 128;

/// What the launches of a pass depend on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    /// See [`crate::ops::Backend::repeat`].
    owners: [usize; 3],
    /// Where the batch's arrays begin and end says how long they are; and where tokens are taken from.
    arrays: [u64; 3],
    tokens: usize,
    table_width: usize,
    singles: usize,
    splits: usize,
}

/// Recordings by what they hold for.
pub(super) struct Graphs<L: Launcher> {
    /// [`Launcher::changes`] when they were made.
    changes: u64,
    /// `None` after the first pass of a shape.
    known: HashMap<Key, Option<L::Recording>>,
    /// Whether recording has failed here.
    off: bool,
}

impl<L: Launcher> Default for Graphs<L> {
    fn default() -> Self {
        Graphs { changes: 0, known: HashMap::new(), off: false }
    }
}

impl<L: Launcher> Cuda<L> {
    /// See [`crate::ops::Backend::repeat`].
    pub(super) fn repeat_pass(&self, pass: &Pass<L>, owners: [usize; 3], work: &mut dyn FnMut()) {
        let mut graphs = self.graphs.borrow_mut();
        let records = self.records && !graphs.off && self.failed.borrow().is_none();
        if !records || pass.tile_count > 0 || pass.tokens > TOKENS {
            return work();
        }
        if graphs.changes != self.launcher.changes() || graphs.known.len() >= MOST {
            graphs.known.clear();
        }
        let key = Key {
            owners,
            arrays: [pass.ids, pass.singles, pass.choices],
            tokens: pass.tokens,
            table_width: pass.table_width,
            singles: pass.single_count,
            splits: attention::splits(pass.longest_single),
        };
        match graphs.known.get(&key) {
            Some(Some(recording)) => return self.attempt(|| self.launcher.replay(recording)),
            Some(None) => {
                let recording = self.launcher.record(&mut || {
                    work();
                    self.check()
                });
                match recording {
                    Ok(recording) => {
                        self.attempt(|| self.launcher.replay(&recording));
                        graphs.known.insert(key, Some(recording));
                    }
                    Err(e) => {
                        tracing::warn!("steps are launched kernel by kernel: {e}");
                        graphs.off = true;
                        work();
                    }
                }
            }
            None => {
                // buffers grow to this shape's size; from then on they stay where they are
                work();
                graphs.known.insert(key, None);
            }
        }
        graphs.changes = self.launcher.changes();
    }
}
