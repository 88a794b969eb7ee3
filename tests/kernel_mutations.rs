//! The emulator finds the mistakes that a GPU would punish: kernels are changed in their text,
//! compiled, and run in place of the right ones.

mod emulated;

use beautiful_prompt::bench::llm::random_checkpoint;
use beautiful_prompt::device::TensorMapConfig;
use beautiful_prompt::engine::{Engine, EngineOptions, Request, Verdict};
use beautiful_prompt::models::bloom::training::{Backward, TrainModel, Workspace};
use beautiful_prompt::models::bloom::{Bloom, BloomConfig};
use beautiful_prompt::ops::cuda::{Cuda, Persistent};
use beautiful_prompt::ops::train::{PackedBatch, Precision, TrainBackend};
use beautiful_prompt::selftest::{Shapes, TrainShapes, run};
use beautiful_prompt::tensor::DType;
use beautiful_prompt::train::optimizer::{AdamW, AdamWOptions, StepSize};
use emulated::{Emulated, gpu};
use kernel_emulator::Emulator;
use kernel_emulator::mutant::{Patch, load};
use std::rc::Rc;

/// What is said of kernels that begin too early.
const NOBODY: &[&str] = &[
    "no thread waits for the kernels before",
    "comes too late",
    "a write to device memory before griddep_wait",
];

/// What runs on a device with changed kernels.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// A GEMM: outputs, inputs, tokens.
    Linear(usize, usize, usize),
    /// Attention of one head of this size: positions in the cache, new tokens.
    Attention(usize, usize, usize),
    /// A whole decoding step in one kernel.
    PersistentStep,
    /// Some steps of a small model, whose kernels depend on each other.
    Model,
    /// The same with so many sequences that clusters divide the inputs.
    LargeBatch,
    /// Training's operations, with or without those of Hopper.
    Train { part: Part, hopper: bool },
    /// A step of training a small model, whose kernels depend on each other.
    TrainStep,
}

/// Some of training's operations.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// A linear layer: tokens, outputs, inputs; and the norms.
    Linear([usize; 3]),
    /// Attention of one head of 64 in sequences of these lengths.
    Attention([usize; 2]),
    /// The loss at the LM head: labels, tokens of the vocabulary, width; and AdamW.
    Loss([usize; 3]),
}

impl Part {
    fn shapes(self) -> TrainShapes {
        let none = TrainShapes::default();
        match self {
            Part::Linear(linear) => TrainShapes { linears: vec![linear], ..none },
            Part::Attention(lengths) => {
                TrainShapes { heads: vec![(1, 64)], lengths: lengths.to_vec(), ..none }
            }
            Part::Loss(lm_head) => TrainShapes { lm_heads: vec![lm_head], ..none },
        }
    }
}

impl Work {
    /// Multiprocessors of the device: kernels divide their work by them.
    fn processors(self) -> u32 {
        match self {
            // few, so that all tiles are of the largest kind
            Work::Linear(..) => 2,
            // more than there are tiles
            Work::LargeBatch => 16,
            _ => 4,
        }
    }

    fn hopper(self) -> bool {
        !matches!(self, Work::Train { hopper: false, .. })
    }
}

/// Does the work; `Err` is what the device reports, or which result is wrong.
fn perform(work: Work, device: &Rc<Emulated>) -> Result<(), String> {
    let none = Shapes { seed: 1, ..Shapes::default() };
    let shapes = match work {
        Work::Linear(outputs, inputs, tokens) => {
            Shapes { matrices: vec![(outputs, inputs)], tokens: vec![tokens], ..none }
        }
        Work::Attention(size, past, new) => {
            Shapes { heads: vec![(1, size)], batches: vec![vec![(past, new)]], ..none }
        }
        Work::PersistentStep => Shapes { steps: vec![(2, 32)], ..none },
        Work::Train { part, .. } => Shapes { train: part.shapes(), ..none },
        Work::Model => return generate(device, 128, 2, 20),
        Work::LargeBatch => return generate(device, 256, 20, 2),
        Work::TrainStep => return train_step(device).map_err(|e| e.to_string()),
    };
    let mut wrong = None;
    let mut each = |check: beautiful_prompt::selftest::KernelCheck| {
        if !check.passed() {
            wrong.get_or_insert(format!("wrong result of {}, {}", check.operation, check.case));
        }
    };
    run(device, DType::Bf16, &shapes, &mut each).map_err(|e| e.to_string())?;
    wrong.map_or(Ok(()), Err)
}

