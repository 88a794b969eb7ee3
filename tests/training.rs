//! Fine-tuning runs: they learn, repeat, resume bit for bit, and stop at nonsense.

use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::models::bloom::BloomCheckpoint;
use beautiful_prompt::models::bloom::BloomConfig;
use beautiful_prompt::models::bloom::training::{Backward, Recompute, TrainModel, Workspace};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::train::{PackedBatch, Precision, StepSums};
use beautiful_prompt::random::PhiloxStream;
use beautiful_prompt::train::examples::{Example, pack};
use beautiful_prompt::train::optimizer::AdamWOptions;
use beautiful_prompt::train::parallel::Alone;
use beautiful_prompt::train::report::{Metrics, StepMetrics};
use beautiful_prompt::train::run::{Observer, Outcome, Run, RunOptions};
use beautiful_prompt::train::schedule::Schedule;
use beautiful_prompt::train::sft::Sft;
use beautiful_prompt::train::state;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sequences whose second half repeats the first: attention has something to learn.
fn examples(count: usize, seed: u64) -> Vec<Example> {
    let mut words = PhiloxStream::new(seed, 0);
    let one = |words: &mut PhiloxStream| {
        let half: Vec<u32> = (0..3 + words.below(5)).map(|_| 4 + words.below(20) as u32).collect();
        let ids = [&half[..], &[3], &half[..], &[2]].concat();
        Example { loss_from: half.len() + 1, ids }
    };
    (0..count).map(|_| one(&mut words)).collect()
}

fn options(output: &Path) -> RunOptions {
    RunOptions {
        optimizer: AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 },
        learning_rate: 3e-3,
        schedule: Schedule::Cosine,
        warmup: 0.1,
        clip: 1.0,
        epochs: 12.0,
        max_steps: 0,
        batch: 16,
        micro_tokens: 100,
        precision: Precision::F32,
        recompute: Recompute::None,
        seed: 42,
        save_every: 27,
        validate_every: 5,
        keep: 2,
        output: output.into(),
        settings: serde_json::json!({"learning_rate": 3e-3}),
    }
}

fn sft<'a>(cpu: &'a Cpu, options: RunOptions) -> Run<'a, Cpu, Sft> {
    let model = TrainModel::random(BloomConfig::new(24, 32, 2, 2), 1);
    Run {
        backend: cpu,
        communicator: &Alone,
        model,
        companions: Companions::default(),
        task: Sft { train: examples(96, 1), validation: examples(16, 2) },
        options,
    }
}

/// Raises the flag after so many steps.
struct StopAfter<'a>(u64, &'a AtomicBool);

impl Observer for StopAfter<'_> {
    fn step(&mut self, _: u64, metrics: &StepMetrics) {
        if metrics.step == self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

fn run(sft: &mut Run<Cpu, Sft>, resume: bool, stop_after: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    sft.run(resume, &stop, &mut StopAfter(stop_after, &stop)).unwrap()
}

fn losses(folder: &Path) -> Vec<(u64, f64)> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let steps = text.lines().map(|l| serde_json::from_str::<StepMetrics>(l).unwrap());
    steps.map(|s| (s.step, s.loss)).collect()
}

/// The lines of metrics.jsonl as they stand there, but for the speed.
fn lines_without_time(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let without = |line: &str| {
        let (before, rest) = line.split_once("\"tokens_per_second\":").unwrap();
        let end = rest.find([',', '}']).unwrap();
        format!("{before}{}", &rest[end..])
    };
    text.lines().map(without).collect()
}

/// Numbers that a parser of one step of rounding less would bring back changed.
#[test]
fn metrics_keep_every_digit_when_a_run_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let number = |i: u32| f64::from(i % 60 + 1).sqrt().exp2() * (1e-3 + f64::from(i) * 7.3e-7);
    let numbers: Vec<f64> = (1..2000).map(number).collect();
    let step = |(i, &x): (usize, &f64)| StepMetrics {
        step: i as u64 + 1,
        epoch: x / 3.0,
        loss: x,
        learning_rate: x.sqrt(),
        gradient_norm: x.recip(),
        tokens: i,
        tokens_per_second: x / 7.0,
        validation_loss: (i % 3 == 0).then_some(x * 1.1),
        validation: Default::default(),
    };
    let mut metrics = Metrics::open(&path, 0).unwrap();
    numbers.iter().enumerate().map(step).for_each(|s| metrics.push(s).unwrap());
    let before = std::fs::read_to_string(&path).unwrap();
    let resumed = Metrics::open(&path, 1500).unwrap();
    assert_eq!(resumed.steps.len(), 1500);
    let after = std::fs::read_to_string(&path).unwrap();
    assert!(before.starts_with(&after) && after.lines().count() == 1500);
    let parsed = |s: &str| serde_json::from_str::<StepMetrics>(s).unwrap().loss;
    assert!(
        before.lines().zip(&numbers).any(|(l, x)| parsed(l) != *x),
        "the numbers show nothing: all parse exactly"
    );
    // a last line that a crash has cut is left out, a broken one in the middle is named
    std::fs::write(&path, format!("{}{{\"step\": 1501", after)).unwrap();
    assert_eq!(Metrics::open(&path, 1501).unwrap().steps.len(), 1500);
    std::fs::write(&path, after.replacen("\"loss\"", "\"lost\"", 1)).unwrap();
    assert!(Metrics::open(&path, 1501).err().unwrap().to_string().contains("line 1 "));
}

