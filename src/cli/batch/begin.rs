//! How a run over lines begins, behind what an earlier one left, and how it ends.

use super::args::{FileArgs, PromptSource};
use super::bad_lines::BadLines;
use super::input::{LineOptions, Lines};
use super::output::{Output, Written};
use super::progress::Progress;
use super::settings::Settings;
use super::target::{self, Begin, Target};
use crate::cli::files::check_distinct;
use crate::cli::print::note;
use anyhow::ensure;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// How an output was begun, and what was there.
pub struct Begun {
    pub target: Target,
    pub lines: Lines,
    /// The settings that the output was begun with.
    pub earlier: Option<Settings>,
    pub begin: Begin,
}

impl Begun {
    /// Opens the input, and the output, which must be none of the files that are read: the input
    /// and `others`.
    pub fn open(
        files: &FileArgs,
        source: PromptSource,
        options: LineOptions,
        others: &[PathBuf],
    ) -> anyhow::Result<Begun> {
        let lines = match source {
            PromptSource::Files(files) => Lines::open(files, options)?,
            PromptSource::Stdin => Lines::open(&["-".to_owned()], options)?,
            PromptSource::Prompts(prompts) => Lines::of_prompts(prompts, options),
        };
        let mut reads: Vec<&Path> = lines.files().collect();
        reads.extend(others.iter().map(|p| p.as_path()));
        let output = &files.output;
        check_distinct(
            &[output, &target::partial(output), &target::settings_path(output)],
            &reads,
        )?;
        let begin = files.begin();
        let mut target = Target::open(&files.output, begin)?;
        let earlier = match target.file() {
            Some((file, path)) if begin == Begin::Resume => {
                let holds_something = file.metadata().is_ok_and(|m| m.len() > 0);
                let earlier = Settings::read(path)?.filter(|_| holds_something);
                if earlier.is_none() && holds_something {
                    note!(
                        "{}: is missing, so it cannot be checked that {} was begun with these \
                        settings",
                        target::settings_path(path).display(),
                        path.display()
                    );
                }
                earlier
            }
            _ => None,
        };
        Ok(Begun { target, lines, earlier, begin })
    }

    /// Compares this run's settings with those that the output was begun with, and keeps them
    /// beside it.
    pub fn settle(&mut self, mut settings: Settings) -> anyhow::Result<()> {
        let earlier = self.earlier.take();
        let known = earlier.as_ref().map_or(&Value::Null, |e| e.get("input"));
        settings.0.insert("input".into(), self.lines.identity(known)?);
        if let Some(earlier) = &earlier {
            settings.check(earlier, self.target.name())?;
        }
        match self.target.file() {
            Some((_, path)) => settings.write(path),
            None => Ok(()),
        }
    }

    /// What an interrupted run has written, in results of `each` lines.
    pub fn written(&mut self, each: u64) -> anyhow::Result<Written> {
        let packing = self.target.packing;
        let name = self.target.name().to_owned();
        match self.target.file() {
            Some((file, _)) if self.begin == Begin::Resume => {
                Written::read(file, &name, packing, each)
            }
            _ => Ok(Written::default()),
        }
    }
}

/// Says where the results of a run are that did not get to its end.
pub fn note_partial(out: &Output, begin: Begin, ended_early: bool) {
    if let (true, Begin::Replace, 1.., Some(partial)) =
        (ended_early, begin, out.written, out.target.partial())
    {
        note!(
            "the results so far are in {}; --resume instead of --force goes on there",
            partial.display()
        );
    }
}

/// Writes what is finished of a run that came out so, and says where it is if that is not the
/// output.
pub fn write_finished(
    result: anyhow::Result<bool>,
    out: &mut Output,
    begin: Begin,
    progress: &Progress,
) -> anyhow::Result<bool> {
    out.flush()?;
    progress.clear();
    note_partial(out, begin, !matches!(result, Ok(true)));
    result
}

/// Says that somebody interrupted, and how it goes on.
pub fn note_interrupted() {
    note!("interrupted; the same command with --resume goes on");
}

/// Puts whole results in their place, unless there are none and good ones are there.
pub fn complete(out: Output, bad: &BadLines, begin: Begin) -> anyhow::Result<()> {
    ensure!(
        begin != Begin::Replace || out.written > 0 || bad.lines.is_empty(),
        "{}: stays as it was, because all {} lines are bad",
        out.target.name(),
        bad.lines.len()
    );
    out.target.complete()
}
