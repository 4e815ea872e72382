//! Bytes as what an NBD server says to haul, and as what a client says to haul's server.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use haul::error::{Error, Kind};
use haul::io::fake::MemoryDisk;
use haul::io::nbd::{Client, Options, Server, Uri};
use haul::io::{ReadAt, WriteAt};

use super::archive::scratch;
use super::{Outcome, signature};

/// Longer than any answer takes: who waits as long waits without end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes a socket takes before its other end reads any.
const LONGEST: usize = 64 << 10;
/// Longest talk of a client: each of its requests may be answered with the whole disk.
const TALK: usize = 4 << 10;
/// Connections that one talk may lead to: four at first, and one more try of each request.
const CONNECTIONS: usize = 16;

/// What the server says to each client, and the connections it opened.
#[derive(Default)]
struct Says {
    script: Vec<u8>,
    open: Vec<UnixStream>,
}

fn server() -> &'static (Uri, Mutex<Says>) {
    static SERVER: OnceLock<(Uri, Mutex<Says>)> = OnceLock::new();
    SERVER.get_or_init(|| {
        let path = scratch().join("says");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut says = server().1.lock().unwrap_or_else(PoisonError::into_inner);
                // A client that heard enough hangs up.
                let _ = stream.write_all(&says.script);
                let _ = stream.shutdown(Shutdown::Write);
                says.open.push(stream);
            }
        });
        let uri = format!("nbd+unix:///?socket={}", path.display());
        (Uri::parse(&uri).unwrap(), Mutex::default())
    })
}

fn judge(error: &Error, uri: &Uri) -> String {
    // A server may ask for TLS, which haul leaves to others.
    let fits = matches!(error.kind(), Kind::Network | Kind::Source) || error.id() == "nbd.tls";
    assert!(fits, "{error:?}");
    assert!(error.what().contains(&uri.to_string()), "the export is not named: {error:?}");
    signature(error)
}

/// Takes `bytes` as what a server says, whatever it hears: a disk of it is opened and read, or fails with an error.
pub fn fuzz_client(bytes: &[u8]) -> Outcome {
    // One at a time: there is one server.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (uri, says) = server();
    *says.lock().unwrap_or_else(PoisonError::into_inner) =
        Says { script: bytes[..bytes.len().min(LONGEST)].to_vec(), open: Vec::new() };
    let options =
        Options { connect: PATIENCE, reply: PATIENCE, outage: Duration::ZERO, ..Options::default() };
    let outcome = match Client::connect_with(uri, options) {
        Err(error) => Outcome::Refused(judge(&error, uri)),
        Ok(disk) => match talk(&disk) {
            Ok(()) => Outcome::Fine(String::new()),
            Err(error) => Outcome::Broken(judge(&error, uri)),
        },
    };
    let connections = says.lock().unwrap_or_else(PoisonError::into_inner).open.len();
    assert!(connections <= CONNECTIONS, "{connections} connections");
    outcome
}

/// Reads the first bytes (the first request) and asks what is data (the second).
fn talk(disk: &Client) -> haul::error::Result<()> {
    let size = disk.size();
    let mut bytes = vec![1; usize::try_from(size.min(8 << 10)).unwrap()];
    disk.read_at(&mut bytes, 0)?;
    if let Some(data) = disk.next_data(0)? {
        assert!(data.start < data.end && data.end <= size, "{data:?} of {size}");
    }
    Ok(())
}

/// Takes `bytes` as what a client says: it is answered, and the server hangs up; first one that may only read, then one
/// that may write.
pub fn fuzz_server(bytes: &[u8]) -> Outcome {
    static SERVERS: OnceLock<[Server; 2]> = OnceLock::new();
    let [reads, writes] = SERVERS.get_or_init(|| {
        let disk = || {
            let disk = MemoryDisk::sparse(64 << 10);
            disk.write_at(&[0xda; 4096], 8192).unwrap();
            Arc::new(disk)
        };
        let written = disk();
        [
            Server::start(disk(), &scratch().join("serves")).unwrap(),
            Server::writable(written.clone(), written, &scratch().join("takes")).unwrap(),
        ]
    });
    let told = [hear(reads, bytes), hear(writes, bytes)];
    Outcome::Fine(told.join(" "))
}

/// How `server` answers `bytes`, in a few words.
fn hear(server: &Server, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(server.path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    // A server that heard enough hangs up, with or without reading the rest.
    let _ = stream.write_all(&bytes[..bytes.len().min(TALK)]);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answers) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the server waits without end");
    }
    // The greeting, then answers to options and requests: how many kinds of each there are.
    let mut kinds = std::collections::BTreeSet::new();
    // One by one: collected, all of them would be held before they are told apart.
    answers.windows(4).filter(|word| word.starts_with(&[0, 0])).for_each(|word| {
        kinds.insert(word);
    });
    format!("{} {}", answers.len().max(1).ilog2(), kinds.len().min(12))
}
