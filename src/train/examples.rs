//! Training sequences: a template, a plain prompt and the target, as token ids.

use crate::data::records::Pair;
use crate::error::Result;
use crate::ops::train::PackedBatch;
use crate::random::PhiloxStream;
use crate::text::Tokenizer;
use crate::text::template::Template;

/// One sequence; tokens from `loss_from` on are to be predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids of the whole sequence.
    pub ids: Vec<u32>,
    /// Index of the first token that is to be predicted.
    pub loss_from: usize,
}

impl Example {
    /// Tokens that are to be predicted.
    pub fn labels(&self) -> usize {
        self.ids.len().saturating_sub(self.loss_from.max(1))
    }
}

/// The pair in its template, ended by `eos` and cut on the right to `max_tokens`. The target begins
/// with the space that the template does not end in, so that its first token is predicted too.
pub fn example(
    pair: &Pair,
    template: &Template,
    tokenizer: &Tokenizer,
    eos: u32,
    max_tokens: usize,
) -> Result<Example> {
    let mut ids = tokenizer.encode_literal(&template.apply(&pair.raw_prompt))?;
    let loss_from = ids.len();
    ids.extend(tokenizer.encode_literal(&format!(" {}", pair.prompt.trim()))?);
    ids.push(eos);
    ids.truncate(max_tokens);
    Ok(Example { ids, loss_from })
}

/// The order of the examples in `epoch`, a function of the seed alone.
pub fn epoch_order(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    PhiloxStream::new(seed, epoch).shuffle(&mut order);
    order
}

/// Packs examples, longest first, into batches of at most `budget` tokens (one sequence may exceed
/// it alone).
pub fn pack<'a>(examples: impl Iterator<Item = &'a Example>, budget: usize) -> Vec<PackedBatch> {
    let mut examples: Vec<&Example> = examples.collect();
    examples.sort_by_key(|e| std::cmp::Reverse(e.ids.len()));
    let mut batches: Vec<PackedBatch> = Vec::new();
    for e in examples {
        match batches.last_mut() {
            Some(b) if b.ids.len() + e.ids.len() <= budget => b.push(&e.ids, e.loss_from),
            _ => {
                let mut b = PackedBatch::default();
                b.push(&e.ids, e.loss_from);
                batches.push(b);
            }
        }
    }
    batches
}
