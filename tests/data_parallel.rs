//! Several ranks train what one does: the same losses, weights and checkpoints, whatever their
//! number; what goes wrong on one of them is said by all.

#[expect(dead_code)]
mod program;

use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::models::bloom::training::{Recompute, TrainModel};
use beautiful_prompt::models::bloom::{BloomCheckpoint, BloomConfig};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::train::Precision;
use beautiful_prompt::train::examples::Example;
use beautiful_prompt::train::optimizer::AdamWOptions;
use beautiful_prompt::train::parallel::host::HostCommunicator;
use beautiful_prompt::train::parallel::mesh::Mesh;
use beautiful_prompt::train::parallel::world::World;
use beautiful_prompt::train::report::StepMetrics;
use beautiful_prompt::train::run::{Observer, Outcome, Run, RunOptions};
use beautiful_prompt::train::schedule::Schedule;
use beautiful_prompt::train::sft::Sft;
use beautiful_prompt::train::state;
use program::{bprompt, path, text};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Sequences of several lengths whose tokens go up by three.
fn examples(starts: std::ops::Range<u32>) -> Vec<Example> {
    let ids = |start: u32| (0..6 + start % 7).map(|i| 4 + (start + 3 * i) % 40).collect();
    starts.map(|start| Example { ids: ids(start), loss_from: 3 }).collect()
}

fn options(output: &Path) -> RunOptions {
    RunOptions {
        optimizer: AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.01 },
        learning_rate: 3e-3,
        schedule: Schedule::Cosine,
        warmup: 0.1,
        clip: 0.5,
        epochs: 3.0,
        max_steps: 0,
        batch: 12,
        micro_tokens: 40,
        precision: Precision::F32,
        recompute: Recompute::None,
        seed: 42,
        save_every: 0,
        validate_every: 4,
        keep: 2,
        output: output.into(),
        settings: serde_json::json!({}),
    }
}

/// Notes the losses, and raises the flag after so many steps.
struct Watcher<'a> {
    losses: Vec<f64>,
    stop: &'a AtomicBool,
    stop_after: u64,
}

