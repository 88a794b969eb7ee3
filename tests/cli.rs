//! The program as people run it.

mod program;

use program::{bprompt, failure, path, run, stdout, text};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn limits_that_would_refuse_everything_are_refused() {
    for flag in ["--header-timeout", "--body-timeout", "--body-limit"] {
        assert!(failure(&["serve", "--port", "0", flag, "0"]).contains(flag));
    }
}

#[test]
fn a_prompt_is_rewritten_and_a_seed_repeats_it() {
    let once = stdout(&["rewrite", "--seed", "7", "a cat in the rain"]);
    assert_eq!(once.lines().count(), 1);
    assert!(once.contains("cat") && once.split_whitespace().count() > 8, "{once}");
    assert_eq!(stdout(&["rewrite", "--seed", "7", "--threads", "1", "a cat in the rain"]), once);
    let json = stdout(&["rewrite", "-n", "5", "--seed", "7", "--json", "a cat in the rain"]);
    let value: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (value["prompt"].as_str(), value["seed"].as_u64()),
        (Some("a cat in the rain"), Some(7))
    );
    let candidates = value["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 5);
    assert_eq!(candidates[0]["text"], once.trim());
    for c in candidates {
        assert!(c["tokens"].as_u64().unwrap() > 1 && c["logprob"].as_f64().unwrap() < 0.0, "{c}");
        assert!(["stop", "length"].contains(&c["finish_reason"].as_str().unwrap()));
    }
    let lines = stdout(&["rewrite", "-n", "3", "--seed", "7", "a cat in the rain"]);
    assert_eq!(lines.lines().count(), 3);
}

#[test]
fn generate_reports_ids_and_log_probabilities() {
    let json = stdout(&[
        "generate",
        "--prompt",
        "Input: a fox\nOutput:",
        "--max-tokens",
        "9",
        "--temperature",
        "0",
        "--json",
        "--ignore-eos",
    ]);
    let v: Value = serde_json::from_str(&json).unwrap();
    let len = |k: &str| v[k].as_array().unwrap().len();
    assert_eq!(len("prompt_logprobs"), len("prompt_ids") - 1);
    assert_eq!((len("output_ids"), len("logprobs")), (9, 9));
    assert_eq!(v["finish_reason"], "length");
    // scoring the whole text gives the same log-probabilities that generating it gave
    let ids = ["prompt_ids", "output_ids"]
        .iter()
        .flat_map(|k| v[k].as_array().unwrap())
        .map(Value::to_string);
    let ids = ids.collect::<Vec<_>>().join(",");
    let scored: Value = serde_json::from_str(&stdout(&[
        "generate",
        "--prompt-ids",
        &ids,
        "--max-tokens",
        "1",
        "--temperature",
        "0",
        "--json",
    ]))
    .unwrap();
    let scored = scored["prompt_logprobs"].as_array().unwrap();
    for (a, b) in scored[scored.len() - 9..].iter().zip(v["logprobs"].as_array().unwrap()) {
        assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4, "{a} {b}");
    }
    let stopped = stdout(&[
        "generate",
        "--prompt",
        "Input: a fox\nOutput:",
        "--max-tokens",
        "30",
        "--temperature",
        "0",
        "--stop",
        "fox",
    ]);
    assert!(!stopped.contains("fox"), "{stopped}");
}

