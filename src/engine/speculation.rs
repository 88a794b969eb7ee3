//! Speculation without a second model: guesses of the next tokens, which one forward pass then
//! checks.
//!
//! A guess comes from where the sequence's last tokens occurred before, in its prompt or its
//! output, or from a table of runs that outputs often hold. A draft is one ragged span; each of its
//! tokens is compared with the one that is chosen at its place, and what follows the first
//! difference is dropped, so that the tokens are those of plain decoding, seeds included.
//!
//! Drafting pays while the part of drafted tokens that is accepted exceeds what a token adds to a
//! step. Both are measured on the way: with S sequences and a step of `a + b n` seconds for n
//! tokens, the limit is b S / (a + b S).

use std::collections::HashMap;
use std::hash::Hash;

/// Maximum runs in the table.
const TABLE: usize = 1 << 17;
/// How often a run must have been met to be guessed.
const TRUSTED: u8 = 2;
/// While drafting does not pay, one step of so many tries it.
const PROBE: u64 = 32;

pub struct Drafter {
    max_tokens: usize,
    by_three: HashMap<[u32; 3], Next>,
    by_two: HashMap<[u32; 2], Next>,
    pace: Pace,
    /// Part of the drafted tokens that was accepted, of late.
    acceptance: f64,
    steps: u64,
}

/// What mostly follows a run, and by how much it leads.
#[derive(Clone, Copy)]
struct Next {
    token: u32,
    lead: u8,
}

impl Drafter {
    /// Drafts of up to `most` tokens; none if 0.
    pub fn new(max_tokens: usize) -> Drafter {
        Drafter {
            max_tokens,
            by_three: HashMap::new(),
            by_two: HashMap::new(),
            pace: Pace::default(),
            acceptance: 0.5,
            steps: 0,
        }
    }

    /// Whether to draft in the next step, of so many sequences.
    pub fn pays(&mut self, sequences: usize) -> bool {
        self.steps += 1;
        self.max_tokens > 0
            && (self.steps.is_multiple_of(PROBE) || self.acceptance > self.pace.price(sequences))
    }

    /// Up to `limit` tokens that may follow `tokens`.
    pub fn propose(&self, tokens: &[u32], limit: usize) -> Vec<u32> {
        let limit = limit.min(self.max_tokens);
        if limit == 0 {
            return Vec::new();
        }
        let earlier = |n: usize| {
            let end = tokens.len().checked_sub(n).filter(|end| *end > 0)?;
            let at = tokens[..tokens.len() - 1].windows(n).rposition(|w| *w == tokens[end..])?;
            // what is followed by the end goes round
            Some(tokens[at + n..].iter().copied().cycle().take(limit).collect::<Vec<u32>>())
        };
        earlier(3)
            .or_else(|| self.look_up(tokens, limit))
            .or_else(|| earlier(2))
            .unwrap_or_default()
    }

    fn look_up(&self, tokens: &[u32], limit: usize) -> Option<Vec<u32>> {
        let mut run: Vec<u32> = tokens[tokens.len().saturating_sub(3)..].to_vec();
        let known = run.len();
        while run.len() < known + limit {
            let next = run.last_chunk::<3>().and_then(|k| self.by_three.get(k));
            let next = next.or_else(|| run.last_chunk::<2>().and_then(|k| self.by_two.get(k)));
            let Some(next) = next.filter(|n| n.lead >= TRUSTED) else { break };
            run.push(next.token);
        }
        Some(run.split_off(known)).filter(|d| !d.is_empty())
    }

    /// Remembers the runs of an output.
    pub fn learn(&mut self, output: &[u32]) {
        if self.max_tokens == 0 {
            return;
        }
        for w in output.windows(4) {
            note(&mut self.by_three, [w[0], w[1], w[2]], w[3]);
        }
        for w in output.windows(3) {
            note(&mut self.by_two, [w[0], w[1]], w[2]);
        }
    }

    /// A draft was checked.
    pub fn checked(&mut self, drafted: usize, accepted: usize) {
        // a mean over about fifty drafted tokens
        let weight = 0.98f64.powi(drafted as i32);
        self.acceptance =
            self.acceptance * weight + accepted as f64 / drafted as f64 * (1.0 - weight);
    }

