//! Whole requests with every option at once: bans, texts to keep, stops, candidates, drafts, prefix
//! cache, deadlines, preemption, cancellation and log-probabilities, on the embedded model.

use beautiful_prompt::engine::{EngineOptions, FinishReason, Sampling};
use beautiful_prompt::generate::{Completed, Generate, GenerateOptions, Length, Session, Update};
use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::models::embedded;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::random::PhiloxStream;
use beautiful_prompt::text::Tokenizer;
use beautiful_prompt::text::literals::Literals;
use beautiful_prompt::text::phrases::Phrases;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROMPTS: [&str; 6] = [
    "a cat in the rain",
    "a wizard portrait",
    "東京 tower",
    "two red cats under a bridge",
    "x",
    "a photo of a street 🌧️",
];
const BANS: [&str; 8] = [
    "by",
    "art",
    "highly detailed",
    "digital painting",
    "intricate, elegant",
    "sharp focus",
    "8k",
    "illustration",
];
const KEEPS: [&str; 5] = ["red umbrella", "100 mph", "f/1.8", "<lora:x:1>", "🐱"];
const STOPS: [&str; 5] = [", by", "focus", "ist", ", ", "th"];

/// What clients saw of one candidate on the way.
#[derive(Default)]
struct Streamed {
    text: String,
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
}

struct Asked {
    prompt: Vec<u32>,
    options: GenerateOptions,
    /// Steps after which the client goes away.
    cancelled: Option<usize>,
}

fn pick(random: &mut PhiloxStream, list: &[&str], most: usize) -> Vec<String> {
    (0..random.below(most + 1)).map(|_| list[random.below(list.len())].to_owned()).collect()
}

/// A request with anything that the API allows.
fn asked(random: &mut PhiloxStream, tokenizer: &Tokenizer) -> Asked {
    let one_in = |random: &mut PhiloxStream, n: usize| random.below(n) == 0;
    let prompt = format!("{}\n", PROMPTS[random.below(PROMPTS.len())].repeat(1 + random.below(3)));
    let sampling = Sampling {
        temperature: [0.0, 1.0, 1.0, 1.5, 1e-38][random.below(5)],
        top_k: [0, 50, 5][random.below(3)],
        top_p: [1.0, 0.9][random.below(2)],
        min_p: [0.0, 0.05][random.below(2)],
        repetition_penalty: [1.0, 1.2][random.below(2)],
        presence_penalty: if one_in(random, 6) { 0.5 } else { 0.0 },
        frequency_penalty: if one_in(random, 6) { 0.3 } else { 0.0 },
        seed: random.below(1 << 30) as u64,
        ..Sampling::default()
    };
    let options = GenerateOptions {
        candidates: [1, 1, 2, 3, 8][random.below(5)],
        sampling,
        bias: if one_in(random, 5) { vec![(15, -100.0), (50, 3.0)] } else { vec![] },
        length: Length::New(1 + random.below(32)),
        min_new: if one_in(random, 3) { random.below(12) } else { 0 },
        ignore_eos: one_in(random, 3),
        stops: pick(random, &STOPS, 2),
        stop_token_ids: if one_in(random, 6) {
            tokenizer.encode_literal(",").unwrap()
        } else {
            vec![]
        },
        include_stop: one_in(random, 3),
        ban: Arc::new(Phrases::new(pick(random, &BANS, 4))),
        keep: Arc::new(Literals::new(pick(random, &KEEPS, 2))),
        prompt_logprobs: one_in(random, 3),
        top_logprobs: if one_in(random, 4) { 3 } else { 0 },
        deadline: one_in(random, 8)
            .then(|| Instant::now() + Duration::from_millis(random.below(60) as u64)),
        owner: one_in(random, 3).then(|| 1 << 40 | random.below(3) as u64),
    };
    let cancelled = one_in(random, 8).then(|| random.below(30));
    Asked { prompt: tokenizer.encode_literal(&prompt).unwrap(), options, cancelled }
}

