//! AdamW (arXiv 1711.05101) as PyTorch computes it: decay first, bias-corrected moments, epsilon
//! outside the root.

use crate::checkpoint::Parameter;
use crate::error::Result;
use crate::ops::train::{AdamWBuffers, AdamWStep, OptimizerGroup, TrainBackend};

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

/// An optimizer's state, in flat buffers laid out as the parameters.
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
}

impl<F> AdamW<F> {
    /// An optimizer that has taken no step.
    ///
    /// # Errors
    /// If the device has no memory for the moments.
    pub fn new<B: TrainBackend<Flat = F>>(
        backend: &B,
        parameters: &[Parameter],
        options: AdamWOptions,
    ) -> Result<AdamW<F>> {
        let mut end = 0;
        let groups = parameters.iter().map(|p| {
            let start = end;
            end += p.len();
            OptimizerGroup { range: start..end, decays: p.decays() }
        });
        let groups = groups.collect();
        let (first, second) = (backend.zeros(end)?, backend.zeros(end)?);
        Ok(AdamW { options, steps: 0, first, second, groups })
    }

    /// One step with learning rate `rate`, by gradients that were clipped with these `sums`.
    pub fn step<B: TrainBackend<Flat = F>>(
        &mut self,
        backend: &B,
        (values, grads): (&mut F, &F),
        rate: f32,
        sums: &B::Sums,
    ) {
        self.steps += 1;
        let o = self.options;
        let correction1 = 1.0 - (o.beta1 as f64).powi(self.steps as i32);
        let correction2 = 1.0 - (o.beta2 as f64).powi(self.steps as i32);
        let step = AdamWStep {
            beta1: o.beta1,
            beta2: o.beta2,
            epsilon: o.epsilon,
            step_size: (rate as f64 / correction1) as f32,
            root: correction2.sqrt() as f32,
            keep: 1.0 - rate * o.weight_decay,
        };
        let (first, second) = (&mut self.first, &mut self.second);
        let mut buffers = AdamWBuffers { values, grads, first, second };
        backend.adamw(&mut buffers, &self.groups, &step, sums);
    }
}
