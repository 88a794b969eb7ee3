//! The CUDA backend, its kernels executed by the emulator: whole models against transformers and
//! against the CPU.

mod emulated;
mod golden_models;

use beautiful_prompt::bench::llm::random_checkpoint;
use beautiful_prompt::engine::{
    Counters, Engine, EngineOptions, Event, Request, Sampling, SamplingRow, Verdict,
};
use beautiful_prompt::models::bloom::{Bloom, BloomConfig};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::{Cuda, Persistent};
use beautiful_prompt::ops::{Batch, DecodeBackend, DecoderActivations};
use beautiful_prompt::tensor::{DType, HostTensor};
use emulated::{Captures, Emulated, gpu};
use golden_models::{MODELS, error, logits, open};
use std::collections::BTreeMap;

/// Errors that the storage types explain: activations, weights and cache have 8 bits of mantissa in
/// bf16 and 11 in f16; 8-bit weights are rounded to their row's largest element.
#[test]
fn logits_are_transformers_own() {
    for name in MODELS {
        let (checkpoint, ids, theirs) = open(name);
        for (half, dtype, most) in [
            (DType::F16, None, 4e-3),
            (DType::Bf16, None, 3e-2),
            (DType::F16, Some(DType::Int8), 4e-2),
        ] {
            for batch_invariant in [false, true] {
                let cuda = Cuda::new(gpu(false, false), half, batch_invariant);
                let model = Bloom::load(&cuda, checkpoint.clone(), dtype).unwrap();
                let e = error(&logits(&cuda, &model, &ids, usize::MAX), &theirs);
                assert!(e < most, "{name} in {half:?} {dtype:?}: {e:e}");
            }
            let launcher = gpu(false, true);
            let mut cuda = Cuda::new(launcher.clone(), half, false);
            cuda.persistent = Persistent::Always;
            let model = Bloom::load(&cuda, checkpoint.clone(), dtype).unwrap();
            let e = error(&logits(&cuda, &model, &ids, 7), &theirs);
            assert!(e < most, "{name} in {half:?} {dtype:?}, in one kernel: {e:e}");
            let passes: usize = launcher
                .launched
                .borrow()
                .iter()
                .filter(|k| k.0.starts_with("decode_step"))
                .map(|k| k.1)
                .sum();
            assert_eq!(passes, ids.len().div_ceil(7), "all passes are of few tokens");
        }
    }
}

#[test]
fn the_order_of_threads_leaves_a_model_alone() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let run = |check_order| {
        let cuda = Cuda::new(gpu(check_order, false), DType::Bf16, true);
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        logits(&cuda, &model, &ids, 3)
    };
    assert!(run(true) == run(false));
}

fn requests(prompt: &[u32]) -> Vec<Request> {
    let sampled = |seed| Sampling { temperature: 0.9, seed, ..Sampling::default() };
    let plan = [
        (sampled(1), prompt, 2),
        (Sampling::default(), &prompt[..1], 1),
        (Sampling { repetition_penalty: 1.3, ..sampled(2) }, &prompt[..prompt.len() / 2], 1),
        (Sampling { top_k: 5, top_p: 0.9, ..sampled(3) }, &prompt[2..], 1),
    ];
    let request =
        |(id, (sampling, prompt, candidates)): (usize, (Sampling, &[u32], u32))| Request {
            candidates,
            sampling,
            ignore_eos: true,
            ..Request::new(id as u64, prompt.to_vec(), 6, 2)
        };
    plan.into_iter().enumerate().map(request).collect()
}

type Tokens = BTreeMap<(u64, u32), Vec<(u32, u32)>>;

/// Tokens and the bits of their log-probabilities.
fn generate<B: DecodeBackend>(
    backend: &B,
    model: &Bloom<B>,
    requests: &[Request],
    batch_tokens: usize,
) -> Tokens {
    let options = EngineOptions { batch_tokens, cache_tokens: 1024, ..EngineOptions::default() };
    generate_counting(backend, model, requests, options).0
}

