//! Byte-level BPE vocabularies with BLOOM's pre-tokenizer.

use crate::error::{Error, Result};
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// BLOOM's pre-tokenizer: an optional space, then characters that are neither white space, nor
/// parentheses or pipes, nor sentence punctuation (Oniguruma reads the inner brackets as a nested
/// class).
pub const PRE_TOKENIZER_PATTERN: &str = " ?[^(\\s|[.,!?…。，、।۔،])]+";

/// Special tokens, with BLOOM's ids 0 to 3.
const SPECIAL: [&str; 4] = ["<unk>", "<s>", "</s>", "<pad>"];

/// Learns a vocabulary of `vocab_size` tokens (special ones and the 256 bytes included) from
/// `texts` and writes it as `tokenizer.json` at `path`.
pub fn train_tokenizer(texts: &[String], vocab_size: usize, path: &Path) -> Result<()> {
    let least = SPECIAL.len() + 256;
    if vocab_size < least {
        return Err(Error::invalid(format!(
            "--vocab-size {vocab_size} is too small; it needs at least {least}"
        )));
    }
    let fail = |e: tokenizers::Error| Error::file(path, format!("cannot train the tokenizer: {e}"));
    let split = Split::new(
        SplitPattern::Regex(PRE_TOKENIZER_PATTERN.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(fail)?;
    let bytes = ByteLevel::new(false, true, false);
    let special: Vec<AddedToken> = SPECIAL.iter().map(|&s| AddedToken::from(s, true)).collect();
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    tokenizer.with_decoder(Some(bytes));
    tokenizer.with_post_processor(Some(ByteLevel::new(true, false, false)));
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut model = BPE::default();
    {
        use tokenizers::Trainer;
        let process = |text: &str| -> tokenizers::Result<Vec<String>> {
            use tokenizers::{OffsetReferential, OffsetType, PreTokenizer};
            let mut pre = tokenizers::PreTokenizedString::from(text);
            tokenizer.get_pre_tokenizer().expect("set above").pre_tokenize(&mut pre)?;
            Ok(pre
                .get_splits(OffsetReferential::Original, OffsetType::Byte)
                .into_iter()
                .map(|(s, _, _)| s.to_owned())
                .collect())
        };
        trainer.feed(texts.iter(), process).map_err(fail)?;
        let special = trainer.train(&mut model).map_err(fail)?;
        tokenizer.with_model(model);
        tokenizer.add_special_tokens(special).map_err(fail)?;
    }
    let json = tokenizer.to_string(false).map_err(fail)?;
    crate::checkpoint::write_atomic(path, |w| w.write_all(json.as_bytes()))
}
