//! Every CUDA kernel, executed by the emulator, against the CPU; the same cases as `bprompt
//! selftest`.

mod emulated;

use beautiful_prompt::engine::{SampledToken, Sampling, SamplingRow};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::ops::{Backend, DecodeBackend};
use beautiful_prompt::selftest::{Shapes, TrainShapes, run};
use beautiful_prompt::tensor::{DType, HostTensor};
use emulated::{Emulated, Launched};
use kernel_emulator::Emulator;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Runs all cases; returns the kernels that were launched.
fn all(half: DType, shapes: &Shapes, check_order: bool, hopper: bool) -> BTreeSet<String> {
    all_on(emulated::gpu(check_order, hopper), half, shapes)
}

fn all_on(device: Rc<Emulated>, half: DType, shapes: &Shapes) -> BTreeSet<String> {
    run(&device, half, shapes, &mut |o| {
        assert!(
            o.passed(),
            "{}, {}: error {:e}, allowed {:e}",
            o.operation,
            o.case,
            o.error,
            o.allowed
        );
    })
    .unwrap();
    let cuda = Cuda::new(device.clone(), half, false);
    // what the bench measures floors with; the figures mean nothing here
    assert!(cuda.read_bandwidth(100_000, 1).unwrap() > 0.0);
    assert!(cuda.peak(3, 1).unwrap() > 0.0);
    device.launched.borrow().keys().cloned().collect()
}

/// Many tokens: several tiles of products, with rows, columns and inputs left over, and of
/// attention, behind prefixes too.
fn large() -> Shapes {
    Shapes {
        matrices: vec![(300, 336), (24, 48)],
        tokens: vec![40, 65, 200],
        heads: vec![(2, 32), (1, 64), (1, 80), (2, 96), (1, 128)],
        steps: vec![(1, 64), (1, 32)],
        batches: vec![vec![(0, 150)], vec![(70, 75), (3, 20), (300, 17)]],
        vocabularies: vec![50],
        train: TrainShapes {
            linears: vec![[330, 272, 400]],
            heads: vec![(2, 32), (1, 64), (1, 80), (1, 96), (1, 128)],
            lengths: vec![5, 66],
            lm_heads: vec![[1030, 51, 16], [40, 1203, 32]],
        },
        ..Shapes::small(4)
    }
}

#[test]
fn every_kernel_agrees_with_the_cpu() {
    let mut launched = BTreeSet::new();
    std::thread::scope(|s| {
        let types = [(DType::Bf16, 1), (DType::F16, 2)];
        let runs = types.map(|(half, seed)| {
            s.spawn(move || {
                let mut launched = all(half, &Shapes::small(seed), false, false);
                launched.extend(all(half, &large(), false, true));
                launched
            })
        });
        runs.into_iter().for_each(|r| launched.extend(r.join().unwrap()));
    });
    let faulty = |k: &String| k.starts_with("fault_") || k.ends_with("_awaited");
    let missed: Vec<String> =
        Emulator::kernels().into_iter().filter(|k| !faulty(k) && !launched.contains(k)).collect();
    assert!(missed.is_empty(), "never launched: {missed:?}");
}

/// Pairs of tiles of tokens of which the last one is beyond them all; and pairs with more slices
/// than there are stages, or a single one and an odd width, in two orders of threads.
#[test]
fn clusters_share_weights() {
    for (check_order, outputs, inputs, tokens) in
        [(false, 512, 16, 1100), (true, 512, 400, 130), (true, 767, 48, 130)]
    {
        let device = emulated::gpu(check_order, true);
        device.processors.set(2);
        let nothing = Shapes {
            heads: vec![],
            steps: vec![],
            vocabularies: vec![],
            train: TrainShapes::default(),
            ..Shapes::small(6)
        };
        let shapes = Shapes { matrices: vec![(outputs, inputs)], tokens: vec![tokens], ..nothing };
        all_on(device.clone(), DType::F16, &shapes);
        assert!(device.launched.borrow().contains_key("linear_hopper_f16"));
        assert!(device.clusters.borrow().contains(&2));
    }
}

/// Few tokens on a GPU with more multiprocessors than tiles: clusters of blocks divide the inputs,
/// also unevenly.
#[test]
fn clusters_divide_the_inputs() {
    let shapes = Shapes {
        matrices: vec![(300, 336), (16, 80), (130, 720)],
        tokens: vec![17, 64, 90, 130],
        heads: vec![(3, 96)],
        steps: vec![(2, 64)],
        batches: vec![vec![(0, 20), (33, 1)]],
        vocabularies: vec![],
        train: TrainShapes::default(),
        ..Shapes::small(5)
    };
    for (half, check_order) in [(DType::Bf16, false), (DType::F16, true)] {
        let device = emulated::gpu(check_order, true);
        device.processors.set(16);
        let matrices = if check_order { vec![(130, 336)] } else { shapes.matrices.clone() };
        all_on(device.clone(), half, &Shapes { matrices, ..shapes.clone() });
        let clusters = device.clusters.borrow();
        assert!(clusters.contains(&4), "{clusters:?}");
        assert!(check_order || *clusters == BTreeSet::from([1, 2, 4, 8]), "{clusters:?}");
    }
}

