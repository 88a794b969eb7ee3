//! Messages between ranks: each has a queue to and from every other one, within a process or over
//! TCP.

use super::world::World;
use crate::error::{Error, Result};
use socket2::{SockRef, TcpKeepalive};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long ranks wait for each other at the start.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long one attempt to connect may take.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// How long somebody who has connected may take to say which rank they are: it is said at once.
const GREETING_TIME: Duration = Duration::from_secs(1);
/// After how long it is said whom a rank waits for.
const SILENCE: Duration = Duration::from_secs(5);
/// When nothing has come for a while, whether the other machine is still there is asked so often.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// How long a rank may take nothing of what is sent to it; its reader takes all there is.
const STUCK: Duration = Duration::from_secs(120);
/// What a rank says first; whoever says anything else is not one.
const GREETING: [u8; 8] = *b"bprompt1";

/// A rank's connections to all others.
pub struct Mesh {
    rank: usize,
    /// By rank; none at its own place.
    peers: Vec<Option<Peer>>,
}

struct Peer {
    /// Until this rank ends.
    to: Option<Sender<Vec<u8>>>,
    from: Receiver<Vec<u8>>,
    /// Writes what is sent over TCP.
    writer: Option<JoinHandle<()>>,
}

impl Drop for Peer {
    /// Has all that was sent written, which the process may end after.
    fn drop(&mut self) {
        self.to = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Mesh {
    /// Ranks within this process, each for a thread of its own.
    pub fn in_process(ranks: usize) -> Vec<Mesh> {
        let mut meshes: Vec<Mesh> = (0..ranks)
            .map(|rank| Mesh { rank, peers: (0..ranks).map(|_| None).collect() })
            .collect();
        for a in 0..ranks {
            for b in a + 1..ranks {
                let ((to_b, from_a), (to_a, from_b)) = (channel(), channel());
                meshes[a].peers[b] = Some(Peer { to: Some(to_b), from: from_b, writer: None });
                meshes[b].peers[a] = Some(Peer { to: Some(to_a), from: from_a, writer: None });
            }
        }
        meshes
    }

    /// Meets the other ranks over TCP: rank 0 listens at the world's address, and tells all others
    /// where each of them listens.
    ///
    /// # Errors
    /// If they are not all there after ten minutes, or two have the same rank.
    pub fn connect(world: &World, note: &dyn Fn(&str)) -> Result<Mesh> {
        Mesh::connect_within(world, PATIENCE, note)
    }

    /// [`Mesh::connect`] with this patience. If it takes longer than some seconds, `note` is told
    /// once who is waited for.
    ///
    /// # Errors
    /// As for that.
    pub fn connect_within(world: &World, patience: Duration, note: &dyn Fn(&str)) -> Result<Mesh> {
        let until =
            Waiting { world, start: Instant::now(), patience, note, said: Cell::new(false) };
        let mut streams: Vec<Option<TcpStream>> = (0..world.ranks).map(|_| None).collect();
        if world.rank == 0 {
            let listener = listen_at(&world.master)?;
            let greetings = accept(&listener, &mut streams, 1, &until)?;
            let addresses: Vec<String> = greetings.iter().map(ToString::to_string).collect();
            let text = addresses.join("\n");
            for stream in streams.iter_mut().flatten() {
                send_frame(stream, text.as_bytes()).map_err(|e| broken(0, &e))?;
            }
        } else {
            let mut first = reach(&world.master, &until)?;
            let listener = listen_anywhere("0").map_err(|e| broken(0, &e))?;
            let port = listener.local_addr().map_err(|e| broken(0, &e))?.port();
            greet(&mut first, world, port).map_err(|e| broken(0, &e))?;
            let addresses = receive_addresses(&mut first, &until)?;
            let machine = first.peer_addr().map_err(|e| broken(0, &e))?.ip();
            streams[0] = Some(first);
            // by rank, from rank 1 on
            for (rank, mut address) in (1..world.rank).zip(addresses) {
                // who has reached rank 0 so is on its machine
                if address.ip().is_loopback() {
                    address.set_ip(machine);
                }
                let mut stream = reach(&address.to_string(), &until)?;
                greet(&mut stream, world, 0).map_err(|e| broken(rank, &e))?;
                streams[rank] = Some(stream);
            }
            accept(&listener, &mut streams, world.rank + 1, &until)?;
        }
        let peer = |(rank, stream): (usize, Option<TcpStream>)| {
            stream.map(|s| Peer::over(s).map_err(|e| broken(rank, &e))).transpose()
        };
        let peers = streams.into_iter().enumerate().map(peer).collect::<Result<_>>()?;
        Ok(Mesh { rank: world.rank, peers })
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn ranks(&self) -> usize {
        self.peers.len()
    }

    /// All ranks but this one, the next ones first, so that not all send to the same at once.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, ranks) = (self.rank, self.ranks());
        (1..ranks).map(move |i| (rank + i) % ranks)
    }

    fn peer(&self, rank: usize) -> &Peer {
        self.peers[rank].as_ref().expect("a rank sends nothing to itself")
    }

    /// Sends a message; does not wait until it is there.
    ///
    /// # Errors
    /// If the other rank has ended.
    pub fn send(&self, rank: usize, message: Vec<u8>) -> Result<()> {
        let to = self.peer(rank).to.as_ref().expect("the rank has not ended");
        to.send(message).map_err(|_| ended(rank))
    }

    /// The next message from a rank.
    ///
    /// # Errors
    /// If it has ended.
    pub fn receive(&self, rank: usize) -> Result<Vec<u8>> {
        self.peer(rank).from.recv().map_err(|_| ended(rank))
    }

    /// What every rank gave, by rank, at rank 0; nothing at the others.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        if self.rank > 0 {
            self.send(0, message)?;
            return Ok(Vec::new());
        }
        let others = (1..self.ranks()).map(|rank| self.receive(rank));
        std::iter::once(Ok(message)).chain(others).collect()
    }

