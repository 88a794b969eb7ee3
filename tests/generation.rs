//! The engine: transformers' tokens, and the same tokens whatever the company.

use beautiful_prompt::engine::{
    Counters, Engine, EngineOptions, Event, FinishReason, Request, Sampling, Verdict,
};
use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::models::bloom::BloomCheckpoint;
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

fn open(name: &str) -> (BloomCheckpoint, Expected) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom").join(name);
    let expected =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    (BloomCheckpoint::open(&folder).unwrap(), expected)
}

fn request(id: u64, prompt: &[u32], sampling: Sampling, max_new: usize) -> Request {
    Request { sampling, ignore_eos: true, ..Request::new(id, prompt.to_vec(), max_new, 2) }
}

/// Tokens by request and candidate, and prompt log-probabilities by request.
type Outputs = (BTreeMap<(u64, u32), Vec<u32>>, BTreeMap<u64, Vec<f32>>);

fn run(cpu: &Cpu, model: &Bloom<Cpu>, requests: &[Request], options: EngineOptions) -> Outputs {
    run_counting(cpu, model, requests, options).0
}

fn run_counting(
    cpu: &Cpu,
    model: &Bloom<Cpu>,
    requests: &[Request],
    options: EngineOptions,
) -> (Outputs, Counters) {
    let mut engine = Engine::new(cpu, model, options).unwrap();
    for r in requests {
        engine.submit(r.clone()).unwrap();
    }
    let mut out = Outputs::default();
    while !engine.is_idle() {
        engine
            .step(&mut |event| {
                match event {
                    Event::Prompt { request, scores } => {
                        out.1.entry(request).or_default().extend(scores.iter().map(|s| s.0))
                    }
                    Event::Token { request, candidate, token, .. } => {
                        out.0.entry((request, candidate)).or_default().push(token)
                    }
                    Event::Started { .. } => {}
                    Event::Ended { .. } => panic!("nothing ends without a token here"),
                }
                Verdict::Go
            })
            .unwrap();
    }
    assert_eq!(engine.blocks_in_use(), 0, "blocks leaked");
    (out, engine.counters())
}

#[test]
fn greedy_continuations_are_transformers_own() {
    for name in ["f32_six_heads", "bf16_sharded", "f16_pytorch_sharded", "bf16_pytorch"] {
        let (checkpoint, expected) = open(name);
        for isa in Isa::available() {
            let cpu = Cpu::new(2, isa);
            let model = Bloom::load(&cpu, checkpoint.clone(), Some(DType::F32)).unwrap();
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
                assert!(
                    (ours - theirs).abs() < 1e-3 + 1e-4 * theirs.abs(),
                    "{name}: {ours} for {theirs}"
                );
            }
        }
    }
}

#[test]
fn penalties_can_leave_the_prompt_out() {
    let (checkpoint, expected) = open("f32_six_heads");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let all = Sampling { repetition_penalty: 5.0, ..Sampling::default() };
    let output = Sampling { penalize_prompt: false, ..all };
    let requests =
        [request(0, &expected.prompt_ids, all, 40), request(1, &expected.prompt_ids, output, 40)];
    let (tokens, _) = run(&cpu, &model, &requests, EngineOptions::default());
    let from_prompt = |t: &Vec<u32>| t.iter().filter(|t| expected.prompt_ids.contains(t)).count();
    assert!(from_prompt(&tokens[&(0, 0)]) < from_prompt(&tokens[&(1, 0)]));
}

#[test]
fn a_refused_token_ends_its_candidate_and_length_is_reported() {
    let (checkpoint, expected) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let mut engine = Engine::new(&cpu, &model, EngineOptions::default()).unwrap();
    engine.submit(request(0, &expected.prompt_ids, Sampling::default(), 5)).unwrap();
    engine.submit(request(1, &expected.prompt_ids, Sampling::default(), 50)).unwrap();
    let mut finishes = Vec::new();
    let mut count = 0;
    while !engine.is_idle() {
        engine
            .step(&mut |event| {
                let Event::Token { request, finish, .. } = event else { return Verdict::Go };
                finishes.extend(finish);
                count += u32::from(request == 1);
                if request == 0 || count < 3 { Verdict::Go } else { Verdict::End }
            })
            .unwrap();
    }
    assert_eq!((finishes, count), (vec![FinishReason::Length], 3));
    assert_eq!(engine.blocks_in_use(), 0);
}

#[test]
fn impossible_requests_are_refused_with_a_reason() {
    let (checkpoint, _) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let options = EngineOptions { cache_tokens: 64, ..EngineOptions::default() };
    let mut engine = Engine::new(&cpu, &model, options).unwrap();
    let mut refuse = |prompt: &[u32], max_new: usize, word: &str| {
        let e = engine
            .submit(request(0, prompt, Sampling::default(), max_new))
            .unwrap_err()
            .to_string();
        assert!(e.contains(word), "{e}");
    };
    refuse(&[], 1, "no tokens");
    refuse(&[149, 150], 1, "150");
    refuse(&[7; 3000], 1, "context");
    refuse(&[7; 60], 10, "KV cache");
}

