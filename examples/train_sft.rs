//! Fine-tunes a small random model on made-up sequences, and reads the result back:
//! `cargo run --release --example train_sft`.

use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::models::bloom::training::{Recompute, TrainModel};
use beautiful_prompt::models::bloom::{BloomCheckpoint, BloomConfig};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::train::Precision;
use beautiful_prompt::train::examples::Example;
use beautiful_prompt::train::optimizer::AdamWOptions;
use beautiful_prompt::train::parallel::Alone;
use beautiful_prompt::train::report::StepMetrics;
use beautiful_prompt::train::run::{Observer, Outcome, Run, RunOptions};
use beautiful_prompt::train::schedule::Schedule;
use beautiful_prompt::train::sft::Sft;
use std::sync::atomic::AtomicBool;

/// Prints the loss now and then.
struct Printer;

impl Observer for Printer {
    fn step(&mut self, total: u64, metrics: &StepMetrics) {
        if metrics.step.is_multiple_of(10) {
            println!("step {} of {total}: loss {:.3}", metrics.step, metrics.loss);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let output = std::env::temp_dir().join("beautiful-prompt-example");
    std::fs::create_dir_all(&output)?;
    // each token is three more than the one before: three tokens of source, nine to learn
    let sequence = |start: u32| Example {
        ids: (0..12).map(|i| 4 + (start + 3 * i) % 60).collect(),
        loss_from: 3,
    };
    let cpu = Cpu::new(0, Isa::detect());
    let mut sft = Run {
        backend: &cpu,
        communicator: &Alone,
        model: TrainModel::random(BloomConfig::new(64, 64, 2, 4), 1),
        companions: Companions::default(),
        task: Sft {
            train: (0..60).map(sequence).collect(),
            validation: (60..64).map(sequence).collect(),
        },
        options: RunOptions {
            optimizer: AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 },
            learning_rate: 3e-3,
            schedule: Schedule::Cosine,
            warmup: 0.03,
            clip: 1.0,
            epochs: 8.0,
            max_steps: 0,
            batch: 12,
            micro_tokens: 512,
            precision: Precision::F32,
            recompute: Recompute::None,
            seed: 42,
            save_every: 0,
            validate_every: 0,
            keep: 1,
            output: output.clone(),
            settings: serde_json::json!({}),
        },
    };
    let outcome = sft.run(false, &AtomicBool::new(false), &mut Printer)?;
    let Outcome::Finished { validation } = outcome else { return Ok(()) };
    println!("held-out loss {:.3}", validation.map_or(f64::NAN, |v| v.loss));
    let newest = std::fs::read_dir(output.join("checkpoints"))?.next().ok_or("a checkpoint")??;
    let saved = BloomCheckpoint::open(&newest.path())?;
    println!("{} parameters in {}", saved.config.parameter_count(), newest.path().display());
    std::fs::remove_dir_all(&output)?;
    Ok(())
}
