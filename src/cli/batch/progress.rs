//! How far a run is: a line that is kept up to date on a terminal, or one now and then where there
//! is none.

use crate::cli::print::note;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(10);

pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    said: Instant,
    /// What earlier runs did, and all there are, where that is known.
    before: u64,
    total: Option<u64>,
    /// What is counted, in the plural.
    noun: &'static str,
}

impl Progress {
    pub fn new(before: u64, total: Option<u64>, noun: &'static str) -> Progress {
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template");
        let bar =
            std::io::stderr().is_terminal().then(|| ProgressBar::new_spinner().with_style(style));
        Progress { bar, started: Instant::now(), said: Instant::now(), before, total, noun }
    }

    /// Says how much this run has done, and in how many tokens.
    pub fn update(&mut self, finished: u64, tokens: u64) {
        let elapsed = self.started.elapsed();
        match &self.bar {
            Some(bar) => {
                bar.set_message(self.line(finished, tokens, elapsed));
                bar.tick();
            }
            None if self.said.elapsed() >= PAUSE => {
                self.said = Instant::now();
                note!("{}", self.line(finished, tokens, elapsed));
            }
            None => {}
        }
    }

    fn line(&self, finished: u64, tokens: u64, elapsed: Duration) -> String {
        let rate = |n: u64| n as f64 / elapsed.as_secs_f64().max(1e-9);
        let done = self.before + finished;
        let mut line = match self.total {
            Some(total) => format!("{done} of {total} {}", self.noun),
            None => format!("{done} {}", self.noun),
        };
        line += &format!(", {:.1} a second", rate(finished));
        if tokens > 0 {
            line += &format!(", {:.0} tokens a second", rate(tokens));
        }
        if let (Some(total), true) = (self.total, finished > 0) {
            let left = total.saturating_sub(done) as f64 / rate(finished);
            line += &format!(
                ", {} left",
                HumanDuration(Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX))
            );
        }
        line
    }

    /// Takes the line away, so that others can be written.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub fn summary(&self, written: u64) {
        self.clear();
        if self.bar.is_some() {
            let seconds = self.started.elapsed().as_secs_f64();
            let rate = written as f64 / seconds;
            note!("{written} {} in {seconds:.1} s ({rate:.1} a second)", self.noun);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_what_is_done_and_what_is_left() {
        let of = |before, total| Progress { bar: None, ..Progress::new(before, total, "prompts") };
        let ten = Duration::from_secs(10);
        assert_eq!(
            of(100, Some(400)).line(100, 5000, ten),
            "200 of 400 prompts, 10.0 a second, 500 tokens a second, 20 seconds left"
        );
        assert_eq!(of(0, None).line(5, 0, ten), "5 prompts, 0.5 a second");
        assert_eq!(of(7, Some(9)).line(0, 0, ten), "7 of 9 prompts, 0.0 a second");
    }
}