/// Prompts of `prompt` tokens and three tokens for each of the sequences, by a model of this width.
fn generate(
    device: &Rc<Emulated>,
    width: usize,
    sequences: u32,
    prompt: u32,
) -> Result<(), String> {
    let checkpoint = random_checkpoint(BloomConfig::new(100, width, 2, 4), DType::Bf16).unwrap();
    let mut cuda = Cuda::new(device.clone(), DType::Bf16, false);
    cuda.persistent = Persistent::Never;
    let model = Bloom::load(&cuda, checkpoint, None).map_err(|e| e.to_string())?;
    let options = EngineOptions { cache_tokens: 1024, ..EngineOptions::default() };
    let mut engine = Engine::new(&cuda, &model, options).map_err(|e| e.to_string())?;
    for id in 0..sequences {
        let ids = (0..prompt).map(|i| (id + i * 7) % 100).collect();
        let request = Request { ignore_eos: true, ..Request::new(id.into(), ids, 3, 2) };
        engine.submit(request).unwrap();
    }
    while !engine.is_idle() {
        engine.step(&mut |_| Verdict::Go).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// A step of a model of one layer.
fn train_step(device: &Rc<Emulated>) -> beautiful_prompt::error::Result<()> {
    let b = Cuda::new(device.clone(), DType::Bf16, false);
    let mut model = TrainModel::random(BloomConfig::new(100, 64, 1, 1), 1).place(&b)?;
    let mut batch = PackedBatch::default();
    batch.push(&[4, 8, 15, 16, 23, 42, 7], 2);
    batch.push(&[9, 8, 50], 1);
    let (mut grads, mut sums) = (b.zeros(model.config.parameter_count())?, b.new_sums()?);
    let out = Some((0.1, Backward::to(&mut grads)));
    model.loss(&b, (Precision::Bf16, &batch), &mut Workspace::default(), out, &mut sums);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&b, &model.config.parameters(), options)?;
    optimizer.squared_norm(&b, &grads, &mut sums);
    let size = StepSize { learning_rate: 1e-3, max_norm: 0.5 };
    optimizer.step(&b, (&mut model.values, &grads), size, &sums);
    b.values(&model.values)?;
    Ok(())
}

struct Mutation {
    /// The file that is compiled, and what is changed in it and in headers.
    source: &'static str,
    patches: Vec<Patch>,
    work: Work,
    /// Whether launches run in two orders of threads.
    check_order: bool,
    /// Any of these is a report of this mistake.
    says: &'static [&'static str],
}

const fn patch(file: &'static str, from: &'static str, to: &'static str) -> Patch {
    Patch { file, from, to }
}

fn device(check_order: bool, work: Work) -> Rc<Emulated> {
    let device = gpu(check_order, work.hopper());
    device.processors.set(work.processors());
    device
}

