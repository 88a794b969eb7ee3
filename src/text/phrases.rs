//! Phrases that a text must not hold: found by their words, whatever stands between those, in any
//! case.
//!
//! Phrases are kept in a tree of words, so that a search costs one look-up for each word that a
//! phrase could go on with, however many phrases there are.

use super::content_words::{word_spans, words};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// A list of phrases, each one or more words; cheap to clone and to join.
#[derive(Clone, Debug, Default)]
pub struct Phrases {
    /// None of them empty.
    lists: Vec<Listed>,
}

/// A list, however many share it, and which of its phrases do not count.
#[derive(Clone, Debug)]
struct Listed {
    list: Arc<List>,
    spared: Arc<HashSet<usize>>,
}

/// Phrases by words from the first on, and from the last back.
#[derive(Debug, Default)]
struct List {
    forward: WordTree,
    backward: WordTree,
    count: usize,
}

/// What a search of a growing text came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Bytes of the first phrase.
    pub found: Option<Range<usize>>,
    /// Where a phrase may begin that later text completes; the text's length if nowhere. No phrase
    /// begins before it and after the place where the search began, now or later, as long as the
    /// text up to `settled` stays.
    pub undecided: usize,
}

impl Phrases {
    /// Maximum words of a phrase that somebody hands in: what a search costs for each token grows
    /// with their square.
    pub const MAX_WORDS: usize = 32;

    /// Phrases that somebody hands in; says what is wrong if one has too many words.
    pub fn checked<S: AsRef<str>>(list: impl IntoIterator<Item = S>) -> Result<Phrases, String> {
        let short = |phrase: S| match words(phrase.as_ref()) {
            words if words.len() <= Self::MAX_WORDS => Ok(words),
            words => {
                Err(format!("has a phrase of {} words; {} at most", words.len(), Self::MAX_WORDS))
            }
        };
        Ok(Self::of(list.into_iter().map(short).collect::<Result<Vec<_>, _>>()?))
    }

    /// Phrases that hold no word are left out, and so are repetitions.
    pub fn new<S: AsRef<str>>(list: impl IntoIterator<Item = S>) -> Phrases {
        Self::of(list.into_iter().map(|phrase| words(phrase.as_ref())))
    }

    /// Phrases by their words.
    fn of(list: impl IntoIterator<Item = Vec<String>>) -> Phrases {
        let mut p = List::default();
        for phrase in list {
            if !phrase.is_empty() && p.forward.insert(phrase.iter(), p.count) {
                p.backward.insert(phrase.iter().rev(), p.count);
                p.count += 1;
            }
        }
        let lists = if p.count == 0 {
            vec![]
        } else {
            vec![Listed { list: Arc::new(p), spared: Arc::default() }]
        };
        Phrases { lists }
    }

    /// The same phrases but for those that `text` holds, at the cost of one pass over it.
    pub fn but_those_in(&self, text: &str) -> Phrases {
        let words = words(text);
        self.sparing(|list| {
            let begins = (0..words.len()).map(|i| words[i..].iter().map(String::as_str));
            begins.flat_map(|rest| list.forward.walk(rest).filter_map(|node| node.phrase)).collect()
        })
    }

    /// The same phrases but for those that `spare` tells to leave out; it is asked once for each.
    pub fn but_those(&self, mut spare: impl FnMut() -> bool) -> Phrases {
        self.sparing(|list| (0..list.count).filter(|_| spare()).collect())
    }

    fn sparing(&self, mut which: impl FnMut(&List) -> Vec<usize>) -> Phrases {
        let lists = self.lists.iter().map(|l| {
            let more = which(&l.list);
            let spared = match more.iter().all(|p| l.spared.contains(p)) {
                true => l.spared.clone(),
                false => Arc::new(l.spared.iter().copied().chain(more).collect()),
            };
            Listed { list: l.list.clone(), spared }
        });
        Phrases { lists: lists.filter(|l| l.spared.len() < l.list.count).collect() }
    }