#[test]
fn random_shapes_agree_with_the_cpu() {
    std::thread::scope(|s| {
        for (half, seeds) in [(DType::Bf16, 10..12), (DType::F16, 12..14)] {
            s.spawn(move || {
                for seed in seeds {
                    all(half, &Shapes::random(seed), false, seed % 2 == 0);
                }
            });
        }
    });
}

/// Every launch runs twice, with its threads in different orders.
#[test]
fn the_order_of_threads_does_not_matter() {
    let shapes = Shapes {
        matrices: vec![(18, 80)],
        tokens: vec![2, 35, 66],
        heads: vec![(2, 96)],
        steps: vec![(1, 32)],
        batches: vec![vec![(0, 18), (1030, 1)]],
        vocabularies: vec![50],
        train: TrainShapes {
            linears: vec![[33, 136, 144]],
            heads: vec![(2, 96)],
            lengths: vec![3, 66],
            lm_heads: vec![[5, 70, 16]],
        },
        ..Shapes::small(3)
    };
    all(DType::Bf16, &shapes, true, false);
    all(
        DType::F16,
        &Shapes {
            tokens: vec![130],
            steps: vec![],
            matrices: vec![(24, 208)],
            batches: vec![vec![(70, 140), (3, 20)]],
            ..shapes
        },
        true,
        true,
    );
}

/// Tokens with the same logit, hundreds of each: they are kept and cut as on the CPU, whether they
/// fit the kernel's list or not.
#[test]
fn equal_logits_are_cut_as_on_the_cpu() {
    let cuda = Cuda::new(emulated::gpu(true, false), DType::F16, false);
    let cpu = Cpu::new(0, Isa::detect());
    for (vocabulary, levels) in [(1200, 5), (6000, 2)] {
        let head: Vec<f32> = (0..vocabulary)
            .flat_map(|t| [t * 7 % levels, 1, 0, 2].map(|v| v as f32 / 4.0).repeat(4))
            .collect();
        let head = HostTensor::of_rows(&head, 16);
        let (ours, theirs) =
            (cuda.weight(head.clone(), None).unwrap(), cpu.weight(head, Some(DType::F32)).unwrap());
        let x = vec![0.25; 16];
        let ours_x = cuda.upload(&x, 16, DType::F16).unwrap();
        let x = cpu.upload(&x, 16);
        let plain = Sampling { temperature: 1.0, ..Sampling::default() };
        let filters =
            [(0, 0.3), (0, 0.5), (0, 0.999), (7, 1.0), (700, 0.9), (1100, 0.2), (0, 1e-9)];
        let samplings: Vec<Sampling> = (0..4 * filters.len())
            .map(|i| (i, filters[i % filters.len()]))
            .map(|(i, (top_k, top_p))| Sampling { top_k, top_p, seed: i as u64, ..plain })
            .collect();
        let rows: Vec<SamplingRow> =
            samplings.iter().map(|s| SamplingRow::new(0, s, 0, 3)).collect();
        let rows: Vec<(usize, &SamplingRow)> = rows.iter().map(|r| (0, r)).collect();
        let tokens = |chosen: Vec<SampledToken>| chosen.iter().map(|c| c.token).collect::<Vec<_>>();
        let expected = tokens(cpu.sample(&x, &theirs, &rows, &mut Vec::new()).unwrap());
        assert_eq!(tokens(cuda.sample(&ours_x, &ours, &rows, &mut Vec::new()).unwrap()), expected);
    }
}

/// A fault of a kernel in one of the problems that it is tried with.
struct Fault {
    kernel: &'static str,
    /// Whether a launch has the fault.
    when: fn(&Launched) -> bool,
    /// What it does.
    spoil: fn(&Launched),
    /// What the line about it has to say, besides the kernel.
    named: &'static str,
}

/// An offset in `EpilogueArgs`, the fifth argument of linear layers.
const MODE: usize = 48;
const WIDTH: usize = 52;
const HALF_RESIDUAL: usize = 56;
const EPILOGUE: usize = 4;