fn generate_counting<B: DecodeBackend>(
    backend: &B,
    model: &Bloom<B>,
    requests: &[Request],
    options: EngineOptions,
) -> (Tokens, Counters) {
    let mut engine = Engine::new(backend, model, options).unwrap();
    for r in requests {
        engine.submit(r.clone()).unwrap();
    }
    let mut out = Tokens::default();
    while !engine.is_idle() {
        let mut sink = |event| {
            if let Event::Token { request, candidate, token, logprob, .. } = event {
                out.entry((request, candidate)).or_default().push((token, logprob.to_bits()));
            }
            Verdict::Go
        };
        engine.step(&mut sink).unwrap();
    }
    assert_eq!(engine.blocks_in_use(), 0, "blocks leaked");
    (out, engine.counters())
}

/// A sequence's tokens and log-probabilities are the same, bit for bit, alone, together, in another
/// order, cut into other chunks, with drafts, when it has to give up its blocks, and behind a
/// prefix that was computed before.
#[test]
fn neighbours_leave_a_sequence_alone() {
    let (checkpoint, ids, _) = open("f16_pytorch_sharded");
    let cuda = Cuda::new(gpu(false, false), DType::F16, true);
    let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
    let mut all = requests(&ids);
    let together = generate(&cuda, &model, &all, 64);
    assert_eq!(together.len(), 5);
    for r in &all {
        for (key, tokens) in generate(&cuda, &model, std::slice::from_ref(r), 5) {
            assert_eq!(tokens, together[&key], "request {key:?}");
        }
    }
    all.reverse();
    assert_eq!(generate(&cuda, &model, &all, 9), together);

    let options =
        EngineOptions { batch_tokens: 64, cache_tokens: 1024, ..EngineOptions::default() };
    let (drafted, counters) =
        generate_counting(&cuda, &model, &all, EngineOptions { draft_tokens: 3, ..options });
    assert_eq!(drafted, together);
    assert!(counters.drafted_tokens > 0);

    let least = all.iter().map(Request::blocks).max().unwrap();
    let (tight, counters) = generate_counting(
        &cuda,
        &model,
        &all,
        EngineOptions { cache_tokens: 16 * least, ..options },
    );
    assert_eq!(tight, together);
    assert!(counters.preemptions > 0);

    let again = all.iter().map(|r| Request { id: r.id + 10, ..r.clone() });
    let twice: Vec<Request> = all.iter().cloned().chain(again).collect();
    let (cached, counters) =
        generate_counting(&cuda, &model, &twice, EngineOptions { sequences: 1, ..options });
    assert!(counters.prefix_hits > 0);
    for ((id, candidate), tokens) in &together {
        assert_eq!(&cached[&(*id, *candidate)], tokens);
        assert_eq!(&cached[&(id + 10, *candidate)], tokens, "from the prefix cache");
    }
}

/// With the same weights in f16, the CPU and the kernels choose the same tokens under the same
/// seeds.
#[test]
fn the_cpu_chooses_the_same_tokens() {
    let (checkpoint, ids, _) = open("f16_pytorch_sharded");
    let all = requests(&ids);
    let cuda = Cuda::new(gpu(false, false), DType::F16, true);
    let ours = generate(&cuda, &Bloom::load(&cuda, checkpoint.clone(), None).unwrap(), &all, 64);
    let cpu = Cpu::new(1, Isa::detect());
    let theirs = generate(&cpu, &Bloom::load(&cpu, checkpoint.clone(), None).unwrap(), &all, 64);
    for (key, tokens) in &ours {
        let ids = |t: &[(u32, u32)]| t.iter().map(|t| t.0).collect::<Vec<_>>();
        assert_eq!(ids(tokens), ids(&theirs[key]), "request {key:?}");
        for (a, b) in tokens.iter().zip(&theirs[key]) {
            let (a, b) = (f32::from_bits(a.1), f32::from_bits(b.1));
            assert!((a - b).abs() < 2e-2 + 2e-3 * b.abs(), "log-probability {a} for {b}");
        }
    }
}

