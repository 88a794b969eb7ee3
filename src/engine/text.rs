//! From tokens to text: incremental decoding and stop strings.

use crate::error::Result;
use crate::text::{Decoder, Tokenizer};

/// The text of one candidate as it grows.
pub struct TextStream<'a> {
    decoder: Decoder<'a>,
    stops: &'a [String],
    /// Decoded, but perhaps the beginning of a stop string.
    held: String,
    /// Everything given out.
    pub text: String,
    /// A stop string was found; nothing more comes out.
    pub stopped: bool,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer, stops: &'a [String]) -> Self {
        TextStream { decoder: Decoder::new(tokenizer), stops, held: String::new(), text: String::new(), stopped: false }
    }

    /// Adds a token; returns the text that is certain now.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let piece = self.decoder.push(token)?;
        Ok(self.add(&piece, false))
    }

    /// The rest at the end.
    pub fn finish(&mut self) -> Result<String> {
        let piece = self.decoder.finish()?;
        Ok(self.add(&piece, true))
    }

    fn add(&mut self, piece: &str, last: bool) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let found = self.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str())).min();
        let cut = match found {
            Some(at) => {
                self.stopped = true;
                at
            }
            None if last => self.held.len(),
            None => self.held.len() - self.undecided(),
        };
        let out: String = self.held.drain(..cut).collect();
        self.text.push_str(&out);
        out
    }

    /// Bytes at the end that a stop string could begin with.
    fn undecided(&self) -> usize {
        let ends = |stop: &String| {
            (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n]))
        };
        self.stops.iter().filter_map(ends).max().unwrap_or(0)
    }
}
