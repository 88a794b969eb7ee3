//! What `bprompt rewrite` and `bprompt eval` keep of prompts, as a user runs them.

use serde_json::Value;
use std::process::{Command, Output};

fn bprompt(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bprompt")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = bprompt(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Without a word about it, prompts come back with their meaning, byte for byte where the model
/// cannot know or write them.
#[test]
fn the_default_keeps_the_meaning() {
    let long = "an old wizard with a silver beard and a crooked hat reads a heavy leather book \
        beside a tall candle in a round stone \
                tower above a frozen harbour while two black ravens and a sleepy fox watch from \
                under the wooden stairs";
    for (prompt, source) in [
        ("a photo of a __animal__ wearing a {red|blue} hat in __city__", Some("phrases")),
        ("a cat 🐱🌧️ in the rain", Some("phrases")),
        ("Straße bei Nacht", Some("phrases")),
        ("кот в сапогах", Some("input")),
        ("a dog’s “good” bed", None),
        ("three cats without collars", None),
        (long, None),
    ] {
        let r = json(&["rewrite", "--json", "-n", "4", "--seed", "5", prompt]);
        for c in r["candidates"].as_array().unwrap() {
            assert!(c["kept"].as_f64().unwrap() >= 0.9, "{c}");
            let text = c["text"].as_str().unwrap();
            assert!(!text.contains('\u{fffd}'), "{text}");
            if c["source"] != "model" {
                assert!(
                    text.starts_with(prompt) && c["kept"] == 1.0 && c["reason"].is_string(),
                    "{c}"
                );
            }
            assert!(source.is_none_or(|s| c["source"] == s || c["source"] == "input"), "{c}");
        }
    }
    let off = json(&["rewrite", "--json", "--min-kept", "0", "--rounds", "1", "--seed", "5", long]);
    assert_eq!(off["candidates"][0]["source"], "model");
}

#[test]
fn facts_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("facts.jsonl");
    let line = r#"{"prompt": "two grey cats on a wall", "facts": [
        {"kind": "entity", "keywords": ["cats"]},
        {"kind": "count", "keywords": ["cats", "==2"]},
        {"kind": "attribute", "keywords": ["wall", "stone"]}]}"#;
    std::fs::write(&path, line.replace('\n', "")).unwrap();
    let file = path.to_str().unwrap();
    let r = json(&["eval", "--facts", file, "--min-kept", "1", "--seed", "1", "--json"]);
    let counts = |k: &Value| ["facts", "stated", "kept"].map(|n| k[n].as_u64().unwrap());
    let facts: Vec<_> = r["facts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| (k["kind"].as_str().unwrap(), counts(k)))
        .collect();
    assert_eq!(
        facts,
        [("entity", [1, 1, 1]), ("count", [1, 1, 1]), ("attribute", [1, 0, 0]), ("all", [3, 2, 2])],
        "the prompt does not say what the wall is made of"
    );
    let out = bprompt(&["eval", "--facts", file, "--seed", "1"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("facts kept, count"));
    let out = bprompt(&["eval", "--facts", file, "--min-words", "9"]);
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(2) && message.contains("holds no prompts of 9 to 20 words"),
        "{message}"
    );
}
