//! Texts that a rewrite must hold to the letter.

/// A list of texts, each looked for byte for byte and not as a part of a longer word or number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Literals(Vec<String>);

impl Literals {
    /// White space is one space each time, because results are lines. Empty texts and repetitions
    /// are left out.
    pub fn new<S: AsRef<str>>(list: impl IntoIterator<Item = S>) -> Literals {
        let mut seen = std::collections::HashSet::new();
        let list =
            list.into_iter().map(|s| s.as_ref().split_whitespace().collect::<Vec<_>>().join(" "));
        Literals(list.filter(|s| !s.is_empty() && seen.insert(s.clone())).collect())
    }

    /// Whether there are no texts.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The texts, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Those that `text` does not hold.
    pub fn missing(&self, text: &str) -> Vec<String> {
        self.0.iter().filter(|s| !holds(text, s)).cloned().collect()
    }
}

/// Whether `literal` stands in `text` with nothing grown onto it.
fn holds(text: &str, literal: &str) -> bool {
    let (first, last) = (literal.chars().next(), literal.chars().next_back());
    let mut from = 0;
    // one that overlaps with the one before counts
    while let Some(at) = text[from..].find(literal).map(|n| from + n) {
        let (before, after) = (&text[..at], &text[at + literal.len()..]);
        if !grows(last, after.chars()) && !grows(first, before.chars().rev()) {
            return true;
        }
        from = at + first.map_or(1, char::len_utf8);
    }
    false
}

/// Whether the characters beyond an edge go on with its word or its number.
fn grows(edge: Option<char>, mut beyond: impl Iterator<Item = char>) -> bool {
    let (Some(edge), Some(next)) = (edge, beyond.next()) else { return false };
    if !edge.is_alphanumeric() {
        return false;
    }
    // "1.8" does not stand in "11.8", nor "3" in "3.5"
    next.is_alphanumeric()
        || next == '_'
        || (edge.is_numeric()
            && matches!(next, '.' | ',')
            && beyond.next().is_some_and(char::is_numeric))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_held_byte_for_byte_and_whole() {
        for (literal, text, held) in [
            ("100 mph", "a car, 100 mph", true),
            ("100 mph", "a car, 100 mphan", false),
            ("100 mph", "a car, 1100 mph, fast", false),
            ("a a", "xa a a", true),
            ("car", "carpet, scar, racecar", false),
            ("car", "a (car:1.2)", true),
            ("car", "a Car", false),
            ("f/1.8", "at f/1.8, bokeh", true),
            ("f/1.8", "at f/1.85", false),
            ("f/1.8", "at f 1.8", false),
            ("AT&T", "the AT&T tower", true),
            ("AT&T", "the at&t tower", false),
            ("<lora:x:1>", "a cat<lora:x:1>night", true),
            ("(blue:1.3)", "(blue:1.3)", true),
            ("3", "3.5 cats", false),
            ("3", "3. a cat", true),
            ("🐱", "a 🐱🌧 day", true),
            ("straße", "eine straßen", false),
        ] {
            assert_eq!(
                Literals::new([literal]).missing(text).is_empty(),
                held,
                "{literal} in {text}"
            );
        }
    }

    #[test]
    fn lists_are_tidied() {
        let l = Literals::new(["  film \n grain ", "", "film grain", " "]);
        assert_eq!(l.iter().collect::<Vec<_>>(), ["film grain"]);
        assert!(Literals::new([""; 2]).is_empty());
    }
}
