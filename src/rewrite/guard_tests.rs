//! What holds for every candidate of every rewrite, whatever the prompt, the demands and the
//! model's text.

use super::*;
use crate::generate::Continuation;
use crate::generate::text::Token;
use crate::models::embedded;
use crate::text::literals::Literals;
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};

fn prompter() -> Prompter {
    static TOKENIZER: LazyLock<Arc<crate::text::Tokenizer>> =
        LazyLock::new(|| Arc::new(embedded::tokenizer()));
    Prompter { tokenizer: TOKENIZER.clone(), template: embedded::template() }
}

/// What the engine gives back for a text.
fn completed(texts: &[String], finish: FinishReason) -> Completed {
    let token = |text: &String| Token {
        id: 5,
        logprob: -(text.len() as f32) / 9.0,
        top: vec![],
        end: text.len(),
    };
    let one =
        |text: &String| Continuation { text: text.clone(), tokens: vec![token(text)], finish };
    let candidates = texts.iter().map(one).collect();
    Completed { id: 0, prompt_ids: vec![5], prompt_scores: vec![], cached: 0, candidates }
}

/// Runs a rewrite with a model that says `texts` in turn.
fn rewrite(prompt: &str, texts: &[&str], options: GenerateOptions, guard: GuardOptions) -> Rewrite {
    let mut rewriting = Rewriting::new(prompter(), prompt, options, guard).unwrap();
    let mut texts = texts.iter().cycle();
    loop {
        let work = rewriting.work().unwrap();
        if work.is_empty() {
            return rewriting.finish();
        }
        let said = |(_, o): &(Vec<u32>, GenerateOptions)| {
            let texts: Vec<String> =
                (0..o.candidates).map(|_| (*texts.next().unwrap()).to_owned()).collect();
            completed(&texts, FinishReason::Stop)
        };
        let done: Vec<Completed> = work.iter().map(said).collect();
        rewriting.take(&done);
    }
}

fn warm(candidates: u32) -> GenerateOptions {
    let mut options = GenerateOptions { candidates, ..GenerateOptions::default() };
    options.sampling.temperature = 1.0;
    options
}

fn first(prompt: &str, texts: &[&str]) -> Candidate {
    rewrite(prompt, texts, warm(1), GuardOptions::default()).candidates.remove(0)
}

#[test]
fn choices_stay_where_they_stand() {
    let prompt = "a photo of a __animal__ wearing a {red|blue} hat in __city__";
    let c = first(prompt, &["a photo of a animal wearing a red hat in city, highly detailed, 8k"]);
    assert_eq!(
        (c.text, c.source, c.kept),
        (format!("{prompt}, highly detailed, 8k"), Source::Phrases, 1.0)
    );
    assert!(c.reason.unwrap().contains("__animal__ stays"));
    let c = first("a (red:1.2) cat", &["a cat, (masterpiece, 8k"]);
    assert_eq!(
        (c.text.as_str(), c.source),
        ("a (red:1.2) cat, 8k", Source::Phrases),
        "the weight has no place"
    );
}

#[test]
fn what_the_vocabulary_lacks_stays_as_it_is() {
    let c = first("a cat 🐱🌧️ in the rain", &["a cat in the rain, soft light"]);
    assert_eq!(
        (c.text.as_str(), c.source),
        ("a cat 🐱🌧️ in the rain, soft light", Source::Phrases)
    );
    assert!(c.reason.unwrap().contains("the model's vocabulary lacks \"🐱\", \"🌧\""));
    for prompt in ["кот в сапогах", "東京の夜", "قطة في المطر"] {
        let r = rewrite(prompt, &["never asked"], warm(3), GuardOptions::default());
        assert_eq!((r.candidates.len(), r.output_tokens), (3, 0));
        let c = &r.candidates[2];
        assert_eq!((c.text.as_str(), c.source, c.kept), (prompt, Source::Input, 1.0));
        assert!(c.reason.as_ref().unwrap().contains("vocabulary"));
    }
    let c = first("a dog’s “bed”", &["a dog's \"bed\", 8k"]);
    assert_eq!((c.text.as_str(), c.source, c.kept), ("a dog's \"bed\", 8k", Source::Model, 1.0));
}