    /// What every rank gave, by rank, at all of them.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn exchange(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        for rank in self.others() {
            self.send(rank, message.clone())?;
        }
        let of = |rank| if rank == self.rank { Ok(message.clone()) } else { self.receive(rank) };
        (0..self.ranks()).map(of).collect()
    }
}

impl Peer {
    /// A connection with a thread that writes what is sent and one that reads what comes.
    fn over(stream: TcpStream) -> std::io::Result<Peer> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(STUCK))?;
        stream.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let (to, outgoing) = channel::<Vec<u8>>();
        let (incoming, from) = channel();
        let mut writing = stream.try_clone()?;
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let writer = thread("rank-writer").spawn(move || {
            // when this rank has ended and all is written, the other one reads the end
            while let Ok(message) = outgoing.recv() {
                if send_frame(&mut writing, &message).is_err() {
                    // who waits for the other rank here, and it for the rest of this, learns of it
                    let _ = writing.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
            let _ = writing.shutdown(std::net::Shutdown::Write);
        })?;
        let mut reading = stream;
        thread("rank-reader").spawn(move || {
            while let Ok(message) = receive_frame(&mut reading) {
                if incoming.send(message).is_err() {
                    return;
                }
            }
        })?;
        Ok(Peer { to: Some(to), from, writer: Some(writer) })
    }
}

fn ended(rank: usize) -> Error {
    Error::Internal(format!("rank {rank} has ended or does not answer; its own output says why"))
}

fn broken(rank: usize, cause: &std::io::Error) -> Error {
    Error::Internal(format!("the connection to rank {rank} failed: {cause}"))
}

/// A message is its length and its bytes.
fn send_frame(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(&(message.len() as u64).to_le_bytes())?;
    stream.write_all(message)
}

fn receive_frame(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    // room grows with what comes, whatever was announced
    let mut message = Vec::new();
    Read::take(stream, length).read_to_end(&mut message)?;
    if (message.len() as u64) < length {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

fn listen_at(address: &str) -> Result<TcpListener> {
    // the port alone matters: the name may be that of a service in front of this machine
    let port = address.rsplit_once(':').map_or("", |(_, port)| port);
    listen_anywhere(port).map_err(|e| {
        Error::invalid(format!(
            "rank 0 cannot listen at MASTER_PORT {port}: {e}; choose another one for all ranks, \
            and check that RANK is 0 only once"
        ))
    })
}

fn listen_anywhere(port: &str) -> std::io::Result<TcpListener> {
    let any = |ip: &str| TcpListener::bind(format!("{ip}:{port}"));
    any("[::]").or_else(|_| any("0.0.0.0"))
}

/// How long a rank waits for the others, and whom it tells.
struct Waiting<'a> {
    world: &'a World,
    start: Instant,
    patience: Duration,
    note: &'a dyn Fn(&str),
    said: Cell<bool>,
}

impl Waiting<'_> {
    /// Whether it is over; says what for if it has taken long.
    fn is_over(&self, what: impl FnOnce() -> String) -> bool {
        let waited = self.start.elapsed();
        if waited > SILENCE && !self.said.replace(true) {
            (self.note)(&format!("rank {} waits: {}", self.world.rank, what()));
        }
        waited >= self.patience
    }
}

