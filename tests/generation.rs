//! The engine: transformers' tokens, and the same tokens whatever the company.

use beautiful_prompt::checkpoint::Checkpoint;
use beautiful_prompt::engine::{Engine, EngineOptions, Event, Finish, Request, Sampling};
use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::tensor::DType;
use proptest::prelude::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Expected {
    prompt_ids: Vec<u32>,
    prompt_logprobs: Vec<f32>,
    greedy: Vec<u32>,
    #[serde(rename = "greedy_penalty_1.2")]
    greedy_penalty: Vec<u32>,
}

fn open(name: &str) -> (Checkpoint, Expected) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom").join(name);
    let expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    (Checkpoint::open(&folder).unwrap(), expected)
}

fn request(id: u64, prompt: &[u32], sampling: Sampling, max_new: usize) -> Request {
    Request {
        id,
        prompt: prompt.to_vec(),
        candidates: 1,
        sampling,
        max_new,
        eos: 2,
        ignore_eos: true,
        prompt_logprobs: false,
    }
}

/// Tokens by request and candidate, and prompt log-probabilities by request.
type Outputs = (BTreeMap<(u64, u32), Vec<u32>>, BTreeMap<u64, Vec<f32>>);

fn run(cpu: &Cpu, model: &Bloom<Cpu>, requests: &[Request], options: EngineOptions) -> Outputs {
    let mut engine = Engine::new(cpu, model, options).unwrap();
    for r in requests {
        engine.submit(r.clone()).unwrap();
    }
    let mut out = Outputs::default();
    while !engine.is_idle() {
        engine
            .step(&mut |event| {
                match event {
                    Event::Prompt { request, logprobs } => out.1.entry(request).or_default().extend(logprobs),
                    Event::Token { request, candidate, token, .. } => {
                        out.0.entry((request, candidate)).or_default().push(token)
                    }
                }
                true
            })
            .unwrap();
    }
    assert_eq!(engine.blocks_in_use(), 0, "blocks leaked");
    out
}

#[test]
fn greedy_continuations_are_transformers_own() {
    for name in ["f32_six_heads", "bf16_sharded", "f16_pytorch_sharded", "bf16_pytorch"] {
        let (checkpoint, expected) = open(name);
        for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
            let cpu = Cpu::new(2, isa);
            let model = Bloom::load(&cpu, &checkpoint, Some(DType::F32)).unwrap();
            let penalty = Sampling { repetition_penalty: 1.2, ..Sampling::default() };
            let mut requests = [
                request(0, &expected.prompt_ids, Sampling::default(), 48),
                request(1, &expected.prompt_ids, penalty, 48),
            ];
            requests[0].prompt_logprobs = true;
            // a small budget cuts the prompts into several spans
            let options = EngineOptions { batch_tokens: 7, ..EngineOptions::default() };
            let (tokens, logprobs) = run(&cpu, &model, &requests, options);
            assert_eq!(tokens[&(0, 0)], expected.greedy, "{name} on {isa:?}");
            assert_eq!(tokens[&(1, 0)], expected.greedy_penalty, "{name} on {isa:?} with penalty");
            assert_eq!(logprobs[&0].len(), expected.prompt_ids.len() - 1);
            for (ours, theirs) in logprobs[&0].iter().zip(&expected.prompt_logprobs) {
                assert!((ours - theirs).abs() < 1e-3 + 1e-4 * theirs.abs(), "{name}: {ours} for {theirs}");
            }
        }
    }
}

#[test]
fn penalties_can_leave_the_prompt_out() {
    let (checkpoint, expected) = open("f32_six_heads");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, &checkpoint, None).unwrap();
    let all = Sampling { repetition_penalty: 5.0, ..Sampling::default() };
    let output = Sampling { penalize_prompt: false, ..all };
    let requests = [request(0, &expected.prompt_ids, all, 40), request(1, &expected.prompt_ids, output, 40)];
    let (tokens, _) = run(&cpu, &model, &requests, EngineOptions::default());
    let from_prompt = |t: &Vec<u32>| t.iter().filter(|t| expected.prompt_ids.contains(t)).count();
    assert!(from_prompt(&tokens[&(0, 0)]) < from_prompt(&tokens[&(1, 0)]));
}