#[test]
fn long_prompts_come_back_whole() {
    let prompt = "an old wizard with a long silver beard reading a heavy leather book beside a \
        tall candle in a stone tower";
    let said = "an old wizard in a tower, wizardd, leatherly, soft light, a heavy storm, 8k, tren";
    let mut rewriting =
        Rewriting::new(prompter(), prompt, warm(1), GuardOptions::default()).unwrap();
    assert_eq!(rewriting.work().unwrap().len(), 1);
    rewriting.take(&[completed(&[said.to_owned()], FinishReason::Length)]);
    assert!(rewriting.work().unwrap().is_empty(), "it left out too much to try again");
    let c = rewriting.finish().candidates.remove(0);
    assert_eq!(
        c.text,
        format!("{prompt}, soft light, 8k"),
        "nothing misspelt, cut off, or about the same things"
    );
    assert!(
        c.kept == 1.0 && c.source == Source::Phrases && c.reason.unwrap().contains("missing: ")
    );
}

#[test]
fn banned_phrases_leave_the_prompt_first() {
    let mut options = warm(1);
    options.ban = Arc::new(Phrases::new(["greg rutkowski", "art"]));
    let prompt = "a cat, by greg rutkowski, (art:1.2), <lora:art:1>, night";
    let r = rewrite(prompt, &["a cat, by, night, 8k"], options.clone(), GuardOptions::default());
    assert_eq!(
        (r.candidates[0].text.as_str(), r.candidates[0].kept),
        ("a cat, by, night, 8k", 1.0)
    );
    let error = Rewriting::new(prompter(), "Art, ART", options, GuardOptions::default())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("nothing but banned phrases"));
}

#[test]
fn what_says_nothing_comes_back_as_it_is() {
    for prompt in ["{", "__", ",,,,", "(((", "!?", "[], ()"] {
        let c = first(prompt, &["a castle, highly detailed"]);
        assert_eq!((c.text.as_str(), c.source), (prompt, Source::Input), "{c:?}");
    }
}

/// Whatever the model would make of a bracket that it never saw.
#[test]
fn brackets_that_stand_alone_come_back() {
    for bracket in ["{", "}", "(", "[", ">", "([", "<"] {
        let prompt = format!("a cat, {bracket}, night");
        let mut rewriting =
            Rewriting::new(prompter(), &prompt, warm(1), GuardOptions::default()).unwrap();
        let work = rewriting.work().unwrap();
        assert_eq!(
            work[0].0,
            prompter().encode("a cat, night").unwrap(),
            "the model does not see it"
        );
        rewriting.take(&[completed(&["a cat at night, 8k".to_owned()], FinishReason::Stop)]);
        let c = rewriting.finish().candidates.remove(0);
        let expected = (format!("a cat at night, 8k, {bracket}"), Source::Model, 1.0);
        assert_eq!((c.text, c.source, c.kept), expected);
    }
    let c = first("a cat, {, <lora:x:1>", &["a cat, 8k"]);
    assert_eq!((c.text.as_str(), c.source), ("a cat, 8k, { <lora:x:1>", Source::Model));
    // a model's own bracket would close it
    let c = first("a cat, )", &["a cat, (masterpiece, 8k"]);
    assert_eq!((c.text.as_str(), c.kept), ("a cat, ), 8k", 1.0));
    let c = first("a cat, {", &["a cat, 8k}"]);
    assert_eq!((c.text.as_str(), c.source, c.kept), ("a cat, 8k}, {", Source::Model, 1.0));
}

#[test]
fn phrases_to_keep_are_checked_in_what_is_returned() {
    let mut options = warm(1);
    options.keep = Arc::new(Literals::new(["f/1.8", "AT&T", "<lora:x:1>", "100 mph"]));
    let guard = GuardOptions { max_clip_tokens: Some(24), ..GuardOptions::default() };
    let said =
        "a cat, at&t, 100 mphan, f 1.8, highly detailed, digital painting, intricate, sharp focus";
    let c = rewrite("a cat", &[said], options.clone(), guard).candidates.remove(0);
    assert!(options.keep.missing(&c.text).is_empty(), "{}", c.text);
    assert!(c.clip_tokens.unwrap() <= 24 && c.text.starts_with("a cat,"), "{c:?}");
}

