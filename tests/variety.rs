//! What rewrites add: seeds of their own, media that go together, styles, artists or none, fewer
//! worn phrases.

use beautiful_prompt::generate::GenerateOptions;
use beautiful_prompt::models::embedded;
use beautiful_prompt::random::{Derived, derived_seed};
use beautiful_prompt::rewrite::{Additions, GuardOptions, Prompter, Rewriting, Style};
use beautiful_prompt::text::artists::names_artist;
use beautiful_prompt::text::mediums::Mediums;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

fn run(args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_bprompt"));
    c.env_remove("BPROMPT_MODEL").env("BPROMPT_THREADS", "1").stdin(Stdio::null());
    c.args(args).output().unwrap()
}

fn records(args: &[&str]) -> Vec<Value> {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

fn text(record: &Value) -> &str {
    record["candidates"][0]["text"].as_str().unwrap()
}

/// A file of the same prompt again and again, and its name.
fn repeated(folder: &Path, prompt: &str, count: usize) -> String {
    let file = folder.join("prompts.txt");
    std::fs::write(&file, format!("{prompt}\n").repeat(count)).unwrap();
    file.to_str().unwrap().to_owned()
}

/// What a rewrite of `prompt` gives the engine to do: seed and what is banned, for each part.
fn work(prompt: &str, seed: u64, additions: Additions) -> Vec<(Vec<u32>, GenerateOptions)> {
    let prompter =
        Prompter { tokenizer: Arc::new(embedded::tokenizer()), template: embedded::template() };
    let mut options = GenerateOptions::default();
    (options.sampling.seed, options.sampling.temperature) = (seed, 1.0);
    let guard = GuardOptions { additions, ..GuardOptions::default() };
    Rewriting::new(prompter, prompt, options, guard).unwrap().work().unwrap()
}

#[test]
fn every_line_has_a_seed_that_gives_it_again_alone() {
    let f = tempfile::tempdir().unwrap();
    let input = repeated(f.path(), "a fox in a garden", 24);
    let flags =
        ["rewrite", "--seed", "3", "--max-tokens", "40", "--variety", "0.5", "--no-artists"];
    let whole = records(&[&flags[..], &["--input", &input]].concat());
    let seeds: HashSet<u64> = whole.iter().map(|r| r["seed"].as_u64().unwrap()).collect();
    let texts: HashSet<&str> = whole.iter().map(text).collect();
    assert_eq!(seeds.len(), 24);
    assert!(texts.len() > 12, "the same prompt comes out in different ways: {texts:?}");
    for (i, r) in whole.iter().enumerate().step_by(7) {
        let seed = derived_seed(3, Derived::Prompt, i as u64 + 1);
        assert_eq!(r["seed"], seed);
        let seed = seed.to_string();
        let alone =
            [&flags[..1], &["--seed", &seed], &flags[3..], &["--json", "a fox in a garden"]]
                .concat();
        assert_eq!(records(&alone)[0]["candidates"], r["candidates"]);
    }
    // parts of the input, and other sizes of batches, change nothing
    for part in ["1/3", "2/3", "3/3"] {
        let more = ["--input", &input, "--shard", part, "--sequences", "3"];
        for r in records(&[&flags[..], &more].concat()) {
            assert_eq!(r, whole[r["line"].as_u64().unwrap() as usize - 1]);
        }
    }
    // nor does going on after an interruption
    let output = f.path().join("out.jsonl");
    let to_file = [&flags[..], &["--input", &input, "--output", output.to_str().unwrap()]].concat();
    assert!(run(&to_file).status.success());
    let all = std::fs::read_to_string(&output).unwrap();
    let cut: usize = all.lines().take(9).map(|l| l.len() + 1).sum();
    std::fs::write(&output, &all[..cut + 5]).unwrap();
    let resumed = run(&[&to_file[..], &["--resume"]].concat());
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), all);
}

#[test]
fn prompts_given_together_have_seeds_by_their_places() {
    let together = records(&[
        "rewrite",
        "--json",
        "--seed",
        "5",
        "--max-tokens",
        "24",
        "a boat",
        "a boat",
        "a boat",
    ]);
    for (i, r) in together.iter().enumerate() {
        let seed = derived_seed(5, Derived::Prompt, i as u64 + 1);
        assert_eq!(r["seed"], seed);
        let alone = records(&[
            "rewrite",
            "--json",
            "--seed",
            &seed.to_string(),
            "--max-tokens",
            "24",
            "a boat",
        ]);
        assert_eq!(alone[0]["candidates"], r["candidates"]);
    }
    assert_eq!(
        records(&["rewrite", "--json", "--seed", "5", "--max-tokens", "4", "a boat"])[0]["seed"],
        5
    );
}

