//! The program gives what an earlier build gave, byte for byte.
//!
//! `tests/recorded/` holds what that build printed, wrote and answered. Bits depend on the
//! instructions that are computed with, so there is a file for each set of them, and the sets that
//! this machine lacks are named and left out. Training also uses what else the machine has, so
//! that its record is compared only where the best set is the same.
//!
//! After a change that is meant to change outputs, this records what a program does now:
//!
//!     cargo build --release
//!     BPROMPT_RECORD=target/release/bprompt cargo test --release --test recorded

mod served;

use beautiful_prompt::ops::cpu::simd::{InstructionSet, Isa};
use serde_json::{Value, json};
use served::{Answer, Server};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PROMPTS: [&str; 3] = [
    "a cat on a roof",
    "two (red:1.2) foxes in the snow, a sign that says \"HELLO\" <lora:winter:0.7>",
    "portrait photo of an old man without a hat BREAK a castle at night",
];

/// Lines of what came out, by the name of the case.
type Record = BTreeMap<String, Vec<String>>;

/// A build of the program, and a folder to run it in.
struct Bench {
    program: String,
    folder: tempfile::TempDir,
    threads: String,
    record: Record,
}

impl Bench {
    fn new() -> Bench {
        let program = match std::env::var("BPROMPT_RECORD") {
            Ok(p) => std::path::absolute(p).unwrap().to_str().unwrap().to_owned(),
            Err(_) => env!("CARGO_BIN_EXE_bprompt").to_owned(),
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
        Bench {
            program,
            folder: tempfile::tempdir().unwrap(),
            threads: threads.to_string(),
            record: Record::new(),
        }
    }

    fn run(&self, args: &[&str]) -> String {
        let out = Command::new(&self.program)
            .env_remove("BPROMPT_MODEL")
            .env("BPROMPT_DEVICE", "cpu")
            .env("BPROMPT_THREADS", &self.threads)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .args(args)
            .output()
            .unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn add(&mut self, case: &str, text: &str) {
        let lines = text.split('\n').map(str::to_owned).collect();
        assert!(self.record.insert(case.to_owned(), lines).is_none(), "{case} is there twice");
    }

    /// Length and checksum of a file that is too long to keep.
    fn add_file(&mut self, case: &str, name: &str) {
        let bytes = self.read(name);
        let text = format!("{} bytes, crc32 {:08x}", bytes.len(), crc32fast::hash(&bytes));
        self.add(&format!("{case}: {name}"), &text);
    }

    /// Keeps the record, or compares with the one that was kept.
    fn finish(self, name: &str) {
        let path = records().join(format!("{name}.json"));
        if std::env::var_os("BPROMPT_RECORD").is_some() {
            let text = serde_json::to_string_pretty(&self.record).unwrap() + "\n";
            std::fs::write(&path, text).unwrap();
            return;
        }
        let kept: Record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let names = |r: &Record| r.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&self.record), names(&kept), "{name}: cases");
        for (case, lines) in &kept {
            assert_eq!(&self.record[case], lines, "{name}, {case}");
        }
    }
}

fn records() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded")
}

/// Flags of single rewrites, by the name of the case.
const REWRITES: [(&str, &[&str]); 18] = [
    ("greedy", &["--temperature", "0", "--json"]),
    ("sampled", &[]),
    ("three candidates", &["-n", "3", "--json"]),
    ("style photo", &["--style", "photo"]),
    ("style anime", &["--style", "anime", "--no-artists"]),
    ("keep and ban", &["--keep", "moon", "--ban", "artstation,4k,highly detailed", "--json"]),
    ("the model's own", &["--min-kept", "0", "--json"]),
    ("kept whole", &["--min-kept", "1", "--rounds", "2", "--json"]),
    ("short", &["--max-clip-tokens", "30", "--json"]),
    ("variety", &["--variety", "0.7", "--no-artists"]),
    ("any medium", &["--any-medium", "-n", "2"]),
    ("template v1", &["--template", "v1", "--min-kept", "0"]),
    ("template v2", &["--template", "v2", "--max-tokens", "20"]),
    ("template of a file", &["--template", "template.txt", "--max-tokens", "20"]),
    ("int8", &["--dtype", "int8", "--json"]),
    ("bf16", &["--dtype", "bf16", "--json"]),
    ("f16", &["--dtype", "f16", "--json"]),
    ("f32", &["--dtype", "f32", "--json"]),
];

