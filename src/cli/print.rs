//! Printing that cannot end in a panic: a full disk or a closed pipe is an error of standard
//! output, and what standard error does not take is lost, because there is nowhere left to tell of
//! it.

use std::fmt::Arguments;
use std::io::{Error, ErrorKind, Result, StdoutLock, Write};

/// Standard output, which names itself in its errors.
pub struct Stdout(StdoutLock<'static>);

pub fn stdout() -> Stdout {
    Stdout(std::io::stdout().lock())
}

#[derive(Debug, thiserror::Error)]
#[error("standard output: cannot write: {0}")]
struct Unwritten(Error);

fn named(e: Error) -> Error {
    Error::new(e.kind(), Unwritten(e))
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.write(bytes).map_err(named)
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush().map_err(named)
    }
}

/// Writes a line to standard output; `print_line!` is its shorter form.
pub fn line(text: Arguments) -> Result<()> {
    writeln!(stdout(), "{text}")
}

/// Writes a value to standard output as indented JSON.
pub fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(line(format_args!("{}", serde_json::to_string_pretty(value)?))?)
}

/// Writes a line to standard error, if it can be written; `note!` is its shorter form.
pub fn note_line(text: Arguments) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Whether an error only says that whoever read standard output does not want more of it.
pub fn reader_left(error: &anyhow::Error) -> bool {
    let of_stdout = |e: &Error| e.get_ref().is_some_and(|inner| inner.is::<Unwritten>());
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<Error>())
        .any(|e| e.kind() == ErrorKind::BrokenPipe && of_stdout(e))
}

/// `println!` that returns an error instead of panicking.
macro_rules! print_line {
    ($($text:tt)*) => { $crate::cli::print::line(format_args!($($text)*)) };
}

/// `eprintln!` that goes on where standard error is closed or full.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::print::note_line(format_args!($($text)*)) };
}

pub(crate) use {note, print_line};
