//! AdamW and the gradient's norm on the CPU.

use super::Cpu;
use super::threads::Disjoint;
use crate::ops::train::{AdamWBuffers, AdamWStep, OptimizerGroup};
use crate::simd_fn;

/// Elements of one task.
const GRAIN: usize = 1 << 15;

/// A step of AdamW for one group, by the gradient times a factor.
pub(super) fn adamw(
    cpu: &Cpu,
    b: &mut AdamWBuffers<Vec<f32>>,
    group: &OptimizerGroup,
    (step, factor): (&AdamWStep, f32),
) {
    let (range, keep) = (&group.range, if group.decays { step.keep } else { 1.0 });
    let grads = b.grads;
    let (w, m, v) = (
        Disjoint::new(&mut b.values[..]),
        Disjoint::new(&mut b.first[..]),
        Disjoint::new(&mut b.second[..]),
    );
    cpu.threads.run(range.len().div_ceil(GRAIN), |i| {
        let first = range.start + i * GRAIN;
        let r = first..(first + GRAIN).min(range.end);
        let moments = group.moments + i * GRAIN;
        let moments = moments..moments + r.len();
        // SAFETY: ranges are disjoint.
        let wmv = unsafe { (w.slice(r.clone()), m.slice(moments.clone()), v.slice(moments)) };
        update(cpu.isa, wmv, (&grads[r], factor), keep, step);
    });
}

simd_fn! {
    /// Updates parameters `w` and moments `m` and `v` by the gradients `g` times a factor.
    fn update<S>(
        wmv: (&mut [f32], &mut [f32], &mut [f32]), g: (&[f32], f32), keep: f32, step: &AdamWStep,
    ) {
        let ((w, m, v), (g, factor)) = (wmv, g);
        let AdamWStep { beta1, beta2, epsilon, step_size, root, .. } = *step;
        let n = w.len();
        assert!(m.len() == n && v.len() == n && g.len() == n);
        for i in (0..n).step_by(16) {
            let lanes = 16.min(n - i);
            let (wp, mp) = (w.as_mut_ptr().add(i), m.as_mut_ptr().add(i));
            let vp = v.as_mut_ptr().add(i);
            let g = S::mul(S::load_partial(g.as_ptr().add(i), lanes), S::splat(factor));
            let m = S::load_partial(mp, lanes);
            let m = S::fma(S::sub(g, m), S::splat(1.0 - beta1), m);
            let g2 = S::mul(S::mul(g, g), S::splat(1.0 - beta2));
            let v = S::fma(S::load_partial(vp, lanes), S::splat(beta2), g2);
            let bottom = S::add(S::div(S::sqrt(v), S::splat(root)), S::splat(epsilon));
            let change = S::mul(S::div(m, bottom), S::splat(step_size));
            let w = S::sub(S::mul(S::load_partial(wp, lanes), S::splat(keep)), change);
            S::store_partial(wp, w, lanes);
            S::store_partial(mp, m, lanes);
            S::store_partial(vp, v, lanes);
        }
    }
}

/// The sum of squares, in the order of the elements whatever the number of threads.
pub(super) fn squared_norm(cpu: &Cpu, x: &[f32]) -> f64 {
    let parts = x.len().div_ceil(GRAIN);
    let mut sums = vec![0f64; parts];
    let out = Disjoint::new(&mut sums);
    cpu.threads.run(parts, |i| {
        let part = &x[i * GRAIN..((i + 1) * GRAIN).min(x.len())];
        let sum = part.chunks(1024).map(|c| c.iter().map(|v| v * v).sum::<f32>() as f64).sum();
        // SAFETY: every part is one task's.
        unsafe { out.slice(i..i + 1)[0] = sum };
    });
    sums.iter().sum()
}
