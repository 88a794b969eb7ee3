//! From tokens to text: incremental decoding, stop strings, and words that a candidate must or must
//! not hold.

use crate::engine::{Event, FinishReason, TopTokens, Verdict};
use crate::error::{Error, Result};
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use crate::text::{Decoder, Tokenizer};
use std::sync::Arc;

/// How often a candidate may run into a banned phrase; then it ends before it.
const REWINDS: usize = 256;
/// Maximum tokens that a candidate is told of, those taken back included, beyond four times what it
/// may have. It ends in any case: each token takes it further, but for so many rewinds.
const SPARE_PUSHES: usize = 4096;

/// What a candidate's text has to keep to.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The text ends before the first of these, or behind it if `include_stop` says so.
    pub stops: Vec<String>,
    /// Tokens that end the text; theirs is left out unless `include_stop` says otherwise.
    pub stop_token_ids: Vec<u32>,
    /// Whether the stop text or token that ends the text is part of it.
    pub include_stop: bool,
    /// Output tokens before which no stop string counts.
    pub min_new: usize,
    /// Phrases that the text must not hold.
    pub ban: Arc<Phrases>,
    /// Texts that it must hold.
    pub keep: Arc<Literals>,
}

impl Rules {
    /// Fails if what is to be kept holds what must not come.
    pub fn check(&self) -> Result<()> {
        for text in self.keep.iter() {
            if let Some(banned) = self.ban.find(text) {
                return Err(Error::invalid(format!(
                    "\"{}\" is both to be kept and banned",
                    &text[banned]
                )));
            }
            if let Some(stop) =
                self.stops.iter().find(|s| !s.is_empty() && text.contains(s.as_str()))
            {
                return Err(Error::invalid(format!(
                    "\"{text}\" is to be kept, but it holds the stop text \"{stop}\""
                )));
            }
        }
        Ok(())
    }
}

/// One output token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id in the vocabulary.
    pub id: u32,
    /// Its log-probability under the model, in nats.
    pub logprob: f32,
    /// The most likely tokens at its position, as many as were asked for.
    pub top: TopTokens,
    /// Bytes of the text up to its end; what it says may become certain only with a later one.
    pub end: usize,
}

/// One candidate as it grows.
///
/// A banned phrase takes back the tokens from its first one on. Text is given out up to where a
/// banned phrase may yet form, or a stop text, and tokens as far as their text is. Where others
/// were taken back since, a phrase may form with what was given out: then as many of its tokens go
/// as are left to go.
#[derive(Clone)]
pub struct Growing<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    rules: Arc<Rules>,
    eos: u32,
    max_new: usize,
    /// Maximum tokens that texts to keep can take.
    reserved: usize,
    /// The text so far.
    pub text: String,
    /// The tokens so far.
    pub tokens: Vec<Token>,
    /// Why the candidate ended, if it has.
    pub finish: Option<FinishReason>,
    /// What was given out: bytes and tokens.
    given: (usize, usize),
    /// Bytes before which no banned phrase begins, nor a stop text.
    searched: usize,
    stops_searched: usize,
    /// Bytes of the text before `min_new` tokens, in which no stop text counts.
    stops_from: usize,
    /// Tokens that are to be written at the end, and why it ends then.
    forced: Option<(usize, FinishReason)>,
    rewinds: usize,
    /// Tokens that it may still be told of.
    pushes: usize,
}

