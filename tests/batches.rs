//! Files of prompts: packed, patterned, cut into parts, interrupted, in OpenAI's form; and rewrites
//! that are held to their prompts.

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
    let plain: Vec<String> =
        (0..3).map(|i| write(f.path(), &format!("plain-{i}.txt"), texts[i])).collect();
    let gzip = f.path().join("packed-0.txt.gz");
    let mut out =
        flate2::write::GzEncoder::new(std::fs::File::create(&gzip).unwrap(), Default::default());
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
    assert_eq!(
        found,
        [of("a fox", 1), of("a hen", 3), of("a boat", 4), of("a bridge", 5), of("a tower", 6)]
    );
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
        assert!(
            out.status.code() == Some(2) && message.contains(word) && message.lines().count() == 1,
            "{message}"
        );
    }
}

#[test]
fn parts_make_up_the_whole() {
    let f = tempfile::tempdir().unwrap();
    let input = write(
        f.path(),
        "in.txt",
        &(0..10).map(|i| format!("a fox number {i}\n")).collect::<String>(),
    );
    let by_line = |text: &str| {
        lines(text)
            .into_iter()
            .map(|l| (l["line"].as_u64().unwrap(), l))
            .collect::<BTreeMap<_, _>>()
    };
    let whole = by_line(&rewrite(&["--input", &input]));
    let mut parts = BTreeMap::new();
    for shard in ["1/3", "2/3", "3/3"] {
        let part = by_line(&rewrite(&["--input", &input, "--shard", shard]));
        assert!((3..=4).contains(&part.len()));
        parts.extend(part);
    }
    assert_eq!(parts, whole);
    for wrong in ["0/3", "4/3", "1", "a/b"] {
        assert_eq!(
            bprompt(&["rewrite", "--input", &input, "--shard", wrong]).status.code(),
            Some(2)
        );
    }
}

#[test]
fn text_output_resumes_where_it_was() {
    let f = tempfile::tempdir().unwrap();
    // lines without a prompt have no result
    let text: String =
        (0..9).map(|i| format!("a fox number {i}\n{}", ["", "\n", "\n\n"][i % 3])).collect();
    let input = write(f.path(), "in.txt", &text);
    for more in [&[][..], &["--shard", "2/2"]] {
        let whole = f.path().join(format!("whole-{}.txt", more.len()));
        let run = |output: &Path, extra: &[&str]| {
            let output = output.to_str().unwrap();
            rewrite(&[&["-n", "2", "--input", &input, "--output", output], more, extra].concat());
        };
        run(&whole, &["--force"]);
        let expected = std::fs::read_to_string(&whole).unwrap();
        for kept in [0, 1, 3, 4, 7] {
            let cut = f.path().join(format!("cut-{}.txt", more.len()));
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
                json!({
                    "messages": [{ "role": "user", "content": format!("a fox {id}") }],
                    "seed": id,
                    "max_tokens": 9,
                }),
            ),
            1 => (
                "/v1/completions",
                json!({
                    "prompt": "a hen", "temperature": if id == 4 { -1 } else { 0 }, "stream": true,
                }),
            ),
            _ => (
                "/v1/rewrite",
                json!({ "prompt": ["a boat", "a bridge"], "seed": id, "max_tokens": 9 }),
            ),
        };
        json!({ "custom_id": format!("r{id}"), "method": "POST", "url": url, "body": body })
            .to_string()
            + "\n"
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
            _ => assert!(
                r["response"]["status_code"] == 200
                    && body["usage"]["completion_tokens"].as_u64() > Some(0)
            ),
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
    let bad = write(
        f.path(),
        "bad.jsonl",
        "{\"custom_id\": \"x\", \"url\": \"/v1/images\", \"body\": {}}\n",
    );
    let out = bprompt(&["rewrite", "--format", "openai", "--input", &bad]);
    assert!(
        out.status.code() == Some(2)
            && String::from_utf8_lossy(&out.stderr).contains("line 1: has the url")
    );
}

