//! What a rewrite may add: media that go with the prompt's own, a style's phrases, artists or none,
//! worn phrases or fewer of them.
//!
//! All of it follows from the prompt and its seed alone, so that a line of a batch comes out the
//! same wherever it is rewritten. What the prompt itself holds is never banned.

use crate::error::{Error, Result};
use crate::random::{Derived, PhiloxStream, derived_seed};
use crate::text::artists;
use crate::text::content_words::words;
use crate::text::mediums::{MediumSet, Mediums};
use crate::text::phrases::Phrases;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

static BUILT_IN: LazyLock<Vec<Arc<Style>>> = LazyLock::new(|| {
    let styles = Style::parse(include_str!("../../assets/styles.txt"))
        .expect("the built-in styles are whole");
    styles.into_iter().map(Arc::new).collect()
});

/// A style: which media fit, what names it, and what does not go with it.
#[derive(Debug, Default)]
pub struct Style {
    /// What options call it.
    pub name: String,
    /// 0 if any medium will do.
    media: MediumSet,
    names: Vec<String>,
    allow: Vec<String>,
    ban: Vec<String>,
    /// `names` and `ban` as they are looked for.
    naming: Phrases,
    banned: Phrases,
    /// What excludes media and is not allowed here, by media.
    against: Mutex<HashMap<MediumSet, Phrases>>,
}

