//! How much of a prompt's meaning a rewrite keeps.

use super::markup::{Places, PromptMarkup, phrase_spans};
use crate::text::content_words::{ContentWords, is_combining, word_spans, words};
use std::collections::HashSet;
use std::ops::Range;

/// Stop words elsewhere, but they say where things are.
const SPATIAL: &str = "above across around at behind below beneath beside between bottom front \
    inside left near on out outside over right through \
     top under underneath up down upon";

/// Such small words are in almost every sentence: in a prompt they do not count.
const VAGUE: &str = "at on out up through over upon around";

/// What takes a thing away.
const NEGATIONS: &str =
    "no not without never none neither nor cannot lack lacks lacking minus excluding except";

/// Content words after a negation that it may reach.
const REACH: usize = 3;

const NUMBERS: &str = "zero one two three four five six seven eight nine ten eleven twelve \
    thirteen fourteen fifteen sixteen \
                       seventeen eighteen nineteen";
const TENS: &str = "twenty thirty forty fifty sixty seventy eighty ninety";

/// Maximum quotations that are looked for to the letter.
const MAX_QUOTES: usize = 16;

/// Something that a prompt says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Unit {
    /// A word's stem.
    Word(String),
    Number(u64),
    /// Stem of a word that is said not to be there.
    Negated(String),
    /// An emoji, or another sign that is no punctuation.
    Sign(char),
}

/// Measures what rewrites keep: content words by their stems, numbers as words or digits, colours,
/// words of place where they stand beside content, negations with what they negate, emoji, quoted
/// text word for word, and special parts to the letter where they stood.
pub struct Fidelity {
    content: ContentWords,
    spatial: HashSet<&'static str>,
    vague: HashSet<&'static str>,
    negations: HashSet<&'static str>,
}

impl Default for Fidelity {
    fn default() -> Self {
        let set = |list: &'static str| list.split_whitespace().collect();
        Fidelity {
            content: ContentWords::default(),
            spatial: set(SPATIAL),
            vague: set(VAGUE),
            negations: set(NEGATIONS),
        }
    }
}

impl Fidelity {
    /// The part of what `input` says that `output` says too, from 0 to 1, and what it leaves out.
    pub fn score(&self, input: &str, output: &str) -> (f64, Vec<String>) {
        let (input, output) =
            (PromptMarkup::parse(input), PromptMarkup::parse_answer(input, output));
        let (plain, answer) = (input.plain(), output.plain());
        let (wanted, have) = (Said::of(&plain), Said::of(&answer));
        let units = self.units(&wanted, true);
        let quotes = wanted.quotes();
        let breaks = input.chunks.len() - 1;
        let total = units.len() + quotes.len() + input.parts().count() + breaks;
        if total == 0 {
            return (1.0, vec![]);
        }
        let said: HashSet<Unit> = self.units(&have, false).into_iter().map(|u| u.0).collect();
        let mut missing: Vec<String> =
            units.into_iter().filter(|(u, _)| !said.contains(u)).map(|u| u.1).collect();
        if !quotes.is_empty() {
            let words = have.joined(0..have.words.len());
            missing.extend(
                quotes
                    .into_iter()
                    .filter(|q| !words.contains(q))
                    .map(|q| format!("\"{}\"", spaced(&q))),
            );
        }
        // a part that stands twice has to come back twice
        let mut places = Places::of(&output);
        missing.extend(input.parts().filter(|p| !places.take(p)).map(|p| p.written.clone()));
        missing.extend((output.chunks.len() - 1..breaks).map(|_| "BREAK".to_owned()));
        ((total - missing.len()) as f64 / total as f64, missing)
    }

    /// What of `output` is not in `input`: phrases between commas.
    pub fn added(&self, input: &str, output: &str) -> Vec<String> {
        let known = self.known(&PromptMarkup::parse(input).plain());
        let phrases = phrase_spans(output).into_iter().map(|span| output[span].trim());
        phrases
            .filter(|p| known.lacks_some(&PromptMarkup::parse(p).plain()))
            .map(str::to_owned)
            .collect()
    }

