//! Servers and clients that break the protocol: never a panic, a wait without end, or memory for what they claim.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proptest::prelude::*;

use super::connection::Connection;
use super::fault::Fault;
use super::link::Link;
use super::server::Server;
use super::wire::{self, REQUEST_LEN, Request, chunk, cmd, errno, flag, info, opt, rep};
use super::{Client, Options, Uri, answer};
use crate::io::ReadAt;
use crate::io::fake::MemoryDisk;
use crate::unit::{Extent, KIB};

const SIZE: u64 = 64 << 10;
/// Longer than any test runs: a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const CONTEXT: u32 = 7;

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn greeting() -> Vec<u8> {
    join(&[&wire::NBDMAGIC.to_be_bytes(), &wire::IHAVEOPT.to_be_bytes(), &3u16.to_be_bytes()])
}

fn option(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = join(&[&wire::OPTION_REPLY.to_be_bytes(), &option.to_be_bytes(), &kind.to_be_bytes()]);
    wire::put_string(&mut bytes, payload);
    bytes
}

fn structured() -> Vec<u8> {
    option(opt::STRUCTURED_REPLY, rep::ACK, &[])
}

fn contexts() -> Vec<u8> {
    let context = join(&[&CONTEXT.to_be_bytes(), wire::ALLOCATION.as_bytes()]);
    let set = opt::SET_META_CONTEXT;
    join(&[&option(set, rep::META_CONTEXT, &context), &option(set, rep::ACK, &[])])
}

fn export(size: u64) -> Vec<u8> {
    let flags = flag::HAS_FLAGS | flag::READ_ONLY;
    let export = join(&[&info::EXPORT.to_be_bytes(), &size.to_be_bytes(), &flags.to_be_bytes()]);
    option(opt::GO, rep::INFO, &export)
}

fn blocks(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
    option(opt::GO, rep::INFO, &join(&[&info::BLOCK_SIZE.to_be_bytes(), &sizes]))
}

fn go() -> Vec<u8> {
    option(opt::GO, rep::ACK, &[])
}

/// All that a good server says until it is asked for bytes.
fn negotiated() -> Vec<u8> {
    join(&[&greeting(), &structured(), &contexts(), &export(SIZE), &blocks(512, 4096, 1 << 20), &go()])
}

/// A chunk of the reply to the request `cookie`.
fn reply(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    join(&[&wire::chunk_header(flags, kind, cookie, payload.len().try_into().unwrap()), payload])
}

fn data(at: u64, len: usize) -> Vec<u8> {
    join(&[&at.to_be_bytes(), &vec![0xda; len]])
}

fn hole(at: u64, len: u32) -> Vec<u8> {
    join(&[&at.to_be_bytes(), &len.to_be_bytes()])
}

fn status(context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    let descriptors: Vec<u8> = descriptors.iter().flat_map(|(len, flags)| hole_bytes(*len, *flags)).collect();
    join(&[&context.to_be_bytes(), &descriptors])
}

fn hole_bytes(len: u32, flags: u32) -> [u8; 8] {
    (u64::from(len) << 32 | u64::from(flags)).to_be_bytes()
}

/// What a server does that has said all.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Closes,
    Stalls,
}

/// A server that says `script` whatever it hears.
fn saying(script: Vec<u8>, then: Then) -> (UnixStream, JoinHandle<()>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        // A client that heard enough hangs up.
        let _ = far.write_all(&script);
        if then == Then::Closes {
            let _ = far.shutdown(Shutdown::Write);
        }
        let _ = std::io::copy(&mut far, &mut std::io::sink());
    });
    (near, server)
}

/// Reads the first 8 KiB (request 1) and asks for the map of all (request 2) from a server that says `script`.
fn talk(script: Vec<u8>) -> Result<(Vec<u8>, Vec<Extent>), Fault> {
    talk_within(PATIENCE, script, Then::Closes)
}