impl<'a> Growing<'a> {
    /// A candidate without tokens, which may get `max_new` of them.
    ///
    /// # Errors
    /// If the texts to keep take `max_new` tokens or more.
    pub fn new(
        tokenizer: &'a Tokenizer,
        rules: Arc<Rules>,
        eos: u32,
        max_new: usize,
    ) -> Result<Growing<'a>> {
        let mut reserved = 0;
        for text in rules.keep.iter() {
            let tokens = |comma: &str| tokenizer.encode_literal(&format!("{comma}{text}"));
            reserved += tokens(", ")?.len().max(tokens(" ")?.len()).max(tokens("")?.len());
        }
        // one token comes before it is looked at
        if reserved > 0 && reserved >= max_new {
            return Err(Error::invalid(format!(
                "the words to keep take {reserved} tokens, and there is room for {}; raise \
                --max-tokens",
                max_new - 1
            )));
        }
        Ok(Growing {
            tokenizer,
            decoder: Decoder::new(tokenizer),
            rules,
            eos,
            max_new,
            reserved,
            text: String::new(),
            tokens: Vec::new(),
            finish: None,
            given: (0, 0),
            searched: 0,
            stops_searched: 0,
            stops_from: 0,
            forced: None,
            rewinds: 0,
            pushes: 4 * max_new + SPARE_PUSHES,
        })
    }

    /// Takes what the engine tells about the candidate.
    pub fn take(&mut self, event: Event) -> Result<Verdict> {
        match event {
            Event::Token { logprob, .. } if logprob.is_nan() => Err(Error::Internal(
                "the model's output is not a number; its weights may be damaged".into(),
            )),
            Event::Token { token, logprob, top, finish, .. } => {
                self.push(token, logprob, top, finish)
            }
            Event::Ended { finish, .. } => {
                self.end(finish);
                Ok(Verdict::End)
            }
            Event::Started { .. } | Event::Prompt { .. } => Ok(Verdict::Go),
        }
    }

    /// Adds a token and says what is to become of the candidate. `finish` is why it ends with this
    /// token, if it does.
    pub fn push(
        &mut self,
        id: u32,
        logprob: f32,
        top: TopTokens,
        finish: Option<FinishReason>,
    ) -> Result<Verdict> {
        // the text of a token that ends the candidate is left out, as a stop text is
        let stops = finish == Some(FinishReason::Stop)
            && (id == self.eos || self.rules.stop_token_ids.contains(&id));
        if id != self.eos && (!stops || self.rules.include_stop) {
            let new = self.decoder.push(id)?;
            self.text.push_str(&new);
        }
        self.tokens.push(Token { id, logprob, top, end: self.text.len() });
        self.pushes = self.pushes.saturating_sub(1);
        if self.pushes == 0 {
            self.end(FinishReason::Length);
            return Ok(Verdict::End);
        }
        let finish = match &mut self.forced {
            Some((left, why)) => {
                *left = left.saturating_sub(1);
                if *left == 0 { Some(*why) } else { finish }
            }
            None => finish,
        };
        // what was asked for to the letter is not searched for stop texts
        let stop = if self.forced.is_none() { self.find_stop() } else { None };
        let cut = stop.map_or(
            self.text.len(),
            |(start, end)| if self.rules.include_stop { end } else { start },
        );
        let ended = stop.is_some() || finish.is_some();
        if let Some(verdict) = self.ban(cut, ended)? {
            return Ok(verdict);
        }
        if let Some(verdict) = self.force(cut, stop.is_some() || stops, finish)? {
            return Ok(verdict);
        }
        if ended {
            self.cut(cut);
            self.finish = if stop.is_some() { Some(FinishReason::Stop) } else { finish };
        }
        Ok(if self.finish.is_some() { Verdict::End } else { Verdict::Go })
    }

    /// Ends the candidate with what there is.
    pub fn end(&mut self, finish: FinishReason) {
        if let Some(found) = self.rules.ban.find(&self.text) {
            self.cut(found.start);
        }
        self.finish = Some(finish);
    }

    /// Text and tokens that are certain and were not given out before.
    pub fn fresh(&mut self) -> (&str, &[Token]) {
        let (bytes, before) = self.given;
        let (certain, tokens) = match self.finish {
            Some(_) => (self.text.len(), self.tokens.len()),
            None => self.certain(),
        };
        debug_assert!(self.finish.is_some() || self.text.is_char_boundary(certain));
        self.given = (certain.max(bytes), tokens.max(before));
        (
            self.text.get(bytes..self.given.0).unwrap_or_default(),
            self.tokens.get(before..self.given.1).unwrap_or_default(),
        )
    }

    /// Takes a banned phrase back, or ends the candidate before it.
    fn ban(&mut self, cut: usize, ended: bool) -> Result<Option<Verdict>> {
        if self.rules.ban.is_empty() {
            return Ok(None);
        }
        let settled = if ended { cut } else { self.before_stop() };
        let scan = self.rules.ban.scan(&self.text[..cut], self.searched, settled, ended);
        let Some(found) = scan.found else {
            self.searched = scan.undecided;
            return Ok(None);
        };
        self.rewinds += 1;
        if self.rewinds > REWINDS {
            self.cut(found.start);
            self.finish = Some(FinishReason::Stop);
            return Ok(Some(Verdict::End));
        }
        let keep = self.token_at(found.start).max(self.given.1).min(self.tokens.len() - 1);
        let ban = self.tokens[keep].id;
        self.rewind(keep, usize::MAX)?;
        Ok(Some(Verdict::Rewind { keep, ban }))
    }

    /// Has the texts to keep that are not there yet written at the end, if this is the end or there
    /// is only just room for them.
    fn force(
        &mut self,
        cut: usize,
        stopped: bool,
        finish: Option<FinishReason>,
    ) -> Result<Option<Verdict>> {
        let left = self.max_new.saturating_sub(self.tokens.len());
        let ends = stopped || finish.is_some();
        if self.rules.keep.is_empty() || self.forced.is_some() || !(ends || left <= self.reserved) {
            return Ok(None);
        }
        let before = &self.text[..self.text[..cut].trim_end().len().max(self.given.0)];
        let missing = self.rules.keep.missing(before);
        if missing.is_empty() {
            // what stands at the very end must not go on as another word, with no room to write it
            // again
            let grown =
                |more: &str| !self.rules.keep.missing(&format!("{}{more}", self.text)).is_empty();
            if !ends && (grown("a") || grown(".0")) {
                self.finish = Some(FinishReason::Length);
                return Ok(Some(Verdict::End));
            }
            return Ok(None);
        }
        let cut = before.len();
        let mut comma = match before.trim_end() {
            trimmed if !trimmed.is_empty() && !trimmed.ends_with(',') => ", ",
            trimmed if trimmed.len() < before.len() => "",
            _ => " ",
        };
        let mut tokens = Vec::new();
        for text in missing {
            tokens.extend(self.tokenizer.encode_literal(&format!("{comma}{text}"))?);
            comma = ", ";
        }
        // tokens without text are parts of a character that was not completed, or end the candidate
        let start = |i: usize| i.checked_sub(1).map_or(0, |before| self.tokens[before].end);
        let keep = (0..self.tokens.len())
            .rfind(|&i| start(i) < cut && self.tokens[i].end > start(i))
            .map_or(0, |i| i + 1);
        let keep = keep.max(self.given.1);
        if keep + tokens.len() > self.max_new {
            return Ok(None);
        }
        self.rewind(keep, cut)?;
        self.forced = Some((
            tokens.len(),
            if stopped { FinishReason::Stop } else { finish.unwrap_or(FinishReason::Length) },
        ));
        Ok(Some(Verdict::Force { keep, tokens }))
    }

    /// Goes back to the first `keep` tokens, and to no more than `most` bytes.
    fn rewind(&mut self, keep: usize, most: usize) -> Result<()> {
        self.tokens.truncate(keep);
        self.decoder = Decoder::new(self.tokenizer);
        for t in &self.tokens {
            self.decoder.push(t.id)?;
        }
        self.cut(self.tokens.last().map_or(0, |t| t.end).min(most));
        // the text may end within a word now
        self.searched = 0;
        self.forced = None;
        Ok(())
    }

    /// Leaves out the text from `end` on, but for what was given out.
    fn cut(&mut self, end: usize) {
        self.text.truncate(end.max(self.given.0));
        let end = self.text.len();
        self.tokens.iter_mut().rev().take_while(|t| t.end > end).for_each(|t| t.end = end);
        self.stops_from = self.stops_from.min(end);
        if end < self.stops_searched {
            self.stops_searched = self.stops_from;
        }
    }

    /// The token that wrote the byte at `at`.
    fn token_at(&self, at: usize) -> usize {
        self.tokens.partition_point(|t| t.end <= at).min(self.tokens.len() - 1)
    }

    fn stops(&self) -> impl Iterator<Item = &str> {
        self.rules.stops.iter().map(String::as_str).filter(|s| !s.is_empty())
    }

    /// Bytes of the first stop text.
    fn find_stop(&mut self) -> Option<(usize, usize)> {
        if self.tokens.len() <= self.rules.min_new {
            // a text that began before counts as little as one that is there already
            self.stops_from = self.text.len();
            self.stops_searched = self.stops_from;
            return None;
        }
        let from = self.stops_searched;
        let found = self.stops().filter_map(|s| Some((from + self.text[from..].find(s)?, s.len())));
        let found = found.min().map(|(at, len)| (at, at + len));
        if found.is_none() {
            self.stops_searched = self.before_stop();
        }
        found
    }

    /// Bytes of the text before what may become a stop text.
    fn before_stop(&self) -> usize {
        let text = &self.text[self.stops_searched..];
        let begun = |stop: &str| {
            (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]))
        };
        self.text.len() - self.stops().filter_map(begun).max().unwrap_or(0)
    }

    /// Bytes and tokens that nothing can take back.
    fn certain(&self) -> (usize, usize) {
        let mut certain = self.before_stop();
        if !self.rules.ban.is_empty() {
            certain = certain.min(self.searched);
        }
        let keeps = !self.rules.keep.is_empty();
        if keeps {
            // a comma may have to come right behind the last word
            certain = self.text[..certain].trim_end().len();
        }
        let tokens = self.tokens.partition_point(|t| t.end <= certain);
        if !self.rules.ban.is_empty() {
            // whole tokens are taken back
            certain = tokens.checked_sub(1).map_or(0, |last| self.tokens[last].end);
        }
        // tokens without text at the end are taken back where something has to be written
        let written = |i: usize| {
            self.tokens[i].end > i.checked_sub(1).map_or(0, |before| self.tokens[before].end)
        };
        let tokens =
            if keeps { (0..tokens).rfind(|&i| written(i)).map_or(0, |i| i + 1) } else { tokens };
        (certain, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::embedded;
    use crate::random::PhiloxStream;
    use proptest::prelude::*;
    use std::sync::OnceLock;

    const EOS: u32 = 2;

    fn tokenizer() -> &'static Tokenizer {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(embedded::tokenizer)
    }

    /// A few tokens, parts of characters among them.
    fn vocabulary() -> Vec<u32> {
        let words = [
            " art",
            " by",
            ",",
            " a",
            "s",
            " digital",
            " painting",
            "ist",
            " red",
            " umb",
            "rella",
            "'",
            " ",
            "-",
            "東🐱é",
        ];
        let ids = |w: &&str| tokenizer().encode_literal(w).expect("plain words");
        words.iter().flat_map(ids).chain([EOS]).collect()
    }

    /// A candidate whose tokens are chosen at random from a few, with the engine's part played:
    /// what was given out, and what it came to.
    fn grow(
        rules: Rules,
        max_new: usize,
        seed: u64,
        deadline: usize,
    ) -> (String, Vec<u32>, Growing<'static>) {
        let tokenizer = tokenizer();
        let vocabulary = vocabulary();
        let rules = Arc::new(rules);
        let mut c = Growing::new(tokenizer, rules.clone(), EOS, max_new)
            .expect("room for what is to be kept");
        let mut random = PhiloxStream::new(seed, 0);
        let (mut given, mut given_tokens) = (String::new(), vec![]);
        let mut banned: Vec<(usize, u32)> = vec![];
        let mut forced: Vec<u32> = vec![];
        for pushed in 0.. {
            if pushed == deadline {
                c.end(FinishReason::Deadline);
            }
            if c.finish.is_none() {
                let at = c.tokens.len();
                let id = match forced.is_empty() {
                    false => forced.remove(0),
                    true => loop {
                        let id = vocabulary[random.below(vocabulary.len())];
                        let early =
                            at < rules.min_new && (id == EOS || rules.stop_token_ids.contains(&id));
                        if !early && !banned.contains(&(at, id)) {
                            break id;
                        }
                    },
                };
                let stops = forced.is_empty() && (id == EOS || rules.stop_token_ids.contains(&id));
                let finish = if stops {
                    Some(FinishReason::Stop)
                } else {
                    (at + 1 >= max_new).then_some(FinishReason::Length)
                };
                match c.push(id, 0.0, vec![], finish).expect("tokens of the vocabulary") {
                    Verdict::Go => assert!(finish.is_none(), "ended and going on"),
                    Verdict::End => assert!(c.finish.is_some(), "without a reason"),
                    Verdict::Rewind { keep, ban } => {
                        banned.push((keep, ban));
                        forced.clear();
                    }
                    Verdict::Force { keep, tokens } => {
                        assert!(keep + tokens.len() <= max_new);
                        forced = tokens;
                    }
                }
            }
            let (text, tokens) = c.fresh();
            given.push_str(text);
            given_tokens.extend(tokens.iter().map(|t| t.id));
            if c.finish.is_some() {
                return (given, given_tokens, c);
            }
        }
        unreachable!("a candidate ends")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// What is given out is what there is in the end, nothing banned comes, what is kept is
        /// there, and each ends with a reason.
        #[test]
        fn nothing_given_out_is_taken_back(
            ban in proptest::collection::vec(proptest::sample::select(vec![
                "art", "by art", "digital painting", "a", "art's", "artists", "red a red", "umb",
            ]), 0..4),
            stops in proptest::collection::vec(proptest::sample::select(vec![
                ", by", ",", "is", "umbrella", "s a", " ", "東京", "t,",
            ]), 0..3),
            keep in proptest::collection::vec(proptest::sample::select(vec![
                "red umbrella", "f/1.8", "🐱", "100 mph",
            ]), 0..3),
            stop_comma: bool,
            include_stop: bool,
            min_new in 0usize..6,
            max_new in 40usize..60,
            seed: u64,
            deadline in proptest::option::of(0usize..40),
        ) {
            let comma = tokenizer().encode_literal(",").unwrap();
            let rules = Rules {
                stops: stops.iter().map(|s| s.to_string()).collect(),
                stop_token_ids: if stop_comma { comma } else { vec![] },
                include_stop,
                min_new,
                ban: Arc::new(Phrases::new(&ban)),
                keep: Arc::new(Literals::new(&keep)),
            };
            if rules.check().is_err() {
                return Ok(());
            }
            let end = deadline.unwrap_or(usize::MAX);
            let (given, given_tokens, c) = grow(rules.clone(), max_new, seed, end);
            prop_assert_eq!(&given, &c.text);
            prop_assert_eq!(given_tokens, c.tokens.iter().map(|t| t.id).collect::<Vec<_>>());
            prop_assert_eq!(rules.ban.find(&c.text), None, "{}", c.text);
            prop_assert!(c.tokens.len() <= max_new);
            prop_assert!(c.tokens.is_sorted_by_key(|t| t.end));
            prop_assert!(c.tokens.last().is_none_or(|t| t.end == c.text.len()));
            if deadline.is_none() && c.rewinds <= REWINDS {
                prop_assert!(rules.keep.missing(&c.text).is_empty(), "{}", c.text);
            }
            if keep.is_empty() && !include_stop && min_new == 0 {
                prop_assert!(stops.iter().all(|s| !c.text.contains(s)), "{}", c.text);
            }
        }
    }

    #[test]
    fn what_is_to_be_kept_cannot_be_banned_nor_hold_a_stop_text() {
        let keep = Arc::new(Literals::new(["red umbrella"]));
        let banned = Rules {
            keep: keep.clone(),
            ban: Arc::new(Phrases::new(["umbrella"])),
            ..Rules::default()
        };
        assert!(banned.check().unwrap_err().to_string().contains("kept and banned"));
        let stops = Rules { keep, stops: vec!["umbrella".into()], ..Rules::default() };
        assert!(stops.check().unwrap_err().to_string().contains("stop text"));
    }

    #[test]
    fn there_must_be_room_for_what_is_kept() {
        let rules = Rules { keep: Arc::new(Literals::new(["red umbrella"])), ..Rules::default() };
        let error = Growing::new(tokenizer(), Arc::new(rules), EOS, 3).err().expect("too small");
        assert!(error.to_string().contains("--max-tokens"));
    }
}
