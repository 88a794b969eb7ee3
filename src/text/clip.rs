//! CLIP's tokenizer, to count what a text-to-image model's text encoder will read.
//!
//! The vocabulary follows from OpenAI's list of merges (CLIP, MIT licence), which the program
//! carries.

use std::io::Read;
use std::sync::OnceLock;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

const MERGES: &[u8] = include_bytes!("../../assets/clip/merges.txt.gz");
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// What begins and ends an input.
const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// Tokens of `text` as CLIP's text encoder counts them, the first and the last of every input
/// included: 77 fill it.
pub fn clip_tokens(text: &str) -> usize {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let encoding =
        TOKENIZER.get_or_init(tokenizer).encode_fast(text, false).expect("any text has tokens");
    encoding.len() + 2
}

fn tokenizer() -> Tokenizer {
    let mut text = String::new();
    flate2::read::GzDecoder::new(MERGES)
        .read_to_string(&mut text)
        .expect("the embedded merges are whole");
    let merges: Vec<(String, String)> = text
        .lines()
        .filter_map(|l| l.split_once(' '))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect();
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort();
    let mut names: Vec<String> = letters.iter().map(char::to_string).collect();
    names.extend(letters.iter().map(|c| format!("{c}</w>")));
    names.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    names.extend(SPECIAL.map(str::to_owned));
    let vocabulary: Vec<(String, u32)> = names.into_iter().zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), merges)
        .end_of_word_suffix("</w>".into())
        .build()
        .expect("the embedded merges are whole");
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .add_special_tokens(SPECIAL.map(|s| AddedToken::from(s, true)))
        .expect("two more tokens");
    let spaces =
        Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ");
    let normalizers = Normalizers::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces.expect("a fixed pattern")),
        NormalizerWrapper::Lowercase(Lowercase),
    ]);
    tokenizer.with_normalizer(Some(normalizers)).expect("it fits any tokenizer");
    let split =
        Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(split.expect("a fixed pattern")),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
    ])));
    tokenizer
}

#[cfg(test)]
mod tests {
    use super::clip_tokens;

    /// Counts of transformers' CLIPTokenizer (tests/golden/make_clip.py).
    #[test]
    fn counts_are_those_of_transformers() {
        let cases: Vec<(String, usize)> =
            serde_json::from_str(include_str!("../../tests/golden/clip_tokens.json"))
                .expect("a list of pairs");
        assert!(cases.len() > 10);
        for (text, count) in cases {
            assert_eq!(clip_tokens(&text), count, "{text:?}");
        }
    }
}
