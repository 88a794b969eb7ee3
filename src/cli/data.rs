//! `bprompt data`: training data.

use super::batch::check_lengths;
use super::files::check_distinct;
use super::print::print_line;
use crate::data::pairs::{MadePairs, PairOptions, make_pairs};
use crate::data::phrases::StylePhrases;
use crate::data::records::{read_prompts, write_pairs};
use crate::data::tails::TailLimits;
use crate::eval::variety::variety;
use crate::text::Tokenizer;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum DataCommand {
    /// Make (plain, rich) pairs from a list of prompts.
    Pairs(PairsArgs),
}

#[derive(Args)]
pub struct PairsArgs {
    /// Prompts: .jsonl or .json records with "prompt", or text with one a line.
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// Training pairs, as JSON lines (or a JSON array if the name ends in .json).
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Held-out pairs; by default the output's name with `.validation` before its ending.
    #[arg(long, value_name = "FILE")]
    validation_output: Option<PathBuf>,
    /// Lists of style phrases, artists, movements or mediums, one a line, or the first column of a
    /// .tsv.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    styles: Vec<PathBuf>,
    /// Tokenizer that counts the targets' tokens.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Maximum plain sides made of one rich prompt; 0 for none.
    #[arg(long, default_value_t = 3)]
    variants: usize,
    /// How many targets a prompt gets with style phrases borrowed from similar rich prompts: a
    /// plain prompt this many, a rich one those beyond the first; 0 leaves plain prompts out.
    #[arg(long, default_value_t = 1)]
    borrow: usize,
    /// Leave details out of targets that the plain side does not name: small models cannot invent
    /// sensible ones.
    #[arg(long)]
    style_only: bool,
    /// Drop targets of fewer tokens; 0 drops none.
    #[arg(long, default_value_t = 25)]
    min_tokens: usize,
    /// Part of the pairs that one style phrase may be in; a quarter of it for movements. 1 for no
    /// limit.
    #[arg(long, value_name = "PART", default_value_t = 0.02)]
    phrase_share: f32,
    /// Part of the pairs that may add artists; 0 leaves all out.
    #[arg(long, value_name = "PART", default_value_t = 0.15)]
    artists_share: f32,
    /// Part of the pairs that one artist may be in.
    #[arg(long, value_name = "PART", default_value_t = 0.004)]
    artist_share: f32,
    /// Part of the borrowed pairs whose prompt is given a medium ("a photo of"), if it names none.
    #[arg(long, value_name = "PART", default_value_t = 0.25)]
    name_medium: f32,
    /// Part of the prompts that is held out, from 0 to 1; 0 holds out none.
    #[arg(long, default_value_t = 0.02)]
    validation: f32,
    /// Begins the choices; the same seed makes the same pairs.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Maximum bytes of a prompt, at least 1; longer ones are refused before they take memory.
    #[arg(long, value_name = "BYTES", default_value_t = 65536)]
    max_prompt_bytes: usize,
    /// Replace existing output files.
    #[arg(long)]
    force: bool,
}

impl DataCommand {
    pub fn run(self) -> anyhow::Result<()> {
        let DataCommand::Pairs(args) = self;
        args.run()
    }
}

impl PairsArgs {
    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            (0.0..1.0).contains(&self.validation),
            "--validation {} is outside [0, 1)",
            self.validation
        );
        for (flag, part) in [
            ("--phrase-share", self.phrase_share),
            ("--artists-share", self.artists_share),
            ("--artist-share", self.artist_share),
            ("--name-medium", self.name_medium),
        ] {
            anyhow::ensure!((0.0..=1.0).contains(&part), "{flag} {part} is outside [0, 1]");
        }
        Ok(())
    }

    /// Where both sides of the pairs go; fails if something is there that should stay.
    fn outputs(&self) -> anyhow::Result<[PathBuf; 2]> {
        let validation_output = self.validation_output.clone().unwrap_or_else(|| {
            let ending =
                self.output.extension().unwrap_or("jsonl".as_ref()).to_string_lossy().into_owned();
            self.output.with_extension(format!("validation.{ending}"))
        });
        let mut reads = vec![self.input.as_path()];
        reads.extend(self.styles.iter().chain(&self.tokenizer).map(PathBuf::as_path));
        check_distinct(&[&self.output, &validation_output], &reads)?;
        for path in [&self.output, &validation_output] {
            anyhow::ensure!(
                self.force || !path.exists(),
                "{}: exists already; --force replaces it",
                path.display()
            );
        }
        Ok([self.output.clone(), validation_output])
    }

    fn run(self) -> anyhow::Result<()> {
        self.check()?;
        let [output, validation_output] = self.outputs()?;
        let prompts = read_prompts(&self.input)?;
        check_lengths(&self.input, &prompts, self.max_prompt_bytes)?;
        let mut styles = StylePhrases::default();
        for file in &self.styles {
            styles.add_file(file)?;
        }
        let tokenizer = match &self.tokenizer {
            Some(path) => Tokenizer::open(path)?,
            None => crate::models::embedded::tokenizer(),
        };
        let options = PairOptions {
            variants: self.variants,
            borrow: self.borrow,
            style_only: self.style_only,
            min_tokens: self.min_tokens,
            limits: TailLimits {
                phrase: self.phrase_share,
                artists: self.artists_share,
                artist: self.artist_share,
            },
            name_medium: self.name_medium,
            validation: self.validation,
            seed: self.seed,
            ..PairOptions::default()
        };
        let made = make_pairs(&prompts, &styles, &tokenizer, &options);
        anyhow::ensure!(
            !made.train.is_empty(),
            "{}: no pairs could be made of its {} prompts; rich prompts have a subject, a comma \
            and style phrases",
            self.input.display(),
            prompts.len()
        );
        write_pairs(&output, &made.train)?;
        write_pairs(&validation_output, &made.validation)?;
        report(&made)?;
        print_line!("wrote {} and {}", output.display(), validation_output.display())?;
        Ok(())
    }
}

/// Says how many pairs there are, and how varied they are.
fn report(made: &MadePairs) -> anyhow::Result<()> {
    for (what, count) in &made.counts {
        print_line!("{count:>8}  {what}")?;
    }
    let v = variety(made.train.iter().map(|p| (p.raw_prompt.as_str(), p.prompt.as_str())));
    print_line!("{:>8}  distinct tails", v.distinct_tails)?;
    print_line!("{:>7.1}%  of what is added is one of 60 phrases", 100.0 * v.commonest_phrases)?;
    print_line!("{:>7.1}%  of the targets add artists", 100.0 * v.with_artists)?;
    print_line!(
        "{:>7.1}%  of the targets name media that exclude each other",
        100.0 * v.contradictions
    )?;
    Ok(())
}
