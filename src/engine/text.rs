//! From tokens to text: incremental decoding, stop strings, and words that a candidate must or must not hold.

use super::{Event, Finish, Top, Verdict};
use crate::error::{Error, Result};
use crate::text::literals::Literals;
use crate::text::phrases::Phrases;
use crate::text::{Decoder, Tokenizer};
use std::sync::Arc;

/// How often a candidate may run into a banned phrase; then it ends before it.
const REWINDS: usize = 256;

/// What a candidate's text has to keep to.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The text ends before the first of these, or behind it if `include_stop` says so.
    pub stops: Vec<String>,
    pub stop_token_ids: Vec<u32>,
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
                return Err(Error::invalid(format!("\"{}\" is both to be kept and banned", &text[banned])));
            }
            if let Some(stop) = self.stops.iter().find(|s| !s.is_empty() && text.contains(s.as_str())) {
                return Err(Error::invalid(format!("\"{text}\" is to be kept, but it holds the stop text \"{stop}\"")));
            }
        }
        Ok(())
    }
}

/// One output token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: u32,
    pub logprob: f32,
    pub top: Top,
    /// Bytes of the text up to its end; what it says may become certain only with a later one.
    pub end: usize,
}

/// One candidate as it grows.
///
/// A banned phrase takes back the tokens from its first one on. Nothing else takes text back: text is given out up to where a
/// banned phrase may yet form, or a stop text, and tokens as far as their text is.
pub struct Growing<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    rules: Arc<Rules>,
    eos: u32,
    max_new: usize,
    /// Most tokens that texts to keep can take.
    reserved: usize,
    pub text: String,
    pub tokens: Vec<Token>,
    pub finish: Option<Finish>,
    /// What was given out: bytes and tokens.
    given: (usize, usize),
    /// Bytes before which no banned phrase begins, nor a stop text.
    searched: usize,
    stops_from: usize,
    /// Tokens that are to be written at the end, and why it ends then.
    forced: Option<(usize, Finish)>,
    rewinds: usize,
}