#[test]
fn a_refused_token_ends_its_candidate_and_length_is_reported() {
    let (checkpoint, expected) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, &checkpoint, None).unwrap();
    let mut engine = Engine::new(&cpu, &model, EngineOptions::default()).unwrap();
    engine.submit(request(0, &expected.prompt_ids, Sampling::default(), 5)).unwrap();
    engine.submit(request(1, &expected.prompt_ids, Sampling::default(), 50)).unwrap();
    let mut finishes = Vec::new();
    let mut count = 0;
    while !engine.is_idle() {
        engine
            .step(&mut |event| {
                let Event::Token { request, finish, .. } = event else { return true };
                finishes.extend(finish);
                count += u32::from(request == 1);
                request == 0 || count < 3
            })
            .unwrap();
    }
    assert_eq!((finishes, count), (vec![Finish::Length], 3));
    assert_eq!(engine.blocks_in_use(), 0);
}

#[test]
fn impossible_requests_are_refused_with_a_reason() {
    let (checkpoint, _) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, &checkpoint, None).unwrap();
    let options = EngineOptions { cache_tokens: 64, ..EngineOptions::default() };
    let mut engine = Engine::new(&cpu, &model, options).unwrap();
    let mut refuse = |prompt: &[u32], max_new: usize, word: &str| {
        let e = engine.submit(request(0, prompt, Sampling::default(), max_new)).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    refuse(&[], 1, "no tokens");
    refuse(&[149, 150], 1, "150");
    refuse(&[7; 3000], 1, "context");
    refuse(&[7; 60], 10, "KV cache");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A request's tokens depend on nothing but itself: not on its neighbours, their order, the budget, the number
    /// of sequences, or threads.
    #[test]
    fn tokens_do_not_depend_on_the_company(
        lengths in prop::collection::vec(1usize..40, 2..6),
        budget in 1usize..64,
        sequences in 1usize..9,
        threads in 1usize..4,
        seed in any::<u64>(),
        int8 in any::<bool>(),
    ) {
        let (checkpoint, _) = open("bf16_sharded");
        let dtype = int8.then_some(DType::Int8);
        let alone = Cpu::new(1, Isa::detect());
        let model = Bloom::load(&alone, &checkpoint, dtype).unwrap();
        let requests: Vec<Request> = lengths.iter().enumerate().map(|(i, &n)| {
            let prompt: Vec<u32> = (0..n as u32).map(|t| 4 + (t * 31 + i as u32 * 17) % 140).collect();
            let sampling = Sampling {
                temperature: 1.0, top_k: [0, 20][i % 2], top_p: [1.0, 0.9][i / 2 % 2], seed, ..Sampling::default()
            };
            Request { candidates: 1 + i as u32 % 3, ..request(i as u64, &prompt, sampling, 12) }
        }).collect();
        let mut expected = BTreeMap::new();
        for r in &requests {
            expected.extend(run(&alone, &model, std::slice::from_ref(r), EngineOptions::default()).0);
        }
        let cpu = Cpu::new(threads, Isa::detect());
        let options = EngineOptions { cache_tokens: 256, batch_tokens: budget, sequences };
        let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
        prop_assert_eq!(&run(&cpu, &model, &requests, options).0, &expected);
        prop_assert_eq!(&run(&cpu, &model, &reversed, options).0, &expected);
        // candidates of one request differ from each other
        if let (Some(a), Some(b)) = (expected.get(&(2, 0)), expected.get(&(2, 1))) {
            prop_assert_ne!(a, b);
        }
    }
}
