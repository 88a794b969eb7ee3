//! How much rewrites differ from each other, and whether what they add goes together.

use crate::rewrite::Fidelity;
use crate::text::artists::names_artist;
use crate::text::content_words::words;
use crate::text::mediums::Mediums;
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// The commonest phrases whose share is measured.
pub const COMMONEST: usize = 60;

/// What is added to many prompts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Variety {
    /// Different tails: all that an output adds, as one.
    pub distinct_tails: usize,
    /// Part of the added phrases that are among the 60 commonest.
    pub commonest_phrases: f64,
    /// Part of the outputs that name an artist whom their inputs do not.
    pub with_artists: f64,
    /// Part of the outputs that name media which exclude each other, where the inputs do not.
    pub contradictions: f64,
    /// Part of the outputs that are a photo and painted, drawn or made on a computer at once.
    pub photo_and_painting: f64,
}

/// Measures pairs of input and output.
pub fn variety<'a>(rewrites: impl Iterator<Item = (&'a str, &'a str)>) -> Variety {
    let (fidelity, mediums) = (Fidelity::default(), Mediums::built_in());
    let medium = |name| mediums.named(name).expect("the built-in list names it");
    let photo = medium("photo");
    let painted = medium("painting") | medium("digital") | medium("drawing");
    let (mut tails, mut phrases) = (HashSet::new(), HashMap::<String, usize>::new());
    let (mut count, mut artists, mut contradictions, mut both) = (0, 0, 0, 0);
    for (input, output) in rewrites {
        let added: Vec<String> =
            fidelity.added(input, output).iter().map(|p| words(p).join(" ")).collect();
        count += 1;
        artists += usize::from(added.iter().any(|p| names_artist(p)));
        contradictions += usize::from(mediums.contradicts(output) && !mediums.contradicts(input));
        both += usize::from(
            mediums.names_both(output, photo, painted)
                && !mediums.names_both(input, photo, painted),
        );
        tails.insert(added.join(", "));
        for phrase in added {
            *phrases.entry(phrase).or_default() += 1;
        }
    }
    let part = |n: usize, of: usize| n as f64 / of.max(1) as f64;
    let mut counts: Vec<usize> = phrases.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    Variety {
        distinct_tails: tails.len(),
        commonest_phrases: part(counts.iter().take(COMMONEST).sum(), counts.iter().sum()),
        with_artists: part(artists, count),
        contradictions: part(contradictions, count),
        photo_and_painting: part(both, count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_artists_and_contradictions_are_counted() {
        let pairs = [
            ("a photo of a cat", "a photo of a cat, digital painting, 8k"),
            ("a dog", "a dog, digital painting, 8k"),
            ("a fox", "a fox, art by wlop"),
            ("a photo, oil on canvas", "a photo, oil on canvas, art by wlop"),
        ];
        let v = variety(pairs.into_iter());
        assert_eq!((v.distinct_tails, v.commonest_phrases, v.with_artists), (2, 1.0, 0.5));
        assert_eq!(
            (v.contradictions, v.photo_and_painting),
            (0.25, 0.25),
            "what the input says is not counted"
        );
        assert_eq!(variety(std::iter::empty()), Variety::default());
    }
}