/// Five launches a layer and four around the layers; two copies to the device: the batch, and the
/// choice with its position.
#[test]
fn a_decoding_step_is_five_launches_a_layer() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let launcher: std::rc::Rc<Emulated> = gpu(false, false);
    let cuda = Cuda::new(launcher.clone(), DType::Bf16, true);
    let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
    let mut engine =
        Engine::new(&cuda, &model, EngineOptions { cache_tokens: 64, ..EngineOptions::default() })
            .unwrap();
    engine
        .submit(Request { ignore_eos: true, ..Request::new(1, ids[..2].to_vec(), 9, 2) })
        .unwrap();
    let mut step = || {
        let before: usize = launcher.launched.borrow().values().sum();
        let written = launcher.writes.get();
        engine.step(&mut |_| Verdict::Go).unwrap();
        (
            launcher.launched.borrow().values().sum::<usize>() - before,
            launcher.writes.get() - written,
        )
    };
    let steps: Vec<(usize, usize)> = (0..6).map(|_| step()).collect();
    assert_eq!(steps[3..], [(1 + 5 * model.config.layers + 3, 2); 3], "{steps:?}");
}

/// Larger steps launch norms by themselves. What comes out is the CPU's.
#[test]
fn larger_steps_on_hopper_are_seven_launches_a_layer() {
    let config = BloomConfig::new(300, 256, 2, 4);
    let checkpoint = random_checkpoint(config.clone(), DType::Bf16).unwrap();
    let launcher = gpu(false, true);
    launcher.processors.set(64);
    let cuda = Cuda::new(launcher.clone(), DType::Bf16, false);
    let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
    let mut engine = Engine::new(
        &cuda,
        &model,
        EngineOptions { cache_tokens: 1024, ..EngineOptions::default() },
    )
    .unwrap();
    for id in 0..20 {
        engine
            .submit(Request { ignore_eos: true, ..Request::new(id, vec![id as u32 + 1, 7], 9, 2) })
            .unwrap();
    }
    let mut step = || {
        let before = launcher.launched.borrow().clone();
        engine.step(&mut |_| Verdict::Go).unwrap();
        let launched = launcher.launched.borrow();
        launched.iter().map(|(k, n)| n - before.get(k).copied().unwrap_or(0)).sum::<usize>()
    };
    let steps: Vec<usize> = (0..6).map(|_| step()).collect();
    assert_eq!(steps[3..], [1 + 7 * config.layers + 3; 3], "{steps:?}");

    let cpu = Cpu::new(0, Isa::detect());
    let theirs = Bloom::load(&cpu, checkpoint, Some(DType::F32)).unwrap();
    for tokens in [40, 150] {
        let ids: Vec<u32> = (0..tokens).map(|i| i * 7 % 300).collect();
        let theirs = logits(&cpu, &theirs, &ids, usize::MAX);
        let e = error(&logits(&cuda, &model, &ids, usize::MAX), &theirs);
        assert!(e < 3e-2, "{tokens} tokens: {e:e}");
        assert!(launcher.clusters.borrow().contains(&4));
    }
}

/// Steps of one shape are recorded the second time and repeated from then on; tokens and
/// log-probabilities stay what they were without recordings, also when sequences come and go,
/// drafts change the shape, and another engine takes the memory.
#[test]
fn recorded_steps_change_nothing() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let all: Vec<Request> = requests(&ids)
        .into_iter()
        .map(|r| Request { max_new: 12 + r.id as usize % 2 * 20, ..r })
        .collect();
    let run = |records: bool| {
        let launcher = gpu(false, false);
        let mut cuda = Cuda::new(launcher.clone(), DType::Bf16, true);
        cuda.captures_graphs = records;
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        let options =
            EngineOptions { batch_tokens: 64, cache_tokens: 1024, ..EngineOptions::default() };
        let plain = generate_counting(&cuda, &model, &all, options).0;
        let launched = launcher.launched.borrow().clone();
        // whether drafts pay is a matter of time
        let drafted =
            generate_counting(&cuda, &model, &all, EngineOptions { draft_tokens: 3, ..options }).0;
        assert_eq!(plain, drafted);
        (plain, launcher.recorded.get(), launcher.replayed.get(), launched)
    };
    let (with, recorded, replayed, launched) = run(true);
    let (without, none, _, launched_one_by_one) = run(false);
    assert_eq!(with, without);
    assert_eq!(none, 0);
    assert!(recorded > 0 && replayed > 2 * recorded, "{recorded} recordings, {replayed} repeated");
    assert_eq!(launched, launched_one_by_one);
}