#[test]
fn prompts_of_one_request_have_seeds_by_their_places() {
    let f = tempfile::tempdir().unwrap();
    let file = f.path().join("requests.jsonl");
    let mut lines = String::new();
    for (id, prompt) in [("many", json!(["a boat", "a boat", "a boat"])), ("one", json!("a boat"))]
    {
        let body = json!({
            "prompt": prompt, "seed": 5, "max_tokens": 24, "variety": 0.3, "style": "anime",
        });
        lines += &format!(
            "{}\n",
            json!({ "custom_id": id, "method": "POST", "url": "/v1/rewrite", "body": body })
        );
    }
    let body = json!({ "prompt": "a boat", "max_tokens": 8 });
    lines +=
        &format!("{}\n", json!({ "custom_id": "seedless", "url": "/v1/rewrite", "body": body }));
    for (field, value) in
        [("style", json!("none such")), ("style", json!("/etc/passwd")), ("variety", json!(2))]
    {
        let body = json!({ "prompt": "a boat", (field): value });
        lines +=
            &format!("{}\n", json!({ "custom_id": field, "url": "/v1/rewrite", "body": body }));
    }
    std::fs::write(&file, lines).unwrap();
    let answers = records(&[
        "rewrite",
        "--format",
        "openai",
        "--seed",
        "8",
        "--input",
        file.to_str().unwrap(),
    ]);
    let results = |i: usize| answers[i]["response"]["body"]["results"].as_array().unwrap();
    let seeds: Vec<u64> = results(0).iter().map(|r| r["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, [1, 2, 3].map(|n| derived_seed(5, Derived::Prompt, n)));
    assert_eq!(results(1)[0]["seed"], 5);
    assert_eq!(results(2)[0]["seed"], derived_seed(8, Derived::Prompt, 3));
    for (answer, param) in answers[3..].iter().zip(["style", "style", "variety"]) {
        assert_eq!(answer["response"]["status_code"], 400);
        assert_eq!(answer["response"]["body"]["error"]["param"], param, "{answer}");
    }
}

#[test]
fn parts_of_a_prompt_have_seeds_of_their_own() {
    let parts = work("a red cat BREAK a blue dog BREAK rain", 9, Additions::default());
    let seeds: Vec<u64> = parts.iter().map(|w| w.1.sampling.seed).collect();
    assert_eq!(seeds, [9, derived_seed(9, Derived::Part, 1), derived_seed(9, Derived::Part, 2)]);
    // the medium that one part names is that of all
    let parts = work("a photo of a red cat BREAK a blue dog", 9, Additions::default());
    assert!(parts.iter().all(|w| w.1.ban.find("a blue dog, digital painting").is_some()));
    assert!(
        work("a red cat BREAK a blue dog", 9, Additions::default())
            .iter()
            .all(|w| w.1.ban.is_empty())
    );
}

#[test]
fn photos_are_not_called_paintings_unless_that_is_allowed() {
    let f = tempfile::tempdir().unwrap();
    let input = repeated(f.path(), "a photo of a wizard in a forest", 60);
    let outputs = |more: &[&str]| {
        let flags =
            ["rewrite", "--seed", "1", "--temperature", "1.5", "--top-p", "1", "--input", &input];
        records(&[&flags[..], more].concat())
    };
    let contradicting = |more: &[&str]| {
        outputs(more).iter().filter(|r| Mediums::built_in().contradicts(text(r))).count()
    };
    assert_eq!(contradicting(&[]), 0);
    // the phrases of a medium that a photo excludes are banned, whatever the model would like to
    // say
    let free =
        work("a photo of a wizard", 1, Additions { any_medium: true, ..Additions::default() });
    assert!(free[0].1.ban.is_empty());
    assert!(outputs(&["--no-artists"]).iter().all(|r| {
        !r["candidates"][0]["added"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| names_artist(p.as_str().unwrap()))
    }));
}

#[test]
fn styles_say_what_they_are_and_users_bring_their_own() {
    let f = tempfile::tempdir().unwrap();
    let input = repeated(f.path(), "a lighthouse at night", 20);
    let style = |style: &str| {
        records(&[
            "rewrite",
            "--seed",
            "2",
            "--max-tokens",
            "60",
            "--style",
            style,
            "--input",
            &input,
        ])
    };
    for name in ["photo", "anime", "watercolor", "pixel"] {
        let media = Mediums::built_in();
        let of_style =
            work("x", 1, Additions { style: Style::built_in(name), ..Additions::default() });
        let outputs = style(name);
        let named = outputs.iter().filter(|r| media.of(text(r)).is_some_and(|m| m != 0)).count();
        // the model may lose a word of its input now and then
        assert!(named >= 16, "{name}: {named} {}", text(&outputs[0]));
        for r in &outputs {
            assert_eq!(of_style[0].1.ban.find(text(r)), None, "{name}: {}", text(r));
        }
    }
    let own = f.path().join("mine.txt");
    std::fs::write(&own, "name: stained glass\nban: 8k, highly detailed\n").unwrap();
    let outputs = style(own.to_str().unwrap());
    assert!(
        outputs.iter().filter(|r| text(r).contains("stained glass")).count() >= 16,
        "{}",
        text(&outputs[0])
    );
    assert!(outputs.iter().all(|r| !text(r).to_lowercase().contains("highly detailed")));
    for (flags, word) in [
        (["--style", "phto"], "photo, product"),
        (["--style", "no/such.txt"], "no/such.txt"),
        (["--variety", "1.5"], "--variety 1.5"),
    ] {
        let out = run(&[&["rewrite"], &flags[..], &["a cat"]].concat());
        let line = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{line}");
        assert!(line.lines().count() == 1 && line.contains(word), "{line}");
    }
}
