//! Lines that a scorer answers, put into the order of the rewrites.

use super::one_line;
use serde::Deserialize;

#[derive(Deserialize)]
struct Answer {
    id: u64,
    score: f64,
}

/// The answers to a batch of rewrites whose ids follow each other from `first` on.
pub(super) struct Answers {
    first: u64,
    scores: Vec<Option<f64>>,
    taken: usize,
    /// Whether the lines are objects with ids, once there is one.
    with_ids: Option<bool>,
}

impl Answers {
    pub(super) fn new(first: u64, count: usize) -> Answers {
        Answers { first, scores: vec![None; count], taken: 0, with_ids: None }
    }

    /// The scores in order, once there is one for each rewrite.
    pub(super) fn complete(&self) -> Option<Vec<f64>> {
        if self.taken < self.scores.len() { None } else { self.scores.iter().copied().collect() }
    }

    /// How far it is, for errors.
    pub(super) fn progress(&self) -> String {
        format!("after {} of {} answers", self.taken, self.scores.len())
    }

    /// Takes a line; the error says what is wrong with it.
    pub(super) fn take(&mut self, line: &[u8]) -> Result<(), String> {
        if self.taken == self.scores.len() {
            return Err(format!(
                "answered one more line than the {} it was asked for, `{}`",
                self.taken,
                one_line(&String::from_utf8_lossy(line))
            ));
        }
        let number = self.taken + 1;
        let text = std::str::from_utf8(line)
            .map_err(|_| format!("line {number} of its answers is not UTF-8 text"))?
            .trim();
        let with_ids = text.starts_with('{');
        if *self.with_ids.get_or_insert(with_ids) != with_ids {
            return Err(format!(
                "line {number} of its answers is `{}`, expected all lines with ids or none",
                one_line(text)
            ));
        }
        let (index, score) = if with_ids { self.object(text) } else { self.number(text) }?;
        self.scores[index] = Some(score);
        self.taken += 1;
        Ok(())
    }

    /// A score with its rewrite's id.
    fn object(&self, text: &str) -> Result<(usize, f64), String> {
        let answer: Answer =
            serde_json::from_str(text).map_err(|e| self.unexpected(text, &format!(" ({e})")))?;
        let (id, count) = (answer.id, self.scores.len());
        let last = self.first + (count as u64 - 1);
        let index = id
            .checked_sub(self.first)
            .and_then(|i| usize::try_from(i).ok())
            .filter(|i| *i < count)
            .ok_or_else(|| {
                format!("answered id {id}, expected the ids {} to {last} of this batch", self.first)
            })?;
        match self.scores[index] {
            Some(_) => Err(format!("answered id {id} twice, expected each id once")),
            None => Ok((index, answer.score)),
        }
    }

    /// A bare score, which is the next rewrite's.
    fn number(&self, text: &str) -> Result<(usize, f64), String> {
        match text.parse::<f64>() {
            Ok(score) if score.is_finite() => Ok((self.taken, score)),
            _ => Err(self.unexpected(text, "; what is no answer belongs on standard error")),
        }
    }

    fn unexpected(&self, text: &str, more: &str) -> String {
        format!(
            "line {} of its answers is `{}`, expected {{\"id\": {}, \"score\": NUMBER}} or a bare \
             number, which is finite{more}",
            self.taken + 1,
            one_line(text),
            self.first + self.taken as u64
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(lines: &[&str]) -> Result<Option<Vec<f64>>, String> {
        let mut answers = Answers::new(10, 3);
        for line in lines {
            answers.take(line.as_bytes())?;
        }
        Ok(answers.complete())
    }

    #[test]
    fn ids_come_in_any_order_and_bare_numbers_in_theirs() {
        let lines = [
            r#"{"id": 12, "score": 3}"#,
            r#"{"score": 1.5, "id": 10, "why": "x"}"#,
            r#" {"id": 11, "score": -2e-3}"#,
        ];
        assert_eq!(take(&lines), Ok(Some(vec![1.5, -2e-3, 3.0])));
        assert_eq!(take(&lines[..2]), Ok(None));
        assert_eq!(take(&["1", "-0.5\r", ".25"]), Ok(Some(vec![1.0, -0.5, 0.25])));
    }

    #[test]
    fn wrong_lines_are_named() {
        for (lines, expected) in [
            (&["nan"][..], "line 1 of its answers is `nan`, expected"),
            (&["1", "inf"], "line 2 of its answers is `inf`, expected"),
            (&["loading model"], "belongs on standard error"),
            (&[""], "line 1 of its answers is ``, expected"),
            (&[r#"{"id": 10, "score": NaN}"#], "expected {\"id\": 10, \"score\": NUMBER}"),
            (&[r#"{"id": 10, "score": 1e999}"#], "number out of range"),
            (&[r#"{"id": 10, "score": "1"}"#], "expected f64"),
            (&[r#"{"id": 10, "score": null}"#], "expected f64"),
            (&[r#"{"id": 10}"#], "missing field `score`"),
            (&[r#"{"id": -1, "score": 1}"#], "expected u64"),
            (&[r#"{"id": 9, "score": 1}"#], "answered id 9, expected the ids 10 to 12"),
            (&[r#"{"id": 13, "score": 1}"#], "answered id 13, expected the ids 10 to 12"),
            (&[r#"{"id": 11, "score": 1}"#; 2], "answered id 11 twice"),
            (&["1", "2", "3", "4"], "answered one more line than the 3 it was asked for, `4`"),
            (&[r#"{"id": 11, "score": 1}"#, "1"], "expected all lines with ids or none"),
        ] {
            let error = take(lines).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{lines:?}: {error}");
        }
        let error = Answers::new(0, 1).take(b"\xff").unwrap_err();
        assert_eq!(error, "line 1 of its answers is not UTF-8 text");
    }

    proptest! {
        #[test]
        fn no_line_is_a_panic(first in 0u64..99, line in prop::collection::vec(0u8.., 0..40)) {
            let mut answers = Answers::new(first, 2);
            let _ = answers.take(&line);
            prop_assert!(answers.complete().is_none());
        }
    }
}
