//! Random numbers that depend on a key and a counter alone: Philox 4x32-10 (Salmon et al., SC
//! 2011).
//!
//! The same numbers come out on every machine and device, in any order, on any number of threads.

use crate::simd_fn;

/// Four 32-bit words for `counter` under `key`.
pub fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    rounds(key, counter.map(|c| [c])).map(|c| c[0])
}

/// The rounds, for N counters side by side.
#[inline(always)]
fn rounds<const N: usize>(key: u64, counter: [[u32; N]; 4]) -> [[u32; N]; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        for i in 0..N {
            let (p0, p1) = (M0 * c0[i] as u64, M1 * c2[i] as u64);
            (c0[i], c1[i]) = ((p1 >> 32) as u32 ^ c1[i] ^ k0, p1 as u32);
            (c2[i], c3[i]) = ((p0 >> 32) as u32 ^ c3[i] ^ k1, p0 as u32);
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

simd_fn! {
    /// [`philox`] for sixteen counters whose first words follow each other from `first` on: word by
    /// word, `words[w][i]` being word `w` of the counter `first + i`.
    pub fn philox16<S>(key: u64, first: u32, rest: [u32; 3], words: &mut [[u32; 16]; 4]) {
        let mut firsts = [first; 16];
        for (i, c) in firsts.iter_mut().enumerate() {
            *c += i as u32;
        }
        *words = rounds(key, [firsts, [rest[0]; 16], [rest[1]; 16], [rest[2]; 16]]);
    }
}

/// A seed of the moment, which fits a double, so that every JSON reader keeps it.
pub fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now()) >> 11
}

/// What a seed is derived for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Derived {
    /// A prompt among several: its line in the input, or its place in a list, from 1.
    Prompt = 1,
    /// A part of a prompt between BREAKs, from 0; the first has the prompt's own seed.
    Part = 2,
    /// The phrase that names a style.
    Style = 3,
    /// The phrases that `--variety` leaves out.
    Variety = 4,
    /// A round of rollouts, from 0.
    Rollout = 5,
}

/// The seed of the `n`-th thing of its kind under `seed`: the first two words, w0 and w1, of Philox
/// 4x32-10 with the key `seed` for the counter (n mod 2^32, n / 2^32, kind, 0), as (w1 * 2^32 + w0)
/// / 2^11. It fits a double, so that every JSON reader keeps it.
pub fn derived_seed(seed: u64, kind: Derived, n: u64) -> u64 {
    let w = philox(seed, [n as u32, (n >> 32) as u32, kind as u32, 0]);
    ((w[1] as u64) << 32 | w[0] as u64) >> 11
}

/// The seed of the `index`-th of `count` prompts that were given together: a prompt alone has the
/// seed that was asked for, those of several are derived by their places, from 1.
pub fn prompt_seed(seed: u64, index: usize, count: usize) -> u64 {
    if count == 1 { seed } else { derived_seed(seed, Derived::Prompt, index as u64 + 1) }
}

/// A number in the open interval (0, 1) from 32 random bits; 23 of them count.
pub fn uniform(bits: u32) -> f32 {
    ((bits >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// A stream of words under a key; `stream` keeps streams of one key apart.
pub struct PhiloxStream {
    key: u64,
    stream: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl PhiloxStream {
    /// The stream's beginning.
    pub fn new(key: u64, stream: u64) -> PhiloxStream {
        PhiloxStream { key, stream, block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            let c = [
                self.block as u32,
                (self.block >> 32) as u32,
                self.stream as u32,
                (self.stream >> 32) as u32,
            ];
            self.words = philox(self.key, c);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// A whole number below `n`, without bias that matters (n is far below 2^32).
    pub fn below(&mut self, n: usize) -> usize {
        ((self.word() as u64 * n as u64) >> 32) as usize
    }

    /// A number in (0, 1).
    pub fn uniform(&mut self) -> f32 {
        uniform(self.word())
    }

    /// Puts `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Standard normal numbers (Box-Muller).
pub struct Normal {
    words: PhiloxStream,
    spare: Option<f32>,
}

impl Normal {
    /// A stream of numbers; `key` and `stream` are those of [`PhiloxStream::new`].
    pub fn new(key: u64, stream: u64) -> Normal {
        Normal { words: PhiloxStream::new(key, stream), spare: None }
    }

    /// The next number.
    pub fn sample(&mut self) -> f32 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let radius = (-2.0 * self.words.uniform().ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * self.words.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // known-answer vectors of Random123 1.14 (kat_vectors, philox4x32 10)
        assert_eq!(philox(0, [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox(u64::MAX, [u32::MAX; 4]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox(0x299f31d0_a4093822, [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn derived_seeds_differ_and_follow_the_formula() {
        let mut seen = std::collections::HashSet::new();
        for kind in [Derived::Prompt, Derived::Part, Derived::Style, Derived::Variety] {
            for n in (0..1000).chain([1 << 32, (1 << 32) + 1]) {
                let seed = derived_seed(7, kind, n);
                assert!(seed < 1 << 53 && seen.insert(seed));
            }
        }
        // philox(0, [0; 4]) is in the published vectors; the kind is the counter's third word
        let w = philox(9, [5, 0, 1, 0]);
        assert_eq!(
            derived_seed(9, Derived::Prompt, 5),
            ((w[1] as u64) << 21) | (w[0] as u64 >> 11)
        );
    }

    #[test]
    fn uniform_stays_inside_and_normal_has_unit_moments() {
        assert!(uniform(0) > 0.0 && uniform(u32::MAX) < 1.0);
        let mut n = Normal::new(7, 1);
        let x: Vec<f32> = (0..100_000).map(|_| n.sample()).collect();
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let var = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        assert!(mean.abs() < 0.01 && (var - 1.0).abs() < 0.02, "{mean} {var}");
    }
}
