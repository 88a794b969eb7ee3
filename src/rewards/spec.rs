//! What a user writes to name a reward: `fidelity:0.3`, `cmd:python score.py`, a folder.

use super::http::parse as parse_url;
use super::{
    ClipTokensReward, CommandReward, ExternalOptions, FidelityReward, HttpReward, RepetitionReward,
    Reward,
};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A reward's kind and what it needs.
#[derive(Clone, Debug, PartialEq)]
pub enum RewardKind {
    /// The folder of a reward model.
    Model(PathBuf),
    /// [`FidelityReward`].
    Fidelity,
    /// [`ClipTokensReward`] with its budget.
    ClipTokens(usize),
    /// [`RepetitionReward`].
    Repetition,
    /// [`CommandReward`] with its command.
    Command(String),
    /// [`HttpReward`] with its URL.
    Http(String),
}

/// A reward and its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardSpec {
    /// The reward.
    pub kind: RewardKind,
    /// Factor on its scores in the sum; negative for scores that are to fall, and 0 for one that
    /// is only watched.
    pub weight: f64,
}

impl RewardSpec {
    /// What a specification may be.
    pub const FORMS: &str = "fidelity, clip-tokens[=N], repetition, cmd:COMMAND, http://HOST/PATH, \
        https://HOST/PATH or the folder of a reward model, each with :WEIGHT behind it or not";

    /// Reads `REWARD:WEIGHT` or `REWARD`, whose weight is 1.
    ///
    /// A number behind the last colon is the weight, of commands and paths too; to name one that
    /// ends in such a number, add `:1`. Only in an URL a whole number right behind the host is its
    /// port.
    ///
    /// # Errors
    /// If it is none of [`RewardSpec::FORMS`].
    pub fn parse(text: &str) -> Result<RewardSpec> {
        let text = text.trim();
        let invalid = |message: String| {
            Error::invalid(format!(
                "--reward {text:?} {message}; a reward is {}",
                RewardSpec::FORMS
            ))
        };
        let prefix = if text.starts_with("cmd:") { "cmd:".len() } else { 0 };
        let (reward, weight) = match text[prefix..].rsplit_once(':') {
            Some((reward, tail)) if !is_port(&text[prefix..], reward, tail) => {
                match (tail.trim().parse::<f64>(), is_built_in(reward)) {
                    (Ok(weight), _) if weight.is_finite() => (reward, weight),
                    (Err(_), false) => (&text[prefix..], 1.0),
                    _ => {
                        return Err(invalid(format!(
                            "has the weight {tail:?}, expected a finite number"
                        )));
                    }
                }
            }
            _ => (&text[prefix..], 1.0),
        };
        let reward = reward.trim();
        if reward.is_empty() {
            return Err(invalid("names nothing".into()));
        }
        let kind = if prefix > 0 { Ok(RewardKind::Command(reward.into())) } else { kind(reward) };
        Ok(RewardSpec { kind: kind.map_err(invalid)?, weight })
    }

    /// Opens the reward: starts its command, or has `load_model` load the folder.
    ///
    /// # Errors
    /// If that fails.
    pub fn open<'a>(
        &self,
        options: &ExternalOptions,
        load_model: impl FnOnce(&Path) -> Result<Box<dyn Reward + 'a>>,
    ) -> Result<Box<dyn Reward + 'a>> {
        Ok(match &self.kind {
            RewardKind::Model(folder) => load_model(folder)?,
            RewardKind::Fidelity => Box::new(FidelityReward::default()),
            RewardKind::ClipTokens(budget) => Box::new(ClipTokensReward::new(*budget)),
            RewardKind::Repetition => Box::new(RepetitionReward),
            RewardKind::Command(command) => Box::new(CommandReward::start(command, options)?),
            RewardKind::Http(url) => Box::new(HttpReward::new(url, options)?),
        })
    }
}

/// As it would be written, weight included; [`RewardSpec::parse`] reads the same from it.
impl std::fmt::Display for RewardSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match &self.kind {
            RewardKind::Model(folder) => write!(f, "{}", folder.display()),
            RewardKind::Fidelity => write!(f, "fidelity"),
            RewardKind::ClipTokens(budget) => write!(f, "clip-tokens={budget}"),
            RewardKind::Repetition => write!(f, "repetition"),
            RewardKind::Command(command) => write!(f, "cmd:{command}"),
            RewardKind::Http(url) => write!(f, "{url}"),
        }?;
        // with its decimals, a weight behind a host is no port
        write!(f, ":{:?}", self.weight)
    }
}

impl FromStr for RewardSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<RewardSpec> {
        RewardSpec::parse(text)
    }
}

/// What stands before the weight, commands apart.
fn kind(reward: &str) -> Result<RewardKind, String> {
    if is_url(reward) {
        return match parse_url(reward) {
            Ok(_) => Ok(RewardKind::Http(reward.into())),
            Err(message) => Err(message),
        };
    }
    match reward.split_once('=').unwrap_or((reward, "")) {
        ("fidelity", "") => Ok(RewardKind::Fidelity),
        ("repetition", "") => Ok(RewardKind::Repetition),
        ("clip-tokens", "") if !reward.contains('=') => {
            Ok(RewardKind::ClipTokens(ClipTokensReward::CHUNK))
        }
        ("clip-tokens", budget) => match budget.trim().parse() {
            Ok(budget @ 1..) => Ok(RewardKind::ClipTokens(budget)),
            _ => Err(format!("has {budget:?} for the tokens, expected a whole number from 1 on")),
        },
        _ => Ok(RewardKind::Model(reward.into())),
    }
}