const SAMPLED: [(&str, &[&str]); 5] = [
    ("greedy", &["--temperature", "0"]),
    ("filtered", &["--temperature", "1.3", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.02"]),
    ("penalized", &["--repetition-penalty", "1.3", "--penalty-scope", "output"]),
    ("counted", &["--presence-penalty", "0.8", "--frequency-penalty", "0.5"]),
    ("biased", &["--logit-bias", "722=-100", "--stop", ",", "--ignore-eos"]),
];

fn single_runs(b: &mut Bench, isa: &str) {
    b.write("template.txt", "Describe: {raw}\nPrompt:");
    for (i, (case, flags)) in REWRITES.into_iter().enumerate() {
        // all prompts where the most is done with them, else one of them in turn
        let prompts = if i < 2 { &PROMPTS[..] } else { &PROMPTS[i % 3..][..1] };
        let args = [&["rewrite", "--isa", isa, "--seed", "7"], flags, prompts].concat();
        let text = b.run(&args);
        b.add(&format!("rewrite, {case}"), &text);
    }
    for (case, flags) in SAMPLED {
        let args = ["generate", "--isa", isa, "--seed", "7", "--max-tokens", "24", "--json"];
        let args = [&args, flags, &["-p", "a painting of a cat, a dog and"]].concat();
        let text = b.run(&args);
        b.add(&format!("generate, {case}"), &text);
    }
}

/// Files of prompts, in each of the forms.
fn batches(b: &mut Bench, isa: &str) {
    let mut lines = String::new();
    for i in 0..8 {
        let prompt = format!("{} number {i}", ["a boat", "an owl", "three dogs"][i % 3]);
        let line = match i % 4 {
            0 => json!({ "prompt": prompt }),
            1 => json!({ "id": format!("own-{i}"), "prompt": prompt, "seed": i }),
            2 => json!({ "prompt": prompt, "temperature": 0, "keep": ["fog"] }),
            _ => json!({ "prompt": prompt, "top_p": 0.8, "max_tokens": 12, "min_kept": 0 }),
        };
        lines += &format!("{line}\n");
    }
    b.write("in.jsonl", &lines);
    b.write("in.txt", &(PROMPTS.join("\n") + "\n\na hill\n"));
    let run = |b: &Bench, input: &str, output: &str, flags: &[&str]| {
        let args = ["rewrite", "--isa", isa, "--seed", "7", "-i", input, "-o", output];
        b.run(&[&args, flags].concat());
        String::from_utf8(b.read(output)).unwrap()
    };
    let small = ["--sequences", "3", "--batch-tokens", "24", "-n", "2"];
    for (case, output, flags) in
        [("as it is", "out.jsonl", &[][..]), ("few places", "few.jsonl", &small)]
    {
        let text = run(b, "in.jsonl", output, flags);
        b.add(&format!("batch, {case}"), &text);
    }
    let text = run(b, "in.txt", "out.txt", &[]);
    b.add("batch, text", &text);

    b.write("openai.jsonl", &openai_lines());
    let text = run(b, "openai.jsonl", "answers.jsonl", &["--format", "openai"]);
    let answers = text.lines().map(|l| steady(serde_json::from_str(l).unwrap()).to_string());
    let text = answers.collect::<Vec<_>>().join("\n");
    b.add("batch, OpenAI's", &text);
}

fn openai_lines() -> String {
    let chat = json!({
        "messages": [{ "role": "user", "content": "a lamp" }], "seed": 5, "n": 2,
    });
    let completion = json!({ "prompt": "a lamp,", "seed": 5, "max_tokens": 9, "logprobs": 2 });
    let rewrite = json!({ "prompt": ["a lamp", "a pier"], "seed": 5 });
    let wrong = json!({ "prompt": "a lamp", "max_tokens": -1 });
    let urls = ["chat/completions", "completions", "rewrite", "completions"];
    let lines = [chat, completion, rewrite, wrong].into_iter().zip(urls).enumerate();
    lines
        .map(|(i, (body, url))| {
            let url = format!("/v1/{url}");
            let line = json!({
                "custom_id": format!("c{i}"), "method": "POST", "url": url, "body": body,
            });
            format!("{line}\n")
        })
        .collect()
}

/// An answer without what is another one each time.
fn steady(mut value: Value) -> Value {
    fn forget(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.shift_remove("created");
                let own = |id: &Value| id.as_str().is_some_and(|id| id.len() > 30);
                if map.get("id").is_some_and(own) {
                    map.shift_remove("id");
                }
                map.values_mut().for_each(forget);
            }
            Value::Array(items) => items.iter_mut().for_each(forget),
            _ => {}
        }
    }
    forget(&mut value);
    value
}

