//! A running server, and a client without manners.
#![allow(dead_code)] // each test uses a part of it

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Server {
    pub child: Child,
    pub address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The server-sent events that are JSON; the last must be there.
    pub fn events(&self) -> Vec<Value> {
        assert!(self.body.trim_end().ends_with("data: [DONE]"), "{} {}", self.status, self.body);
        self.body
            .lines()
            .filter_map(|l| serde_json::from_str(l.strip_prefix("data: ")?).ok())
            .collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| {
            l.split_once(": ").filter(|h| h.0.eq_ignore_ascii_case(name)).map(|h| h.1)
        })
    }
}

impl Server {
    pub fn start(flags: &[&str]) -> Server {
        Server::start_program(env!("CARGO_BIN_EXE_bprompt"), flags)
    }

    /// A server of some build of the program.
    pub fn start_program(program: &str, flags: &[&str]) -> Server {
        let mut child = Command::new(program)
            .args(["serve", "--port", "0", "--device", "cpu", "--threads", "1"])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut address = String::new();
        for line in log.by_ref().lines() {
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                address = rest.split([' ', '"']).next().unwrap().to_owned();
                break;
            }
        }
        assert!(!address.is_empty(), "the server did not start");
        // somebody has to read the log
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Server { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// A request in JSON, whose connection stays open.
    pub fn send_json(&self, path: &str, body: &Value) -> TcpStream {
        self.send_json_as("1.1", path, body)
    }

    /// The same in a version of HTTP.
    pub fn send_json_as(&self, version: &str, path: &str, body: &Value) -> TcpStream {
        let headers = "Content-Type: application/json\r\n";
        self.send_as(version, "POST", path, headers, body.to_string().as_bytes())
    }

    /// What a request in JSON is refused with: the status, and the field that the error names.
    pub fn refusal(&self, path: &str, body: Value) -> (u16, String) {
        let a = self.post(path, body);
        (a.status, a.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
    }

    /// Sends a request and leaves the connection open.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        self.send_as("1.1", method, path, headers, body)
    }

    fn send_as(
        &self,
        version: &str,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: \
            {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        answer(self.send(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", b"")
    }

    pub fn post(&self, path: &str, body: Value) -> Answer {
        self.request(
            "POST",
            path,
            "Content-Type: application/json\r\n",
            body.to_string().as_bytes(),
        )
    }

    /// The value of a metric without labels of its own.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|l| l.starts_with(&format!("{name}{{")));
        line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Whether nothing is left of all requests.
    pub fn is_idle(&self) -> bool {
        let names = ["kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"];
        names.iter().all(|n| self.metric(&format!("vllm:{n}")) == 0.0)
    }

    pub fn wait_for(&self, what: &str, done: impl Fn(&Server) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn terminate(&self) {
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
    }
}

pub fn answer(mut stream: TcpStream) -> Answer {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    // interim answers may come at any time
    let text = text.trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n").to_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let mut body = body.to_owned();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        let (mut whole, mut rest) = (String::new(), body.as_str());
        while let Some((size, after)) = rest.split_once("\r\n") {
            let n = usize::from_str_radix(size, 16).unwrap_or(0);
            whole.push_str(&after[..n]);
            rest = after.get(n + 2..).unwrap_or_default();
        }
        body = whole;
    }
    Answer { status, head: head.to_owned(), body }
}

/// A request that takes long.
pub fn long() -> Value {
    json!({
        "prompt": "a cat", "max_tokens": 480, "ignore_eos": true, "n": 8, "temperature": 1.0,
        "stream": true,
    })
}