    /// The words of a text, to compare phrases with.
    pub fn known(&self, text: &str) -> Known<'_> {
        let words = words(text);
        let stems = words.iter().map(|w| self.content.stem(w)).collect();
        let beginnings = words
            .iter()
            .filter(|w| !self.content.is_stop_word(w))
            .filter_map(|w| beginning(w))
            .collect();
        Known { content: &self.content, stems, beginnings }
    }

    /// What a plain text says, each once, with the words it says it in. Words of place count in a
    /// `prompt` only if they are specific; in an answer all count.
    fn units(&self, said: &Said, prompt: bool) -> Vec<(Unit, String)> {
        let mut seen = HashSet::new();
        let mut units = Vec::new();
        let mut add = |unit: Unit, word: &str| {
            if seen.insert(unit.clone()) {
                units.push((unit, word.to_owned()));
            }
        };
        let mut negated = 0;
        let mut i = 0;
        while i < said.words.len() {
            let (gap, word) = (said.gap(i), said.words[i].1.as_str());
            signs(gap).for_each(|c| add(Unit::Sign(c), &c.to_string()));
            if gap.contains([',', '.', ';', ':', '(', '\n', '"']) {
                negated = 0;
            }
            if self.negations.contains(word) || word.ends_with("n't") {
                negated = REACH;
                i += 1;
                continue;
            }
            if let Some((text, n)) = said.figures(i) {
                match text.parse() {
                    Ok(number) => add(Unit::Number(number), &text),
                    Err(_) => add(Unit::Word(text.clone()), &text),
                }
                i += n;
                continue;
            }
            if let Some((number, n)) = said.number(i) {
                // a lone "one" is often a pronoun
                if n > 1 || word != "one" || !prompt || self.counts(said, i) {
                    add(Unit::Number(number), &spaced(&said.joined(i..i + n)));
                }
                i += n;
                continue;
            }
            i += 1;
            let placed = self.spatial.contains(word) && !(prompt && self.vague.contains(word));
            if self.content.is_stop_word(word) && !placed {
                continue;
            }
            let stem = if word == "gray" { "grey".into() } else { self.content.stem(word) };
            if negated == 0 {
                add(Unit::Word(stem), word);
                continue;
            }
            add(Unit::Negated(stem.clone()), &format!("no {word}"));
            // the first word is what is negated; whether the next ones are is open
            if negated < REACH && !prompt {
                add(Unit::Word(stem), word);
            }
            negated = if prompt { 0 } else { negated - 1 };
        }
        signs(&said.text[said.words.last().map_or(0, |w| w.0.end)..])
            .for_each(|c| add(Unit::Sign(c), &c.to_string()));
        units
    }

    /// Whether the "one" at `i` counts things: the word after it is one of content.
    fn counts(&self, said: &Said, i: usize) -> bool {
        let Some((_, next)) = said.words.get(i + 1) else { return false };
        said.gap(i + 1).trim().is_empty()
            && !self.content.is_stop_word(next)
            && !self.spatial.contains(next.as_str())
            && !self.negations.contains(next.as_str())
    }
}

/// The words of a text.
pub struct Known<'a> {
    content: &'a ContentWords,
    stems: HashSet<String>,
    /// The first letters of longer content words.
    beginnings: HashSet<String>,
}

impl Known<'_> {
    /// Whether a phrase has a content word that the text has not.
    pub fn lacks_some(&self, phrase: &str) -> bool {
        self.content.stems(phrase).iter().any(|s| !self.stems.contains(s))
    }

    /// Whether a phrase has a content word of the text's.
    pub fn knows_some(&self, phrase: &str) -> bool {
        self.content.stems(phrase).iter().any(|s| self.stems.contains(s))
    }

    /// Whether a phrase has content words, and none that is the text's or begins like one: a
    /// misspelt word is nothing new.
    pub fn lacks_all(&self, phrase: &str) -> bool {
        let stems = self.content.stems(phrase);
        let begins = |s: &String| beginning(s).is_some_and(|b| self.beginnings.contains(&b));
        !stems.is_empty() && !stems.iter().any(|s| self.stems.contains(s) || begins(s))
    }
}

/// The first four letters of a word that has them.
fn beginning(word: &str) -> Option<String> {
    word.char_indices().nth(3).map(|(i, c)| word[..i + c.len_utf8()].to_owned())
}

