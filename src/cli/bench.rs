//! `bprompt bench`: measures speed compared with the machine's floors.

use super::DeviceArgs;
use super::hub::model_folder;
use super::model::{DTypeChoice, Device, DeviceChoice, ModelArgs, Placed, driver};
use super::print::{self, print_line};
use super::train::{PrecisionChoice, RecomputeChoice};
use super::within;
use crate::bench::floor::Bound;
use crate::bench::kernels::{self, KernelOptions, KernelReport};
use crate::bench::llm::{LlmOptions, LlmReport, Phase, random_checkpoint, run};
use crate::bench::train::{self, TrainBenchOptions};
use crate::bench::train_kernels::{self, TrainKernelOptions};
use crate::device::cuda::Driver;
use crate::models::bloom::BloomCheckpoint;
use crate::models::bloom::{
    BloomConfig, MAX_CONTEXT, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY,
};
use crate::models::embedded;
use crate::ops::cuda::Cuda;
use crate::ops::train::Precision;
use crate::tensor::DType;
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use std::rc::Rc;

/// Largest numbers of sequences and repeats that are taken: whether there is memory for them is
/// another question.
const MAX_SEQUENCES: usize = 1 << 20;
const MAX_REPEATS: usize = 10_000;

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Prefill and decode of a language model.
    Llm(LlmArgs),
    /// The operations of a language model, one by one.
    Kernels(KernelArgs),
    /// A training step: forward, backward, AdamW.
    Train(TrainArgs),
    /// Rounds of PPO: rollouts and training.
    Ppo(super::bench_ppo::PpoBenchArgs),
    /// Load on a server of OpenAI's API: throughput and latencies.
    Serve(super::bench_serve::ServeBenchArgs),
}