/// The same, where each call has `limit`.
fn talk_within(limit: Duration, script: Vec<u8>, then: Then) -> Result<(Vec<u8>, Vec<Extent>), Fault> {
    let (socket, server) = saying(script, then);
    let uri = Uri::parse("nbd+unix:///?socket=/hostile").unwrap();
    let heard = Connection::open(Link::unix(socket, limit), &uri, limit).and_then(|connection| {
        let mut bytes = vec![1; 8 << 10];
        let read = connection.read(&mut bytes, 0)?;
        bytes.truncate(read);
        let status = connection.status(Extent::new(0, connection.export().size))?;
        Ok((bytes, status.data))
    });
    server.join().unwrap();
    heard
}

fn good_reply() -> Vec<u8> {
    join(&[
        &reply(1, 0, chunk::OFFSET_HOLE, &hole(4096, 4096)),
        &reply(1, chunk::FLAG_DONE, chunk::OFFSET_DATA, &data(0, 4096)),
    ])
}

fn good_status() -> Vec<u8> {
    reply(2, chunk::FLAG_DONE, chunk::BLOCK_STATUS, &status(CONTEXT, &[(4096, 0), (61440, 3)]))
}

#[test]
fn a_good_server_is_understood() {
    let (bytes, runs) = talk(join(&[&negotiated(), &good_reply(), &good_status()])).unwrap();
    assert_eq!(bytes, join(&[&[0xda; 4096], &[0; 4096]]));
    assert_eq!(runs, [Extent::new(0, 4096)]);
}