    /// A step that only decoded took so long.
    pub fn timed(&mut self, tokens: usize, seconds: f64) {
        self.pace.add(tokens as f64, seconds);
    }
}

fn note<K: Hash + Eq>(table: &mut HashMap<K, Next>, key: K, token: u32) {
    if table.len() >= TABLE {
        // what was met once goes; if that is too little, all but the surest
        let least = if table.values().filter(|n| n.lead < TRUSTED).count() > TABLE / 8 {
            TRUSTED
        } else {
            u8::MAX
        };
        table.retain(|_, n| n.lead >= least);
    }
    let next = table.entry(key).or_insert(Next { token, lead: 0 });
    if next.token == token {
        next.lead = next.lead.saturating_add(1);
    } else if next.lead > 0 {
        next.lead -= 1;
    } else {
        *next = Next { token, lead: 1 };
    }
}

/// The line `seconds = a + b tokens` through recent steps.
#[derive(Default)]
struct Pace {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Pace {
    fn add(&mut self, x: f64, y: f64) {
        const KEEP: f64 = 0.98;
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.x, x),
            (&mut self.y, y),
            (&mut self.xx, x * x),
            (&mut self.xy, x * y),
        ] {
            *sum = *sum * KEEP + new;
        }
    }

    /// The acceptance at which a drafted token costs what it brings; 0 while too little is known.
    fn price(&self, sequences: usize) -> f64 {
        let n = self.weight;
        let spread = n * self.xx - self.x * self.x;
        if n < 5.0 || spread < 0.01 * n * self.xx {
            return 0.0;
        }
        let b = ((n * self.xy - self.x * self.y) / spread).max(0.0);
        let a = ((self.y - b * self.x) / n).max(0.0);
        let all = b * sequences as f64;
        if a + all == 0.0 { 0.0 } else { all / (a + all) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_come_from_the_sequence_itself_and_from_what_was_learnt() {
        let mut d = Drafter::new(4);
        assert_eq!(d.propose(&[1, 2, 3, 9, 8, 1, 2, 3], 4), [9, 8, 1, 2]);
        assert_eq!(d.propose(&[5, 6, 7, 5, 6], 4), [7, 5, 6, 7]);
        assert_eq!(d.propose(&[1, 2, 3], 4), [0u32; 0]);
        d.learn(&[1, 2, 3, 4, 5]);
        assert_eq!(d.propose(&[0, 2, 3], 4), [0u32; 0], "met once");
        d.learn(&[1, 2, 3, 4, 5]);
        assert_eq!(d.propose(&[0, 2, 3], 4), [4, 5]);
        assert_eq!(d.propose(&[0, 2, 3], 1), [4]);
        assert_eq!(d.propose(&[3], 4), [0u32; 0]);
        assert_eq!(Drafter::new(0).propose(&[1, 2, 3, 9, 8, 1, 2, 3], 4), [0u32; 0]);
    }

    #[test]
    fn drafting_stops_when_it_costs_more_than_it_brings() {
        let mut d = Drafter::new(4);
        assert!(d.pays(1));
        // a token costs as much as the rest of a step: one in two must be accepted, with one
        // sequence
        (0..200).for_each(|i| d.timed(1 + i % 5, 1.0 + (1 + i % 5) as f64));
        assert!((d.pace.price(1) - 0.5).abs() < 1e-9);
        assert!((d.pace.price(9) - 0.9).abs() < 1e-9);
        (0..100).for_each(|_| d.checked(4, 1));
        assert!((0..10).all(|_| !d.pays(1)));
        assert!((0..PROBE).any(|_| d.pays(1)), "it tries again now and then");
        (0..100).for_each(|_| d.checked(4, 3));
        assert!(d.pays(1) && !d.pays(9));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut d = Drafter::new(4);
        for i in 0..(TABLE as u32 * 2) {
            d.learn(&[i, i + 1, i + 2, i + 3]);
        }
        assert!(d.by_three.len() <= TABLE && d.by_two.len() <= TABLE);
    }
}