/// Works on all requests at once, each handed in some steps after the one before, and checks the
/// engine after each step.
fn serve(
    session: &mut Session<Cpu>,
    asked: &[Asked],
    apart: usize,
) -> HashMap<u64, (Completed, Vec<Streamed>)> {
    let mut streamed: HashMap<u64, Vec<Streamed>> = HashMap::new();
    let mut done = HashMap::new();
    let mut started: BTreeMap<u64, usize> = BTreeMap::new();
    let mut next = 0;
    for step in 0.. {
        while next < asked.len() && next * apart <= step {
            let a = &asked[next];
            match session.submit(next as u64, a.prompt.clone(), &a.options) {
                Ok(()) => {
                    let candidates = a.options.candidates as usize;
                    streamed.insert(
                        next as u64,
                        (0..candidates).map(|_| Streamed::default()).collect(),
                    );
                    started.insert(next as u64, step);
                }
                // what cannot be satisfied is refused with a reason
                Err(e) => assert!(e.to_string().len() > 10),
            }
            next += 1;
        }
        for (id, from) in &started {
            if asked[*id as usize].cancelled.is_some_and(|after| from + after == step) {
                session.cancel(&[*id]);
                streamed.remove(id);
            }
        }
        if next == asked.len() && session.is_idle() {
            break;
        }
        let outcomes = session.step(&mut |update| {
            if let Update::Text { id, candidate, text, tokens, finish } = update
                && let Some(s) = streamed.get_mut(&id)
            {
                let s = &mut s[candidate as usize];
                assert_eq!(s.finish, None, "a candidate that has ended goes on");
                s.text.push_str(text);
                s.tokens.extend(tokens.iter().map(|t| t.id));
                s.finish = finish;
            }
        });
        for outcome in outcomes.expect("the engine goes on") {
            let completed = outcome.expect("no request fails");
            done.insert(
                completed.id,
                (completed.clone(), streamed.remove(&completed.id).expect("handed in")),
            );
        }
        session.check();
    }
    assert!(streamed.is_empty(), "requests without an answer: {:?}", streamed.keys());
    assert_eq!(session.blocks().0, 0, "blocks are held");
    assert_eq!((session.in_flight(), session.running(), session.waiting()), (0, 0, 0));
    done
}

/// What must hold of any answer.
fn check(a: &Asked, completed: &Completed, streamed: &[Streamed], eos: u32) {
    let o = &a.options;
    assert_eq!(completed.candidates.len(), o.candidates as usize);
    if o.prompt_logprobs && completed.candidates.iter().all(|c| c.finish != FinishReason::Deadline)
    {
        assert_eq!(completed.prompt_scores.len(), a.prompt.len() - 1);
    }
    let Length::New(most) = o.length else { unreachable!("asked for above") };
    for (c, s) in completed.candidates.iter().zip(streamed) {
        assert_eq!(s.text, c.text, "what was streamed is the answer");
        assert_eq!(s.tokens, c.token_ids());
        assert_eq!(s.finish, Some(c.finish));
        assert!(c.tokens.len() <= most);
        assert_eq!(o.ban.find(&c.text), None, "banned: {}", c.text);
        if c.finish == FinishReason::Deadline {
            continue;
        }
        assert!(o.keep.missing(&c.text).is_empty(), "{:?} lacks {:?}", c.text, o.keep);
        let ends = |id: &u32| (*id == eos && !o.ignore_eos) || o.stop_token_ids.contains(id);
        let early = c.tokens.iter().take(o.min_new).filter(|t| ends(&t.id));
        if o.keep.is_empty() {
            assert_eq!(early.count(), 0, "ended before {} tokens", o.min_new);
            if o.min_new == 0 && !o.include_stop {
                assert!(
                    o.stops.iter().all(|s| !c.text.contains(s)),
                    "{:?} holds a stop of {:?}",
                    c.text,
                    o.stops
                );
            }
        }
    }
}

#[test]
fn every_option_at_once() {
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, embedded::checkpoint(), None).unwrap();
    let tokenizer = embedded::tokenizer();
    let eos = embedded::checkpoint().config.eos_token_id;
    let mut random = PhiloxStream::new(12, 0);
    let mut requests = 0;
    for round in 0..50 {
        let asked: Vec<Asked> = (0..40).map(|_| asked(&mut random, &tokenizer)).collect();
        // from much room to hardly any, so that sequences give up their blocks
        let options = EngineOptions {
            cache_tokens: [4096, 640, 320][round % 3],
            batch_tokens: [512, 32, 17][round / 3 % 3],
            sequences: [32, 8, 3][round / 2 % 3],
            prefix_cache: round % 2 == 0,
            draft_tokens: [0, 4][round / 2 % 2],
        };
        let mut session = Session::new(&cpu, &model, &tokenizer, options).unwrap();
        let together = serve(&mut session, &asked, round % 4);
        for (id, (completed, streamed)) in &together {
            check(&asked[*id as usize], completed, streamed, eos);
        }
        requests += asked.len();
        // the same alone, with nothing that could disturb it
        let plain =
            EngineOptions { prefix_cache: false, draft_tokens: 0, ..EngineOptions::default() };
        for (id, (completed, _)) in together.iter().filter(|(id, _)| *id % 8 == 3) {
            let a = &asked[*id as usize];
            if a.options.deadline.is_some() {
                continue;
            }
            let again =
                [Asked { prompt: a.prompt.clone(), options: a.options.clone(), cancelled: None }];
            let alone =
                &serve(&mut Session::new(&cpu, &model, &tokenizer, plain).unwrap(), &again, 0)[&0]
                    .0;
            for (c, d) in completed.candidates.iter().zip(&alone.candidates) {
                assert_eq!(
                    (&c.text, c.token_ids(), c.finish),
                    (&d.text, d.token_ids(), d.finish),
                    "{:?}",
                    a.options
                );
            }
            let scores =
                |c: &Completed| c.prompt_scores.iter().map(|s| s.0.to_bits()).collect::<Vec<_>>();
            assert_eq!(scores(completed), scores(alone), "log-probabilities of the prompt");
        }
    }
    assert_eq!(requests, 2_000);
}

