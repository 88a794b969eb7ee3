//! Which writes to device memory a thread may see: those of earlier launches once it has waited for
//! them, and those of other blocks once fences and atomics have put them in order. Multiprocessors
//! have caches of their own, so a value that an emulated thread happens to find is no proof that a
//! GPU's thread would find it. What is checked is the happens-before relation of the PTX memory
//! model, with a vector clock for each block.

use std::collections::HashMap;

const BLOCK_BITS: u32 = 20;
const EPOCH_BITS: u32 = 20;

/// The epoch of what was written by atomics.
const ATOMIC: u64 = (1 << EPOCH_BITS) - 1;

/// Who wrote some bytes last: a launch, one of its blocks, and how often that block had released
/// its writes before. 0: the host, or nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Writer(pub u64);

impl Writer {
    pub fn new(launch: u64, block: u32, epoch: u32) -> Writer {
        let epoch = u64::from(epoch).min(ATOMIC - 1);
        Writer(launch << (BLOCK_BITS + EPOCH_BITS) | u64::from(block) << EPOCH_BITS | epoch)
    }

    pub fn atomic(launch: u64, block: u32) -> Writer {
        Writer(Writer::new(launch, block, 0).0 | ATOMIC)
    }

    pub fn launch(self) -> u64 {
        self.0 >> (BLOCK_BITS + EPOCH_BITS)
    }

    pub fn block(self) -> u32 {
        (self.0 >> EPOCH_BITS) as u32 & ((1 << BLOCK_BITS) - 1)
    }

    pub fn is_atomic(self) -> bool {
        self.0 & ATOMIC == ATOMIC
    }

    pub fn epoch(self) -> u32 {
        (self.0 & ATOMIC) as u32
    }
}

/// Up to which epoch the writes of other blocks can be seen.
#[derive(Clone, Debug, Default)]
pub struct Clock(HashMap<u32, u32>);

impl Clock {
    pub fn merge(&mut self, other: &Clock) {
        for (&block, &epoch) in &other.0 {
            self.see(block, epoch);
        }
    }

    /// Everything that `block` wrote up to `epoch` can be seen.
    pub fn see(&mut self, block: u32, epoch: u32) {
        let seen = self.0.entry(block).or_insert(epoch);
        *seen = epoch.max(*seen);
    }

    pub fn sees(&self, writer: Writer) -> bool {
        self.0.get(&writer.block()).is_some_and(|&epoch| writer.epoch() <= epoch)
    }
}