#[test]
fn a_run_learns_and_an_interrupted_one_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    std::fs::create_dir_all(&one).unwrap();
    std::fs::create_dir_all(&two).unwrap();
    let cpu = Cpu::new(2, Isa::detect());
    let mut whole = sft(&cpu, options(&one));
    let Outcome::Finished { validation } = run(&mut whole, false, 0) else { panic!("stopped") };
    let history = losses(&one);
    assert_eq!(history.len() as u64, whole.total_steps());
    assert!(history.last().unwrap().1 < 0.9 * history[0].1, "{history:?}");
    assert!(validation.unwrap().loss < history[0].1);
    assert!(std::fs::read_to_string(one.join("loss.svg")).unwrap().contains("<svg"));

    // stopped at steps 3 and 11, each time gone on with a fresh process's state and other threads
    let mut cut = sft(&cpu, options(&two));
    assert!(matches!(run(&mut cut, false, 3), Outcome::Stopped(_)));
    let cpu = Cpu::new(1, Isa::detect());
    let mut cut = sft(&cpu, options(&two));
    assert!(matches!(run(&mut cut, true, 11), Outcome::Stopped(_)));
    let mut cut = sft(&cpu, options(&two));
    assert!(matches!(run(&mut cut, true, 0), Outcome::Finished { .. }));
    assert!(cut.model.values == whole.model.values, "weights differ");
    assert_eq!(losses(&two), history);
    assert_eq!(lines_without_time(&two), lines_without_time(&one), "metrics.jsonl differs");
    assert_eq!(
        state::list(&two.join("checkpoints")).unwrap().len(),
        2,
        "old checkpoints are removed"
    );
}

#[test]
fn resuming_with_other_settings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Cpu::new(1, Isa::detect());
    run(&mut sft(&cpu, options(folder.path())), false, 2);
    // numbers of many digits are the same settings when they are read back
    let exact = |folder: &Path| {
        let mut options = options(folder);
        options.settings = (1..200)
            .map(|i| (i.to_string(), (i as f64).sqrt().recip().into()))
            .collect::<serde_json::Map<_, _>>()
            .into();
        options
    };
    let second = tempfile::tempdir().unwrap();
    run(&mut sft(&cpu, exact(second.path())), false, 2);
    assert!(matches!(run(&mut sft(&cpu, exact(second.path())), true, 3), Outcome::Stopped(_)));
    let mut other = options(folder.path());
    other.settings = serde_json::json!({"learning_rate": 1e-3});
    let stop = AtomicBool::new(false);
    let e = sft(&cpu, other).run(true, &stop, &mut StopAfter(0, &stop)).unwrap_err().to_string();
    assert!(e.contains("learning_rate"), "{e}");
}

#[test]
fn nonsense_stops_the_run_and_leaves_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Cpu::new(1, Isa::detect());
    run(&mut sft(&cpu, options(folder.path())), false, 4);
    let good = state::list(&folder.path().join("checkpoints")).unwrap();
    let mut broken = sft(&cpu, options(folder.path()));
    broken.options.learning_rate = f64::NAN;
    let stop = AtomicBool::new(false);
    let e = broken.run(true, &stop, &mut StopAfter(0, &stop)).unwrap_err().to_string();
    assert!(e.contains("step 6") && e.contains("step-0000004"), "{e}");
    let kept = state::list(&folder.path().join("checkpoints")).unwrap();
    assert_eq!(kept, good);
    assert!(
        BloomCheckpoint::open(&kept[0].1).unwrap().to_f32().unwrap().iter().all(|v| v.is_finite())
    );
}

#[test]
fn accumulated_gradients_equal_those_of_one_pass() {
    let cpu = Cpu::new(2, Isa::detect());
    let model = TrainModel::random(BloomConfig::new(24, 32, 2, 2), 1);
    let examples = examples(20, 3);
    let gradients = |budget: usize| {
        let mut grads = vec![0f32; model.values.len()];
        let batches = pack(examples.iter(), budget);
        for b in &batches {
            let (mut space, mut sums) = (Workspace::default(), StepSums::default());
            let out = Some((1.0, Backward::to(&mut grads)));
            model.loss(&cpu, (Precision::F32, b), &mut space, out, &mut sums);
        }
        (batches.len(), grads)
    };
    let ((many, a), (one, b)) = (gradients(40), gradients(10_000));
    assert!(many > 5 && one == 1);
    let norm: f32 = b.iter().map(|v| v * v).sum::<f32>().sqrt();
    let difference: f32 = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().sqrt();
    assert!(difference < 1e-5 * norm, "{difference} of {norm}");
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let cpu = Cpu::new(1, Isa::detect());
    let model = TrainModel::random(BloomConfig::new(24, 32, 2, 2), 1);
    let examples = examples(3, 4);
    let loss = |examples: &[Example]| {
        let mut batch = PackedBatch::default();
        examples.iter().for_each(|e| batch.push(&e.ids, e.loss_from));
        let mut sums = StepSums::default();
        let batch = (Precision::F32, &batch);
        model.loss(&cpu, batch, &mut Workspace::default(), None, &mut sums);
        sums.loss
    };
    let apart: f64 = examples.iter().map(|e| loss(std::slice::from_ref(e))).sum();
    assert!((loss(&examples) - apart).abs() < 1e-5 * apart);
}
