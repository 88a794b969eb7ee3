//! The memory that a training run will take, planned before its first step.

use crate::memory::MemoryPlan;
use crate::models::bloom::BloomConfig;
use crate::models::bloom::training::{Recompute, training_bytes_per_token};
use crate::ops::train::TrainBackend;

/// What decides how much memory the passes of a run take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassSize {
    /// Maximum tokens of a pass.
    pub tokens: usize,
    /// What is computed again.
    pub recompute: Recompute,
}

/// The memory of a rank's run, part by part.
pub fn plan<B: TrainBackend>(
    backend: &B,
    config: &BloomConfig,
    pass: PassSize,
    ranks: usize,
) -> MemoryPlan {
    let parameters = config.parameter_count() as f64;
    let per_token = training_bytes_per_token(config, pass.recompute, B::ACTIVATION_BYTES);
    let size = "the model's size";
    let flags = "--micro-tokens or --max-tokens, or take --recompute layer";
    MemoryPlan::new()
        .with("weights", B::PARAMETER_BYTES as f64 * parameters, size)
        .with("gradients", 4.0 * parameters, size)
        .with("AdamW's moments", 8.0 * parameters / ranks as f64, size)
        .with("activations", per_token * pass.tokens as f64, flags)
        .with("logits", backend.logit_bytes(pass.tokens, config.vocab_size) as f64, flags)
}

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
        let pass = PassSize { tokens, recompute };
        plan(backend, config, pass, ranks).check_against(available).is_ok()
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
            plan(&cpu, &config, PassSize { tokens, recompute }, 1).bytes().ceil() as u64
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
