//! What a prompt holds for the image program rather than for the reader: weights `(x:1.2)`,
//! emphasis `(x)`, `[x]` and `{x}`, LoRA and other tags `<lora:x:0.8>`, wildcards `__x__`, choices
//! `{a|b}`, `[a|b]`, `[a:b:0.5]`, BREAK and AND. So are brackets that stand alone between commas
//! and enclose nothing: a model copies those that it has seen, and makes something up in place of
//! others.
//!
//! The model gets plain words. Emphasis comes back around its words wherever those stand in the
//! model's text; tags and lone brackets, which stand nowhere, come last. What a choice will say
//! nobody knows yet, so that a text with one stays as it was written. Every scan is linear in the
//! length of the prompt.

use crate::text::content_words::{is_combining, word_spans, words};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// A prompt cut at BREAK.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptMarkup {
    /// The text between the BREAKs, in order; one chunk if there is no BREAK.
    pub chunks: Vec<Chunk>,
}

/// What stands between two BREAKs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// The text itself, without the white space around it.
    pub written: String,
    /// Its words without anything special, and without those of choices.
    pub plain: String,
    /// Its words with a possible one for each choice: what a reader would read.
    pub reading: String,
    pub parts: Vec<Part>,
}

/// A special part.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub written: String,
    pub kind: PartKind,
    /// The words or parts beside it in the same phrase.
    pub before: Option<String>,
    pub after: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum PartKind {
    /// Emphasis or a weight on these words.
    Emphasis(String),
    Tag,
    /// A bracket or several, alone between commas and not closed.
    Bracket,
    /// A wildcard, a choice, or anything else whose words are not known.
    Choice,
}

impl PromptMarkup {
    /// Reads a prompt. AND is a special part, unless the prompt has no lower-case letters.
    pub fn parse(prompt: &str) -> PromptMarkup {
        PromptMarkup::read(prompt, !is_shout(prompt))
    }

    /// A text that answers `prompt`: AND is a word in both or in neither.
    pub fn parse_answer(prompt: &str, text: &str) -> PromptMarkup {
        PromptMarkup::read(text, !is_shout(prompt))
    }

    fn read(prompt: &str, and: bool) -> PromptMarkup {
        let mut chunks = vec![];
        let mut specials = vec![];
        let mut from = 0;
        for special in specials_where(prompt, and) {
            if special.kind == Special::Break {
                chunks.push(Chunk::new(prompt, from..special.span.start, &specials));
                specials.clear();
                from = special.span.end;
            } else {
                specials.push(special);
            }
        }
        chunks.push(Chunk::new(prompt, from..prompt.len(), &specials));
        PromptMarkup { chunks }
    }

    /// Whether there is nothing special.
    pub fn is_plain(&self) -> bool {
        self.chunks.len() == 1 && self.chunks[0].parts.is_empty()
    }

    /// The words without anything special.
    pub fn plain(&self) -> String {
        let plain: Vec<&str> =
            self.chunks.iter().map(|c| c.plain.as_str()).filter(|p| !p.is_empty()).collect();
        plain.join(", ")
    }

    /// Special parts in their order.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.chunks.iter().flat_map(|c| &c.parts)
    }
}

