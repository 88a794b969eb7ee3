//! Which words carry a prompt's meaning, and how many of them a rewrite keeps.

use rust_stemmers::{Algorithm, Stemmer};
use std::collections::HashSet;
use std::ops::Range;
use unicode_normalization::UnicodeNormalization;

/// No longer word is an English one.
const LONGEST_STEMMED: usize = 64;

/// Words that say nothing about the picture by themselves.
const STOP_WORDS: &str = "\
    a about after all also am an and any are as at be because been being both but by can could \
    did do does doing during each few for from further get gets had has have having he her \
    here hers him his how i if in into is it its itself just like made make me more most my of \
    off on once only or other our out over own same she should so some such than that the \
    their theirs them then there these they this those through to too under until up upon very \
    was we were what when where which while who whom why will with would you your";

/// The words of `text` in lower case, characters that only look different made the same (NFKC):
/// runs of letters and digits with their accents, with inner apostrophes and without a possessive's
/// end. Where words have no spaces between them, each letter is one.
pub fn words(text: &str) -> Vec<String> {
    word_spans(text).map(|(_, w)| w).collect()
}

/// [`words`] with the bytes they take in `text`.
pub fn word_spans(text: &str) -> impl Iterator<Item = (Range<usize>, String)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + text[at..].find(|c: char| c.is_alphanumeric() || is_apostrophe(c))?;
        let mut chars = text[start..].char_indices();
        let first = chars.next().map_or(' ', |c| c.1);
        let inside = |c: char| match is_unspaced(first) {
            true => is_combining(c),
            false => {
                (c.is_alphanumeric() && !is_unspaced(c)) || is_apostrophe(c) || is_combining(c)
            }
        };
        let end = chars.find(|&(_, c)| !inside(c)).map_or(text.len(), |(i, _)| start + i);
        at = end;
        Some((start..end, &text[start..end]))
    })
    .filter_map(|(span, word)| {
        let word = match word.is_ascii() {
            true => word.to_ascii_lowercase(),
            false => word
                .to_lowercase()
                .nfkc()
                .map(|c| if is_apostrophe(c) { '\'' } else { c })
                .collect(),
        };
        let word = word.trim_matches('\'').trim_end_matches("'s");
        (!word.is_empty()).then(|| (span, word.to_owned()))
    })
}

fn is_apostrophe(c: char) -> bool {
    matches!(c, '\'' | '’' | 'ʼ')
}

/// Whether a character belongs to the one before it.
pub(crate) fn is_combining(c: char) -> bool {
    !c.is_ascii() && unicode_normalization::char::is_combining_mark(c)
}

/// Letters of scripts that write no spaces: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
fn is_unspaced(c: char) -> bool {
    let chinese_or_japanese = matches!(
        c as u32,
        0x3040..=0x30ff
            | 0x31f0..=0x31ff
            | 0x3400..=0x4dbf
            | 0x4e00..=0x9fff
            | 0xf900..=0xfaff
            | 0x20000..=0x3ffff
    );
    chinese_or_japanese || matches!(c as u32, 0x0e00..=0x0eff | 0x1000..=0x109f | 0x1780..=0x17ff)
}

/// Finds content words: everything but stop words, stemmed (Snowball English).
pub struct ContentWords {
    stemmer: Stemmer,
    stop: HashSet<&'static str>,
}

impl Default for ContentWords {
    fn default() -> Self {
        ContentWords {
            stemmer: Stemmer::create(Algorithm::English),
            stop: STOP_WORDS.split(' ').collect(),
        }
    }
}

impl ContentWords {
    /// Whether `word`, in lower case, is a stop word.
    pub fn is_stop_word(&self, word: &str) -> bool {
        self.stop.contains(word)
    }

    /// The stem of an English word; other words are their own.
    pub fn stem(&self, word: &str) -> String {
        // the stemmer's time grows with the square of a word's length
        if word.is_ascii() && word.len() <= LONGEST_STEMMED {
            self.stemmer.stem(word).into_owned()
        } else {
            word.to_owned()
        }
    }

    /// Stems of the content words of `text`, each once, in order.
    pub fn stems(&self, text: &str) -> Vec<String> {
        let mut seen = HashSet::new();
        words(text)
            .into_iter()
            .filter(|w| !self.stop.contains(w.as_str()))
            .map(|w| self.stem(&w))
            .filter(|s| seen.insert(s.clone()))
            .collect()
    }

    /// Part of the content words of `input` that `output` keeps, from 0 to 1; 1 if there are none.
    pub fn kept(&self, input: &str, output: &str) -> f64 {
        let wanted = self.stems(input);
        if wanted.is_empty() {
            return 1.0;
        }
        let have: HashSet<String> = words(output).iter().map(|w| self.stem(w)).collect();
        wanted.iter().filter(|w| have.contains(*w)).count() as f64 / wanted.len() as f64
    }
}

/// How often the most frequent run of `n` words occurs in `text`.
pub fn most_repeated(text: &str, n: usize) -> usize {
    let words = words(text);
    let mut counts = std::collections::HashMap::new();
    words
        .windows(n)
        .map(|w| *counts.entry(w).and_modify(|c| *c += 1).or_insert(1))
        .max()
        .unwrap_or(0)
}

/// The share of the runs of `n` words in `text` that occurred in it before: 0 if none repeats.
pub fn repeated_share(text: &str, n: usize) -> f64 {
    let words = words(text);
    let distinct: HashSet<&[String]> = words.windows(n).collect();
    match words.windows(n).len() {
        0 => 0.0,
        all => (all - distinct.len()) as f64 / all as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_words_are_stemmed_and_stop_words_do_not_count() {
        let c = ContentWords::default();
        assert_eq!(
            c.stems("The cats are sitting in the RAIN, a cat's tail"),
            ["cat", "sit", "rain", "tail"]
        );
        assert_eq!(c.kept("two cats sitting in the rain", "a cat sits, 8k, rain"), 0.75);
        assert_eq!(c.kept("in the", "anything"), 1.0);
    }

    #[test]
    fn words_of_all_scripts() {
        assert_eq!(words("Don’t, dogs' '90s ''"), ["don't", "dogs", "90s"]);
        assert_eq!(
            words("cafe\u{301}s caf\u{e9}s \u{fb01}sh"),
            ["caf\u{e9}s", "caf\u{e9}s", "fish"],
            "they look the same"
        );
        assert_eq!(words("Straße 夜の街, кот"), ["straße", "夜", "の", "街", "кот"]);
        assert_eq!(words("❤\u{fe0f} \u{301}"), [""; 0]);
    }

    #[test]
    fn repeated_runs_are_counted() {
        assert_eq!(most_repeated("a b c d a b c d, A B C D", 4), 3);
        assert_eq!(most_repeated("a b c", 4), 0);
        // abc bca cab abc bca: three different ones of five
        assert_eq!(repeated_share("a b c A B, c a", 3), 0.4);
        assert_eq!((repeated_share("a b c d", 3), repeated_share("a b", 3)), (0.0, 0.0));
    }
}
