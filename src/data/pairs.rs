//! (plain, rich) pairs from a list of prompts.
//!
//! A rich prompt gives its own plain side: its subject without style, artist, medium and quality. A
//! plain prompt can borrow the style phrases of the most similar rich one. Either way the rich side
//! holds every word of the plain side, which is what a rewriter should learn.

use super::near_duplicates::{SimilarGroups, similar_pairs};
use super::phrases::StylePhrases;
use super::records::Pair;
use super::tails::{TailLimits, Tails};
use crate::random::PhiloxStream;
use crate::text::Tokenizer;
use crate::text::artists::{names_artist, names_in};
use crate::text::content_words::{ContentWords, most_repeated, words};
use crate::text::mediums::Mediums;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};

/// How pairs are made, and how many.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// Maximum plain sides of one rich prompt.
    pub variants: usize,
    /// How many rich sides a prompt gets with style phrases of others: a plain prompt all of them,
    /// a rich one those beyond the first beside its own.
    pub borrow: usize,
    /// Leaves details out of a target that its plain side does not name: small models cannot invent
    /// sensible ones.
    pub style_only: bool,
    /// Fewest style phrases of a rich prompt.
    pub min_style: usize,
    /// Targets with fewer tokens than this are dropped.
    pub min_tokens: usize,
    /// Targets with fewer tokens than this are short, and dropped by chance.
    pub short_tokens: usize,
    /// Probability with which a short target is dropped.
    pub drop_share: f32,
    /// Fewest words that a target must have beyond its plain side.
    pub min_added: usize,
    /// Maximum words of a rich prompt.
    pub max_words: usize,
    /// Shares of the pairs that one phrase, any artist and one artist may be in.
    pub limits: TailLimits,
    /// Part of the borrowed pairs whose prompt is given a medium, if it names none.
    pub name_medium: f32,
    /// Part of the groups of similar prompts that is held out.
    pub validation: f32,
    /// Seed of all random choices.
    pub seed: u64,
}

impl Default for PairOptions {
    fn default() -> Self {
        PairOptions {
            variants: 3,
            borrow: 1,
            style_only: false,
            min_style: 2,
            min_tokens: 25,
            short_tokens: 35,
            drop_share: 0.3,
            min_added: 10,
            max_words: 80,
            limits: TailLimits { phrase: 0.02, artists: 0.15, artist: 0.004 },
            name_medium: 0.25,
            validation: 0.02,
            seed: 42,
        }
    }
}

/// The pairs, and what became of the prompts: reason and count, in the order of the steps.
pub struct MadePairs {
    /// Pairs to train on.
    pub train: Vec<Pair>,
    /// Pairs held out for validation.
    pub validation: Vec<Pair>,
    /// How many prompts or pairs each step read, dropped or made, by its name.
    pub counts: Vec<(&'static str, usize)>,
}

/// A prompt taken apart at its commas.
struct Parsed {
    text: String,
    head: String,
    subject: String,
    /// What follows the head, and whether it speaks of style.
    parts: Vec<(String, bool)>,
    /// Style phrases; a medium or an artist in the head counts as one.
    style_count: usize,
}

/// Takes the prompts apart that pairs can be made of.
fn read(
    prompts: &[String],
    styles: &StylePhrases,
    options: &PairOptions,
    counts: &mut Counts,
) -> Vec<Parsed> {
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
    parsed
}

/// Makes pairs of `prompts`; the same input gives the same output.
pub fn make_pairs(
    prompts: &[String],
    styles: &StylePhrases,
    tokenizer: &Tokenizer,
    options: &PairOptions,
) -> MadePairs {
    let mut counts = Counts::default();
    let parsed = read(prompts, styles, options, &mut counts);

    // near duplicates: the first of a pair stays; looser similarity keeps splits apart
    let texts: Vec<&str> = parsed.iter().map(|p| p.text.as_str()).collect();
    let mut groups = SimilarGroups::new(parsed.len());
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

    let is_rich = |p: &Parsed| p.style_count >= options.min_style;
    let held_out = |groups: &mut SimilarGroups, i: usize| {
        let group = groups.find(i) as u64;
        PhiloxStream::new(options.seed, group).uniform() < options.validation
    };
    // a plain prompt may only borrow from the training side, or validation would leak into it
    let lenders: Vec<usize> = (0..parsed.len())
        .filter(|&i| !duplicate[i] && is_rich(&parsed[i]) && !held_out(&mut groups, i))
        .collect();
    let grouped: Vec<(usize, usize)> = lenders.into_iter().map(|i| (i, groups.find(i))).collect();
    let lenders = Lenders::new(&parsed, &grouped, styles, options.min_added);
    let tails =
        Tails::new(options.limits.clone(), lenders.phrases.values().flatten().map(String::as_str));

    let mut maker = Maker { options, lenders: &lenders, tails, counts };
    let mut made = MadePairs { train: vec![], validation: vec![], counts: vec![] };
    for i in (0..parsed.len()).filter(|&i| !duplicate[i]) {
        let mut rng = PhiloxStream::new(options.seed ^ 0x5061_6972, i as u64);
        let sides = maker.sides(&parsed[i], i, is_rich(&parsed[i]), &mut rng);
        let validation = held_out(&mut groups, i);
        for side in sides {
            if let Some(reason) = refuse(&side.raw, &side.target, tokenizer, options, &mut rng) {
                maker.counts.add(reason, 1);
                continue;
            }
            let name = match (validation, side.kind) {
                (true, _) => "validation pairs",
                (_, "derived") => "training pairs, derived",
                _ => "training pairs, borrowed",
            };
            maker.counts.add(name, 1);
            let other = Map::from_iter([("kind".to_owned(), Value::from(side.kind))]);
            let list = if validation { &mut made.validation } else { &mut made.train };
            list.push(Pair { raw_prompt: side.raw, prompt: side.target, other });
        }
    }
    made.counts = maker.counts.0;
    made
}

/// A pair in the making.
struct Side {
    kind: &'static str,
    raw: String,
    target: String,
}

struct Maker<'a> {
    options: &'a PairOptions,
    lenders: &'a Lenders,
    tails: Tails<'a>,
    counts: Counts,
}

