//! Pairs from plain lists of prompts.

use beautiful_prompt::data::pairs::{PairOptions, make_pairs};
use beautiful_prompt::data::phrases::StylePhrases;
use beautiful_prompt::data::records::{Pair, read_pairs, read_prompts, write_pairs};
use beautiful_prompt::data::tails::TailLimits;
use beautiful_prompt::eval::variety::variety;
use beautiful_prompt::models::embedded;
use beautiful_prompt::random::PhiloxStream;
use beautiful_prompt::text::artists::names_artist;
use beautiful_prompt::text::content_words::{ContentWords, words};
use beautiful_prompt::text::mediums::Mediums;
use std::collections::{HashMap, HashSet};

/// Plain and rich prompts over a small vocabulary of our own.
fn prompts() -> Vec<String> {
    let subjects = [
        "lighthouse",
        "sailor",
        "fox",
        "harbour",
        "clockmaker",
        "glass tower",
        "market",
        "orchard",
    ];
    let places = [
        "on a cliff",
        "in the fog",
        "under the northern lights",
        "beside a frozen lake",
        "at dawn",
    ];
    let styles = [
        "highly detailed, digital painting, concept art, sharp focus, cinematic lighting, \
            octane render",
        "oil painting, intricate, soft light, vibrant colors, trending on artstation, masterpiece",
        "photorealistic, studio lighting, 8k, depth of field, award winning photography",
    ];
    let mut all = Vec::new();
    for (i, s) in subjects.iter().enumerate() {
        for (j, p) in places.iter().enumerate() {
            all.push(format!(
                "a beautiful painting of a {s} {p}, small boats nearby, {}",
                styles[(i + j) % 3]
            ));
            all.push(format!("A {s} {p} with {} windows", i * 5 + j));
        }
    }
    all.push(all[0].clone());
    all.push("see https://example.com, highly detailed, 8k".into());
    all
}

/// No limits to what so few prompts can lend.
fn options() -> PairOptions {
    let limits = TailLimits { phrase: 1.0, artists: 1.0, artist: 1.0 };
    PairOptions {
        min_tokens: 5,
        short_tokens: 5,
        validation: 0.3,
        borrow: 2,
        limits,
        ..PairOptions::default()
    }
}

/// Photos, paintings and renders of the same things, some of which contradict themselves, many by
/// one artist.
fn mixed_prompts() -> Vec<String> {
    let subjects =
        ["lighthouse", "sailor", "fox", "harbour", "clockmaker", "market", "orchard", "bridge"];
    let places = [
        "on a cliff",
        "in the fog",
        "beside a frozen lake",
        "at dawn",
        "behind the mill",
        "in the snow",
    ];
    let media = [
        "dslr, shallow depth of field, film grain, digital painting, professional photography, \
        soft lighting, bokeh",
        "oil painting, intricate, vibrant colors, highly detailed, smooth, dramatic lighting, oil \
        on canvas",
        "digital painting, concept art, sharp focus, trending on artstation, masterpiece, rim \
        light, matte painting",
        "octane render, unreal engine, ray tracing, highly detailed, ambient occlusion, 8k, \
        volumetric lighting",
    ];
    let artists = ["", ", art by wlop", ", art by wlop", ""];
    let lead = ["a photo of", "a painting of", "", ""];
    let mut all = Vec::new();
    for (i, s) in subjects.iter().enumerate() {
        for (j, p) in places.iter().enumerate() {
            for (k, m) in media.iter().enumerate() {
                // in an order of its own, or all would be one group of similar prompts
                let mut phrases: Vec<&str> = m.split(", ").collect();
                PhiloxStream::new(7, all.len() as u64).shuffle(&mut phrases);
                let style = phrases[..5].join(", ");
                all.push(
                    format!("{} a {s} {p} {k}{i}{j}, {style}{}", lead[k], artists[k])
                        .trim()
                        .to_owned(),
                );
            }
            all.push(format!("photo of a {s} {p} with {} doors", 7 * i + j));
        }
    }
    all
}

#[test]
fn targets_name_no_media_that_exclude_each_other() {
    let made =
        make_pairs(&mixed_prompts(), &StylePhrases::default(), &embedded::tokenizer(), &options());
    let all: Vec<&Pair> = made.train.iter().chain(&made.validation).collect();
    let mediums = Mediums::built_in();
    let (photo, mut photos, mut named) = (mediums.named("photo").unwrap(), 0, 0);
    for p in &all {
        assert!(!mediums.contradicts(&p.prompt), "{p:?}");
        if mediums.of(&p.raw_prompt) == Some(photo) {
            photos += 1;
            assert_eq!(mediums.of(&p.prompt), Some(photo), "{p:?}");
        }
        named += usize::from(mediums.of(&p.raw_prompt).is_some());
    }
    assert!(
        all.len() > 100 && photos > 20 && named > photos,
        "{} {photos} {named} {:?}",
        all.len(),
        made.counts
    );
    let v = variety(all.iter().map(|p| (p.raw_prompt.as_str(), p.prompt.as_str())));
    assert_eq!((v.contradictions, v.photo_and_painting), (0.0, 0.0));
}

