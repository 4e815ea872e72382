//! A disk served on a Unix socket, to boot or look at it by programs that speak NBD, such as QEMU; read-only, unless it is
//! meant to be written.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};
use nix::sys::stat::{Mode, fchmod};

use super::answer::negotiate;
use super::conversation;
use super::link::Link;
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, WriteAt};

/// Most clients at a time; one more is turned away.
const MAX_CLIENTS: usize = 8;
/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// A disk being served; dropping it ends that.
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    disk: Disk,
    listener: UnixListener,
    clients: Mutex<Clients>,
}

/// The disk that is served, and the first failure to read or write it.
pub struct Disk {
    source: Arc<dyn ReadAt>,
    /// The same disk, where clients may write it.
    sink: Option<Arc<dyn WriteAt>>,
    failure: Mutex<Option<Error>>,
}

impl Disk {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.source.size()
    }

    /// The disk itself.
    pub fn source(&self) -> &dyn ReadAt {
        &*self.source
    }

    /// Reads the disk; the text of an error is for the client.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> std::result::Result<(), String> {
        self.source.read_at(buf, offset).map_err(|error| self.failed(error))
    }

    /// Whether clients may write it.
    pub fn is_writable(&self) -> bool {
        self.sink.is_some()
    }

    /// Lets `write` change the disk; the text of an error is for the client.
    pub fn change(&self, write: impl FnOnce(&dyn WriteAt) -> Result<()>) -> std::result::Result<(), String> {
        match &self.sink {
            Some(sink) => write(&**sink).map_err(|error| self.failed(error)),
            None => Err("the disk is read-only".to_owned()),
        }
    }

    /// Keeps the first failure for [`Server::stop`]; returns the text for the client.
    pub fn failed(&self, error: Error) -> String {
        let text = error.to_string();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        text
    }
}

#[derive(Default)]
struct Clients {
    stopped: bool,
    running: Vec<(UnixStream, JoinHandle<()>)>,
}

impl Server {
    /// Serves `disk` as the default export (of the empty name) at a new socket `path`, which only this user may
    /// connect to. Fails when `path` exists ([`Kind::Usage`]) or no socket can be made there ([`Kind::Destination`]).
    pub fn start(disk: Arc<dyn ReadAt>, path: &Path) -> Result<Self> {
        Server::begin(disk, None, path)
    }

    /// The same, and clients may write: `sink`, which is the same disk.
    pub fn writable(disk: Arc<dyn ReadAt>, sink: Arc<dyn WriteAt>, path: &Path) -> Result<Self> {
        Server::begin(disk, Some(sink), path)
    }

    fn begin(disk: Arc<dyn ReadAt>, sink: Option<Arc<dyn WriteAt>>, path: &Path) -> Result<Self> {
        let failed = |error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::AddrInUse => Kind::Usage,
                _ => Kind::Destination,
            };
            Error::new(kind, "nbd.listen", format!("cannot serve {} at {}", disk.name(), path.display()))
                .fact("path", path.display())
                .caused_by(error)
        };
        let listener = listen_at(path).map_err(failed)?;
        let shared = Arc::new(Shared {
            disk: Disk { source: disk.clone(), sink, failure: Mutex::default() },
            listener,
            clients: Mutex::default(),
        });
        let mut server = Server { path: path.to_owned(), shared: shared.clone(), accepting: None };
        let accept = move || shared.accept();
        server.accepting =
            Some(thread::Builder::new().name("nbd-accept".into()).spawn(accept).map_err(failed)?);
        Ok(server)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends all connections and removes the socket. Fails with the first error of reading or writing the disk, if there was one:
    /// the client saw it as an I/O error.
    pub fn stop(mut self) -> Result<()> {
        self.end();
        match self.shared.disk.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn end(&mut self) {
        let mut clients = self.shared.clients();
        clients.stopped = true;
        let running = std::mem::take(&mut clients.running);
        drop(clients);
        // Wakes accept(2). It fails when that ended by itself.
        let _ = shutdown(self.shared.listener.as_raw_fd(), Shutdown::Both);
        for (socket, _) in &running {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        let threads = running.into_iter().map(|(_, thread)| thread).chain(self.accepting.take());
        // A thread that panicked has nothing left to give.
        threads.for_each(|thread| drop(thread.join()));
        // Another program may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.accepting.is_some() {
            self.end();
        } else {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A listening socket that is never open to others: its mode is set before it has a name (unix(7)).
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(i32::try_from(MAX_CLIENTS).unwrap_or(1))?)?;
    Ok(socket.into())
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>) {
        loop {
            let accepted = self.listener.accept();
            let mut clients = self.clients();
            if clients.stopped {
                return;
            }
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) if is_passing(&error) => {
                    drop(clients);
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
                Err(_) => return,
            };
            clients.running.retain(|(_, thread)| !thread.is_finished());
            if clients.running.len() >= MAX_CLIENTS {
                continue;
            }
            let Ok(kept) = socket.try_clone() else { continue };
            let shared = self.clone();
            let thread = thread::Builder::new().name("nbd-client".into());
            let Ok(thread) = thread.spawn(move || shared.serve(socket)) else { continue };
            clients.running.push((kept, thread));
        }
    }

    /// Serves one client until it leaves, breaks the protocol or is cut off.
    fn serve(&self, socket: UnixStream) {
        // To be shut down also where another holder of the socket keeps it open.
        let Ok(kept) = socket.try_clone() else { return };
        let mut link = Link::unix(socket, HANDSHAKE);
        if let Ok(Some(agreed)) = negotiate(&mut link, self.disk.size(), self.disk.is_writable()) {
            // The client is gone or may come again.
            let _ = conversation::serve(&self.disk, agreed, link);
        }
        let _ = kept.shutdown(std::net::Shutdown::Both);
    }
}

/// Whether accept(2) may succeed later: the client left, or descriptors or memory are short.
fn is_passing(error: &io::Error) -> bool {
    let passing = [libc::ECONNABORTED, libc::EINTR, libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|number| passing.contains(&number))
}