/// Phrases of the prompt's own medium that a named medium may bring along.
const OF_MEDIUM: usize = 3;

impl Maker<'_> {
    /// What a prompt gives: pairs of its own style phrases, and pairs with those of others.
    fn sides(&mut self, p: &Parsed, i: usize, rich: bool, rng: &mut PhiloxStream) -> Vec<Side> {
        let mut sides = Vec::new();
        if rich {
            let derived = derived_sides(p, self.options, rng);
            if derived.is_empty() {
                self.counts.add("dropped: no subject left", 1);
            }
            for (raw, used) in derived {
                match self.derived(p, i, &raw, &used, rng) {
                    Some(target) => sides.push(Side { kind: "derived", raw, target }),
                    None => self.counts.add("dropped: head contradicts itself", 1),
                }
            }
        }
        let borrowed =
            if rich { self.options.borrow.saturating_sub(1) } else { self.options.borrow };
        let own = if rich { p.subject.as_str() } else { p.text.trim_end_matches(['.', ',', ' ']) };
        if borrowed == 0 || own.is_empty() {
            if !rich {
                self.counts.add("dropped: plain", 1);
            }
            return sides;
        }
        let mut any = false;
        for _ in 0..borrowed {
            if let Some(side) = self.borrowed(own, i, rng) {
                any = true;
                sides.push(side);
            }
        }
        if !any && !rich {
            self.counts.add("dropped: plain, and nothing similar to borrow from", 1);
        }
        sides
    }

    /// The words that a tail should add.
    fn length(&self, rng: &mut PhiloxStream) -> usize {
        self.options.min_added + rng.below(self.options.min_added + 4)
    }

    /// The target of a rich prompt's own style phrases and `used` details; `None` if its head
    /// contradicts itself.
    fn derived(
        &mut self,
        p: &Parsed,
        i: usize,
        raw: &str,
        used: &[usize],
        rng: &mut PhiloxStream,
    ) -> Option<String> {
        let worn = names_artist(&p.head) && !self.tails.has_room_for(&p.head);
        let head = if worn { &p.subject } else { &p.head };
        let fixed = |k: usize| {
            if p.parts[k].1 { false } else { !self.options.style_only || used.contains(&k) }
        };
        let fixed: Vec<usize> = (0..p.parts.len()).filter(|&k| fixed(k)).collect();
        let text = |k: usize| p.parts[k].0.as_str();
        let context = std::iter::once(head.as_str())
            .chain(fixed.iter().map(|&k| text(k)))
            .collect::<Vec<_>>()
            .join(", ");
        if Mediums::built_in().contradicts(&context) {
            return None;
        }
        let own: Vec<&str> =
            p.parts.iter().filter(|part| part.1).map(|part| part.0.as_str()).collect();
        let lenders = self.lenders.similar(raw, i, rng);
        let more: Vec<&str> = self.lenders.lent(&lenders).collect();
        let least = self.length(rng);
        let tail = self.tails.compose(&context, &own, &more, least);
        let in_order =
            (0..p.parts.len()).filter(|k| fixed.contains(k) || tail.contains(&text(*k))).map(text);
        let lent = tail.iter().copied().filter(|t| !own.contains(t));
        let target = std::iter::once(head.as_str())
            .chain(in_order)
            .chain(lent)
            .collect::<Vec<_>>()
            .join(", ");
        let counted: Vec<&str> =
            tail.iter().copied().chain(names_artist(head).then_some(head.as_str())).collect();
        self.tails.count(&counted);
        Some(target)
    }

    /// A plain prompt with style phrases of similar ones.
    fn borrowed(&mut self, own: &str, i: usize, rng: &mut PhiloxStream) -> Option<Side> {
        let lenders = self.lenders.similar(own, i, rng);
        if lenders.is_empty() {
            return None;
        }
        let named = match rng.uniform() < self.options.name_medium {
            true => self.tails.name_medium(own, rng),
            false => None,
        };
        let mut first: Vec<&str> = match named {
            Some((_, medium)) => self.tails.of_medium(medium, OF_MEDIUM, rng),
            None => vec![],
        };
        first.extend(self.lenders.lent(&lenders[..1]));
        let raw = named.map_or_else(|| own.to_owned(), |n| n.0);
        let more: Vec<&str> = self.lenders.lent(&lenders[1..]).collect();
        let least = self.length(rng);
        let tail = self.tails.compose(&raw, &first, &more, least);
        let target = std::iter::once(raw.as_str())
            .chain(tail.iter().copied())
            .collect::<Vec<_>>()
            .join(", ");
        self.tails.count(&tail);
        Some(Side { kind: "borrowed", raw, target })
    }
}