impl Style {
    /// The built-in style of that name, or the one in that file.
    pub fn named(name: &str) -> Result<Arc<Style>> {
        if let Some(style) = Style::built_in(name) {
            return Ok(style);
        }
        let path = Path::new(name);
        if !path.is_file() {
            let known = Style::names().join(", ");
            return Err(Error::invalid(format!(
                "there is no style \"{name}\" and no such file; styles are {known}"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let mut styles = Style::parse(&text).map_err(|e| Error::file(path, e))?;
        match styles.len() {
            1 => Ok(Arc::new(styles.remove(0))),
            n => Err(Error::file(
                path,
                format!(
                    "holds {n} styles, expected one: lines such as \"name: photo, photograph\""
                ),
            )),
        }
    }

    /// The names of the built-in styles.
    pub fn names() -> Vec<String> {
        BUILT_IN.iter().map(|s| s.name.clone()).collect()
    }

    /// The built-in style of that name.
    pub fn built_in(name: &str) -> Option<Arc<Style>> {
        BUILT_IN.iter().find(|s| s.name == name).cloned()
    }

    /// Reads styles: a heading `[name]`, which a file of one may lack, and lines `medium:`,
    /// `name:`, `allow:` and `ban:`. The error names the line.
    pub fn parse(text: &str) -> std::result::Result<Vec<Style>, String> {
        let mut styles: Vec<Style> = Vec::new();
        for (i, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                styles.push(Style { name: name.trim().to_owned(), ..Style::default() });
                continue;
            }
            if styles.is_empty() {
                styles.push(Style::default());
            }
            let style = styles.last_mut().expect("pushed above");
            let (key, rest) = line.split_once(':').unwrap_or((line, ""));
            let phrases =
                rest.split(',').map(str::trim).filter(|p| !words(p).is_empty()).map(str::to_owned);
            match key.trim() {
                "name" => style.names.extend(phrases),
                "allow" => style.allow.extend(phrases),
                "ban" => style.ban.extend(phrases),
                "medium" => {
                    for name in rest.split([' ', ',']).filter(|n| !n.is_empty()) {
                        style.media |= Mediums::built_in().named(name).ok_or_else(|| {
                            let known = Mediums::built_in().names().join(", ");
                            format!(
                                "line {}: there is no medium \"{name}\"; media are {known}",
                                i + 1
                            )
                        })?;
                    }
                }
                _ => {
                    return Err(format!(
                        "line {}: expected medium:, name:, allow: or ban:, found \"{line}\"",
                        i + 1
                    ));
                }
            }
        }
        for style in &mut styles {
            let phrases = |list: &[String]| {
                Phrases::checked(list).map_err(|e| format!("style \"{}\" {e}", style.name))
            };
            phrases(&style.allow)?;
            (style.naming, style.banned) = (phrases(&style.names)?, phrases(&style.ban)?);
        }
        Ok(styles)
    }

    /// Phrases that fit none of `media`: neither those that hold an allowed phrase nor those that
    /// stand in one.
    fn against(&self, media: MediumSet) -> Phrases {
        if self.allow.is_empty() {
            return against(media);
        }
        let mut known = self.against.lock().unwrap_or_else(|e| e.into_inner());
        let make = || {
            let allowed = Phrases::new(&self.allow);
            let banned = |p: &&str| {
                let inside = Phrases::new([p]);
                allowed.find(p).is_none() && self.allow.iter().all(|a| inside.find(a).is_none())
            };
            Phrases::new(Mediums::built_in().against(media).filter(banned))
        };
        known.entry(media).or_insert_with(make).clone()
    }

    /// What a style file says.
    fn said(&self) -> (MediumSet, [&[String]; 3]) {
        (self.media, [&self.names, &self.allow, &self.ban])
    }
}

/// The name of a built-in style, or all that it says.
impl fmt::Display for Style {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if Style::built_in(&self.name).is_some_and(|known| known.said() == self.said()) {
            return f.write_str(&self.name);
        }
        let names = Mediums::built_in().names().iter().enumerate();
        let media: Vec<&str> =
            names.filter(|(i, _)| self.media & (1 << i) != 0).map(|n| n.1.as_str()).collect();
        let [name, allow, ban] = [&self.names, &self.allow, &self.ban].map(|list| list.join(", "));
        write!(f, "medium: {}; name: {name}; allow: {allow}; ban: {ban}", media.join(" "))
    }
}

/// What may be added to prompts.
#[derive(Clone, Debug, Default)]
pub struct Additions {
    /// The style that additions keep to, if any.
    pub style: Option<Arc<Style>>,
    /// Adds no artists.
    pub no_artists: bool,
    /// Also adds media that exclude the one that a prompt names.
    pub any_medium: bool,
    /// Part of the common style phrases that a prompt may not use, drawn anew for each seed: from 0
    /// to 1.
    pub variety: f32,
}

static ARTISTS: LazyLock<Phrases> = LazyLock::new(|| {
    let leads = artists::LEADS.iter().copied().chain(["by"]);
    Phrases::new(artists::names().chain(leads))
});

/// Phrases that exclude media, by media: as many as `mediums.txt` can tell apart.
static MEDIA: LazyLock<Mutex<HashMap<MediumSet, Phrases>>> = LazyLock::new(Mutex::default);

/// Style phrases that many rewrites add.
static COMMON: LazyLock<Phrases> = LazyLock::new(|| Phrases::new(common()));

fn common() -> impl Iterator<Item = &'static str> {
    include_str!("../../assets/common_phrases.txt")
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
}

fn against(media: MediumSet) -> Phrases {
    let mut known = MEDIA.lock().unwrap_or_else(|e| e.into_inner());
    known.entry(media).or_insert_with(|| Phrases::new(Mediums::built_in().against(media))).clone()
}

impl Additions {
    /// `ban` and what else is not to be added to `prompt`. The lists are shared: what a prompt says
    /// itself is left out of them without a copy.
    pub fn banned(&self, prompt: &str, seed: u64, ban: &Phrases) -> Phrases {
        let mut lists = vec![];
        let own = Mediums::built_in().of(prompt).filter(|media| *media != 0);
        let media = match &self.style {
            Some(style) if style.media != 0 => Some(own.unwrap_or(style.media)),
            _ => own.filter(|_| !self.any_medium),
        };
        if let Some(media) = media {
            lists.push(
                self.style.as_ref().map_or_else(|| against(media), |style| style.against(media)),
            );
        }
        lists.extend(self.style.as_ref().map(|style| style.banned.clone()));
        if self.no_artists {
            lists.push(ARTISTS.clone());
        }
        if self.variety > 0.0 {
            let mut words = PhiloxStream::new(derived_seed(seed, Derived::Variety, 0), 0);
            lists.push(COMMON.but_those(|| words.uniform() >= self.variety));
        }
        Phrases::joined([ban, &Phrases::joined(&lists).but_those_in(prompt)])
    }

