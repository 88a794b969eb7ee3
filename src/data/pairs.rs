//! (plain, rich) pairs from a list of prompts.
//!
//! A rich prompt gives its own plain side: its subject without style, artist, medium and quality.
//! A plain prompt can borrow the style phrases of the most similar rich one. Either way the rich side holds
//! every word of the plain side, which is what a rewriter should learn.

use super::near_duplicates::{Groups, similar_pairs};
use super::phrases::StylePhrases;
use super::records::Pair;
use crate::random::Words;
use crate::text::Tokenizer;
use crate::text::content_words::{ContentWords, words};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};

#[derive(Clone, Debug)]
pub struct PairOptions {
    /// Most plain sides of one rich prompt.
    pub variants: usize,
    /// Lets plain prompts borrow style phrases.
    pub borrow: bool,
    /// Fewest style phrases of a rich prompt.
    pub min_style: usize,
    /// Targets shorter than this many tokens are dropped, and `drop_share` of those below `short_tokens`.
    pub min_tokens: usize,
    pub short_tokens: usize,
    pub drop_share: f32,
    /// Fewest words that a target must have beyond its plain side.
    pub min_added: usize,
    /// Most words of a rich prompt.
    pub max_words: usize,
    /// Part of the groups of similar prompts that is held out.
    pub validation: f32,
    pub seed: u64,
}

impl Default for PairOptions {
    fn default() -> Self {
        PairOptions {
            variants: 3,
            borrow: true,
            min_style: 2,
            min_tokens: 25,
            short_tokens: 35,
            drop_share: 0.3,
            min_added: 10,
            max_words: 80,
            validation: 0.02,
            seed: 42,
        }
    }
}