/// Why a pair is no good, if it is not.
fn refuse(
    raw: &str,
    target: &str,
    tokenizer: &Tokenizer,
    options: &PairOptions,
    rng: &mut PhiloxStream,
) -> Option<&'static str> {
    if words(target).len() < words(raw).len() + options.min_added {
        return Some("dropped: target adds too few words");
    }
    if most_repeated(target, 2) > 2 {
        return Some("dropped: target repeats itself");
    }
    let tokens = tokenizer.encode_literal(target).map_or(0, |ids| ids.len());
    if tokens < options.min_tokens {
        return Some("dropped: target below the least tokens");
    }
    let unlucky = tokens < options.short_tokens && rng.uniform() < options.drop_share;
    unlucky.then_some("dropped: short target, by chance")
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
    let mut parts = text
        .split([',', ';', '|'])
        .flat_map(|p| p.split(". "))
        .map(str::trim)
        .filter(|p| !p.is_empty());
    let head = parts.next().unwrap_or_default().to_owned();
    let parts: Vec<(String, bool)> = parts.map(|p| (p.to_owned(), styles.is_style(p))).collect();
    let subject = styles.subject(&head);
    let own = parts.iter().filter(|p| p.1).count();
    let in_head = usize::from(own > 0 && words(&subject).len() < words(&head).len());
    Parsed { subject, head, parts, style_count: own + in_head, text }
}

/// Up to `options.variants` plain sides of a rich prompt, each with the details that it names: the
/// bare subject, with its details, reworded, shortened.
fn derived_sides(
    p: &Parsed,
    options: &PairOptions,
    rng: &mut PhiloxStream,
) -> Vec<(String, Vec<usize>)> {
    if words(&p.subject).is_empty() {
        return vec![];
    }
    let short = |&i: &usize| !p.parts[i].1 && words(&p.parts[i].0).len() <= 8;
    let details: Vec<usize> = (0..p.parts.len()).filter(short).collect();
    let text = |i: usize| p.parts[i].0.as_str();
    let mut sides = vec![(p.subject.clone(), vec![])];
    if !details.is_empty() {
        let first = &details[..details.len().min(4)];
        let listed: Vec<&str> = first.iter().map(|&i| text(i)).collect();
        sides.push((format!("{}, {}", p.subject, listed.join(", ")), first.to_vec()));
        let one = details[rng.below(details.len())];
        let reworded = match rng.below(3) {
            0 => format!("{}, {}", text(one), p.subject),
            1 => format!("{} {}", p.subject, text(one)),
            _ => format!("{}, {}", p.subject, text(one)),
        };
        sides.push((reworded, vec![one]));
    }
    let lower = p.subject.to_lowercase();
    let bare = ["a ", "an ", "the "].iter().find_map(|a| lower.strip_prefix(a)).unwrap_or(&lower);
    sides.push((bare.to_owned(), vec![]));
    let mut seen = HashSet::new();
    sides.retain(|s| (1..=40).contains(&words(&s.0).len()) && seen.insert(s.0.clone()));
    sides.truncate(options.variants);
    sides
}

