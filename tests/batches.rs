//! Files of prompts: packed, patterned, cut into parts, interrupted, in OpenAI's form; and rewrites that are held to their prompts.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

fn bprompt(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bprompt")).args(args).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let out = bprompt(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

const QUICK: [&str; 4] = ["--seed", "3", "--max-tokens", "16"];

fn rewrite(args: &[&str]) -> String {
    stdout(&[&["rewrite"], &QUICK[..], args].concat())
}

#[test]
fn packed_files_and_patterns_read_as_plain_ones() {
    let f = tempfile::tempdir().unwrap();
    let texts = ["a fox\n\na hen\n", "a boat\na bridge", "a tower\n"];
    let plain: Vec<String> = (0..3).map(|i| write(f.path(), &format!("plain-{i}.txt"), texts[i])).collect();
    let gzip = f.path().join("packed-0.txt.gz");
    let mut out = flate2::write::GzEncoder::new(std::fs::File::create(&gzip).unwrap(), Default::default());
    out.write_all(texts[0].as_bytes()).unwrap();
    out.finish().unwrap();
    let zstd = f.path().join("packed-1.txt.zst");
    std::fs::write(&zstd, zstd::encode_all(texts[1].as_bytes(), 0).unwrap()).unwrap();
    std::fs::copy(&plain[2], f.path().join("packed-2.txt")).unwrap();

    let names: Vec<&str> = plain.iter().map(String::as_str).collect();
    let expected = rewrite(&[&["--input"], &names[..]].concat());
    let found: Vec<(Value, Value)> =
        lines(&expected).iter().map(|l| (l["prompt"].clone(), l["line"].clone())).collect();
    let of = |p: &str, n: u64| (json!(p), json!(n));
    assert_eq!(found, [of("a fox", 1), of("a hen", 3), of("a boat", 4), of("a bridge", 5), of("a tower", 6)]);
    let pattern = f.path().join("packed-*");
    assert_eq!(rewrite(&["--input", pattern.to_str().unwrap()]), expected);

    // damage is named
    let bytes = std::fs::read(&gzip).unwrap();
    std::fs::write(&gzip, &bytes[..bytes.len() / 2]).unwrap();
    for (args, word) in [
        (["--input", gzip.to_str().unwrap()], "packed-0.txt.gz"),
        (["--input", "/nowhere/*.txt"], "no file matches"),
        (["--input", f.path().to_str().unwrap()], "is a folder"),
    ] {
        let out = bprompt(&[&["rewrite"], &args[..]].concat());
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(2) && message.contains(word) && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn parts_make_up_the_whole() {
    let f = tempfile::tempdir().unwrap();
    let input = write(f.path(), "in.txt", &(0..10).map(|i| format!("a fox number {i}\n")).collect::<String>());
    let by_line =
        |text: &str| lines(text).into_iter().map(|l| (l["line"].as_u64().unwrap(), l)).collect::<BTreeMap<_, _>>();
    let whole = by_line(&rewrite(&["--input", &input]));
    let mut parts = BTreeMap::new();
    for shard in ["1/3", "2/3", "3/3"] {
        let part = by_line(&rewrite(&["--input", &input, "--shard", shard]));
        assert!((3..=4).contains(&part.len()));
        parts.extend(part);
    }
    assert_eq!(parts, whole);
    for wrong in ["0/3", "4/3", "1", "a/b"] {
        assert_eq!(bprompt(&["rewrite", "--input", &input, "--shard", wrong]).status.code(), Some(2));
    }
}

#[test]
fn text_output_resumes_where_it_was() {
    let f = tempfile::tempdir().unwrap();
    // lines without a prompt have no result
    let text: String = (0..9).map(|i| format!("a fox number {i}\n{}", ["", "\n", "\n\n"][i % 3])).collect();
    let input = write(f.path(), "in.txt", &text);
    for more in [&[][..], &["--shard", "2/2"]] {
        let whole = f.path().join("whole.txt");
        let run = |output: &Path, extra: &[&str]| {
            let output = output.to_str().unwrap();
            rewrite(&[&["-n", "2", "--input", &input, "--output", output], more, extra].concat());
        };
        run(&whole, &["--force"]);
        let expected = std::fs::read_to_string(&whole).unwrap();
        for kept in [0, 1, 3, 4, 7] {
            let cut = f.path().join("cut.txt");
            let before: String = expected.split_inclusive('\n').take(kept).collect();
            std::fs::write(&cut, before + "half a li").unwrap();
            run(&cut, &["--resume"]);
            assert!(std::fs::read_to_string(&cut).unwrap() == expected, "{kept} lines kept");
        }
    }
}

#[test]
fn openai_batch_files_are_answered_in_their_form() {
    let f = tempfile::tempdir().unwrap();
    let request = |id: usize| {
        let (url, body) = match id % 3 {
            0 => (
                "/v1/chat/completions",
                json!({ "messages": [{ "role": "user", "content": format!("a fox {id}") }], "seed": id, "max_tokens": 9 }),
            ),
            1 => (
                "/v1/completions",
                json!({ "prompt": "a hen", "temperature": if id == 4 { -1 } else { 0 }, "stream": true }),
            ),
            _ => ("/v1/rewrite", json!({ "prompt": ["a boat", "a bridge"], "seed": id, "max_tokens": 9 })),
        };
        json!({ "custom_id": format!("r{id}"), "method": "POST", "url": url, "body": body }).to_string() + "\n"
    };
    let input = write(f.path(), "in.jsonl", &(0..9).map(request).collect::<String>());
    let output = f.path().join("out.jsonl");
    let output = output.to_str().unwrap();
    stdout(&["rewrite", "--format", "openai", "--input", &input, "--output", output]);
    let text = std::fs::read_to_string(output).unwrap();
    let results = lines(&text);
    assert_eq!(results.len(), 9);
    for (i, r) in results.iter().enumerate() {
        assert_eq!((&r["custom_id"], &r["error"]), (&json!(format!("r{i}")), &Value::Null));
        let body = &r["response"]["body"];
        match i {
            4 => assert_eq!(
                (&r["response"]["status_code"], &body["error"]["param"]),
                (&json!(400), &json!("temperature"))
            ),
            _ if i % 3 == 2 => assert_eq!(body["results"].as_array().unwrap().len(), 2),
            _ => assert!(r["response"]["status_code"] == 200 && body["usage"]["completion_tokens"].as_u64() > Some(0)),
        }
    }
    // resuming answers the rest alone
    let kept: String = text.split_inclusive('\n').take(5).collect();
    std::fs::write(output, kept.clone() + "{\"id").unwrap();
    stdout(&["rewrite", "--format", "openai", "--input", &input, "--output", output, "--resume"]);
    let resumed = std::fs::read_to_string(output).unwrap();
    assert!(resumed.starts_with(&kept));
    let ids = |l: &[Value]| l.iter().map(|r| r["custom_id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&lines(&resumed)), ids(&results));
    let bad = write(f.path(), "bad.jsonl", "{\"custom_id\": \"x\", \"url\": \"/v1/images\", \"body\": {}}\n");
    let out = bprompt(&["rewrite", "--format", "openai", "--input", &bad]);
    assert!(out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("line 1: has the url"));
}

#[test]
fn rewrites_are_held_to_their_prompts() {
    let f = tempfile::tempdir().unwrap();
    let ban = write(f.path(), "ban.txt", "artstation\ngreg rutkowski\noctane render\nby\n");
    let prompt = "two (grey cats:1.3) without collars BREAK a street at night <lora:rain:0.5>";
    let guarded = ["--json", "-n", "4", "--seed", "2", "--min-kept", "1", "--max-clip-tokens", "40", "--ban", &ban];
    let out = stdout(&[&["rewrite"], &guarded[..], &["--keep", "red umbrella,film grain", prompt]].concat());
    let object: Value = serde_json::from_str(&out).unwrap();
    let candidates = object["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 4);
    for c in candidates {
        let text = c["text"].as_str().unwrap();
        for part in
            ["two", "(grey cats:1.3)", "collars", " BREAK ", "street", "<lora:rain:0.5>", "red umbrella", "film grain"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        let words = format!(" {} ", text.to_lowercase().replace(|c: char| !c.is_alphanumeric(), " "));
        assert!(
            [" artstation ", " rutkowski ", " octane render ", " by "].iter().all(|b| !words.contains(b)),
            "{text}"
        );
        assert!(c["kept"] == 1.0 && c["clip_tokens"].as_u64().unwrap() <= 40, "{c}");
    }
    // what no model says comes from the prompt itself, with the reason
    let out =
        stdout(&["rewrite", "--json", "--seed", "2", "--min-kept", "1", "seventeen xylophones under a zorbing quokka"]);
    let c = serde_json::from_str::<Value>(&out).unwrap()["candidates"][0].clone();
    if c["source"] != "model" {
        assert!(c["text"].as_str().unwrap().starts_with("seventeen xylophones under a zorbing quokka"));
        assert!(c["reason"].as_str().unwrap().contains("kept"));
    }
    assert_eq!(c["kept"], 1.0);
    for (flags, word) in [
        (&["--keep", "by night", "--ban", "by"][..], "both to be kept and banned"),
        (&["--min-kept", "2"], "--min-kept"),
        (&["--keep", "a very long phrase of many words", "--max-tokens", "4"], "raise --max-tokens"),
        (&["--max-clip-tokens", "1"], "--max-clip-tokens"),
    ] {
        let out = bprompt(&[&["rewrite", "a cat"], flags].concat());
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(2) && message.contains(word), "{message}");
    }
}
