//! A small HTTP client that times what a server streams.

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::time::Instant;
use tokio::net::TcpStream;

/// Where a server is.
#[derive(Clone, Debug)]
pub struct Server {
    /// host:port
    pub address: String,
    /// Before all paths.
    prefix: String,
    /// Sent as a bearer token, if there is one.
    pub api_key: Option<String>,
}

impl Server {
    /// Reads `http://host:port/prefix`.
    pub fn parse(url: &str, api_key: Option<String>) -> anyhow::Result<Server> {
        let rest = url.strip_prefix("http://");
        let rest = rest.with_context(|| {
            format!("--base-url {url}: expected http://HOST:PORT (https is not supported)")
        })?;
        let (address, prefix) =
            rest.split_once('/').map_or((rest, String::new()), |(a, p)| (a, format!("/{p}")));
        ensure!(!address.is_empty(), "--base-url {url}: has no host");
        let address =
            if address.contains(':') { address.to_owned() } else { format!("{address}:80") };
        // OpenAI's clients take it with the version
        let prefix = prefix.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        Ok(Server { address, prefix, api_key })
    }

    async fn send(
        &self,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<hyper::Response<Incoming>> {
        let stream = TcpStream::connect(&self.address).await;
        let stream = stream.with_context(|| format!("cannot connect to {}", self.address))?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request =
            Request::builder().uri(format!("{}{path}", self.prefix)).header("host", &self.address);
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let (method, bytes) = match body {
            Some(value) => ("POST", Bytes::from(value.to_string())),
            None => ("GET", Bytes::new()),
        };
        let request = request
            .method(method)
            .header("content-type", "application/json")
            .body(Full::new(bytes))?;
        Ok(sender.send_request(request).await?)
    }

    /// A whole answer in JSON.
    pub async fn json(&self, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let response = self.send(path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{path}: {status}: {}", String::from_utf8_lossy(&bytes));
        serde_json::from_slice(&bytes).with_context(|| format!("{path}: the answer is not JSON"))
    }

    /// Sends a request for server-sent events and tells of each when it comes.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        mut on_event: impl FnMut(Value, Instant),
    ) -> anyhow::Result<()> {
        let response = self.send(path, Some(body)).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = body.collect().await?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&bytes));
        }
        let mut buffer: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            let now = Instant::now();
            buffer.extend_from_slice(&data);
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let Some(data) = line.trim_end().strip_prefix("data:") else { continue };
                match data.trim() {
                    "[DONE]" => return Ok(()),
                    data => {
                        let event: Value =
                            serde_json::from_str(data).context("an event is not JSON")?;
                        if let Some(e) = event.get("error") {
                            bail!(
                                "{}",
                                e.get("message")
                                    .and_then(Value::as_str)
                                    .unwrap_or("an error without a message")
                            );
                        }
                        on_event(event, now);
                    }
                }
            }
        }
        bail!("the answer ended before [DONE]")
    }
}
