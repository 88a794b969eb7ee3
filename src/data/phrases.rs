//! What counts as style: the phrases that a plain prompt lacks and a rich one has.

use crate::error::{Error, Result};
use crate::text::content_words::words;
use std::collections::HashSet;
use std::path::Path;

/// Words of which a style phrase consists for the most part.
const STYLE_WORDS: &str = "4k 8k 16k hd uhd hdr hq res 3d 2d ue4 ue5 35mm 50mm 85mm f1.8 dslr imax \
    art arts artwork artworks artstation \
artgerm wlop behance deviantart cgsociety pixiv flickr unsplash dribbble pinterest instagram \
octane unreal engine unity blender \
cinema4d vray redshift arnold houdini zbrush render rendered rendering renders raytracing \
raytraced ray tracing detail details \
detailed hyperdetailed ultradetailed intricate intricately sharp focus bokeh dof depth field blur \
lighting lights lit cinematic \
cinematography dramatic volumetric ambient occlusion global illumination studio rim backlit \
backlight natural light soft glow \
photorealistic photorealism hyperrealistic hyperrealism realistic realism ultrarealistic surreal \
surrealism photo photograph \
photography photographic photoreal painting paintings painted painterly digital matte oil \
watercolor watercolour gouache acrylic \
pastel ink charcoal pencil sketch drawing drawn illustration illustrations illustrated concept \
comic manga anime cartoon vector \
poster print lithograph engraving woodcut etching linocut style styles styled aesthetic aesthetics \
composition symmetry \
symmetrical symmetric centered masterpiece masterwork award winning awarded trending popular \
featured contest winner quality best \
high highly ultra super hyper extremely insanely incredibly very resolution definition smooth \
elegant elegance ornate beautiful \
gorgeous stunning breathtaking epic moody atmospheric atmosphere vibrant vivid colorful colors \
color colours colour palette tones \
tone grading graded contrast shadows shading shaded texture textured textures closeup shot angle \
lens wide macro fisheye \
perspective view panoramic grain kodak fujifilm canon nikon leica polaroid portra film noir \
baroque rococo renaissance \
impressionism impressionist expressionism cubism minimalism minimalist minimalistic gothic \
romanticism pre-raphaelite \
preraphaelite ukiyo-e nouveau deco vaporwave synthwave steampunk cyberpunk solarpunk dieselpunk \
fantasy scifi sci-fi futuristic \
retro vintage pixar disney ghibli dreamworks marvel dnd d&d mtg hearthstone postprocessing vfx cgi \
cg fx subsurface scattering \
iridescent ethereal dreamy whimsical mystical magical sublime majestic professional commercial \
fashion editorial magazine cover \
wallpaper artist artists inspired intricacies rule thirds golden ratio hour complex stylized \
stylised lowpoly poly isometric \
greg rutkowski alphonse mucha makoto shinkai beeple mead moebius frazetta bouguereau";

/// Kinds of pictures: `a NOUN of SUBJECT`.
const MEDIUMS: &str = "painting photo photograph portrait illustration render rendering drawing \
    sketch picture image shot closeup \
close-up poster art artwork wallpaper photography still depiction watercolor watercolour engraving \
cartoon headshot selfie print \
cover logo icon vector mural";

/// Quality words that may be dropped from the middle of a subject without changing it.
const QUALITY: &str = "beautiful gorgeous stunning breathtaking highly hyper ultra extremely \
    insanely incredibly intricate \
intricately detailed hyperdetailed realistic hyperrealistic photorealistic cinematic masterpiece \
amazing perfect epic \
award-winning symmetrical 4k 8k hd";

/// Words between style words.
const LINKING: &str = "a an the of on in by and with for";

/// Style words that say nothing alone.
const VAGUE: &str = "color colors colour colours focus depth shadows contrast detail details \
    texture textures art arts artwork style \
styles complex professional glow trending 2d shot quality light lights lighting res view angle \
perspective very high award \
engine grain fashion wallpaper magazine cover artist artists commercial";

/// Words that may come before the kind of picture.
const ARTICLES: &str = "a an the this my some very full body half length medium wide angle low \
    close up extreme professional \
black and white old vintage color colour";

/// Style words and phrases, built in and from files.
pub struct StylePhrases {
    words: HashSet<String>,
    phrases: HashSet<String>,
    mediums: HashSet<&'static str>,
    quality: HashSet<&'static str>,
    openers: HashSet<&'static str>,
}

impl Default for StylePhrases {
    fn default() -> Self {
        StylePhrases {
            words: STYLE_WORDS.split(' ').map(str::to_owned).collect(),
            phrases: HashSet::new(),
            mediums: MEDIUMS.split(' ').collect(),
            quality: QUALITY.split(' ').collect(),
            openers: ARTICLES.split(' ').collect(),
        }
    }
}