impl<'a> Growing<'a> {
    pub fn new(tokenizer: &'a Tokenizer, rules: Arc<Rules>, eos: u32, max_new: usize) -> Result<Growing<'a>> {
        let mut reserved = 0;
        for text in rules.keep.iter() {
            let tokens = |comma: &str| tokenizer.encode_literal(&format!("{comma}{text}"));
            reserved += tokens(", ")?.len().max(tokens(" ")?.len());
        }
        // one token comes before it is looked at
        if reserved > 0 && reserved >= max_new {
            return Err(Error::invalid(format!(
                "the words to keep take {reserved} tokens, and there is room for {}; raise --max-tokens",
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
            stops_from: 0,
            forced: None,
            rewinds: 0,
        })
    }

    /// Takes what the engine tells about the candidate.
    pub fn take(&mut self, event: Event) -> Result<Verdict> {
        match event {
            Event::Token { logprob, .. } if logprob.is_nan() => {
                Err(Error::Internal("the model's output is not a number; its weights may be damaged".into()))
            }
            Event::Token { token, logprob, top, finish, .. } => self.push(token, logprob, top, finish),
            Event::Ended { finish, .. } => {
                self.end(finish);
                Ok(Verdict::End)
            }
            Event::Started { .. } | Event::Prompt { .. } => Ok(Verdict::Go),
        }
    }

    /// Adds a token and says what is to become of the candidate. `finish` is why it ends with this token, if it does.
    pub fn push(&mut self, id: u32, logprob: f32, top: Top, finish: Option<Finish>) -> Result<Verdict> {
        // the text of a token that ends the candidate is left out, as a stop text is
        let stops = finish == Some(Finish::Stop) && (id == self.eos || self.rules.stop_token_ids.contains(&id));
        if id != self.eos && (!stops || self.rules.include_stop) {
            let new = self.decoder.push(id)?;
            self.text.push_str(&new);
        }
        self.tokens.push(Token { id, logprob, top, end: self.text.len() });
        let finish = match &mut self.forced {
            Some((left, why)) => {
                *left = left.saturating_sub(1);
                if *left == 0 { Some(*why) } else { finish }
            }
            None => finish,
        };
        // what was asked for to the letter is not searched for stop texts
        let stop = if self.forced.is_none() { self.find_stop() } else { None };
        let cut = stop.map_or(self.text.len(), |(start, end)| if self.rules.include_stop { end } else { start });
        let ended = stop.is_some() || finish.is_some();
        if let Some(verdict) = self.ban(cut, ended)? {
            return Ok(verdict);
        }
        if let Some(verdict) = self.force(cut, stop.is_some() || stops, finish)? {
            return Ok(verdict);
        }
        if ended {
            self.cut(cut);
            self.finish = if stop.is_some() { Some(Finish::Stop) } else { finish };
        }
        Ok(if self.finish.is_some() { Verdict::End } else { Verdict::Go })
    }

    /// Ends the candidate with what there is.
    pub fn end(&mut self, finish: Finish) {
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
            self.finish = Some(Finish::Stop);
            return Ok(Some(Verdict::End));
        }
        let keep = self.token_at(found.start);
        let ban = self.tokens[keep].id;
        self.rewind(keep, usize::MAX)?;
        Ok(Some(Verdict::Rewind { keep, ban }))
    }

    /// Has the texts to keep that are not there yet written at the end, if this is the end or there is only just room for them.
    fn force(&mut self, cut: usize, stopped: bool, finish: Option<Finish>) -> Result<Option<Verdict>> {
        let left = self.max_new.saturating_sub(self.tokens.len());
        let ends = stopped || finish.is_some();
        if self.rules.keep.is_empty() || self.forced.is_some() || !(ends || left <= self.reserved) {
            return Ok(None);
        }
        let before = self.text[..cut].trim_end();
        let missing = self.rules.keep.missing(before);
        if missing.is_empty() {
            // what stands at the very end must not go on as another word, with no room to write it again
            let grown = |more: &str| !self.rules.keep.missing(&format!("{}{more}", self.text)).is_empty();
            if !ends && (grown("a") || grown(".0")) {
                self.finish = Some(Finish::Length);
                return Ok(Some(Verdict::End));
            }
            return Ok(None);
        }
        let cut = before.len();
        let mut comma = if before.is_empty() || before.ends_with(',') { " " } else { ", " };
        let mut tokens = Vec::new();
        for text in missing {
            tokens.extend(self.tokenizer.encode_literal(&format!("{comma}{text}"))?);
            comma = ", ";
        }
        // tokens without text are parts of a character that was not completed, or end the candidate
        let start = |i: usize| i.checked_sub(1).map_or(0, |before| self.tokens[before].end);
        let keep =
            (0..self.tokens.len()).rfind(|&i| start(i) < cut && self.tokens[i].end > start(i)).map_or(0, |i| i + 1);
        if keep + tokens.len() > self.max_new {
            return Ok(None);
        }
        self.rewind(keep, cut)?;
        self.forced = Some((tokens.len(), if stopped { Finish::Stop } else { finish.unwrap_or(Finish::Length) }));
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

    /// Leaves out the text from `end` on.
    fn cut(&mut self, end: usize) {
        self.text.truncate(end);
        let end = self.text.len();
        self.tokens.iter_mut().rev().take_while(|t| t.end > end).for_each(|t| t.end = end);
        self.stops_from = self.stops_from.min(end);
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
            return None;
        }
        let found =
            self.stops().filter_map(|s| Some((self.stops_from + self.text[self.stops_from..].find(s)?, s.len())));
        let found = found.min().map(|(at, len)| (at, at + len));
        if found.is_none() {
            self.stops_from = self.before_stop();
        }
        found
    }

    /// Bytes of the text before what may become a stop text.
    fn before_stop(&self) -> usize {
        let text = &self.text[self.stops_from..];
        let begun =
            |stop: &str| (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]));
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
        let written = |i: usize| self.tokens[i].end > i.checked_sub(1).map_or(0, |before| self.tokens[before].end);
        let tokens = if keeps { (0..tokens).rfind(|&i| written(i)).map_or(0, |i| i + 1) } else { tokens };
        (certain, tokens)
    }
}