/// Rich prompts by their content words, with the style phrases they can lend.
struct Lenders {
    content: ContentWords,
    /// Phrases that fit any subject, of every prompt that has enough of them.
    phrases: BTreeMap<usize, Vec<String>>,
    index: BTreeMap<String, Vec<usize>>,
}

/// Maximum phrases of one lender, how many similar prompts are looked at, and how many of them
/// lend.
const LENT: usize = 12;
const CHOICE: usize = 40;
const LENDERS: usize = 16;

/// Maximum words of a phrase that is lent, and groups of similar prompts that it must be in: what
/// one author alone writes is often misspelt or about its subject.
const LENT_WORDS: usize = 6;
const LENT_GROUPS: usize = 3;

impl Lenders {
    /// `lenders` are indices into `parsed`, with their groups of similar prompts.
    fn new(
        parsed: &[Parsed],
        lenders: &[(usize, usize)],
        styles: &StylePhrases,
        least: usize,
    ) -> Self {
        let content = ContentWords::default();
        let (mut index, mut phrases): (BTreeMap<String, Vec<usize>>, BTreeMap<usize, Vec<String>>) =
            Default::default();
        let mut groups: HashMap<Vec<String>, HashSet<usize>> = HashMap::new();
        for &(i, group) in lenders {
            for (text, _) in &parsed[i].parts {
                groups.entry(words(text)).or_default().insert(group);
            }
        }
        for &(i, _) in lenders {
            let fits = |text: &str| {
                let words = words(text);
                let known = match names_artist(text) {
                    true => styles.is_plain_style(text) || !names_in(text).is_empty(),
                    false => groups[&words].len() >= LENT_GROUPS && styles.is_lendable(text),
                };
                let plain = text.starts_with(char::is_alphanumeric)
                    && !text.contains(['+', '(', '[', '"', '/']);
                known && plain && words.len() <= LENT_WORDS
            };
            let fit = parsed[i].parts.iter().filter(|(t, style)| *style && fits(t));
            let fit: Vec<String> = fit.map(|p| p.0.clone()).take(LENT).collect();
            if fit.iter().map(|t| words(t).len()).sum::<usize>() < least {
                continue;
            }
            phrases.insert(i, fit);
            for stem in content.stems(&parsed[i].text) {
                index.entry(stem).or_default().push(i);
            }
        }
        Lenders { content, phrases, index }
    }

    /// Prompts among those that share the most telling words with `text` (but not `but`), in random
    /// order.
    fn similar(&self, text: &str, but: usize, rng: &mut PhiloxStream) -> Vec<usize> {
        let mut scores: BTreeMap<usize, f32> = BTreeMap::new();
        for stem in self.content.stems(text) {
            if let Some(list) = self.index.get(&stem) {
                let weight = (self.phrases.len() as f32 / list.len() as f32).ln();
                list.iter().for_each(|&i| *scores.entry(i).or_default() += weight);
            }
        }
        scores.remove(&but);
        let mut ranked: Vec<(usize, f32)> = scores.into_iter().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        // a few of the closest, so that a popular neighbour does not lend to everybody
        ranked.truncate(CHOICE);
        let mut order: Vec<usize> = ranked.iter().map(|r| r.0).collect();
        rng.shuffle(&mut order);
        order.truncate(LENDERS);
        order
    }

    /// The style phrases of some of them.
    fn lent<'a>(&'a self, lenders: &[usize]) -> impl Iterator<Item = &'a str> {
        lenders.iter().flat_map(|i| &self.phrases[i]).map(String::as_str)
    }
}