/// Runs every mutation; each has to be reported in one of its words.
fn all_are_found(name: &str, mutations: &[Mutation]) {
    let mut missed = Vec::new();
    for (i, m) in mutations.iter().enumerate() {
        let prefix: &'static str = format!("{name}{i}:").leak();
        load(prefix, m.source, &m.patches).unwrap();
        let device = device(m.check_order, m.work);
        device.mutant.set(prefix);
        let found = perform(m.work, &device);
        let launched = device.launched.borrow();
        let used = launched.keys().any(|k| Emulator::has(&format!("{prefix}{k}")));
        assert!(used, "{}: none of its kernels was launched by {:?}", m.source, m.work);
        let named = found.as_ref().is_err_and(|e| m.says.iter().any(|words| e.contains(words)));
        if !named {
            let last = m.patches.last();
            missed.push(format!("{}, {last:?}: {found:?}, not {:?}", m.source, m.says));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Only some of a file's kernels are compiled, which is quicker.
const ONE_ATTENTION: [Patch; 5] = [
    patch("attention_hopper.cu", "ATTENTION_HOPPER_ALL(f16)", ""),
    patch("attention_hopper.cu", "    ATTENTION_HOPPER(T, 32)     \\\n", ""),
    patch("attention_hopper.cu", "    ATTENTION_HOPPER(T, 80)     \\\n", ""),
    patch("attention_hopper.cu", "    ATTENTION_HOPPER(T, 96)     \\\n", ""),
    patch(
        "attention_hopper.cu",
        "    ATTENTION_HOPPER(T, 64)     \\\n    ATTENTION_HOPPER(T, 128)",
        "    ATTENTION_HOPPER(T, 64)",
    ),
];
const ONE_LINEAR: Patch = patch("linear_hopper.cu", "LINEAR_HOPPER(f16)", "");

/// The right kernels run all of this without a report, also when they are compiled here.
#[test]
fn right_kernels_are_left_alone() {
    let one = [ONE_LINEAR];
    load("right:", "linear_hopper.cu", &one).unwrap();
    load("right:", "attention_hopper.cu", &ONE_ATTENTION).unwrap();
    for work in [
        TILES,
        TURNS,
        Work::Attention(64, 300, 150),
        Work::PersistentStep,
        Work::Model,
        Work::LargeBatch,
        Work::TrainStep,
    ] {
        let device = device(true, work);
        device.mutant.set("right:");
        assert_eq!(perform(work, &device), Ok(()), "{work:?}");
    }
}

/// Whole tiles and parts of them in several stages of the pipeline.
const TILES: Work = Work::Linear(256, 400, 130);
/// Three tiles for each block, of one slice: consumers have the next sums before the last are
/// written.
const TURNS: Work = Work::Linear(768, 48, 130);

#[test]
fn fences_between_proxies_and_before_wgmma() {
    const NO_INIT_FENCE: Patch = patch("hopper.cuh", "        fence_mbarrier_init();\n", "");
    const INIT: &[&str] = &["without a fence (fence_mbarrier_init)"];
    let [a, b, c, d, e] = ONE_ATTENTION;
    let attention = move |extra: Patch| -> Vec<Patch> { vec![a, b, c, d, e, extra] };
    let linear = |extra: Patch| -> Vec<Patch> { vec![ONE_LINEAR, extra] };
    let attended = Work::Attention(64, 300, 150);
    let mutation =
        |source, patches, work, says| Mutation { source, patches, work, check_order: false, says };
    all_are_found(
        "fences",
        &[
            mutation("linear_hopper.cu", linear(NO_INIT_FENCE), TILES, INIT),
            mutation("attention_hopper.cu", attention(NO_INIT_FENCE), attended, INIT),
            mutation(
                "linear_hopper.cu",
                linear(patch("tma_pipeline.cuh", "wgmma_fence();", "")),
                TILES,
                &["wgmma without a wgmma.fence"],
            ),
            mutation(
                "attention_hopper.cu",
                attention(patch("attention_hopper.cu", "            wgmma_fence();", "")),
                attended,
                &["registers that were changed after the last wgmma.fence"],
            ),
        ],
    );
}

#[test]
fn waits_of_the_pipeline() {
    let linear = |extra: Patch| -> Vec<Patch> { vec![ONE_LINEAR, extra] };
    let pipeline = |from, to| linear(patch("tma_pipeline.cuh", from, to));
    let mutation = |patches, says| Mutation {
        source: "linear_hopper.cu",
        patches,
        work: TILES,
        check_order: true,
        says,
    };
    const ORDER: &[&str] = &["depends on the order", "wrong result", "nothing wrote"];
    all_are_found(
        "waits",
        &[
            mutation(pipeline("            wgmma_wait_group<1>();\n", ""), ORDER),
            mutation(
                pipeline("        wgmma_wait_group<0>();\n", ""),
                &["ends before its wgmma", "depends on the order"],
            ),
            mutation(
                pipeline("mbarrier_wait_parity(&empty", "if (false) mbarrier_wait_parity(&empty"),
                &["more arrivals at an mbarrier", "depends on the order"],
            ),
            mutation(
                pipeline("            if (s > 0) consumer_release(iteration - 1);\n", ""),
                &["deadlock"],
            ),
            mutation(
                pipeline("% STAGES], STAGE_BYTES)", "% STAGES], STAGE_BYTES - 128)"),
                &["deadlock"],
            ),
            mutation(
                pipeline("mbarrier_wait_parity(&full", "if (false) mbarrier_wait_parity(&full"),
                ORDER,
            ),
        ],
    );
}

/// What consumers leave for the warps that write it.
#[test]
fn sums_that_others_write() {
    let mutation = |from, to, says| Mutation {
        source: "linear_hopper.cu",
        patches: vec![ONE_LINEAR, patch("gemm_hopper.cuh", from, to)],
        work: TURNS,
        check_order: true,
        says,
    };
    const ORDER: &[&str] = &["depends on the order", "wrong result", "nothing wrote"];
    all_are_found(
        "staged",
        &[
            mutation(
                "mbarrier_wait_parity(staging.empty, (turn + 1) & 1);",
                "",
                &["more arrivals at an mbarrier", "depends on the order", "deadlock"],
            ),
            mutation("mbarrier_wait_parity(staging.full, turn & 1);", "", ORDER),
            mutation("if (lane_index() == 0) mbarrier_arrive(staging.empty);", "", &["deadlock"]),
        ],
    );
}

#[test]
fn registers_that_move_between_warpgroups() {
    let mutation_of = |file, from, to, says| Mutation {
        source: "linear_hopper.cu",
        patches: vec![ONE_LINEAR, patch(file, from, to)],
        work: TILES,
        check_order: false,
        says,
    };
    let mutation = |from, to, says| mutation_of("gemm_hopper.cuh", from, to, says);
    const UNSAID: &[&str] = &["launch bounds do not say"];
    all_are_found(
        "registers",
        &[
            mutation("setmaxnreg_inc<208>", "setmaxnreg_inc<216>", &["in setmaxnreg for 6144"]),
            mutation("setmaxnreg_dec<88>", "setmaxnreg_dec<96>", &["in setmaxnreg for 5120"]),
            mutation("setmaxnreg_dec<88>();", "", &["in setmaxnreg for 5120"]),
            mutation("setmaxnreg_inc<208>", "setmaxnreg_inc<204>", &["no multiple of 8"]),
            mutation("setmaxnreg_dec<88>", "setmaxnreg_dec<176>", &["the warpgroup has 168"]),
            mutation("setmaxnreg_inc<208>", "setmaxnreg_inc<160>", &["the warpgroup has 168"]),
            mutation_of("linear_hopper.cu", "KERNEL_ALONE(", "KERNEL(", UNSAID),
        ],
    );
}

#[test]
fn descriptors_of_operands() {
    let mutation = |from, to, says| Mutation {
        source: "linear_hopper.cu",
        patches: vec![ONE_LINEAR, patch("wgmma.cuh", from, to)],
        work: TILES,
        check_order: false,
        says,
    };
    all_are_found(
        "descriptors",
        &[
            mutation("SWIZZLE_128 = 1", "SWIZZLE_128 = 2", &["the descriptor says 64"]),
            mutation("SWIZZLE_128 = 1", "SWIZZLE_128 = 3", &["the descriptor says 32"]),
            mutation("SWIZZLE_128 = 1", "SWIZZLE_128 = 0", &["the descriptor says 16"]),
            mutation("(1024 >> 4) << 32", "(512 >> 4) << 32", &["wrong result"]),
            mutation(
                "SWIZZLE_128 << 62",
                "SWIZZLE_128 << 62 | static_cast<uint64_t>(1) << 49",
                &["reserved fields or a base offset"],
            ),
            mutation("+ k * 2, 16", "+ k * 2 + 128, 16", &["within a group of 8 rows"]),
            mutation("+ k * 2, 16", "+ k, 16", &["wrong result"]),
            // the values of a head of 96 are two tiles side by side
            Mutation {
                source: "attention_hopper.cu",
                patches: vec![
                    patch("attention_hopper.cu", "ATTENTION_HOPPER_ALL(f16)", ""),
                    patch("wgmma.cuh", "k * 128, tile_bytes", "k * 128, 16"),
                ],
                work: Work::Attention(96, 70, 70),
                check_order: false,
                says: &["wrong result", "which nothing wrote"],
            },
        ],
    );
}

/// What the driver is told of matrices: CUDA's rules, and what kernels expect.
#[test]
fn maps_of_tensors() {
    type Change = fn(TensorMapConfig) -> TensorMapConfig;
    let changes: [(Change, &[&str]); 9] = [
        (|c| TensorMapConfig { swizzle: 2, ..c }, &["rows of 128 bytes do not fit the swizzle"]),
        (|c| TensorMapConfig { swizzle: 0, ..c }, &["which TMA wrote with a swizzle of 16 bytes"]),
        (
            |c| TensorMapConfig { global_dim: [c.global_dim[1], c.global_dim[0]], ..c },
            &["rows overlap", "wrong result", "never written"],
        ),
        (|c| TensorMapConfig { global_stride: c.global_stride + 8, ..c }, &["no multiple of 16"]),
        (
            |c| TensorMapConfig { global_stride: c.global_stride + 16, ..c },
            &["wrong result", "out of bounds", "never written"],
        ),
        (
            |c| TensorMapConfig { box_dim: [c.box_dim[1], c.box_dim[0]], ..c },
            &["do not fit the swizzle"],
        ),
        (
            |c| TensorMapConfig { box_dim: [c.box_dim[0], c.box_dim[1] / 2], ..c },
            &["deadlock", "nothing wrote"],
        ),
        (|c| TensorMapConfig { element_strides: [2, 1], ..c }, &["element strides"]),
        (|c| TensorMapConfig { address: c.address + 2, ..c }, &["address is no multiple of 16"]),
    ];
    for (change, says) in changes {
        let device = device(false, TILES);
        device.mapped.set(change);
        let found = perform(TILES, &device);
        let named = found.as_ref().is_err_and(|e| says.iter().any(|words| e.contains(words)));
        assert!(named, "{found:?}, not {says:?}");
    }
}

/// What a kernel reads of those before it comes after the wait for them.
#[test]
fn waits_for_the_kernels_before() {
    const LATE: &[&str] = &["griddep_wait comes too late"];
    let [a, b, c, d, e] = ONE_ATTENTION;
    let mutation =
        |source, patches, work, says| Mutation { source, patches, work, check_order: false, says };
    let removed =
        |source: &'static str| -> Vec<Patch> { vec![patch(source, "griddep_wait();", "")] };
    all_are_found(
        "dependents",
        &[
            mutation("layer_norm.cu", removed("layer_norm.cu"), Work::Model, NOBODY),
            mutation("sampling.cu", removed("sampling.cu"), Work::Model, NOBODY),
            mutation("attention_decode.cu", removed("attention_decode.cu"), Work::Model, NOBODY),
            mutation("linear_skinny.cu", removed("linear_skinny.cu"), Work::Model, NOBODY),
            mutation(
                "linear_skinny.cu",
                vec![
                    patch("linear_skinny.cu", "    griddep_wait();\n", ""),
                    patch(
                        "linear_skinny.cu",
                        "    float c[TILES][2][4] = {};\n",
                        "    griddep_wait();\n    float c[TILES][2][4] = {};\n",
                    ),
                ],
                Work::Model,
                LATE,
            ),
            mutation(
                "linear_hopper.cu",
                vec![ONE_LINEAR, patch("gemm_hopper.cuh", "griddep_wait();", "")],
                TILES,
                NOBODY,
            ),
            mutation(
                "attention_hopper.cu",
                vec![a, b, c, d, e, patch("attention_hopper.cu", "griddep_wait();", "")],
                Work::Attention(64, 300, 150),
                NOBODY,
            ),
            mutation(
                "linear_cluster.cu",
                vec![patch("tiles_hopper.cuh", "            griddep_wait();\n", "")],
                Work::LargeBatch,
                LATE,
            ),
            mutation(
                "linear_cluster.cu",
                vec![patch(
                    "linear_cluster.cu",
                    "    accumulate_tile<T, TOKENS>(",
                    "    *static_cast<uint32_t*>(e.out) = 0;\n    accumulate_tile<T, TOKENS>(",
                )],
                Work::LargeBatch,
                &["a write to device memory before griddep_wait"],
            ),
        ],
    );
}

/// What blocks tell each other through device memory passes a fence and a flag.
#[test]
fn memory_that_other_multiprocessors_wrote() {
    const ONE_STEP: [Patch; 4] = [
        patch("decode_step.cu", "DECODE_STEP_ALL(4)", ""),
        patch("decode_step.cu", "    DECODE_STEP(f16, f16, f16, DEPTH)           \\\n", ""),
        patch("decode_step.cu", "    DECODE_STEP(bf16, int8_t, bf16_int8, DEPTH) \\\n", ""),
        patch("decode_step.cu", "    DECODE_STEP(f16, int8_t, f16_int8, DEPTH)", ""),
    ];
    let step = |extra: Patch| -> Vec<Patch> {
        let [a, b, c, d] = ONE_STEP;
        vec![a, b, c, d, extra]
    };
    let mutation =
        |source, patches, work, says| Mutation { source, patches, work, check_order: false, says };
    const SPLIT: Work = Work::Attention(64, 1040, 1);
    all_are_found(
        "visibility",
        &[
            mutation(
                "decode_step.cu",
                step(patch("decode_step.cu", "release_increment(counter);", "*counter += 1;")),
                Work::PersistentStep,
                &["without a fence and a flag", "deadlock"],
            ),
            mutation(
                "decode_step.cu",
                step(patch(
                    "decode_step.cu",
                    "wait_for_counter(counter, arrived);",
                    "while (static_cast<int32_t>(*counter - arrived) < 0) device_fence();",
                )),
                Work::PersistentStep,
                &["this launch changes by atomics, by an ordinary load"],
            ),
            mutation(
                "decode_step.cu",
                step(patch("attention_decode.cuh", "v[r][i] = load(", "v[r][i] = load_streaming(")),
                Work::PersistentStep,
                &["through the read-only cache"],
            ),
            mutation(
                "attention_decode.cu",
                vec![patch(
                    "attention_decode.cuh",
                    "atomic_increment(&a.counters[index])",
                    "a.counters[index]++",
                )],
                SPLIT,
                &["another block wrote, without a fence and a flag between"],
            ),
        ],
    );
}

#[test]
fn barriers_and_copies_of_a_block() {
    let mutation = |patches, says| Mutation {
        source: "linear_skinny.cu",
        patches,
        work: Work::Linear(48, 400, 3),
        check_order: true,
        says,
    };
    all_are_found(
        "barriers",
        &[
            mutation(
                vec![patch(
                    "linear_skinny.cu",
                    "    block_sync();\n    return sums;",
                    "    if (lane_index() < 16) {\n        block_sync();\n    } else {\n        \
                     block_sync();\n    }\n    return sums;",
                )],
                &["on different ways: it is .aligned"],
            ),
            mutation(
                vec![patch(
                    "linear_skinny.cu",
                    "cp_async_wait_group<DEPTH - 1>",
                    "cp_async_wait_group<DEPTH>",
                )],
                &["nothing wrote", "depends on the order"],
            ),
            mutation(
                vec![patch(
                    "linear_skinny.cu",
                    "    block_sync();\n    return sums;",
                    "    return sums;",
                )],
                &["depends on the order", "wrong result"],
            ),
        ],
    );
}

/// Only some of training's attention, as of attention's.
const ONE_TRAIN_ATTENTION: [Patch; 9] = {
    const fn one(text: &'static str) -> Patch {
        patch("attention_train_hopper.cu", text, "")
    }
    [
        one("    ATTENTION_TRAIN_HOPPER(forward, T, 80, 3)  \\\n"),
        one("    ATTENTION_TRAIN_HOPPER(forward, T, 96, 3)  \\\n"),
        one("    ATTENTION_TRAIN_HOPPER(forward, T, 128, 3) \\\n"),
        one("    ATTENTION_TRAIN_HOPPER(dq, T, 80, 2)       \\\n"),
        one("    ATTENTION_TRAIN_HOPPER(dq, T, 96, 2)       \\\n"),
        one("    ATTENTION_TRAIN_HOPPER(dq, T, 128, 2)      \\\n"),
        one("    ATTENTION_TRAIN_HOPPER_DKV(T, 80, 2)       \\\n"),
        one("    ATTENTION_TRAIN_HOPPER_DKV(T, 96, 2)       \\\n"),
        patch(
            "attention_train_hopper.cu",
            "    ATTENTION_TRAIN_HOPPER_DKV(T, 64, 3)       \\\n    \
             ATTENTION_TRAIN_HOPPER_DKV(T, 128, 2)",
            "    ATTENTION_TRAIN_HOPPER_DKV(T, 64, 3)",
        ),
    ]
};

/// Stages that are read until all warps have come to a barrier, and registers of wgmma.
#[test]
fn training_on_hopper() {
    // a warp that comes late waits for a phase which has passed, or reads what is no longer there
    const ORDER: &[&str] = &["deadlock", "depends on the order", "wrong result"];
    let attention = |from, to, says| {
        let mut patches = vec![patch("attention_train_hopper.cu", from, to)];
        patches.extend(ONE_TRAIN_ATTENTION);
        let work = Work::Train { part: Part::Attention([200, 70]), hopper: true };
        Mutation { source: "attention_train_hopper.cu", patches, work, check_order: true, says }
    };
    all_are_found(
        "training-hopper",
        &[
            attention("block_sync(); // all warps have read the stage", "", ORDER),
            attention("block_sync(); // as in the forward pass", "", ORDER),
            attention("        if (s + 1 < steps) block_sync();\n", "", ORDER),
            attention(
                "        if (s + 1 < steps) block_sync();\n",
                "        if (s + STAGES < steps) stats[threadIdx.x] = next_stat;\n        \
                 if (s + 1 < steps) block_sync();\n",
                ORDER,
            ),
            attention(
                "        wgmma_wait_group<1>();\n        wgmma_fence_operand(gradients);\n",
                "",
                &["registers", "depends on the order"],
            ),
            // the tile of ones that bias gradients are multiplied by
            Mutation {
                source: "gemm_train_hopper.cu",
                patches: vec![patch(
                    "gemm_hopper.cuh",
                    "            fence_proxy_async();\n        }\n    }\n",
                    "        }\n    }\n",
                )],
                work: Work::Train { part: Part::Linear([130, 136, 208]), hopper: true },
                check_order: false,
                says: &["without a fence"],
            },
        ],
    );
}

/// Training's other kernels: their stages and sums, and waiting for the kernels before them.
#[test]
fn training_on_every_gpu() {
    const ORDER: &[&str] = &["depends on the order", "wrong result", "nothing wrote"];
    let within = |source, part, from, to| Mutation {
        source,
        patches: vec![patch(source, from, to)],
        work: Work::Train { part, hopper: false },
        check_order: true,
        says: ORDER,
    };
    let early = |source, file| Mutation {
        source,
        patches: vec![patch(file, "griddep_wait();", "")],
        work: Work::TrainStep,
        check_order: false,
        says: NOBODY,
    };
    let linear = Part::Linear([130, 136, 208]);
    let slices = ("cp_async_wait_group<STAGES - 2>", "cp_async_wait_group<STAGES - 1>");
    let arrived = ("block_sync(); // this slice has arrived", "// this slice has arrived");
    all_are_found(
        "training",
        &[
            within("gemm_train.cu", linear, slices.0, slices.1),
            within("gemm_train.cu", linear, arrived.0, arrived.1),
            within("layer_norm_train.cu", linear, "    block_sync();\n", ""),
            within("lm_head_loss.cu", Part::Loss([9, 130, 48]), "        block_sync();\n", ""),
            early("gemm_train_hopper.cu", "gemm_hopper.cuh"),
            early("layer_norm_train.cu", "layer_norm_train.cu"),
            early("lm_head_loss.cu", "lm_head_loss.cu"),
            early("elementwise_train.cu", "elementwise_train.cu"),
            early("optimizer.cu", "optimizer.cu"),
        ],
    );
}