#[test]
fn mistakes_get_one_line_and_status_2() {
    let f = tempfile::tempdir().unwrap();
    let existing = f.path().join("out.jsonl");
    std::fs::write(&existing, "kept\n").unwrap();
    let input = f.path().join("in.txt");
    std::fs::write(&input, "a fox\n").unwrap();
    for (args, word) in [
        (vec!["rewrite", "--dtype", "int3", "a fox"], "int3"),
        (vec!["rewrite", "--device", "cuda", "--dtype", "f32", "a fox"], "--dtype bf16"),
        (vec!["bench", "llm", "--device", "cuda", "--dtype", "f32"], "--dtype bf16"),
        (vec!["rewrite"], "PROMPT"),
        (vec!["rewrite", ""], "empty"),
        (vec!["rewrite", "--top-p", "1.5", "a fox"], "--top-p 1.5"),
        (vec!["rewrite", "--temperature", "warm", "a fox"], "warm"),
        (vec!["rewrite", "--temperature", "-1", "a fox"], "--temperature -1 is outside [0, 100]"),
        (vec!["rewrite", "--max-tokens", "-5", "a fox"], "expected a whole number"),
        (vec!["rewrite", "--top-k", "-2", "a fox"], "0 or -1 for all"),
        (
            vec!["rewrite", "--frequency-penalty", "-3", "a fox"],
            "--frequency-penalty -3 is outside [-2, 2]",
        ),
        (vec!["rewrite", "--logit-bias", "5", "a fox"], "a token's id and a number"),
        (vec!["rewrite", "--logit-bias", "99999999=1", "a fox"], "99999999"),
        (
            vec!["rewrite", "--ban", "artists.txt", "a fox"],
            "--ban artists.txt: cannot read the file",
        ),
        (vec!["rewrite", "--keep", "@no such", "a fox"], "--keep @no such: cannot read the file"),
        (vec!["rewrite", "--max-prompt-bytes", "0", "a fox"], "--max-prompt-bytes"),
        (
            vec!["rewrite", "--output", "no/such/folder/out", "a fox"],
            "no/such/folder/out: cannot write",
        ),
        (vec!["rewrite", "-n", "0", "a fox"], "-n 0"),
        (vec!["rewrite", "--template", "no-such-file", "a fox"], "no-such-file"),
        (vec!["rewrite", "--model", "no/such/dir", "a fox"], "no/such/dir"),
        (vec!["rewrite", "--input", "no-such.txt"], "no-such.txt"),
        (vec!["rewrite", "--input", path(&input), "--output", path(&existing)], "exists already"),
        (vec!["inspect", path(f.path())], "config.json"),
        (vec!["generate", "--prompt-ids", "1,999999"], "999999"),
        (
            vec!["train", "sft", "--train", "none.jsonl", "--output", path(&existing)],
            "exists already",
        ),
        (vec!["bench", "llm", "--shape", "bloom-9"], "bloom-9"),
        (vec!["frobnicate"], "frobnicate"),
    ] {
        let line = failure(&args);
        assert!(line.contains(word), "{args:?}: {line}");
    }
    assert_eq!(std::fs::read_to_string(&existing).unwrap(), "kept\n");
    let long = "word ".repeat(3000);
    assert!(failure(&["rewrite", &long]).contains("context"));
}

/// Writes `count` prompts and returns the file.
fn prompts(folder: &Path, count: usize) -> std::path::PathBuf {
    let file = folder.join("in.jsonl");
    let mut out = std::fs::File::create(&file).unwrap();
    for i in 0..count {
        let long = if i % 3 == 0 { " standing beside an old lighthouse in the fog" } else { "" };
        writeln!(out, "{{\"id\": \"p{i}\", \"prompt\": \"a fox number {i}{long}\"}}").unwrap();
    }
    file
}

fn batch(input: &Path, output: &Path, more: &[&str]) -> Command {
    let mut c = bprompt(&[
        "rewrite",
        "--seed",
        "3",
        "--max-tokens",
        "40",
        "--input",
        path(input),
        "--output",
        path(output),
    ]);
    c.args(more);
    c
}

#[test]
fn batches_keep_order_and_ids_and_equal_single_rewrites() {
    let f = tempfile::tempdir().unwrap();
    let input = prompts(f.path(), 40);
    let output = f.path().join("out.jsonl");
    let done = batch(&input, &output, &[]).output().unwrap();
    assert!(done.status.success());
    assert!(
        !text(&done.stderr).contains("prompts,"),
        "no progress in a pipe: {}",
        text(&done.stderr)
    );
    let lines = std::fs::read_to_string(&output).unwrap();
    let values: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(values.len(), 40);
    for (i, v) in values.iter().enumerate() {
        assert_eq!(
            (v["id"].as_str().unwrap(), v["line"].as_u64()),
            (format!("p{i}").as_str(), Some(i as u64 + 1))
        );
    }
    // the seed beside a result gives it again
    let seed = values[7]["seed"].to_string();
    let alone =
        stdout(&["rewrite", "--json", "--seed", &seed, "--max-tokens", "40", "a fox number 7"]);
    let alone: Value = serde_json::from_str(&alone).unwrap();
    assert_eq!(values[7]["candidates"], alone["candidates"]);
    // text in, text out, over standard input and output
    let mut child = bprompt(&[
        "rewrite",
        "--seed",
        "3",
        "--max-tokens",
        "40",
        "--input",
        "-",
        "--format",
        "text",
    ])
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    // a line's seed comes from its number
    child.stdin.take().unwrap().write_all(b"\na fox number 1\na fox number 2\n").unwrap();
    let out = text(&child.wait_with_output().unwrap().stdout);
    assert_eq!(
        out.lines().collect::<Vec<_>>(),
        [1, 2].map(|i| values[i]["candidates"][0]["text"].as_str().unwrap())
    );
}