/// Each is small or rare: a single result, where rings wrap, where blocks take another tile, behind
/// 700 positions, or in one launch of a chain.
const FAULTS: [Fault; 8] = [
    Fault {
        kernel: "linear_cluster_f16_64 in clusters of 8",
        when: |l| l.kernel == "linear_cluster_f16_64" && l.config.cluster == 8 && l.word(3, 0) > 40,
        spoil: |l| l.add(l.address(EPILOGUE, 0), 0.2),
        named: "45 tokens of 2576 inputs to 117 outputs, Bias",
    },
    Fault {
        kernel: "linear_hopper_f16",
        when: |l| {
            l.kernel == "linear_hopper_f16"
                && l.word(EPILOGUE, MODE) == 1
                && l.word(EPILOGUE, WIDTH) > 256 * l.config.grid[0] / l.config.cluster
                && l.config.cluster == 2
        },
        spoil: |l| {
            let last = l.word(2, 0) as u64 * l.word(EPILOGUE, WIDTH) as u64 - 1;
            l.enlarge(l.address(EPILOGUE, 0) + 2 * last);
        },
        named: "Gelu",
    },
    Fault {
        kernel: "linear_hopper_f16",
        when: |l| {
            l.kernel == "linear_hopper_f16"
                && l.word(EPILOGUE, HALF_RESIDUAL) == 1
                && l.word(EPILOGUE, WIDTH) % 2 == 1
        },
        spoil: |l| l.add(l.address(EPILOGUE, 0) + 4 * 300, 0.2),
        named: "61 tokens of 592 inputs to 301 outputs, HalfResidual",
    },
    Fault {
        kernel: "linear_cluster_f16_128 in clusters of 4",
        when: |l| l.kernel == "linear_cluster_f16_128" && l.word(EPILOGUE, MODE) == 3,
        spoil: |l| l.enlarge(l.address(EPILOGUE, 24)),
        named: "keys and values of heads of 96",
    },
    Fault {
        kernel: "lm_head_logits_hopper_f16_128",
        when: |l| l.kernel == "lm_head_logits_hopper_f16_128",
        spoil: |l| l.add(l.address(5, 0) + 4, 1.0),
        named: "softmax statistics",
    },
    Fault {
        kernel: "lm_head_sample_hopper_f16_64",
        when: |l| l.kernel == "lm_head_sample_hopper_f16_64",
        // the best logit of each block for one token
        spoil: |l| {
            (0..l.word(4, 36)).for_each(|block| {
                l.add(l.address(4, 24) + 20 * (l.word(4, 36) + block) as u64 + 8, 0.5);
            });
        },
        named: "log-probabilities",
    },
    Fault {
        kernel: "attention_hopper_f16_96",
        when: |l| l.kernel == "attention_hopper_f16_96" && l.config.grid[1] > 5,
        spoil: |l| l.enlarge(l.address(3, 0) + 2 * (650 * 2 * 96)),
        named: "651 positions after 70",
    },
    Fault {
        kernel: "linear_cluster_f16_64, linear_hopper_f16 and attention_hopper_f16_96",
        // two runs of five layers are waited for
        when: |l| {
            l.kernel == "linear_hopper_f16"
                && l.word(EPILOGUE, WIDTH) == 592
                && CHAINED.with(|n| n.replace(n.get() + 1)) == 12
        },
        spoil: |l| l.enlarge(l.address(EPILOGUE, 0)),
        named: "a chain of 41 launches that the host does not wait for: 1 of 2 runs",
    },
];

thread_local! {
    /// Launches of the chain's second matrix.
    static CHAINED: Cell<usize> = const { Cell::new(0) };
}

/// Tries the kernels of Hopper in one 16-bit type, right as they are or with all faults, of which
/// each has a line then.
fn tried(half: DType, faulty: bool) {
    let device = emulated::gpu(false, true);
    device.processors.set(2);
    if faulty {
        *device.spoil.borrow_mut() = Some(Box::new(|l| {
            FAULTS.iter().filter(|f| (f.when)(l)).for_each(|f| (f.spoil)(l));
        }));
    }
    let cuda = Cuda::new(device.clone(), half, false);
    let wrong = cuda.try_hopper(96, 2).unwrap();
    *device.spoil.borrow_mut() = None;
    let about = |f: &Fault, line: &str| line.starts_with(f.kernel) && line.contains(f.named);
    for f in FAULTS.iter().filter(|_| faulty) {
        assert!(wrong.iter().any(|w| about(f, w)), "{}, {}: {wrong:#?}", f.kernel, f.named);
    }
    let others = wrong.iter().filter(|w| !FAULTS.iter().any(|f| faulty && about(f, w)));
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(wrong.iter().all(|w| w.contains(" difference of ") && !w.contains('\n')));
    assert_eq!(*device.clusters.borrow(), BTreeSet::from([1, 2, 4, 8]));

    device.launched.borrow_mut().clear();
    let x = cuda.upload(&vec![0.5; 40 * 64], 64, half).unwrap();
    let head = HostTensor::of_rows(&[0.25; 100 * 64], 64);
    cuda.logits(&x, &cuda.weight(head, None).unwrap(), &mut Vec::new()).unwrap();
    let used = device.launched.borrow().keys().any(|k| k.contains("hopper"));
    assert_eq!(used, !faulty);
}

/// Before a model uses them, the kernels of Hopper alone are tried beside the others.
#[test]
fn kernels_of_hopper_that_compute_something_else_are_left_alone() {
    std::thread::scope(|s| {
        s.spawn(|| tried(DType::Bf16, false));
        s.spawn(|| tried(DType::F16, true));
    });
    let older = Cuda::new(emulated::gpu(false, false), DType::Bf16, false);
    assert!(older.try_hopper(96, 1).unwrap().is_empty());
}
