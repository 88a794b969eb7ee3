//! From tokens to text, and back: incremental decoding, stop strings, and words that a candidate must or must not hold.

use super::{Finish, Top, Verdict};
use crate::error::{Error, Result};
use crate::text::phrases::Phrases;
use crate::text::{Decoder, Tokenizer};
use std::sync::Arc;

/// How often a candidate may run into a banned phrase; then it ends before it.
const REWINDS: usize = 256;

/// What a candidate's text has to keep to.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The text ends before the first of these.
    pub stops: Vec<String>,
    /// Phrases that the text must not hold.
    pub ban: Arc<Phrases>,
    /// Phrases that it must hold.
    pub keep: Arc<Phrases>,
    /// Tokens of each phrase to keep, with the comma before it.
    keep_tokens: usize,
}

impl Rules {
    pub fn new(tokenizer: &Tokenizer, stops: Vec<String>, ban: Arc<Phrases>, keep: Arc<Phrases>) -> Result<Rules> {
        let mut keep_tokens = 0;
        for phrase in keep.missing("") {
            if let Some(banned) = ban.find(&phrase, true) {
                return Err(Error::invalid(format!("\"{}\" is both to be kept and banned", &phrase[banned])));
            }
            keep_tokens += tokenizer.encode_literal(&format!(", {phrase}"))?.len();
        }
        Ok(Rules { stops, ban, keep, keep_tokens })
    }

    /// Most tokens that phrases to keep can take.
    pub fn reserved_tokens(&self) -> usize {
        self.keep_tokens
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
pub struct Growing<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    rules: Arc<Rules>,
    eos: u32,
    max_new: usize,
    pub text: String,
    pub tokens: Vec<Token>,
    pub finish: Option<Finish>,
    /// What was given out: bytes and tokens.
    given: (usize, usize),
    /// Forced tokens that are still to come.
    forced: usize,
    rewinds: usize,
}

impl<'a> Growing<'a> {
    pub fn new(tokenizer: &'a Tokenizer, rules: Arc<Rules>, eos: u32, max_new: usize) -> Growing<'a> {
        Growing {
            tokenizer,
            decoder: Decoder::new(tokenizer),
            rules,
            eos,
            max_new,
            text: String::new(),
            tokens: Vec::new(),
            finish: None,
            given: (0, 0),
            forced: 0,
            rewinds: 0,
        }
    }

    /// Adds a token and says what is to become of the candidate.
    pub fn push(&mut self, id: u32, logprob: f32, top: Top, finish: Option<Finish>) -> Result<Verdict> {
        let searched = self.text.len();
        if id != self.eos {
            self.text.push_str(&self.decoder.push(id)?);
        }
        if finish.is_some() {
            self.text.push_str(&self.decoder.finish()?);
        }
        self.tokens.push(Token { id, logprob, top, end: self.text.len() });
        self.forced = self.forced.saturating_sub(1);
        let rules = self.rules.clone();
        let stop = self.find_stop(searched);
        let cut = stop.unwrap_or(self.text.len());
        let ended = stop.is_some() || finish.is_some();
        if !rules.ban.is_empty()
            && let Some(found) = rules.ban.find(&self.text[..cut], ended)
        {
            self.rewinds += 1;
            if self.rewinds <= REWINDS {
                let keep = self.token_at(found.start);
                let ban = self.tokens[keep].id;
                self.rewind(keep)?;
                return Ok(Verdict::Rewind { keep, ban });
            }
            self.text.truncate(found.start);
            self.finish = Some(Finish::Stop);
            return Ok(Verdict::End);
        }
        if let Some(verdict) = self.force(stop, finish)? {
            return Ok(verdict);
        }
        self.text.truncate(cut);
        self.finish = if stop.is_some() { Some(Finish::Stop) } else { finish };
        Ok(if stop.is_some() { Verdict::End } else { Verdict::Go })
    }

    /// Ends the candidate as it is.
    pub fn end(&mut self, finish: Finish) -> Result<()> {
        self.text.push_str(&self.decoder.finish()?);
        self.finish = Some(finish);
        Ok(())
    }

    /// Text and tokens that are certain and were not given out before.
    pub fn fresh(&mut self) -> (&str, &[Token]) {
        let certain = if self.finish.is_some() { self.text.len() } else { self.certain() };
        let whole = |t: &Token| t.end <= certain;
        let tokens = match self.finish {
            Some(_) => self.tokens.len(),
            None => self.tokens.iter().take_while(|t| whole(t)).count(),
        };
        let (bytes, before) = self.given;
        self.given = (certain.max(bytes), tokens.max(before));
        (&self.text[bytes..self.given.0], &self.tokens[before..self.given.1])
    }

    /// Phrases to keep that are not there yet, if now is the time to write them.
    fn force(&mut self, stop: Option<usize>, finish: Option<Finish>) -> Result<Option<Verdict>> {
        let ends = stop.is_some() || finish == Some(Finish::Stop);
        let left = self.max_new.saturating_sub(self.tokens.len());
        if self.rules.keep.is_empty() || self.forced > 0 || !(ends || left <= self.rules.keep_tokens) || left == 0 {
            return Ok(None);
        }
        let keep = match stop {
            Some(at) => self.token_at(at),
            None if ends => self.tokens.len() - 1,
            None => self.tokens.len(),
        };
        let before = &self.text[..keep.checked_sub(1).map_or(0, |last| self.tokens[last].end)];
        let missing = self.rules.keep.missing(before);
        if missing.is_empty() {
            return Ok(None);
        }
        let comma = if before.trim_end().ends_with(',') || before.trim().is_empty() { " " } else { ", " };
        let tokens = self.tokenizer.encode_literal(&format!("{comma}{}", missing.join(", ")))?;
        self.rewind(keep)?;
        self.forced = tokens.len();
        Ok(Some(Verdict::Force { keep, tokens }))
    }

    fn rewind(&mut self, keep: usize) -> Result<()> {
        self.tokens.truncate(keep);
        self.decoder = Decoder::new(self.tokenizer);
        for t in &self.tokens {
            self.decoder.push(t.id)?;
        }
        self.text.truncate(self.tokens.last().map_or(0, |t| t.end));
        self.forced = 0;
        Ok(())
    }

    /// The token that wrote the byte at `at`.
    fn token_at(&self, at: usize) -> usize {
        self.tokens.iter().position(|t| t.end > at).unwrap_or(self.tokens.len() - 1)
    }

    fn find_stop(&self, searched: usize) -> Option<usize> {
        let stops = self.rules.stops.iter().filter(|s| !s.is_empty());
        let find = |s: &String| {
            // a stop string may have begun before the newest text
            let mut from = searched.saturating_sub(s.len());
            while !self.text.is_char_boundary(from) {
                from -= 1;
            }
            self.text[from..].find(s.as_str()).map(|at| from + at)
        };
        stops.filter_map(find).min()
    }

    /// Bytes that no later token can take back.
    fn certain(&self) -> usize {
        let text = &self.text;
        let begun =
            |stop: &String| (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]));
        let mut certain = text.len() - self.rules.stops.iter().filter_map(begun).max().unwrap_or(0);
        let rules = &self.rules;
        if !rules.ban.is_empty() {
            certain = certain.min(rules.ban.undecided(text));
        }
        if !rules.ban.is_empty() || !rules.keep.is_empty() {
            // whole tokens are taken back
            certain = self.tokens.iter().map(|t| t.end).rfind(|e| *e <= certain).unwrap_or(0);
        }
        certain
    }
}
