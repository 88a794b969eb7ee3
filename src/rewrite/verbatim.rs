//! What a prompt holds for the image program rather than for the reader: weights `(x:1.2)`, emphasis `(x)` and `[x]`, LoRA and
//! other tags `<lora:x:0.8>`, wildcards `__x__`, and BREAK. The model gets plain words; afterwards each comes back as it was.

use crate::text::content_words::word_spans;

/// A prompt cut at BREAK.
#[derive(Clone, Debug, PartialEq)]
pub struct Verbatim {
    pub chunks: Vec<Chunk>,
}

/// Plain words, and what was around and between them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    pub plain: String,
    /// Bracketed parts as `(words inside, as written)`.
    weighted: Vec<(String, String)>,
    /// Tags and wildcards.
    tags: Vec<String>,
}

impl Verbatim {
    pub fn parse(prompt: &str) -> Verbatim {
        let mut chunks = vec![];
        let mut rest = prompt;
        while let Some((before, after)) = split_at_break(rest) {
            chunks.push(Chunk::parse(before));
            rest = after;
        }
        chunks.push(Chunk::parse(rest));
        Verbatim { chunks }
    }

    /// Whether there is nothing special.
    pub fn is_plain(&self) -> bool {
        self.chunks.len() == 1 && self.chunks[0].weighted.is_empty() && self.chunks[0].tags.is_empty()
    }

    /// The words without anything special.
    pub fn plain(&self) -> String {
        let plain: Vec<&str> = self.chunks.iter().map(|c| c.plain.as_str()).filter(|p| !p.is_empty()).collect();
        plain.join(", ")
    }

    /// Special parts as they were written.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.chunks
            .iter()
            .flat_map(|c| c.weighted.iter().map(|w| w.1.as_str()).chain(c.tags.iter().map(String::as_str)))
    }

    /// Texts of the chunks with everything special back in its place.
    pub fn restore<S: AsRef<str>>(&self, texts: &[S]) -> String {
        let restored: Vec<String> = self.chunks.iter().zip(texts).map(|(c, t)| c.restore(t.as_ref())).collect();
        restored.join(" BREAK ")
    }
}

impl Chunk {
    fn parse(text: &str) -> Chunk {
        let mut chunk = Chunk::default();
        let mut plain = String::new();
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            let rest = &text[at..];
            if c == '\\' {
                // an escaped bracket is only a character
                plain.push_str(&rest[..rest.char_indices().nth(2).map_or(rest.len(), |i| i.0)]);
                at += rest.char_indices().nth(2).map_or(rest.len(), |i| i.0);
            } else if let Some(tag) = tag(rest) {
                chunk.tags.push(tag.to_owned());
                at += tag.len();
            } else if let Some(group) = group(rest) {
                let inner = inner_words(group);
                plain.push_str(&inner);
                if !inner.is_empty() {
                    chunk.weighted.push((inner, group.to_owned()));
                }
                at += group.len();
            } else {
                plain.push(c);
                at += c.len_utf8();
            }
        }
        chunk.plain = tidy(&plain);
        chunk
    }

    fn restore(&self, text: &str) -> String {
        let mut text = text.trim().to_owned();
        // from where on a part may be put back, so that none lands within another
        let mut done: Vec<std::ops::Range<usize>> = vec![];
        for (inner, written) in &self.weighted {
            match find_words(&text, inner, &done) {
                Some(found) => {
                    let grown = written.len() as isize - found.len() as isize;
                    let shift = |n: usize| if n >= found.end { (n as isize + grown) as usize } else { n };
                    done.iter_mut().for_each(|d| *d = shift(d.start)..shift(d.end));
                    done.push(found.start..found.start + written.len());
                    text.replace_range(found, written);
                }
                None => {
                    let comma = if text.is_empty() { "" } else { ", " };
                    let start = text.len() + comma.len();
                    text = format!("{text}{comma}{written}");
                    done.push(start..text.len());
                }
            }
        }
        for tag in &self.tags {
            text = if text.is_empty() { tag.clone() } else { format!("{text} {tag}") };
        }
        text
    }
}

/// Splits at the first BREAK that stands alone.
fn split_at_break(text: &str) -> Option<(&str, &str)> {
    text.match_indices("BREAK").find_map(|(at, word)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        let alone = !before.ends_with(char::is_alphanumeric) && !after.starts_with(char::is_alphanumeric);
        alone.then_some((before, after))
    })
}