/// Where the other ranks from rank 1 on listen, as rank 0 says when all are there.
fn receive_addresses(first: &mut TcpStream, until: &Waiting) -> Result<Vec<SocketAddr>> {
    // rank 0 waits as long, and says who is missing
    let left = (until.patience + GREETING_TIME).saturating_sub(until.start.elapsed());
    let text = first
        .set_read_timeout(Some(left.max(GREETING_TIME)))
        .and_then(|()| receive_frame(first))
        .map_err(|e| {
            Error::invalid(format!(
                "rank 0 has not said where the others are ({e}); its own output says why"
            ))
        })?;
    let text = String::from_utf8_lossy(&text);
    let addresses: Option<Vec<SocketAddr>> = text.lines().map(|l| l.parse().ok()).collect();
    addresses.ok_or_else(|| Error::Internal("rank 0 sent no addresses".into()))
}

/// Connects, as soon as somebody listens there.
fn reach(address: &str, until: &Waiting) -> Result<TcpStream> {
    let World { rank, ranks, .. } = until.world;
    loop {
        let cause = match connect_once(address) {
            Ok(stream) => return Ok(stream),
            Err(cause) => cause,
        };
        if until.is_over(|| format!("nobody answers at {address} yet ({cause})")) {
            return Err(Error::invalid(format!(
                "rank {rank} of {ranks} does not reach {address}: {cause}; check MASTER_ADDR and \
                MASTER_PORT, and that all ranks have been started"
            )));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn connect_once(address: &str) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECTION_TIME) {
            // where nobody listens, a connection may come to meet itself
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {}
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Says who this is, and where others reach it.
fn greet(stream: &mut TcpStream, world: &World, port: u16) -> std::io::Result<()> {
    let mut greeting = GREETING.to_vec();
    greeting.extend((world.rank as u32).to_le_bytes());
    greeting.extend((world.ranks as u32).to_le_bytes());
    greeting.extend(port.to_le_bytes());
    stream.write_all(&greeting)
}

/// The rank, the number of ranks, and the port of somebody; none if they are no rank of a run.
fn read_greeting(stream: &mut TcpStream) -> Option<(usize, usize, u16)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING_TIME)).ok()?;
    let mut bytes = [0; 18];
    stream.read_exact(&mut bytes).ok()?;
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let port = u16::from_le_bytes([bytes[16], bytes[17]]);
    let known = bytes[..8] == GREETING;
    known.then(|| (number(8) as usize, number(12) as usize, port))
}

/// Waits for all ranks from `first` on; returns where they can be reached. Whoever else connects is
/// left alone.
fn accept(
    listener: &TcpListener,
    streams: &mut [Option<TcpStream>],
    first: usize,
    until: &Waiting,
) -> Result<Vec<SocketAddr>> {
    let world = until.world;
    listener.set_nonblocking(true).map_err(|e| broken(world.rank, &e))?;
    let unknown = SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0);
    let mut addresses = vec![unknown; streams.len() - first];
    while let Some(missing) = (first..streams.len()).find(|&rank| streams[rank].is_none()) {
        let over = until.is_over(|| format!("rank {missing} has not come yet"));
        let (mut stream, from) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && !over => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            _ if over => {
                return Err(Error::invalid(format!(
                    "rank {} waited for rank {missing} of {} and it did not come; check its \
                    output, MASTER_ADDR and MASTER_PORT",
                    world.rank, world.ranks
                )));
            }
            Err(e) => return Err(broken(missing, &e)),
        };
        let Some((rank, ranks, port)) = read_greeting(&mut stream) else { continue };
        if ranks != world.ranks || !(first..ranks).contains(&rank) {
            return Err(Error::invalid(format!(
                "rank {rank} of {ranks} came to rank {} of {}; WORLD_SIZE must be the same and \
                RANK another one everywhere",
                world.rank, world.ranks
            )));
        }
        if streams[rank].replace(stream).is_some() {
            return Err(Error::invalid(format!("two ranks are number {rank}; check RANK")));
        }
        addresses[rank - first] = SocketAddr::new(from.ip().to_canonical(), port);
    }
    Ok(addresses)
}
