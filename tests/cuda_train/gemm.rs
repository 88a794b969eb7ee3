//! GEMMs on Hopper whose last tiles are divided, against the CPU.

use crate::emulated::gpu;
use beautiful_prompt::selftest::{Shapes, TrainShapes, run};
use beautiful_prompt::tensor::DType;

/// Backward passes of a linear layer: tokens, outputs, inputs.
fn linear(shape: [usize; 3]) -> usize {
    let device = gpu(false, true);
    // three rows of tiles for two clusters
    device.processors.set(4);
    let train = TrainShapes { linears: vec![shape], ..TrainShapes::default() };
    let shapes = Shapes { train, seed: 1, ..Shapes::default() };
    let mut checks = 0;
    run(&device, DType::Bf16, &shapes, &mut |check| {
        checks += 1;
        assert!(check.passed(), "{}, {}", check.operation, check.case);
    })
    .unwrap();
    assert!(checks > 3);
    device.launched.borrow().get("gemm_combine_bf16").copied().unwrap_or_default()
}

#[test]
fn rows_of_tiles_behind_the_last_whole_wave_are_divided() {
    // the gradient of the inputs, of 700 tokens, then that of the weights, of 712 outputs
    assert!(linear([700, 1536, 72]) > 0);
    assert!(linear([1536, 712, 72]) > 0);
    // whole waves
    assert_eq!(linear([1024, 1024, 72]), 0);
}
