//! Names of artists, from `assets/artists.txt`.

use super::phrases::Phrases;
use std::sync::LazyLock;

/// What an artist's name follows, and what is left dangling without one.
pub const LEADS: [&str; 12] = [
    "art by",
    "artwork by",
    "artworks by",
    "painting by",
    "painted by",
    "illustration by",
    "drawing by",
    "concept art by",
    "by artist",
    "in the style of",
    "style of",
    "inspired by",
];

static NAMES: LazyLock<Phrases> = LazyLock::new(|| Phrases::new(names()));

/// The names of the list.
pub fn names() -> impl Iterator<Item = &'static str> {
    include_str!("../../assets/artists.txt")
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// The names that `text` holds, in lower case, in its order.
pub fn names_in(text: &str) -> Vec<String> {
    NAMES.find_all(text).into_iter().map(|name| text[name].to_lowercase()).collect()
}

/// Whether `text` names an artist, or begins as if it did.
pub fn names_artist(text: &str) -> bool {
    let words = super::content_words::words(text).join(" ");
    let begins =
        |lead: &str| words == lead || words.strip_prefix(lead).is_some_and(|r| r.starts_with(' '));
    begins("by") || LEADS.iter().any(|l| begins(l)) || NAMES.find(text).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artists_are_found() {
        assert_eq!(
            names_in("art by Greg Rutkowski and Alphonse Mucha, 8k"),
            ["greg rutkowski", "alphonse mucha"]
        );
        for text in ["by someone unknown", "art by nobody", "style of x", "wlop"] {
            assert!(names_artist(text), "{text}");
        }
        for text in ["bystander", "a house beside the lake", "highly detailed", "style"] {
            assert!(!names_artist(text), "{text}");
        }
        assert!(names().count() > 5000);
    }
}