/// Runs something that must fail: status 2, and its last line on standard error.
fn failure(args: &[&str]) -> String {
    let out = bprompt(args);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
    text.lines().last().unwrap_or_default().to_owned()
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// The weights decide whether results go on, not where they lie; and so does what the model
/// recommends.
#[test]
fn openai_results_go_on_with_the_same_weights_alone() {
    let f = tempfile::tempdir().unwrap();
    let (here, there) = (f.path().join("here"), f.path().join("there"));
    std::fs::create_dir(&here).unwrap();
    for entry in
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model")).unwrap()
    {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), here.join(entry.file_name())).unwrap();
    }
    let request = |i: usize| {
        let body = json!({ "prompt": "a fox, ", "max_tokens": 3, "seed": i });
        json!({ "custom_id": format!("r{i}"), "url": "/v1/completions", "body": body }).to_string()
            + "\n"
    };
    let input = write(f.path(), "in.jsonl", &(0..3).map(request).collect::<String>());
    let output = f.path().join("out.jsonl");
    let run =
        ["rewrite", "--format", "openai", "--input", &input, "--output", path(&output), "--model"];
    stdout(&[&run[..], &[path(&here)]].concat());
    let whole = std::fs::read_to_string(&output).unwrap();
    let first = whole.split_inclusive('\n').next().unwrap();
    let resume = [&run[..], &[path(&there), "--resume"]].concat();
    std::fs::rename(&here, &there).unwrap();
    std::fs::write(&output, first).unwrap();
    stdout(&resume);
    let resumed = std::fs::read_to_string(&output).unwrap();
    assert!(resumed.starts_with(first));
    let texts = |text: &str| -> Vec<Value> {
        lines(text).iter().map(|r| r["response"]["body"]["choices"][0]["text"].clone()).collect()
    };
    assert_eq!(texts(&resumed), texts(&whole));
    // other weights, or other recommendations, under the same name
    let change = |file: &str, edit: &dyn Fn(&mut Vec<u8>)| {
        let path = there.join(file);
        let before = std::fs::read(&path).unwrap();
        let mut bytes = before.clone();
        edit(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        std::fs::write(&output, first).unwrap();
        let message = failure(&resume);
        assert!(message.contains("was begun with other settings"), "{message}");
        assert_eq!(std::fs::read_to_string(&output).unwrap(), first);
        std::fs::write(&path, before).unwrap();
        message
    };
    // the last value of the last tensor becomes another number
    let message = change("model.safetensors", &|bytes| {
        let last = bytes.len() - 2;
        bytes[last] ^= 1;
    });
    assert!(message.contains("--model weights "), "{message}");
    let message =
        change("generation_config.json", &|bytes| *bytes = b"{\"temperature\": 0.25}".to_vec());
    assert!(message.contains("--temperature "), "{message}");
    stdout(&resume);
}

fn numbered(count: usize) -> String {
    (0..count).map(|i| format!("a fox number {i}\n")).collect()
}