#[test]
fn worn_phrases_and_artists_keep_to_their_shares() {
    let make = |limits| {
        let options = PairOptions { limits, min_added: 4, ..options() };
        make_pairs(&mixed_prompts(), &StylePhrases::default(), &embedded::tokenizer(), &options)
            .train
    };
    let free = make(TailLimits { phrase: 1.0, artists: 1.0, artist: 1.0 });
    let held = make(TailLimits { phrase: 0.1, artists: 0.05, artist: 0.05 });
    let most = |pairs: &[Pair]| {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        pairs
            .iter()
            .flat_map(|p| p.prompt.split(", ").skip(1))
            .for_each(|t| *counts.entry(t).or_default() += 1);
        counts.into_values().max().unwrap_or(0)
    };
    let artists = |pairs: &[Pair]| pairs.iter().filter(|p| names_artist(&p.prompt)).count();
    // the shares are counted over all pairs made, and 300 to begin with
    let made = 300 + 1000;
    assert!(
        most(&free) > made / 10 && artists(&free) > made / 20,
        "{} {}",
        most(&free),
        artists(&free)
    );
    assert!(
        most(&held) <= made / 10 && artists(&held) <= made / 20,
        "{} {}",
        most(&held),
        artists(&held)
    );
    assert!(artists(&make(TailLimits { phrase: 1.0, artists: 0.0, artist: 1.0 })) == 0);
    assert!(!held.is_empty());
}

#[test]
fn rich_sides_hold_every_word_of_plain_sides_and_more() {
    let made = make_pairs(&prompts(), &StylePhrases::default(), &embedded::tokenizer(), &options());
    let content = ContentWords::default();
    let all: Vec<&Pair> = made.train.iter().chain(&made.validation).collect();
    assert!(all.len() > 40, "{:?}", made.counts);
    for p in &all {
        assert_eq!(content.kept(&p.raw_prompt, &p.prompt), 1.0, "{p:?}");
        assert!(words(&p.prompt).len() >= words(&p.raw_prompt).len() + 10, "{p:?}");
    }
    let derived = all.iter().filter(|p| p.other["kind"] == "derived");
    let raws: HashSet<&str> = derived.map(|p| p.raw_prompt.as_str()).collect();
    assert!(raws.contains("a lighthouse on a cliff"), "{raws:?}");
    assert!(raws.contains("a lighthouse on a cliff, small boats nearby"), "{raws:?}");
    assert!(!raws.iter().any(|r| r.contains("detailed") || r.contains("painting")), "{raws:?}");
    let count = |name: &str| made.counts.iter().find(|c| c.0 == name).map_or(0, |c| c.1);
    assert_eq!(count("dropped: exact duplicate"), 1);
    assert_eq!(count("dropped: links or flags inside"), 1);
}

#[test]
fn the_same_input_gives_the_same_pairs_and_validation_does_not_leak() {
    let make =
        || make_pairs(&prompts(), &StylePhrases::default(), &embedded::tokenizer(), &options());
    let (a, b) = (make(), make());
    assert_eq!((&a.train, &a.validation), (&b.train, &b.validation));
    assert!(!a.validation.is_empty());
    let subjects: HashSet<Vec<String>> = a.train.iter().map(|p| words(&p.raw_prompt)).collect();
    for p in &a.validation {
        assert!(!subjects.contains(&words(&p.raw_prompt)), "{p:?}");
    }
}

#[test]
fn style_only_targets_invent_no_details() {
    let options = PairOptions { style_only: true, borrow: 0, ..options() };
    let made = make_pairs(&prompts(), &StylePhrases::default(), &embedded::tokenizer(), &options);
    let (mut with, mut without) = (0, 0);
    for p in made.train.iter().chain(&made.validation) {
        assert_eq!(p.raw_prompt.contains("boats"), p.prompt.contains("boats"), "{p:?}");
        *(if p.prompt.contains("boats") { &mut with } else { &mut without }) += 1;
    }
    assert!(with > 0 && without > 0);
}

#[test]
fn records_keep_their_other_fields_in_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"[{"raw_prompt": "a fox", "prompt": "a fox, 8k", "pick_score": 20.5}]"#;
    let array = folder.path().join("a.json");
    std::fs::write(&array, text).unwrap();
    let pairs = read_pairs(&array).unwrap();
    assert_eq!(pairs[0].other["pick_score"], 20.5);
    for name in ["b.jsonl", "c.json"] {
        let path = folder.path().join(name);
        write_pairs(&path, &pairs).unwrap();
        assert_eq!(read_pairs(&path).unwrap(), pairs);
    }
    assert_eq!(read_prompts(&array).unwrap(), ["a fox, 8k"]);
    let bad = folder.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"raw_prompt\": \"a\", \"prompt\": \"b\"}\n{\"raw_prompt\": 3}\n")
        .unwrap();
    assert!(read_pairs(&bad).unwrap_err().to_string().contains("line 2"));
    std::fs::write(&bad, b"ok\n\xff\n").unwrap();
    assert!(read_pairs(&bad).unwrap_err().to_string().contains("line 2 is not UTF-8"));
}