/// Buffers that had to grow are elsewhere: a recording from before must not be repeated.
#[test]
fn recordings_end_when_memory_moves() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let long: Vec<u32> = ids.iter().cycle().take(70).copied().collect();
    let run = |records: bool| {
        let launcher = gpu(false, false);
        let mut cuda = Cuda::new(launcher.clone(), DType::Bf16, false);
        cuda.captures_graphs = records;
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        let (mut cache, mut scratch) =
            (model.cache(&cuda, 9).unwrap(), DecoderActivations::default());
        let mut logits = Vec::new();
        let mut pass = |ids: &[u32], past: usize, blocks: &[u32]| {
            let mut batch = Batch::default();
            batch.push(ids, past, blocks);
            model.forward(&cuda, &batch, &mut cache, &mut scratch);
            let mut out = Vec::new();
            model.logits(&cuda, &[ids.len() - 1], &mut scratch, &mut out).unwrap();
            logits.push(out);
        };
        // a table so wide that the batch's own arrays have room for all that follows
        pass(&ids[..1], 0, &[0; 600]);
        for past in 0..4 {
            pass(&ids[past..=past], past, &[0]);
        }
        pass(&long, 0, &[1, 2, 3, 4, 5]);
        for past in 4..8 {
            pass(&ids[past..=past], past, &[0]);
        }
        (logits, launcher.replayed.get())
    };
    let (with, replayed) = run(true);
    assert!(replayed >= 5, "repeated {replayed} times");
    assert!(with == run(false).0);
}

/// Work that only launches is timed as a recording; work that asks for copies too, such as choosing
/// tokens, as it is.
#[test]
fn all_work_can_be_timed() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let launcher = gpu(false, false);
    let cuda = Cuda::new(launcher.clone(), DType::Bf16, false);
    let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
    let (mut cache, mut scratch, mut logits) =
        (model.cache(&cuda, 1).unwrap(), DecoderActivations::default(), Vec::new());
    let mut batch = Batch::default();
    batch.push(&ids[..2], 0, &[0]);
    model.forward(&cuda, &batch, &mut cache, &mut scratch);
    let sampling = Sampling::default();
    let rows = [SamplingRow::new(1, &sampling, 0, 2)];
    let mut choose = |_| model.sample(&cuda, &rows, &mut scratch, &mut logits).map(drop);
    assert!(cuda.seconds(2, &mut choose).unwrap() > 0.0);
    assert_eq!(launcher.replayed.get(), 0, "a copy is no launch");
    let x = cuda.upload(&[1.0; 64], 16, DType::Bf16).unwrap();
    let y = cuda.upload(&[2.0; 64], 16, DType::Bf16).unwrap();
    assert!(cuda.seconds(2, &mut |_| cuda.download(&x).map(drop)).is_ok());
    assert_eq!(cuda.download(&y).unwrap(), [2.0; 64]);
}

/// What a sink answers to the `n`-th token of a request.
fn verdict(request: u64, n: usize, token: u32) -> Verdict {
    match (request, n) {
        (0, 4) => Verdict::Rewind { keep: 3, ban: token },
        (1, 3) => Verdict::Force { keep: 2, tokens: vec![7, 8] },
        (2, 5) => Verdict::End,
        (3, 2) => Verdict::Rewind { keep: 0, ban: token },
        _ => Verdict::Go,
    }
}