impl Observer for Watcher<'_> {
    fn step(&mut self, _: u64, metrics: &StepMetrics) {
        self.losses.push(metrics.loss);
        if metrics.step == self.stop_after {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// What a rank was left with.
struct Ended {
    outcome: Outcome,
    losses: Vec<f64>,
    values: Vec<f32>,
}

/// One rank of a run, in buckets small enough for there to be many.
fn rank(mesh: Mesh, output: &Path, (resume, stop_after): (bool, u64)) -> Ended {
    let cpu = Cpu::new(1, Isa::detect());
    // the 10th sequence of an epoch's last batch is missing: ranks' parts differ
    let (train, validation) = (examples(0..45), examples(45..50));
    let communicator = HostCommunicator::with_buckets(mesh, 1000).unwrap();
    let mut sft = Run {
        backend: &cpu,
        communicator: &communicator,
        model: TrainModel::random(BloomConfig::new(44, 32, 2, 2), 1),
        companions: Companions::default(),
        task: Sft { train, validation },
        options: options(output),
    };
    let stop = AtomicBool::new(false);
    let mut watcher = Watcher { losses: vec![], stop: &stop, stop_after };
    let outcome = sft.run(resume, &stop, &mut watcher).unwrap();
    Ended { outcome, losses: watcher.losses, values: sft.model.values }
}

fn run(ranks: usize, output: &Path, resumed: (bool, u64)) -> Vec<Ended> {
    std::fs::create_dir_all(output).unwrap();
    std::thread::scope(|s| {
        let start = |mesh| s.spawn(move || rank(mesh, output, resumed));
        let threads: Vec<_> = Mesh::in_process(ranks).into_iter().map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

const WHOLE: (bool, u64) = (false, u64::MAX);

fn validation_loss(outcome: &Outcome) -> f64 {
    let Outcome::Finished { validation: Some(v) } = outcome else { panic!("{outcome:?}") };
    v.loss
}

#[test]
fn two_and_four_ranks_have_the_losses_and_weights_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let one = run(1, &folder.path().join("1"), WHOLE).remove(0);
    assert_eq!(one.losses.len(), 12);
    // ln(44) is 3.8
    assert!(one.losses[11] < 3.5, "{:?}", one.losses);
    for ranks in [2, 4] {
        let all = run(ranks, &folder.path().join(ranks.to_string()), WHOLE);
        let first = &all[0];
        for (ours, theirs) in first.losses.iter().zip(&one.losses) {
            assert!((ours - theirs).abs() < 1e-5 * theirs, "{ranks} ranks: {ours} for {theirs}");
        }
        for other in &all[1..] {
            assert!(other.losses.is_empty(), "rank 0 alone reports");
            assert_eq!(other.outcome, first.outcome);
            assert!(other.values == first.values, "the ranks' weights differ");
        }
        let (ours, theirs) = (validation_loss(&first.outcome), validation_loss(&one.outcome));
        assert!((ours - theirs).abs() < 1e-4 * theirs, "{ours} for {theirs}");
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>().sqrt()
        };
        let norm = distance(&one.values, &vec![0.0; one.values.len()]);
        assert!(distance(&first.values, &one.values) < 1e-3 * norm);
        let lines = std::fs::read_to_string(folder.path().join(format!("{ranks}/metrics.jsonl")));
        assert_eq!(lines.unwrap().lines().count(), 12);
    }
}

#[test]
fn two_runs_and_an_interrupted_one_end_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = run(3, &at("whole"), WHOLE);
    let again = run(3, &at("again"), WHOLE);
    assert!(whole[0].values == again[0].values);
    // the flag is raised on rank 0 alone
    let stopped = run(3, &at("parts"), (false, 5));
    assert!(stopped.iter().all(|e| matches!(e.outcome, Outcome::Stopped(_))));
    let resumed = run(3, &at("parts"), (true, u64::MAX));
    assert!(whole[0].values == resumed[0].values);
    assert_eq!(whole[0].outcome, resumed[0].outcome);
}

#[test]
fn a_checkpoint_does_not_depend_on_the_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| {
        let newest = state::list(&folder.path().join(name).join("checkpoints")).unwrap().pop();
        let (step, folder) = newest.unwrap();
        let moments = std::fs::read(folder.join("optimizer.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&moments).unwrap();
        let of =
            |name| -> Vec<f32> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
        let values = BloomCheckpoint::open(&folder).unwrap().to_f32().unwrap();
        (step, [values, of("first"), of("second")])
    };
    let close = |a: &[Vec<f32>; 3], b: &[Vec<f32>; 3]| {
        a.iter().zip(b).all(|(a, b)| {
            let difference = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            let norm = b.iter().map(|b| b * b).sum::<f32>().sqrt();
            a.len() == b.len() && difference < 1e-3 * norm
        })
    };
    for (name, ranks) in [("1", 1), ("4", 4)] {
        run(ranks, &folder.path().join(name), (false, 5));
    }
    let (one, four) = (read("1"), read("4"));
    assert_eq!((one.0, four.0), (5, 5));
    assert!(close(&one.1, &four.1));
    // what four ranks have left, two take up, and one ends
    let output = folder.path().join("4");
    run(2, &output, (true, 8));
    let ended = run(1, &output, (true, u64::MAX)).remove(0);
    let one = run(1, &folder.path().join("1"), (true, u64::MAX)).remove(0);
    let (ours, theirs) = (validation_loss(&ended.outcome), validation_loss(&one.outcome));
    assert!((ours - theirs).abs() < 1e-4 * theirs, "{ours} for {theirs}");
    assert!(close(&read("4").1, &read("1").1));
}

fn world(rank: usize, ranks: usize, port: u16) -> World {
    let (local_rank, local_ranks) = (rank, ranks);
    World { rank, ranks, local_rank, local_ranks, master: format!("127.0.0.1:{port}") }
}

fn connect(
    rank: usize,
    ranks: usize,
    port: u16,
    seconds: u64,
) -> beautiful_prompt::error::Result<Mesh> {
    Mesh::connect_within(&world(rank, ranks, port), Duration::from_secs(seconds), &|_| {})
}

/// A port that nobody listens at.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn ranks_meet_over_tcp_whatever_else_connects() {
    let port = free_port();
    std::thread::scope(|s| {
        let ranks = 4;
        let start = |rank| {
            s.spawn(move || {
                let mesh = connect(rank, ranks, port, 30).unwrap();
                // more than the queues of the connections hold
                let message = vec![rank as u8; 3_000_000 + rank];
                let all = mesh.exchange(message).unwrap();
                for (rank, message) in all.iter().enumerate() {
                    assert!(message.len() == 3_000_000 + rank);
                    assert!(message.iter().all(|&b| b == rank as u8));
                }
                let gathered = mesh.gather(vec![rank as u8]).unwrap();
                let expected = (0..ranks as u8).map(|rank| vec![rank]).collect::<Vec<_>>();
                assert_eq!(gathered, if rank == 0 { expected } else { vec![] });
            })
        };
        let mut threads = vec![start(0), start(2)];
        // somebody who is no rank, and somebody who says nothing
        let stranger = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        (&stranger).write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
        threads.extend([start(3), start(1)]);
        threads.into_iter().for_each(|t| t.join().unwrap());
        drop(silent);
    });
}

#[test]
fn ranks_that_do_not_fit_together_are_named() {
    let connect = |rank, ranks, port| connect(rank, ranks, port, 2).err();
    let both = |a: (usize, usize), b: (usize, usize)| {
        let port = free_port();
        std::thread::scope(|s| {
            let first = s.spawn(move || connect(a.0, a.1, port));
            let second = s.spawn(move || connect(b.0, b.1, port));
            let _ = second.join().unwrap();
            first.join().unwrap().expect("it cannot fit").to_string()
        })
    };
    let error = both((0, 2), (1, 3));
    assert!(error.contains("rank 1 of 3") && error.contains("WORLD_SIZE"), "{error}");
    let error = both((0, 3), (1, 3));
    assert!(error.contains("rank 2 of 3 and it did not come"), "{error}");
    let port = free_port();
    let error = connect(1, 2, port).unwrap().to_string();
    assert!(error.contains("does not reach") && error.contains("MASTER_ADDR"), "{error}");
    let _taken = TcpListener::bind(("0.0.0.0", port)).unwrap();
    let error = connect(0, 2, port).unwrap().to_string();
    assert!(error.contains("MASTER_PORT"), "{error}");
}

#[test]
fn a_rank_that_ends_is_named_by_those_that_wait_for_it() {
    let mut meshes = Mesh::in_process(3);
    drop(meshes.pop());
    let communicator = HostCommunicator::new(meshes.remove(0)).unwrap();
    let error = communicator.exchange_bytes(vec![1]).unwrap_err().to_string();
    assert!(error.contains("rank 2 has ended or"), "{error}");
}

const PAIRS: [(&str, &str); 4] = [
    ("a cat in the rain", "a cat in the rain, oil painting"),
    ("a house", "a house on a hill, evening light, detailed"),
    ("portrait of a queen", "portrait of a queen, studio lighting"),
    ("a ship", "a ship in a storm, dramatic sky, matte painting"),
];

/// Processes as a launcher starts them.
fn launch(
    folder: &Path,
    ranks: usize,
    more: impl Fn(usize) -> Vec<&'static str>,
) -> Vec<std::process::Output> {
    let port = free_port().to_string();
    let pairs = folder.join("pairs.jsonl");
    let line = |(raw, rich)| serde_json::json!({"raw_prompt": raw, "prompt": rich}).to_string();
    std::fs::write(&pairs, PAIRS.map(line).join("\n")).unwrap();
    let output = folder.join(format!("run-{ranks}"));
    let started: Vec<_> = (0..ranks)
        .map(|rank| {
            let fixed = ["train", "sft", "--device", "cpu", "--epochs", "1", "--precision", "f32"];
            let files = ["--train", path(&pairs), "--output", path(&output), "--threads", "1"];
            let mut command = bprompt(&[&fixed[..], &files[..], &more(rank)[..]].concat());
            command
                .env("WORLD_SIZE", ranks.to_string())
                .env("RANK", rank.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    started.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

#[test]
fn processes_train_together_and_rank_0_alone_writes() {
    let folder = tempfile::tempdir().unwrap();
    let settings = |_| vec!["--batch", "4", "--micro-tokens", "64", "--save-dtype", "f32"];
    for ranks in [1, 2] {
        let outputs = launch(folder.path(), ranks, settings);
        for (rank, out) in outputs.iter().enumerate() {
            assert!(out.status.success(), "{}", text(&out.stderr));
            let quiet = out.stdout.is_empty() && out.stderr.is_empty();
            assert_eq!(quiet, rank > 0, "rank {rank} says {}", text(&out.stderr));
        }
    }
    let loss = |ranks| {
        let file = folder.path().join(format!("run-{ranks}/metrics.jsonl"));
        let line = std::fs::read_to_string(file).unwrap();
        let line: StepMetrics = serde_json::from_str(line.trim()).unwrap();
        (line.loss, line.gradient_norm, line.tokens)
    };
    let ((one, norm, tokens), two) = (loss(1), loss(2));
    assert!((two.0 - one).abs() < 1e-5 * one && (two.1 - norm).abs() < 1e-4 * norm);
    assert_eq!(two.2, tokens);
    let model = BloomCheckpoint::open(&folder.path().join("run-2")).unwrap();
    assert!(model.to_f32().unwrap().iter().all(|v| v.is_finite()));
}

#[test]
fn ranks_with_other_settings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (flag, values, name) in [
        ("--seed", ["42", "7"], "seed"),
        ("--save-every", ["3", "0"], "save_every"),
        ("--template", ["v1", "v2"], "data"),
    ] {
        for out in launch(folder.path(), 2, |rank| vec![flag, values[rank]]) {
            let line = text(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{line}");
            let last = line.lines().last().unwrap_or_default();
            assert!(last.contains("other settings than rank 0 ("), "{line}");
            assert!(last.contains(name), "{line}");
        }
    }
    assert!(!folder.path().join("run-2").exists());
}
