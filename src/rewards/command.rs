//! A scorer that is a command of the user's: rewrites go to its standard input, scores come from
//! its standard output, a line each.
//!
//! Three threads talk to it, so that neither side can block the other: one writes batches, one
//! reads answers, one passes its standard error through. They end with the command's pipes.

use super::answers::Answers;
use super::{ExternalOptions, Reward, ScoredText, failed, one_line};
use crate::error::Result;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Bytes of an answer's line; scores are far shorter.
const LONGEST_LINE: usize = 1 << 20;

/// Bytes that are kept of the last line on standard error.
const LONGEST_LAST_LINE: usize = 1 << 12;

/// Answers that may wait; a scorer that answers without end waits at this many.
const WAITING_ANSWERS: usize = 1 << 12;

/// Time that a command which has closed a pipe gets to end, so that its status can be told.
const GRACE: Duration = Duration::from_secs(2);

/// A command that is started once and scores all batches.
///
/// For each rewrite it reads a line `{"id": k, "raw_prompt": .., "output": ..}` and answers a line
/// `{"id": k, "score": number}`, in any order, or a bare number, in order. Ids go on from batch to
/// batch. After a failure, and when this is dropped, the command is killed.
pub struct CommandReward {
    name: String,
    timeout: Duration,
    /// Nothing after a failure.
    scorer: Option<Scorer>,
    next_id: u64,
}

impl CommandReward {
    /// Starts `command` in a shell.
    ///
    /// # Errors
    /// If there is no shell. A command that cannot be started is an error of the first batch.
    pub fn start(command: &str, options: &ExternalOptions) -> Result<CommandReward> {
        let name = format!("cmd:{command}");
        let scorer = Scorer::start(command)
            .map_err(|e| failed(&name, format_args!("cannot start a shell for it: {e}")))?;
        Ok(CommandReward { name, timeout: options.timeout, scorer: Some(scorer), next_id: 0 })
    }
}

impl Reward for CommandReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, rewrites: &[ScoredText]) -> Result<Vec<f64>> {
        if rewrites.is_empty() {
            return Ok(vec![]);
        }
        let Some(scorer) = &mut self.scorer else {
            return Err(failed(&self.name, "has failed before and was killed"));
        };
        let scores = scorer.score(rewrites, self.next_id, self.timeout);
        self.next_id += rewrites.len() as u64;
        scores.map_err(|message| {
            self.scorer = None;
            failed(&self.name, message)
        })
    }
}

/// What a thread that talks to the command reports.
enum Event {
    Line(Vec<u8>),
    /// A pipe is closed or fails; no lines come any more.
    Closed(&'static str),
    LongLine,
}

/// The running command.
struct Scorer {
    child: Child,
    batches: Sender<Vec<u8>>,
    events: Receiver<Event>,
    /// A pipe that it has closed after a batch.
    closed: Option<&'static str>,
    stderr: JoinHandle<()>,
    /// The last line on standard error that is not empty.
    last_line: Arc<Mutex<String>>,
}

impl Scorer {
    fn start(command: &str) -> std::io::Result<Scorer> {
        let mut child = shell(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let missing = || std::io::Error::other("it has no pipes");
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let stderr = child.stderr.take().ok_or_else(missing)?;
        let (batches, waiting) = channel();
        let (report, events) = sync_channel(WAITING_ANSWERS);
        let last_line = Arc::new(Mutex::new(String::new()));
        let (failed, kept) = (report.clone(), last_line.clone());
        std::thread::spawn(move || write_batches(stdin, &waiting, &failed));
        std::thread::spawn(move || read_answers(stdout, &report));
        let stderr = std::thread::spawn(move || pass_through(stderr, &kept));
        Ok(Scorer { child, batches, events, closed: None, stderr, last_line })
    }

    /// Scores of a batch whose ids begin with `first`; the error says what the command did.
    fn score(
        &mut self,
        rewrites: &[ScoredText],
        first: u64,
        timeout: Duration,
    ) -> Result<Vec<f64>, String> {
        self.check_unasked()?;
        let mut answers = Answers::new(first, rewrites.len());
        if let Some(pipe) = self.closed {
            return Err(self.ended(pipe, &answers.progress()));
        }
        if self.batches.send(lines(rewrites, first)).is_err() {
            return Err(self.ended("standard input", &answers.progress()));
        }
        loop {
            match self.events.recv_timeout(timeout) {
                Ok(Event::Line(line)) => answers.take(&line)?,
                Ok(Event::LongLine) => return Err(long_line()),
                Ok(Event::Closed(pipe)) => return Err(self.ended(pipe, &answers.progress())),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!(
                        "gave no answer for {} s, {}; it has to flush its output after each \
                         batch, and --reward-timeout lets it take longer",
                        timeout.as_secs_f64(),
                        answers.progress()
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.ended("pipes", &answers.progress()));
                }
            }
            if let Some(scores) = answers.complete() {
                return self.check_unasked().map(|()| scores);
            }
        }
    }

