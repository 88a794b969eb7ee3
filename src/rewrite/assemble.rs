//! From the model's texts, one for each part between BREAKs, to a prompt with everything in its
//! place.

use super::fidelity::Known;
use super::markup::{Chunk, PartKind, Places, PromptMarkup, has_marks, phrase_spans};
use crate::text::clip::clip_tokens;
use crate::text::content_words::{is_combining, words};
use crate::text::literals::Literals;
use crate::text::{Tokenizer, straighten};
use serde::Serialize;
use std::collections::HashSet;

/// Characters that a reason names.
const NAMED: usize = 5;

/// Where a candidate's text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The model.
    Model,
    /// The input, with phrases that the model added.
    Phrases,
    /// The input alone.
    Input,
}

/// What the model can do for a part between BREAKs.
pub struct Plan {
    pub chunk: Chunk,
    /// What the model gets; nothing if there is nothing that it can read.
    pub reading: String,
    /// Why the part stays as it was written, whatever the model makes of it.
    pub stays: Option<String>,
}

impl Plan {
    pub fn new(chunk: Chunk, tokenizer: &Tokenizer) -> Plan {
        let straight = straighten(&chunk.reading);
        let split = tokenizer.split_characters(&straight);
        let choice = chunk.parts.iter().find(|p| p.kind == PartKind::Choice);
        let stays = match (split.is_empty(), choice) {
            (false, _) => {
                let seen = |c: &&char| !is_combining(**c);
                let named: Vec<String> =
                    split.iter().filter(seen).take(NAMED).map(|c| format!("\"{c}\"")).collect();
                let more = if split.len() > NAMED { ", …" } else { "" };
                Some(format!("the model's vocabulary lacks {}{more}", named.join(", ")))
            }
            (true, Some(choice)) => Some(format!("{} stays where it stands", choice.written)),
            (true, None) => None,
        };
        let reading = match split.is_empty() {
            true => straight.split_whitespace().collect::<Vec<_>>().join(" "),
            false => without(&straight, &split),
        };
        Plan { chunk, reading, stays }
    }
}

/// Words without those that hold such letters, and without other such characters; nothing if no
/// word is left.
fn without(text: &str, characters: &[char]) -> String {
    let (letters, signs): (Vec<char>, Vec<char>) =
        characters.iter().partition(|c| c.is_alphanumeric());
    let text: String = text.chars().map(|c| if signs.contains(&c) { ' ' } else { c }).collect();
    let left: Vec<&str> = text.split_whitespace().filter(|w| !w.contains(&letters[..])).collect();
    let left = left.join(" ");
    if words(&left).is_empty() { String::new() } else { left }
}

/// What the model made of a part.
pub struct Draft {
    pub text: String,
    /// Whether it ended in the middle.
    pub cut: bool,
}

impl Draft {
    /// A text without broken characters and without what would cut it in two.
    pub fn new(text: &str, cut: bool) -> Draft {
        let text = text.trim();
        let whole = |p: &&str| {
            !p.contains(char::REPLACEMENT_CHARACTER) && PromptMarkup::parse(p).chunks.len() == 1
        };
        let text = match text.contains(char::REPLACEMENT_CHARACTER)
            || PromptMarkup::parse(text).chunks.len() > 1
        {
            true => text.split(',').filter(whole).collect::<Vec<_>>().join(",").trim().to_owned(),
            false => text.to_owned(),
        };
        Draft { text, cut }
    }
}

/// What every prompt of a rewrite is made with.
pub struct Assembler<'a> {
    pub plans: &'a [Plan],
    pub known: Known<'a>,
    pub keep: &'a Literals,
    /// Maximum tokens of a part, as CLIP counts them.
    pub max_clip_tokens: Option<usize>,
}

/// A prompt made of parts.
pub struct Assembled {
    pub text: String,
    pub source: Source,
    /// Why a part is not the model's.
    pub reason: Option<String>,
}

/// A part's text: what stays, and phrases that may go for want of room.
struct Line {
    head: String,
    phrases: Vec<Phrase>,
    tags: String,
    woven: bool,
}

struct Phrase {
    /// With the white space before it.
    text: String,
    /// Whether it says nothing of the prompt.
    new: bool,
    stays: bool,
}