#[test]
#[cfg(unix)]
fn inputs_are_never_written_over() {
    let f = tempfile::tempdir().unwrap();
    let text =
        "a fox, highly detailed, digital painting, artstation, concept art, sharp focus, 8k\n"
            .repeat(3);
    let input = write(f.path(), "in.txt", &text);
    let (soft, hard) = (f.path().join("soft.txt"), f.path().join("hard.txt"));
    std::os::unix::fs::symlink(&input, &soft).unwrap();
    std::fs::hard_link(&input, &hard).unwrap();
    let ban = write(f.path(), "ban.txt", "fog\n");
    for output in [&input, path(&soft), path(&hard)] {
        for args in [
            &["rewrite", "--input", &input, "--output", output, "--force"][..],
            &["rewrite", "--input", &input, "--output", output, "--resume"],
            &["data", "pairs", "--input", &input, "--output", output, "--force"],
            &["train", "tokenizer", "--input", &input, "--output", output, "--force"],
        ] {
            assert!(failure(args).contains("is the same file as the input"), "{args:?}");
        }
    }
    let other = ["rewrite", "--input", &input, "--ban", &ban, "--output", &ban, "--force"];
    assert!(
        failure(&other).contains("is the same file as the input"),
        "a list of phrases is read too"
    );
    for command in ["rewrite --seed 1", "eval --limit 1"] {
        let redirected = format!(
            "{} {command} --input {input} >> {}",
            env!("CARGO_BIN_EXE_bprompt"),
            path(&hard)
        );
        let out = Command::new("sh").args(["-c", &redirected]).output().unwrap();
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.code() == Some(2) && message.contains("standard output: is the same file"),
            "{message}"
        );
    }
    assert_eq!(std::fs::read_to_string(&input).unwrap(), text);
    assert_eq!(std::fs::read_to_string(&ban).unwrap(), "fog\n");
}

#[test]
fn a_good_output_stays_until_another_is_whole() {
    let f = tempfile::tempdir().unwrap();
    let good = numbered(3);
    let output = write(f.path(), "out.jsonl", "good\n");
    let partial = f.path().join("out.jsonl.partial");
    let run = |input: &str, more: &[&str]| {
        bprompt(
            &[&["rewrite"], &QUICK[..], &["--input", input, "--output", &output], more].concat(),
        )
    };
    let bad_first = write(f.path(), "bad.jsonl", "{\"prompt\": \n");
    assert_eq!(run(&bad_first, &["--force"]).status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "good\n");
    assert_eq!(std::fs::read_dir(f.path()).unwrap().count(), 2, "nothing is left behind");
    // what was finished before a bad line is kept beside it, and gone on with
    let bad_last = write(f.path(), "in.txt", &format!("{good}\0\n"));
    assert_eq!(run(&bad_last, &["--force"]).status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "good\n");
    assert_eq!(std::fs::read_to_string(&partial).unwrap().lines().count(), 3);
    assert!(run(&bad_last, &["--resume", "--skip-bad-lines"]).status.success());
    assert_eq!(lines(&std::fs::read_to_string(&output).unwrap()).len(), 3);
    assert!(!partial.exists());
}

#[test]
fn what_was_finished_before_a_bad_line_is_written() {
    let f = tempfile::tempdir().unwrap();
    let input = write(f.path(), "in.txt", &format!("{}\0\n{}", numbered(70), numbered(30)));
    let output = f.path().join("out.jsonl");
    let args = [&["rewrite"], &QUICK[..], &["--input", &input, "--output", path(&output)]].concat();
    assert!(
        failure(&args).contains(
            "in.txt, line 71: has a NUL character; expected text; --skip-bad-lines goes on"
        )
    );
    assert_eq!(lines(&std::fs::read_to_string(&output).unwrap()).len(), 70);
}

/// Numbers of settings are read back as they were written, to the last digit.
#[test]
fn resuming_with_the_same_fractions_goes_on() {
    let f = tempfile::tempdir().unwrap();
    let input = write(f.path(), "in.txt", &numbered(3));
    let output = f.path().join("out.jsonl");
    let fractions = [
        "--top-p",
        "0.98",
        "--min-p",
        "0.03",
        "--repetition-penalty",
        "1.21",
        "--temperature",
        "0.7",
    ];
    let run = [
        &[
            "rewrite",
            "--seed",
            "3",
            "--max-tokens",
            "9",
            "--input",
            &input,
            "--output",
            path(&output),
        ],
        &fractions[..],
    ];
    stdout(&run.concat());
    let whole = std::fs::read_to_string(&output).unwrap();
    std::fs::write(&output, whole.split_inclusive('\n').take(1).collect::<String>()).unwrap();
    stdout(&[&run.concat()[..], &["--resume"]].concat());
    assert_eq!(std::fs::read_to_string(&output).unwrap(), whole);
}

