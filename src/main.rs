//! The `bprompt` program.

use beautiful_prompt::cli::{Cli, reader_left};
use clap::error::ErrorKind;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // a closed pipe ends the program quietly, as it does every other one
    #[cfg(unix)]
    // SAFETY: called first, while there is one thread.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let printed = e.print().and_then(|()| std::io::stdout().flush());
            return printed.map_or_else(
                |e| failed(format_args!("error: standard output: cannot write: {e}")),
                |()| ExitCode::SUCCESS,
            );
        }
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = e.print();
            return ExitCode::from(2);
        }
        Err(e) => {
            // clap's message up to the usage, on one line
            let text = e.to_string();
            let lines =
                text.lines().take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"));
            let line: Vec<&str> = lines.map(str::trim).filter(|l| !l.is_empty()).collect();
            // what Rust says about a number says little about what is expected
            let line = line
                .join(" ")
                .replace("invalid digit found in string", "expected a whole number, 0 or more");
            let line = line.replace("invalid float literal", "expected a number");
            return failed(format_args!("{line}; see --help"));
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        // as a shell reports a program that the signal of a closed pipe ended
        Err(e) if reader_left(&e) => ExitCode::from(141),
        Err(e) => failed(format_args!("error: {e:#}")),
    }
}

/// Says what is wrong, where standard error takes it.
fn failed(line: std::fmt::Arguments) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{line}");
    ExitCode::from(2)
}