#[derive(Args)]
pub struct TrainArgs {
    /// Width of the model, at least 1 and a multiple of --heads.
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Layers of the model, at least 1.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Heads of a layer's attention, at least 1.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Tokens of the vocabulary, at least 1.
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Sequences of a step, at least 1.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a sequence, at least 2: the first is not predicted.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    #[arg(long, value_enum, default_value_t = PrecisionChoice::Bf16)]
    precision: PrecisionChoice,
    /// What the backward pass computes again instead of keeping it.
    #[arg(long, value_enum, default_value_t = RecomputeChoice::None)]
    recompute: RecomputeChoice,
    /// Where to compute.
    #[arg(long = "device", value_enum, default_value_t = DeviceChoice::Cpu)]
    #[arg(env = "BPROMPT_DEVICE")]
    device_choice: DeviceChoice,
    /// Steps that are measured, at least 1.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Args)]
pub struct LlmArgs {
    /// Random weights of this shape (bloom-560m, bloom-1b1, bloom-1b7, bloom-3b, bloom-7b1) instead
    /// of a model.
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Tokens of each prompt, at least 1.
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens to generate after each prompt, at least 1.
    #[arg(long, default_value_t = 32)]
    new_tokens: usize,
    /// Sequences at once, at least 1.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Times that all is measured, at least 1.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Args)]
pub struct KernelArgs {
    /// bloom-560m, bloom-1b1, bloom-1b7, bloom-3b or bloom-7b1.
    #[arg(long, default_value = "bloom-1b1")]
    shape: String,
    /// Sequences of decoding steps, each at least 1.
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    batch: Vec<usize>,
    /// Positions of each, at least 1.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Prompts, as sequences x tokens, both at least 1.
    #[arg(long, value_delimiter = ',', default_value = "1x128", value_parser = prefill)]
    prefill: Vec<(usize, usize)>,
    /// Also products of square matrices, with so many rows: multiples of 16, at least 16.
    #[arg(long, value_delimiter = ',')]
    squares: Vec<usize>,
    /// The operations of a training step instead, of so many sequences x tokens.
    #[arg(long, value_name = "SEQUENCESxTOKENS", value_parser = prefill)]
    #[arg(num_args = 0..=1, default_missing_value = "16x384")]
    #[arg(conflicts_with_all = ["batch", "context", "prefill", "squares"])]
    train: Option<(usize, usize)>,
    /// Calls of each operation, at least 1.
    #[arg(long, default_value_t = 24)]
    calls: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Reads `64x128`.
fn prefill(text: &str) -> Result<(usize, usize), String> {
    let sizes = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    sizes
        .filter(|s: &(usize, usize)| s.0 > 0 && s.1 > 0)
        .ok_or_else(|| "expected sequences x tokens, such as 64x128".into())
}

impl KernelArgs {
    fn run(self) -> anyhow::Result<()> {
        ensure!(
            self.model.model.is_none(),
            "bench kernels measures random weights: --shape instead of --model"
        );
        for &batch in &self.batch {
            within("--batch", batch, 1..=MAX_SEQUENCES, "[1, 1048576]")?;
        }
        within("--context", self.context, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--calls", self.calls, 1..=100_000, "[1, 100000]")?;
        for &(sequences, tokens) in &self.prefill {
            within("--prefill: sequences", sequences, 1..=MAX_SEQUENCES, "[1, 1048576]")?;
            within("--prefill: tokens", tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        }
        ensure!(
            self.squares.iter().all(|n| (1..=1 << 20).contains(n) && n.is_multiple_of(16)),
            "--squares takes multiples of 16 up to 1048576, such as 8192"
        );
        let config = published(&self.shape)?;
        let dtype = self.model.dtype.dtype().unwrap_or(DType::Bf16);
        let report = match self.train {
            Some(sizes) => self.train(config, dtype, sizes)?,
            None => self.inference(config, dtype)?,
        };
        match self.json {
            true => Ok(print::json(&report)?),
            false => print_kernels(&report),
        }
    }

    fn inference(&self, config: BloomConfig, dtype: DType) -> anyhow::Result<KernelReport> {
        let options = KernelOptions {
            batches: self.batch.clone(),
            context: self.context,
            prefills: self.prefill.clone(),
            squares: self.squares.clone(),
            calls: self.calls,
        };
        Ok(match self.model.device(&config)? {
            Device::Cpu(cpu) => kernels::run(&cpu, config, dtype, &options)?,
            Device::Cuda(driver) => {
                let cuda = self.model.cuda(driver, dtype, &config)?;
                kernels::run(&cuda, config, dtype, &options)?
            }
        })
    }

    fn train(
        &self,
        config: BloomConfig,
        dtype: DType,
        (sequences, tokens): (usize, usize),
    ) -> anyhow::Result<KernelReport> {
        within("--train: sequences", sequences, 1..=MAX_SEQUENCES, "[1, 1048576]")?;
        within("--train: tokens", tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        let precision = match dtype {
            DType::Bf16 => Precision::Bf16,
            DType::F32 => Precision::F32,
            _ => bail!("training computes in bf16 or f32: --dtype bf16 or --dtype f32"),
        };
        let options = TrainKernelOptions { sequences, tokens, precision, calls: self.calls };
        Ok(match self.model.device(&config)? {
            Device::Cpu(cpu) => train_kernels::run(&cpu, config, options)?,
            Device::Cuda(driver) => {
                let cuda = self.model.cuda(driver, dtype, &config)?;
                train_kernels::run(&cuda, config, options)?
            }
        })
    }
}

fn print_kernels(report: &KernelReport) -> anyhow::Result<()> {
    print_line!("{} weights, {} ({})", report.weights, report.processor, report.isa)?;
    print_line!(
        "best measured: read {:.1} GB/s, peak {:.0} GFLOP/s; beside each figure what was \
        reached before and after it",
        report.best.read_gigabytes_per_second,
        report.best.peak_gigaflops
    )?;
    print_line!(
        "{:30}{:>10}{:>8}{:>11}{:>9}{:>9}{:>9}{:>9}{:>11}{:>15}",
        "",
        "tokens",
        "of",
        "us",
        "GB/s",
        "of",
        "TFLOP/s",
        "of",
        "floor us",
        "fraction"
    )?;
    for r in &report.rows {
        print_line!(
            "{:30}{:>10}{:>8}{:>11.1}{:>9.1}{:>9.1}{:>9.2}{:>9.2}{:>11.1}{:>15}",
            r.operation,
            format!("{} x {}", r.sequences, r.tokens),
            r.positions,
            r.microseconds,
            r.gigabytes_per_second,
            r.compared.peaks.read_gigabytes_per_second,
            r.teraflops,
            r.compared.peaks.peak_gigaflops / 1e3,
            r.floor_microseconds,
            r.compared.shown()
        )?;
    }
    explain(report.rows.iter().map(|r| r.compared.bound))?;
    Ok(())
}

fn published(shape: &str) -> anyhow::Result<BloomConfig> {
    BloomConfig::published(shape).with_context(|| {
        format!(
            "--shape {shape} is unknown; try bloom-560m, bloom-1b1, bloom-1b7, bloom-3b or \
            bloom-7b1"
        )
    })
}

impl BenchCommand {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            BenchCommand::Llm(args) => args.run(),
            BenchCommand::Kernels(args) => args.run(),
            BenchCommand::Train(args) => args.run(),
            BenchCommand::Ppo(args) => args.run(),
            BenchCommand::Serve(args) => args.run(),
        }
    }
}

impl TrainArgs {
    fn run(self) -> anyhow::Result<()> {
        within("--hidden", self.hidden, 1..=MAX_HIDDEN, "[1, 262144]")?;
        within("--layers", self.layers, 1..=MAX_LAYERS, "[1, 4096]")?;
        within("--heads", self.heads, 1..=MAX_HEADS, "[1, 4096]")?;
        within("--vocab", self.vocab, 1..=MAX_VOCABULARY, "[1, 16777216]")?;
        within("--batch", self.batch, 1..=MAX_SEQUENCES, "[1, 1048576]")?;
        within(
            "--tokens",
            self.tokens,
            2..=MAX_CONTEXT,
            "[2, 16777216]: the first token is not predicted",
        )?;
        within("--repeats", self.repeats, 1..=MAX_REPEATS, "[1, 10000]")?;
        ensure!(
            self.hidden.is_multiple_of(self.heads),
            "--hidden {} is not divisible by --heads {}",
            self.hidden,
            self.heads
        );
        let options = TrainBenchOptions {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            vocab: self.vocab,
            sequences: self.batch,
            tokens: self.tokens,
            precision: self.precision.into(),
            recompute: self.recompute.into(),
            repeats: self.repeats,
        };
        let supported = || Cuda::<Driver>::supports(self.hidden, self.heads);
        let report = match driver(self.device_choice, 0, supported)? {
            Some(driver) => train::run(&Cuda::new(Rc::new(driver), DType::Bf16, false), options)?,
            None => train::run(&self.device.cpu()?, options)?,
        };
        if self.json {
            print::json(&report)?;
        } else {
            print_line!(
                "{} parameters, {} tokens a step in {}: {:.0} tokens/s, {:.1} ms, {:.1} GFLOP, \
                floor {:.1} ms ({})",
                report.parameters,
                report.tokens_per_step,
                report.precision,
                report.tokens_per_second,
                report.milliseconds,
                report.flops / 1e9,
                report.floor_milliseconds,
                report.compared.shown()
            )?;
            print_line!(
                "measured beside it: peak {:.0} GFLOP/s",
                report.compared.peaks.peak_gigaflops
            )?;
            explain([report.compared.bound].into_iter())?;
        }
        Ok(())
    }
}

impl LlmArgs {
    fn run(self) -> anyhow::Result<()> {
        within("--prompt-tokens", self.prompt_tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--new-tokens", self.new_tokens, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--batch", self.batch, 1..=MAX_SEQUENCES, "[1, 1048576]")?;
        within("--repeats", self.repeats, 1..=MAX_REPEATS, "[1, 10000]")?;
        let dtype = self.model.dtype.dtype();
        let checkpoint = match (&self.shape, &self.model.model) {
            (Some(shape), _) => random_checkpoint(published(shape)?, dtype.unwrap_or(DType::Bf16))?,
            (None, Some(model)) => BloomCheckpoint::open(&model_folder(model)?)?,
            (None, None) => embedded::checkpoint(),
        };
        let dtype = if self.model.dtype == DTypeChoice::Auto { None } else { dtype };
        let options = LlmOptions {
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            batch: self.batch,
            repeats: self.repeats,
        };
        let report = match self.model.place(checkpoint, dtype)? {
            Placed::Cpu(cpu, model) => run(&cpu, &model, options)?,
            Placed::Cuda(cuda, model) => run(&*cuda, &model, options)?,
        };
        if self.json {
            print::json(&report)?;
        } else {
            print(&report)?;
        }
        Ok(())
    }
}

/// Says what the labels in a table mean, of those that are in it.
pub fn explain(bounds: impl Iterator<Item = Bound> + Clone) -> std::io::Result<()> {
    if bounds.clone().any(|b| b == Bound::Cache) {
        print_line!(
            "from cache: all that is read fits into the last cache, so memory's bandwidth is no \
            floor"
        )?;
    }
    if bounds.clone().any(|b| b == Bound::Beyond) {
        print_line!(
            "beyond: the machine reached more during the work than right before and after it"
        )?;
    }
    Ok(())
}

fn print(r: &LlmReport) -> std::io::Result<()> {
    print_line!(
        "{} parameters in {}, {} threads of {} ({})",
        r.parameters,
        r.weights,
        r.threads,
        r.processor,
        r.isa
    )?;
    print_line!(
        "best measured: read {:.1} GB/s, {} peak {:.0} GFLOP/s; beside each figure what was \
        reached before and after it",
        r.best.read_gigabytes_per_second,
        r.weights,
        r.best.peak_gigaflops
    )?;
    print_line!(
        "{:28}{:>10}{:>11}{:>10}{:>10}{:>9}{:>9}{:>11}{:>15}",
        "",
        "tokens/s",
        "ms",
        "MB",
        "GFLOP",
        "GB/s",
        "GFLOP/s",
        "floor ms",
        "fraction"
    )?;
    let line = |name: String, p: &Phase| {
        print_line!(
            "{name:28}{:>10.1}{:>11.2}{:>10.1}{:>10.2}{:>9.1}{:>9.0}{:>11.2}{:>15}",
            p.tokens_per_second,
            p.milliseconds,
            p.bytes / 1e6,
            p.flops / 1e9,
            p.compared.peaks.read_gigabytes_per_second,
            p.compared.peaks.peak_gigaflops,
            p.floor_milliseconds,
            p.compared.shown()
        )
    };
    line(format!("prefill {} x {}", r.batch, r.prompt_tokens), &r.prefill)?;
    line(format!("decode {} x {}", r.batch, r.new_tokens), &r.decode)?;
    explain([r.prefill.compared.bound, r.decode.compared.bound].into_iter())?;
    if let Some(bytes) = r.peak_memory_bytes {
        print_line!("peak memory {:.0} MB", bytes as f64 / 1e6)?;
    }
    for step in &r.steps {
        let one = step
            .one_kernel_microseconds
            .map_or("not possible".to_owned(), |t| format!("{t:.0} us"));
        print_line!(
            "a step of {} tokens: {:.0} us in launches, in one kernel {one}",
            step.tokens,
            step.launches_microseconds
        )?;
    }
    Ok(())
}