/// A model, and requests that together need more blocks than there are.
fn crowd(candidates: u32) -> (BloomCheckpoint, Vec<Request>) {
    let (checkpoint, _) = open("bf16_sharded");
    let warm = Sampling { temperature: 1.0, seed: 5, ..Sampling::default() };
    let requests = (0..4).map(|i| Request {
        candidates,
        ..request(
            i,
            &(0..20).map(|t| 4 + (t * 7 + i as u32 * 3) % 140).collect::<Vec<_>>(),
            warm,
            40,
        )
    });
    (checkpoint, requests.collect())
}

#[test]
fn the_newest_sequence_gives_up_its_blocks_and_loses_nothing() {
    for candidates in [1, 3] {
        let (checkpoint, requests) = crowd(candidates);
        let cpu = Cpu::new(1, Isa::detect());
        let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
        let (expected, calm) = run_counting(&cpu, &model, &requests, EngineOptions::default());
        assert_eq!(calm.preemptions, 0);
        let (tokens, tight) = run_counting(
            &cpu,
            &model,
            &requests,
            EngineOptions { cache_tokens: 96, ..Default::default() },
        );
        assert!(tight.preemptions > 0);
        assert_eq!(tokens, expected);
    }
}

#[test]
fn prompts_start_behind_what_was_computed_before() {
    let (checkpoint, _) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let shared: Vec<u32> = (0..50).map(|t| 4 + t * 3 % 140).collect();
    let requests: Vec<Request> = (0..3)
        .map(|i| request(i, &[&shared[..], &[9 + i as u32]].concat(), Sampling::default(), 4))
        .collect();
    let one_by_one = EngineOptions { sequences: 1, ..EngineOptions::default() };
    let (with, counters) = run_counting(&cpu, &model, &requests, one_by_one);
    // three full blocks of the fifty shared tokens, for the second and the third
    assert_eq!((counters.prefix_queries, counters.prefix_hits), (3 * 51, 2 * 48));
    let (without, cold) =
        run_counting(&cpu, &model, &requests, EngineOptions { prefix_cache: false, ..one_by_one });
    assert_eq!(with, without);
    assert_eq!(cold.computed_tokens - counters.computed_tokens, 2 * 48);
    // a whole prompt that is there still computes its last token
    let aligned = request(7, &shared[..48], Sampling::default(), 4);
    let (_, counters) =
        run_counting(&cpu, &model, &[aligned.clone(), Request { id: 8, ..aligned }], one_by_one);
    assert_eq!(counters.prefix_hits, 32);
}

#[test]
fn drafts_save_steps_and_change_no_token() {
    let (checkpoint, expected) = open("f32_six_heads");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    // greedy decoding of a random model runs in circles
    let requests = [request(0, &expected.prompt_ids, Sampling::default(), 200)];
    let (plain, slow) = run_counting(&cpu, &model, &requests, EngineOptions::default());
    let (drafted, fast) = run_counting(
        &cpu,
        &model,
        &requests,
        EngineOptions { draft_tokens: 6, ..EngineOptions::default() },
    );
    assert_eq!(plain, drafted);
    assert_eq!(slow.drafted_tokens, 0);
    // most of them on a quiet machine; where time is short drafts are made less often
    assert!(fast.steps < slow.steps, "{fast:?}");
    assert!(
        fast.accepted_tokens <= fast.drafted_tokens
            && fast.steps + fast.accepted_tokens == slow.steps
    );
}

#[test]
fn cancelled_requests_free_their_blocks_at_once() {
    let (checkpoint, requests) = crowd(2);
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let options = EngineOptions { cache_tokens: 96, ..EngineOptions::default() };
    let (alone, _) = run(&cpu, &model, &requests[3..], options);
    let mut engine = Engine::new(&cpu, &model, options).unwrap();
    requests.iter().for_each(|r| engine.submit(r.clone()).unwrap());
    let mut tokens: BTreeMap<(u64, u32), Vec<u32>> = BTreeMap::new();
    let mut collect = |event: Event| {
        if let Event::Token { request, candidate, token, .. } = event {
            tokens.entry((request, candidate)).or_default().push(token);
        }
        Verdict::Go
    };
    (0..30).for_each(|_| engine.step(&mut collect).unwrap());
    assert!(engine.blocks_in_use() > 0 && engine.waiting() > 0);
    engine.cancel(&[0, 1, 2]);
    engine.cancel(&[17]);
    while !engine.is_idle() {
        engine.step(&mut collect).unwrap();
    }
    assert_eq!(engine.blocks_in_use(), 0);
    for (key, expected) in alone {
        assert_eq!(tokens[&key], expected, "the one that was left");
    }
}

