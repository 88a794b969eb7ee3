//! BLOOM inference against transformers (tests/golden/make_bloom.py) on every instruction set and
//! storage type.

mod golden_models;

use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::ops::Batch;
use beautiful_prompt::ops::DecoderActivations;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::tensor::DType;
use golden_models::{MODELS, error, logits, open};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::available()
}

#[test]
fn f32_logits_are_within_2e_5_of_transformers() {
    for name in MODELS {
        let (checkpoint, ids, theirs) = open(name);
        for isa in isas() {
            let cpu = Cpu::new(2, isa);
            let model = Bloom::load(&cpu, checkpoint.clone(), Some(DType::F32)).unwrap();
            let e = error(&logits(&cpu, &model, &ids, usize::MAX), &theirs);
            assert!(e < 2e-5, "{name} on {isa:?}: {e:e}");
        }
    }
}

/// Errors that the storage types explain: 8 bits of mantissa in bf16 (weights, activations and
/// cache), 11 in f16 (weights and cache), 7 bits and a sign in int8 (weights, and activations by
/// their largest element).
#[test]
fn narrow_types_stay_within_their_rounding() {
    for name in MODELS {
        let (checkpoint, ids, theirs) = open(name);
        for isa in isas() {
            let cpu = Cpu::new(1, isa);
            for (dtype, most) in [(DType::F16, 2e-3), (DType::Bf16, 2e-2), (DType::Int8, 4e-2)] {
                let model = Bloom::load(&cpu, checkpoint.clone(), Some(dtype)).unwrap();
                let e = error(&logits(&cpu, &model, &ids, usize::MAX), &theirs);
                assert!(e < most, "{name} in {} on {isa:?}: {e:e}", dtype.name());
            }
        }
    }
}

#[test]
fn chunks_neighbours_and_threads_leave_the_bits_alone() {
    for name in MODELS {
        let (checkpoint, ids, _) = open(name);
        for isa in isas() {
            for dtype in [DType::F32, DType::Bf16, DType::F16, DType::Int8] {
                let cpu = Cpu::new(1, isa);
                let model = Bloom::load(&cpu, checkpoint.clone(), Some(dtype)).unwrap();
                let whole = logits(&cpu, &model, &ids, usize::MAX);
                for chunk in [1, 5, 16] {
                    assert!(
                        logits(&cpu, &model, &ids, chunk) == whole,
                        "{name} {dtype:?} {isa:?} chunk {chunk}"
                    );
                }
                // the same sequence between two others, on three threads
                let cpu = Cpu::new(3, isa);
                let mut cache = model.cache(&cpu, 20).unwrap();
                let mut scratch = DecoderActivations::default();
                let mut batch = Batch::default();
                batch.push(&ids[3..10], 0, &[0]);
                let start = batch.ids.len();
                batch.push(&ids, 0, &[9, 4, 7, 12]);
                batch.push(&ids[1..2], 0, &[2]);
                model.forward(&cpu, &batch, &mut cache, &mut scratch);
                let rows: Vec<usize> = (start..start + ids.len()).collect();
                let mut some = Vec::new();
                model.logits(&cpu, &rows, &mut scratch, &mut some).unwrap();
                assert!(some == whole, "{name} {dtype:?} {isa:?} in company");
            }
        }
    }
}

#[test]
fn weights_give_the_same_bits_wherever_they_lie() {
    for name in MODELS {
        let (checkpoint, ids, _) = open(name);
        for isa in isas() {
            for dtype in [None, Some(DType::Bf16)] {
                let mapped = Cpu::new(2, isa);
                let resident = Cpu::new(2, isa).with_resident_weights(true);
                let bits = |cpu: &Cpu| {
                    let model = Bloom::load(cpu, checkpoint.clone(), dtype).unwrap();
                    logits(cpu, &model, &ids, 7)
                };
                assert!(bits(&mapped) == bits(&resident), "{name} {dtype:?} {isa:?}");
            }
        }
    }
}