#[test]
fn each_breach_of_the_protocol_is_named() {
    let long = u32::MAX.to_be_bytes();
    let options = |parts: &[&[u8]]| join(&[&greeting(), &join(parts)]);
    let go_of = |parts: &[&[u8]]| join(&[&greeting(), &structured(), &contexts(), &join(parts), &go()]);
    let read = |parts: &[&[u8]]| join(&[&negotiated(), &join(parts)]);
    let map = |parts: &[&[u8]]| join(&[&negotiated(), &good_reply(), &join(parts)]);
    let part = |flags, kind, payload: &[u8]| reply(1, flags, kind, payload);
    let done = chunk::FLAG_DONE;
    let answer =
        |descriptors: &[(u32, u32)]| reply(2, done, chunk::BLOCK_STATUS, &status(CONTEXT, descriptors));
    let error = |errno: u32, text: u16| join(&[&errno.to_be_bytes(), &text.to_be_bytes()]);
    let mut long_option = option(opt::STRUCTURED_REPLY, rep::ACK, &[]);
    long_option.truncate(16);
    for (what, script, words) in [
        ("another protocol", b"SSH-2.0-OpenSSH_9.2p1 Debian".to_vec(), "a greeting"),
        ("a long answer", options(&[&long_option, &long]), "4294967295 bytes to option 8"),
        ("an answer to another option", options(&[&contexts()]), "to option 10, after option 8"),
        ("an odd answer", options(&[&option(opt::STRUCTURED_REPLY, rep::INFO, &[])]), "type 3 to an option"),
        (
            "answers without end",
            options(&[&structured(), &contexts()[..contexts().len() - 20].repeat(1000)]),
            "more than 64 answers",
        ),
        ("no size", go_of(&[&blocks(512, 512, 512)]), "no word about the size"),
        ("too large a size", go_of(&[&export(u64::MAX)]), "18446744073709551615 bytes"),
        ("blocks of nothing", go_of(&[&export(SIZE), &blocks(0, 0, 0)]), "block sizes of 0, 0 and 0"),
        ("long blocks", go_of(&[&export(SIZE), &blocks(1 << 17, 1 << 17, 1 << 20)]), "block sizes of 131072"),
        ("a short maximum", go_of(&[&export(SIZE), &blocks(4096, 4096, 512)]), "4096 and 512"),
        ("short information", go_of(&[&option(opt::GO, rep::INFO, &[0, 0, 1])]), "type 3 and 3 bytes to GO"),
        ("no reply", read(&[&[0; 20]]), "a reply that begins with"),
        ("a reply not asked for", read(&[&reply(3, done, chunk::NONE, &[])]), "a request not made"),
        ("a simple reply", read(&[&wire::simple_reply(1, 0)]), "a simple reply where"),
        ("an empty reply", read(&[&part(done, chunk::NONE, &[])]), "0 bytes in a reply for 0..8192"),
        ("half a reply", read(&[&part(done, chunk::OFFSET_DATA, &data(0, 4096))]), "4096 bytes in a reply"),
        ("bytes beyond", read(&[&part(done, chunk::OFFSET_DATA, &data(4096, 8192))]), "bytes 4096..12288"),
        ("bytes at the end", read(&[&part(0, chunk::OFFSET_DATA, &data(u64::MAX - 1, 8))]), "bytes 184467"),
        ("a hole beyond", read(&[&part(0, chunk::OFFSET_HOLE, &hole(1, u32::MAX))]), "bytes 1..4294967296"),
        ("a hole of nothing", read(&[&part(0, chunk::OFFSET_HOLE, &hole(0, 0))]), "bytes 0..0"),
        ("a long hole", read(&[&part(0, chunk::OFFSET_HOLE, &data(0, 512))]), "type 2 and 520 bytes"),
        ("no place", read(&[&part(0, chunk::OFFSET_DATA, &[0; 8])]), "type 1 and 8 bytes"),
        ("a map for a read", read(&[&part(0, chunk::BLOCK_STATUS, &[0; 12])]), "type 5 and 12 bytes"),
        ("4 GiB", read(&[&wire::chunk_header(0, chunk::OFFSET_DATA, 1, u32::MAX), &[0; 8]]), "0..4294967287"),
        (
            "the same bytes twice",
            read(&[&part(0, chunk::OFFSET_DATA, &data(0, 512)).repeat(2)]),
            "bytes 0..512 in a reply for 0..8192",
        ),
        ("an empty chunk", read(&[&part(0, chunk::NONE, &[])]), "an empty chunk that is not the last"),
        (
            "chunks without end",
            read(&[&(0..100).flat_map(|i| part(0, chunk::OFFSET_DATA, &data(i, 1))).collect::<Vec<_>>()]),
            "too many chunks",
        ),
        ("errors without end", read(&[&part(0, chunk::ERROR, &error(5, 0)).repeat(100)]), "too many chunks"),
        ("an error of nothing", read(&[&part(done, chunk::ERROR, &error(0, 0))]), "type 0x8001 and 6 bytes"),
        ("an error cut off", read(&[&part(done, chunk::ERROR, &error(5, 9))]), "type 0x8001 and 6 bytes"),
        ("a long error", read(&[&wire::chunk_header(0, chunk::ERROR, 1, u32::MAX)]), "4294967295 bytes"),
        ("an error without place", read(&[&part(done, chunk::ERROR_OFFSET, &error(5, 0))]), "type 0x8002"),
        ("a map of nothing", map(&[&answer(&[])]), "type 5 and 4 bytes for a block status"),
        ("a run of nothing", map(&[&answer(&[(4096, 0), (0, 0)])]), "a block status of no bytes"),
        (
            "a map of odd length",
            map(&[&reply(2, done, chunk::BLOCK_STATUS, &[0; 13])]),
            "type 5 and 13 bytes for a block status",
        ),
        (
            "a map of 4 GiB",
            map(&[&wire::chunk_header(done, chunk::BLOCK_STATUS, 2, u32::MAX - 3)]),
            "type 5 and 4294967292 bytes",
        ),
        (
            "a map of another context",
            map(&[&reply(2, done, chunk::BLOCK_STATUS, &status(CONTEXT + 1, &[(1, 0)]))]),
            "a context not asked for",
        ),
        (
            "two maps",
            map(&[&reply(2, 0, chunk::BLOCK_STATUS, &status(CONTEXT, &[(1, 0)])).repeat(2)]),
            "a context not asked for",
        ),
        ("no map", map(&[&reply(2, done, chunk::NONE, &[])]), "a block status without descriptors"),
        ("bytes for a map", map(&[&reply(2, done, chunk::OFFSET_DATA, &data(0, 512))]), "type 1 and 520"),
    ] {
        match talk(script) {
            Err(Fault::Protocol(why)) => assert!(why.contains(words), "{what}: {why}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn a_server_that_leaves_at_any_byte_broke_the_connection() {
    let script = join(&[&negotiated(), &good_reply(), &good_status()]);
    let shorter = (0..script.len()).filter(|len| *len < negotiated().len() + 80 || len % 97 == 0);
    for len in shorter.chain(script.len() - 40..script.len()) {
        let heard = talk(script[..len].to_vec());
        assert!(matches!(heard, Err(Fault::Broken(_))), "{len}: {heard:?}");
    }
}

#[test]
fn a_server_that_stalls_at_any_step_is_given_up_at_the_deadline() {
    let script = join(&[&negotiated(), &good_reply(), &good_status()]);
    let read = negotiated().len() + good_reply().len();
    // In its greeting, its options, a header, a hole, the data and the map, and before each of them.
    let steps = [0, 7, 18, 30, 38, 75, negotiated().len() - 1, negotiated().len()];
    let later =
        [negotiated().len() + 9, negotiated().len() + 20, read - 2000, read - 1, read, script.len() - 1];
    for len in steps.into_iter().chain(later) {
        let heard = talk_within(Duration::from_millis(20), script[..len].to_vec(), Then::Stalls);
        let late = |fault: &Fault| matches!(fault, Fault::Broken(error) if error.kind() == std::io::ErrorKind::TimedOut);
        assert!(heard.as_ref().is_err_and(late), "{len}: {heard:?}");
    }
}

#[test]
fn an_export_that_stalls_on_every_connection_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        // Each call is tried on the connection there is, and on a new one.
        let clients = (0..4).map(|_| {
            let (mut client, _) = listener.accept().unwrap();
            answer::negotiate(&mut client, SIZE, false).unwrap().unwrap();
            client
        });
        clients.collect::<Vec<_>>()
    });
    let uri = Uri::parse(&format!("nbd+unix:///?socket={}", path.display())).unwrap();
    let options = Options {
        reply: Duration::from_millis(20),
        outage: Duration::ZERO,
        pause: Arc::new(|_, _| Ok(())),
        ..Options::default()
    };
    let client = Client::connect_with(&uri, options).unwrap();
    for error in [client.read_at(&mut [0; 4096], 0).unwrap_err(), client.next_data(0).unwrap_err()] {
        assert_eq!((error.kind(), error.id()), (crate::error::Kind::Network, "nbd.connection"), "{error}");
    }
    assert_eq!(server.join().unwrap().len(), 4);
}

