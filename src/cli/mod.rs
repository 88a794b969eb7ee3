//! The program's subcommands: arguments, files and printing.

mod additions;
mod batch;
mod bench;
mod bench_ppo;
mod bench_serve;
mod data;
mod engine;
mod eval;
mod files;
mod generate;
mod guard;
mod hosted;
mod hub;
mod inspect;
mod model;
mod print;
mod ranks;
mod rewrite;
mod rewriter;
mod score;
mod selftest;
mod serve;
mod shell;
mod train;

pub use print::reader_left;

use crate::ops::cpu::Cpu;
use crate::ops::cpu::simd::{InstructionSet, Isa};
use anyhow::Context;
use clap::builder::{BoolishValueParser, OsStr, Resettable};
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use print::note;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rewrites plain text-to-image prompts into rich ones, with BLOOM on kernels of its own.
#[derive(Parser)]
#[command(name = "bprompt", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Rewrite plain prompts into rich ones.
    Rewrite(Box<rewrite::RewriteArgs>),
    /// Continue a text as it is, without a template.
    Generate(Box<generate::GenerateArgs>),
    /// Serve rewrites over HTTP: OpenAI's API, a page, metrics.
    Serve(Box<serve::ServeArgs>),
    /// Show what a model folder holds, or what is wrong with it.
    Inspect(inspect::InspectArgs),
    /// Measure rewrites on held-out prompts: words kept, words added, repetition, time.
    Eval(Box<eval::EvalArgs>),
    /// Score texts by a reward model.
    #[command(subcommand)]
    Score(score::ScoreCommand),
    /// Measure speed beside the machine's floors.
    #[command(subcommand)]
    Bench(Box<bench::BenchCommand>),
    /// Check every CUDA kernel on this machine's GPU against the CPU.
    Selftest(selftest::SelftestArgs),
    /// Make training data.
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Train a tokenizer or a model.
    #[command(subcommand)]
    Train(train::TrainCommand),
    /// Print a script that has a shell complete commands and flags.
    Completions(shell::CompletionsArgs),
    /// Print the manual page, or write the pages of all commands.
    Man(shell::ManArgs),
}

/// Where and how to compute.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and device")]
pub struct DeviceArgs {
    /// Threads to compute with; 0 takes every core that this process may use, and more than those
    /// are not taken.
    #[arg(short, long, default_value_t = 0, env = "BPROMPT_THREADS")]
    pub threads: usize,
    /// Instruction set: the best of this machine, or a lesser one for comparison.
    #[arg(long, value_enum, default_value_t = IsaChoice::Auto, env = "BPROMPT_ISA", hide = true)]
    pub isa: IsaChoice,
}

// the values' names say it all: doc comments would become help texts
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IsaChoice {
    Auto,
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
}

impl DeviceArgs {
    /// The CPU backend with the wanted threads and instruction set.
    ///
    /// # Errors
    ///
    /// Fails if this machine does not have the instruction set.
    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        self.cpu_among(1)
    }

    /// The CPU backend of one of so many processes on this machine, which share its cores unless a
    /// number of threads is wanted.
    ///
    /// # Errors
    ///
    /// As for [`DeviceArgs::cpu`].
    pub fn cpu_among(&self, processes: usize) -> anyhow::Result<Cpu> {
        let wanted = |set: InstructionSet| {
            let best = Isa::detect().name();
            set.get().with_context(|| {
                format!("--isa {}: this machine does not have it; best is {best}", set.name())
            })
        };
        let isa = match self.isa {
            IsaChoice::Auto => Isa::detect(),
            IsaChoice::Portable => wanted(InstructionSet::Portable)?,
            IsaChoice::Avx2 => wanted(InstructionSet::Avx2)?,
            IsaChoice::Avx512 => wanted(InstructionSet::Avx512)?,
            IsaChoice::Avx512Bf16 => wanted(InstructionSet::Avx512Bf16)?,
        };
        Ok(Cpu::new(self.capped_threads(processes), isa))
    }

    /// `--threads`, of which more than there are cores would only take time from each other.
    fn capped_threads(&self, processes: usize) -> usize {
        // what affinity and the control group leave of the machine
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        if self.threads == 0 && processes > 1 {
            return (cores / processes).max(1);
        }
        if self.threads > cores {
            note!(
                "--threads {}: this process may use {cores} cores; {cores} threads are taken",
                self.threads
            );
        }
        self.threads.min(cores)
    }
}

/// Fails with the flag's name if `value` is outside a range, which NaN always is.
fn within<T: PartialOrd + std::fmt::Display>(
    flag: &str,
    value: T,
    range: impl std::ops::RangeBounds<T>,
    text: &str,
) -> anyhow::Result<()> {
    anyhow::ensure!(range.contains(&value), "{flag} {value} is outside {text}");
    Ok(())
}

/// Has writing to a connection whose other end is gone fail instead of ending the program.
fn ignore_broken_pipes() {
    #[cfg(unix)]
    // SAFETY: the signal's default does nothing that others rely on.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// A flag that Ctrl-C or SIGTERM raises; a second one ends the program at once.
fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let raised = Arc::new(AtomicBool::new(false));
    let flag = raised.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    Ok(raised)
}

/// The command line as it is read, with what holds for every argument: a variable of the
/// environment that is empty is not set, those of switches say 0 or 1, yes or no, and a negative
/// number is a value that may be out of range, not a flag that nobody knows.
pub fn command() -> clap::Command {
    fn adapted(command: clap::Command) -> clap::Command {
        let arg = |arg: clap::Arg| {
            let variable = arg.get_env().map(std::env::var_os);
            let empty = matches!(&variable, Some(Some(value)) if value.is_empty());
            let switch = matches!(arg.get_action(), ArgAction::SetTrue);
            let negative = arg.get_action().takes_values() && !arg.is_positional();
            let arg = if switch && variable.is_some() {
                arg.value_parser(BoolishValueParser::new())
            } else {
                arg
            };
            let arg = if empty { arg.env(Resettable::<OsStr>::Reset) } else { arg };
            if negative { arg.allow_negative_numbers(true) } else { arg }
        };
        command.mut_args(arg).mut_subcommands(adapted)
    }
    let command = Cli::command().mut_subcommand("train", train::with_defaults);
    adapted(command.mut_subcommand("score", score::with_help))
}

impl Cli {
    /// Reads the command line.
    pub fn read() -> Result<Cli, clap::Error> {
        Cli::from_arg_matches(&command().try_get_matches()?)
    }

    /// Runs the subcommand, and writes out what is left of its standard output.
    pub fn run(self) -> anyhow::Result<()> {
        self.command.run()?;
        Ok(print::stdout().flush()?)
    }
}

impl Command {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Rewrite(c) => c.run(),
            Command::Generate(c) => c.run(),
            Command::Serve(c) => c.run(),
            Command::Inspect(c) => c.run(),
            Command::Eval(c) => c.run(),
            Command::Score(c) => c.run(),
            Command::Bench(c) => c.run(),
            Command::Selftest(args) => args.run(),
            Command::Data(c) => c.run(),
            Command::Train(c) => c.run(),
            Command::Completions(args) => args.run(),
            Command::Man(args) => args.run(),
        }
    }
}
