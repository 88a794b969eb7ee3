//! How much of a prompt's meaning a rewrite keeps.

use super::verbatim::Verbatim;
use crate::text::content_words::{ContentWords, words};
use std::collections::HashSet;

/// Stop words elsewhere, but they say where things are.
const SPATIAL: &str = "above across around at behind below beneath beside between bottom front inside left near on out outside over right through \
     top under underneath up down upon";

/// What takes a thing away.
const NEGATIONS: &str = "no not without never none neither nor isn't aren't don't doesn't lacks lacking minus";

/// Words between a negation and what it negates.
const REACH: usize = 3;

const NUMBERS: &str = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
                       seventeen eighteen nineteen twenty";

/// Something that a prompt says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Unit {
    /// A word's stem.
    Word(String),
    Number(u32),
    /// Stem of a word that is said not to be there.
    Negated(String),
}

/// Measures what rewrites keep: content words by their stems, numbers as words or digits, colours, words of place where they stand
/// beside content, negations with what they negate, and special parts to the letter.
#[derive(Default)]
pub struct Kept {
    content: ContentWords,
}

impl Kept {
    /// The part of what `input` says that `output` says too, from 0 to 1, and what it leaves out.
    pub fn measure(&self, input: &str, output: &str) -> (f64, Vec<String>) {
        let verbatim = Verbatim::parse(input);
        let wanted = self.units(&verbatim.plain(), true);
        let parts: Vec<&str> = verbatim.parts().collect();
        let breaks = verbatim.chunks.len() - 1;
        let total = wanted.len() + parts.len() + breaks;
        if total == 0 {
            return (1.0, vec![]);
        }
        let plain = Verbatim::parse(output).plain();
        let have: HashSet<Unit> = self.units(&plain, false).into_iter().map(|u| u.0).collect();
        let mut missing: Vec<String> = wanted.into_iter().filter(|(u, _)| !have.contains(u)).map(|u| u.1).collect();
        // a part that stands twice has to come back twice
        let mut rest = output.to_owned();
        for part in parts {
            match rest.find(part) {
                Some(at) => rest.replace_range(at..at + part.len(), " "),
                None => missing.push(part.to_owned()),
            }
        }
        let broken = rest.split_whitespace().filter(|w| *w == "BREAK").count();
        missing.extend((broken..breaks).map(|_| "BREAK".to_owned()));
        ((total - missing.len()) as f64 / total as f64, missing)
    }

    /// What of `output` is not in `input`: phrases between commas.
    pub fn added(&self, input: &str, output: &str) -> Vec<String> {
        let have: HashSet<String> =
            words(&Verbatim::parse(input).plain()).iter().map(|w| self.content.stem(w)).collect();
        let new = |phrase: &&str| {
            words(&Verbatim::parse(phrase).plain())
                .iter()
                .any(|w| !self.content.is_stop_word(w) && !have.contains(&self.content.stem(w)))
        };
        output.split(',').map(str::trim).filter(new).map(str::to_owned).collect()
    }

    /// Whether a phrase has no content word in common with `input`.
    pub fn is_apart(&self, input: &str, phrase: &str) -> bool {
        let have: HashSet<String> = self.content.stems(&Verbatim::parse(input).plain()).into_iter().collect();
        self.content.stems(phrase).iter().all(|s| !have.contains(s))
    }

    /// What a plain text says, each once, with the words it says it in. Words of place count in a `prompt` only if they are
    /// specific; in an answer all count.
    fn units(&self, text: &str, prompt: bool) -> Vec<(Unit, String)> {
        let words = words(text);
        let spatial: HashSet<&str> = SPATIAL.split_whitespace().collect();
        let negations: HashSet<&str> = NEGATIONS.split_whitespace().collect();
        // such small words are in almost every sentence
        let vague = |w: &str| prompt && ["at", "on", "out", "up", "through", "over", "upon", "around"].contains(&w);
        let mut seen = HashSet::new();
        let mut units = Vec::new();
        let mut add = |unit: Unit, word: String| {
            if seen.insert(unit.clone()) {
                units.push((unit, word));
            }
        };
        let mut negated = 0;
        for word in words {
            let w = word.as_str();
            if negations.contains(w) || w.ends_with("n't") {
                negated = REACH;
                continue;
            }
            if let Some(n) = number(w) {
                // "one" is often a pronoun
                if w != "one" || !prompt {
                    add(Unit::Number(n), word);
                }
                continue;
            }
            let placed = spatial.contains(w) && !vague(w);
            if self.content.is_stop_word(w) && !placed {
                continue;
            }
            let stem = if w == "gray" { "grey".into() } else { self.content.stem(w) };
            if negated > 0 {
                negated -= 1;
                add(Unit::Negated(stem.clone()), format!("no {word}"));
                if !prompt {
                    add(Unit::Word(stem), word);
                }
                // the first word after it is what is negated
                negated = if prompt { 0 } else { negated };
                continue;
            }
            add(Unit::Word(stem), word);
        }
        units
    }
}

fn number(word: &str) -> Option<u32> {
    word.parse().ok().or_else(|| NUMBERS.split_whitespace().position(|n| n == word).map(|n| n as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(input: &str, output: &str) -> Vec<String> {
        Kept::default().measure(input, output).1
    }

    #[test]
    fn stems_numbers_places_and_negations() {
        assert_eq!(missing("three cats sitting", "3 cats sit in rain, 8k"), [""; 0]);
        assert_eq!(missing("two cats", "three cats"), ["two"]);
        assert_eq!(missing("a gray cat under the table", "grey cat on a table"), ["under"]);
        assert_eq!(missing("a cat left of a dog", "a cat and a dog"), ["left"]);
        assert_eq!(missing("a street without people", "a street, people"), ["no people"]);
        assert_eq!(missing("a street without people", "an empty street, no people"), [""; 0]);
        assert_eq!(missing("a man not wearing a hat", "man wearing a hat"), ["no wearing"]);
        assert_eq!(Kept::default().measure("in the", "anything").0, 1.0);
    }

    #[test]
    fn special_parts_count_to_the_letter() {
        let input = "a (red cat:1.2) BREAK night <lora:x:0.8>";
        assert_eq!(missing(input, "a (red cat:1.2), 8k BREAK night sky <lora:x:0.8>"), [""; 0]);
        assert_eq!(missing(input, "a (red cat:1.3) night <lora:x:0.8>"), ["(red cat:1.2)", "BREAK"]);
        assert_eq!(Kept::default().measure(input, "a (red cat:1.3) night <lora:x:0.8>").0, 4.0 / 6.0);
    }

    #[test]
    fn added_phrases_say_something_new() {
        let added = Kept::default().added("a cat in the rain", "a cat in the rain, highly detailed, the rain, 8k");
        assert_eq!(added, ["highly detailed", "8k"]);
        let apart = |phrase| Kept::default().is_apart("two cats in the rain", phrase);
        assert!(apart("in the style of x") && !apart("three cats"));
    }
}
