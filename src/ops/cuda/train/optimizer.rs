//! The gradient's norm, and AdamW.

use super::super::{Cuda, abi};
use super::Flat;
use crate::device::{Args, Launcher, Memory};
use crate::error::Result;
use crate::ops::train::{AdamWBuffers, AdamWStep, OptimizerGroup};
use abi::{AdamWArgs, OptimizerChunk};

const THREADS: u32 = abi::TRAIN_THREADS as u32;
const BLOCK: usize = abi::OPTIMIZER_BLOCK;

/// Neighbours of one kind in parts of at most [`BLOCK`] parameters.
fn chunks(groups: &[OptimizerGroup]) -> Vec<OptimizerChunk> {
    let of = |g: &OptimizerGroup| {
        let (range, moments, decays) = (g.range.clone(), g.moments, g.decays as u32);
        range.clone().step_by(BLOCK).map(move |first| {
            let count = BLOCK.min(range.end - first) as u32;
            let moments = (moments + first - range.start) as u64;
            OptimizerChunk { first: first as u64, moments, count, decays }
        })
    };
    groups.iter().flat_map(of).collect()
}

impl<L: Launcher> Cuda<L> {
    pub(super) fn launch_squared_norm(
        &self,
        grads: &Flat<L>,
        groups: &[OptimizerGroup],
        sums: &mut Memory<L>,
    ) -> Result<()> {
        let chunks = chunks(groups);
        if chunks.is_empty() {
            return Ok(());
        }
        let mut scratch = self.train.borrow_mut();
        let partials = self.place(&mut scratch.partials, 8 * chunks.len())?;
        let at = self.send(&mut scratch.chunks, bytemuck::cast_slice(&chunks))?;
        let shared = 8 * abi::TRAIN_THREADS;
        let args = Args::new().with(partials).with(grads.at(0)).with(at);
        self.launch("squared_norm", [chunks.len(), 1, 1], THREADS, shared, args)?;
        let args = Args::new().with(sums.at).with(partials).with(chunks.len() as u32);
        self.launch("sum_squares", [1, 1, 1], THREADS, shared, args)
    }

    pub(super) fn launch_adamw(
        &self,
        buffers: &mut AdamWBuffers<Flat<L>>,
        groups: &[OptimizerGroup],
        step: &AdamWStep,
        sums: &Memory<L>,
    ) -> Result<()> {
        let args = Args::new().with(sums.at).with(step.max_norm);
        self.launch("clip_gradients", [1, 1, 1], 1, 0, args)?;
        let chunks = chunks(groups);
        if chunks.is_empty() {
            return Ok(());
        }
        let mut scratch = self.train.borrow_mut();
        let at = self.send(&mut scratch.chunks, bytemuck::cast_slice(&chunks))?;
        let args = AdamWArgs {
            values: buffers.values.at(0),
            half_values: buffers.values.half_at(0),
            grads: buffers.grads.at(0),
            first: buffers.first.at(0),
            second: buffers.second.at(0),
            chunks: at,
            sums: sums.at,
            beta1: step.beta1,
            beta2: step.beta2,
            epsilon: step.epsilon,
            step_size: step.step_size,
            root: step.root,
            keep: step.keep,
        };
        self.launch("adamw_bf16", [chunks.len(), 1, 1], THREADS, 0, Args::new().with(args))
    }
}
