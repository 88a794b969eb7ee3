//! The `bprompt` program.

use beautiful_prompt::cli::Cli;
use clap::Parser;
use clap::error::ErrorKind;
use std::process::ExitCode;

fn main() -> ExitCode {
    // a closed pipe ends the program quietly, as it does every other one
    #[cfg(unix)]
    // SAFETY: called first, while there is one thread.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => e.exit(),
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => e.exit(),
        Err(e) => {
            // clap's message up to the usage, on one line
            let text = e.to_string();
            let lines = text.lines().take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"));
            let line: Vec<&str> = lines.map(str::trim).filter(|l| !l.is_empty()).collect();
            eprintln!("{}; see --help", line.join(" "));
            return ExitCode::from(2);
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}