    /// Refuses lines that nobody asked for: they would be taken as answers to the next batch.
    fn check_unasked(&mut self) -> Result<(), String> {
        match self.events.try_recv() {
            Ok(Event::Line(line)) => Err(format!(
                "answered more lines than it got rewrites, such as `{}`; what is no answer belongs \
                 on standard error",
                one_line(&String::from_utf8_lossy(&line))
            )),
            Ok(Event::LongLine) => Err(long_line()),
            Ok(Event::Closed(pipe)) => {
                self.closed = Some(pipe);
                Ok(())
            }
            Err(_) => Ok(()),
        }
    }

    /// Says how the command ended that has closed a pipe, and its last line on standard error.
    fn ended(&mut self, pipe: &str, progress: &str) -> String {
        let deadline = Instant::now() + GRACE;
        let what = match self.exit_status(deadline) {
            Some(status) => format!("ended with {status}"),
            None => format!("closed its {pipe}"),
        };
        while !self.stderr.is_finished() && Instant::now() < deadline {
            sleep(Duration::from_millis(5));
        }
        let last = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
        match one_line(&last) {
            none if none.is_empty() => format!("{what} {progress}"),
            last => format!("{what} {progress}; its last line on standard error is `{last}`"),
        }
    }

    fn exit_status(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => sleep(Duration::from_millis(5)),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }
}

impl Drop for Scorer {
    fn drop(&mut self) {
        // The shell may have started others. Its group has its id, which no other process gets
        // until the shell has been waited for.
        #[cfg(unix)]
        if let (Ok(None), Ok(group)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            // SAFETY: a call without pointers.
            unsafe {
                libc::kill(-group, libc::SIGKILL);
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command in a shell, and in a process group of its own: an interrupt from the terminal is
/// this program's affair, which finishes its step first.
#[cfg(unix)]
fn shell(command: &str) -> Command {
    use std::os::unix::process::CommandExt;
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).process_group(0);
    shell
}

#[cfg(not(unix))]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("cmd");
    shell.arg("/C").arg(command);
    shell
}

fn long_line() -> String {
    format!("answered a line of more than {LONGEST_LINE} bytes, expected a score")
}

/// A line for each rewrite.
fn lines(rewrites: &[ScoredText], first: u64) -> Vec<u8> {
    #[derive(serde::Serialize)]
    struct Line<'a> {
        id: u64,
        #[serde(flatten)]
        text: ScoredText<'a>,
    }
    let mut lines = Vec::new();
    for (id, &text) in (first..).zip(rewrites) {
        serde_json::to_writer(&mut lines, &Line { id, text }).expect("texts are JSON");
        lines.push(b'\n');
    }
    lines
}

fn write_batches(mut stdin: ChildStdin, batches: &Receiver<Vec<u8>>, report: &SyncSender<Event>) {
    block_sigpipe();
    for batch in batches {
        if stdin.write_all(&batch).and_then(|()| stdin.flush()).is_err() {
            let _ = report.send(Event::Closed("standard input"));
            return;
        }
    }
}

/// Makes writing to a command that is gone an error of this thread: the program lets the signal
/// end it.
fn block_sigpipe() {
    #[cfg(unix)]
    // SAFETY: the set is initialized by sigemptyset before it is used, and lives through the calls.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

fn read_answers(stdout: ChildStdout, report: &SyncSender<Event>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let read = (&mut stdout).take(LONGEST_LINE as u64).read_until(b'\n', &mut line);
        let event = match read {
            Ok(1..) if line.last() == Some(&b'\n') => Event::Line(line),
            Ok(LONGEST_LINE..) => Event::LongLine,
            // the last line may have no end
            Ok(1..) => Event::Line(line),
            Ok(0) | Err(_) => Event::Closed("standard output"),
        };
        let over = matches!(event, Event::Closed(_) | Event::LongLine);
        if report.send(event).is_err() || over {
            return;
        }
    }
}

/// Passes standard error through as it comes, progress bars without line ends too.
fn pass_through(mut stderr: ChildStderr, last_line: &Mutex<String>) {
    let mut bytes = [0; 8192];
    let mut line: Vec<u8> = Vec::new();
    let keep = |line: &mut Vec<u8>| {
        let text = String::from_utf8_lossy(line);
        if !text.trim().is_empty() {
            *last_line.lock().unwrap_or_else(PoisonError::into_inner) = text.trim().to_owned();
        }
        line.clear();
    };
    loop {
        let read = match stderr.read(&mut bytes) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let _ = std::io::stderr().write_all(&bytes[..read]);
        for &byte in &bytes[..read] {
            match byte {
                b'\n' | b'\r' => keep(&mut line),
                _ if line.len() < LONGEST_LAST_LINE => line.push(byte),
                _ => {}
            }
        }
    }
    keep(&mut line);
}