#[test]
#[cfg(unix)]
fn killed_and_interrupted_batches_resume_without_loss_or_repetition() {
    let f = tempfile::tempdir().unwrap();
    let input = prompts(f.path(), 400);
    let whole = f.path().join("whole.jsonl");
    assert!(batch(&input, &whole, &[]).status().unwrap().success());
    let expected = std::fs::read_to_string(&whole).unwrap();
    let output = f.path().join("cut.jsonl");
    let mut kills = 0;
    for (round, signal) in
        [libc::SIGKILL, libc::SIGINT, libc::SIGKILL, libc::SIGINT].into_iter().enumerate()
    {
        let more: &[&str] = if round == 0 { &[] } else { &["--resume"] };
        let mut child = batch(&input, &output, more).stderr(Stdio::null()).spawn().unwrap();
        let before = std::fs::metadata(&output).map_or(0, |m| m.len());
        // wait until this round has written something, then strike
        while std::fs::metadata(&output).map_or(0, |m| m.len()) <= before + 2000
            && child.try_wait().unwrap().is_none()
        {
            std::thread::sleep(Duration::from_millis(2));
        }
        // SAFETY: a signal to our own child, which was not waited for yet.
        unsafe { libc::kill(child.id() as i32, signal) };
        kills += u32::from(!child.wait().unwrap().success());
        let so_far = std::fs::read_to_string(&output).unwrap();
        let whole_lines = &so_far[..so_far.rfind('\n').map_or(0, |n| n + 1)];
        assert!(expected.starts_with(whole_lines));
        if signal == libc::SIGINT {
            assert_eq!(so_far, whole_lines, "an interrupted run leaves whole lines");
        }
    }
    assert!(kills > 0, "no run was caught in the act");
    // a write cut in the middle of a line
    let mut torn = std::fs::OpenOptions::new().append(true).open(&output).unwrap();
    torn.write_all(b"{\"id\":\"p9").unwrap();
    assert!(batch(&input, &output, &["--resume"]).status().unwrap().success());
    assert!(
        std::fs::read_to_string(&output).unwrap() == expected,
        "output differs from an undisturbed run"
    );
}