/// A conversation with a few bytes overwritten, taken out or put in.
fn damaged(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let damage = (any::<prop::sample::Index>(), 0..4usize, prop::collection::vec(any::<u8>(), 0..5));
    prop::collection::vec(damage, 1..4).prop_map(move |damages| {
        let mut bytes = good.clone();
        for (place, taken, put) in damages {
            let at = place.index(bytes.len());
            let end = bytes.len().min(at + taken);
            bytes.splice(at..end, put);
        }
        bytes
    })
}

/// What a client says that asks for everything there is.
fn asking() -> Vec<u8> {
    let ask = |option: u32, data: &[u8]| {
        let mut bytes = join(&[&wire::IHAVEOPT.to_be_bytes(), &option.to_be_bytes()]);
        wire::put_string(&mut bytes, data);
        bytes
    };
    let request = |command, offset, len| Request { flags: 0, command, cookie: 5, offset, len }.encode();
    let mut context = join(&[&0u32.to_be_bytes(), &1u32.to_be_bytes()]);
    wire::put_string(&mut context, wire::ALLOCATION.as_bytes());
    join(&[
        &3u32.to_be_bytes(),
        &ask(opt::LIST, &[]),
        &ask(99, &[1; 100]),
        &ask(opt::STRUCTURED_REPLY, &[]),
        &ask(opt::LIST_META_CONTEXT, &context),
        &ask(opt::SET_META_CONTEXT, &context),
        &ask(opt::INFO, &[0; 6]),
        &ask(opt::GO, &[0, 0, 0, 0, 0, 1, 0, 3]),
        &request(cmd::READ, 512, 4096),
        &request(cmd::READ, u64::MAX, u32::MAX),
        &request(cmd::WRITE, 0, 100),
        &[0; 100],
        &request(cmd::BLOCK_STATUS, 0, 65536),
        &request(cmd::TRIM, 0, 65536),
        &request(99, 0, 65536),
        &request(cmd::DISC, 0, 0),
    ])
}

