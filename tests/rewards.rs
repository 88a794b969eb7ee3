//! Rewards outside of this process: commands and HTTP endpoints, good and bad ones.

use beautiful_prompt::Result;
use beautiful_prompt::rewards::{
    CommandReward, ExternalOptions, HttpReward, Reward, RewardSpec, ScoredText,
};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Reads lines as a scorer does.
const READ: &str = "import json, os, sys, time
rewrites = (json.loads(line) for line in sys.stdin)
def answer(line):
    print(line, flush=True)
def scored(r):
    return json.dumps({'id': r['id'], 'score': len(r['output']) - len(r['raw_prompt'])})
";

fn options(timeout: f64) -> ExternalOptions {
    ExternalOptions {
        timeout: Duration::from_secs_f64(timeout),
        backoff: Duration::from_millis(1),
        ..ExternalOptions::default()
    }
}

/// Starts a Python script; it is there as long as the folder.
fn python(body: &str, timeout: f64) -> (TempDir, CommandReward) {
    // as the program has it: whoever writes to a closed pipe is ended, unless the signal is blocked
    #[cfg(unix)]
    // SAFETY: the handler is the default one.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("score.py");
    std::fs::write(&file, format!("{READ}{body}")).unwrap();
    let command = format!("python3 {}", file.display());
    let reward = CommandReward::start(&command, &options(timeout)).unwrap();
    (folder, reward)
}

fn score(reward: &mut dyn Reward, outputs: &[&str]) -> Result<Vec<f64>> {
    let rewrites: Vec<ScoredText> =
        outputs.iter().map(|output| ScoredText { raw_prompt: "a cat", output }).collect();
    reward.score(&rewrites)
}

/// The error of scoring three rewrites, which names the reward on one line.
fn error(reward: &mut dyn Reward) -> String {
    let error = score(reward, &["a cat", "a cat, 8k", "a \u{1f408}"]).unwrap_err().to_string();
    assert!(error.starts_with(&format!("reward {}: ", reward.name())), "{error}");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_command_is_kept_for_all_batches() {
    let (_folder, mut reward) = python(
        "for r in rewrites:
    answer(scored(r))",
        60.0,
    );
    assert_eq!(score(&mut reward, &[]).unwrap(), [0.0; 0]);
    assert_eq!(score(&mut reward, &["a cat, 8k", "a\ncat \u{1f408}"]).unwrap(), [4.0, 2.0]);
    assert_eq!(score(&mut reward, &["", "a cat"]).unwrap(), [-5.0, 0.0]);
}

#[test]
fn ids_may_come_in_any_order() {
    let (_folder, mut reward) = python(
        "while True:
    for r in reversed([next(rewrites) for _ in range(3)]):
        answer(scored(r))",
        60.0,
    );
    for _ in 0..3 {
        assert_eq!(score(&mut reward, &["a", "ab", "abc"]).unwrap(), [-4.0, -3.0, -2.0]);
    }
}

#[test]
fn bare_numbers_come_in_order() {
    let (_folder, mut reward) = python(
        "for r in rewrites:
    answer(len(r['output']) / 2)",
        60.0,
    );
    assert_eq!(score(&mut reward, &["a", "ab", "abc"]).unwrap(), [0.5, 1.0, 1.5]);
}

#[test]
fn a_large_batch_is_written_while_answers_are_read() {
    // answers of 200 bytes to lines of 300: neither fits into the pipes as a whole
    let (_folder, mut reward) = python(
        "for r in rewrites:
    print(json.dumps({'id': r['id'], 'score': len(r['output']), 'why': 'x' * 160}))
    if r['id'] % 20000 == 19999:
        sys.stdout.flush()",
        60.0,
    );
    let outputs: Vec<String> =
        (0..20_000).map(|i| "word ".repeat(40) + &"x".repeat(i % 7)).collect();
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let scores = score(&mut reward, &outputs).unwrap();
        assert!(scores.iter().zip(&outputs).all(|(s, o)| *s == o.len() as f64));
    }
}

#[test]
fn a_command_that_reads_all_first_is_no_deadlock_either() {
    let (_folder, mut reward) = python(
        "batch = [next(rewrites) for _ in range(20000)]
for r in batch:
    answer(scored(r))",
        60.0,
    );
    assert_eq!(score(&mut reward, &["a cat and a dog"; 20_000]).unwrap(), [10.0; 20_000]);
}