    /// The phrases of all of these.
    pub fn joined<'p>(all: impl IntoIterator<Item = &'p Phrases>) -> Phrases {
        Phrases { lists: all.into_iter().flat_map(|p| p.lists.iter().cloned()).collect() }
    }

    /// Whether there are no phrases.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Bytes of the first phrase in a text that is whole.
    pub fn find(&self, text: &str) -> Option<Range<usize>> {
        self.scan(text, 0, text.len(), true).found
    }

    /// Bytes of all phrases in a text that is whole, in order: the first, the first behind it, and
    /// so on.
    pub fn find_all(&self, text: &str) -> Vec<Range<usize>> {
        let words: Vec<(Range<usize>, String)> = word_spans(text).collect();
        let mut found = Vec::new();
        let mut at = 0;
        while at < words.len() {
            match self.shortest(&words[at..]) {
                Some(n) => {
                    found.push(words[at].0.start..words[at + n - 1].0.end);
                    at += n;
                }
                None => at += 1,
            }
        }
        found
    }

    /// Words of the shortest phrase that these begin with.
    fn shortest(&self, words: &[(Range<usize>, String)]) -> Option<usize> {
        let shortest = |l: &Listed| {
            let mut nodes = l.list.forward.walk(words.iter().map(|w| w.1.as_str()));
            nodes.position(|node| l.counts(node)).map(|n| n + 1)
        };
        self.lists.iter().filter_map(shortest).min()
    }

    /// Searches `text` from byte `from` on, where no word is cut in two. Text from byte `settled`
    /// on may still change, and unless the text has `ended` its last word may grow.
    pub fn scan(&self, text: &str, from: usize, settled: usize, ended: bool) -> Scan {
        let words: Vec<(Range<usize>, String)> =
            word_spans(&text[from..]).map(|(s, w)| (s.start + from..s.end + from, w)).collect();
        // a word is certain once something else follows it
        let certain = words.iter().take_while(|w| w.0.end < settled).count();
        let searched = if ended {
            words.len()
        } else {
            words.iter().take_while(|w| w.0.end < text.len()).count()
        };
        let found = (0..searched).find_map(|i| {
            let n = self.shortest(&words[i..searched])?;
            Some(words[i].0.start..words[i + n - 1].0.end)
        });
        let goes_on = |i: &usize| {
            self.lists
                .iter()
                .any(|l| l.list.forward.goes_on(words[*i..certain].iter().map(|w| w.1.as_str())))
        };
        let open = (0..certain).find(goes_on);
        let begun = words.get(certain).map_or(text.len(), |w| w.0.start).min(settled.max(from));
        // an apostrophe may be the beginning of a word
        let begun = text[..begun].trim_end_matches(['\'', '’']).len();
        let undecided = match open {
            _ if self.is_empty() => text.len(),
            Some(i) => words[i].0.start,
            None => begun.max(from),
        };
        Scan { found, undecided }
    }

    /// Bytes of all words of the phrases, those that only form as others go included, in order.
    pub fn spans(&self, text: &str) -> Vec<Range<usize>> {
        let mut kept: Vec<(Range<usize>, String)> = Vec::new();
        let mut gone: Vec<Range<usize>> = Vec::new();
        for word in word_spans(text) {
            kept.push(word);
            let longest = |l: &Listed| {
                let back = l.list.backward.walk(kept.iter().rev().map(|w| w.1.as_str()));
                back.enumerate().filter(|(_, node)| l.counts(node)).last().map(|(n, _)| n + 1)
            };
            if let Some(n) = self.lists.iter().filter_map(longest).max() {
                gone.extend(kept.drain(kept.len() - n..).map(|w| w.0));
            }
        }
        gone.sort_by_key(|g| g.start);
        gone
    }

    /// Without the phrases, and with its surroundings tidied.
    pub fn strip(&self, text: &str) -> String {
        let gone = self.spans(text);
        let mut rest = String::with_capacity(text.len());
        let mut at = 0;
        for g in gone {
            rest.push_str(&text[at..g.start]);
            at = g.end;
        }
        rest.push_str(&text[at..]);
        let kept: Vec<&str> = rest.split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
        kept.join(", ").split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Listed {
    /// Whether a phrase that counts ends at this node.
    fn counts(&self, node: &Node) -> bool {
        node.phrase.is_some_and(|p| !self.spared.contains(&p))
    }
}

/// Phrases by their words: each node holds what may follow.
#[derive(Clone, Debug, Default)]
struct WordTree {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    next: HashMap<String, usize>,
    /// The phrase that ends here.
    phrase: Option<usize>,
}

impl WordTree {
    /// Adds a phrase; `false` if it is there already.
    fn insert<'w>(&mut self, words: impl Iterator<Item = &'w String>, phrase: usize) -> bool {
        if self.nodes.is_empty() {
            self.nodes.push(Node::default());
        }
        let mut at = 0;
        for word in words {
            at = match self.nodes[at].next.get(word) {
                Some(&next) => next,
                None => {
                    let new = self.nodes.len();
                    self.nodes[at].next.insert(word.clone(), new);
                    self.nodes.push(Node::default());
                    new
                }
            };
        }
        let is_new = self.nodes[at].phrase.is_none();
        self.nodes[at].phrase.get_or_insert(phrase);
        is_new
    }

    /// The nodes that these words lead through.
    fn walk<'t, 'w>(
        &'t self,
        words: impl Iterator<Item = &'w str> + 't,
    ) -> impl Iterator<Item = &'t Node> {
        let mut at = self.nodes.first();
        words.map_while(move |word| {
            at = at?.next.get(word).map(|&next| &self.nodes[next]);
            at
        })
    }

    /// Whether a phrase begins with all of these words and has more.
    fn goes_on<'w>(&self, words: impl ExactSizeIterator<Item = &'w str>) -> bool {
        let count = words.len();
        self.walk(words)
            .enumerate()
            .last()
            .is_some_and(|(n, node)| n + 1 == count && !node.next.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The phrase that a text without its last word, which may grow, begins first.
    fn grown(p: &Phrases, text: &str) -> Option<Range<usize>> {
        p.scan(text, 0, text.len(), false).found
    }

    #[test]
    fn joined_lists_find_what_each_finds() {
        let p = Phrases::joined([
            &Phrases::new(["red cat", "dog"]),
            &Phrases::default(),
            &Phrases::new(["red", "cat nap"]),
        ]);
        assert_eq!(p.find("a red cat nap"), Some(2..5), "the shortest first");
        assert_eq!(p.strip("a red cat and a dog, cat nap, x"), "a cat and a, x");
        assert_eq!(p.scan("a cat", 0, 5, false).undecided, 2);
        assert!(Phrases::joined([&Phrases::default()]).is_empty());
    }

    #[test]
    fn phrases_that_a_text_holds_are_spared_without_a_copy_of_the_list() {
        let all = Phrases::joined([
            &Phrases::new(["red cat", "red", "dog", "red cat nap"]),
            &Phrases::new(["dog"]),
        ]);
        let p = all.but_those_in("one RED cat");
        assert!(Arc::ptr_eq(&p.lists[0].list, &all.lists[0].list));
        assert_eq!(p.find("a red cat"), None);
        assert_eq!(p.find("a red cat nap"), Some(2..13));
        assert_eq!(p.strip("red cat, dog, 8k"), "red cat, 8k");
        let p = p.but_those_in("a dog");
        assert_eq!(
            (p.find("red, a dog"), p.find("red cat nap"), p.lists.len()),
            (None, Some(0..11), 1)
        );
        assert!(all.but_those(|| true).is_empty());
        assert!(
            Phrases::checked(["a ".repeat(32)]).is_ok()
                && Phrases::checked(["a ".repeat(33)]).is_err()
        );
    }

    #[test]
    fn phrases_are_found_by_their_words() {
        let p = Phrases::new(["Greg Rutkowski", "cat", "  ", "cat"]);
        assert_eq!(grown(&p, "by GREG  rutkowski, 8k"), Some(3..18));
        assert_eq!(grown(&p, "by greg-rutkowski"), None, "the word may go on");
        assert_eq!(p.find("by greg-rutkowski"), Some(3..17));
        assert_eq!(p.find("by greg-rutkowskis"), None);
        assert_eq!(grown(&p, "a cat's tail"), Some(2..7));
        assert_eq!(p.find("concatenate cats"), None);
        assert_eq!(p.strip("a cat, art by Greg Rutkowski, , 8k"), "a, art by, 8k");
        assert_eq!(
            p.strip("greg cat greg rutkowski rutkowski, 8k"),
            "8k",
            "one forms as another goes"
        );
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
            ("by greg s", 3),
            ("by greg s ", 10),
            ("by art, ", 8),
            ("a ca", 2),
            ("a dog", 2),
            ("a dog ", 6),
            ("a dog, '", 7),
        ] {
            assert_eq!(p.scan(text, 0, text.len(), false).undecided, from, "{text}");
        }
        // a stop text may yet cut the last letters off
        assert_eq!(p.scan("a cats, b", 0, 5, false), Scan { found: None, undecided: 2 });
        let long = "word ".repeat(100) + "ca";
        assert_eq!(p.scan(&long, 0, long.len(), false).undecided, 500);
        assert_eq!(Phrases::default().scan("a cat", 0, 5, false).undecided, 5);
    }

    /// Looking for none of 40,000 phrases that share their first word costs no more than for a few.
    #[test]
    fn phrases_that_begin_alike_are_one_look_up() {
        let many = Phrases::new((0..40_000).map(|i| format!("by artist{i}")));
        let text = "by art ".repeat(2_000);
        assert_eq!(many.find(&text), None);
        assert_eq!(many.find(&(text + "by artist39999")), Some(14_000..14_014));
        let one = Phrases::new(["a b"]);
        assert_eq!(one.strip(&("a ".repeat(20_000) + &"b ".repeat(20_000))), "", "in one pass");
    }

    proptest! {
        /// Whatever comes after, and wherever a stop text cuts: a phrase begins at the undecided
        /// place or behind it.
        #[test]
        fn later_text_cannot_complete_what_was_decided(
            list in proptest::collection::vec("[ab']{1,2}( [ab]{1,2}){0,2}", 1..4),
            text in "[ab',. ’]{0,14}", more in "[ab',. ’]{0,8}", cut in 0usize..5,
        ) {
            let p = Phrases::new(&list);
            let cut = text.char_indices().map(|c| c.0).rev().nth(cut).unwrap_or(text.len());
            let scan = p.scan(&text, 0, cut, false);
            let whole = format!("{text}{more}");
            let ends = whole.char_indices().map(|c| c.0).filter(|e| *e >= cut).chain([whole.len()]);
            for end in ends {
                let before = p.scan(&text, 0, text.len(), false).found.map(|f| f.start);
                if let Some(found) = p.find(&whole[..end]) {
                    let known = before.is_some_and(|b| b <= found.start);
                    prop_assert!(found.start >= scan.undecided || known, "{found:?} {scan:?}");
                }
            }
        }

        #[test]
        fn what_is_stripped_is_gone(
            list in proptest::collection::vec("[ab]{1,2}( [ab]{1,2}){0,2}", 1..4), text in "[ab \
                ,]{0,30}",
        ) {
            let p = Phrases::new(&list);
            prop_assert_eq!(p.find(&p.strip(&text)), None);
        }
    }
}
