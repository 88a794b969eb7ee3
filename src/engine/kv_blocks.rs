//! Blocks of the KV cache: who uses which, and which hold something worth finding again.
//!
//! A full block is known by its tokens and the block before it, so that a chain of blocks stands
//! for a prefix. A known block that nobody uses stays until its memory is needed; the least
//! recently used goes first, and of one sequence the last.

use crate::ops::BLOCK;
use std::collections::{BTreeMap, HashMap};

/// A known block's place in the tree of prefixes; never given twice.
pub type Node = u64;

/// Where all chains begin.
pub const ROOT: Node = 0;

type Key = (Node, [u32; BLOCK]);

pub struct Blocks {
    free: Vec<u32>,
    users: Vec<u32>,
    /// What each block is known by.
    keys: Vec<Option<Key>>,
    known: HashMap<Key, (u32, Node)>,
    /// Known blocks that nobody uses, by the time they were last used; and that time for each
    /// block.
    unused: BTreeMap<u64, u32>,
    used_at: Vec<u64>,
    clock: u64,
    nodes: Node,
}

impl Blocks {
    /// About what a block takes here: its key twice, and its places in the tables.
    pub const BYTES: usize = 2 * size_of::<Option<Key>>() + 64;

    pub fn new(count: usize) -> Blocks {
        Blocks {
            // low numbers first, so that untouched memory stays untouched
            free: (0..count as u32).rev().collect(),
            users: vec![0; count],
            keys: vec![None; count],
            known: HashMap::new(),
            unused: BTreeMap::new(),
            used_at: vec![0; count],
            clock: 0,
            nodes: ROOT,
        }
    }

    pub fn total(&self) -> usize {
        self.users.len()
    }

    /// Blocks that could be taken now.
    pub fn available(&self) -> usize {
        self.free.len() + self.unused.len()
    }

    pub fn in_use(&self) -> usize {
        self.total() - self.available()
    }

    /// Panics if the blocks are not used as often as `users` says, or if one is neither used nor to
    /// be had; for tests.
    pub fn check(&self, users: &[u32]) {
        assert_eq!(self.users, users, "users of blocks");
        let mut idle = vec![0; users.len()];
        self.free.iter().chain(self.unused.values()).for_each(|&b| idle[b as usize] += 1);
        assert!(
            idle.iter().zip(users).all(|(&idle, &users)| idle == u32::from(users == 0)),
            "blocks are lost"
        );
        let known = self
            .known
            .iter()
            .all(|(key, (block, _))| self.keys[*block as usize].as_ref() == Some(key));
        assert!(known && self.known.len() == self.keys.iter().flatten().count(), "known blocks");
    }

    /// A block of one's own, if there is one; the longest unused of the known ones is forgotten for
    /// it.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop().or_else(|| {
            let (_, block) = self.unused.pop_first()?;
            let key = self.keys[block as usize].take().expect("unused blocks are known ones");
            self.known.remove(&key);
            Some(block)
        })?;
        self.users[block as usize] = 1;
        Some(block)
    }

    /// One more user of a block that has some.
    pub fn share(&mut self, block: u32) {
        self.users[block as usize] += 1;
    }

    /// Takes the known block that follows `parent` and holds `tokens`.
    pub fn find(&mut self, parent: Node, tokens: &[u32]) -> Option<(u32, Node)> {
        let &(block, node) = self.known.get(&key(parent, tokens))?;
        if self.users[block as usize] == 0 {
            self.unused.remove(&self.used_at[block as usize]);
        }
        self.users[block as usize] += 1;
        Some((block, node))
    }

    /// Makes a block with all its positions computed known. If another one is known by the same
    /// tokens, it stays.
    pub fn register(&mut self, parent: Node, tokens: &[u32], block: u32) -> Node {
        let key = key(parent, tokens);
        if let Some(&(_, node)) = self.known.get(&key) {
            return node;
        }
        self.nodes += 1;
        self.keys[block as usize] = Some(key);
        self.known.insert(key, (block, self.nodes));
        self.nodes
    }

    /// Gives back a sequence's blocks, its first one first.
    pub fn release(&mut self, blocks: &[u32]) {
        for &block in blocks.iter().rev() {
            let b = block as usize;
            self.users[b] -= 1;
            if self.users[b] > 0 {
                continue;
            }
            if self.keys[b].is_none() {
                self.free.push(block);
                continue;
            }
            self.clock += 1;
            self.used_at[b] = self.clock;
            self.unused.insert(self.clock, block);
        }
    }
}

fn key(parent: Node, tokens: &[u32]) -> Key {
    (parent, tokens.try_into().expect("only full blocks are known"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_blocks_outlive_their_sequence_until_memory_is_needed() {
        let mut blocks = Blocks::new(3);
        let (one, two) = ([1; BLOCK], [2; BLOCK]);
        let a = blocks.allocate().unwrap();
        let b = blocks.allocate().unwrap();
        let first = blocks.register(ROOT, &one, a);
        let second = blocks.register(first, &two, b);
        blocks.release(&[a, b]);
        assert_eq!((blocks.in_use(), blocks.available()), (0, 3));
        assert_eq!(blocks.find(ROOT, &one), Some((a, first)));
        assert_eq!(blocks.find(first, &two), Some((b, second)));
        assert_eq!(blocks.find(ROOT, &two), None, "a block is known with what comes before it");
        assert_eq!(blocks.in_use(), 2);
        blocks.release(&[a, b]);
        // the free one, then the end of the chain, then its beginning
        assert_eq!([blocks.allocate(), blocks.allocate()].map(Option::unwrap), [2, b]);
        assert_eq!(blocks.find(first, &two), None);
        assert_eq!(blocks.find(ROOT, &one), Some((a, first)));
        assert_eq!(blocks.allocate(), None, "all three are used");
    }

    #[test]
    fn a_second_copy_of_known_tokens_stays_unknown() {
        let mut blocks = Blocks::new(2);
        let (a, b) = (blocks.allocate().unwrap(), blocks.allocate().unwrap());
        let node = blocks.register(ROOT, &[5; BLOCK], a);
        assert_eq!(blocks.register(ROOT, &[5; BLOCK], b), node);
        blocks.release(&[b]);
        assert_eq!(blocks.find(ROOT, &[5; BLOCK]), Some((a, node)));
        assert_eq!(blocks.allocate(), Some(b), "it was free at once");
    }
}
