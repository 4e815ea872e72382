//! A socket on which everything must be done by a deadline, however slowly the other side trickles.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

use super::Address;

/// A TCP or Unix socket with a deadline.
pub struct Link {
    socket: Socket,
    /// `None`: there is no hurry.
    deadline: Option<Instant>,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Link {
    /// Connects to `address` within `timeout`, which then is also the time for what follows. Looking up the name of
    /// a host is left to the system and its own limits.
    pub fn connect(address: &Address, timeout: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + timeout;
        let socket = match address {
            Address::Tcp(host, port) => Socket::Tcp(connect_tcp(host, *port, deadline)?),
            Address::Unix(path) => Socket::Unix(connect_unix(path, timeout)?),
        };
        Ok(Link { socket, deadline: Some(deadline) })
    }

    /// A connected Unix socket on which everything must be done within `timeout`.
    pub fn unix(socket: UnixStream, timeout: Duration) -> Self {
        Link { socket: Socket::Unix(socket), deadline: Some(Instant::now() + timeout) }
    }

    /// What follows must be done within `timeout` from now.
    pub fn within(&mut self, timeout: Duration) {
        self.until(Instant::now() + timeout);
    }

    /// What follows must be done by `deadline`.
    pub fn until(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// What follows may take as long as it likes.
    pub fn at_leisure(&mut self) {
        self.deadline = None;
    }

    /// The same socket with a deadline of its own. One thread may read from it while another one writes to it.
    pub fn try_clone(&self) -> io::Result<Self> {
        let socket = match &self.socket {
            Socket::Tcp(socket) => Socket::Tcp(socket.try_clone()?),
            Socket::Unix(socket) => Socket::Unix(socket.try_clone()?),
        };
        Ok(Link { socket, deadline: self.deadline })
    }

    /// Ends the connection for this socket and its clones; who waits on one of them waits no longer.
    pub fn shut_down(&self) {
        // It fails when the other side was faster.
        let _ = match &self.socket {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    /// The time left, never zero (which would mean no limit to a socket).
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(deadline) = self.deadline else { return Ok(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// A socket says "would block" when its time is over.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.socket {
            Socket::Tcp(socket) => socket.set_read_timeout(left).and_then(|()| socket.read(buf)),
            Socket::Unix(socket) => socket.set_read_timeout(left).and_then(|()| socket.read(buf)),
        }
        .map_err(timed_out)
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.socket {
            Socket::Tcp(socket) => socket.set_write_timeout(left).and_then(|()| socket.write(bytes)),
            Socket::Unix(socket) => socket.set_write_timeout(left).and_then(|()| socket.write(bytes)),
        }
        .map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first address of `host` that answers.
fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => {
                // A request is one small packet that somebody waits for.
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// A Unix socket whose server does not accept makes connect(2) wait; the limit for sending counts there, too.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    let address = match bytes.strip_prefix(b"\0") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None => UnixAddr::new(path)?,
    };
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = timeout.as_secs().try_into().unwrap_or(i64::MAX);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(seconds, i64::from(timeout.subsec_micros()).max(1)))?;
    connect(fd.as_raw_fd(), &address).map_err(|error| timed_out(error.into()))?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn a_server_that_trickles_does_not_move_the_deadline() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut link = Link::unix(near, Duration::from_millis(50));
        let trickle = std::thread::spawn(move || while (&far).write_all(&[0]).is_ok() {});
        let error = io::copy(&mut link, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(link);
        trickle.join().unwrap();
    }

    #[test]
    fn a_server_that_does_not_accept_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let fd: OwnedFd =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let _first = connect_unix(&path, Duration::from_millis(50)).unwrap();
        let error = connect_unix(&path, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
