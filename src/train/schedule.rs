//! Learning-rate schedules.

/// How the learning rate goes on after the warm-up.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine down to zero, after the warm-up.
    Cosine,
    /// A straight line down to zero, after the warm-up.
    Linear,
    /// No decay.
    Constant,
}

impl Schedule {
    /// Factor on the learning rate of step `step` (from 0) of `total`, of which `warmup` rise
    /// linearly; as transformers' `get_scheduler` computes it.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
        match self {
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn cosine_rises_then_falls_to_zero() {
        let f = |s| Schedule::Cosine.factor(s, 10, 110);
        assert_eq!((f(0), f(5), f(10)), (0.0, 0.5, 1.0));
        assert!((f(60) - 0.5).abs() < 1e-12 && f(110) < 1e-12);
        assert!((Schedule::Linear.factor(85, 10, 110) - 0.25).abs() < 1e-12);
    }
}
