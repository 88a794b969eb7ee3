//! Texts that the program scores by a reward model: alone, in files, interrupted and in parts.

mod program;

use beautiful_prompt::models::bloom::training::TrainModel;
use beautiful_prompt::models::bloom::{BloomConfig, save_model};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::rewards::{Reward, ScoredText, TextRewardModel, TextRewardOptions};
use beautiful_prompt::tensor::DType;
use program::{bprompt, failure, path, run, stdout, text};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model")
}

/// A folder with a small reward model of random weights, and files beside it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(template: &str) -> Folder {
        let f = Folder(tempfile::tempdir().unwrap());
        std::fs::create_dir(f.at("model")).unwrap();
        f.save_model(6144, |_| {});
        std::fs::copy(assets().join("tokenizer.json"), f.at("model/tokenizer.json")).unwrap();
        f.write("model/template.txt", template);
        f
    }

    fn save_model(&self, vocabulary: usize, change: impl Fn(&mut Vec<f32>)) {
        let config = BloomConfig::new(vocabulary, 24, 2, 3);
        let mut model = TrainModel::random(config, 5).into_reward_model(7);
        change(&mut model.values);
        save_model(&self.at("model"), &model.config, &model.values, DType::F32).unwrap();
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.at(name), text).unwrap();
        self.name(name)
    }

    fn name(&self, name: &str) -> String {
        path(&self.at(name)).to_owned()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.at(name)).unwrap()
    }

    /// The arguments of the command.
    fn args<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        let model: &'a str = Box::leak(self.name("model").into_boxed_str());
        [&["score", "text", "--device", "cpu", "--model", model], more].concat()
    }

    fn stdout(&self, more: &[&str]) -> String {
        stdout(&self.args(more))
    }

    fn failure(&self, more: &[&str]) -> String {
        failure(&self.args(more))
    }

    /// The scores that the library gives, each of its text alone.
    fn library(&self, texts: &[(&str, &str)]) -> Vec<f32> {
        let cpu = Cpu::new(1, Isa::detect());
        let options = TextRewardOptions { dtype: None, max_tokens: 384, batch_tokens: 512 };
        let mut model = TextRewardModel::open(&cpu, &self.at("model"), None, options).unwrap();
        let mut score = |(raw_prompt, output)| {
            model.score(&[ScoredText { raw_prompt, output }]).unwrap()[0] as f32
        };
        texts.iter().map(|text| score(*text)).collect()
    }
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn score(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

/// Texts of many lengths, each different.
fn corpus(count: usize) -> Vec<String> {
    let words =
        ["a fox", "in the snow", "8k", "oil painting", "by night", "highly detailed", "fog"];
    let word = |i: usize, k: usize| words[(i * 7 + k * k * 3 + i / 5) % words.len()];
    let text = |i: usize| {
        let list: Vec<&str> = (0..1 + i % 9).map(|k| word(i, k)).collect();
        format!("{} {i}", list.join(", "))
    };
    (0..count).map(text).collect()
}

fn joined(texts: &[String]) -> String {
    texts.iter().map(|t| format!("{t}\n")).collect()
}

const ALONE: &str = "{prompt}\n";
const BOTH: &str = "Input: {raw}\nOutput: {prompt}\n";

#[test]
fn scores_are_the_librarys_alone_and_in_any_batch() {
    let f = Folder::new(ALONE);
    let mut texts = corpus(60);
    // special tokens inside texts are text
    texts.extend(["a fox </s> by night", "</s>", "<pad><pad> fog"].map(str::to_owned));
    let pairs: Vec<(&str, &str)> = texts.iter().map(|t| ("", t.as_str())).collect();
    let expected = f.library(&pairs);
    assert_ne!(expected[60], f.library(&[("", "a fox by night")])[0]);
    let input = f.write("in.txt", &joined(&texts));
    for more in [&[][..], &["--batch-tokens", "1"], &["--batch-tokens", "100", "--threads", "1"]] {
        let records = lines(&f.stdout(&[&["--input", &input], more].concat()));
        let numbers: Vec<u64> = records.iter().map(|r| r["line"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (1..=texts.len() as u64).collect::<Vec<_>>());
        let scores: Vec<f32> = records.iter().map(|r| score(&r["score"])).collect();
        assert_eq!(scores, expected);
    }
    let scores = |text: &str| text.lines().map(|l| l.parse().unwrap()).collect::<Vec<f32>>();
    let few: Vec<&str> = texts[55..].iter().map(String::as_str).collect();
    assert_eq!(scores(&f.stdout(&few)), expected[55..]);
    assert_eq!(scores(&f.stdout(&few[..1])), expected[55..56]);
    let table = f.stdout(&["--input", &input, "--format", "text"]);
    for ((line, text), score) in table.lines().zip(&texts).zip(&expected) {
        assert_eq!(line.split_once('\t').unwrap(), (score.to_string().as_str(), text.as_str()));
    }
}

#[test]
fn records_and_rewrites_are_scored_with_their_plain_prompts() {
    let f = Folder::new(BOTH);
    let records = [
        json!({ "prompt": "a fox, 8k", "raw_prompt": "a fox", "id": "x", "label": 3 }),
        json!({
            "id": 7, "custom_id": "r7", "prompt": "a hen", "seed": 1, "line": 99,
            "candidates": [{ "text": "a hen, fog", "kept": 1.0 }, { "text": "a hen, 8k" }],
        }),
    ];
    let input = f.write("in.jsonl", &records.iter().map(|r| format!("{r}\n")).collect::<String>());
    let expected =
        f.library(&[("a fox", "a fox, 8k"), ("a hen", "a hen, fog"), ("a hen", "a hen, 8k")]);
    let output = lines(&f.stdout(&["--input", &input]));
    assert_eq!((&output[0]["line"], &output[0]["id"]), (&json!(1), &json!("x")));
    assert_eq!(score(&output[0]["score"]), expected[0]);
    assert_eq!(
        (&output[1]["line"], &output[1]["id"], &output[1]["custom_id"]),
        (&json!(2), &json!(7), &json!("r7"))
    );
    let scores: Vec<f32> = output[1]["scores"].as_array().unwrap().iter().map(score).collect();
    assert_eq!(scores, expected[1..]);

    // what rewrite writes is read as it is
    let rewritten = f.name("rewritten.jsonl");
    let prompts = f.write("prompts.txt", "a fox\na hen\n");
    let quick = ["--max-tokens", "8", "--seed", "3", "-n", "2", "--device", "cpu"];
    let to = ["rewrite", "--input", &prompts, "--output", &rewritten];
    stdout(&[&to[..], &quick].concat());
    let rewrites = lines(&f.read("rewritten.jsonl"));
    for (scored, rewrite) in lines(&f.stdout(&["--input", &rewritten])).iter().zip(&rewrites) {
        let texts = rewrite["candidates"].as_array().unwrap().iter();
        let raw = rewrite["prompt"].as_str().unwrap();
        let pairs: Vec<(&str, &str)> = texts.map(|c| (raw, c["text"].as_str().unwrap())).collect();
        let scores: Vec<f32> = scored["scores"].as_array().unwrap().iter().map(score).collect();
        assert_eq!((scores, &scored["id"]), (f.library(&pairs), &rewrite["id"]));
    }

    // a template that reads the plain prompt, and none there
    let alone = f.write("alone.txt", "a fox\n");
    let message = f.failure(&["--input", &alone]);
    assert!(message.contains("alone.txt, line 1: is a text alone"), "{message}");
    let record = f.write("alone.jsonl", "{\"prompt\": \"a fox\"}\n");
    assert!(f.failure(&["--input", &record]).contains("line 1: has no \"raw_prompt\""));
    assert!(f.failure(&["a fox"]).contains("its template reads the plain prompt"));
    let aesthetic = f.stdout(&["--template", "aesthetic", "a fox"]);
    f.write("model/template.txt", ALONE);
    assert_eq!(aesthetic, f.stdout(&["a fox"]));
    let text = f.failure(&["--input", &rewritten, "--format", "text"]);
    assert!(text.contains("line 1: has 2 candidates"), "{text}");
}

#[test]
#[cfg(unix)]
fn killed_and_interrupted_runs_go_on_to_the_same_bytes() {
    let f = Folder::new(ALONE);
    let input = f.write("in.txt", &joined(&corpus(20_000)));
    let run = |output: &str, more: &[&str]| {
        bprompt(&f.args(&[&["--input", &input, "--output", output], more].concat()))
    };
    assert!(run(&f.name("whole.jsonl"), &[]).status().unwrap().success());
    let expected = f.read("whole.jsonl");
    assert_eq!(expected.lines().count(), 20_000);
    let output = f.name("cut.jsonl");
    let length = || std::fs::metadata(&output).map_or(0, |m| m.len());
    // small passes take longer
    for (signal, more) in [
        (libc::SIGKILL, &["--batch-tokens", "64"][..]),
        (libc::SIGINT, &["--batch-tokens", "64", "--resume"]),
    ] {
        let before = length();
        let mut child = run(&output, more).stderr(Stdio::null()).spawn().unwrap();
        while length() < before + 50_000 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: a signal to our own child, which was not waited for yet.
        unsafe { libc::kill(child.id() as i32, signal) };
        let status = child.wait().unwrap();
        assert!(!status.success(), "the run was not caught in the act");
        if signal == libc::SIGINT {
            assert_eq!(status.code(), Some(130));
            assert!(f.read("cut.jsonl").ends_with('\n'));
        }
        assert!(length() < expected.len() as u64);
    }
    // a write that was cut in the middle of a line
    let mut torn = std::fs::OpenOptions::new().append(true).open(&output).unwrap();
    torn.write_all(b"{\"line\":9").unwrap();
    assert!(run(&output, &["--resume"]).status().unwrap().success());
    assert!(f.read("cut.jsonl") == expected, "the output differs from an undisturbed run's");
    // text goes on by counting its lines
    let few = f.write("few.txt", &joined(&corpus(300)));
    let table = f.name("table.txt");
    let base = ["--input", &few, "--output", &table];
    f.stdout(&base);
    let whole = f.read("table.txt");
    f.write("table.txt", &whole[..whole.len() / 3]);
    f.stdout(&[&base[..], &["--resume"]].concat());
    assert!(f.read("table.txt") == whole);
}

#[test]
fn other_settings_and_inputs_are_refused_by_name() {
    let f = Folder::new(ALONE);
    let input = f.write("in.txt", &joined(&corpus(20)));
    let other = f.write("other.txt", "something else\n");
    let output = f.name("out.jsonl");
    let base = ["--input", &input, "--output", &output];
    f.stdout(&base);
    let whole = f.read("out.jsonl");
    let cut: String = whole.split_inclusive('\n').take(9).collect();
    f.write("out.jsonl", &cut);
    assert!(f.failure(&base).contains("exists already"));
    for (more, flag) in [
        (&["--input", &input, "--max-tokens", "9"][..], "--max-tokens 384 then, 9 now"),
        (&["--input", &input, "--template", "pickscore"], "--template {prompt} then"),
        (&["--input", &input, "--dtype", "int8"], "--dtype auto then, int8 now"),
        (&["--input", &input, "--format", "text"], "--format jsonl then, text now"),
        (&["--input", &input, "--shard", "1/2"], "--shard 1/1 then, 1/2 now"),
        (&["--input", &other], "--input"),
    ] {
        let message = f.failure(&[&["--resume", "--output", &output], more].concat());
        assert!(
            message.contains("was begun with other settings") && message.contains(flag),
            "{message}"
        );
        assert_eq!(f.read("out.jsonl"), cut);
    }
    let resume = [&base[..], &["--resume"]].concat();
    f.save_model(6144, |values| values[5] += 1.0);
    assert!(f.failure(&resume).contains("--model weights "));
    f.save_model(6144, |_| {});
    let held = std::fs::File::options().append(true).open(&output).unwrap();
    held.lock().unwrap();
    assert!(f.failure(&resume).contains("another process is writing to it"));
    drop(held);
    f.stdout(&resume);
    assert_eq!(f.read("out.jsonl"), whole);
    let message = f.failure(&["--input", &input, "--output", &input, "--force"]);
    assert!(message.contains("is the same file as the input"), "{message}");
}

#[test]
fn parts_and_packed_files_make_up_the_whole() {
    let f = Folder::new(ALONE);
    let texts = corpus(25);
    f.write("a.txt", &joined(&texts[..10]));
    std::fs::write(
        f.at("b.txt.zst"),
        zstd::encode_all(joined(&texts[10..]).as_bytes(), 0).unwrap(),
    )
    .unwrap();
    let pattern = f.name("?.txt*");
    let whole = f.stdout(&["--input", &pattern]);
    assert_eq!(whole.lines().count(), 25);
    let mut parts: Vec<(u64, String)> = vec![];
    for shard in ["1/3", "2/3", "3/3"] {
        let part = f.stdout(&["--input", &pattern, "--shard", shard]);
        let number = |l: &str| serde_json::from_str::<Value>(l).unwrap()["line"].as_u64().unwrap();
        parts.extend(part.lines().map(|l| (number(l), format!("{l}\n"))));
    }
    parts.sort_unstable();
    assert_eq!(parts.into_iter().map(|p| p.1).collect::<String>(), whole);
    // texts on standard input are answered as those on the command line are
    let mut child = bprompt(&f.args(&[]));
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(joined(&texts).as_bytes()).unwrap();
    let out = text(&child.wait_with_output().unwrap().stdout);
    let scores: Vec<f32> = lines(&whole).iter().map(|l| score(&l["score"])).collect();
    assert_eq!(out.lines().map(|l| l.parse::<f32>().unwrap()).collect::<Vec<_>>(), scores);
}

#[test]
fn bad_lines_are_named_or_left_out_and_counted() {
    let f = Folder::new(ALONE);
    let input = f.write(
        "in.jsonl",
        "{\"prompt\": \"a fox\"}\n\n{\"prompt\": \"\"}\n[1]\n{\"prompt\": \"a hen\"}\n",
    );
    let output = f.name("out.jsonl");
    let message = f.failure(&["--input", &input, "--output", &output]);
    assert!(message.contains("in.jsonl, line 3: has an empty text"), "{message}");
    assert!(message.contains("--skip-bad-lines goes on"), "{message}");
    assert_eq!(f.read("out.jsonl").lines().count(), 1, "what came before it is written");
    let base = ["--input", &input, "--output", &output, "--skip-bad-lines"];
    let out = run(&f.args(&[&base[..], &["--resume"]].concat()));
    assert!(out.status.success());
    assert_eq!(text(&out.stderr), "skipped 2 bad lines: 3, 4\n");
    let numbers = |name: &str| -> Vec<u64> {
        lines(&f.read(name)).iter().map(|l| l["line"].as_u64().unwrap()).collect()
    };
    assert_eq!(numbers("out.jsonl"), [1, 5]);
    let table = f.name("out.txt");
    let out = run(&f.args(&["--input", &input, "--output", &table, "--skip-bad-lines"]));
    assert!(out.status.success());
    let column = |l: &str| l.split('\t').nth(1).unwrap_or_default().to_owned();
    let texts: Vec<String> = f.read("out.txt").lines().map(column).collect();
    assert_eq!(texts, ["a fox", "", "", "a hen"]);
    // a good output stays
    let bad = f.write("bad.jsonl", "{\"prompt\": 3}\n");
    let before = f.read("out.jsonl");
    let out = run(&f.args(&["--input", &bad, "--output", &output, "--skip-bad-lines", "--force"]));
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("stays as it was"));
    assert!(f.failure(&["--input", &bad, "--output", &output, "--force"]).contains("line 1"));
    let empty = f.write("empty.txt", "\n\n");
    let message = f.failure(&["--input", &empty, "--output", &output, "--force"]);
    assert!(message.contains("empty.txt: holds no texts"), "{message}");
    assert_eq!(f.read("out.jsonl"), before);
    assert!(failure(&f.args(&[])).contains("standard input holds no texts"));
    assert!(f.failure(&[""]).contains("has an empty text"));
    // what is cut is said once
    let long = f.write("long.txt", &format!("{}\na fox\n", "a fox by night ".repeat(20)).repeat(3));
    let out = run(&f.args(&["--input", &long, "--max-tokens", "12"]));
    let note = "cut the beginnings of 3 texts that have more than 12 tokens (--max-tokens)\n";
    assert_eq!((out.status.success(), text(&out.stderr).as_str()), (true, note));
}

#[test]
fn models_that_cannot_score_are_named() {
    let f = Folder::new(ALONE);
    let input = f.write("in.txt", "a fox\n");
    let output = f.name("out.jsonl");
    let base = ["--input", &input, "--output", &output];
    let before = std::fs::read_dir(f.0.path()).unwrap().count();
    let assets = assets();
    let language = ["score", "text", "--model", path(&assets), "a fox"];
    assert!(failure(&language).contains("expected a reward model"));
    f.save_model(6000, |_| {});
    assert!(f.failure(&base).contains("the files belong to different models"));
    f.save_model(6144, |values| values[24 * 6144 + 30] = f32::NAN);
    let message = f.failure(&base);
    assert!(message.contains("NaN"), "{message}");
    let template = f.name("nowhere.txt");
    f.save_model(6144, |_| {});
    let message = f.failure(&["--template", &template, "a fox"]);
    assert!(message.contains("--template") && message.contains("does not exist"), "{message}");
    for (more, word) in [
        (["--max-tokens", "0"], "--max-tokens 0 is outside"),
        (["--batch-tokens", "0"], "--batch-tokens 0 is outside"),
    ] {
        assert!(f.failure(&[&more[..], &["a fox"]].concat()).contains(word));
    }
    assert_eq!(std::fs::read_dir(f.0.path()).unwrap().count(), before, "nothing is left behind");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_and_a_closed_pipe_ends_quietly() {
    let f = Folder::new(ALONE);
    let input = f.write("in.txt", &joined(&corpus(5000)));
    let message = f.failure(&["--input", &input, "--output", "/dev/full"]);
    assert!(message.contains("/dev/full: cannot write"), "{message}");
    let args = f.args(&["--input", &input]).join(" ");
    let shell = format!("{} {args} | head -n 1", env!("CARGO_BIN_EXE_bprompt"));
    let out = std::process::Command::new("sh").args(["-c", &shell]).output().unwrap();
    assert_eq!((text(&out.stdout).lines().count(), text(&out.stderr)), (1, String::new()));
}
