//! Tokenizers: BLOOM's pre-tokenizer, training, incremental decoding, damaged files.

use beautiful_prompt::models::embedded;
use beautiful_prompt::text::{Decoder, PRE_TOKENIZER_PATTERN, Tokenizer, train_tokenizer};
use proptest::prelude::*;
use std::path::PathBuf;

/// What BLOOM's pattern means to Oniguruma, written by hand: an optional space, then a run of
/// characters that are none of `(`, `)`, `|`, white space, and the sentence punctuation of the
/// inner class.
fn split_by_hand(text: &str) -> Vec<String> {
    let stops = |c: char| c.is_whitespace() || "(|).,!?…。，、।۔،".contains(c);
    let mut pieces: Vec<String> = Vec::new();
    let chars: Vec<char> = text.chars().collect();
    let mut i = 0;
    let mut open = false; // whether unmatched characters may join the last piece
    while i < chars.len() {
        let start =
            if chars[i] == ' ' && chars.get(i + 1).is_some_and(|c| !stops(*c)) { i + 1 } else { i };
        let end = start + chars[start..].iter().take_while(|c| !stops(**c)).count();
        if end > start {
            pieces.push(chars[i..end].iter().collect());
            (i, open) = (end, false);
        } else {
            // text between matches is one piece
            if !open {
                pieces.push(String::new());
            }
            pieces.last_mut().unwrap().push(chars[i]);
            (i, open) = (i + 1, true);
        }
    }
    pieces
}

fn split_by_regex(text: &str) -> Vec<String> {
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };
    let split = Split::new(
        SplitPattern::Regex(PRE_TOKENIZER_PATTERN.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .unwrap();
    let mut pre = PreTokenizedString::from(text);
    split.pre_tokenize(&mut pre).unwrap();
    let splits = pre.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.into_iter().map(|(s, _, _)| s.to_owned()).collect()
}

#[test]
fn the_nested_class_is_read_as_one_class() {
    for (text, pieces) in [
        ("a cat, in the rain", vec!["a", " cat", ",", " in", " the", " rain"]),
        ("(a|b) c", vec!["(", "a", "|", "b", ")", " c"]),
        ("x[1]", vec!["x[1]"]),
        ("生活的真谛是。好", vec!["生活的真谛是", "。", "好"]),
        ("a  b\nc", vec!["a", " ", " b", "\n", "c"]),
        ("", vec![]),
    ] {
        assert_eq!(split_by_regex(text), pieces, "{text}");
        assert_eq!(split_by_hand(text), pieces, "{text}, by hand");
    }
}

proptest! {
    #[test]
    fn the_regex_engine_splits_random_text_as_oniguruma_should(
        text in prop::collection::vec(
            prop_oneof![
                Just(' '), Just('('), Just('|'), Just('.'), Just('،'), Just('।'), Just('['),
                Just(']'), Just('\n'), Just('\u{3000}'), Just('\u{a0}'), any::<char>(),
                prop::char::range('a', 'e'),
            ],
            0..60,
        )
    ) {
        let text: String = text.into_iter().collect();
        prop_assert_eq!(split_by_regex(&text), split_by_hand(&text));
    }

    #[test]
    fn text_survives_encoding_and_comes_back_piece_by_piece(text in "\\PC{0,40}") {
        let tokenizer = embedded::tokenizer();
        let ids = tokenizer.encode_literal(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.clone());
        let mut decoder = Decoder::new(&tokenizer);
        let mut streamed = String::new();
        for id in ids {
            streamed.push_str(&decoder.push(id).unwrap());
        }
        streamed.push_str(&decoder.finish().unwrap());
        prop_assert_eq!(streamed, text);
    }
}

#[test]
fn special_tokens_are_bloom_s_and_users_cannot_write_them() {
    let tokenizer = embedded::tokenizer();
    for (token, id) in [("<unk>", 0), ("<s>", 1), ("</s>", 2), ("<pad>", 3)] {
        assert_eq!(tokenizer.token_id(token), Some(id));
    }
    assert_eq!(tokenizer.encode("</s>").unwrap(), [2]);
    assert!(!tokenizer.encode_literal("a</s>b").unwrap().contains(&2));
}

#[test]
fn training_is_repeatable_and_learns_words() {
    let folder = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..200)
        .map(|i| format!("a lighthouse number {i}, digital painting, octane render"))
        .collect();
    let write = |name: &str| -> PathBuf {
        let path = folder.path().join(name);
        train_tokenizer(&texts, 330, &path).unwrap();
        path
    };
    let (a, b) = (write("a.json"), write("b.json"));
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let tokenizer = Tokenizer::open(&a).unwrap();
    assert!(tokenizer.vocab_size() <= 330);
    assert_eq!(tokenizer.encode_literal(" lighthouse").unwrap().len(), 1);
    assert!(train_tokenizer(&texts, 100, &folder.path().join("c.json")).is_err());
}

#[test]
fn damaged_tokenizers_are_errors() {
    for bytes in [
        &b""[..],
        b"{",
        b"{}",
        b"[1,2]",
        br#"{"model":{"type":"BPE","vocab":{},"merges":["a b"]}}"#,
        b"\xff\xfe",
    ] {
        assert!(Tokenizer::from_bytes(bytes).is_err());
    }
    let good = embedded::TOKENIZER;
    for cut in [10, good.len() / 3, good.len() - 2] {
        assert!(Tokenizer::from_bytes(&good[..cut]).is_err());
    }
    let e = embedded::tokenizer()
        .check(100, std::path::Path::new("tokenizer.json"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("vocab_size 100"), "{e}");
}
