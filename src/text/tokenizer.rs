//! A `tokenizer.json`, through the `tokenizers` crate with Oniguruma as its regex engine.

use crate::error::{Error, Result};
use std::path::Path;

/// Turns text into token ids, and these into text.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Reads `</s>` and its like as plain text.
    literal: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or is not a tokenizer's.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let bytes =
            crate::files::read(path, "does not exist; copy the model's tokenizer.json there")?;
        Tokenizer::from_bytes(&bytes).map_err(|e| Error::file(path, e))
    }

    /// The error says what is wrong with the text.
    pub fn from_bytes(bytes: &[u8]) -> std::result::Result<Tokenizer, String> {
        // the crate asserts where it should return an error, so a damaged file could unwind
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
        let mut inner = match parsed {
            Ok(Ok(t)) => t,
            Ok(Err(e)) => return Err(format!("not a tokenizer.json: {e}")),
            Err(_) => return Err("not a tokenizer.json: its parts contradict each other".into()),
        };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| format!("not a tokenizer.json: {e}"))?;
        let mut literal = inner.clone();
        literal.set_encode_special_tokens(true);
        Ok(Tokenizer { inner, literal })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// Fails if the tokenizer knows ids that a model of `vocab_size` rows does not have.
    pub fn check(&self, vocab_size: usize, path: &Path) -> Result<()> {
        if self.vocab_size() > vocab_size {
            return Err(Error::file(
                path,
                format!(
                    "has ids up to {}, but config.json says vocab_size {vocab_size}; the files \
                    belong to different models",
                    self.vocab_size() - 1
                ),
            ));
        }
        Ok(())
    }

    /// Token ids, special tokens recognised, as transformers' `tokenizer(text).input_ids`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.inner, text)
    }

    /// Token ids of somebody's text, in which `</s>` and its like are only characters.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.literal, text)
    }

    /// The text of `ids` without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|e| Error::invalid(format!("cannot decode token ids: {e}")))
    }

    /// The bytes that a token stands for, alone perhaps not text; its name's for special ones.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let name = self.inner.id_to_token(id).unwrap_or_default();
        name.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| name.into_bytes())
    }

    /// The id of the token with this name, if the vocabulary has it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

/// The byte that byte-level vocabularies write as `c`: printable Latin-1 as itself, the rest in
/// order from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    match c as u32 {
        code @ 0..=255 => Some(code as u8).filter(|b| printable(*b)),
        code => (0..=255).filter(|b| !printable(*b)).nth(code as usize - 256),
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode_fast(text, true)
        .map_err(|e| Error::invalid(format!("cannot tokenize the text: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// Turns token ids into text as they come, holding back bytes of unfinished characters.
#[derive(Clone)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Ids whose text has been given out, and that of the ids kept before them as context.
    from: usize,
    shown: usize,
}

impl<'a> Decoder<'a> {
    /// A decoder that has seen no ids yet.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Decoder { tokenizer, ids: Vec::new(), from: 0, shown: 0 }
    }

    /// The text that `id` completes.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids[self.from..])?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let new = text.get(self.shown..).unwrap_or_default().to_owned();
        self.from = self.ids.len() - 1;
        self.shown = self.tokenizer.decode(&self.ids[self.from..])?.len();
        Ok(new)
    }

    /// What was held back at the end.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids[self.from..])?;
        Ok(text.get(self.shown..).unwrap_or_default().to_owned())
    }
}
