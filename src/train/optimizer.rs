//! AdamW (arXiv 1711.05101) as PyTorch computes it: decay first, bias-corrected moments, epsilon
//! outside the root.

use crate::checkpoint::Parameter;
use crate::error::Result;
use crate::ops::train::{AdamWBuffers, AdamWStep, OptimizerGroup, TrainBackend};
use std::ops::Range;

/// Settings of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamWOptions {
    /// Decay rate of the first moments.
    pub beta1: f32,
    /// Decay rate of the second moments.
    pub beta2: f32,
    /// Added to the root of the second moment, against division by zero.
    pub epsilon: f32,
    /// Applied to matrices only.
    pub weight_decay: f32,
}

/// How far a step goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSize {
    /// The learning rate.
    pub learning_rate: f32,
    /// The gradient is scaled down to this norm if its norm is larger.
    pub max_norm: f32,
}

/// An optimizer's state, in flat buffers laid out as the parameters, or as a part of them.
pub struct AdamW<F = Vec<f32>> {
    /// Settings.
    pub options: AdamWOptions,
    /// Steps taken.
    pub steps: u64,
    /// First moments.
    pub first: F,
    /// Second moments.
    pub second: F,
    groups: Vec<OptimizerGroup>,
    shard: Vec<Range<usize>>,
}

impl<F> AdamW<F> {
    /// An optimizer of all parameters that has taken no step.
    ///
    /// # Errors
    /// If the device has no memory for the moments.
    pub fn new<B: TrainBackend<Flat = F>>(
        backend: &B,
        parameters: &[Parameter],
        options: AdamWOptions,
    ) -> Result<AdamW<F>> {
        let count = parameters.iter().map(Parameter::len).sum();
        let whole = std::iter::once(0..count).collect();
        AdamW::of_shard(backend, parameters, options, whole)
    }

    /// An optimizer of some ranges of the flat parameters alone, which has taken no step.
    ///
    /// # Errors
    /// As for [`AdamW::new`].
    pub fn of_shard<B: TrainBackend<Flat = F>>(
        backend: &B,
        parameters: &[Parameter],
        options: AdamWOptions,
        shard: Vec<Range<usize>>,
    ) -> Result<AdamW<F>> {
        let mut end = 0;
        let tensors: Vec<(Range<usize>, bool)> = parameters
            .iter()
            .map(|p| {
                let start = end;
                end += p.len();
                (start..end, p.decays())
            })
            .collect();
        let mut moments = 0;
        let mut groups = Vec::new();
        for part in &shard {
            let first = tensors.partition_point(|(t, _)| t.end <= part.start);
            for (tensor, decays) in &tensors[first..] {
                let range = tensor.start.max(part.start)..tensor.end.min(part.end);
                if range.is_empty() {
                    break;
                }
                moments += range.len();
                let moments = moments - range.len();
                groups.push(OptimizerGroup { range, moments, decays: *decays });
            }
        }
        let (first, second) = (backend.zeros(moments)?, backend.zeros(moments)?);
        Ok(AdamW { options, steps: 0, first, second, groups, shard })
    }

    /// The parameters that this is the optimizer of, in the order of their moments.
    pub fn shard(&self) -> &[Range<usize>] {
        &self.shard
    }

    /// Adds the squares of its parameters' gradients to the squared norm of `sums`.
    pub fn squared_norm<B: TrainBackend<Flat = F>>(
        &self,
        backend: &B,
        grads: &F,
        sums: &mut B::Sums,
    ) {
        backend.squared_norm(grads, &self.groups, sums);
    }

    /// One step by gradients whose squared norm, of all parameters, is in `sums`.
    pub fn step<B: TrainBackend<Flat = F>>(
        &mut self,
        backend: &B,
        (values, grads): (&mut F, &F),
        size: StepSize,
        sums: &B::Sums,
    ) {
        self.steps += 1;
        let (o, rate) = (self.options, size.learning_rate);
        let correction1 = 1.0 - (o.beta1 as f64).powi(self.steps as i32);
        let correction2 = 1.0 - (o.beta2 as f64).powi(self.steps as i32);
        let step = AdamWStep {
            beta1: o.beta1,
            beta2: o.beta2,
            epsilon: o.epsilon,
            step_size: (rate as f64 / correction1) as f32,
            root: correction2.sqrt() as f32,
            keep: 1.0 - rate * o.weight_decay,
            max_norm: size.max_norm,
        };
        let (first, second) = (&mut self.first, &mut self.second);
        let mut buffers = AdamWBuffers { values, grads, first, second };
        backend.adamw(&mut buffers, &self.groups, &step, sums);
    }
}