#[test]
fn a_command_that_hangs_is_killed() {
    let started = Instant::now();
    let (_folder, mut reward) = python(
        "answer(scored(next(rewrites)))
time.sleep(600)",
        1.0,
    );
    let message = error(&mut reward);
    assert!(message.contains("gave no answer for 1 s, after 1 of 3 answers"), "{message}");
    assert!(message.contains("--reward-timeout"), "{message}");
    assert!(error(&mut reward).contains("has failed before"));
    drop(reward);
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_command_that_reads_nothing_is_killed() {
    let (_folder, mut reward) = python("time.sleep(600)", 1.0);
    let long: &str = &"x".repeat(1 << 20);
    let message = score(&mut reward, &[long; 4]).unwrap_err().to_string();
    assert!(message.contains("gave no answer for 1 s, after 0 of 4 answers"), "{message}");
}

#[test]
fn a_command_that_dies_says_how() {
    let (_folder, mut reward) = python(
        "answer(scored(next(rewrites)))
print('loading\\r\\nout of patience\\n', file=sys.stderr)
sys.exit(3)",
        60.0,
    );
    let message = error(&mut reward);
    assert!(
        message.ends_with(
            "ended with exit status: 3 after 1 of 3 answers; its last line on standard error is \
             `out of patience`"
        ),
        "{message}"
    );
    // in the middle of a batch that does not fit into the pipe
    let (_folder, mut reward) = python(
        "for r in rewrites:
    if r['id'] == 1000:
        raise ValueError('a bad day')
    answer(scored(r))",
        60.0,
    );
    let message = score(&mut reward, &["a cat"; 20_000]).unwrap_err().to_string();
    assert!(message.contains("ended with exit status: 1 after "), "{message}");
    assert!(message.ends_with("is `ValueError: a bad day`"), "{message}");
    // between two batches
    let (_folder, mut reward) = python("answer(scored(next(rewrites)))", 60.0);
    score(&mut reward, &["a"]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(error(&mut reward).ends_with("ended with exit status: 0 after 0 of 3 answers"));
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let command = "/nowhere/score --all";
    let mut reward = CommandReward::start(command, &options(60.0)).unwrap();
    let message = error(&mut reward);
    assert!(message.contains("ended with exit status: 127 after 0 of 3"), "{message}");
    assert!(message.contains("/nowhere/score: not found") || message.contains("No such file"));
}

#[test]
fn a_command_that_is_ended_by_a_signal_says_so() {
    let (_folder, mut reward) = python("os.kill(os.getpid(), 9)", 60.0);
    let message = error(&mut reward);
    assert!(message.contains("signal: 9") || message.contains("exit status: 137"), "{message}");
}

#[test]
fn wrong_answers_are_named() {
    for (body, expected) in [
        ("[answer(scored(r)) for r in [next(rewrites)] * 2]", "answered id 0 twice"),
        ("answer('{\"id\": 7, \"score\": 1}')", "answered id 7, expected the ids 0 to 2"),
        ("answer('{\"id\": 0, \"score\": NaN}')", "line 1 of its answers is `{\"id\": 0"),
        ("answer(float('inf'))", "line 1 of its answers is `inf`, expected"),
        ("answer('loading the model')", "`loading the model`"),
        ("answer('x' * (2 << 20))", "a line of more than 1048576 bytes"),
        ("sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush()", "is not UTF-8 text"),
        ("answer('{\"id\": 0, \"score\": 1}\\n2')", "expected all lines with ids or none"),
    ] {
        // what stands on standard output before a batch is refused too, in other words
        let body =
            format!("first = next(rewrites)\nrewrites = iter([first])\n{body}\ntime.sleep(9)");
        let (_folder, mut reward) = python(&body, 60.0);
        let message = error(&mut reward);
        assert!(message.contains(expected), "{body}: {message}");
    }
}

#[cfg(unix)]
#[test]
fn a_command_that_closes_its_output_is_not_waited_for() {
    let started = Instant::now();
    let mut reward = CommandReward::start("exec >&-; sleep 600", &options(60.0)).unwrap();
    assert!(error(&mut reward).ends_with("closed its standard output after 0 of 3 answers"));
    drop(reward);
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn too_many_answers_are_refused_and_too_few_waited_for() {
    let (_folder, mut reward) = python(
        "for r in rewrites:
    answer('1\\n1' if r['id'] == 2 else '1')",
        60.0,
    );
    // the line too many may arrive after the batch
    let first = score(&mut reward, &["a"; 3]).and_then(|_| {
        std::thread::sleep(Duration::from_millis(300));
        score(&mut reward, &["a"; 3])
    });
    let message = first.unwrap_err().to_string();
    assert!(message.contains("more lines than it got rewrites, such as `1`"), "{message}");
    let (_folder, mut reward) = python(
        "for r in rewrites:
    if r['id'] != 1: answer(scored(r))",
        1.0,
    );
    assert!(error(&mut reward).contains("after 2 of 3 answers"));
}

#[cfg(unix)]
#[test]
fn what_the_shell_started_ends_with_the_reward() {
    let (folder, reward) = python(
        "import subprocess
child = subprocess.Popen(['sleep', '600'])
open(os.path.join(os.path.dirname(__file__), 'ids'), 'w').write(f'{os.getpid()} {child.pid} ')
for r in rewrites:
    answer(scored(r))",
        60.0,
    );
    let file = folder.path().join("ids");
    let deadline = Instant::now() + Duration::from_secs(30);
    let ids = loop {
        match std::fs::read_to_string(&file) {
            Ok(ids) if ids.ends_with(' ') => break ids,
            _ => assert!(Instant::now() < deadline),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(reward);
    for id in ids.split_whitespace() {
        // SAFETY: signal 0 only asks whether the process is there.
        let gone = || unsafe { libc::kill(id.parse().unwrap(), 0) } != 0;
        let status = || std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        // one that nobody has waited for yet has ended too
        while !gone() && !status().contains(") Z ") {
            assert!(Instant::now() < deadline, "{id} is still there: {}", status());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Answers each request with the next of `answers`, which are whole HTTP responses, and gives back
/// the requests.
fn serve(answers: Vec<Vec<u8>>) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let answer = |answer: Vec<u8>| {
            let (mut stream, _) = listener.accept().unwrap();
            let request = read_request(&mut stream);
            stream.write_all(&answer).unwrap();
            request
        };
        answers.into_iter().map(answer).collect()
    });
    (url, server)
}

fn read_request(stream: &mut TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        head.push_str(&line);
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    head + std::str::from_utf8(&body).unwrap()
}

fn response(status: &str, body: &[u8]) -> Vec<u8> {
    let head =
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[test]
fn an_endpoint_gets_all_rewrites_and_answers_all_scores() {
    let (url, server) = serve(vec![response("200 OK", b"{\"scores\": [1, -0.5], \"n\": 2}")]);
    let mut reward = HttpReward::new(&url, &options(60.0)).unwrap();
    assert_eq!(score(&mut reward, &[]).unwrap(), [0.0; 0]);
    assert_eq!(score(&mut reward, &["x", "\u{1f408}\n"]).unwrap(), [1.0, -0.5]);
    let request = &server.join().unwrap()[0];
    assert!(request.starts_with("POST /score HTTP/1.1\r\n"), "{request}");
    assert!(request.to_ascii_lowercase().contains("content-type: application/json\r\n"));
    let body: serde_json::Value =
        serde_json::from_str(request.split_once("\r\n\r\n").unwrap().1).unwrap();
    let rewrite = |output: &str| serde_json::json!({"raw_prompt": "a cat", "output": output});
    assert_eq!(body, serde_json::json!({"rewrites": [rewrite("x"), rewrite("\u{1f408}\n")]}));
}

#[test]
fn an_endpoint_is_asked_again_while_it_has_errors_of_its_own() {
    let unavailable = || response("503 Service Unavailable", b"starting\nup");
    let good = response("200 OK", b"{\"scores\": [0.5]}");
    // an answer that is cut off before it begins is a failed connection
    let (url, server) = serve(vec![unavailable(), vec![], unavailable(), good]);
    let mut reward = HttpReward::new(&url, &options(60.0)).unwrap();
    assert_eq!(score(&mut reward, &["x"]).unwrap(), [0.5]);
    assert_eq!(server.join().unwrap().len(), 4);

    let (url, server) = serve((0..4).map(|_| unavailable()).collect());
    let message = error(&mut HttpReward::new(&url, &options(60.0)).unwrap());
    assert!(
        message.ends_with(
            "answered status 503 Service Unavailable and `starting up`, expected 200 OK (tried 4 \
             times)"
        ),
        "{message}"
    );
    server.join().unwrap();
}

#[test]
fn an_endpoint_that_is_not_there_is_named() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let spec = RewardSpec::parse(&format!("http://127.0.0.1:{port}/score:0.5")).unwrap();
    let mut reward = spec.open(&options(60.0), |_| unreachable!()).unwrap();
    let message = error(&mut *reward);
    assert!(message.contains("cannot be reached: ") && message.contains("(tried 4 times)"));
}

#[test]
fn wrong_answers_of_an_endpoint_are_named() {
    for (answer, expected) in [
        (response("404 Not Found", b""), "answered status 404 Not Found, expected 200 OK"),
        (response("302 Found", b""), "answered status 302 Found, expected 200 OK"),
        (response("200 OK", b"{\"scores\": [1, 2]}"), "gave 2 scores, expected 3"),
        (response("200 OK", b"{\"scores\": [1, 2, NaN]}"), "with finite numbers ("),
        (response("200 OK", b"{\"scores\": [1, 2, null]}"), "with finite numbers ("),
        (response("200 OK", b"{\"scores\": [1, 2, \"3\"]}"), "with finite numbers ("),
        (response("200 OK", b"[1, 2, 3]"), "answered `[1, 2, 3]`, expected {\"scores\""),
        (response("200 OK", b"<html>\n</html>"), "answered `<html> </html>`, expected"),
        (response("200 OK", b"\xff"), "answered a body that is not UTF-8 text"),
        (b"hello\r\n\r\n".to_vec(), "cannot be asked: "),
    ] {
        let (url, server) = serve(vec![answer]);
        let message = error(&mut HttpReward::new(&url, &options(60.0)).unwrap());
        assert!(message.contains(expected), "{expected}: {message}");
        server.join().unwrap();
    }
}

#[test]
fn an_endpoint_that_hangs_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut reward = HttpReward::new(&url, &options(0.5)).unwrap();
    let started = Instant::now();
    let message = error(&mut reward);
    assert!(message.contains("gave no whole answer within 0.5 s; --reward-timeout"), "{message}");
    assert!(started.elapsed() < Duration::from_secs(20), "it is not asked again");
}