#[test]
fn requests_end_at_their_deadline() {
    let (checkpoint, requests) = crowd(2);
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let mut engine = Engine::new(&cpu, &model, EngineOptions::default()).unwrap();
    let now = Some(std::time::Instant::now());
    engine.submit(Request { deadline: now, ..requests[0].clone() }).unwrap();
    engine.submit(requests[1].clone()).unwrap();
    let mut ended = Vec::new();
    let mut finished = 0;
    while !engine.is_idle() {
        engine
            .step(&mut |event| {
                match event {
                    Event::Ended { request, candidate, finish } => {
                        ended.push((request, candidate, finish))
                    }
                    Event::Token { request, finish, .. } => {
                        assert_eq!(request, 1);
                        finished += u32::from(finish.is_some());
                    }
                    _ => {}
                }
                Verdict::Go
            })
            .unwrap();
    }
    assert_eq!(ended, [(0, 0, FinishReason::Deadline), (0, 1, FinishReason::Deadline)]);
    assert_eq!((finished, engine.blocks_in_use()), (2, 0));
}

#[test]
fn biases_and_penalties_of_openai() {
    let (checkpoint, expected) = open("bf16_sharded");
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, checkpoint.clone(), None).unwrap();
    let plain = request(0, &expected.prompt_ids, Sampling::default(), 60);
    let never = Request { bias: vec![(expected.greedy[0], -100.0)], id: 1, ..plain.clone() };
    let always = Request { bias: vec![(77, 100.0)], id: 2, ..plain.clone() };
    let once = Sampling { presence_penalty: 100.0, ..Sampling::default() };
    let once = Request { sampling: once, id: 3, ..plain.clone() };
    let all = [plain, never, always, once];
    for draft_tokens in [0, 4] {
        let out =
            run(&cpu, &model, &all, EngineOptions { draft_tokens, ..EngineOptions::default() }).0;
        assert!(out[&(0, 0)].starts_with(&expected.greedy));
        assert!(!out[&(1, 0)].contains(&expected.greedy[0]));
        assert!(out[&(2, 0)].iter().all(|t| *t == 77));
        let mut unique = out[&(3, 0)].clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), 60, "no token comes twice");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A request's tokens depend on nothing but itself: not on its neighbours, their order, the
    /// budget, the number of sequences, or threads.
    #[test]
    fn tokens_do_not_depend_on_the_company(
        lengths in prop::collection::vec(1usize..40, 2..6),
        budget in 1usize..64,
        sequences in 1usize..9,
        threads in 1usize..4,
        seed in any::<u64>(),
        int8 in any::<bool>(),
        prefix_cache in any::<bool>(),
        draft_tokens in 0usize..6,
    ) {
        let (checkpoint, _) = open("bf16_sharded");
        let dtype = int8.then_some(DType::Int8);
        let alone = Cpu::new(1, Isa::detect());
        let model = Bloom::load(&alone, checkpoint.clone(), dtype).unwrap();
        let requests: Vec<Request> = lengths.iter().enumerate().map(|(i, &n)| {
            let prompt: Vec<u32> =
                (0..n as u32).map(|t| 4 + (t * 31 + i as u32 * 17) % 140).collect();
            let sampling = Sampling {
                // nearly greedy ones repeat themselves, which drafts guess
                temperature: [1.0, 0.1, 0.0][i % 3],
                top_k: [0, 20][i % 2],
                top_p: [1.0, 0.9][i / 2 % 2],
                repetition_penalty: [1.0, 1.1][i / 2 % 2],
                presence_penalty: [0.0, 0.0, 0.4][i % 3],
                seed,
                ..Sampling::default()
            };
            Request { candidates: 1 + i as u32 % 3, ..request(i as u64, &prompt, sampling, 20) }
        }).collect();
        let mut expected = BTreeMap::new();
        for r in &requests {
            let one = std::slice::from_ref(r);
            expected.extend(run(&alone, &model, one, EngineOptions::default()).0);
        }
        let cpu = Cpu::new(threads, Isa::detect());
        let options = EngineOptions {
            cache_tokens: 256,
            batch_tokens: budget,
            sequences,
            prefix_cache,
            draft_tokens,
        };
        let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
        prop_assert_eq!(&run(&cpu, &model, &requests, options).0, &expected);
        prop_assert_eq!(&run(&cpu, &model, &reversed, options).0, &expected);
        // so little memory that sequences have to give up theirs
        let least = requests.iter().map(Request::blocks).max().unwrap();
        let tight = EngineOptions { cache_tokens: least * 16, ..options };
        prop_assert_eq!(&run(&cpu, &model, &requests, tight).0, &expected);
        // every prompt a second time, when the first has been computed
        let mut again = requests.clone();
        again.iter_mut().for_each(|r| r.id += 100);
        let twice: Vec<Request> = requests.iter().chain(&again).cloned().collect();
        let roomy = EngineOptions { sequences: 1, cache_tokens: 4096, ..options };
        let out = run(&cpu, &model, &twice, roomy).0;
        for (key, tokens) in &expected {
            prop_assert_eq!(&out[key], tokens);
            prop_assert_eq!(&out[&(key.0 + 100, key.1)], tokens, "from the prefix cache");
        }
    }
}
