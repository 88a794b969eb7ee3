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

/// The place of the plain prompt.
const PLACE: &str = "{raw}";

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
