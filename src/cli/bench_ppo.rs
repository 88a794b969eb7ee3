//! `bprompt bench ppo`: rounds of PPO on random weights.

use super::bench::explain;
use super::model::{DeviceChoice, driver};
use super::print::{self, print_line};
use super::train::PrecisionChoice;
use super::{DeviceArgs, within};
use crate::bench::ppo::{PpoBenchOptions, PpoReport, run};
use crate::device::cuda::Driver;
use crate::models::bloom::{MAX_CONTEXT, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY};
use crate::ops::cuda::Cuda;
use crate::tensor::DType;
use anyhow::ensure;
use clap::Args;
use std::rc::Rc;

#[derive(Args)]
pub struct PpoBenchArgs {
    /// Width of the policy, at least 1 and a multiple of --heads.
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Layers of the policy, at least 1.
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Heads of a layer's attention, at least 1.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Tokens of the vocabulary, at least 3.
    #[arg(long, default_value_t = 6144)]
    vocab: usize,
    /// Rollouts of a round, at least 1.
    #[arg(long, default_value_t = 64)]
    rollouts: usize,
    /// Tokens of a prompt, at least 1.
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens of a response, at least 1.
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Passes over a round's rollouts, at least 1.
    #[arg(long, default_value_t = 4)]
    epochs: usize,
    /// Rollouts of an optimizer step, at least 1.
    #[arg(long, default_value_t = 8)]
    minibatch: usize,
    /// Last layers that are trained, at least 1; all of them if there are no more.
    #[arg(long, default_value_t = 8)]
    unfrozen_layers: usize,
    #[arg(long, value_enum, default_value_t = PrecisionChoice::Bf16)]
    precision: PrecisionChoice,
    /// Where to compute.
    #[arg(long = "device", value_enum, default_value_t = DeviceChoice::Cpu)]
    #[arg(env = "BPROMPT_DEVICE")]
    device_choice: DeviceChoice,
    /// Rounds that are measured after a first one, at least 1.
    #[arg(long, default_value_t = 2)]
    repeats: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl PpoBenchArgs {
    pub fn run(self) -> anyhow::Result<()> {
        within("--hidden", self.hidden, 1..=MAX_HIDDEN, "[1, 262144]")?;
        within("--layers", self.layers, 1..=MAX_LAYERS, "[1, 4096]")?;
        within("--heads", self.heads, 1..=MAX_HEADS, "[1, 4096]")?;
        within("--vocab", self.vocab, 3..=MAX_VOCABULARY, "[3, 16777216]")?;
        within("--rollouts", self.rollouts, 1..=1 << 16, "[1, 65536]")?;
        within("--prompt-tokens", self.prompt_tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--new-tokens", self.new_tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--epochs", self.epochs, 1..=1000, "[1, 1000]")?;
        within("--minibatch", self.minibatch, 1..=1 << 16, "[1, 65536]")?;
        within("--unfrozen-layers", self.unfrozen_layers, 1.., "[1, ...]")?;
        within("--repeats", self.repeats, 1..=10_000, "[1, 10000]")?;
        ensure!(
            self.hidden.is_multiple_of(self.heads),
            "--hidden {} is not divisible by --heads {}",
            self.hidden,
            self.heads
        );
        let options = PpoBenchOptions {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            vocab: self.vocab,
            rollouts: self.rollouts,
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            epochs: self.epochs,
            minibatch: self.minibatch,
            unfrozen_layers: self.unfrozen_layers,
            precision: self.precision.into(),
            repeats: self.repeats,
        };
        let supported = || Cuda::<Driver>::supports(self.hidden, self.heads);
        let report = match driver(self.device_choice, 0, supported)? {
            Some(driver) => run(&Cuda::new(Rc::new(driver), DType::Bf16, false), options)?,
            None => run(&self.device.cpu()?, options)?,
        };
        if self.json { Ok(print::json(&report)?) } else { show(&report) }
    }
}

fn show(r: &PpoReport) -> anyhow::Result<()> {
    let [rollout, reward, train, other] = r.seconds;
    print_line!(
        "{} parameters, of which {} are trained, in {}: {:.2} rollouts/s",
        r.parameters[0],
        r.parameters[1],
        r.precision,
        r.rollouts_per_second
    )?;
    print_line!(
        "rollouts {rollout:.2} s, scoring {reward:.2} s, training {train:.2} s, the rest \
        {other:.3} s ({:.1} %)",
        100.0 * r.other_share
    )?;
    print_line!(
        "{:.0} GFLOP (rollouts {:.0}, evaluation {:.0}, training {:.0}), floor {:.2} s ({})",
        r.flops.iter().sum::<f64>() / 1e9,
        r.flops[0] / 1e9,
        r.flops[1] / 1e9,
        r.flops[2] / 1e9,
        r.compared.floor,
        r.compared.shown()
    )?;
    print_line!("measured beside it: peak {:.0} GFLOP/s", r.compared.peaks.peak_gigaflops)?;
    Ok(explain([r.compared.bound].into_iter())?)
}
