//! What is added to a plain prompt: style phrases that fit its medium and each other, none of them
//! worn out.

use crate::random::PhiloxStream;
use crate::text::artists::{names_artist, names_in};
use crate::text::content_words::{ContentWords, words};
use crate::text::mediums::{MediumSet, Mediums};
use std::collections::HashMap;

/// Ways to name a medium: before the prompt, or as a phrase after it.
const NAMED: [(&str, u32, &[&str], &[&str]); 8] = [
    (
        "photo",
        34,
        &["a photo of", "photo of", "a photograph of"],
        &["photo", "photography", "35mm photograph"],
    ),
    (
        "painting",
        20,
        &["an oil painting of", "a watercolor painting of", "oil painting of"],
        &["oil painting", "watercolor"],
    ),
    (
        "digital",
        8,
        &["a digital painting of", "concept art of"],
        &["digital painting", "digital art", "concept art"],
    ),
    (
        "drawing",
        8,
        &["a pencil drawing of", "an ink drawing of"],
        &["pencil sketch", "charcoal drawing"],
    ),
    (
        "anime",
        10,
        &["anime illustration of", "an anime drawing of"],
        &["anime", "anime style", "manga"],
    ),
    ("render", 12, &["a 3d render of", "3d model of"], &["3d render", "octane render"]),
    ("vector", 4, &["a vector illustration of"], &["vector art", "flat design"]),
    ("comic", 4, &["comic book art of"], &["comic book style"]),
];

/// Shares of the pairs made so far that something may be in.
#[derive(Clone, Debug)]
pub struct TailLimits {
    /// One phrase.
    pub phrase: f32,
    /// Any artist.
    pub artists: f32,
    /// One artist.
    pub artist: f32,
}

/// Puts tails together, and counts what it has used.
pub struct Tails<'a> {
    limits: TailLimits,
    mediums: &'static Mediums,
    content: ContentWords,
    /// Phrases that speak of one medium alone.
    of_medium: HashMap<MediumSet, Vec<&'a str>>,
    pairs: usize,
    with_artists: usize,
    phrases: HashMap<String, usize>,
    artists: HashMap<String, usize>,
}

impl<'a> Tails<'a> {
    /// `phrases` are those that may be lent.
    pub fn new(limits: TailLimits, phrases: impl Iterator<Item = &'a str>) -> Tails<'a> {
        let mediums = Mediums::built_in();
        let mut of_medium: HashMap<MediumSet, Vec<&str>> = HashMap::new();
        for phrase in phrases {
            if let Some(media) = mediums.of(phrase).filter(|m| m.count_ones() == 1)
                && !names_artist(phrase)
            {
                of_medium.entry(media).or_default().push(phrase);
            }
        }
        let (phrases, artists) = Default::default();
        let content = ContentWords::default();
        Tails { limits, mediums, content, of_medium, pairs: 0, with_artists: 0, phrases, artists }
    }

    /// A plain prompt with a medium put before or after it, and that medium; `None` if it names one
    /// already.
    pub fn name_medium(&self, raw: &str, rng: &mut PhiloxStream) -> Option<(String, MediumSet)> {
        if self.mediums.of(raw).is_some() {
            return None;
        }
        let mut at = rng.below(NAMED.iter().map(|n| n.1 as usize).sum());
        let (name, _, before, after) = NAMED.iter().find(|n| {
            let here = at < n.1 as usize;
            at = at.saturating_sub(n.1 as usize);
            here
        })?;
        let list = if rng.below(2) == 0 { before } else { after };
        let phrase = list[rng.below(list.len())];
        let text = if std::ptr::eq(list, before) {
            format!("{phrase} {raw}")
        } else {
            format!("{raw}, {phrase}")
        };
        Some((text, self.mediums.named(name)?))
    }

    /// Of `own` phrases those that go with `head` and each other and are not worn out; then of
    /// `more` until `least` words are added. No phrase says only what others say, and none what two
    /// have said.
    pub fn compose<'p>(
        &self,
        head: &str,
        own: &[&'p str],
        more: &[&'p str],
        least: usize,
    ) -> Vec<&'p str> {
        let mut tail = Tail::new(self, head);
        for phrase in own {
            tail.offer(self, phrase);
        }
        for phrase in more {
            if tail.added >= least {
                break;
            }
            tail.offer(self, phrase);
        }
        tail.phrases
    }

    /// Phrases of one medium alone, a few of them.
    pub fn of_medium(
        &self,
        medium: MediumSet,
        count: usize,
        rng: &mut PhiloxStream,
    ) -> Vec<&'a str> {
        let Some(list) = self.of_medium.get(&medium).filter(|l| !l.is_empty()) else {
            return vec![];
        };
        (0..count).map(|_| list[rng.below(list.len())]).collect()
    }

    /// What a text says, each once: stems of its words, those that boast of the same thing as one.
    fn senses(&self, text: &str) -> Vec<String> {
        let mut senses: Vec<String> = Vec::new();
        for stem in self.content.stems(text) {
            let sense = SENSES.iter().find(|(_, parts)| parts.iter().any(|p| stem.contains(p)));
            let sense = match sense {
                Some(sense) => sense.0.to_owned(),
                None if is_movement(&stem) => MOVEMENT.to_owned(),
                None => stem,
            };
            if !senses.contains(&sense) {
                senses.push(sense);
            }
        }
        senses
    }