fn evaluation(b: &mut Bench, isa: &str) {
    let facts = json!({
        "prompt": "a black cat on a roof",
        "facts": [
            { "kind": "entity", "keywords": ["cat"] },
            { "kind": "attribute", "keywords": ["cat", "black"] },
        ],
    });
    b.write("facts.jsonl", &format!("{facts}\n"));
    let common = ["eval", "--isa", isa, "--seed", "7", "--json"];
    for (case, flags) in
        [("facts", &["--facts", "facts.jsonl"][..]), ("text", &["--input", "in.txt"])]
    {
        let mut report: Value = serde_json::from_str(&b.run(&[&common, flags].concat())).unwrap();
        let map = report.as_object_mut().unwrap();
        // times, and drafts, which are made or left out by the time that they take
        for name in ["median_seconds", "slowest_seconds", "tokens_per_step", "drafts_accepted"] {
            assert!(map.shift_remove(name).is_some(), "no {name}");
        }
        b.add(&format!("eval, {case}"), &serde_json::to_string_pretty(&report).unwrap());
    }
}

/// What a server answers.
fn answers(b: &mut Bench, isa: &str) {
    let server = Server::start_program(&b.program, &["--isa", isa]);
    let messages = json!([
        { "role": "system", "content": "You write prompts." },
        { "role": "user", "content": "a lighthouse in a storm" },
    ]);
    let requests = [
        ("rewrite", json!({ "prompt": PROMPTS, "seed": 3, "n": 2 })),
        (
            "rewrite",
            json!({
                "prompt": "a hut", "seed": 3, "style": "watercolor", "keep": ["dawn"],
                "ban": ["4k"],
            }),
        ),
        ("chat/completions", json!({ "messages": messages, "seed": 3, "n": 2 })),
        (
            "chat/completions",
            json!({ "messages": messages, "seed": 3, "logprobs": true, "top_logprobs": 2,
                "max_tokens": 6 }),
        ),
        ("completions", json!({ "prompt": ["a hut", "a"], "seed": 3, "max_tokens": 12, "n": 2 })),
        (
            "completions",
            json!({ "prompt": "a hut,", "temperature": 0, "logprobs": 2, "echo": true }),
        ),
        ("completions", json!({ "prompt": [68, 722], "stop": [","], "seed": 1 })),
        ("completions", json!({ "prompt": "a hut", "temperature": -1 })),
    ];
    for (i, (path, body)) in requests.into_iter().enumerate() {
        let Answer { status, body, .. } = server.post(&format!("/v1/{path}"), body);
        let body = steady(serde_json::from_str(&body).unwrap());
        let text = serde_json::to_string(&body).unwrap();
        b.add(&format!("served {i}, {path}"), &format!("{status}\n{text}"));
    }
    let body = json!({ "messages": messages, "seed": 3, "stream": true });
    let events = server.post("/v1/chat/completions", body).events();
    let pieces = events.iter().map(|e| &e["choices"][0]["delta"]["content"]);
    let text: String = pieces.filter_map(Value::as_str).collect();
    b.add("served, streamed", &text);
}

fn infer(isa: InstructionSet) {
    if isa.get().is_none() {
        eprintln!("left out: this machine has no {}", isa.name());
        return;
    }
    let mut b = Bench::new();
    single_runs(&mut b, isa.name());
    batches(&mut b, isa.name());
    evaluation(&mut b, isa.name());
    answers(&mut b, isa.name());
    b.finish(isa.name());
}