impl Chunk {
    fn new(text: &str, span: Range<usize>, specials: &[Found]) -> Chunk {
        let (mut plain, mut reading) = (String::new(), String::new());
        let mut parts: Vec<Part> = vec![];
        let mut at = span.start;
        let mut before = None;
        for special in specials {
            let gap = &text[at..special.span.start];
            let written = &text[special.span.clone()];
            at = special.span.end;
            plain.push_str(gap);
            reading.push_str(gap);
            let kind = special.part_kind(written);
            match &kind {
                Some(PartKind::Emphasis(inner)) => {
                    plain.push_str(inner);
                    reading.push_str(inner);
                }
                Some(PartKind::Choice) => {
                    plain.push(' ');
                    reading.push_str(&format!(" {} ", choice_words(written)));
                }
                // brackets around nothing
                Some(PartKind::Tag | PartKind::Bracket) | None => {
                    plain.push(' ');
                    reading.push(' ');
                }
            }
            let beside = Beside::of(gap);
            if let (Some(last), true) = (parts.last_mut(), beside.joins || beside.first.is_some()) {
                last.after = beside.first.or_else(|| Some(written.to_owned()));
            }
            before = if beside.joins { before } else { beside.last };
            if let Some(kind) = kind {
                parts.push(Part {
                    written: written.to_owned(),
                    kind,
                    before: before.take(),
                    after: None,
                });
                before = Some(written.to_owned());
            }
        }
        let gap = &text[at..span.end];
        plain.push_str(gap);
        reading.push_str(gap);
        if let Some(last) = parts.last_mut() {
            last.after = Beside::of(gap).first;
        }
        Chunk {
            written: text[span].trim().to_owned(),
            plain: tidy(&plain),
            reading: tidy(&reading),
            parts,
        }
    }

    /// Whether some of its words are not known.
    pub fn has_choices(&self) -> bool {
        self.parts.iter().any(|p| p.kind == PartKind::Choice)
    }

    /// What CLIP is given to read: the lone brackets too.
    pub fn counted(&self) -> String {
        let brackets = self.parts.iter().filter(|p| p.kind == PartKind::Bracket);
        brackets.fold(self.reading.clone(), |text, p| text + ", " + &p.written)
    }

    /// Tags, to be put after a text.
    pub fn tags(&self) -> String {
        let tags = self.parts.iter().filter(|p| p.kind == PartKind::Tag);
        tags.map(|p| format!(" {}", p.written)).collect()
    }

    /// Puts emphasis back around its words in a text of the model's. What stood alone between
    /// commas, and is not there, is added.
    pub fn weave(&self, text: &str) -> String {
        let text = text.trim();
        let words: Vec<(Range<usize>, String)> = word_spans(text).collect();
        let mut by_first: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, (_, word)) in words.iter().enumerate() {
            by_first.entry(word).or_default().push(i);
        }
        let mut taken = vec![false; words.len()];
        // where to go on looking for the same words again
        let mut next: HashMap<&str, usize> = HashMap::new();
        let mut placed: Vec<(Range<usize>, &str)> = vec![];
        let mut added = String::new();
        let mut add = |written: &str| {
            added.push_str(if text.is_empty() && added.is_empty() { "" } else { ", " });
            added.push_str(written);
        };
        for part in &self.parts {
            let inner = match &part.kind {
                PartKind::Emphasis(inner) => inner,
                PartKind::Bracket => {
                    add(&part.written);
                    continue;
                }
                PartKind::Tag | PartKind::Choice => continue,
            };
            let wanted: Vec<String> = word_spans(inner).map(|w| w.1).collect();
            let places = wanted
                .first()
                .and_then(|w| by_first.get(w.as_str()))
                .map_or(&[][..], Vec::as_slice);
            let from = next.entry(inner).or_default();
            let fits = |&i: &usize| {
                i + wanted.len() <= words.len()
                    && (0..wanted.len()).all(|k| !taken[i + k] && words[i + k].1 == wanted[k])
            };
            let found = places[*from..].iter().position(fits);
            *from = found.map_or(places.len(), |n| *from + n + 1);
            match found {
                Some(_) => {
                    let i = places[*from - 1];
                    let last = i + wanted.len() - 1;
                    taken[i..=last].fill(true);
                    placed.push((words[i].0.start..words[last].0.end, &part.written));
                }
                None => add(&part.written),
            }
        }
        placed.sort_by_key(|p| p.0.start);
        let mut woven = String::with_capacity(2 * text.len());
        let mut at = 0;
        for (span, written) in placed {
            woven.push_str(&text[at..span.start]);
            woven.push_str(written);
            at = span.end;
        }
        woven + &text[at..] + &added
    }
}

