//! What a model can be expected to write: characters that its vocabulary holds whole.
//!
//! A byte-level vocabulary can spell everything, byte by byte, but a model that has seen a letter
//! only in halves writes halves of letters. Which letters are whole follows from the tokens of the
//! text itself, for any vocabulary.

use super::Tokenizer;
use std::collections::BTreeSet;
use unicode_normalization::UnicodeNormalization;

impl Tokenizer {
    /// The characters of `text` that are no whole tokens, nor within one, wherever they stand, in
    /// order.
    pub fn split_characters(&self, text: &str) -> Vec<char> {
        if text.is_ascii() {
            return vec![];
        }
        let Ok(ids) = self.encode_literal(text) else { return vec![] };
        let tokens: Vec<Vec<u8>> = ids.iter().map(|&id| self.token_bytes(id)).collect();
        let mut split = BTreeSet::new();
        if tokens.concat() == text.as_bytes() {
            let mut end = 0;
            for token in &tokens {
                end += token.len();
                if !text.is_char_boundary(end) {
                    let start = (0..end).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                    split.extend(text[start..].chars().next());
                }
            }
        } else {
            // not a vocabulary of bytes
            split.extend(text.chars().filter(|c| !c.is_ascii()));
        }
        // a token may end within a letter that stands whole elsewhere
        split.retain(|&c| !c.is_whitespace() && !self.is_whole(c));
        let mut seen = BTreeSet::new();
        text.chars().filter(|&c| split.contains(&c) && seen.insert(c)).collect()
    }

    fn is_whole(&self, c: char) -> bool {
        let alone = c.to_string();
        let Ok(ids) = self.encode_literal(&alone) else { return false };
        let whole = |id: &u32| std::str::from_utf8(&self.token_bytes(*id)).is_ok();
        ids.iter().all(whole) && self.decode(&ids).is_ok_and(|text| text.trim() == alone)
    }
}

/// With plain quotation marks, dashes and spaces, composed letters and no ligatures or invisible
/// characters: the same text as it would be typed.
pub fn straighten(text: &str) -> String {
    if text.is_ascii() && !text.contains(|c: char| c.is_ascii_control()) {
        return text.to_owned();
    }
    let mut straight = String::with_capacity(text.len());
    for c in text.nfc() {
        match c {
            '‘' | '’' | '‚' | '‛' | 'ʼ' | '′' | '´' => straight.push('\''),
            '“' | '”' | '„' | '‟' | '«' | '»' | '″' => straight.push('"'),
            '‐' | '‑' | '‒' | '–' | '—' | '―' | '−' => straight.push('-'),
            '…' => straight.push_str("..."),
            '\u{ad}' | '\u{200b}' | '\u{2060}' | '\u{feff}' => {}
            // ligatures, and letters and signs of full width
            '\u{fb00}'..='\u{fb06}' | '\u{ff01}'..='\u{ff5e}' => {
                straight.extend([c].into_iter().nfkc())
            }
            c if c.is_whitespace() || c.is_control() => straight.push(' '),
            c => straight.push(c),
        }
    }
    straight
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::embedded;
    use crate::text::train_tokenizer;

    #[test]
    fn text_is_straightened() {
        let odd = "\u{201c}a dog\u{2019}s\u{a0}bed\u{201d} \u{2013} \u{fb01}sh\u{2026} \
            cafe\u{301}\u{200b}\t\u{ff21}\u{7}";
        assert_eq!(straighten(odd), "\"a dog's bed\" - fish... caf\u{e9} A ");
        assert_eq!(straighten("a 🐱 in Straße"), "a 🐱 in Straße");
    }

    #[test]
    fn what_a_vocabulary_holds_whole() {
        let english = embedded::tokenizer();
        assert_eq!(english.split_characters("a café by night, 8k"), []);
        assert_eq!(
            english.split_characters("a cat 🐱🌧️ кот, кот").iter().collect::<String>(),
            "🐱🌧\u{fe0f}кот"
        );
        // a vocabulary of other texts
        let texts = ["夜の街に猫 страна".to_owned(), "夜の街と犬".to_owned()];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        train_tokenizer(&texts.iter().cycle().take(40).cloned().collect::<Vec<_>>(), 400, &path)
            .unwrap();
        let other = Tokenizer::open(&path).unwrap();
        assert_eq!(other.split_characters("夜の街と犬 страна"), []);
        assert_eq!(other.split_characters("東京").len(), 2);
        assert_eq!(other.split_characters("é 夜"), ['é']);
    }
}