#[test]
fn outputs_are_as_recorded_with_portable_instructions() {
    infer(InstructionSet::Portable);
}

#[test]
fn outputs_are_as_recorded_with_avx2() {
    infer(InstructionSet::Avx2);
}

#[test]
fn outputs_are_as_recorded_with_avx512() {
    infer(InstructionSet::Avx512);
}

#[test]
fn outputs_are_as_recorded_with_avx512_bf16() {
    infer(InstructionSet::Avx512Bf16);
}

/// Pairs that a prompt list gives, and a vocabulary learnt from them.
#[test]
fn data_are_as_recorded() {
    let mut b = Bench::new();
    b.write("rich.txt", &rich_prompts());
    let args = ["data", "pairs", "--input", "rich.txt", "--output", "pairs.jsonl", "--seed", "3"];
    b.run(&[&args[..], &PLENTY].concat());
    let pairs = String::from_utf8(b.read("pairs.jsonl")).unwrap();
    b.add("pairs", &pairs);
    b.run(&[
        "train",
        "tokenizer",
        "--input",
        "rich.txt",
        "--vocab-size",
        "400",
        "--output",
        "t.json",
    ]);
    b.add_file("tokenizer", "t.json");
    b.finish("data");
}

/// No limits to what so few prompts can lend.
const PLENTY: [&str; 8] =
    ["--min-tokens", "5", "--phrase-share", "1", "--artists-share", "1", "--artist-share", "1"];

fn rich_prompts() -> String {
    let subjects = ["fox", "sailor", "glass castle", "clockmaker", "market"];
    let places = ["on a cliff", "in the fog", "under the northern lights", "at dawn"];
    let styles = [
        "highly detailed, digital painting, concept art, sharp focus, cinematic lighting",
        "oil painting, intricate, soft light, vibrant colors, trending on artstation, masterpiece",
        "photorealistic, studio lighting, 8k, depth of field, by greg rutkowski",
    ];
    (0..20)
        .map(|i| {
            let (subject, place) = (subjects[i % 5], places[i % 4]);
            format!("a {subject} {place}, small boats nearby, {}\n", styles[i % 3])
        })
        .collect()
}

#[test]
fn training_is_as_recorded() {
    let isa = Isa::detect().name();
    let name = format!("training-{isa}");
    if !records().join(format!("{name}.json")).exists()
        && std::env::var_os("BPROMPT_RECORD").is_none()
    {
        eprintln!("left out: training is not recorded for machines whose best is {isa}");
        return;
    }
    let mut b = Bench::new();
    let pairs: String = PROMPTS
        .iter()
        .cycle()
        .take(12)
        .enumerate()
        .map(|(i, p)| {
            let pair = json!({ "raw_prompt": p, "prompt": format!("{p}, take {i}, sharp focus") });
            format!("{pair}\n")
        })
        .collect();
    b.write("pairs.jsonl", &pairs);
    for (precision, saved) in [("f32", "f32"), ("bf16", "bf16")] {
        let mut args = vec!["train", "sft", "--train", "pairs.jsonl", "--output", precision];
        args.extend(["--validation", "pairs.jsonl", "--precision", precision]);
        args.extend(["--save-dtype", saved, "--max-steps", "4", "--batch", "5"]);
        args.extend(["--micro-tokens", "100", "--learning-rate", "0.001", "--weight-decay", "0.1"]);
        args.extend(["--save-every", "3", "--validate-every", "2"]);
        b.run(&args);
        b.add_file(precision, &format!("{precision}/model.safetensors"));
        let metrics = String::from_utf8(b.read(&format!("{precision}/metrics.jsonl"))).unwrap();
        let steps = metrics.lines().map(|l| {
            let mut step: Value = serde_json::from_str(l).unwrap();
            step.as_object_mut().unwrap().shift_remove("tokens_per_second");
            step.to_string()
        });
        let steps = steps.collect::<Vec<_>>().join("\n");
        b.add(&format!("{precision}: metrics"), &steps);
    }
    b.finish(&name);
}
