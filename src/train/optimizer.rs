//! AdamW (arXiv 1711.05101) as PyTorch computes it: decay first, bias-corrected moments, epsilon
//! outside the root.

use crate::models::bloom::BloomConfig;
use crate::ops::cpu::Cpu;
use crate::ops::cpu::threads::Disjoint;
use crate::simd_fn;

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamWOptions {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    /// Applied to matrices only.
    pub weight_decay: f32,
}

pub struct AdamW {
    pub options: AdamWOptions,
    /// Steps taken.
    pub steps: u64,
    /// First and second moments, laid out as the parameters.
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    /// `(end, decays)` of each parameter.
    regions: Vec<(usize, bool)>,
}

/// Elements of one task.
const GRAIN: usize = 1 << 15;

impl AdamW {
    pub fn new(config: &BloomConfig, options: AdamWOptions) -> AdamW {
        let mut end = 0;
        let regions = config.parameters().into_iter().map(|p| {
            end += p.len();
            (end, p.decays())
        });
        let regions: Vec<_> = regions.collect();
        AdamW { options, steps: 0, first: vec![0.0; end], second: vec![0.0; end], regions }
    }

    /// One step with learning rate `rate`.
    pub fn step(&mut self, cpu: &Cpu, values: &mut [f32], grads: &[f32], rate: f32) {
        assert!(values.len() == self.first.len() && grads.len() == values.len());
        self.steps += 1;
        let o = self.options;
        let correction1 = 1.0 - (o.beta1 as f64).powi(self.steps as i32);
        let correction2 = 1.0 - (o.beta2 as f64).powi(self.steps as i32);
        let step = (rate as f64 / correction1) as f32;
        let root = correction2.sqrt() as f32;
        let (w, m, v) = (
            Disjoint::new(values),
            Disjoint::new(&mut self.first),
            Disjoint::new(&mut self.second),
        );
        let mut start = 0;
        for &(end, decays) in &self.regions {
            let keep = if decays { 1.0 - rate * o.weight_decay } else { 1.0 };
            let first = start;
            cpu.threads.run((end - first).div_ceil(GRAIN), |i| {
                let r = first + i * GRAIN..(first + (i + 1) * GRAIN).min(end);
                // SAFETY: ranges are disjoint.
                let (w, m, v) =
                    unsafe { (w.slice(r.clone()), m.slice(r.clone()), v.slice(r.clone())) };
                update(cpu.isa, w, m, v, &grads[r], o.beta1, o.beta2, o.epsilon, step, root, keep);
            });
            start = end;
        }
    }
}

simd_fn! {
    #[allow(clippy::too_many_arguments)]
    fn update<S>(w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], beta1: f32, beta2: f32, epsilon: f32, step: f32, root: f32, keep: f32) {
        let n = w.len();
        assert!(m.len() == n && v.len() == n && g.len() == n);
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            let (wp, mp, vp) = (w.as_mut_ptr().add(i), m.as_mut_ptr().add(i), v.as_mut_ptr().add(i));
            let g = S::load_partial(g.as_ptr().add(i), lanes);
            let m = S::load_partial(mp, lanes);
            let m = S::fma(S::sub(g, m), S::splat(1.0 - beta1), m);
            let g2 = S::mul(S::mul(g, g), S::splat(1.0 - beta2));
            let v = S::fma(S::load_partial(vp, lanes), S::splat(beta2), g2);
            let bottom = S::add(S::div(S::sqrt(v), S::splat(root)), S::splat(epsilon));
            let change = S::mul(S::div(m, bottom), S::splat(step));
            let w = S::sub(S::mul(S::load_partial(wp, lanes), S::splat(keep)), change);
            S::store_partial(wp, w, lanes);
            S::store_partial(mp, m, lanes);
            S::store_partial(vp, v, lanes);
        }
    }
}

/// Scales the gradients so that their norm is at most `most`; returns the norm before.
pub fn clip_gradients(cpu: &Cpu, grads: &mut [f32], most: f32) -> f64 {
    let parts = grads.len().div_ceil(GRAIN);
    let mut sums = vec![0f64; parts];
    let out = Disjoint::new(&mut sums);
    let g = &*grads;
    cpu.threads.run(parts, |i| {
        let part = &g[i * GRAIN..((i + 1) * GRAIN).min(g.len())];
        let sum = part.chunks(1024).map(|c| c.iter().map(|v| v * v).sum::<f32>() as f64).sum();
        // SAFETY: every part is one task's.
        unsafe { out.slice(i..i + 1)[0] = sum };
    });
    let norm = sums.iter().sum::<f64>().sqrt();
    if norm > most as f64 {
        let factor = (most as f64 / (norm + 1e-6)) as f32;
        let out = Disjoint::new(grads);
        cpu.threads.run_ranges(out.len(), GRAIN, |r| {
            // SAFETY: ranges are disjoint.
            unsafe { out.slice(r) }.iter_mut().for_each(|v| *v *= factor);
        });
    }
    norm
}
