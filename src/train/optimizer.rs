//! AdamW (arXiv 1711.05101) as PyTorch computes it: decay first, bias-corrected moments, epsilon
//! outside the root.

use crate::checkpoint::Parameter;
use crate::ops::train::{AdamWBuffers, AdamWStep, TrainBackend};

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
    /// `(end, decays)` of each parameter.
    regions: Vec<(usize, bool)>,
}

impl AdamW<Vec<f32>> {
    /// An optimizer that has taken no step.
    pub fn new(parameters: &[Parameter], options: AdamWOptions) -> AdamW<Vec<f32>> {
        let mut end = 0;
        let regions = parameters.iter().map(|p| {
            end += p.len();
            (end, p.decays())
        });
        let regions: Vec<_> = regions.collect();
        AdamW { options, steps: 0, first: vec![0.0; end], second: vec![0.0; end], regions }
    }
}

impl<F> AdamW<F> {
    /// One step with learning rate `rate`.
    pub fn step<B: TrainBackend<Flat = F>>(
        &mut self,
        backend: &B,
        values: &mut F,
        grads: &F,
        rate: f32,
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
        };
        let (first, second) = (&mut self.first, &mut self.second);
        let mut buffers = AdamWBuffers { values, grads, first, second };
        let mut start = 0;
        for &(end, decays) in &self.regions {
            let keep = if decays { 1.0 - rate * o.weight_decay } else { 1.0 };
            backend.adamw(&mut buffers, start..end, keep, &step);
            start = end;
        }
    }
}

/// Scales the gradients so that their norm is at most `max`; returns the norm before.
pub fn clip_gradients<B: TrainBackend>(backend: &B, grads: &mut B::Flat, max: f32) -> f64 {
    let norm = backend.squared_norm(grads).sqrt();
    if norm > max as f64 {
        backend.scale(grads, (max as f64 / (norm + 1e-6)) as f32);
    }
    norm
}