/// Sends `bytes` to a server; returns what it answers until it hangs up.
fn answers(path: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A server that heard enough hangs up, with or without reading the rest.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    match stream.read_to_end(&mut answers) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the server waits for ever"),
        _ => answers,
    }
}

/// A disk of [`SIZE`] bytes with one page of data.
fn page() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::sparse(SIZE);
    crate::io::WriteAt::write_at(&disk, &[0xda; 4096], 8192).unwrap();
    Arc::new(disk)
}

fn server(dir: &Path) -> Server {
    Server::start(page(), &dir.join("socket")).unwrap()
}

fn writable(dir: &Path) -> (Server, Arc<MemoryDisk>) {
    let disk = page();
    (Server::writable(disk.clone(), disk.clone(), &dir.join("written")).unwrap(), disk)
}

fn client(path: &Path) -> Client {
    let uri = Uri::parse(&format!("nbd+unix:///?socket={}", path.display())).unwrap();
    Client::connect_with(&uri, Options { outage: Duration::ZERO, ..Options::default() }).unwrap()
}

#[test]
fn each_client_is_answered_and_each_odd_request_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path());
    let heard = answers(server.path(), &asking());
    let heard_times = |bytes: &[u8]| heard.windows(bytes.len()).filter(|part| *part == bytes).count();
    assert_eq!(heard_times(&wire::OPTION_REPLY.to_be_bytes()), 14);
    assert_eq!(heard_times(&wire::STRUCTURED_REPLY.to_be_bytes()), 6);
    assert_eq!(heard_times(b"the disk is read-only"), 2);
    assert_eq!(heard_times(b"leaves the disk"), 1);
    assert_eq!(heard_times(b"the command was not agreed on"), 1);
    assert_eq!(heard_times(&[0xda; 4096]), 0);
    // Without options, as clients were before 2016: bytes only, and errors without words.
    let request = |offset, len| Request { flags: 0, command: cmd::READ, cookie: 9, offset, len }.encode();
    let name = join(&[&wire::IHAVEOPT.to_be_bytes(), &opt::EXPORT_NAME.to_be_bytes(), &[0; 4]]);
    let old = join(&[&1u32.to_be_bytes(), &name, &request(SIZE - 1, 2), &request(8192, 4096)]);
    let heard = answers(server.path(), &old);
    assert_eq!(heard.len(), 18 + 10 + wire::ZEROES + 16 + 16 + 4096);
    assert_eq!(heard.windows(4096).filter(|part| *part == [0xda; 4096]).count(), 1);
}

#[test]
fn a_disk_that_may_be_written_takes_what_lies_in_it_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (server, disk) = writable(dir.path());
    let request = |command, flags, offset, len| Request { flags, command, cookie: 9, offset, len }.encode();
    let write = |flags, offset, bytes: &[u8]| {
        let len = u32::try_from(bytes.len()).unwrap();
        join(&[&request(cmd::WRITE, flags, offset, len), bytes])
    };
    let go = [0, 0, 0, 0, 0, 0];
    let begin = join(&[
        &3u32.to_be_bytes(),
        &wire::IHAVEOPT.to_be_bytes(),
        &opt::GO.to_be_bytes(),
        &6u32.to_be_bytes(),
        &go,
    ]);
    let heard = answers(
        server.path(),
        &join(&[
            &begin,
            &write(0, SIZE - 512, &[1; 512]),
            &write(0, SIZE - 511, &[2; 512]),
            &write(0, u64::MAX, &[3; 512]),
            &write(0, 0, &[]),
            // Force unit access was not offered.
            &write(1, 0, &[4; 512]),
            &request(cmd::WRITE_ZEROES, 0, 8192, 4096),
            &request(cmd::TRIM, 0, 8192, 4096),
            &request(cmd::FLUSH, 0, 0, 0),
            &request(cmd::READ, 0, 8192, 4096),
            // A length that no write has ends the talk.
            &request(cmd::WRITE, 0, 0, wire::MAX_REQUEST + 1),
            &write(0, 0, &[5; 512]),
        ]),
    );
    let replies = |error: u32| {
        let reply = wire::simple_reply(9, error);
        heard.windows(reply.len()).filter(|part| *part == reply).count()
    };
    assert_eq!((replies(0), replies(errno::EINVAL)), (3, 6));
    server.stop().unwrap();
    let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
    expected[8192..12288].fill(0xda);
    let last = expected.len() - 512;
    expected[last..].fill(1);
    let mut bytes = vec![0; expected.len()];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected);
}

