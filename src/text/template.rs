//! The text that a plain prompt is put into.

use crate::error::{Error, Result};
use std::path::Path;

/// BeautifulPrompt's first template. Training on it once left a space after `Output:`; here, as at
/// inference, the target brings its own, so that its first token is trained too.
pub const V1: &str = "Instruction: Give a simple description of the image to generate a drawing \
    prompt.\nInput: {raw}\nOutput:";

/// The second version's template.
pub const V2: &str = "Converts a simple image description into a prompt. \
Prompts are formatted as multiple related tags separated by commas, plus you can use () to \
increase the weight, \
[] to decrease the weight, or use a number to specify the weight. You should add appropriate words \
to make the \
images described in the prompt more aesthetically pleasing, but make sure there is a correlation \
between the \
input and output.\n### Input: {raw}\n### Output:";

/// What the reference's aesthetic reward model reads: the rich prompt alone.
pub const AESTHETIC: &str = "{prompt}";

/// What the reference's reward model of PickScore reads.
pub const PICKSCORE: &str = "Input: {raw}\nOutput: {prompt}";

/// The place of the plain prompt.
const PLACE: &str = "{raw}";
/// The place of the rich prompt, in a reward model's template.
const PROMPT_PLACE: &str = "{prompt}";

/// A template with one `{raw}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    before: String,
    after: String,
}

impl Template {
    /// `v1`, `v2`, or the path of a file that holds a template.
    pub fn named(name: &str) -> Result<Template> {
        match name {
            "v1" => Ok(Template::parse(V1).expect("the built-in template has its place")),
            "v2" => Ok(Template::parse(V2).expect("the built-in template has its place")),
            file => Template::read(Path::new(file)),
        }
    }

    /// Reads a template from a file, without the line's end that may follow it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, is not UTF-8, or does not hold `{raw}` exactly once.
    pub fn read(path: &Path) -> Result<Template> {
        let bytes = crate::files::read(
            path,
            "does not exist; --template takes v1, v2 or a file with {raw} in it",
        )?;
        let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8 text"))?;
        Template::parse(text.strip_suffix('\n').unwrap_or(&text)).map_err(|e| Error::file(path, e))
    }

    /// Takes a text with one `{raw}` as a template; the error says what is wrong with it.
    pub fn parse(text: &str) -> std::result::Result<Template, String> {
        match text.split_once(PLACE) {
            Some((before, after)) if !after.contains(PLACE) => {
                Ok(Template { before: before.into(), after: after.into() })
            }
            Some(_) => Err(format!("holds {PLACE} more than once")),
            None => Err(format!("does not hold {PLACE}, the place of the plain prompt")),
        }
    }

    /// Puts a plain prompt into the template, without white space around it.
    pub fn apply(&self, raw: &str) -> String {
        format!("{}{}{}", self.before, raw.trim(), self.after)
    }

    /// The template as it was written, with its `{raw}`.
    pub fn text(&self) -> String {
        format!("{}{PLACE}{}", self.before, self.after)
    }
}

/// What a reward model reads: a template with one `{prompt}` and at most one `{raw}` before it.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardTemplate {
    /// What the plain prompt is put into, if it is read.
    raw: Option<Template>,
    before: String,
    after: String,
}

impl RewardTemplate {
    /// `aesthetic`, `pickscore`, or the path of a file that holds a template.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or is no template.
    pub fn named(name: &str) -> Result<RewardTemplate> {
        match name {
            "aesthetic" => Ok(RewardTemplate::parse(AESTHETIC).expect("it has its place")),
            "pickscore" => Ok(RewardTemplate::parse(PICKSCORE).expect("it has its places")),
            file => RewardTemplate::read(Path::new(file)),
        }
    }

    /// Reads a template from a file, without the line's end that may follow it.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is not UTF-8, or lacks its place.
    pub fn read(path: &Path) -> Result<RewardTemplate> {
        let bytes = crate::files::read(
            path,
            "does not exist; expected aesthetic, pickscore or a file with {prompt} in it",
        )?;
        let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8 text"))?;
        let text = text.strip_suffix('\n').unwrap_or(&text);
        RewardTemplate::parse(text).map_err(|e| Error::file(path, e))
    }

    /// Takes a text with its places as a template; the error says what is wrong with it.
    pub fn parse(text: &str) -> std::result::Result<RewardTemplate, String> {
        let (before, after) = match text.split_once(PROMPT_PLACE) {
            Some((before, after)) if !after.contains(PROMPT_PLACE) => (before, after),
            Some(_) => return Err(format!("holds {PROMPT_PLACE} more than once")),
            None => {
                return Err(format!(
                    "does not hold {PROMPT_PLACE}, the place of the text to score"
                ));
            }
        };
        if after.contains(PLACE) {
            return Err(format!("holds {PLACE} behind {PROMPT_PLACE}; expected it before"));
        }
        let raw = before.contains(PLACE).then(|| Template::parse(before)).transpose()?;
        Ok(RewardTemplate { raw, before: before.into(), after: after.into() })
    }

    /// Whether a text is scored together with the plain prompt that it was made of.
    pub fn reads_raw_prompt(&self) -> bool {
        self.raw.is_some()
    }

    /// Puts a rich prompt into the template, and the plain one if it is read; without white space
    /// around either.
    pub fn apply(&self, raw: &str, prompt: &str) -> String {
        let before = match &self.raw {
            Some(template) => template.apply(raw),
            None => self.before.clone(),
        };
        format!("{before}{}{}", prompt.trim(), self.after)
    }

    /// The template as it was written, with its places.
    pub fn text(&self) -> String {
        format!("{}{PROMPT_PLACE}{}", self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reward_templates_have_their_places() {
        let both = RewardTemplate::named("pickscore").unwrap();
        assert!(both.reads_raw_prompt());
        assert_eq!(both.apply(" a cat ", "a cat, {raw} "), "Input: a cat\nOutput: a cat, {raw}");
        let alone = RewardTemplate::named("aesthetic").unwrap();
        assert_eq!(alone.apply("a cat", " a dog"), "a dog");
        assert_eq!(RewardTemplate::parse(&both.text()).unwrap(), both);
        for (bad, why) in [
            ("{raw}", "does not hold"),
            ("{prompt}{prompt}", "more than once"),
            ("{prompt} {raw}", "behind"),
            ("{raw}{raw}{prompt}", "more than once"),
        ] {
            let e = RewardTemplate::parse(bad).unwrap_err();
            assert!(e.contains(why), "{bad}: {e}");
        }
    }
}