#[test]
fn bad_lines_are_named_or_skipped_and_counted() {
    let f = tempfile::tempdir().unwrap();
    let input = f.path().join("in.jsonl");
    std::fs::write(
        &input,
        b"{\"prompt\": \"a fox\"}\n{\"prompt\": \n{\"prompt\": \"a hen\"}\n\xff\xfe\n{\"x\": 1}\n",
    )
    .unwrap();
    let output = f.path().join("out.jsonl");
    let out = batch(&input, &output, &[]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("line 2"), "{}", text(&out.stderr));
    let out = batch(&input, &output, &["--force", "--skip-bad-lines"]).output().unwrap();
    assert!(out.status.success());
    assert!(text(&out.stderr).contains("skipped 3 bad lines: 2, 4, 5"), "{}", text(&out.stderr));
    let ids: Vec<Value> = std::fs::read_to_string(&output)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["line"].clone())
        .collect();
    assert_eq!(ids, [1, 3]);
    // nothing but bad lines replaces no good output, no lines at all make an empty one
    std::fs::write(&input, "{\"x\": 1}\n").unwrap();
    let out = batch(&input, &output, &["--force", "--skip-bad-lines"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("stays as it was"), "{}", text(&out.stderr));
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 2);
    std::fs::write(&input, "").unwrap();
    let out = batch(&input, &output, &["--force"]).output().unwrap();
    assert!(out.status.success());
    assert_eq!(std::fs::read(&output).unwrap(), b"");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_and_a_closed_pipe_ends_quietly() {
    let f = tempfile::tempdir().unwrap();
    let input = prompts(f.path(), 5);
    let out = batch(&input, Path::new("/dev/full"), &["--force"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("/dev/full"), "{}", text(&out.stderr));
    let shell = format!(
        "{} rewrite --input {} | head -n 1",
        env!("CARGO_BIN_EXE_bprompt"),
        path(&prompts(f.path(), 60))
    );
    let out = Command::new("sh").args(["-c", &shell]).output().unwrap();
    assert_eq!((text(&out.stdout).lines().count(), text(&out.stderr)), (1, String::new()));
}

#[test]
fn pairs_training_and_inspection_work_together() {
    let f = tempfile::tempdir().unwrap();
    let at = |name: &str| f.path().join(name).to_str().unwrap().to_owned();
    let styles = "highly detailed, digital painting, concept art, sharp focus, cinematic lighting, \
        octane render, 8k";
    let prompts: String =
        (0..60).map(|i| format!("a fox number {i} on a hill, {styles}\n")).collect();
    std::fs::write(at("prompts.txt"), prompts).unwrap();
    let table = stdout(&[
        "data",
        "pairs",
        "--input",
        &at("prompts.txt"),
        "--output",
        &at("pairs.jsonl"),
        "--min-tokens",
        "5",
    ]);
    assert!(table.contains("training pairs, derived"), "{table}");
    let sft = |more: &[&str]| {
        let pairs = at("pairs.jsonl");
        let out = at("run");
        let mut args = vec![
            "train",
            "sft",
            "--train",
            &pairs,
            "--output",
            &out,
            "--max-steps",
            "3",
            "--batch",
            "4",
        ];
        args.extend(more);
        run(&args)
    };
    assert!(sft(&[]).status.success());
    assert_eq!(sft(&[]).status.code(), Some(2), "an existing run is not overwritten");
    assert!(sft(&["--resume"]).status.success());
    let metrics = std::fs::read_to_string(f.path().join("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    let shown = stdout(&["inspect", &at("run")]);
    assert!(
        shown.contains("BLOOM") && shown.contains("bf16") && shown.contains("KV cache"),
        "{shown}"
    );
    let json: Value = serde_json::from_str(&stdout(&["inspect", "--json", &at("run")])).unwrap();
    assert_eq!(json["architecture"], "bloom");
    assert!(
        stdout(&["rewrite", "--model", &at("run"), "--temperature", "0", "a fox"]).contains("fox")
    );
    let report =
        stdout(&["eval", "--input", &at("pairs.jsonl"), "--limit", "3", "--json", "--seed", "1"]);
    assert_eq!(serde_json::from_str::<Value>(&report).unwrap()["prompts"], 3);
    let bench = stdout(&[
        "bench",
        "llm",
        "--prompt-tokens",
        "16",
        "--new-tokens",
        "4",
        "--repeats",
        "1",
        "--json",
    ]);
    let bench: Value = serde_json::from_str(&bench).unwrap();
    assert!(bench["decode"]["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn flags_have_the_names_that_others_give_them() {
    let expected = stdout(&[
        "rewrite",
        "--candidates",
        "2",
        "--max-tokens",
        "9",
        "--temperature",
        "0.5",
        "--seed",
        "1",
        "a fox",
    ]);
    for args in [
        ["--n", "2", "--max-new-tokens", "9", "--temp", "0.5", "--threads", "1", "--dtype", "auto"],
        ["-n", "2", "--max-tokens", "9", "--temp", "0.5", "-t", "2", "-o", "/dev/stdout"],
    ] {
        assert_eq!(
            stdout(&[&["rewrite", "--seed", "1", "a fox"], &args[..]].concat()),
            expected,
            "{args:?}"
        );
    }
    for same in [["f32", "float32"], ["f16", "half"], ["f16", "float16"], ["bf16", "bfloat16"]] {
        let of = |dtype| {
            stdout(&["rewrite", "--seed", "1", "--max-tokens", "9", "--dtype", dtype, "a fox"])
        };
        assert_eq!(of(same[0]), of(same[1]), "{same:?}");
    }
    let of = |k| stdout(&["rewrite", "--seed", "1", "--max-tokens", "9", "--top-k", k, "a fox"]);
    assert_eq!(of("-1"), of("0"));
}

#[test]
fn the_environment_may_be_empty_and_switches_are_numbers() {
    let run = |name: &str, value: &str| {
        let mut c = bprompt(&["rewrite", "--seed", "1", "--max-tokens", "5", "a fox"]);
        let out = c.env(name, value).output().unwrap();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    let plain = run("BPROMPT_UNKNOWN", "");
    assert_eq!(plain.0, Some(0), "{}", plain.2);
    for name in [
        "BPROMPT_MODEL",
        "BPROMPT_THREADS",
        "BPROMPT_ISA",
        "BPROMPT_DEVICE",
        "BPROMPT_BATCH_INVARIANT",
        "BPROMPT_NO_CUDA_GRAPHS",
        "BPROMPT_PERSISTENT",
        "BPROMPT_BATCH_TOKENS",
        "BPROMPT_SEQUENCES",
        "BPROMPT_CACHE_TOKENS",
        "BPROMPT_NO_PREFIX_CACHE",
        "BPROMPT_DRAFT_TOKENS",
    ] {
        assert_eq!(run(name, ""), plain, "{name} is empty");
    }
    for name in ["BPROMPT_BATCH_INVARIANT", "BPROMPT_NO_CUDA_GRAPHS", "BPROMPT_NO_PREFIX_CACHE"] {
        for value in ["0", "1", "true", "false", "yes", "no"] {
            assert_eq!(run(name, value), plain, "{name}={value}");
        }
        let (code, _, message) = run(name, "perhaps");
        assert!(
            code == Some(2) && message.contains("perhaps") && message.lines().count() == 1,
            "{message}"
        );
    }
}

#[test]
fn shells_and_manuals_get_what_they_want() {
    for (shell, word) in
        [("bash", "_bprompt"), ("zsh", "#compdef bprompt"), ("fish", "complete -c bprompt")]
    {
        let script = stdout(&["completions", shell]);
        assert!(script.contains(word) && script.contains("max-prompt-bytes"), "{shell}");
    }
    assert!(failure(&["completions", "cmd"]).contains("cmd"));
    let page = stdout(&["man"]);
    assert!(page.contains(".TH bprompt 1") && page.contains("rewrite"), "{page}");
    let f = tempfile::tempdir().unwrap();
    stdout(&["man", "--output", path(f.path())]);
    let page = std::fs::read_to_string(f.path().join("bprompt-rewrite.1")).unwrap();
    assert!(page.contains("min\\-kept"), "{page}");
    let help = stdout(&["rewrite", "--help"]);
    for group in ["Files:", "Keeping the meaning:", "Sampling:", "Model and device:", "Engine:"] {
        assert!(help.contains(group), "{group}");
    }
    let has_kernels = !beautiful_prompt::device::images::IMAGES.is_empty();
    assert_eq!(
        (help.contains("GPU:"), help.contains("--no-cuda-graphs")),
        (has_kernels, has_kernels)
    );
}

#[test]
fn text_says_what_json_says_and_little_kept_is_said() {
    for seed in 0..8 {
        let seed = seed.to_string();
        for more in [
            &[][..],
            &["--min-kept", "0"],
            &["--min-kept", "0", "--keep", "100 mph"],
            &["--min-kept", "0", "--ban", "highly detailed,digital painting,by,art"],
            &["--min-kept", "0", "--keep", "f/1.8", "--ban", "sharp", "--stop", "art"],
        ] {
            let args =
                [&["rewrite", "--seed", &seed, "--max-tokens", "48", "a red car on a road"], more]
                    .concat();
            let json: Value =
                serde_json::from_str(&stdout(&[&args[..], &["--json"]].concat())).unwrap();
            assert_eq!(
                stdout(&args).trim_end_matches('\n'),
                json["candidates"][0]["text"],
                "{args:?}"
            );
        }
    }
    // four tokens cannot say all of this
    let long = "seven purple xylophones, a brass telescope, two owls and a melting clock under a \
        stone bridge";
    let args = ["rewrite", "--seed", "1", "--max-tokens", "4", long];
    for (more, word) in
        [(&["--min-kept", "0"][..], "kept 0."), (&["--min-kept", "1"], "fell back on the prompt")]
    {
        let out = run(&[&args[..], more].concat());
        assert!(out.status.success() && text(&out.stderr).contains(word), "{}", text(&out.stderr));
    }
}
