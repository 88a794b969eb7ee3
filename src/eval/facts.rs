//! What survives of the single facts that a prompt states, by kind.
//!
//! A file of facts is JSON lines (or an array) of `{"prompt": "...", "facts": [{"kind":
//! "attribute", "keywords": ["cat", "black"]}]}`. A keyword is one or more words; `==3` is a
//! number. Other fields are not looked at. Facts are made by people or programs that reword: one
//! whose keywords the prompt itself does not say in so many words cannot be looked for, and is only
//! counted.

use crate::data::records;
use crate::error::{Error, Result};
use crate::rewrite::Fidelity;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The kind under which all facts are summed up.
const ALL: &str = "all";

/// A prompt and what it states.
#[derive(Clone, Debug, Deserialize)]
pub struct Facts {
    /// The plain prompt.
    pub prompt: String,
    /// The facts that it states.
    pub facts: Vec<Fact>,
}

/// What is said of one thing, or of a few.
#[derive(Clone, Debug, Deserialize)]
pub struct Fact {
    /// Such as entity, attribute, relation, global.
    pub kind: String,
    /// What a text must say to state the fact: one or more words each.
    pub keywords: Vec<String>,
}

/// Facts of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KindOfFact {
    /// The kind's name; `all` for the sum of all kinds.
    pub kind: String,
    /// Facts of the kind.
    pub facts: usize,
    /// Those whose keywords the prompts say.
    pub stated: usize,
    /// Those of them whose keywords the rewrites say too.
    pub kept: usize,
    /// The part of the stated facts that is kept; 1 if there are none.
    pub share: f64,
}

/// Reads a file of facts.
///
/// # Errors
///
/// Fails if the file cannot be read or one of its values is not a prompt with its facts.
pub fn read_facts(path: &Path) -> Result<Vec<Facts>> {
    let read = |(place, value)| {
        let expected =
            "expected \"prompt\" and \"facts\", each fact with \"kind\" and \"keywords\"";
        serde_json::from_value(value)
            .map_err(|e| Error::file(path, format!("{place}: {e}; {expected}")))
    };
    records::values(path)?.into_iter().map(read).collect()
}

/// Counts facts by kind, in the order in which kinds first come, and then all together.
pub fn count_facts<'a>(
    rewrites: impl IntoIterator<Item = (&'a Facts, &'a str)>,
) -> Vec<KindOfFact> {
    let fidelity = Fidelity::default();
    let empty =
        |kind: &str| KindOfFact { kind: kind.to_owned(), facts: 0, stated: 0, kept: 0, share: 1.0 };
    let (mut kinds, mut all): (Vec<KindOfFact>, KindOfFact) = (vec![], empty(ALL));
    for (facts, output) in rewrites {
        for fact in &facts.facts {
            let stated = says(&fidelity, &facts.prompt, fact);
            let survives = stated && says(&fidelity, output, fact);
            let i = kinds.iter().position(|k| k.kind == fact.kind).unwrap_or_else(|| {
                kinds.push(empty(&fact.kind));
                kinds.len() - 1
            });
            for k in [&mut kinds[i], &mut all] {
                k.facts += 1;
                k.stated += usize::from(stated);
                k.kept += usize::from(survives);
            }
        }
    }
    kinds.push(all);
    for k in &mut kinds {
        k.share = if k.stated > 0 { k.kept as f64 / k.stated as f64 } else { 1.0 };
    }
    kinds
}

/// Whether a text says all keywords of a fact.
fn says(fidelity: &Fidelity, text: &str, fact: &Fact) -> bool {
    fact.keywords
        .iter()
        .all(|keyword| fidelity.score(keyword.trim_start_matches('='), text).0 == 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_counted_by_kind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("facts.jsonl");
        let line = r#"{"id": 7, "prompt": "three black hens beside a wooden gate", "facts": [
            {"kind": "entity", "detail": "whole", "keywords": ["hens"]},
            {"kind": "entity", "keywords": ["gate"]},
            {"kind": "attribute", "keywords": ["hen's", "black"]},
            {"kind": "attribute", "keywords": ["gate", "wood"]},
            {"kind": "relation", "keywords": ["hens", "gate", "beside"]},
            {"kind": "count", "keywords": ["hens", "==3"]}]}"#;
        std::fs::write(&path, line.replace('\n', "")).unwrap();
        let facts = read_facts(&path).unwrap();
        let count = |output: &str| {
            let kinds = count_facts(facts.iter().map(|f| (f, output)));
            kinds.into_iter().map(|k| (k.kind, k.facts, k.stated, k.kept)).collect::<Vec<_>>()
        };
        for (output, kept) in [
            ("3 black hens beside a wooden gate, 8k", [2, 1, 1, 1, 5]),
            ("two black hens in the sun", [1, 1, 0, 0, 2]),
        ] {
            // "wood" is not what the prompt says
            let stated = [
                ("entity", 2, 2),
                ("attribute", 2, 1),
                ("relation", 1, 1),
                ("count", 1, 1),
                ("all", 6, 5),
            ];
            let expected = stated
                .into_iter()
                .zip(kept)
                .map(|((k, facts, stated), kept)| (k.into(), facts, stated, kept));
            assert_eq!(
                count(output),
                expected.collect::<Vec<(String, usize, usize, usize)>>(),
                "{output}"
            );
        }
        std::fs::write(&path, r#"{"prompt": "a hen", "facts": [{"kind": "entity"}]}"#).unwrap();
        let error = read_facts(&path).unwrap_err().to_string();
        assert!(error.contains("line 1: missing field `keywords`"), "{error}");
    }
}