/// The pairs, and what became of the prompts: reason and count, in the order of the steps.
pub struct MadePairs {
    pub train: Vec<Pair>,
    pub validation: Vec<Pair>,
    pub counts: Vec<(&'static str, usize)>,
}

/// A prompt taken apart at its commas.
struct Parsed {
    text: String,
    subject: String,
    details: Vec<String>,
    style: Vec<String>,
}

/// Makes pairs of `prompts`; the same input gives the same output.
pub fn make_pairs(prompts: &[String], styles: &StylePhrases, tokenizer: &Tokenizer, options: &PairOptions) -> MadePairs {
    let mut counts = Counts::default();
    counts.add("prompts read", prompts.len());
    let mut seen = HashSet::new();
    let mut parsed = Vec::new();
    for prompt in prompts {
        let text = clean(prompt);
        let reason = if text.is_empty() {
            Some("dropped: empty")
        } else if text.contains("http") || text.contains("--") || text.contains('<') {
            Some("dropped: links or flags inside")
        } else if words(&text).len() > options.max_words {
            Some("dropped: too long")
        } else if !seen.insert(words(&text)) {
            Some("dropped: exact duplicate")
        } else {
            None
        };
        match reason {
            Some(reason) => counts.add(reason, 1),
            None => parsed.push(parse(text, styles)),
        }
    }

    // near duplicates: the first of a pair stays; looser similarity keeps splits apart
    let texts: Vec<&str> = parsed.iter().map(|p| p.text.as_str()).collect();
    let mut groups = Groups::new(parsed.len());
    let mut duplicate = vec![false; parsed.len()];
    for (i, j, similarity) in similar_pairs(&texts, 0.5) {
        if similarity >= 0.8 && !duplicate[i] {
            duplicate[j] = true;
        }
        groups.join(i, j);
    }
    let mut by_subject: HashMap<Vec<String>, usize> = HashMap::new();
    for (i, p) in parsed.iter().enumerate() {
        let first = *by_subject.entry(words(&p.subject)).or_insert(i);
        groups.join(first, i);
    }
    counts.add("dropped: near duplicate", duplicate.iter().filter(|d| **d).count());

    let is_rich = |p: &Parsed| p.style.len() >= options.min_style;
    let held_out = |groups: &mut Groups, i: usize| {
        let group = groups.find(i) as u64;
        Words::new(options.seed, group).uniform() < options.validation
    };
    // a plain prompt may only borrow from the training side, or validation would leak into it
    let lenders: Vec<usize> =
        (0..parsed.len()).filter(|&i| !duplicate[i] && is_rich(&parsed[i]) && !held_out(&mut groups, i)).collect();
    let borrowing = options.borrow.then(|| Lenders::new(&parsed, &lenders));

    let mut made = MadePairs { train: vec![], validation: vec![], counts: vec![] };
    for i in (0..parsed.len()).filter(|&i| !duplicate[i]) {
        let p = &parsed[i];
        let mut rng = Words::new(options.seed ^ 0x5061_6972, i as u64);
        let (kind, target, raws) = if is_rich(p) {
            ("derived", p.text.clone(), plain_sides(p, options.variants, &mut rng))
        } else if let Some(lenders) = &borrowing {
            let Some(style) = lenders.style_for(p, styles, options.min_added, &mut rng) else {
                counts.add("dropped: plain, and nothing similar to borrow from", 1);
                continue;
            };
            let own = p.text.trim_end_matches(['.', ',', ' ']);
            ("borrowed", format!("{own}, {}", style.join(", ")), vec![own.to_owned()])
        } else {
            counts.add("dropped: plain", 1);
            continue;
        };
        if raws.is_empty() {
            counts.add("dropped: no subject left", 1);
            continue;
        }
        let most = words(&target).len().saturating_sub(options.min_added);
        let raws: Vec<String> = raws.into_iter().filter(|r| words(r).len() <= most).collect();
        if raws.is_empty() {
            counts.add("dropped: target adds too few words", 1);
            continue;
        }
        let tokens = tokenizer.encode_literal(&target).map_or(0, |ids| ids.len());
        if tokens < options.min_tokens {
            counts.add("dropped: target below the least tokens", 1);
            continue;
        }
        if tokens < options.short_tokens && rng.uniform() < options.drop_share {
            counts.add("dropped: short target, by chance", 1);
            continue;
        }
        let validation = held_out(&mut groups, i);
        let list = if validation { &mut made.validation } else { &mut made.train };
        for raw in raws {
            let name = match (validation, kind) {
                (true, _) => "validation pairs",
                (_, "derived") => "training pairs, derived",
                _ => "training pairs, borrowed",
            };
            counts.add(name, 1);
            let other = Map::from_iter([("kind".to_owned(), Value::from(kind))]);
            list.push(Pair { raw_prompt: raw, prompt: target.clone(), other });
        }
    }
    made.counts = counts.0;
    made
}

#[derive(Default)]
struct Counts(Vec<(&'static str, usize)>);

impl Counts {
    fn add(&mut self, name: &'static str, n: usize) {
        match self.0.iter_mut().find(|c| c.0 == name) {
            Some(c) => c.1 += n,
            None => self.0.push((name, n)),
        }
    }
}

/// One line with single spaces, without runs of punctuation and repeated parts.
fn clean(prompt: &str) -> String {
    let mut text = String::with_capacity(prompt.len());
    for c in prompt.trim().chars() {
        let c = match c {
            '’' => '\'',
            '“' | '”' => '"',
            '\u{a0}' | '\n' | '\t' => ' ',
            c => c,
        };
        let last = text.chars().last();
        let repeated = last == Some(c) && !c.is_alphanumeric() && c != '(' && c != ')' && c != '-';
        if repeated || (matches!(c, ',' | '.') && last == Some(',')) {
            continue;
        }
        if matches!(c, ',' | '.' | '!' | '?' | ';') && last == Some(' ') {
            text.pop();
        }
        text.push(c);
    }
    let mut seen = HashSet::new();
    let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty() && seen.insert(words(p)));
    parts.collect::<Vec<_>>().join(", ").trim_end_matches(['.', ',', ' ', ';']).to_owned()
}

fn parse(text: String, styles: &StylePhrases) -> Parsed {
    let mut parts = text.split([',', ';', '|']).flat_map(|p| p.split(". ")).map(str::trim).filter(|p| !p.is_empty());
    let head = parts.next().unwrap_or_default();
    let subject = styles.subject(head);
    // what the head itself says of style counts as one phrase
    let mut style = Vec::new();
    if words(&subject).len() < words(head).len() {
        style.push(head.to_owned());
    }
    let (mut style_parts, mut details) = (Vec::new(), Vec::new());
    for part in parts {
        if styles.is_style(part) { style_parts.push(part.to_owned()) } else { details.push(part.to_owned()) }
    }
    let count = style_parts.len();
    style.extend(style_parts);
    if count == 0 {
        style.clear();
    }
    Parsed { subject, details, style, text }
}

/// Up to `most` different plain sides: the bare subject, with its details, reworded, shortened.
fn plain_sides(p: &Parsed, most: usize, rng: &mut Words) -> Vec<String> {
    if words(&p.subject).is_empty() {
        return vec![];
    }
    let mut sides = vec![p.subject.clone()];
    let details: Vec<&str> = p.details.iter().map(String::as_str).filter(|d| words(d).len() <= 8).collect();
    if !details.is_empty() {
        let count = details.len().min(4);
        sides.push(format!("{}, {}", p.subject, details[..count].join(", ")));
        let one = details[rng.below(details.len())];
        sides.push(match rng.below(3) {
            0 => format!("{one}, {}", p.subject),
            1 => format!("{} {one}", p.subject),
            _ => format!("{}, {one}", p.subject),
        });
    }
    let lower = p.subject.to_lowercase();
    let bare = ["a ", "an ", "the "].iter().find_map(|a| lower.strip_prefix(a)).unwrap_or(&lower);
    sides.push(bare.to_owned());
    let mut seen = HashSet::new();
    sides.retain(|s| (1..=40).contains(&words(s).len()) && seen.insert(s.clone()));
    sides.truncate(most);
    sides
}

/// Rich prompts by the content words of their subjects.
struct Lenders<'a> {
    parsed: &'a [Parsed],
    lenders: &'a [usize],
    content: ContentWords,
    index: BTreeMap<String, Vec<usize>>,
}

impl<'a> Lenders<'a> {
    fn new(parsed: &'a [Parsed], lenders: &'a [usize]) -> Self {
        let content = ContentWords::default();
        let mut index: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for &i in lenders.iter().filter(|&&i| parsed[i].style.len() >= 4) {
            for stem in content.stems(&parsed[i].text) {
                index.entry(stem).or_default().push(i);
            }
        }
        Lenders { parsed, lenders, content, index }
    }