impl StylePhrases {
    /// Adds a list of phrases, one a line; of a `.tsv` the first column. Single words are left out:
    /// such lists hold plain nouns too.
    pub fn add_file(&mut self, path: &Path) -> Result<usize> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let before = self.phrases.len();
        for line in text.lines() {
            let phrase = words(line.split('\t').next().unwrap_or_default());
            if phrase.len() > 1 {
                self.phrases.insert(phrase.join(" "));
            }
        }
        Ok(self.phrases.len() - before)
    }

    /// Whether a comma-separated part of a prompt speaks of style alone.
    pub fn is_style(&self, part: &str) -> bool {
        let joined = words(part).join(" ");
        self.phrases.contains(&joined) || joined.contains("style of") || self.is_plain_style(part)
    }

    /// [`StylePhrases::is_style`] by its words alone: such a phrase fits any subject.
    pub fn is_plain_style(&self, part: &str) -> bool {
        const LINKING: &str = "a an the of on in and by with for";
        let all = words(part);
        let named =
            all.starts_with(&["by".into()]) || all.starts_with(&["art".into(), "by".into()]);
        if named || all.is_empty() {
            return named;
        }
        let mut carrying = all.iter().filter(|w| !LINKING.split(' ').any(|l| l == *w)).peekable();
        let first_is_medium = carrying.peek().is_some_and(|w| self.mediums.contains(w.as_str()));
        let (mut style, mut total) = (0, 0);
        for word in carrying {
            total += 1;
            style += usize::from(self.words.contains(word));
        }
        // a kind of picture needs company: "portrait, studio lighting", not "a photo of a hat"
        2 * style > total && (total > 1 || !first_is_medium || all.len() == 1)
    }

    /// Whether a phrase speaks of nothing but style, and says something: it goes with any subject.
    pub fn is_lendable(&self, part: &str) -> bool {
        let all = words(part);
        let known = |w: &String| {
            self.words.contains(w) || LINKING.split(' ').any(|l| l == w) || w.parse::<u32>().is_ok()
        };
        let vague = |w: &String| VAGUE.split(' ').any(|v| v == w);
        !all.is_empty() && all.iter().all(known) && !all.iter().all(vague)
    }

    /// The subject of a prompt's first part: without `a beautiful painting of`, `by …`, `in the
    /// style of …` and quality words.
    pub fn subject(&self, head: &str) -> String {
        let tokens: Vec<&str> = head.split_whitespace().collect();
        let plain: Vec<String> = tokens.iter().map(|t| bare(t)).collect();
        let mut start = 0;
        for i in 1..plain.len().min(8) {
            if plain[i] == "of" && self.mediums.contains(plain[i - 1].as_str()) {
                let before = plain[..i - 1].iter();
                let known = |w: &String| {
                    self.openers.contains(w.as_str())
                        || self.words.contains(w)
                        || self.mediums.contains(w.as_str())
                };
                if before.into_iter().all(known) {
                    start = i + 1;
                }
            }
        }
        let mut end = tokens.len();
        for i in start + 1..tokens.len() {
            let at = |k: usize| plain.get(i + k).map(String::as_str).unwrap_or_default();
            let style = (at(0) == "in"
                && (at(1) == "style" || (at(1) == "the" && at(2) == "style")))
                || (at(0) == "art" && at(1) == "by")
                || (at(0) == "trending" && at(1) == "on")
                || (at(0) == "by"
                    && tokens.get(i + 1).is_some_and(|n| self.artist_follows(n, at(1), at(2))));
            if style {
                end = i;
                break;
            }
        }
        let kept = tokens[start..end].iter().zip(&plain[start..end]);
        let kept: Vec<&str> =
            kept.filter(|(_, p)| !self.quality.contains(p.as_str())).map(|(t, _)| *t).collect();
        kept.join(" ")
            .trim_matches(|c: char| !c.is_alphanumeric() && !"()\"'".contains(c))
            .to_owned()
    }

    /// Whether a name follows `by`: a capital letter, or a known phrase of two words.
    fn artist_follows(&self, token: &str, first: &str, second: &str) -> bool {
        token.starts_with(char::is_uppercase)
            || self.words.contains(first)
            || self.phrases.contains(&format!("{first} {second}"))
    }
}

fn bare(token: &str) -> String {
    token.to_lowercase().trim_matches(|c: char| !c.is_alphanumeric()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_lose_medium_artist_and_quality() {
        let s = StylePhrases::default();
        for (head, subject) in [
            (
                "a beautiful painting of ruins on the grassland by Ivan Aivazovsky",
                "ruins on the grassland",
            ),
            ("a highly detailed castle on a hill in the style of Monet", "a castle on a hill"),
            ("symmetry!! portrait of an old sailor", "an old sailor"),
            ("a man standing by a river", "a man standing by a river"),
            ("a flock of birds", "a flock of birds"),
        ] {
            assert_eq!(s.subject(head), subject);
        }
    }

    #[test]
    fn style_parts_are_told_from_details() {
        let s = StylePhrases::default();
        for part in [
            "highly detailed",
            "8k",
            "octane render",
            "by someone unknown",
            "cinematic lighting",
            "trending on artstation",
        ] {
            assert!(s.is_style(part), "{part}");
        }
        for part in [
            "wearing a red hat",
            "a dog beside her",
            "holding a lit torch in his hand",
            "stormy sea",
        ] {
            assert!(!s.is_style(part), "{part}");
        }
    }
}