    /// The prompt as the model is given it: with the style's name, unless it names a medium itself.
    pub fn named<'p>(&self, prompt: &'p str, seed: u64) -> Cow<'p, str> {
        let Some(style) = self.style.as_ref().filter(|s| !s.names.is_empty()) else {
            return Cow::Borrowed(prompt);
        };
        if style.naming.find(prompt).is_some() || Mediums::built_in().of(prompt).is_some() {
            return Cow::Borrowed(prompt);
        }
        let n =
            PhiloxStream::new(derived_seed(seed, Derived::Style, 0), 0).below(style.names.len());
        Cow::Owned(format!("{}, {}", prompt.trim_end_matches(['.', ',', ';', ' ']), style.names[n]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn additions(style: &str) -> Additions {
        Additions { style: Some(Style::named(style).unwrap()), ..Additions::default() }
    }

    #[test]
    fn a_prompts_medium_bans_those_that_it_excludes() {
        let none = Phrases::default();
        let banned = |a: &Additions, prompt| a.banned(prompt, 1, &none);
        let default = Additions::default();
        let photo = banned(&default, "a photo of a cat");
        for phrase in
            ["digital painting", "trending on artstation", "octane render", "art by wlop", "anime"]
        {
            assert!(photo.find(&format!("a photo of a cat, {phrase}")).is_some(), "{phrase}");
        }
        assert!(
            photo.find("a photo of a cat, film grain, soft lighting, photorealistic, 8k").is_none()
        );
        assert!(banned(&default, "a cat").is_empty());
        assert!(
            banned(&default, "a photo of a cat, oil on canvas").is_empty(),
            "contradicts itself already"
        );
        let held = banned(&default, "a photo of a digital painting class");
        assert!(held.find("a photo of a digital painting class").is_none());
        assert!(banned(&Additions { any_medium: true, ..default }, "a photo of a cat").is_empty());
    }

    #[test]
    fn without_artists_none_is_added_and_none_taken_from_the_prompt() {
        let a = Additions { no_artists: true, ..Additions::default() };
        let banned = a.banned("a cat", 1, &Phrases::new(["dog"]));
        for text in [
            "a cat, Greg Rutkowski",
            "a cat, art by x",
            "a cat, in the style of y",
            "a cat, by z",
            "a dog",
        ] {
            assert!(banned.find(text).is_some(), "{text}");
        }
        let monet = "a house by the lake in the style of Claude Monet";
        let banned = a.banned(monet, 1, &Phrases::default());
        assert!(banned.find(monet).is_none());
        assert!(banned.find("alphonse mucha").is_some());
    }

    #[test]
    fn styles_name_themselves_and_leave_a_prompts_own_medium() {
        let photo = additions("photo");
        let named = photo.named("a cat.", 3);
        assert!(
            named.starts_with("a cat, ") && Mediums::built_in().of(&named).is_some(),
            "{named}"
        );
        assert_eq!(named, photo.named("a cat.", 3));
        assert_eq!(photo.named("an oil painting of a cat", 3), "an oil painting of a cat");
        let banned = photo.banned("an oil painting of a cat", 3, &Phrases::default());
        assert!(banned.find("oil on canvas").is_none() && banned.find("dslr").is_some());
        let product = additions("product").banned("a cup", 3, &Phrases::default());
        assert!(
            product.find("octane render").is_none() && product.find("digital painting").is_some()
        );
        assert!(product.find("film grain").is_some());
    }

    #[test]
    fn variety_draws_for_each_seed() {
        let a = Additions { variety: 0.5, ..Additions::default() };
        let drawn = |seed| {
            let banned = a.banned("a cat", seed, &Phrases::default());
            common().filter(|p| banned.find(p).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        let all = common().count();
        assert!((all / 3..all).contains(&drawn(1).len()), "{} of {all}", drawn(1).len());
        assert!(
            a.banned("a cat, highly detailed", 1, &Phrases::default())
                .find("a cat, highly detailed")
                .is_none()
        );
    }

    #[test]
    fn style_files_are_read_and_their_faults_named() {
        let styles = Style::parse("name: sketch, doodle\nban: 8k").unwrap();
        assert_eq!((styles.len(), styles[0].names.len(), styles[0].ban.len()), (1, 2, 1));
        assert_eq!(styles[0].to_string(), "medium: ; name: sketch, doodle; allow: ; ban: 8k");
        assert_eq!(Style::built_in("photo").unwrap().to_string(), "photo");
        assert!(
            Style::parse("# x\nmedium: phto")
                .unwrap_err()
                .contains("line 2: there is no medium \"phto\"")
        );
        assert!(Style::parse("[a]\nphoto").unwrap_err().contains("line 2"));
        let error = Style::named("no such style").unwrap_err().to_string();
        assert!(error.contains("photo, product"), "{error}");
        for name in Style::names() {
            let style = Style::named(&name).unwrap();
            assert!(style.media != 0 && !style.names.is_empty(), "{name}");
            // what a style is called must not be banned by it
            let a = additions(&name);
            for n in &style.names {
                let banned = a.banned("a cat", 1, &Phrases::default());
                assert!(banned.find(n).is_none(), "{name} bans its own name {n}");
            }
        }
    }
}
