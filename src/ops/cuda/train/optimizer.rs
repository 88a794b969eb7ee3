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
        let (range, decays) = (g.range.clone(), g.decays as u32);
        range.clone().step_by(BLOCK).map(move |first| {
            let count = BLOCK.min(range.end - first) as u32;
            OptimizerChunk { first: first as u64, count, decays }
        })
    };
    groups.iter().flat_map(of).collect()
}

impl<L: Launcher> Cuda<L> {
    pub(super) fn launch_clip_gradients(
        &self,
        grads: &Flat<L>,
        max: f32,
        sums: &mut Memory<L>,
    ) -> Result<()> {
        let blocks = grads.count.div_ceil(BLOCK);
        let mut scratch = self.train.borrow_mut();
        let partials = self.place(&mut scratch.partials, 8 * blocks)?;
        let shared = 8 * abi::TRAIN_THREADS;
        let args = Args::new().with(partials).with(grads.at(0)).with(grads.count as u64);
        self.launch("squared_norm", [blocks, 1, 1], THREADS, shared, args)?;
        let args = Args::new().with(sums.at).with(partials).with(blocks as u32).with(max);
        self.launch("clip_gradients", [1, 1, 1], THREADS, shared, args)
    }

    pub(super) fn launch_adamw(
        &self,
        buffers: &mut AdamWBuffers<Flat<L>>,
        groups: &[OptimizerGroup],
        step: &AdamWStep,
        sums: &Memory<L>,
    ) -> Result<()> {
        let chunks = chunks(groups);
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
