//! The arguments that hold a rewrite to its prompt.

use super::additions::AdditionArgs;
use crate::generate::GenerateOptions;
use crate::rewrite::{DEFAULT_MIN_KEPT, GuardOptions};
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use anyhow::{Context, anyhow, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Keeping the meaning")]
pub struct GuardArgs {
    /// Words or phrases that every rewrite must hold, separated by commas.
    /// `@FILE`, or what looks like a file's name, is a file with one a line.
    #[arg(long, value_name = "PHRASES|@FILE")]
    pub keep: Vec<String>,
    /// Words or phrases that no rewrite may hold, in the same form.
    #[arg(long, value_name = "PHRASES|@FILE")]
    pub ban: Vec<String>,
    /// Least part of the prompt's meaning that a rewrite keeps, from 0 to 1; else it falls back on
    /// the prompt. 0 takes what the model says.
    #[arg(long, value_name = "PART", default_value_t = DEFAULT_MIN_KEPT)]
    pub min_kept: f64,
    /// How often to generate before falling back, at least once.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rounds: u32,
    /// Maximum tokens as CLIP counts them, at least 3; 77 fill Stable Diffusion's text encoder. No
    /// limit if not given.
    #[arg(long, value_name = "TOKENS")]
    pub max_clip_tokens: Option<usize>,
    #[command(flatten)]
    pub additions: AdditionArgs,
}

impl GuardArgs {
    /// Files that phrases are read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let phrases =
            self.keep.iter().chain(&self.ban).filter_map(|item| file(item)).map(PathBuf::from);
        phrases.chain(self.additions.file()).collect()
    }

    /// The phrases that no rewrite may hold.
    pub fn banned(&self) -> anyhow::Result<Vec<String>> {
        phrases("--ban", &self.ban)
    }

    /// The guard, with the phrases to keep and to ban put into `options`.
    pub fn options(&self, options: &mut GenerateOptions) -> anyhow::Result<GuardOptions> {
        ensure!(
            (0.0..=1.0).contains(&self.min_kept),
            "--min-kept {} is outside [0, 1]",
            self.min_kept
        );
        ensure!((1..=100).contains(&self.rounds), "--rounds {} is outside [1, 100]", self.rounds);
        if let Some(n) = self.max_clip_tokens {
            ensure!(
                n >= 3,
                "--max-clip-tokens {n} is too few; the first and the last token always count"
            );
        }
        options.keep = Arc::new(Literals::new(&phrases("--keep", &self.keep)?));
        options.ban = Arc::new(Phrases::checked(self.banned()?).map_err(|e| anyhow!("--ban {e}"))?);
        Ok(GuardOptions {
            min_kept: Some(self.min_kept).filter(|least| *least > 0.0),
            rounds: self.rounds,
            max_clip_tokens: self.max_clip_tokens,
            count_clip_tokens: false,
            additions: self.additions.additions()?,
        })
    }
}

/// The file that an item of a list of phrases means, if it means one: what begins with `@`, and
/// what looks like a path or like the name of a text file, so that a wrong name is no phrase. A
/// lone word is a phrase, even if a file has that name.
fn file(item: &str) -> Option<&str> {
    if let Some(name) = item.strip_prefix('@') {
        return Some(name);
    }
    let path = Path::new(item);
    let single = !item.contains([',', ' ']);
    let text = path
        .extension()
        .is_some_and(|e| ["txt", "list", "csv", "tsv"].iter().any(|known| e == *known));
    let rooted = ["/", "./", "../", "~/"].iter().any(|start| item.starts_with(start));
    let there = (item.contains('/') || path.extension().is_some()) && path.is_file();
    (there || (single && (text || rooted))).then_some(item)
}

/// The phrases of a list's items: separated by commas, or a file's lines.
fn phrases(flag: &str, items: &[String]) -> anyhow::Result<Vec<String>> {
    let mut phrases = Vec::new();
    for item in items {
        match file(item) {
            Some(name) => {
                let text = std::fs::read_to_string(name);
                let text =
                    text.with_context(|| format!("{flag} {item}: cannot read the file {name}"))?;
                phrases.extend(text.trim_start_matches('\u{feff}').lines().map(str::to_owned));
            }
            None => phrases.extend(item.split(',').map(str::to_owned)),
        }
    }
    Ok(phrases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_no_phrases() {
        for name in ["artists.txt", "no/such.txt", "./x", "/x", "../a-b", "@x", "@a b, c"] {
            assert!(
                phrases("--ban", &[name.into()])
                    .unwrap_err()
                    .to_string()
                    .contains("cannot read the file"),
                "{name}"
            );
        }
        let f = tempfile::tempdir().unwrap();
        let list = f.path().join("a list");
        std::fs::write(&list, "\u{feff}oil paint\r\n\nfog, mist\n").unwrap();
        let list = list.to_str().unwrap();
        for name in [list.to_owned(), format!("@{list}")] {
            assert_eq!(phrases("--ban", &[name]).unwrap(), ["oil paint", "", "fog, mist"]);
        }
        let items =
            ["f/1.8".to_owned(), "a cat, mr.txt jones".into(), "w/o hat".into(), "3.5".into()];
        assert_eq!(
            phrases("--keep", &items).unwrap(),
            ["f/1.8", "a cat", " mr.txt jones", "w/o hat", "3.5"]
        );
    }
}
