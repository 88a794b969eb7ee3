//! Every CUDA kernel, executed by the emulator, against the CPU; the same cases as `bprompt selftest`.

mod emulated;

use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::selftest::{Shapes, run};
use beautiful_prompt::tensor::DType;

fn all(half: DType, shapes: &Shapes, check_order: bool) -> usize {
    let mut count = 0;
    run(&emulated::device(check_order), half, shapes, &mut |o| {
        assert!(o.passed(), "{}, {}: error {:e}, allowed {:e}", o.operation, o.case, o.error, o.allowed);
        count += 1;
    })
    .unwrap();
    count
}

#[test]
fn kernels_agree_with_the_cpu_in_bf16() {
    assert!(all(DType::Bf16, &Shapes::small(1), false) > 200);
}

#[test]
fn kernels_agree_with_the_cpu_in_f16() {
    assert!(all(DType::F16, &Shapes::small(2), false) > 200);
}

/// Every launch runs twice, with its threads in different orders.
#[test]
fn the_order_of_threads_does_not_matter() {
    let shapes = Shapes {
        matrices: vec![(18, 80)],
        tokens: vec![2, 35],
        heads: vec![(2, 96)],
        batches: vec![vec![(0, 18), (1030, 1)]],
        vocabulary: 50,
        ..Shapes::small(3)
    };
    all(DType::Bf16, &shapes, true);
}

/// What the bench measures floors with runs too; its figures mean nothing here.
#[test]
fn measuring_kernels_run() {
    let cuda = Cuda::new(emulated::device(true), DType::F16, false);
    assert!(cuda.read_bandwidth(100_000, 1).unwrap() > 0.0);
    assert!(cuda.peak(3, 1).unwrap() > 0.0);
}