fn hostile(most: usize) -> impl Strategy<Value = String> {
    let pieces = "cat cats red two one no without under on art greg rutkowski 8k (cat:1.2) \
        (art:1.1) ( ) [ ] { } | {a|b} [a:b:0.5] [night] \
                  __w__ <lora:x:1> <lora:art:1> <lora: BREAK AND : ; \" ' ’ \\ \u{fe0f} 🐱 \
                  ß é 猫 кот \u{a0} \u{fffd} 100 mph 1.8";
    let pieces: Vec<String> =
        pieces.split(' ').filter(|p| !p.is_empty()).map(str::to_owned).collect();
    let piece =
        prop_oneof![8 => prop::sample::select(pieces), 1 => any::<char>().prop_map(String::from)];
    prop::collection::vec((piece, prop::sample::select(vec!["", " ", " ", ", "])), 1..most)
        .prop_map(|v| v.into_iter().map(|(piece, space)| piece + space).collect())
}

fn some_of(list: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(list, 0..=list.len().min(2))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_candidate_is_what_it_says(
        prompt in hostile(14),
        texts in prop::collection::vec(hostile(14), 12),
        keep in some_of(&[
            "film grain", "100 mph", "f/1.8", "<lora:x:1>", "(blue:1.3)", "🐱", "cat",
        ]),
        ban in some_of(&["art", "greg rutkowski", "red cat", "8k"]),
        min_kept in prop::sample::select(vec![None, Some(0.5), Some(0.9), Some(1.0)]),
        max_clip_tokens in prop::sample::select(vec![None, Some(3), Some(12), Some(30)]),
        (n, rounds, cut) in (1u32..4, 1u32..4, any::<bool>()),
    ) {
        let mut options = warm(n);
        options.keep = Arc::new(Literals::new(&keep));
        options.ban = Arc::new(Phrases::new(&ban));
        let guard = GuardOptions { min_kept, rounds, max_clip_tokens, ..GuardOptions::default() };
        let Ok(mut rewriting) = Rewriting::new(prompter(), &prompt, options.clone(), guard) else {
            let left = without_banned(prompt.trim(), &options.ban);
            prop_assert!(prompt.trim().is_empty() || left.is_empty());
            return Ok(());
        };
        let (streams, wanted) = (rewriting.streams(), rewriting.wanted.clone());
        let mut texts = texts.iter().cycle();
        for round in 0.. {
            let work = rewriting.work().unwrap();
            if work.is_empty() {
                break;
            }
            prop_assert!(round < rounds);
            let finish = if cut { FinishReason::Length } else { FinishReason::Stop };
            let mut some = || (0..n).map(|_| texts.next().unwrap().clone()).collect::<Vec<_>>();
            let said: Vec<Completed> =
                work.iter().map(|_| completed(&some(), finish)).collect();
            rewriting.take(&said);
        }
        let candidates = rewriting.finish().candidates;
        prop_assert_eq!(candidates.len(), n as usize);
        for c in candidates {
            let reason = c.reason.clone().unwrap_or_default();
            let (kept, missing) = Fidelity::default().score(&wanted, &c.text);
            prop_assert_eq!((c.kept, &c.missing), (kept, &missing));
            prop_assert!(prompt.contains('\u{fffd}') || !c.text.contains('\u{fffd}'), "{:?}", c);
            prop_assert!(c.source == Source::Model || !reason.is_empty(), "{:?}", c);
            prop_assert!(c.source == Source::Model || kept == 1.0, "{:?}", c);
            let missing = options.keep.missing(&c.text);
            let told = ["lacks", "kept", "CLIP"].iter().any(|word| reason.contains(word));
            prop_assert!(missing.is_empty() || told, "{:?}", c);
            let banned = options.ban.find(&c.text);
            prop_assert!(banned.is_none() || !reason.is_empty(), "{:?}", c);
            prop_assert!(min_kept.is_none_or(|least| kept >= least), "{:?}", c);
            if let (Some(most), Some(clip)) = (max_clip_tokens, c.clip_tokens) {
                prop_assert_eq!(clip, longest_part(&c.text), "{:?}", c);
                prop_assert!(clip <= most || reason.contains("CLIP tokens"), "{:?}", c);
            }
            prop_assert!(!streams || c.source == Source::Model);
        }
    }
}
