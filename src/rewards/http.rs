//! A scorer behind an HTTP endpoint of the user's.

use super::{ExternalOptions, Reward, ScoredText, check_scores, failed, one_line};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::Duration;
use ureq::http::Uri;
use ureq::{Agent, Timeout};

/// Time to reach the endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of an answer; a score takes about twenty.
const LONGEST_ANSWER: u64 = 1 << 26;

/// Longest time between two tries.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Request<'a> {
    rewrites: &'a [ScoredText<'a>],
}

#[derive(Deserialize)]
struct Answer {
    scores: Vec<f64>,
}

/// What a try brought.
enum Outcome {
    Answer(Vec<u8>),
    /// Another try may bring more.
    Passing(String),
    Failed(String),
}

/// An endpoint that takes a POST of `{"rewrites": [{"raw_prompt": .., "output": ..}]}` and answers
/// `{"scores": [number]}`, in order.
pub struct HttpReward {
    name: String,
    url: String,
    agent: Agent,
    options: ExternalOptions,
}

impl HttpReward {
    /// A reward from the endpoint at `url`; nothing is asked of it yet.
    ///
    /// # Errors
    /// If `url` is none of http or https with a host.
    pub fn new(url: &str, options: &ExternalOptions) -> Result<HttpReward> {
        let (uri, host) = parse(url).map_err(|message| failed(url, message))?;
        let mut config = Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT.min(options.timeout)))
            .timeout_global(Some(options.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("bprompt/", env!("CARGO_PKG_VERSION")));
        if is_loopback(&host) {
            // a proxy is another machine, where this address means something else
            config = config.proxy(None);
        }
        let agent = Agent::new_with_config(config.build());
        Ok(HttpReward { name: shown(&uri), url: url.into(), agent, options: *options })
    }

    /// Asks once.
    fn ask(&self, body: &[u8]) -> Outcome {
        let asked = self.agent.post(&self.url).content_type("application/json").send(body);
        let mut response = match asked {
            Ok(response) => response,
            Err(e) => return self.failed(e),
        };
        let status = response.status();
        let read = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec();
        let answer = match read {
            Ok(answer) => answer,
            Err(_) if !status.is_success() => vec![],
            Err(e) => return self.failed(e),
        };
        if status.is_success() {
            return Outcome::Answer(answer);
        }
        let text = one_line(&String::from_utf8_lossy(&answer));
        let text = if text.is_empty() { text } else { format!(" and `{text}`") };
        let message = format!("answered status {status}{text}, expected 200 OK");
        if status.is_server_error() { Outcome::Passing(message) } else { Outcome::Failed(message) }
    }

    fn failed(&self, error: ureq::Error) -> Outcome {
        match error {
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                Outcome::Passing("cannot be reached: no answer to a connection".into())
            }
            ureq::Error::Timeout(_) => Outcome::Failed(format!(
                "gave no whole answer within {} s; --reward-timeout lets it take longer",
                self.options.timeout.as_secs_f64()
            )),
            e
            @ (ureq::Error::Io(_) | ureq::Error::HostNotFound | ureq::Error::ConnectionFailed) => {
                Outcome::Passing(format!("cannot be reached: {}", one_line(&e.to_string())))
            }
            e => Outcome::Failed(format!("cannot be asked: {}", one_line(&e.to_string()))),
        }
    }

    /// The answer, after several tries if need be; the error is the last try's.
    fn answer(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut wait = self.options.backoff;
        for left in (0..=self.options.retries).rev() {
            match self.ask(body) {
                Outcome::Answer(answer) => return Ok(answer),
                Outcome::Failed(message) => return Err(message),
                Outcome::Passing(message) if left == 0 => {
                    let tries = u64::from(self.options.retries) + 1;
                    return Err(format!("{message} (tried {tries} times)"));
                }
                Outcome::Passing(message) => {
                    tracing::warn!("reward {}: {message}; trying again", self.name);
                    std::thread::sleep(wait);
                    wait = (wait * 2).min(LONGEST_BACKOFF);
                }
            }
        }
        Err("was not asked".into())
    }
}

impl Reward for HttpReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        if rewrites.is_empty() {
            return Ok(vec![]);
        }
        let body = serde_json::to_vec(&Request { rewrites }).expect("texts are JSON");
        let answer = self.answer(&body).map_err(|message| failed(&self.name, message))?;
        let text = std::str::from_utf8(&answer)
            .map_err(|_| failed(&self.name, "answered a body that is not UTF-8 text"))?;
        let answer: Answer = serde_json::from_str(text).map_err(|e| {
            failed(
                &self.name,
                format_args!(
                    "answered `{}`, expected {{\"scores\": [NUMBER, ..]}} with finite numbers \
                     ({e})",
                    one_line(text)
                ),
            )
        })?;
        check_scores(&self.name, &answer.scores, rewrites.len())?;
        Ok(answer.scores)
    }
}

/// An endpoint's address and its host; the error says what is wrong with it.
pub(super) fn parse(url: &str) -> Result<(Uri, String), String> {
    let uri: Uri = url.parse().map_err(|e| format!("is no URL: {e}"))?;
    let scheme = uri.scheme_str().unwrap_or_default();
    let host = uri.host().unwrap_or_default().to_owned();
    let port = place(&uri).strip_prefix(host.as_str()).unwrap_or_default();
    if !matches!(scheme, "http" | "https")
        || host.is_empty()
        || !(port.is_empty() || uri.port_u16().is_some())
    {
        return Err("is no URL of an endpoint, expected such as http://127.0.0.1:8000/score".into());
    }
    Ok((uri, host))
}

/// The address without what may be a secret: user, password and query.
fn shown(uri: &Uri) -> String {
    format!("{}://{}{}", uri.scheme_str().unwrap_or_default(), place(uri), uri.path())
}

/// Host and port.
fn place(uri: &Uri) -> &str {
    let authority = uri.authority().map_or("", |a| a.as_str());
    authority.rsplit_once('@').map_or(authority, |(_, place)| place)
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_no_secrets() {
        let name = |url| shown(&parse(url).unwrap().0);
        assert_eq!(name("http://me:secret@host:8000/score?key=1"), "http://host:8000/score");
        assert_eq!(name("https://host"), "https://host/");
        for url in
            ["http://", "ftp://host/", "host:8000", "http://a b/", "http://h:99999/", "http://h:/"]
        {
            assert!(parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn proxies_are_not_asked_for_this_machine() {
        assert!(["localhost", "127.0.0.1", "[::1]", "127.8.0.1"].into_iter().all(is_loopback));
        assert!(!["10.0.0.1", "localhost.example", "[::2]", ""].into_iter().any(is_loopback));
    }
}