/// The tag or wildcard that `text` begins with.
fn tag(text: &str) -> Option<&str> {
    if let Some(inside) = text.strip_prefix('<') {
        let end = inside.find('>')?;
        let known = ["lora:", "lyco:", "hypernet:", "embedding:"].iter().any(|k| inside.to_lowercase().starts_with(k));
        return known.then(|| &text[..end + 2]);
    }
    let inside = text.strip_prefix("__")?;
    let end = inside.find("__")?;
    let name = |c: char| c.is_alphanumeric() || "-_/*".contains(c);
    (end > 0 && inside[..end].chars().all(name)).then(|| &text[..end + 4])
}

/// The bracketed part that `text` begins with, its brackets balanced.
fn group(text: &str) -> Option<&str> {
    if !text.starts_with(['(', '[']) {
        return None;
    }
    let mut open = Vec::new();
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '(' | '[' => open.push(c),
            ')' | ']' => {
                let fits = open.pop() == Some(if c == ')' { '(' } else { '[' });
                if !fits {
                    return None;
                }
                if open.is_empty() {
                    return Some(&text[..i + 1]);
                }
            }
            _ => {}
        }
    }
    None
}

/// The words of a bracketed part, without brackets, weights and the numbers of `[a:b:0.5]`.
fn inner_words(group: &str) -> String {
    let inside: String = group.chars().map(|c| if "()[]|".contains(c) { ' ' } else { c }).collect();
    let parts = inside.split(':').map(str::trim);
    tidy(&parts.filter(|p| !p.is_empty() && p.parse::<f32>().is_err()).collect::<Vec<_>>().join(" "))
}

/// One space at a time, none before a comma, no empty parts.
fn tidy(text: &str) -> String {
    let parts = text.split(',').map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    parts.filter(|p| !p.is_empty()).collect::<Vec<_>>().join(", ")
}

/// Where the words of `inner` stand in `text`, one after the other, outside of `taken`.
fn find_words(text: &str, inner: &str, taken: &[std::ops::Range<usize>]) -> Option<std::ops::Range<usize>> {
    let wanted: Vec<String> = word_spans(inner).map(|w| w.1).collect();
    let words: Vec<_> = word_spans(text).collect();
    let found = words.windows(wanted.len().max(1)).find(|w| {
        let free = taken.iter().all(|t| w[w.len() - 1].0.end <= t.start || w[0].0.start >= t.end);
        free && w.iter().map(|w| &w.1).eq(&wanted)
    })?;
    Some(found[0].0.start..found[found.len() - 1].0.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_gets_plain_words() {
        let v = Verbatim::parse("a (red cat:1.2), [rain], ((mood)) <lora:film grain:0.8> __season__ street");
        assert_eq!(v.plain(), "a red cat, rain, mood street");
        let parts: Vec<&str> = v.parts().collect();
        assert_eq!(parts, ["(red cat:1.2)", "[rain]", "((mood))", "<lora:film grain:0.8>", "__season__"]);
        assert!(Verbatim::parse("a cat, 3 < 4 and breakfast").is_plain());
        assert!(Verbatim::parse(r"smile \(anime\), a (b").is_plain(), "escaped or unbalanced");
        assert_eq!(Verbatim::parse("[a:b:0.5] (x:y)").plain(), "a b x y");
    }

    #[test]
    fn everything_special_comes_back_as_it_was() {
        let v = Verbatim::parse("a (red cat:1.2) in ((rain)) BREAK (moon:0.7), night <lora:x:1>");
        assert_eq!(v.chunks.iter().map(|c| c.plain.as_str()).collect::<Vec<_>>(), ["a red cat in rain", "moon, night"]);
        let text = v.restore(&["a Red cat in the rain, 8k", "night sky"]);
        assert_eq!(text, "a (red cat:1.2) in the ((rain)), 8k BREAK night sky, (moon:0.7) <lora:x:1>");
        let twice = Verbatim::parse("(cat:1.1) and (cat:1.3)");
        assert_eq!(twice.restore(&["cat and cat, art"]), "(cat:1.1) and (cat:1.3), art");
        assert_eq!(Verbatim::parse("<lora:x:1>").restore(&[""]), "<lora:x:1>");
    }
}
