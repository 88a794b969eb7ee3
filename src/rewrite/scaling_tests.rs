//! The cost of hostile prompts grows with their length, not with its square.

use super::markup::{phrase_spans, without};
use super::{Fidelity, PromptMarkup};
use crate::text::content_words::word_spans;

/// Texts of so many bytes that are made to be hard.
fn hostile(bytes: usize) -> Vec<String> {
    let units = "( [ { < _ , ( [ ( ) [ ] ]( (] __a __a__ <lora:x <lora:x> <lora:x:1> BREAK_ (a (a) \
        (a:1.2) {a|b} {a| [a:b: a_ a, ' \" 'a' \"a\" no_ \
                 one_ 1, 1: twenty- AND_ ${ $$ \\ \\( 🐱 猫 ’ ́ é";
    let repeated = units
        .split_whitespace()
        .map(|u| u.replace("_", if u.len() > 1 && !u.contains("__") { " " } else { "_" }));
    let mut texts: Vec<String> = repeated.map(|u| u.repeat(bytes / u.len())).collect();
    for (open, close) in [("(", ")"), ("[", "]"), ("{", "}"), ("(a ", ":1.2)"), ("(", ":1)")] {
        let n = bytes / (open.len() + close.len());
        texts.push(open.repeat(n) + &close.repeat(n));
    }
    texts.push((0..bytes / 8).map(|i| format!("(w{i}:1) ")).collect());
    texts.push((0..bytes / 8).map(|i| format!("__w{i}__ ")).collect());
    texts
}

fn work(text: &str, fidelity: &Fidelity) {
    let parsed = PromptMarkup::parse(text);
    let words: Vec<_> = word_spans(text).map(|w| w.0).collect();
    without(text, &words);
    phrase_spans(text);
    parsed
        .chunks
        .iter()
        .for_each(|c| drop(c.weave("a red cat in the rain, w1, w2, highly detailed")));
    assert_eq!(fidelity.score(text, text).0, 1.0);
    fidelity.added("a cat", text);
}

/// Processor time of this thread alone, the least of three times.
#[cfg(unix)]
fn nanoseconds(text: &str, fidelity: &Fidelity) -> u128 {
    let now = || {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock exists on every Unix, and `t` is a place for its answer.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
        t.tv_sec as u128 * 1_000_000_000 + t.tv_nsec as u128
    };
    let once = |_| {
        let before = now();
        work(text, fidelity);
        now() - before
    };
    (0..3).map(once).min().expect("three times")
}

/// Eight times the text takes eight times the work, and sixty-four times if some scan is quadratic;
/// half of that is allowed, so that neither caches nor neighbours decide.
#[cfg(unix)]
#[test]
fn costs_grow_with_the_length() {
    let fidelity = Fidelity::default();
    let mut steep = vec![];
    for (short, long) in hostile(4_000).iter().zip(&hostile(32_000)) {
        let (a, b) = (nanoseconds(short, &fidelity), nanoseconds(long, &fidelity));
        if b >= 32 * a {
            steep.push(format!("{:?}: {a} ns, {b} ns", short.chars().take(12).collect::<String>()));
        }
    }
    assert!(steep.is_empty(), "{steep:#?}");
}
