//! Reward models and PPO as users run them: the built program, real files, broken ones.

mod program;

use beautiful_prompt::models::bloom::{Architecture, BloomCheckpoint};
use program::{bprompt, failure, path, run, stdout, text};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A folder with data of every kind.
struct Inputs(tempfile::TempDir);

impl Inputs {
    fn new() -> Inputs {
        let inputs = Inputs(tempfile::tempdir().unwrap());
        // the more words, the better
        let texts = ["a cat", "a dog in the rain", "stars", "an old house by the sea at dusk"];
        let line = |i: usize| {
            let text = format!("{}, {}", texts[i % 4], ["art", "photo, detailed", "4k"][i % 3]);
            let label = text.split(' ').count() as f64 + 20.0;
            format!(
                "{{\"raw_prompt\":\"{}\",\"prompt\":\"{text}\",\"words\":{label}}}\n",
                texts[i % 4]
            )
        };
        inputs.write("scored.jsonl", &(0..24).map(line).collect::<String>());
        let pair = "{\"chosen\":\"a cat, detailed\",\"rejected\":\"cat\"}\n";
        inputs.write("preferences.jsonl", &pair.repeat(6));
        inputs.write("prompts.txt", "a cat\na dog in the rain\nan old house\n");
        inputs.write("pairs.jsonl", "{\"raw_prompt\":\"a cat\",\"prompt\":\"a cat, art\"}\n");
        inputs
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.0.path().join(name), content).unwrap();
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A command line in which `@` stands for this folder.
    fn args(&self, line: &str) -> Vec<String> {
        let folder = format!("{}/", path(self.0.path()));
        line.split_whitespace().map(|a| a.replace('@', &folder)).collect()
    }

