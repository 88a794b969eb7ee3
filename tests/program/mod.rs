//! The built program, run as people run it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

pub fn bprompt(args: &[&str]) -> Command {
    // more than the cores would be told of on standard error
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
    let mut c = Command::new(env!("CARGO_BIN_EXE_bprompt"));
    c.env_remove("BPROMPT_MODEL")
        .env("BPROMPT_THREADS", threads.to_string())
        .stdin(Stdio::null())
        .args(args);
    c
}

pub fn run(args: &[&str]) -> Output {
    bprompt(args).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn stdout(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Runs something that must fail: status 2 and one line, which is returned.
pub fn failure(args: &[&str]) -> String {
    let out = run(args);
    let line = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{args:?}: {line}");
    assert!(out.stdout.is_empty(), "{args:?} printed {}", text(&out.stdout));
    line
}

pub fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}
