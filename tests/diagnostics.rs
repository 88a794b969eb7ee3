//! What the program says when its input, a model, the machine or its output is not as it should be:
//! one line, status 2, nothing lost, and never a panic.

mod program;

use program::{bprompt, failure, path, stdout, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder with inputs for every subcommand.
struct Inputs(tempfile::TempDir);

impl Inputs {
    fn new() -> Inputs {
        let inputs = Inputs(tempfile::tempdir().unwrap());
        let styles = "highly detailed, digital painting, concept art, sharp focus, \
            cinematic lighting, octane render";
        let prompts: String =
            (0..30).map(|i| format!("a fox number {i} on a hill, {styles}\n")).collect();
        std::fs::write(inputs.at("prompts.txt"), prompts).unwrap();
        std::fs::write(inputs.at("short.txt"), "a fox\n").unwrap();
        let pair = |i| {
            format!(
                "{{\"raw_prompt\": \"a fox {i}\", \"prompt\": \"a fox {i}, oil on canvas, fog\"}}\n"
            )
        };
        std::fs::write(inputs.at("pairs.jsonl"), (0..8).map(pair).collect::<String>()).unwrap();
        inputs
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Arguments, with `@name` for the path of a file in the folder.
    fn args(&self, line: &str) -> Vec<String> {
        let place = |word: &str| match word.strip_prefix('@') {
            Some(name) => path(&self.at(name)).to_owned(),
            None => word.to_owned(),
        };
        line.split_whitespace().map(place).collect()
    }

    fn command(&self, line: &str) -> Command {
        let args = self.args(line);
        bprompt(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn failure(&self, line: &str) -> String {
        failure(&self.args(line).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn stdout(&self, line: &str) -> String {
        stdout(&self.args(line).iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// One quick use of every subcommand that prints.
const PRINTING: [&str; 13] = [
    "--help",
    "--version",
    "rewrite --seed 1 --max-tokens 5 fox",
    "rewrite --seed 1 --max-tokens 5 --json fox",
    "generate --prompt fox --max-tokens 3",
    "generate --prompt fox --max-tokens 3 --json",
    "eval --input @short.txt --max-tokens 3",
    "eval --input @short.txt --max-tokens 3 --json",
    "data pairs --input @prompts.txt --output @made.jsonl --min-tokens 5 --force",
    "train tokenizer --input @prompts.txt --output @tokenizer.json --vocab-size 300 --force",
    "bench train --hidden 16 --layers 1 --heads 1 --vocab 64 --batch 1 --tokens 4 --repeats 1",
    "bench train --hidden 16 --layers 1 --heads 1 --vocab 64 --batch 1 --tokens 4 --repeats 1 \
    --json",
    "inspect @run",
];

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_under_standard_output_is_an_error_of_every_subcommand() {
    let inputs = Inputs::new();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let train =
        "train sft --train @pairs.jsonl --output @run --max-steps 1 --batch 2 --micro-tokens 64";
    for line in [train].into_iter().chain(PRINTING) {
        let out = inputs.command(line).stdout(full()).stderr(Stdio::piped()).output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{line}: {said}");
        assert!(said.lines().last().unwrap().contains("standard output"), "{line}: {said}");
        assert!(!said.contains("panicked"), "{line}: {said}");
    }
    assert!(
        inputs.at("run/model.safetensors").exists(),
        "the result was there before the line about it"
    );
    // standard error that takes nothing changes nothing
    for (line, code) in
        [("--version", 0), ("rewrite", 2), ("inspect @missing", 2), ("rewrite --top-p 7 fox", 2)]
    {
        let out = inputs.command(line).stdout(Stdio::null()).stderr(full()).output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{line}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn more_threads_than_cores_are_capped_with_a_word() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let line = "generate --prompt fox --max-tokens 3 --temperature 0 --threads";
    let inputs = Inputs::new();
    for threads in ["5000", "18446744073709551615"] {
        let out = inputs.command(&format!("{line} {threads}")).output().unwrap();
        let said = text(&out.stderr);
        assert!(out.status.success(), "{said}");
        let expected = format!(
            "--threads {threads}: this process may use {cores} cores; {cores} threads are taken\n"
        );
        assert_eq!(said, expected);
        assert_eq!(text(&out.stdout), inputs.stdout(&format!("{line} 1")));
    }
}

/// Names of a folder's files, with those of folders in it.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn a_trained_model_and_its_checkpoints_bring_all_that_their_model_brought() {
    let inputs = Inputs::new();
    let sft = |model: &str, output: &str, more: &str| {
        inputs.stdout(&format!(
            "train sft --train @pairs.jsonl --output @{output} --max-steps 2 --save-every 1 \
            --batch 2 --micro-tokens 64 {model} {more}"
        ))
    };
    sft("", "one", "");
    // the embedded model's own settings, without which it samples in another way
    let embedded = include_bytes!("../assets/model/generation_config.json");
    assert_eq!(std::fs::read(inputs.at("one/generation_config.json")).unwrap(), embedded);
    let template = std::fs::read_to_string(inputs.at("one/template.txt")).unwrap();
    assert_eq!(template.trim_end(), include_str!("../assets/model/template.txt").trim_end());
    // a folder as Hugging Face holds it
    let brought = [
        ("tokenizer_config.json", "{\"eos_token\": \"</s>\"}"),
        ("special_tokens_map.json", "{\"eos_token\": \"</s>\"}"),
        ("added_tokens.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("generation_config.json", "{\"top_k\": 7, \"repetition_penalty\": 1.0}"),
        ("template.txt", "Plain: {raw} Rich:\n"),
        ("LICENSE", "as you like"),
    ];
    for (name, content) in brought {
        std::fs::write(inputs.at("one").join(name), content).unwrap();
    }
    sft("--model @one", "two", "");
    let step = "two/checkpoints/step-0000002";
    for folder in ["two", step, "two/checkpoints/step-0000001"] {
        for (name, content) in brought {
            let kept = std::fs::read_to_string(inputs.at(folder).join(name)).unwrap();
            assert_eq!(kept, content, "{folder}/{name}");
        }
        assert_eq!(
            std::fs::read(inputs.at(folder).join("tokenizer.json")).unwrap(),
            std::fs::read(inputs.at("one/tokenizer.json")).unwrap()
        );
    }
    // a checkpoint is a model folder of its own
    assert!(inputs.stdout(&format!("inspect @{step}")).contains("BLOOM"));
    assert!(
        !inputs.stdout(&format!("rewrite --model @{step} --max-tokens 3 --seed 1 fox")).is_empty()
    );
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let usual = mode(&inputs.at("short.txt"));
        let files = files_below(&inputs.at("two"));
        assert!(files.len() > 20);
        for file in files {
            assert_eq!(
                mode(&file),
                usual,
                "{} is not readable as other new files are",
                file.display()
            );
        }
    }
}

#[test]
fn training_flags_out_of_range_are_named() {
    let inputs = Inputs::new();
    for flag in [
        "--beta1 2",
        "--beta1 -0.1",
        "--beta1 nan",
        "--beta2 1",
        "--beta2 inf",
        "--epsilon 0",
        "--epsilon -1",
        "--learning-rate 0",
        "--learning-rate -1",
        "--learning-rate nan",
        "--learning-rate 1e3",
        "--warmup 1.5",
        "--warmup nan",
        "--warmup -0.5",
        "--weight-decay -1",
        "--weight-decay 2",
        "--clip 0",
        "--clip nan",
        "--clip -1",
        "--epochs 0",
        "--epochs -1",
        "--epochs nan",
        "--epochs inf",
        "--batch 0",
        "--batch 18446744073709551615",
        "--micro-tokens 0",
        "--max-tokens 1",
        "--max-tokens 18446744073709551615",
        "--keep 0",
    ] {
        let (name, value) = flag.split_once(' ').unwrap();
        let line =
            inputs.failure(&format!("train sft --train @pairs.jsonl --output @run {name}={value}"));
        assert!(line.contains(name), "{flag}: {line}");
        assert!(!inputs.at("run").exists(), "{flag}");
    }
}

#[test]
fn empty_pairs_are_named_with_their_line_or_left_out_and_counted() {
    let inputs = Inputs::new();
    let good = "{\"raw_prompt\": \"a fox\", \"prompt\": \"a fox, fog\"}\n";
    let bad = [
        ("{\"raw_prompt\": \" \", \"prompt\": \"a fox\"}\n", "raw_prompt"),
        ("{\"raw_prompt\": \"a fox\", \"prompt\": \"\\n\"}\n", "\"prompt\""),
        ("{\"raw_prompt\": \"a fox\"}\n", "prompt"),
        ("{\"raw_prompt\": 3, \"prompt\": \"x\"}\n", "string"),
        ("{\"raw\n", "JSON"),
    ];
    let train =
        "train sft --train @bad.jsonl --output @run --max-steps 1 --batch 2 --micro-tokens 64";
    for (line, word) in bad {
        std::fs::write(inputs.at("bad.jsonl"), format!("{good}\n{line}{good}")).unwrap();
        let said = inputs.failure(train);
        assert!(said.contains("line 3") && said.contains(word), "{said}");
        assert!(!inputs.at("run").exists());
    }
    let all: String = bad.iter().map(|b| b.0).collect();
    std::fs::write(inputs.at("bad.jsonl"), format!("{all}{good}{good}")).unwrap();
    assert!(inputs.failure(train).contains("and 4 more"));
    let out = inputs.command(&format!("{train} --skip-bad-lines")).output().unwrap();
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("left out 5 pairs") && said.contains("2 examples"), "{said}");
    for empty in ["", "[]", "\n\n"] {
        std::fs::write(inputs.at("bad.jsonl"), empty).unwrap();
        let train = train.replace("@run", "@other");
        assert!(inputs.failure(&train).contains("no pairs"));
    }
}

/// Sizes that make no sense at all.
#[test]
fn what_makes_no_sense_is_out_of_range() {
    let inputs = Inputs::new();
    for (line, flag) in [
        ("bench llm --batch 18446744073709551615", "--batch"),
        ("bench llm --prompt-tokens 1000000000", "--prompt-tokens"),
        ("bench llm --new-tokens 0", "--new-tokens"),
        ("bench llm --repeats 0", "--repeats"),
        ("bench llm --prompt-tokens 16000000", "context"),
        ("bench kernels --squares 100000000", "--squares"),
        ("bench kernels --squares 15", "--squares"),
        ("bench kernels --calls 0", "--calls"),
        ("bench kernels --context 18446744073709551615", "--context"),
        ("bench kernels --prefill 99999999999x2", "--prefill"),
        ("bench train --hidden 18446744073709551615", "--hidden"),
        ("bench train --tokens 1", "--tokens"),
        ("bench train --repeats 18446744073709551615", "--repeats"),
        ("rewrite --sequences 18446744073709551615 --input @short.txt", "--sequences"),
        ("rewrite --batch-tokens 18446744073709551615 --input @short.txt", "--batch-tokens"),
        ("serve --port 0 --sequences 18446744073709551615", "--sequences"),
        ("bench serve --num-prompts 18446744073709551615", "--num-prompts"),
        ("bench serve --random-input-len 18446744073709551615", "--random-input-len"),
        ("bench serve --max-concurrency 18446744073709551615", "--max-concurrency"),
        ("bench serve --request-rate 1e-300", "--request-rate"),
        ("bench serve --request-rate nan", "--request-rate"),
        ("bench serve --temperature nan", "--temperature"),
        ("bench serve --goodput ttft:nan", "--goodput"),
    ] {
        let said = inputs.failure(line);
        assert!(said.contains(flag), "{line}: {said}");
    }
    // and so is 0, where it would measure nothing
    for (command, flags) in [
        ("llm", &["prompt-tokens", "new-tokens", "batch", "repeats"][..]),
        ("kernels", &["batch", "context", "squares", "calls"]),
        ("train", &["hidden", "layers", "heads", "vocab", "batch", "tokens", "repeats"]),
        (
            "serve",
            &[
                "random-input-len",
                "random-vocabulary",
                "output-len",
                "num-prompts",
                "request-rate",
                "max-concurrency",
            ],
        ),
    ] {
        for flag in flags {
            let said = inputs.failure(&format!("bench {command} --{flag} 0"));
            assert!(said.contains(&format!("--{flag} ")), "bench {command} --{flag} 0: {said}");
        }
    }
}

/// Sizes that no machine has the memory for: each is refused with the number and a flag, at once
/// and before anything is done.
#[test]
fn what_no_machine_has_memory_for_is_planned_and_refused() {
    let inputs = Inputs::new();
    for (line, flag) in [
        ("bench llm --batch 1048576 --prompt-tokens 500 --new-tokens 8", "--batch"),
        ("bench kernels --squares 1048576 --batch 1 --prefill 1x16", "--squares"),
        ("bench kernels --batch 1000000 --context 16777216", "--batch or --context"),
        ("bench kernels --prefill 1048576x16777216", "--prefill"),
        ("bench train --batch 1000000 --tokens 1000000", "--batch or --tokens"),
        ("bench train --hidden 262144 --layers 4096 --heads 4096", "--hidden, --layers or --vocab"),
        ("rewrite --seed 1 --input @short.txt --cache-tokens 1000000000000", "--cache-tokens"),
        ("rewrite --seed 1 --cache-tokens 18446744073709551615 fox", "--cache-tokens"),
        (
            "rewrite --seed 1 --input @short.txt --sequences 1048576 --cache-tokens 1000000000000",
            "--cache-tokens",
        ),
        ("serve --port 0 --cache-tokens 1000000000000", "--cache-tokens"),
    ] {
        let said = inputs.failure(line);
        assert!(
            said.contains("of memory (") && said.contains("are left here; lower"),
            "{line}: {said}"
        );
        assert!(said.split("; lower ").nth(1).unwrap().contains(flag), "{line}: {said}");
    }
    // what goes beyond the context ends there
    inputs.stdout("generate --prompt fox --max-tokens 18446744073709551615 --seed 1 --stop a");
    inputs.stdout("rewrite --seed 1 --max-tokens 18446744073709551615 --min-kept 0 fox");
    // a pass never has more tokens than the cache, so these cost nothing
    inputs.stdout(
        "rewrite --seed 1 --max-tokens 3 --input @short.txt --batch-tokens 1000000000 \
        --cache-tokens 512",
    );
}

#[test]
#[cfg(target_os = "linux")]
fn limits_of_the_process_count_as_memory() {
    let limited = |kilobytes: u32, line: &str| {
        let shell = format!("ulimit -v {kilobytes}; exec {} {line}", env!("CARGO_BIN_EXE_bprompt"));
        Command::new("sh").args(["-c", &shell]).env("BPROMPT_THREADS", "1").output().unwrap()
    };
    let train = "bench train --hidden 1024 --layers 12 --heads 4 --repeats 1";
    let out = limited(2_000_000, train);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    for part in ["AdamW's moments 1.3 GB", "weights 638.2 MB", "gradients 638.2 MB"] {
        assert!(said.contains(part), "{said}");
    }
    let out = limited(2_000_000, "bench llm --shape bloom-1b1");
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("weights 2.1 GB") && said.contains("--shape"), "{said}");
}

/// A model's folder: the embedded one's files.
fn model_in(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for entry in
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model")).unwrap()
    {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
}

type Damage<'a> = (&'a str, &'a dyn Fn(&Path));

#[test]
fn inspect_finds_all_that_rewrite_would_refuse_and_says_the_same() {
    let inputs = Inputs::new();
    let write = |name: &'static str, content: &'static str| {
        move |folder: &Path| std::fs::write(folder.join(name), content).unwrap()
    };
    let pointer = "version https://git-lfs.example/spec/v1\nsize 12\n";
    let poison = |folder: &Path| {
        let path = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let view = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = view.tensor("transformer.ln_f.weight").unwrap();
        let end = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize + tensor.data().len();
        // exponents of ones in every floating-point type
        bytes[end - 4..end].fill(0xff);
        std::fs::write(path, bytes).unwrap();
    };
    let damages: [Damage; 14] = [
        ("does not exist; copy the model's tokenizer.json", &|f| {
            std::fs::remove_file(f.join("tokenizer.json")).unwrap()
        }),
        ("not a tokenizer.json", &write("tokenizer.json", "{}")),
        ("git lfs pull", &write("tokenizer.json", pointer)),
        ("git lfs pull", &write("model.safetensors", pointer)),
        ("not a generation config", &write("generation_config.json", "{\"top_k\": \"many\"}")),
        ("top_p is 0", &write("generation_config.json", "{\"top_p\": 0}")),
        ("temperature is -1", &write("generation_config.json", "{\"temperature\": -1}")),
        (
            "repetition_penalty is 1000",
            &write("generation_config.json", "{\"repetition_penalty\": 1000}"),
        ),
        ("does not hold {raw}", &write("template.txt", "no place")),
        ("more than once", &write("template.txt", "{raw} {raw}")),
        ("transformer.ln_f.weight holds", &poison),
        ("no weights", &|f| std::fs::remove_file(f.join("model.safetensors")).unwrap()),
        ("config.json", &|f| std::fs::remove_file(f.join("config.json")).unwrap()),
        ("is a folder", &|f| {
            std::fs::remove_file(f.join("tokenizer.json")).unwrap();
            std::fs::create_dir(f.join("tokenizer.json")).unwrap();
        }),
    ];
    for (i, (words, damage)) in damages.iter().enumerate() {
        let name = format!("model-{i}");
        model_in(&inputs.at(&name));
        damage(&inputs.at(&name));
        let inspected = inputs.failure(&format!("inspect @{name}"));
        assert!(inspected.contains(words), "{words}: {inspected}");
        assert_eq!(inspected, inputs.failure(&format!("inspect --json @{name}")));
        assert_eq!(inspected, inputs.failure(&format!("rewrite --seed 1 --model @{name} fox")));
    }
    model_in(&inputs.at("whole"));
    inputs.stdout("inspect @whole");
    let missing = inputs.failure("inspect @none");
    assert!(missing.contains("does not exist"), "{missing}");
}

#[test]
fn a_model_is_found_by_its_name_in_the_cache_of_hugging_face() {
    let inputs = Inputs::new();
    let home = inputs.at("hf");
    let command = |line: &str| {
        let mut c = inputs.command(line);
        c.env("HF_HOME", &home)
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .current_dir(inputs.0.path());
        c
    };
    let succeed = |line: &str| {
        let out = command(line).output().unwrap();
        assert!(out.status.success(), "{line}: {}", text(&out.stderr));
        text(&out.stdout)
    };
    let rewrite = "rewrite --seed 1 --max-tokens 6 fox --model";
    let out = command(&format!("{rewrite} some-org/some-model")).output().unwrap();
    let said = text(&out.stderr);
    assert_eq!((out.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("`hf download some-org/some-model`") && said.contains("hub"), "{said}");
    let snapshot = home.join("hub/models--some-org--some-model/snapshots/0123abcd");
    model_in(&snapshot);
    let refs = home.join("hub/models--some-org--some-model/refs");
    std::fs::create_dir_all(&refs).unwrap();
    std::fs::write(refs.join("main"), "0123abcd").unwrap();
    let whole = inputs.stdout("rewrite --seed 1 --max-tokens 6 fox");
    assert_eq!(succeed(&format!("{rewrite} some-org/some-model")), whole);
    assert_eq!(succeed(&format!("{rewrite} some-org/some-model@0123abcd")), whole);
    assert!(succeed("inspect some-org/some-model").contains("BLOOM"));
    assert!(succeed("generate --prompt fox --max-tokens 2 --model some-org/some-model").len() > 1);
    assert!(
        succeed("eval --input @short.txt --max-tokens 3 --model some-org/some-model")
            .contains("prompts")
    );
    succeed(
        "train sft --train @pairs.jsonl --output @run --max-steps 1 --batch 2 --micro-tokens 64 \
        --model some-org/some-model",
    );
    succeed("bench llm --prompt-tokens 4 --new-tokens 1 --repeats 1 --model some-org/some-model");
    // a folder of that name wins
    std::fs::create_dir_all(inputs.at("some-org/some-model")).unwrap();
    let out = command(&format!("{rewrite} some-org/some-model")).output().unwrap();
    assert!(
        text(&out.stderr).contains("some-org/some-model/config.json: does not exist"),
        "{}",
        text(&out.stderr)
    );
}

/// Every figure has what the machine reached beside it, and a label where a fraction would say
/// nothing.
#[test]
fn bench_figures_stand_beside_what_was_measured_with_them() {
    let inputs = Inputs::new();
    let check = |figure: &Value| {
        let number =
            |key: &str| figure[key].as_f64().unwrap_or_else(|| panic!("{key} of {figure}"));
        assert!(
            number("read_gigabytes_per_second") > 0.0 && number("peak_gigaflops") > 0.0,
            "{figure}"
        );
        match figure["bound"].as_str().unwrap() {
            "cache" => assert!(figure["fraction"].is_null(), "{figure}"),
            "beyond" => assert!(number("fraction") > 1.0, "{figure}"),
            "memory" | "compute" => assert!(number("fraction") <= 1.0, "{figure}"),
            other => panic!("{other}"),
        }
    };
    let json = |line: &str| serde_json::from_str::<Value>(&inputs.stdout(line)).unwrap();
    let llm = json("bench llm --prompt-tokens 4 --new-tokens 2 --repeats 1 --json");
    check(&llm["prefill"]);
    check(&llm["decode"]);
    assert!(llm["last_cache_bytes"].is_u64() || llm["last_cache_bytes"].is_null());
    let peak = llm["peak_memory_bytes"].as_u64().unwrap_or(0);
    assert!(peak < 400 << 20, "the buffer of the measurement is not the model's memory: {peak}");
    check(&json(
        "bench train --hidden 16 --layers 1 --heads 1 --vocab 64 --batch 1 --tokens 4 --repeats 1 \
        --json",
    ));
    let shown = inputs.stdout("bench llm --prompt-tokens 4 --new-tokens 2 --repeats 1");
    let cached = [&llm["prefill"], &llm["decode"]].iter().any(|p| p["bound"] == "cache");
    assert!(!cached || shown.contains("from cache"), "{shown}");
}
