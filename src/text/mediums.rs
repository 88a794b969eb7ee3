//! In which medium a text says that its picture is made, and whether it contradicts itself.

use super::content_words::words;
use std::collections::HashMap;
use std::sync::LazyLock;

/// A set of media, one a bit; a text without any is not of this type but `None`.
pub type MediumSet = u32;

/// Phrases that name media, from `assets/mediums.txt`.
pub struct Mediums {
    names: Vec<String>,
    phrases: Vec<MediumPhrase>,
    by_first: HashMap<String, Vec<usize>>,
}

struct MediumPhrase {
    /// As it stands in the file.
    text: String,
    words: Vec<String>,
    media: MediumSet,
    /// Also a thing in a picture: counts only where it opens or makes up a part between commas.
    ambiguous: bool,
}

static BUILT_IN: LazyLock<Mediums> = LazyLock::new(|| {
    Mediums::parse(include_str!("../../assets/mediums.txt")).expect("the built-in list is whole")
});

impl Mediums {
    /// The list that comes with the program.
    pub fn built_in() -> &'static Mediums {
        &BUILT_IN
    }

    /// Reads headings `[medium medium]` with phrases below, one a line, `~` before ambiguous ones;
    /// `#` begins a comment. The error names the line.
    pub fn parse(text: &str) -> Result<Mediums, String> {
        let mut m = Mediums { names: vec![], phrases: vec![], by_first: HashMap::new() };
        let mut media = None;
        for (i, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(heading) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                media = Some(heading.split_whitespace().fold(0, |all, name| all | m.bit(name)));
                if m.names.len() > MediumSet::BITS as usize || media == Some(0) {
                    return Err(format!(
                        "line {}: expected 1 to {} media in all headings",
                        i + 1,
                        MediumSet::BITS
                    ));
                }
                continue;
            }
            let media = media.ok_or_else(|| {
                format!("line {}: expected a heading such as [photo] first", i + 1)
            })?;
            let (ambiguous, phrase) = line.strip_prefix('~').map_or((false, line), |p| (true, p));
            let all = words(phrase);
            let first = all.first().ok_or_else(|| format!("line {}: holds no word", i + 1))?;
            m.by_first.entry(first.clone()).or_default().push(m.phrases.len());
            m.phrases.push(MediumPhrase { text: phrase.to_owned(), words: all, media, ambiguous });
        }
        Ok(m)
    }

    fn bit(&mut self, name: &str) -> MediumSet {
        let at = self.names.iter().position(|n| n == name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        });
        1u32.checked_shl(at as u32).unwrap_or(0)
    }

    /// The names of all media.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The medium of that name.
    pub fn named(&self, name: &str) -> Option<MediumSet> {
        self.names.iter().position(|n| n == name).map(|i| 1 << i)
    }

    /// The media that fit every medium phrase of `text`: empty (0) if it contradicts itself, `None`
    /// if it names no medium.
    pub fn of(&self, text: &str) -> Option<MediumSet> {
        self.found(text).into_iter().map(|i| self.phrases[i].media).reduce(|a, b| a & b)
    }

    /// Whether `text` names media that no picture has at once.
    pub fn contradicts(&self, text: &str) -> bool {
        self.of(text) == Some(0)
    }

    /// Whether `text` holds phrases that only the first medium fits, and phrases that only the
    /// second does.
    pub fn names_both(&self, text: &str, first: MediumSet, second: MediumSet) -> bool {
        let media: Vec<MediumSet> =
            self.found(text).into_iter().map(|i| self.phrases[i].media).collect();
        let has = |one, other| media.iter().any(|m| m & one != 0 && m & other == 0);
        has(first, second) && has(second, first)
    }

    /// Phrases that fit none of `media`.
    pub fn against(&self, media: MediumSet) -> impl Iterator<Item = &str> {
        self.phrases.iter().filter(move |p| p.media & media == 0).map(|p| p.text.as_str())
    }

    /// The phrases in `text`; of those that begin at the same word the longest.
    fn found(&self, text: &str) -> Vec<usize> {
        let mut found = Vec::new();
        for part in text.split([',', ';', '|', '.', '\n']) {
            let part = words(part);
            let opens =
                part.iter().take_while(|w| ["a", "an", "the"].contains(&w.as_str())).count();
            let mut at = 0;
            while at < part.len() {
                let here = |&&i: &&usize| {
                    let p = &self.phrases[i];
                    let end = at + p.words.len();
                    part[at..].starts_with(&p.words)
                        && (!p.ambiguous || is_named(&part, opens, at, end))
                };
                let longest = self.by_first.get(&part[at]).and_then(|l| {
                    l.iter().filter(here).max_by_key(|&&i| self.phrases[i].words.len())
                });
                found.extend(longest);
                at += longest.map_or(1, |&i| self.phrases[i].words.len());
            }
        }
        found
    }
}

/// Whether the words from `at` to `end` of a part say how the picture is made rather than what it
/// shows.
fn is_named(part: &[String], opens: usize, at: usize, end: usize) -> bool {
    const FOLLOWING: [&str; 7] = ["of", "by", "in", "style", "with", "from", "on"];
    let followed = part.get(end).is_some_and(|w| FOLLOWING.contains(&w.as_str()));
    // "painting of", "detailed drawing": alone, or after a word or two
    (at == opens && (end == part.len() || followed))
        || (end == part.len() && part.len() <= 3)
        || part.get(end).is_some_and(|w| w == "of" || w == "style")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_are_found_and_contradictions_told() {
        let m = Mediums::built_in();
        let photo = m.named("photo").unwrap();
        assert_eq!(m.of("a photo of a cat, film grain"), Some(photo));
        assert_eq!(m.of("a cat on a sofa, highly detailed, 8k"), None);
        for text in [
            "a photo of a cat, digital painting",
            "35mm photograph, art by wlop",
            "anime, octane render",
        ] {
            assert!(m.contradicts(text), "{text}");
        }
        for text in [
            "oil painting of a ship, oil on canvas",
            "concept art, illustration, trending on artstation",
            "photo, photorealistic",
        ] {
            assert!(m.of(text).is_some_and(|s| s != 0), "{text}");
        }
    }

    #[test]
    fn things_in_a_picture_are_no_media() {
        let m = Mediums::built_in();
        for text in [
            "a child drawing on the pavement",
            "a red pencil beside the blue ink bottle",
            "the vector of the plane",
        ] {
            assert!(m.of(text).is_none_or(|s| s != 0), "{text}: {:?}", m.of(text));
        }
        assert_eq!(m.of("a man painting a wall in the sun"), None);
        assert!(m.of("a painting of a wall").is_some());
        assert!(m.of("a wall, painting").is_some());
    }

    #[test]
    fn faults_of_a_list_name_their_line() {
        assert!(Mediums::parse("photo").err().unwrap().contains("line 1"));
        assert!(Mediums::parse("[a]\n...").err().unwrap().contains("line 2"));
        assert!(Mediums::parse("[]\nx").err().unwrap().contains("line 1"));
    }
}
