//! A request's continuations while they wait and run.

use super::kv_blocks::{Node, ROOT};
use super::request::Request;
use crate::ops::BLOCK;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// Request and candidate.
pub type SequenceId = (u64, u32);

/// One generation, waiting or running.
pub struct Sequence {
    pub request: Arc<Request>,
    pub candidate: u32,
    /// Prompt and output; the first `computed` are in the cache.
    pub tokens: Vec<u32>,
    pub prompt: usize,
    pub computed: usize,
    pub blocks: Vec<u32>,
    /// Places in the tree of prefixes of the leading blocks that are known.
    pub nodes: Vec<Node>,
    /// Candidates to split into when the prompt is done; 0 afterwards.
    pub fork: u32,
    pub started: bool,
    /// Prompt tokens whose log-probabilities were told.
    pub scored: usize,
    /// Tokens that must come next.
    pub forced: VecDeque<u32>,
    /// Tokens not to be chosen, with their positions.
    pub banned: Vec<(usize, u32)>,
    /// Tokens that the repetition penalty counts, each once.
    pub seen: Vec<u32>,
    known: HashSet<u32>,
    /// How often each token was put out; kept if a penalty needs it.
    pub counts: HashMap<u32, u32>,
    /// Maximum tokens of the next draft.
    pub draft: usize,
    pub done: bool,
}

impl Sequence {
    pub fn new(request: Request) -> Sequence {
        let request = Arc::new(request);
        let mut s = Sequence {
            candidate: 0,
            tokens: request.prompt.clone(),
            prompt: request.prompt.len(),
            computed: 0,
            blocks: Vec::new(),
            nodes: Vec::new(),
            fork: request.candidates.max(1),
            started: false,
            scored: 0,
            forced: VecDeque::new(),
            banned: Vec::new(),
            seen: Vec::new(),
            known: HashSet::new(),
            counts: HashMap::new(),
            draft: 1,
            done: false,
            request,
        };
        s.recount();
        s
    }

    /// What tells the sequence from all others.
    pub fn id(&self) -> SequenceId {
        (self.request.id, self.candidate)
    }

    /// Where the next known block would come in the tree of prefixes.
    pub fn node(&self) -> Node {
        self.nodes.last().copied().unwrap_or(ROOT)
    }

    /// Output tokens so far.
    pub fn outputs(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    fn recount(&mut self) {
        self.seen.clear();
        self.known.clear();
        self.counts.clear();
        for i in 0..self.tokens.len() {
            if i >= self.prompt || self.request.sampling.penalize_prompt {
                self.note(self.tokens[i], i >= self.prompt);
            }
        }
    }

    fn note(&mut self, token: u32, output: bool) {
        let s = &self.request.sampling;
        if s.repetition_penalty != 1.0 && self.known.insert(token) {
            self.seen.push(token);
        }
        if output && (s.presence_penalty != 0.0 || s.frequency_penalty != 0.0) {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    pub fn push(&mut self, token: u32) {
        self.note(token, true);
        self.tokens.push(token);
    }

    /// Takes back all but `keep` output tokens. Returns the blocks that go with them: a known block
    /// stays as it is.
    pub fn truncate(&mut self, keep: usize) -> Vec<u32> {
        self.tokens.truncate(self.prompt + keep);
        self.forced.clear();
        self.recount();
        // the last token is computed again, for what comes after it
        let mut computed = self.computed.min(self.tokens.len() - 1);
        // candidates share the prompt's full blocks, and so may others the known ones
        if computed < self.nodes.len().max(self.prompt / BLOCK) * BLOCK {
            computed -= computed % BLOCK;
            self.nodes.truncate(computed / BLOCK);
        }
        self.computed = computed;
        self.blocks.split_off(computed.div_ceil(BLOCK))
    }

    /// Forgets what is in the cache; returns the blocks.
    pub fn preempt(&mut self) -> Vec<u32> {
        self.computed = 0;
        self.nodes.clear();
        std::mem::take(&mut self.blocks)
    }

    /// Another candidate of the same prompt, with nothing in the cache.
    pub fn sibling(&self, candidate: u32) -> Sequence {
        Sequence {
            request: self.request.clone(),
            candidate,
            tokens: self.tokens.clone(),
            prompt: self.prompt,
            computed: 0,
            blocks: Vec::new(),
            nodes: Vec::new(),
            fork: 0,
            started: self.started,
            scored: self.scored,
            forced: self.forced.clone(),
            banned: Vec::new(),
            seen: self.seen.clone(),
            known: self.known.clone(),
            counts: self.counts.clone(),
            draft: 1,
            done: false,
        }
    }
}
