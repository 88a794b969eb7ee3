//! Phrases that a text must not, or must, hold: found by their words, whatever stands between those, in any case.

use super::content_words::{word_spans, words};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes at the end of a growing text in which an unfinished phrase is looked for.
const TAIL: usize = 256;

/// A list of phrases, each one or more words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Phrases {
    phrases: Vec<Vec<String>>,
    by_first: BTreeMap<String, Vec<usize>>,
}

impl Phrases {
    /// Phrases that hold no word are left out, and so are repetitions.
    pub fn new<S: AsRef<str>>(list: impl IntoIterator<Item = S>) -> Phrases {
        let mut p = Phrases::default();
        for phrase in list {
            let phrase = words(phrase.as_ref());
            if phrase.is_empty() || p.phrases.contains(&phrase) {
                continue;
            }
            p.by_first.entry(phrase[0].clone()).or_default().push(p.phrases.len());
            p.phrases.push(phrase);
        }
        p
    }

    pub fn is_empty(&self) -> bool {
        self.phrases.is_empty()
    }

    /// Bytes of the first phrase in `text`. Unless the text is `finished`, its last word may still grow.
    pub fn find(&self, text: &str, finished: bool) -> Option<Range<usize>> {
        let from = if finished { 0 } else { tail(text) };
        self.matches(text, from).find(|m| m.whole && (finished || m.bytes.end < text.len())).map(|m| m.bytes)
    }

    /// Where a phrase may be about to form at the end of a growing text: its length, if nowhere.
    pub fn undecided(&self, text: &str) -> usize {
        let ends = |m: &Match| m.bytes.end == text.len() || (!m.whole && m.at_end);
        self.matches(text, tail(text)).find(ends).map_or(text.len(), |m| m.bytes.start)
    }

    /// The phrases that `text` does not hold.
    pub fn missing(&self, text: &str) -> Vec<String> {
        let words = words(text);
        let held = |p: &Vec<String>| words.windows(p.len()).any(|w| w == p.as_slice());
        self.phrases.iter().filter(|p| !held(p)).map(|p| p.join(" ")).collect()
    }

    /// Without the phrases, their surroundings tidied.
    pub fn strip(&self, text: &str) -> String {
        let mut text = text.to_owned();
        while let Some(found) = self.find(&text, true) {
            text.replace_range(found, "");
        }
        let kept: Vec<&str> = text.split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
        kept.join(", ").split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Phrases and beginnings of phrases, in order of their first byte.
    fn matches(&self, text: &str, from: usize) -> impl Iterator<Item = Match> {
        let words: Vec<(Range<usize>, String)> =
            word_spans(&text[from..]).map(|(s, w)| (s.start + from..s.end + from, w)).collect();
        let mut found = Vec::new();
        for (i, (span, word)) in words.iter().enumerate() {
            let rest = &words[i..];
            let last_grows = rest[rest.len() - 1].0.end == text.len();
            // a lone last word may become the first of a phrase
            let may_grow = rest.len() == 1 && last_grows;
            let first = self
                .by_first
                .range(word.clone()..)
                .take_while(|(w, _)| *w == word || (may_grow && w.starts_with(word)));
            for &p in first.flat_map(|f| f.1) {
                let phrase = &self.phrases[p];
                let n = rest.len().min(phrase.len());
                let at_end = n == rest.len();
                let begun = |k: usize| at_end && last_grows && k + 1 == n && phrase[k].starts_with(rest[k].1.as_str());
                let same = (0..n).all(|k| rest[k].1 == phrase[k] || begun(k));
                let whole = n == phrase.len() && rest[n - 1].1 == phrase[n - 1];
                if same && (whole || at_end) {
                    found.push(Match { bytes: span.start..rest[n - 1].0.end, whole, at_end });
                }
            }
        }
        found.into_iter()
    }
}

struct Match {
    bytes: Range<usize>,
    /// All of the phrase's words.
    whole: bool,
    /// Its last word is the text's.
    at_end: bool,
}

fn tail(text: &str) -> usize {
    let mut from = text.len().saturating_sub(TAIL);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    // not within a word
    if from == 0 { 0 } else { from + text[from..].find(|c: char| !c.is_alphanumeric()).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_are_found_by_their_words() {
        let p = Phrases::new(["Greg Rutkowski", "cat", "  ", "cat"]);
        assert_eq!(p.find("by GREG  rutkowski, 8k", false), Some(3..18));
        assert_eq!(p.find("by greg-rutkowski", false), None, "the word may go on");
        assert_eq!(p.find("by greg-rutkowski", true), Some(3..17));
        assert_eq!(p.find("by greg-rutkowskis", true), None);
        assert_eq!(p.find("a cat's tail", false), Some(2..7));
        assert_eq!(p.find("concatenate cats", true), None);
        assert_eq!(p.missing("a Cat in the rain"), ["greg rutkowski"]);
        assert_eq!(p.strip("a cat, art by Greg Rutkowski, , 8k"), "a, art by, 8k");
        assert!(Phrases::new(["..."]).is_empty());
    }

    #[test]
    fn what_may_become_a_phrase_is_undecided() {
        let p = Phrases::new(["greg rutkowski", "cat"]);
        for (text, from) in [
            ("by greg", 3),
            ("by gr", 3),
            ("by greg rut", 3),
            ("by greg ", 3),
            ("by greg s", 9),
            ("by art, ", 8),
            ("a ca", 2),
            ("a dog", 5),
        ] {
            assert_eq!(p.undecided(text), from, "{text}");
        }
        let long = "word ".repeat(100) + "ca";
        assert_eq!(p.undecided(&long), 500);
    }
}