/// A plain text and its words.
struct Said<'a> {
    text: &'a str,
    words: Vec<(Range<usize>, String)>,
}

impl<'a> Said<'a> {
    fn of(text: &'a str) -> Said<'a> {
        Said { text, words: word_spans(text).collect() }
    }

    /// What stands before the `i`-th word.
    fn gap(&self, i: usize) -> &'a str {
        &self.text[i.checked_sub(1).map_or(0, |last| self.words[last].0.end)..self.words[i].0.start]
    }

    /// Words with a space on both sides of each.
    fn joined(&self, words: Range<usize>) -> String {
        self.words[words].iter().map(|w| format!(" {} ", w.1)).collect()
    }

    /// A number in digits from the `i`-th word on, such as 3, 1,000, f/1.8's 1.8, or 16:9, and how
    /// many words it takes.
    fn figures(&self, i: usize) -> Option<(String, usize)> {
        let digits = |w: &str| w.bytes().all(|b| b.is_ascii_digit());
        let mut text = Some(&self.words[i].1).filter(|w| digits(w))?.clone();
        let mut n = 1;
        while let Some((_, next)) = self.words.get(i + n) {
            let gap = self.gap(i + n);
            if !matches!(gap, "." | "," | ":" | "/")
                || !next.starts_with(|c: char| c.is_ascii_digit())
            {
                break;
            }
            let thousands = gap == "," && next.len() == 3 && digits(next);
            text.push_str(if thousands { "" } else { gap });
            text.push_str(next);
            n += 1;
            if !digits(next) {
                break;
            }
        }
        Some((text, n))
    }

    /// A number in words from the `i`-th on, such as twenty-one, two hundred or a dozen, and how
    /// many words it takes.
    fn number(&self, i: usize) -> Option<(u64, usize)> {
        let place = |list: &str, word: &str| {
            list.split_whitespace().position(|w| w == word).map(|n| n as u64)
        };
        let scale = |word: &str| match word {
            "dozen" => Some(12),
            "hundred" => Some(100),
            "thousand" => Some(1000),
            "million" => Some(1_000_000),
            _ => None,
        };
        // words of one number stand together
        let word = |k: usize| {
            let near = k == i || matches!(self.gap(k).trim(), "" | "-");
            self.words.get(k).filter(|_| near).map_or("", |w| w.1.as_str())
        };
        let (mut number, mut n) = if let Some(small) = place(NUMBERS, word(i)) {
            (small, 1)
        } else if let Some(tens) = place(TENS, word(i)) {
            let units = self
                .words
                .get(i + 1)
                .and_then(|_| place(NUMBERS, word(i + 1)))
                .filter(|u| (1..10).contains(u));
            (20 + 10 * tens + units.unwrap_or(0), 1 + usize::from(units.is_some()))
        } else {
            (scale(word(i))?, 1)
        };
        while let Some(by) = self.words.get(i + n).and_then(|_| scale(word(i + n))) {
            number = number.saturating_mul(by);
            n += 1;
        }
        Some((number, n))
    }

    /// The words of quotations, as [`Said::joined`] gives them.
    fn quotes(&self) -> Vec<String> {
        let mut quotes = vec![];
        let mut open: Option<(char, usize)> = None;
        let mut before = ' ';
        let mut chars = self.text.char_indices().peekable();
        while let Some((at, c)) = chars.next().filter(|_| quotes.len() < MAX_QUOTES) {
            let after = chars.peek().map_or(' ', |c| c.1);
            let mark = match c {
                '"' | '“' | '”' | '„' => '"',
                '\'' | '‘' | '’' => '\'',
                _ => ' ',
            };
            if mark != ' ' {
                match open {
                    // an apostrophe stands within a word
                    Some((begun, start))
                        if begun == mark && (mark == '"' || !after.is_alphanumeric()) =>
                    {
                        let first = self.words.partition_point(|w| w.0.end <= start);
                        let end = self.words.partition_point(|w| w.0.start < at);
                        // what goes on within a word is no quotation
                        if first < end && self.words[end - 1].0.end <= at + c.len_utf8() {
                            quotes.push(self.joined(first..end));
                        }
                        open = None;
                    }
                    // what looked like a single mark was an apostrophe
                    None | Some(('\'', _))
                        if !before.is_alphanumeric() && !after.is_whitespace() =>
                    {
                        open = Some((mark, at + c.len_utf8()));
                    }
                    _ => {}
                }
            }
            before = c;
        }
        quotes
    }
}