    /// Counts a pair that was made.
    pub fn count(&mut self, tail: &[&str]) {
        self.pairs += 1;
        self.with_artists += usize::from(tail.iter().any(|p| names_artist(p)));
        for phrase in tail {
            *self.phrases.entry(key(phrase)).or_default() += 1;
            for name in artists_of(phrase) {
                *self.artists.entry(name).or_default() += 1;
            }
        }
    }

    /// Whether one more pair with this phrase stays within the shares.
    pub fn has_room_for(&self, phrase: &str) -> bool {
        let within =
            |count: usize, share: f32| (count as f32) < share * (self.pairs + START) as f32;
        let said = key(phrase);
        // movements change a picture more than light and detail do
        let share = if is_movement(&said) { self.limits.phrase / 4.0 } else { self.limits.phrase };
        if !within(self.phrases.get(&said).copied().unwrap_or(0), share) {
            return false;
        }
        let names = artists_of(phrase);
        let room = |name: &String| {
            within(self.artists.get(name).copied().unwrap_or(0), self.limits.artist)
        };
        names.is_empty()
            || (within(self.with_artists, self.limits.artists) && names.iter().all(room))
    }
}

/// Parts of stems by which words count as saying the same.
const SENSES: [(&str, &[&str]); 4] = [
    ("detail", &["detail", "intric"]),
    ("real", &["realis", "realist", "photoreal", "lifelik"]),
    ("sharp", &["4k", "8k", "16k", "uhd", "hdr", "resolut", "definit", "qualiti", "hq"]),
    (
        "site",
        &[
            "trend",
            "artstat",
            "cgsocieti",
            "deviantart",
            "behanc",
            "pixiv",
            "featur",
            "pinterest",
            "flickr",
        ],
    ),
];

/// Movements and genres, of which a tail names one at most: beginnings of their words.
const MOVEMENT: &str = "movement";
const MOVEMENTS: [&str; 26] = [
    "baroqu",
    "rococo",
    "gothic",
    "nouveau",
    "deco",
    "renaiss",
    "surreal",
    "impression",
    "expression",
    "cubis",
    "roman",
    "steampunk",
    "cyberpunk",
    "solarpunk",
    "dieselpunk",
    "vaporwav",
    "synthwav",
    "dnd",
    "hearthston",
    "noir",
    "retro",
    "futurist",
    "scifi",
    "sci",
    "minimal",
    "mystic",
];

fn is_movement(text: &str) -> bool {
    text.split(' ').any(|w| MOVEMENTS.iter().any(|m| w.starts_with(m)))
}

/// Maximum phrases of a prompt that name artists.
const MAX_ARTISTS: usize = 2;

/// Pairs that the shares are counted over at the start.
const START: usize = 300;

fn key(phrase: &str) -> String {
    words(phrase).join(" ")
}

/// Artists that a phrase names; the phrase itself if it does not say who.
fn artists_of(phrase: &str) -> Vec<String> {
    match names_in(phrase) {
        names if names.is_empty() && names_artist(phrase) => vec![key(phrase)],
        names => names,
    }
}

/// A tail as it grows.
struct Tail<'p> {
    phrases: Vec<&'p str>,
    /// Words added.
    added: usize,
    /// Phrases that name an artist.
    artists: usize,
    /// Media left, if any is named.
    media: Option<MediumSet>,
    /// How often each sense was said.
    senses: HashMap<String, usize>,
}

impl<'p> Tail<'p> {
    fn new(tails: &Tails, head: &str) -> Self {
        let senses = tails.senses(head).into_iter().map(|s| (s, 1)).collect();
        Tail {
            phrases: vec![],
            added: 0,
            artists: usize::from(names_artist(head)),
            media: tails.mediums.of(head),
            senses,
        }
    }

    fn offer(&mut self, tails: &Tails, phrase: &'p str) {
        let media = match (self.media, tails.mediums.of(phrase)) {
            (Some(a), Some(b)) => Some(a & b),
            (a, b) => a.or(b),
        };
        let senses = tails.senses(phrase);
        let new = senses.iter().any(|s| !self.senses.contains_key(s));
        let most = |sense: &str| if sense == MOVEMENT { 1 } else { 2 };
        let worn = senses.iter().any(|s| self.senses.get(s).is_some_and(|n| *n >= most(s)));
        if media == Some(0) && self.media != Some(0) || !new || worn || !tails.has_room_for(phrase)
        {
            return;
        }
        // a text that contradicts itself from the start gets no further medium
        if self.media == Some(0) && tails.mediums.of(phrase).is_some() {
            return;
        }
        if names_artist(phrase) {
            // whom the list of media does not know is a painter, most likely
            let photo = self.media.is_some() && self.media == tails.mediums.named("photo");
            if self.artists >= MAX_ARTISTS || (photo && tails.mediums.of(phrase).is_none()) {
                return;
            }
            self.artists += 1;
        }
        self.media = media;
        self.added += words(phrase).len();
        senses.into_iter().for_each(|s| *self.senses.entry(s).or_default() += 1);
        self.phrases.push(phrase);
    }
}