    /// Style phrases of the prompt that shares the most telling words with `p`: at least `least` words, at most 12 phrases.
    fn style_for(&self, p: &Parsed, styles: &StylePhrases, least: usize, rng: &mut Words) -> Option<Vec<String>> {
        let mut scores: BTreeMap<usize, f32> = BTreeMap::new();
        for stem in self.content.stems(&p.text) {
            if let Some(list) = self.index.get(&stem) {
                let weight = (self.lenders.len() as f32 / list.len() as f32).ln();
                list.iter().for_each(|&i| *scores.entry(i).or_default() += weight);
            }
        }
        let mut ranked: Vec<(usize, f32)> = scores.into_iter().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        // one of the closest few, so that a popular neighbour does not lend to everybody
        ranked.truncate(4);
        let own: HashSet<Vec<String>> = p.text.split(',').map(words).collect();
        let mut order: Vec<usize> = ranked.iter().map(|r| r.0).collect();
        rng.shuffle(&mut order);
        order.into_iter().find_map(|i| {
            let lender = &self.parsed[i];
            let phrases = lender.style.iter().filter(|s| {
                // the head phrase speaks of the lender's own subject, a listed phrase may too
                !s.contains(lender.subject.as_str()) && styles.is_plain_style(s) && !own.contains(&words(s))
            });
            let phrases: Vec<String> = phrases.take(12).cloned().collect();
            let count: usize = phrases.iter().map(|s| words(s).len()).sum();
            (count >= least).then_some(phrases)
        })
    }
}
