//! The arguments that say what a rewrite may add.

use crate::rewrite::{Additions, Style};
use anyhow::ensure;
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Style and variety")]
pub struct AdditionArgs {
    /// Rewrite in this style: photo, product, portrait, cinematic, painting, watercolor, digital,
    /// drawing, illustration, anime, comic, 3d, pixel, logo; or a file with lines `medium:`,
    /// `name:`, `allow:` and `ban:`. A prompt that names its own medium keeps it.
    #[arg(long, value_name = "NAME|FILE")]
    pub style: Option<String>,
    /// Add no names of artists; those in the prompt stay.
    #[arg(long)]
    pub no_artists: bool,
    /// Also add media that exclude the one that the prompt names, such as "digital painting" to a
    /// photo.
    #[arg(long)]
    pub any_medium: bool,
    /// Part of the common style phrases that each prompt does without, drawn by its seed: 0 for
    /// none, up to 1 for all.
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    pub variety: f32,
}

impl AdditionArgs {
    /// The file of a style of the user's own.
    pub fn file(&self) -> Option<PathBuf> {
        let style = self.style.as_ref().filter(|name| Style::built_in(name).is_none());
        style.map(PathBuf::from)
    }

    pub fn additions(&self) -> anyhow::Result<Additions> {
        ensure!(
            (0.0..=1.0).contains(&self.variety),
            "--variety {} is outside [0, 1]",
            self.variety
        );
        let style = self.style.as_deref().map(Style::named).transpose();
        let style = style.map_err(|e| anyhow::anyhow!("--style: {e}"))?;
        let (no_artists, any_medium, variety) = (self.no_artists, self.any_medium, self.variety);
        Ok(Additions { style, no_artists, any_medium, variety })
    }
}