fn is_built_in(reward: &str) -> bool {
    let name = reward.split_once('=').map_or(reward, |(name, _)| name);
    matches!(name.trim(), "fidelity" | "clip-tokens" | "repetition")
}

fn is_url(reward: &str) -> bool {
    reward.starts_with("http://") || reward.starts_with("https://")
}

/// Whether `tail`, behind the last colon of `reward`, belongs to an URL: its port, the end of an
/// address in brackets, or what follows the scheme.
fn is_port(text: &str, before: &str, tail: &str) -> bool {
    if !is_url(text) {
        return false;
    }
    let Some((_, place)) = before.split_once("://") else { return true };
    if place.contains(['/', '?', '#']) {
        return false;
    }
    let host = place.rsplit_once('@').map_or(place, |(_, host)| host);
    let open = host.contains('[') && !host.contains(']');
    let ported = host.rsplit_once(']').map_or(host, |(_, rest)| rest).contains(':');
    open || (!ported && tail.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(kind: RewardKind, weight: f64) -> RewardSpec {
        RewardSpec { kind, weight }
    }

    #[test]
    fn all_forms_are_read() {
        let model = |path: &str| RewardKind::Model(path.into());
        let command = |command: &str| RewardKind::Command(command.into());
        let http = |url: &str| RewardKind::Http(url.into());
        for (text, kind, weight) in [
            ("DIR:0.7", model("DIR"), 0.7),
            ("./reward-model", model("./reward-model"), 1.0),
            ("C:/models/aesthetic", model("C:/models/aesthetic"), 1.0),
            ("fidelity:0.3", RewardKind::Fidelity, 0.3),
            (" fidelity ", RewardKind::Fidelity, 1.0),
            ("repetition:2", RewardKind::Repetition, 2.0),
            ("clip-tokens", RewardKind::ClipTokens(75), 1.0),
            ("clip-tokens=60:0.1", RewardKind::ClipTokens(60), 0.1),
            ("cmd:python score.py:1.0", command("python score.py"), 1.0),
            ("cmd:python score.py", command("python score.py"), 1.0),
            ("cmd:./score --host a:b:-0.5", command("./score --host a:b"), -0.5),
            ("cmd:nc host:9000:1", command("nc host:9000"), 1.0),
            ("cmd:5", command("5"), 1.0),
            ("http://host:8000/score:1", http("http://host:8000/score"), 1.0),
            ("http://host:8000/score:0.25", http("http://host:8000/score"), 0.25),
            ("http://host:8000", http("http://host:8000"), 1.0),
            ("http://host:8000:0.5", http("http://host:8000"), 0.5),
            ("https://host", http("https://host"), 1.0),
            ("https://host:0.5", http("https://host"), 0.5),
            ("https://host/a/b", http("https://host/a/b"), 1.0),
            ("http://[::1]:8000", http("http://[::1]:8000"), 1.0),
            ("http://[::1]", http("http://[::1]"), 1.0),
            ("http://[::1]:8000/x:2", http("http://[::1]:8000/x"), 2.0),
            ("http://me:pw@host:80", http("http://me:pw@host:80"), 1.0),
            ("http://me:pw@host:80:2", http("http://me:pw@host:80"), 2.0),
            ("http://host/[:2", http("http://host/["), 2.0),
            ("http://[::1]:8000:2", http("http://[::1]:8000"), 2.0),
        ] {
            let read = RewardSpec::parse(text).unwrap();
            assert_eq!(read, spec(kind, weight), "{text}");
            assert_eq!(read.to_string().parse::<RewardSpec>().unwrap(), read, "{text}");
        }
    }

    #[test]
    fn what_is_none_says_what_is_expected() {
        for (text, expected) in [
            ("", "names nothing"),
            (":0.5", "names nothing"),
            ("cmd:", "names nothing"),
            ("cmd::1", "names nothing"),
            ("fidelity:high", "has the weight \"high\", expected a finite number"),
            ("fidelity:", "has the weight \"\", expected a finite number"),
            ("fidelity:inf", "has the weight \"inf\", expected a finite number"),
            ("DIR:nan", "has the weight \"nan\", expected a finite number"),
            ("clip-tokens=0", "expected a whole number from 1 on"),
            ("clip-tokens=:1", "expected a whole number from 1 on"),
            ("clip-tokens=ten:1", "expected a whole number from 1 on"),
            ("http://:1", "is no URL"),
            ("http://a b/:1", "is no URL"),
        ] {
            let error = RewardSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("cmd:COMMAND"), "{text}: {error}");
            assert!(!error.contains('\n') && error.starts_with("--reward "), "{error}");
        }
    }

    #[test]
    fn folders_are_the_callers_affair() {
        let open = |text: &str| {
            RewardSpec::parse(text).unwrap().open(&ExternalOptions::default(), |folder| {
                Err(Error::file(folder, "is no reward model"))
            })
        };
        assert_eq!(open("rm:0.7").err().unwrap().to_string(), "rm: is no reward model");
        for name in ["fidelity", "clip-tokens", "clip-tokens=60", "repetition"] {
            assert_eq!(open(&format!("{name}:0.5")).unwrap().name(), name);
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_the_same(
            kind in "(cmd:|https?://|fidelity|clip-tokens=|)",
            rest in "[a-z:/\\[\\]0-9. =@-]{0,16}(:-?[0-9.]{1,4})?"
        ) {
            if let Ok(read) = RewardSpec::parse(&(kind + &rest)) {
                prop_assert_eq!(RewardSpec::parse(&read.to_string()).unwrap(), read);
            }
        }
    }
}