fn spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Characters that say something without being letters, digits or punctuation.
fn signs(gap: &str) -> impl Iterator<Item = char> {
    gap.chars().filter(|c| match *c as u32 {
        0..0xa0 => false,
        0xa2..=0xa6 | 0xa9 | 0xac | 0xae | 0xb0 | 0xb1 | 0xd7 | 0xf7 => true,
        // what is written around and between words, and what only changes others
        0xa0..0x20a0
        | 0x2e00..=0x2e7f
        | 0x3000..=0x303f
        | 0xfe00..=0xfe6f
        | 0xfff0..=0xffff
        | 0xe0000.. => false,
        _ => !c.is_alphanumeric() && !c.is_whitespace() && !is_combining(*c),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn missing(input: &str, output: &str) -> Vec<String> {
        Fidelity::default().score(input, output).1
    }

    #[test]
    fn stems_places_and_negations() {
        assert_eq!(missing("three cats sitting", "3 cats sit in rain, 8k"), [""; 0]);
        assert_eq!(missing("a gray cat under the table", "grey cat on a table"), ["under"]);
        assert_eq!(missing("a cat left of a dog", "a cat and a dog"), ["left"]);
        assert_eq!(missing("a street without people", "a street, people"), ["no people"]);
        assert_eq!(missing("a street without people", "an empty street, no people"), [""; 0]);
        assert_eq!(missing("a man not wearing a hat", "man wearing a hat"), ["no wearing"]);
        assert_eq!(missing("a cat with a hat", "a cat without a hat"), ["hat"]);
        assert_eq!(missing("no red cars, a bus", "no red cars, a bus"), [""; 0]);
        assert_eq!(missing("a dog that can’t swim", "a dog that can't swim"), [""; 0]);
        assert_eq!(Fidelity::default().score("in the", "anything").0, 1.0);
    }

    #[test]
    fn numbers_in_words_and_digits() {
        assert_eq!(missing("two cats", "three cats"), ["two"]);
        assert_eq!(missing("twenty-one cats", "21 cats"), [""; 0]);
        assert_eq!(missing("twenty-one cats", "twenty cats, one dog"), ["twenty one"]);
        assert_eq!(
            missing("a dozen roses, two hundred bees, 1,000 ants", "12 roses, 200 bees, 1000 ants"),
            [""; 0]
        );
        assert_eq!(missing("one red cat, which one", "a red cat"), ["one"]);
        assert_eq!(missing("at f/1.8, 16:9", "at f/1 and 8, 16 by 9"), ["1.8", "16:9"]);
    }

    #[test]
    fn signs_quotes_and_accents_are_content() {
        assert_eq!(missing("a 🐱 and a 🌧\u{fe0f}", "a 🐱"), ["🌧"]);
        assert_eq!(
            missing("a sign that says \"I am not here\"", "a sign says not here, I am"),
            ["\"i am not here\""]
        );
        assert_eq!(missing("the word 'to be', dogs' beds", "word “to be” dogs beds"), [""; 0]);
        assert_eq!(missing("the dogs' bowl and the cats' bed", "dogs bowl, cats bed"), [""; 0]);
        assert_eq!(missing("café, Straße, 猫", "cafe\u{301}, strae"), ["straße", "猫"]);
    }

    #[test]
    fn special_parts_count_to_the_letter() {
        let input = "a (red cat:1.2) BREAK night <lora:x:0.8>";
        assert_eq!(missing(input, "a (red cat:1.2), 8k BREAK night sky <lora:x:0.8>"), [""; 0]);
        assert_eq!(
            missing(input, "a (red cat:1.3) night <lora:x:0.8>"),
            ["(red cat:1.2)", "BREAK"]
        );
        assert_eq!(
            Fidelity::default().score(input, "a (red cat:1.3) night <lora:x:0.8>").0,
            4.0 / 6.0
        );
        assert_eq!(missing("(cat:1.1), (cat:1.1)", "(cat:1.1)"), ["(cat:1.1)"]);
        assert_eq!(missing("\"CATS AND DOGS\"", "\"CATS AND DOGS\", highly detailed"), [""; 0]);
    }

    #[test]
    fn special_parts_count_where_they_stood() {
        let input = "a photo of a __animal__ with a {red|blue} hat in __city__";
        let moved = "a photo of a with a hat in, 8k __animal__ {red|blue} __city__";
        assert_eq!(missing(input, moved), ["__animal__", "{red|blue}", "__city__"]);
        assert_eq!(missing(input, &format!("best, {input}, 8k")), [""; 0]);
        assert_eq!(missing("a (red:1.2) cat", "a cat, (red:1.2)"), ["(red:1.2)"]);
        assert_eq!(missing("(red:1.2), a cat", "a (red:1.2) cat"), [""; 0]);
        assert_eq!(missing("__a__ __b__", "__b__ __a__"), ["__a__", "__b__"]);
        assert_eq!(missing("__a__ x, __a__ y", "__a__ x, __a__ x, y"), ["__a__"]);
    }

    #[test]
    fn added_phrases_say_something_new() {
        let added = Fidelity::default()
            .added("a cat in the rain", "a cat in the rain, highly detailed, the rain, 8k");
        assert_eq!(added, ["highly detailed", "8k"]);
        let fidelity = Fidelity::default();
        let known = fidelity.known("two cats in the rain");
        assert!(
            known.lacks_all("in the style of x")
                && !known.lacks_all("three cats")
                && !known.lacks_all("in the")
        );
    }

    /// Pieces of prompts, with everything that means something to the measure or to an image
    /// program.
    fn hostile() -> impl Strategy<Value = String> {
        let pieces = "cat red two twenty -one 3.5 1,000 no without under on the one (cat:1.2) ( ) \
            [ ] { } | {a|b} {2$$x|y} ${v} [a:b:0.5] \
                      __w__ __ _ <lora:x:1> <lora: BREAK AND , . : ; \" ' ’ “ ” \\ \u{fe0f} \
                      🐱 ß é e\u{301} 猫 кот \u{a0} \u{fffd} \u{200d} \n";
        let pieces: Vec<String> =
            pieces.split(' ').filter(|p| !p.is_empty()).map(str::to_owned).collect();
        let any_sign = any::<char>().prop_map(String::from);
        let piece = prop_oneof![4 => prop::sample::select(pieces), 1 => any_sign];
        prop::collection::vec((piece, prop::sample::select(vec!["", " ", " ", ", "])), 0..24)
            .prop_map(|v| v.into_iter().map(|(piece, space)| piece + space).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_prompt_keeps_itself(text in hostile()) {
            prop_assert_eq!(Fidelity::default().score(&text, &text), (1.0, vec![]));
            let more = format!("{text}, zxq");
            let (kept, _) = Fidelity::default().score(&text, &more);
            prop_assert!(text.ends_with('\\') || kept == 1.0, "{}", more);
        }

        #[test]
        fn no_text_is_too_odd(input in any::<String>(), output in hostile()) {
            let (kept, missing) = Fidelity::default().score(&input, &output);
            prop_assert!((0.0..=1.0).contains(&kept) && (kept == 1.0) == missing.is_empty());
            prop_assert_eq!(Fidelity::default().score(&input, &input).0, 1.0);
            Fidelity::default().added(&input, &output);
        }

        /// Content words that all differ: without any one of them less is kept.
        #[test]
        fn every_content_word_counts(
            words in prop::collection::hash_set("[bdfgk][aou][xzv][a-z]{0,3}", 2..9),
            i in any::<prop::sample::Index>(),
        ) {
            let fidelity = Fidelity::default();
            let stems: HashSet<String> = words.iter().map(|w| fidelity.content.stem(w)).collect();
            let counts = |w: &String| !fidelity.content.is_stop_word(w);
            prop_assume!(stems.len() == words.len() && words.iter().all(counts));
            let words: Vec<String> = words.into_iter().collect();
            let mut fewer = words.clone();
            let gone = fewer.remove(i.index(fewer.len()));
            let (part, missing) = fidelity.score(&words.join(" "), &fewer.join(" "));
            prop_assert!(part < 1.0);
            prop_assert_eq!(missing, [gone]);
        }
    }
}