/// While a step is computed the host takes the tokens of the one before; rewinds, forced tokens and
/// ends come a step late, and change what the CPU, which waits for every token, makes of the same
/// requests in nothing. So do choices that turn out to need the host.
#[test]
fn steps_begin_before_the_tokens_are_known() {
    let config = BloomConfig::new(2000, 64, 2, 2);
    let checkpoint = random_checkpoint(config, DType::F16).unwrap();
    let plain = Sampling { temperature: 1.0, repetition_penalty: 1.5, ..Sampling::default() };
    let samplings = [
        plain,
        Sampling { repetition_penalty: 1.0, ..plain },
        Sampling { top_k: 50, top_p: 0.95, ..plain },
        Sampling::default(),
        // more tokens than the kernel's list holds
        Sampling { top_p: 0.99, temperature: 4.0, ..plain },
    ];
    let requests: Vec<Request> = (0..samplings.len())
        .map(|i| Request {
            sampling: Sampling { seed: 5 + i as u64, ..samplings[i] },
            ignore_eos: true,
            ..Request::new(i as u64, vec![4, 5, 6 + i as u32], 9 + i, 2)
        })
        .collect();
    fn run<B: DecodeBackend>(
        backend: &B,
        model: &Bloom<B>,
        requests: &[Request],
        mut told: impl FnMut(),
    ) -> Tokens {
        let mut engine = Engine::new(
            backend,
            model,
            EngineOptions { cache_tokens: 512, ..EngineOptions::default() },
        )
        .unwrap();
        requests.iter().for_each(|r| engine.submit(r.clone()).unwrap());
        let (mut out, mut heard) = (Tokens::default(), BTreeMap::new());
        while !engine.is_idle() {
            let mut sink = |event| {
                let Event::Token { request, candidate, token, logprob, .. } = event else {
                    return Verdict::Go;
                };
                told();
                let n: &mut usize = heard.entry(request).or_default();
                *n += 1;
                out.entry((request, candidate)).or_default().push((token, logprob.to_bits()));
                verdict(request, *n, token)
            };
            engine.step(&mut sink).unwrap();
        }
        assert_eq!(engine.blocks_in_use(), 0, "blocks leaked");
        out
    }
    let cpu = Cpu::new(1, Isa::detect());
    let cpu_model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    for part in [&requests[..4], &requests[..]] {
        let launcher = gpu(false, false);
        let cuda = Cuda::new(launcher.clone(), DType::F16, true);
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        let passes = || launcher.launched.borrow().get("embed_norm_f16").copied().unwrap_or(0);
        let mut ahead = Vec::new();
        let ours = run(&cuda, &model, part, || ahead.push(passes()));
        let theirs = run(&cpu, &cpu_model, part, || {});
        for (key, tokens) in &ours {
            let ids = |t: &[(u32, u32)]| t.iter().map(|t| t.0).collect::<Vec<_>>();
            assert_eq!(ids(tokens), ids(&theirs[key]), "request {key:?}");
        }
        if part.len() < requests.len() {
            // the first tokens are told when the second pass has begun
            assert_eq!(ahead[..4], [2; 4], "passes launched when each token was told: {ahead:?}");
        }
    }
}

/// Where launches cannot be captured with kernels that overlap, they are without; where they cannot
/// be captured at all, steps are launched kernel by kernel. Nothing is tried more often than once.
#[test]
fn captures_that_fail_are_tried_in_order() {
    let (checkpoint, ids, _) = open("bf16_sharded");
    let run = |captures| {
        let launcher = gpu(false, false);
        launcher.captures.set(captures);
        let cuda = Cuda::new(launcher.clone(), DType::Bf16, false);
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        let e = logits(&cuda, &model, &ids, 2);
        let ids: Vec<u32> = ids.iter().copied().rev().collect();
        let more = logits(&cuda, &model, &ids, 3);
        (launcher.recorded.get(), launcher.refused.get(), launcher.replayed.get() > 0, [e, more])
    };
    let (recorded, refused, replayed, expected) = run(Captures::All);
    assert!(recorded > 1 && refused == 0 && replayed);
    let (in_order, refused, replayed, found) = run(Captures::InOrder);
    assert_eq!((in_order, refused, replayed), (recorded, 1, true));
    assert!(found == expected);
    let (none, refused, replayed, found) = run(Captures::None);
    assert_eq!((none, refused, replayed), (0, 2, false));
    assert!(found == expected);
}

