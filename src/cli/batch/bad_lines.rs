//! Lines that have no result: counted, or the end of the run.

use crate::cli::print::note;
use anyhow::anyhow;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The bad lines of a run.
pub struct BadLines {
    /// Whether the run goes on without them.
    skip: bool,
    /// The numbers of those that were left out.
    pub lines: Vec<u64>,
    /// The first line that ends the run, and why.
    pub failure: Option<(u64, anyhow::Error)>,
}

impl BadLines {
    pub fn new(skip: bool) -> BadLines {
        BadLines { skip, lines: vec![], failure: None }
    }

    /// Takes a bad line; whether the run goes on without it.
    pub fn skips(&mut self, place: &str, number: u64, e: anyhow::Error) -> bool {
        if self.skip {
            self.lines.push(number);
        } else if self.failure.as_ref().is_none_or(|(line, _)| number < *line) {
            self.failure = Some((number, anyhow!("{place}: {e:#}; --skip-bad-lines goes on")));
        }
        self.skip
    }

    /// Says what was left out.
    pub fn report(&mut self) {
        if !self.lines.is_empty() {
            self.lines.sort_unstable();
            let shown: Vec<String> = self.lines.iter().take(10).map(u64::to_string).collect();
            let more = if self.lines.len() > 10 { ", …" } else { "" };
            note!("skipped {} bad lines: {}{more}", self.lines.len(), shown.join(", "));
        }
    }
}

/// Turns a panic into an error: one prompt that the program fails at must not take the others with
/// it.
pub fn guarded<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied());
        Err(anyhow!(
            "the program failed at it, please report it: {}",
            message.unwrap_or("no message").replace('\n', " ")
        ))
    })
}
