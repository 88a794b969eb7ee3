//! The memory that a training run will take, planned before its first step.

use crate::memory::MemoryPlan;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::{Recompute, training_bytes_per_token};
use crate::ops::train::TrainBackend;

/// What decides how much memory a run takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunSize {
    /// Maximum tokens of a pass.
    pub tokens: usize,
    /// What is computed again.
    pub recompute: Recompute,
    /// Ranks that the moments are divided among.
    pub ranks: usize,
}

/// What a user can lower, in the words of a command.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remedies {
    /// For weights, gradients and moments.
    pub model: &'static str,
    /// For activations and logits.
    pub pass: &'static str,
}

/// The memory of a rank's run, part by part.
pub fn plan<B: TrainBackend>(
    backend: &B,
    config: &BloomConfig,
    size: RunSize,
    remedies: Remedies,
) -> MemoryPlan {
    let parameters = config.parameter_count() as f64;
    let per_token = training_bytes_per_token(config, size.recompute, B::ACTIVATION_BYTES);
    let Remedies { model, pass } = remedies;
    let plan = MemoryPlan::new()
        .with("weights", B::PARAMETER_BYTES as f64 * parameters, model)
        .with("gradients", 4.0 * parameters, model)
        .with("AdamW's moments", 8.0 * parameters / size.ranks as f64, model)
        .with("activations", per_token * size.tokens as f64, pass)
        .with("logits", backend.logit_bytes(size.tokens, config.vocab_size) as f64, pass);
    // CPUs exchange copies of the gradients, which may all be under way at the end of a pass
    let copied = size.ranks > 1 && B::ACTIVATION_BYTES == 4;
    if copied { plan.with("exchange", 8.0 * parameters, model) } else { plan }
}

/// What [`plan`] takes where nobody reads the remedies.
const NO_REMEDIES: Remedies = Remedies { model: "", pass: "" };

/// The maximum tokens of a pass, half of `most` as often as it takes to fit into `available` bytes,
/// but at least `longest`; none if that does not fit either.
pub fn tokens_that_fit<B: TrainBackend>(
    backend: &B,
    config: &BloomConfig,
    (recompute, ranks): (Recompute, usize),
    (longest, most): (usize, usize),
    available: u64,
) -> Option<usize> {
    let halves = std::iter::successors(Some(most), |tokens| Some(tokens / 2));
    halves.take_while(|&tokens| tokens > longest).chain([longest]).find(|&tokens| {
        let size = RunSize { tokens, recompute, ranks };
        plan(backend, config, size, NO_REMEDIES).check_against(available).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::Cpu;
    use crate::ops::cpu::simd::Isa;

    #[test]
    fn passes_are_halved_until_they_fit() {
        let cpu = Cpu::new(1, Isa::detect());
        let config = BloomConfig::new(1000, 64, 2, 4);
        let bytes = |tokens, recompute| {
            let size = RunSize { tokens, recompute, ranks: 1 };
            plan(&cpu, &config, size, NO_REMEDIES).bytes().ceil() as u64
        };
        let fit = |recompute, available| {
            tokens_that_fit(&cpu, &config, (recompute, 1), (100, 4096), available)
        };
        assert_eq!(fit(Recompute::None, bytes(4096, Recompute::None)), Some(4096));
        assert_eq!(fit(Recompute::None, bytes(4096, Recompute::None) - 1), Some(2048));
        assert_eq!(fit(Recompute::None, bytes(100, Recompute::None)), Some(100));
        assert_eq!(fit(Recompute::None, bytes(100, Recompute::None) - 1), None);
        let tight = bytes(100, Recompute::None) - 1;
        assert!(fit(Recompute::Layer, tight).is_some_and(|tokens| tokens >= 100));
        let [none, attention, layer] = [Recompute::None, Recompute::Attention, Recompute::Layer]
            .map(|recompute| bytes(4096, recompute));
        assert!(none > attention && attention > layer, "{none} {attention} {layer}");
    }
}