/// A channel with much larger numbers than all others hides no error of the one kernel: an error of
/// 40 is less than a tenth of the largest magnitude, but all the difference after the final norm.
#[test]
fn an_error_beside_an_outlier_is_found_when_both_ways_are_compared() {
    let mut checkpoint = random_checkpoint(BloomConfig::new(300, 64, 2, 2), DType::F32).unwrap();
    let mut set = |name: &str, values: &[f32]| {
        let tensors = &mut checkpoint.weights.tensors;
        let tensor = tensors.get_mut(name).unwrap();
        *tensor = HostTensor { shape: tensor.shape.clone(), ..HostTensor::of_rows(values, 64) };
    };
    let mut bias = [0.0; 64];
    bias[5] = 500.0;
    set("transformer.h.1.mlp.dense_4h_to_h.bias", &bias);
    set("transformer.ln_f.weight", &[1.0; 64]);
    set("transformer.ln_f.bias", &[0.0; 64]);
    let run = |error: f32, persistent| {
        let launcher = gpu(false, true);
        *launcher.spoil.borrow_mut() = Some(Box::new(move |l| {
            if l.kernel.starts_with("decode_step") {
                l.add(l.address(1, 0) + 4 * 9, error);
            }
        }));
        let mut cuda = Cuda::new(launcher.clone(), DType::F16, false);
        cuda.persistent = persistent;
        let model = Bloom::load(&cuda, checkpoint.clone(), None).unwrap();
        let out = logits(&cuda, &model, &[1, 7, 3, 250, 9], 1);
        (out, cuda.comparisons())
    };
    let (_, right) = run(0.0, Persistent::Auto);
    assert!(right.len() == 1 && right[0].one_kernel_microseconds.is_some(), "{right:?}");
    let (expected, _) = run(0.0, Persistent::Never);
    let (found, wrong) = run(40.0, Persistent::Auto);
    assert!(wrong.len() == 1 && wrong[0].one_kernel_microseconds.is_none(), "{wrong:?}");
    assert!(found == expected, "steps are launched kernel by kernel");
}

/// A step is done in launches and in one kernel the second time that its shape comes; from then on
/// the faster way is taken.
#[test]
fn both_ways_of_a_step_are_compared() {
    let (checkpoint, ids, theirs) = open("bf16_sharded");
    let launcher = gpu(false, true);
    let mut cuda = Cuda::new(launcher.clone(), DType::F16, false);
    cuda.persistent = Persistent::Auto;
    let model = Bloom::load(&cuda, checkpoint, None).unwrap();
    let e = error(&logits(&cuda, &model, &ids, 1), &theirs);
    assert!(e < 1e-2, "{e:e}");
    let comparisons = cuda.comparisons();
    assert_eq!(comparisons.len(), 1, "{comparisons:?}");
    assert_eq!(comparisons[0].tokens, 1);
    assert!(comparisons[0].one_kernel_microseconds.is_some(), "both ways have the same results");
    let kernels: usize = launcher
        .launched
        .borrow()
        .iter()
        .filter(|k| k.0.starts_with("decode_step"))
        .map(|k| k.1)
        .sum();
    let tried = 3;
    if comparisons[0].one_kernel() {
        assert!(kernels > tried + ids.len() / 2, "{kernels} of {} steps", ids.len());
    } else {
        assert_eq!(kernels, tried);
    }
}
