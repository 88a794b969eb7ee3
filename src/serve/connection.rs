//! A client's connection: how long it may leave an answer lying, and whether it is still there.

use axum::body::{Body, Bytes};
use futures_util::stream::{self, StreamExt};
use std::future::ready;
use std::io::{self, ErrorKind, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// How long a client may have closed its side for before it is asked whether it is there.
const GRACE: Duration = Duration::from_millis(250);

/// The first byte of every answer, of HTTP/1.0 and HTTP/1.1 alike and whatever its status
/// ("HTTP/1.1 200"). It may be sent before there is more: a client that reads gets its answer byte
/// for byte, and a closed socket refuses it.
const FIRST: &[u8] = b"H";

/// A line of server-sent events that says nothing.
const COMMENT: &[u8] = b":\n\n";

/// Whether the client at the other end is there.
#[derive(Clone)]
pub struct Client {
    stream: Arc<TcpStream>,
    /// Something is to be written and is not yet.
    unwritten: Arc<AtomicBool>,
    /// `FIRST` was sent, and the answer that is written next goes on behind it.
    begun: Arc<AtomicBool>,
}

/// A stream whose writes fail if the other end takes nothing for too long.
pub struct Wire {
    client: Client,
    limit: Option<Duration>,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    pub fn new(stream: TcpStream, limit: Option<Duration>) -> Wire {
        let client =
            Client { stream: Arc::new(stream), unwritten: Arc::default(), begun: Arc::default() };
        Wire { client, limit, stalled: None }
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Writes with `write`, except that an answer whose first byte was sent already has that
    /// written first. There is always something to write: hyper never writes nothing.
    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if self.client.begun.swap(false, Ordering::Relaxed) {
            return Poll::Ready(Ok(FIRST.len()));
        }
        let written = loop {
            match self.client.stream.poll_write_ready(cx) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(Err(e)) => break Poll::Ready(Err(e)),
                Poll::Ready(Ok(())) => {}
            }
            match write(&self.client.stream) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
                written => break Poll::Ready(written),
            }
        };
        self.client.unwritten.store(written.is_pending(), Ordering::Relaxed);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let Some(limit) = self.limit else { return Poll::Pending };
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        std::task::ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            ErrorKind::TimedOut,
            "the client takes nothing of its answer",
        )))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            std::task::ready!(self.client.stream.poll_read_ready(cx))?;
            match self.client.stream.try_read(buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |s| s.try_write(buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |s| s.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = socket2::SockRef::from(&*self.client.stream).shutdown(Shutdown::Write);
        // it may be closed already
        Poll::Ready(
            closed.or_else(|e| if e.kind() == ErrorKind::NotConnected { Ok(()) } else { Err(e) }),
        )
    }
}

impl Client {
    /// Resolves when the client has gone away; not while it has merely finished sending, which
    /// looks the same until something is sent to it. To be asked before the answer begins.
    pub async fn left(&self) {
        if self.closed_its_side().await.is_err() {
            return;
        }
        sleep(GRACE).await;
        if !self.unwritten.load(Ordering::Relaxed)
            && self.stream.try_write(FIRST).is_ok_and(|n| n > 0)
        {
            self.begun.store(true, Ordering::Relaxed);
        }
        self.refused().await;
    }

    /// An answer of server-sent events that breaks off when the client has gone away: one that has
    /// closed its side gets a comment, which nobody is there to take.
    pub fn watched(self, answer: Body) -> Body {
        let events = answer.into_data_stream().map(Some).chain(stream::iter([None]));
        let gone = || Err(axum::Error::new(io::Error::from(ErrorKind::ConnectionAborted)));
        let asked = stream::once(async move {
            let comment = self.closed_its_side().await.map(|()| Bytes::from_static(COMMENT));
            (self, comment.map_err(axum::Error::new))
        });
        let asked = asked.flat_map(move |(client, comment)| {
            let refused = stream::once(async move {
                client.refused().await;
                Some(gone())
            });
            stream::iter([Some(comment)]).chain(refused)
        });
        let all = stream::select(events, asked);
        Body::from_stream(all.take_while(|e| ready(e.is_some())).filter_map(ready))
    }

    /// Resolves when the client has finished sending, with an error if its connection is broken.
    async fn closed_its_side(&self) -> io::Result<()> {
        loop {
            match self.stream.peek(&mut [0]).await? {
                0 => return Ok(()),
                // more of the body, or the next request
                _ => sleep(GRACE).await,
            }
        }
    }

    /// Resolves when the other end has refused what was written.
    async fn refused(&self) {
        let mut pause = Duration::from_millis(10);
        loop {
            sleep(pause).await;
            if !matches!(self.stream.take_error(), Ok(None)) {
                return;
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}
