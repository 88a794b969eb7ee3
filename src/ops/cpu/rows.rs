//! Operations on single rows that inference and training share.

use super::simd::Element;
use crate::simd_fn;
use half::{bf16, f16};

simd_fn! {
    /// Layer norm of one row; returns its mean and reciprocal standard deviation.
    pub fn layer_norm_row<S>(
        x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32],
    ) -> (f32, f32) {
        let n = x.len();
        assert!(weight.len() == n && bias.len() == n && y.len() == n);
        let full = n / 16 * 16;
        let rest = n - full;
        let mut sum = S::splat(0.0);
        for i in (0..full).step_by(16) {
            sum = S::add(sum, S::load(x.as_ptr().add(i)));
        }
        if rest > 0 {
            sum = S::add(sum, S::load_partial(x.as_ptr().add(full), rest));
        }
        let mean = S::sum(sum) / n as f32;
        let m = S::splat(mean);
        let mut square = S::splat(0.0);
        for i in (0..full).step_by(16) {
            let d = S::sub(S::load(x.as_ptr().add(i)), m);
            square = S::fma(d, d, square);
        }
        let mut square = S::sum(square);
        for v in &x[full..] {
            square += (v - mean) * (v - mean);
        }
        let rstd = 1.0 / (square / n as f32 + eps).sqrt();
        let r = S::splat(rstd);
        for i in (0..full).step_by(16) {
            let d = S::mul(S::sub(S::load(x.as_ptr().add(i)), m), r);
            let v = S::fma(d, S::load(weight.as_ptr().add(i)), S::load(bias.as_ptr().add(i)));
            S::store(y.as_mut_ptr().add(i), v);
        }
        for i in full..n {
            y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
        }
        (mean, rstd)
    }
}

simd_fn! {
    /// The largest element and the sum of exp(x - largest); with `keep`, the row becomes those
    /// exponentials.
    pub fn exp_sum<S>(row: &mut [f32], keep: bool) -> (f32, f32) {
        let full = row.len() / 16 * 16;
        let mut m = S::splat(f32::NEG_INFINITY);
        for j in (0..full).step_by(16) {
            m = S::max(m, S::load(row.as_ptr().add(j)));
        }
        let max = row[full..].iter().fold(S::max_lane(m), |a, &b| if b > a { b } else { a });
        let m = S::splat(max);
        let mut sum = S::splat(0.0);
        for j in (0..full).step_by(16) {
            let e = S::exp(S::sub(S::load(row.as_ptr().add(j)), m));
            if keep {
                S::store(row.as_mut_ptr().add(j), e);
            }
            sum = S::add(sum, e);
        }
        let mut sum = S::sum(sum);
        for s in &mut row[full..] {
            let e = (*s - max).exp();
            sum += e;
            if keep {
                *s = e;
            }
        }
        (max, sum)
    }
}

/// Defines the conversion of f32 to a stored type, ties to even.
macro_rules! convert {
    ($name:ident, $e:ty) => {
        simd_fn! {
            /// Writes `x` in the stored type; both have the same length.
            pub fn $name<S>(x: &[f32], out: &mut [$e]) {
                assert_eq!(x.len(), out.len());
                let full = x.len() / 16 * 16;
                for i in (0..full).step_by(16) {
                    <$e>::store::<S>(out.as_mut_ptr().add(i), S::load(x.as_ptr().add(i)));
                }
                for i in full..x.len() {
                    out[i] = Element::from_f32(x[i]);
                }
            }
        }
    };
}
convert!(f32_to_f32, f32);
convert!(f32_to_f16, f16);
convert!(f32_to_bf16, bf16);
