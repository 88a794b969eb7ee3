//! Ragged batches: the tokens of all spans one after the other, without padding.

/// Positions of one block of the KV cache.
pub const BLOCK: usize = 16;

/// A sequence's part of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Span {
    /// First token of the span in the batch, and how many there are.
    pub start: usize,
    /// Tokens of the span.
    pub len: usize,
    /// Positions of the sequence that are in the KV cache already.
    pub past: usize,
    /// Blocks of the sequence, in order; they have room for `past + len` positions.
    pub blocks: Vec<u32>,
}

/// All tokens of one forward pass. Prefill, chunked prefill, decoding and scoring are the same.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token ids, span after span.
    pub ids: Vec<u32>,
    /// The spans, in the order of their tokens.
    pub spans: Vec<Span>,
    /// Tokens whose ids the host does not know yet: token of the batch, and which of the last
    /// sampled tokens it is (see [`crate::ops::DecodeBackend::sample_async`]).
    pub pending: Vec<(usize, usize)>,
}

impl Batch {
    /// Adds a span of `ids` to a sequence that has `past` positions in `blocks`.
    pub fn push(&mut self, ids: &[u32], past: usize, blocks: &[u32]) {
        assert!(!ids.is_empty() && (past + ids.len()).div_ceil(BLOCK) <= blocks.len());
        self.spans.push(Span {
            start: self.ids.len(),
            len: ids.len(),
            past,
            blocks: blocks.to_vec(),
        });
        self.ids.extend_from_slice(ids);
    }

    /// Makes this a copy of `other`, in the memory that it has: no step allocates.
    pub fn copy_from(&mut self, other: &Batch) {
        self.ids.clone_from(&other.ids);
        self.pending.clone_from(&other.pending);
        self.spans.resize_with(other.spans.len(), Span::default);
        for (span, other) in self.spans.iter_mut().zip(&other.spans) {
            (span.start, span.len, span.past) = (other.start, other.len, other.past);
            span.blocks.clone_from(&other.blocks);
        }
    }
}