#[test]
fn resuming_with_other_settings_or_in_company_is_refused() {
    let f = tempfile::tempdir().unwrap();
    let input = write(f.path(), "in.txt", &numbered(4));
    let other = write(f.path(), "other.txt", &numbered(5));
    let output = f.path().join("out.jsonl");
    let base = ["rewrite", "--seed", "3", "--max-tokens", "9", "--output", path(&output)];
    stdout(&[&base[..], &["--input", &input]].concat());
    let whole = std::fs::read_to_string(&output).unwrap();
    let cut: String = whole.split_inclusive('\n').take(2).collect();
    std::fs::write(&output, &cut).unwrap();
    let resume = |more: &[&str]| {
        let args = [&["rewrite", "--resume", "--output", path(&output)], more].concat();
        args.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let failure = |args: Vec<String>| failure(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let same = ["--seed", "3", "--max-tokens", "9", "--input", &input];
    for (more, flag) in [
        (&["--seed", "4", "--max-tokens", "9", "--input", &input][..], "--seed 3 then, 4 now"),
        (&["--seed", "3", "--max-tokens", "8", "--input", &input], "--max-tokens 9 then, 8 now"),
        (&["--seed", "3", "--max-tokens", "9", "--input", &other], "--input"),
        (&[&same[..], &["-n", "2"]].concat(), "--candidates 1 then, 2 now"),
        (&[&same[..], &["--format", "text"]].concat(), "--format jsonl then, text now"),
        (&[&same[..], &["--shard", "1/2"]].concat(), "--shard 1/1 then, 1/2 now"),
        (&[&same[..], &["--template", "v1"]].concat(), "--template"),
        (&[&same[..], &["--temperature", "0.5"]].concat(), "--temperature"),
        (&[&same[..], &["--ban", "fog"]].concat(), "--ban [] then, [\"fog\"] now"),
        (&[&same[..], &["--min-kept", "0.31"]].concat(), "--min-kept"),
        (&[&same[..], &["--logit-bias", "9=-3"]].concat(), "--logit-bias"),
        (&[&same[..], &["--dtype", "f32"]].concat(), "--dtype auto then, f32 now"),
    ] {
        let message = failure(resume(more));
        assert!(
            message.contains("was begun with other settings") && message.contains(flag),
            "{message}"
        );
        assert_eq!(std::fs::read_to_string(&output).unwrap(), cut);
    }
    // one process at a time
    let held = std::fs::File::options().append(true).open(&output).unwrap();
    held.lock().unwrap();
    assert!(failure(resume(&same)).contains("another process is writing to it"));
    drop(held);
    // an input of that name whose lines are others
    let before = std::fs::read_to_string(&input).unwrap();
    std::fs::write(&input, before.replace("fox", "hen")).unwrap();
    assert!(failure(resume(&same)).contains("--input"));
    std::fs::write(&input, before).unwrap();
    // the seed need not be said again
    let again = resume(&["--max-tokens", "9", "--input", &input]);
    stdout(&again.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(std::fs::read_to_string(&output).unwrap(), whole);
}

#[test]
fn packed_outputs_are_gone_on_with() {
    let f = tempfile::tempdir().unwrap();
    let input = write(f.path(), "in.txt", &numbered(6));
    let whole = rewrite(&["--input", &input]);
    let unpack = |file: &Path| {
        let bytes = std::fs::read(file).unwrap();
        let mut text = String::new();
        match file.extension().unwrap().to_str().unwrap() {
            "gz" => drop(std::io::Read::read_to_string(
                &mut flate2::read::MultiGzDecoder::new(&bytes[..]),
                &mut text,
            )),
            _ => text = String::from_utf8(zstd::decode_all(&bytes[..]).unwrap()).unwrap(),
        }
        text
    };
    for ending in ["gz", "zst"] {
        let output = f.path().join(format!("out.jsonl.{ending}"));
        // the rest comes later, behind a part that was cut
        write(f.path(), "in.txt", &numbered(4));
        rewrite(&["--input", &input, "--output", path(&output)]);
        assert!(whole.starts_with(&unpack(&output)));
        let mut file = std::fs::File::options().append(true).open(&output).unwrap();
        file.write_all(&std::fs::read(&output).unwrap()[..30]).unwrap();
        write(f.path(), "in.txt", &numbered(6));
        rewrite(&["--input", &input, "--output", path(&output), "--resume"]);
        assert_eq!(unpack(&output), whole);
        assert_eq!(rewrite(&["--input", path(&output)]).lines().count(), 6, "and is read back");
    }
}

#[test]
#[cfg(unix)]
fn prompts_come_from_pipes_and_results_go_to_them() {
    let f = tempfile::tempdir().unwrap();
    let piped = |args: &str| {
        let shell = format!(
            "printf 'a fox\\na hen\\n' | {} rewrite {}",
            env!("CARGO_BIN_EXE_bprompt"),
            args
        );
        let out = Command::new("sh").current_dir(f.path()).args(["-c", &shell]).output().unwrap();
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let quick = QUICK.join(" ");
    let text = piped(&quick);
    assert_eq!(text.lines().count(), 2);
    let json = lines(&piped(&format!("{quick} --json")));
    let texts: Vec<&str> =
        json.iter().map(|l| l["candidates"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), texts);
    assert_eq!(piped(&format!("{quick} -o /dev/stdout")), text);
    assert_eq!(piped(&format!("{quick} -o /dev/stdout > redirected; cat redirected")), text);
    let fifo = format!(
        "mkfifo pipe; cat pipe & {} rewrite {quick} --json -o pipe 'a fox' 'a hen'; wait",
        env!("CARGO_BIN_EXE_bprompt")
    );
    let out = Command::new("sh").current_dir(f.path()).args(["-c", &fifo]).output().unwrap();
    assert_eq!(lines(&String::from_utf8(out.stdout).unwrap()), json);
    assert!(
        failure(&["rewrite", "--input", "/dev/null", "--resume", "--output", "/dev/null"])
            .contains("--resume needs a file")
    );
}

#[test]
fn records_have_settings_of_their_own() {
    let f = tempfile::tempdir().unwrap();
    let records = [
        json!({ "prompt": "a fox", "n": 3, "seed": 9, "id": "x" }),
        json!({ "prompt": "a fox", "temperature": 0, "max_tokens": 5, "wind": [1] }),
        json!({
            "prompt": "a fox", "keep": "red umbrella", "ban": ["artstation"], "min_kept": 0.5,
            "top_k": 5,
        }),
        json!({
            "prompt": "a fox", "frequency_penalty": 1.5, "presence_penalty": 1, "top_p": 0.5,
            "min_p": 0.01,
        }),
    ];
    let input =
        write(f.path(), "in.jsonl", &records.iter().map(|r| format!("{r}\n")).collect::<String>());
    let batch = lines(&rewrite(&["--input", &input]));
    for (i, flags) in [
        &["-n", "3"][..],
        &["--temp", "0", "--max-new-tokens", "5"],
        &["--keep", "red umbrella", "--ban", "artstation", "--min-kept", "0.5", "--top-k", "5"],
        &[
            "--frequency-penalty",
            "1.5",
            "--presence-penalty",
            "1",
            "--top-p",
            "0.5",
            "--min-p",
            "0.01",
        ],
    ]
    .iter()
    .enumerate()
    {
        let tokens = if i == 1 { &[][..] } else { &["--max-tokens", "16"] };
        let seed = batch[i]["seed"].to_string();
        let alone = lines(&stdout(
            &[&["rewrite", "--json", "a fox", "--seed", &seed], *flags, tokens].concat(),
        ));
        assert_eq!(batch[i]["candidates"], alone[0]["candidates"], "{}", records[i]);
    }
    assert_eq!((&batch[0]["id"], &batch[0]["seed"]), (&json!("x"), &json!(9)));
    let bad = write(
        f.path(),
        "bad.jsonl",
        "{\"prompt\": \"a fox\"}\n{\"prompt\": \"a fox\", \"top_p\": 2}\n",
    );
    assert!(
        failure(&["rewrite", "--input", &bad])
            .contains("bad.jsonl, line 2: \"top_p\" 2 is outside (0, 1]")
    );
    let text = ["rewrite", "--input", &input, "--format", "text"];
    assert!(failure(&text).contains("line 1: has its own \"n\""));
}

#[test]
fn what_is_no_prompt_is_named() {
    let f = tempfile::tempdir().unwrap();
    let long = "x".repeat(3 << 20);
    // three hundred megabytes in a small file
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    (0..300).for_each(|_| bomb.write_all(&vec![b'x'; 1 << 20]).unwrap());
    std::fs::write(f.path().join("bomb.txt.gz"), bomb.finish().unwrap()).unwrap();
    write(f.path(), "long.txt", &long);
    write(f.path(), "list.jsonl", "[\"a fox\", \"a hen\"]\n");
    write(f.path(), "text.jsonl", "\"a fox\"\n");
    write(f.path(), "wide.jsonl", &format!("{{\"prompt\": \"{}\"}}\n", "x".repeat(70_000)));
    for (name, word) in [
        (
            "bomb.txt.gz",
            "line 1: is far longer than the 65536 bytes that --max-prompt-bytes allows",
        ),
        ("long.txt", "line 1: is far longer than"),
        ("wide.jsonl", "line 1: has a prompt of 70000 bytes; --max-prompt-bytes allows 65536"),
        ("list.jsonl", "line 1: is a JSON array; expected an object"),
        ("text.jsonl", "line 1: is a JSON string; expected an object"),
    ] {
        let message = failure(&["rewrite", "--input", path(&f.path().join(name))]);
        assert!(message.contains(word) && message.len() < 400, "{message}");
    }
    let wide = "x".repeat(70_000);
    for args in [&["rewrite", &wide][..], &["generate", "--prompt", &wide]] {
        assert!(failure(args).contains("--max-prompt-bytes allows 65536"));
    }
    let (pairs, wide) = (f.path().join("pairs.jsonl"), f.path().join("wide.jsonl"));
    for args in [
        &["data", "pairs", "--input", path(&wide), "--output", path(&pairs)][..],
        &["eval", "--input", path(&wide)],
        &["eval", "--input", path(&wide), "--max-prompt-bytes", "69999"],
    ] {
        assert!(failure(args).contains(
            "wide.jsonl, prompt 1: has a prompt of 70000 bytes; --max-prompt-bytes allows 6"
        ));
    }
    // line ends and a mark of the byte order are no part of a prompt
    let marked = write(f.path(), "marked.txt", "\u{feff}a fox\r\n\r\na hen\r\n");
    let prompts: Vec<Value> =
        lines(&rewrite(&["--input", &marked])).iter().map(|l| l["prompt"].clone()).collect();
    assert_eq!(prompts, ["a fox", "a hen"]);
}

#[test]
fn failed_openai_requests_are_counted_under_their_names() {
    let f = tempfile::tempdir().unwrap();
    let request = |id: &str, model: &str, more: Value| {
        let messages = json!([{ "role": "user", "content": "a fox" }]);
        let mut body = json!({ "model": model, "messages": messages, "max_tokens": 5 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body })
            .to_string()
            + "\n"
    };
    let text = [
        request("good", "gpt-5-mini", json!({})),
        request("cold", "rewriter", json!({ "temperature": -1 })),
        "{\"custom_id\": \"odd\", \"url\": \"/v1/images\", \"body\": {}}\n".to_owned(),
    ];
    let input = write(f.path(), "in.jsonl", &text.concat());
    let run = |input: &str| {
        let flags = ["rewrite", "--format", "openai", "--served-model-name", "rewriter", "--input"];
        let out = bprompt(&[&flags[..], &[input]].concat());
        (
            out.status.code(),
            lines(&String::from_utf8(out.stdout).unwrap()),
            String::from_utf8(out.stderr).unwrap(),
        )
    };
    let (code, results, errors) = run(&input);
    assert_eq!(code, Some(0), "{errors}");
    let ids: Vec<&Value> = results.iter().map(|r| &r["custom_id"]).collect();
    assert_eq!(ids, ["good", "cold", "odd"]);
    assert_eq!(results[0]["response"]["status_code"], 200);
    assert_eq!(results[1]["response"]["status_code"], 400);
    assert!(results[2]["error"]["message"].as_str().unwrap().contains("/v1/images"));
    assert!(
        errors.contains("requests for the model gpt-5-mini were answered by rewriter"),
        "{errors}"
    );
    assert!(errors.contains("2 of 3 requests failed; the first: line 2: status 400"), "{errors}");
    let (code, results, errors) = run(&write(f.path(), "bad.jsonl", &text[1..].concat()));
    assert!(
        code == Some(2) && results.len() == 2 && errors.contains("all of 2 requests failed"),
        "{errors}"
    );
}

#[test]
fn rewrites_are_held_to_their_prompts() {
    let f = tempfile::tempdir().unwrap();
    let ban = write(f.path(), "ban.txt", "artstation\ngreg rutkowski\noctane render\nby\n");
    let prompt = "two (grey cats:1.3) without collars BREAK a street at night <lora:rain:0.5>";
    let guarded = [
        "--json",
        "-n",
        "4",
        "--seed",
        "2",
        "--min-kept",
        "1",
        "--max-clip-tokens",
        "40",
        "--ban",
        &ban,
    ];
    let out = stdout(
        &[&["rewrite"], &guarded[..], &["--keep", "red umbrella,film grain", prompt]].concat(),
    );
    let object: Value = serde_json::from_str(&out).unwrap();
    let candidates = object["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 4);
    for c in candidates {
        let text = c["text"].as_str().unwrap();
        for part in [
            "two",
            "(grey cats:1.3)",
            "collars",
            " BREAK ",
            "street",
            "<lora:rain:0.5>",
            "red umbrella",
            "film grain",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let words =
            format!(" {} ", text.to_lowercase().replace(|c: char| !c.is_alphanumeric(), " "));
        assert!(
            [" artstation ", " rutkowski ", " octane render ", " by "]
                .iter()
                .all(|b| !words.contains(b)),
            "{text}"
        );
        assert!(c["kept"] == 1.0 && c["clip_tokens"].as_u64().unwrap() <= 40, "{c}");
    }
}

#[test]
fn rewrites_that_cannot_be_had_are_explained() {
    // what no model says comes from the prompt itself, with the reason
    let out = stdout(&[
        "rewrite",
        "--json",
        "--seed",
        "2",
        "--min-kept",
        "1",
        "seventeen xylophones under a zorbing quokka",
    ]);
    let c = serde_json::from_str::<Value>(&out).unwrap()["candidates"][0].clone();
    if c["source"] != "model" {
        assert!(
            c["text"].as_str().unwrap().starts_with("seventeen xylophones under a zorbing quokka")
        );
        assert!(c["reason"].as_str().unwrap().contains("kept"));
    }
    assert_eq!(c["kept"], 1.0);
    for (flags, word) in [
        (&["--keep", "by night", "--ban", "by"][..], "both to be kept and banned"),
        (&["--min-kept", "2"], "--min-kept"),
        (
            &["--keep", "a very long phrase of many words", "--max-tokens", "4"],
            "raise --max-tokens",
        ),
        (&["--max-clip-tokens", "1"], "--max-clip-tokens"),
    ] {
        let out = bprompt(&[&["rewrite", "a cat"], flags].concat());
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(2) && message.contains(word), "{message}");
    }
}