    fn stdout(&self, line: &str) -> String {
        let args = self.args(line);
        stdout(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn failure(&self, line: &str) -> String {
        let args = self.args(line);
        failure(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

const REWARD: &str = "train reward --data @scored.jsonl --validation @scored.jsonl --label words \
    --normalize-labels --learning-rate 1e-3 --batch 8 --epochs 4 --output @reward";

const PPO: &str = "train ppo --prompts @prompts.txt --rounds 2 --rollouts 4 --minibatch 2 \
    --max-new-tokens 8 --unfrozen-layers 1 --samples 1 --output @run";

#[test]
fn a_reward_model_is_trained_and_a_policy_on_it() {
    let inputs = Inputs::new();
    let said = inputs.stdout(REWARD);
    for name in ["validation loss", "spearman", "pearson", "pairwise accuracy", "mse"] {
        assert!(said.contains(name), "{said}");
    }
    let saved = BloomCheckpoint::open(&inputs.at("reward")).unwrap();
    assert_eq!(saved.config.architecture, Architecture::SequenceClassification);
    for file in ["calibration.svg", "loss.svg", "metrics.jsonl", "tokenizer.json", "template.txt"] {
        assert!(inputs.at(&format!("reward/{file}")).is_file(), "{file}");
    }
    let metrics = std::fs::read_to_string(inputs.at("reward/metrics.jsonl")).unwrap();
    assert!(metrics.lines().last().unwrap().contains("validation_spearman"), "{metrics}");
    let template = std::fs::read_to_string(inputs.at("reward/template.txt")).unwrap();
    assert_eq!(template, "{prompt}\n");

    let said = inputs.stdout(&format!("{PPO} --reward @reward:0.7 --reward fidelity:0.3"));
    assert!(said.contains("PPO, rounds 1 to 2: reward"), "{said}");
    assert!(inputs.stdout("inspect @run").contains("parameters"));
    assert!(!inputs.stdout("rewrite --model @run --max-tokens 8 cat").trim().is_empty());
    let metrics = std::fs::read_to_string(inputs.at("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 2);
    for name in ["objective/kl", "rewards/fidelity/mean", "critic/explained_var", "time/rollout"] {
        assert!(metrics.contains(name), "{name}");
    }
    for file in ["curves.svg", "value_head.safetensors", "samples/round-0000002.txt"] {
        assert!(inputs.at(&format!("run/{file}")).is_file(), "{file}");
    }
    // what is written is no reward model, and what scores texts cannot write any
    assert!(inputs.failure("rewrite --model @reward cat").contains("is a reward model"));
    let said = inputs.failure(&format!("{PPO}2 --reward @run"));
    assert!(said.contains("expected a reward model"), "{said}");
    let said = inputs.failure(&format!("{PPO}2 --policy @reward --reward fidelity"));
    assert!(said.contains("is a reward model"), "{said}");
}

#[test]
fn preferences_train_a_reward_model() {
    let inputs = Inputs::new();
    let said = inputs.stdout(
        "train reward --data @preferences.jsonl --validation @preferences.jsonl --batch 3 \
        --learning-rate 1e-3 --epochs 4 --output @preferred",
    );
    assert!(said.contains("pairwise accuracy 1.0000"), "{said}");
}

#[test]
fn groups_and_commands_reward_a_policy() {
    let inputs = Inputs::new();
    inputs.write(
        "score.py",
        "import json, sys\n\
        for line in sys.stdin:\n    record = json.loads(line)\n    \
        print(json.dumps({'id': record['id'], 'score': len(record['output'])}), flush=True)\n",
    );
    let command = format!("cmd:python3 {}:0.1", path(&inputs.at("score.py")));
    for algorithm in ["grpo", "rloo"] {
        let line = format!("{PPO}-{algorithm} --algorithm {algorithm} --group 2");
        let mut args = inputs.args(&line);
        args.extend(["--reward".into(), command.clone()]);
        let out = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let name = algorithm.to_uppercase();
        assert!(text(&out.stdout).contains(&name), "{}", text(&out.stdout));
        assert!(!inputs.at(&format!("run-{algorithm}/value_head.safetensors")).exists());
    }
}

#[test]
fn what_is_wrong_is_one_line() {
    let inputs = Inputs::new();
    inputs.write("empty.jsonl", "");
    inputs.write("empty.txt", "\n\n");
    inputs.write("text.jsonl", "{\"prompt\":\"a\",\"words\":\"many\"}\n");
    inputs.write("no_raw.jsonl", "{\"prompt\":\"a\",\"words\":1}\n");
    let reward = |data: &str| format!("train reward --data @{data} --label words --output @x");
    for (line, why) in [
        (reward("empty.jsonl"), "holds no records"),
        (reward("text.jsonl"), "expected a number"),
        (reward("missing.jsonl"), "missing.jsonl"),
        (reward("scored.jsonl").replace("--label words", ""), "name it with --label"),
        (reward("scored.jsonl").replace("words", "taste"), "has no \"taste\""),
        (format!("{} --input pickscore", reward("no_raw.jsonl")), "no \"raw_prompt\""),
        (format!("{} --input @nothing.txt", reward("scored.jsonl")), "does not exist"),
        (format!("{PPO} --reward nothing"), "nothing"),
        (format!("{PPO} --reward fidelity:high"), "high"),
        (
            format!("{PPO} --reward fidelity").replace("@prompts.txt", "@empty.txt"),
            "holds no prompts",
        ),
        (format!("{PPO} --reward fidelity --prompt-tokens 2"), "line 1 has"),
        (format!("{PPO} --reward fidelity --algorithm grpo --group 1"), "--group 1"),
        (format!("{PPO} --reward fidelity --algorithm grpo --group 3"), "no multiple"),
        (format!("{PPO} --reward fidelity --delta-reward true"), "--delta-reward true"),
        (format!("{PPO} --reward fidelity").replace("tokens 8", "tokens 5000"), "context"),
        (format!("{PPO} --reward fidelity --kl-target -1"), "--kl-target"),
    ] {
        let said = inputs.failure(&line);
        assert!(said.contains(why), "{line}: {said}");
        assert!(!inputs.at("x").exists(), "{line} left something behind");
        assert!(!inputs.at("run/metrics.jsonl").exists(), "{line} left something behind");
    }
}

/// The last line on standard error of a run that must fail, and its folder.
fn last_line(inputs: &Inputs, line: &str, reward: &str) -> String {
    let mut args = inputs.args(line);
    args.extend(["--reward".into(), reward.into()]);
    let out = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said.lines().last().unwrap().to_owned()
}

#[test]
fn scorers_that_misbehave_end_the_run_with_a_line_and_lose_nothing() {
    let inputs = Inputs::new();
    // answers one round, then does what it should not
    let script = |rest: &str| {
        format!(
            "import sys\nfor i in range(4):\n    sys.stdin.readline()\n    print(i, flush=True)\n\
            {rest}\n"
        )
    };
    for (name, rest, why) in [
        ("dies", "sys.exit(3)", "cmd:"),
        ("few", "sys.stdin.readline(); print(1, flush=True); sys.exit(0)", "cmd:"),
        ("nan", "[sys.stdin.readline() or print('nan', flush=True) for i in range(4)]", "cmd:"),
        ("hangs", "import time; time.sleep(60)", "--reward-timeout"),
    ] {
        inputs.write("score.py", &script(rest));
        let command = format!("cmd:python3 {}:1", path(&inputs.at("score.py")));
        let line = format!("{PPO}-{name} --save-every 1 --rounds 5 --reward-timeout 2");
        let line = line.replace("--rounds 2 ", "");
        let said = last_line(&inputs, &line, &command);
        assert!(said.contains(why), "{name}: {said}");
        assert!(said.contains("step-0000001"), "{name}: {said}");
        let checkpoint = inputs.at(&format!("run-{name}/checkpoints/step-0000001"));
        assert!(BloomCheckpoint::open(&checkpoint).is_ok(), "{name}");
    }
}

#[test]
#[cfg(unix)]
fn a_killed_run_goes_on_where_it_was() {
    let inputs = Inputs::new();
    let ppo = format!(
        "{} --reward fidelity --save-every 1 --seed 3",
        PPO.replace("rounds 2", "rounds 8")
    );
    inputs.stdout(&ppo.replace("@run", "@whole"));
    let args = inputs.args(&ppo);
    let mut child = bprompt(&args.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // some time after the first checkpoint, whatever is being done then
    let (started, first) = (Instant::now(), inputs.at("run/checkpoints/step-0000002"));
    while !first.exists() && started.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(130));
    child.kill().unwrap();
    child.wait().unwrap();
    inputs.stdout(&format!("{ppo} --resume"));
    let lines = |run: &str| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(inputs.at(&format!("{run}/metrics.jsonl"))).unwrap();
        let line = |line: &str| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            let map = value.as_object_mut().unwrap();
            map.retain(|name, _| !name.starts_with("time/") && !name.starts_with("perf/"));
            value
        };
        text.lines().map(line).collect()
    };
    assert_eq!(lines("run"), lines("whole"));
    let bytes = |run: &str| std::fs::read(inputs.at(&format!("{run}/model.safetensors"))).unwrap();
    assert!(bytes("run") == bytes("whole"));
    let other = ppo.replace("--reward fidelity", "--gamma 0.9 --resume");
    let said = last_line(&inputs, &other, "fidelity");
    assert!(said.contains("other settings (gae)"), "{said}");
}