#[test]
fn a_client_too_many_is_turned_away_and_none_keeps_the_server_from_stopping() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path());
    let mut greeting = [0; 18];
    let mut guests: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(server.path()).unwrap()).collect();
    guests.iter_mut().for_each(|guest| guest.read_exact(&mut greeting).unwrap());
    assert_eq!(answers(server.path(), &[]), Vec::<u8>::new());
    drop(guests.pop());
    // The place is free once its thread has ended.
    while answers(server.path(), &[]).is_empty() {}
    server.stop().unwrap();
    assert!(guests.iter_mut().all(|guest| guest.read(&mut greeting).unwrap() == 0));
}

/// A server that negotiates well and gives `answer` to every question about allocation.
fn mapping(path: &Path, size: u64, answer: (u32, u32)) -> JoinHandle<usize> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        answer::negotiate(&mut stream, size, false).unwrap().unwrap();
        let mut questions = 0;
        loop {
            let header = wire::read_array::<REQUEST_LEN>(&mut stream).unwrap();
            let request = Request::decode(&header).unwrap();
            if request.command != cmd::BLOCK_STATUS {
                return questions;
            }
            questions += 1;
            let payload = status(wire::ALLOCATION_ID, &[answer]);
            let reply = reply(request.cookie, chunk::FLAG_DONE, chunk::BLOCK_STATUS, &payload);
            stream.write_all(&reply).unwrap();
        }
    })
}

#[test]
fn a_map_of_a_few_bytes_at_a_time_or_without_end_keeps_nobody_for_ever() {
    for (size, answer, from) in [(SIZE * 4, (1, 3), 64), (i64::MAX as u64, (u32::MAX, 3), 64 * 0xffff_ffff)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let server = mapping(&path, size, answer);
        let client = client(&path);
        assert_eq!(client.next_data(0).unwrap(), Some(Extent::at(from, 64 * KIB)));
        drop(client);
        assert_eq!(server.join().unwrap(), 64);
    }
}

proptest! {
    #[test]
    fn no_damaged_answer_harms_a_client(
        script in damaged(join(&[&negotiated(), &good_reply(), &good_status()])),
    ) {
        // Whatever it makes of it: a panic, or a wait until PATIENCE is over, fails.
        if let Err(Fault::Broken(error)) = talk(script) {
            prop_assert_ne!(error.kind(), std::io::ErrorKind::TimedOut);
        }
    }

    #[test]
    fn no_answer_at_all_harms_a_client(known in 0..3usize, bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let known = vec![Vec::new(), greeting(), negotiated()].swap_remove(known);
        if let Err(Fault::Broken(error)) = talk(join(&[&known, &bytes])) {
            prop_assert_ne!(error.kind(), std::io::ErrorKind::TimedOut);
        }
    }
}

#[test]
fn no_damaged_question_harms_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path());
    let (written, _) = writable(dir.path());
    proptest!(|(script in damaged(asking()))| {
        answers(server.path(), &script);
        answers(written.path(), &script);
    });
    written.stop().unwrap();
    let client = client(server.path());
    assert_eq!(client.next_data(0).unwrap(), Some(Extent::new(8192, 12288)));
    let mut bytes = [0; 8192];
    client.read_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes.to_vec(), join(&[&[0; 4096], &[0xda; 4096]]));
    drop(client);
    server.stop().unwrap();
}