/// Log-probabilities of a prompt that loses its blocks halfway are told whole and in order.
#[test]
fn prompt_scores_survive_preemption() {
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, embedded::checkpoint(), None).unwrap();
    let tokenizer = embedded::tokenizer();
    let options = EngineOptions {
        cache_tokens: 960,
        batch_tokens: 32,
        sequences: 8,
        ..EngineOptions::default()
    };
    let score = |n: usize, together: bool| -> Vec<Vec<u32>> {
        let scored = |i: usize| Asked {
            prompt: tokenizer
                .encode_literal(&format!("{i} {}", "a cat in the rain, ".repeat(n)))
                .unwrap(),
            options: GenerateOptions {
                prompt_logprobs: true,
                length: Length::New(4),
                ..GenerateOptions::default()
            },
            cancelled: None,
        };
        let decoder = |i: u64| Asked {
            prompt: tokenizer.encode_literal(PROMPTS[0]).unwrap(),
            options: GenerateOptions {
                sampling: Sampling { temperature: 1.0, seed: i, ..Sampling::default() },
                ignore_eos: true,
                length: Length::New(160),
                ..GenerateOptions::default()
            },
            cancelled: None,
        };
        let bits =
            |c: &Completed| c.prompt_scores.iter().map(|s| s.0.to_bits()).collect::<Vec<_>>();
        let mut all = vec![];
        if together {
            let asked: Vec<Asked> =
                (0..24).map(|i| if i % 3 == 2 { scored(i) } else { decoder(i as u64) }).collect();
            let mut session = Session::new(&cpu, &model, &tokenizer, options).unwrap();
            let done = serve(&mut session, &asked, 3);
            assert!(session.counters().preemptions > 0, "the test is of preemption");
            all.extend((0..24).filter(|i| i % 3 == 2).map(|i| bits(&done[&i].0)));
        } else {
            for i in (0..24).filter(|i| i % 3 == 2) {
                let mut session = Session::new(&cpu, &model, &tokenizer, options).unwrap();
                all.push(bits(&serve(&mut session, &[scored(i)], 0)[&0].0));
            }
        }
        all
    };
    assert_eq!(score(30, true), score(30, false));
}

/// Many candidates, and many prompts of one owner, give a later request a place at once, and all
/// get done.
#[test]
fn who_asks_for_much_does_not_keep_a_short_request_waiting() {
    let cpu = Cpu::new(1, Isa::detect());
    let model = Bloom::load(&cpu, embedded::checkpoint(), None).unwrap();
    let tokenizer = embedded::tokenizer();
    for (prefix_cache, prompts) in [(true, 1), (false, 1), (true, 128)] {
        let engine = EngineOptions {
            sequences: 8,
            prefix_cache,
            cache_tokens: 2048,
            ..EngineOptions::default()
        };
        let mut session = Session::new(&cpu, &model, &tokenizer, engine).unwrap();
        let prompt = tokenizer.encode_literal(PROMPTS[0]).unwrap();
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let options = |candidates, new, owner| GenerateOptions {
            candidates,
            sampling,
            ignore_eos: true,
            length: Length::New(new),
            owner: Some(owner),
            ..GenerateOptions::default()
        };
        for id in 1..=prompts {
            session.submit(id, prompt.clone(), &options(128 / prompts as u32, 30, 1)).unwrap();
        }
        (0..5).for_each(|_| assert!(session.step(&mut |_| {}).unwrap().is_empty()));
        assert_eq!(session.running(), 8, "an owner alone has all places");
        session.submit(0, prompt.clone(), &options(1, 5, 2)).unwrap();
        let mut steps = 0;
        let mut order = vec![];
        while !session.is_idle() {
            steps += 1;
            for outcome in session.step(&mut |_| {}).unwrap() {
                let completed = outcome.unwrap();
                order.push((completed.id, steps));
                let tokens = if completed.id == 0 { 5 } else { 30 };
                assert!(completed.candidates.iter().all(|c| c.tokens.len() == tokens));
            }
            session.check();
            assert!(session.running() <= 8);
        }
        assert_eq!(order[0], (0, 5), "a token a step from the first one on");
        assert_eq!(order.len(), 1 + prompts as usize);
        assert_eq!(session.blocks().0, 0);
    }
}