/// How often special parts stand where they are wanted.
pub struct Places<'a> {
    have: HashMap<Place<'a>, usize>,
    used: HashMap<Place<'a>, usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place<'a> {
    Anywhere(&'a str),
    /// In one phrase with something else.
    Joined(&'a str),
    /// Beside these words or parts.
    Between(&'a str, Option<&'a str>, Option<&'a str>),
}

impl<'a> Places<'a> {
    /// The parts of a text.
    pub fn of(text: &'a PromptMarkup) -> Places<'a> {
        let mut have = HashMap::new();
        for part in text.parts() {
            let (written, before, after) =
                (part.written.as_str(), part.before.as_deref(), part.after.as_deref());
            let mut places = HashSet::from([Place::Anywhere(written)]);
            if before.or(after).is_some() {
                places.insert(Place::Joined(written));
            }
            for (before, after) in [(before, after), (before, None), (None, after), (None, None)] {
                places.insert(Place::Between(written, before, after));
            }
            for place in places {
                *have.entry(place).or_default() += 1;
            }
        }
        Places { have, used: HashMap::new() }
    }

    /// Whether `part` stands in the text, once more than it was asked for before, where it stood: a
    /// choice beside the same words, emphasis in a phrase if it was in one.
    pub fn take(&mut self, part: &'a Part) -> bool {
        let written = part.written.as_str();
        let place = match &part.kind {
            PartKind::Tag | PartKind::Bracket => Place::Anywhere(written),
            PartKind::Emphasis(_) if part.before.is_none() && part.after.is_none() => {
                Place::Anywhere(written)
            }
            PartKind::Emphasis(_) => Place::Joined(written),
            PartKind::Choice => {
                Place::Between(written, part.before.as_deref(), part.after.as_deref())
            }
        };
        let anywhere = Place::Anywhere(written);
        let left = |p: &Place| {
            self.used.get(p).copied().unwrap_or(0) < self.have.get(p).copied().unwrap_or(0)
        };
        if !left(&place) || !left(&anywhere) {
            return false;
        }
        *self.used.entry(place).or_default() += 1;
        if place != anywhere {
            *self.used.entry(anywhere).or_default() += 1;
        }
        true
    }
}

/// What a text between two parts says beside them.
struct Beside {
    first: Option<String>,
    last: Option<String>,
    /// Nothing stands in it, not even the end of a phrase.
    joins: bool,
}

impl Beside {
    fn of(gap: &str) -> Beside {
        let ends = |c: char| matches!(c, ',' | ';' | '\n');
        let word = |(_, word): (Range<usize>, String)| word;
        let first = word_spans(gap.split(ends).next().unwrap_or_default()).next().map(word);
        let last = word_spans(gap.rsplit(ends).next().unwrap_or_default()).last().map(word);
        let joins = first.is_none() && !gap.contains(ends);
        Beside { first, last, joins }
    }
}

/// Spans of phrases: what stands between commas, those within special parts not counted.
pub fn phrase_spans(text: &str) -> Vec<Range<usize>> {
    let mut spans = vec![];
    let (mut start, mut at) = (0, 0);
    let mut split = |from: usize, to: usize, start: &mut usize| {
        for (comma, _) in text[from..to].match_indices(',') {
            if within_number(text, from + comma) {
                continue;
            }
            spans.push(*start..from + comma);
            *start = from + comma + 1;
        }
    };
    for special in specials_of(text) {
        split(at, special.span.start, &mut start);
        at = special.span.end;
    }
    split(at, text.len(), &mut start);
    spans.push(start..text.len());
    spans
}

/// A text without what stands at these bytes, in order, nor what they leave empty: tags and choices
/// go whole.
pub fn without(text: &str, gone: &[Range<usize>]) -> String {
    let mut left = String::with_capacity(text.len());
    let mut next = gone.iter().peekable();
    let mut push = |span: Range<usize>, into: &mut String| {
        let mut at = span.start;
        while let Some(gap) = next.next_if(|g| g.start < span.end) {
            into.push_str(&text[at.min(gap.start)..gap.start]);
            at = gap.end.min(span.end);
        }
        into.push_str(&text[at..span.end]);
    };
    let mut at = 0;
    for special in specials_of(text) {
        push(at..special.span.start, &mut left);
        let before = left.len();
        push(special.span.clone(), &mut left);
        let written = &text[special.span.clone()];
        let changed = left.len() - before < written.len();
        let stays = special.kind == Special::Group { choice: false }
            && !words(&inner_words(&left[before..])).is_empty();
        if changed && !stays {
            left.truncate(before);
        }
        at = special.span.end;
    }
    push(at..text.len(), &mut left);
    let phrases = phrase_spans(&left)
        .into_iter()
        .map(|span| left[span].split_whitespace().collect::<Vec<_>>().join(" "));
    phrases.filter(|p| says_something(p)).collect::<Vec<_>>().join(", ")
}

/// Whether a text has letters, digits or signs, and not just brackets and punctuation.
pub fn says_something(text: &str) -> bool {
    text.contains(|c: char| c.is_alphanumeric() || !c.is_ascii())
}

/// Whether a text holds anything that an image program reads, whole or in pieces.
pub fn has_marks(text: &str) -> bool {
    text.contains(['(', ')', '[', ']', '{', '}', '<', '>', '|', '\\'])
        || text.contains("__")
        || !specials_of(text).is_empty()
}

/// A special part's place in a text.
#[derive(Clone, Debug)]
struct Found {
    span: Range<usize>,
    kind: Special,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Special {
    Break,
    Tag,
    Wildcard,
    And,
    Bracket,
    /// A bracketed part, and whether it holds a choice.
    Group {
        choice: bool,
    },
}

impl Found {
    /// Nothing if there is nothing in it.
    fn part_kind(&self, written: &str) -> Option<PartKind> {
        match self.kind {
            Special::Tag => Some(PartKind::Tag),
            Special::Bracket => Some(PartKind::Bracket),
            Special::Group { choice: false } => {
                let inner = inner_words(written);
                let has_words = word_spans(&inner).next().is_some();
                match has_words {
                    true => Some(PartKind::Emphasis(inner)),
                    // a lone number, or signs
                    false => says_something(written).then_some(PartKind::Choice),
                }
            }
            _ => Some(PartKind::Choice),
        }
    }
}

/// A bracket that is not closed yet.
struct Open {
    bracket: u8,
    start: usize,
    choice: bool,
}

/// Whether a text is in capitals throughout: then AND is a word like any other.
fn is_shout(text: &str) -> bool {
    !text.contains(char::is_lowercase)
}

fn specials_of(text: &str) -> Vec<Found> {
    specials_where(text, !is_shout(text))
}

/// All special parts that are not within others, in order, in one pass; `and` says whether AND is
/// one.
fn specials_where(text: &str, and: bool) -> Vec<Found> {
    let bytes = text.as_bytes();
    let mut found: Vec<Found> = vec![];
    let mut open: Vec<Open> = vec![];
    let mut at = 0;
    while at < bytes.len() {
        let leaf = |end: usize, kind: Special| Some(Found { span: at..end, kind });
        let special = match bytes[at] {
            b'<' => tag_end(text, at).and_then(|end| leaf(end, Special::Tag)),
            b'_' => wildcard_end(text, at).and_then(|end| leaf(end, Special::Wildcard)),
            b'B' if is_alone(text, at, "BREAK") => leaf(at + 5, Special::Break),
            b'A' if and && is_alone(text, at, "AND") => leaf(at + 3, Special::And),
            _ => None,
        };
        if let Some(special) = special {
            at = special.span.end;
            found.push(special);
            continue;
        }
        match bytes[at] {
            // an escaped bracket is only a character
            b'\\' => at += text[at..].chars().nth(1).map_or(0, char::len_utf8),
            bracket @ (b'(' | b'[' | b'{') => {
                let variable = bracket == b'{' && at > 0 && bytes[at - 1] == b'$';
                open.push(Open { bracket, start: at - usize::from(variable), choice: variable });
            }
            b'|' => open.last_mut().into_iter().for_each(|o| o.choice = true),
            b':' => open.last_mut().into_iter().for_each(|o| o.choice |= o.bracket == b'['),
            b'$' if bytes.get(at + 1) == Some(&b'$') => {
                open.last_mut().into_iter().for_each(|o| o.choice = true)
            }
            close @ (b')' | b']' | b'}') => match open.pop().filter(|o| closes(o.bracket, close)) {
                Some(group) => {
                    let mut choice = group.choice;
                    while let Some(inner) = found.pop_if(|f| f.span.start >= group.start) {
                        choice |=
                            !matches!(inner.kind, Special::Tag | Special::Group { choice: false });
                    }
                    found
                        .push(Found { span: group.start..at + 1, kind: Special::Group { choice } });
                }
                // what does not fit ends all that is open
                None => open.clear(),
            },
            _ => {}
        }
        at += 1;
        while !text.is_char_boundary(at) {
            at += 1;
        }
    }
    let lone = lone_brackets(text, &found);
    if !lone.is_empty() {
        found.extend(lone);
        found.sort_by_key(|f| f.span.start);
    }
    found
}

/// What stands between commas, BREAKs and tags and is nothing but brackets, which are none of the
/// special parts that were `found`.
fn lone_brackets(text: &str, found: &[Found]) -> Vec<Found> {
    let mut lone = vec![];
    let mut end_phrase = |start: Option<usize>, end: usize| {
        let Some(start) = start else { return };
        let phrase = text[start..end].trim();
        if !phrase.is_empty() && phrase.bytes().all(|b| b"()[]{}<>".contains(&b)) {
            let at = end - text[start..end].trim_start().len();
            lone.push(Found { span: at..at + phrase.len(), kind: Special::Bracket });
        }
    };
    // where a phrase begins, unless something special stands in it
    let mut start = Some(0);
    let mut at = 0;
    for special in found.iter().map(Some).chain([None]) {
        let gap_end = special.map_or(text.len(), |s| s.span.start);
        for (comma, _) in text[at..gap_end].match_indices(',') {
            end_phrase(start, at + comma);
            start = Some(at + comma + 1);
        }
        match special {
            // a tag is taken out, wherever it stands
            Some(s) if matches!(s.kind, Special::Break | Special::Tag) => {
                end_phrase(start, gap_end);
                start = Some(s.span.end);
            }
            Some(_) => start = None,
            None => end_phrase(start, gap_end),
        }
        at = special.map_or(gap_end, |s| s.span.end);
    }
    lone
}

fn closes(open: u8, close: u8) -> bool {
    matches!((open, close), (b'(', b')') | (b'[', b']') | (b'{', b'}'))
}

/// Whether `word` stands at `at` and is no part of a longer one.
fn is_alone(text: &str, at: usize, word: &str) -> bool {
    let goes_on = |c: char| c.is_alphanumeric() || is_combining(c);
    text[at..]
        .strip_prefix(word)
        .is_some_and(|after| !text[..at].ends_with(goes_on) && !after.starts_with(goes_on))
}

/// The end of the tag that begins at `at`. No tag holds another.
fn tag_end(text: &str, at: usize) -> Option<usize> {
    let inside = &text.as_bytes()[at + 1..];
    let names = [&b"lora:"[..], b"lyco:", b"hypernet:", b"embedding:"];
    if !names.iter().any(|n| inside.len() > n.len() && inside[..n.len()].eq_ignore_ascii_case(n)) {
        return None;
    }
    let end = inside.iter().position(|b| matches!(b, b'<' | b'>'))?;
    (inside[end] == b'>').then_some(at + end + 2)
}

/// The end of the wildcard that begins at `at`. The search stops at the next two underscores, so
/// that none is passed twice.
fn wildcard_end(text: &str, at: usize) -> Option<usize> {
    let inside = text[at..].strip_prefix("__")?;
    let is_name = |c: char| c.is_alphanumeric() || "-_/*.$@~".contains(c);
    let end = inside.char_indices().find(|&(i, c)| !is_name(c) || inside[i..].starts_with("__"))?.0;
    (inside[..end].contains(|c: char| c.is_alphanumeric() || c == '*')
        && inside[end..].starts_with("__"))
    .then_some(at + end + 4)
}

/// The words of a bracketed part, without brackets and weights.
fn inner_words(group: &str) -> String {
    let mut words = String::with_capacity(group.len());
    let mut escaped = false;
    for c in group.chars() {
        match c {
            _ if escaped => {
                words.push(c);
                escaped = false;
                continue;
            }
            '\\' => {
                words.push(c);
                escaped = true;
            }
            ')' | ']' | '}' => {
                let weight =
                    words.trim_end_matches(|c: char| c.is_ascii_digit() || "+-.".contains(c));
                // without a number the spaces before are not looked at, which others may have been
                // already
                if weight.len() < words.len()
                    && let Some(name) = weight.trim_end().strip_suffix(':')
                {
                    words.truncate(name.len());
                }
                words.push(' ');
            }
            '(' | '[' | '{' => words.push(' '),
            c => words.push(c),
        }
    }
    tidy(&words)
}

/// What a choice may come to say: the first of its options, or a wildcard's name.
fn choice_words(written: &str) -> String {
    if written == "AND" {
        return ",".into();
    }
    let inside = written.trim_matches(|c| "_{}[]()$ ".contains(c));
    let first = inside.split('|').next().unwrap_or_default();
    let first = first.rsplit("$$").next().unwrap_or_default();
    let first = first.rsplit("::").next().unwrap_or_default();
    // [from:to:when] and {name:weight}
    let first = first.split(':').find(|p| p.contains(char::is_alphabetic)).unwrap_or_default();
    let first = if written.starts_with("__") {
        first.rsplit('/').next().unwrap_or_default()
    } else {
        first
    };
    let word = |c: char| if c.is_alphanumeric() || " '’,".contains(c) { c } else { ' ' };
    tidy(&first.chars().map(word).collect::<String>())
}

/// One space at a time, none before a comma, no empty parts.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    let mut start = 0;
    let commas = text.match_indices(',').map(|c| c.0).filter(|&at| !within_number(text, at));
    for end in commas.chain([text.len()]) {
        let words = text[start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        tidied.push_str(if tidied.is_empty() || words.is_empty() { "" } else { ", " });
        tidied.push_str(&words);
        start = end + 1;
    }
    tidied
}

/// Whether the comma at `at` is one of a number, as in 1,000.
fn within_number(text: &str, at: usize) -> bool {
    let digit = |c: char| c.is_ascii_digit();
    text[..at].ends_with(digit) && text[at + 1..].starts_with(digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Chunk {
        let mut chunks = PromptMarkup::parse(text).chunks;
        assert_eq!(chunks.len(), 1, "{text}");
        chunks.remove(0)
    }

    fn parts(text: &str) -> Vec<String> {
        PromptMarkup::parse(text).parts().map(|p| p.written.clone()).collect()
    }

    #[test]
    fn the_model_gets_plain_words() {
        let v = PromptMarkup::parse(
            "a (red cat:1.2), [rain], ((mood: 1.1)) <lora:film grain:0.8> __season__ street",
        );
        assert_eq!(v.plain(), "a red cat, rain, mood street");
        assert_eq!(v.chunks[0].reading, "a red cat, rain, mood season street");
        let all =
            ["(red cat:1.2)", "[rain]", "((mood: 1.1))", "<lora:film grain:0.8>", "__season__"];
        assert_eq!(v.parts().map(|p| p.written.as_str()).collect::<Vec<_>>(), all);
        assert!(PromptMarkup::parse("a cat, 3 < 4 and breakfast").is_plain());
        assert!(PromptMarkup::parse("CATS AND DOGS").is_plain(), "a shout");
        assert!(
            PromptMarkup::parse("a AND\u{fe0f} b BREAK\u{301} c").is_plain(),
            "an accent goes on with the word"
        );
        assert!(
            PromptMarkup::parse(r"smile \(anime\), a (b c __ d").is_plain(),
            "escaped or unbalanced"
        );
        assert_eq!(one("((16:9:1.2) view:1.1), (3)").plain, "16:9 view, 3");
    }

    #[test]
    fn choices_of_all_kinds() {
        for (text, reading) in [
            ("a {red|blue} hat", "a red hat"),
            ("a {2$$red|blue|green} hat", "a red hat"),
            ("a {1-2$$ and $$red|blue} hat", "a red hat"),
            ("a {0.5::red|0.5::blue} hat", "a red hat"),
            ("a {{red|pink} big|blue} hat", "a red hat"),
            ("a [red|blue] hat", "a red hat"),
            ("a [red:blue:0.5] hat", "a red hat"),
            ("a [red:0.5] hat", "a red hat"),
            ("a ({red|blue} hat:1.2)", "a red"),
            ("a ${colour=red} hat", "a colour red hat"),
            ("a __clothes/old-hat__", "a old hat"),
            ("a cat AND a dog :1.2", "a cat, a dog :1.2"),
            ("(a BREAK b:1.2)", "a BREAK b"),
        ] {
            let chunk = one(text);
            assert_eq!(chunk.reading, reading, "{text}");
            assert!(chunk.has_choices(), "{text}");
        }
        assert!(!one("{a cat}, ((b)), [c]").has_choices());
    }

    #[test]
    fn parts_know_what_stands_beside_them() {
        let v = PromptMarkup::parse("a photo of __x__ {a|b} in, __y__, (z:1) end BREAK __w__");
        let beside: Vec<_> = v.parts().map(|p| (p.before.as_deref(), p.after.as_deref())).collect();
        let expected = [
            (Some("of"), Some("{a|b}")),
            (Some("__x__"), Some("in")),
            (None, None),
            (None, Some("end")),
            (None, None),
        ];
        assert_eq!(beside, expected);
    }

    #[test]
    fn emphasis_comes_back_around_its_words() {
        let chunk = one("a (red cat:1.2) in ((rain)), (moon:0.7) <lora:x:1>");
        assert_eq!(
            chunk.weave("a Red cat in the rain, 8k"),
            "a (red cat:1.2) in the ((rain)), 8k, (moon:0.7)"
        );
        assert_eq!(chunk.tags(), " <lora:x:1>");
        assert_eq!(
            one("(cat:1.1) and (cat:1.3)").weave("cat and cat, art"),
            "(cat:1.1) and (cat:1.3), art"
        );
        assert_eq!(one("(red cat), (cat)").weave("cat, red cat"), "(cat), (red cat)");
        assert_eq!(one("(a)").weave(""), "(a)");
        assert_eq!(one("a cat, {").weave("a cat, 8k"), "a cat, 8k, {");
    }

    #[test]
    fn what_goes_leaves_nothing_empty() {
        let ban = crate::text::phrases::Phrases::new(["art", "red cat"]);
        let left = |text: &str| without(text, &ban.spans(text));
        assert_eq!(left("a dog, art, (art:1.2), night"), "a dog, night");
        assert_eq!(left("a (red cat hat:1.2) <lora:art:1> {art|oil} [art] x"), "a ( hat:1.2) x");
        assert_eq!(left("a red (cat) in 1,000 BREAK art BREAK z"), "a in 1,000 BREAK BREAK z");
    }

    #[test]
    fn brackets_tags_and_wildcards_in_any_order() {
        assert_eq!(parts("(a [b) c] (d)"), ["(d)"]);
        assert_eq!(parts("((a) (b)"), ["(a)", "(b)"]);
        assert_eq!(parts("(a <lora:b)c:1> d)"), ["(a <lora:b)c:1> d)"]);
        assert_eq!(parts("<lora:a <lora:b:1>"), ["<lora:b:1>"]);
        assert_eq!(parts("___a__ __b c__ ____ __d"), ["___a__"]);
        assert_eq!(phrase_spans("a, (b, c), d").len(), 3);
        assert_eq!(
            parts("[, a (cat, ), b BREAK > BREAK c, { <lora:x:1>, {d"),
            ["[", "(cat, )", ">", "{", "<lora:x:1>"]
        );
    }
}