impl Assembler<'_> {
    /// The model's texts with everything special in its place; where that cannot be, and everywhere
    /// if `as_input`, the prompt as it was written with what the model added. Phrases to keep that
    /// are missing come last; phrases that there is no room for go.
    pub fn assemble(&self, drafts: &[Option<Draft>], as_input: bool) -> Assembled {
        let mut reason = None;
        let mut said = HashSet::new();
        let mut lines: Vec<Line> = vec![];
        for (plan, draft) in self.plans.iter().zip(drafts) {
            let woven = match (&plan.stays, draft) {
                _ if as_input => None,
                (None, Some(draft)) => match self.woven(&plan.chunk, draft) {
                    Ok(line) => Some(line),
                    Err(lost) => {
                        reason.get_or_insert(lost);
                        None
                    }
                },
                _ => None,
            };
            if let (None, Some(why)) = (&woven, &plan.stays) {
                reason.get_or_insert_with(|| why.clone());
            }
            lines.push(
                woven.unwrap_or_else(|| self.as_written(&plan.chunk, draft.as_ref(), &mut said)),
            );
        }
        let missing = self.keep.missing(&render(&lines));
        if let Some(last) = lines.last_mut() {
            for literal in missing {
                match last.head.is_empty() {
                    true => last.head = literal,
                    false => last.phrases.push(Phrase {
                        text: format!(" {literal}"),
                        new: false,
                        stays: true,
                    }),
                }
            }
        }
        if let Some(most) = self.max_clip_tokens {
            lines.iter_mut().for_each(|l| self.fit(l, most));
        }
        let source = if lines.iter().any(|l| l.woven) {
            Source::Model
        } else if lines.iter().any(|l| l.phrases.iter().any(|p| p.new)) {
            Source::Phrases
        } else {
            Source::Input
        };
        Assembled { text: render(&lines), source, reason }
    }

    /// The model's text, or which special part it has no place for.
    fn woven(&self, chunk: &Chunk, draft: &Draft) -> Result<Line, String> {
        let (text, tags) = (chunk.weave(&draft.text), chunk.tags());
        let whole = PromptMarkup::parse(&format!("{text}{tags}"));
        let mut places = Places::of(&whole);
        if let Some(lost) = chunk.parts.iter().find(|p| !places.take(p)) {
            return Err(format!("the model's text has no place for {}", lost.written));
        }
        let mut phrases = phrase_spans(&text).into_iter().map(|span| self.phrase(&text[span]));
        let head = phrases.next().map(|p| p.text).unwrap_or_default();
        Ok(Line { head, phrases: phrases.collect(), tags, woven: true })
    }

    fn phrase(&self, text: &str) -> Phrase {
        let parsed = PromptMarkup::parse(text);
        let held = self.keep.missing("").len() > self.keep.missing(text).len();
        let new = !self.known.knows_some(&parsed.plain());
        Phrase { text: text.to_owned(), new, stays: held || !parsed.is_plain() }
    }

    /// A part as it was written, with what the model added to it: phrases about other things, which
    /// contradict nothing.
    fn as_written(&self, chunk: &Chunk, draft: Option<&Draft>, said: &mut HashSet<String>) -> Line {
        let head = match chunk.written.trim_end_matches(',').trim_end() {
            "" => chunk.written.clone(),
            head => head.to_owned(),
        };
        let mut phrases = vec![];
        if let Some(draft) = draft {
            let mut spans = phrase_spans(&draft.text);
            if draft.cut {
                spans.pop();
            }
            for text in spans.into_iter().map(|span| draft.text[span].trim()) {
                if !has_marks(text)
                    && self.known.lacks_all(text)
                    && said.insert(text.to_lowercase())
                {
                    phrases.push(Phrase { text: format!(" {text}"), new: true, stays: false });
                }
            }
        }
        Line { head, phrases, tags: String::new(), woven: false }
    }

    /// Leaves out as few phrases as it takes: first those that are the model's alone, from the last
    /// on.
    fn fit(&self, line: &mut Line, most: usize) {
        let mut order: Vec<usize> =
            (0..line.phrases.len()).rev().filter(|&i| !line.phrases[i].stays).collect();
        order.sort_by_key(|&i| !line.phrases[i].new);
        let fits = |n: &usize| {
            let gone: HashSet<usize> = order[..*n].iter().copied().collect();
            longest_part(&line.render(|i| !gone.contains(&i))) <= most
        };
        // a count for each halving of what may go, not for each phrase
        let (mut enough, mut low) = (order.len(), 0);
        while low < enough {
            let middle = (low + enough) / 2;
            if fits(&middle) { enough = middle } else { low = middle + 1 }
        }
        let gone: HashSet<usize> = order[..enough].iter().copied().collect();
        let mut i = 0;
        line.phrases.retain(|_| {
            i += 1;
            !gone.contains(&(i - 1))
        });
    }
}

impl Line {
    fn render(&self, with: impl Fn(usize) -> bool) -> String {
        let mut text = self.head.clone();
        for (_, phrase) in self.phrases.iter().enumerate().filter(|(i, _)| with(*i)) {
            text.push_str(if text.is_empty() { "" } else { "," });
            text.push_str(&phrase.text);
        }
        text + &self.tags
    }
}

fn render(lines: &[Line]) -> String {
    let texts: Vec<String> = lines.iter().map(|l| l.render(|_| true).trim().to_owned()).collect();
    texts.join(" BREAK ").trim().to_owned()
}

/// CLIP tokens of the longest part between BREAKs, without what image programs take out.
pub fn longest_part(text: &str) -> usize {
    PromptMarkup::parse(text).chunks.iter().map(|c| clip_tokens(&c.counted())).max().unwrap_or(2)
}
