//! Exports of nbdkit and qemu-nbd read like disks; nbdinfo and qemu-img judge. Every server is on a Unix socket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use haul::error::{Error, Kind, Retry};
use haul::io::nbd::{Client, Options, Uri};
use haul::io::{DataOf, ReadAt};
use haul::unit::{Extent, ExtentMap, extents};
use support::{Random, empty_image, run, text};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A server on a socket that this process listens on: connecting never comes too early, and outlives the server.
struct Served {
    dir: TempDir,
    listener: UnixListener,
    child: Option<Child>,
}

impl Served {
    fn start(server: &[&str]) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let mut served = Served { dir, listener, child: None };
        served.run(server);
        served
    }

    /// Hands the socket over as systemd does, with the descriptor 3.
    fn run(&mut self, server: &[&str]) {
        self.kill();
        let activated = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null";
        let mut command = Command::new("sh");
        command.args(["-c", activated, "sh"]).args(server).stdout(Stdio::null()).stderr(Stdio::null());
        let socket: OwnedFd = self.listener.try_clone().unwrap().into();
        self.child = Some(command.stdin(socket).spawn().unwrap());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", text(&self.dir.path().join("socket")))
    }

    fn open(&self) -> Client {
        connect(&self.uri("")).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

fn connect(uri: &str) -> Result<Client, Error> {
    Client::connect(&Uri::parse(uri).unwrap())
}

/// A client that counts its pauses instead of waiting, and does `work` in each.
fn impatient(served: &Served, work: impl Fn() + Send + Sync + 'static) -> (Client, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let pause = Arc::new(move |_: &Error, _| {
        counted.fetch_add(1, Ordering::Relaxed);
        work();
        Ok(())
    });
    let options = Options { pause, outage: Duration::from_secs(30), ..Options::default() };
    (Client::connect_with(&Uri::parse(&served.uri("")).unwrap(), options).unwrap(), count)
}

fn read(disk: &dyn ReadAt, extent: Extent) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xa5; extent.len().try_into().unwrap()];
    disk.read_at(&mut bytes, extent.start)?;
    Ok(bytes)
}

fn all(disk: &dyn ReadAt) -> Extent {
    Extent::new(0, disk.size())
}

/// The bytes of nbdkit's pattern plugin: each 8 bytes are their own offset.
fn pattern(extent: Extent) -> Vec<u8> {
    let words = extent.start / 8..extent.end.div_ceil(8);
    let bytes: Vec<u8> = words.flat_map(|word| (word * 8).to_be_bytes()).collect();
    let skipped = usize::try_from(extent.start % 8).unwrap();
    bytes[skipped..skipped + usize::try_from(extent.len()).unwrap()].to_vec()
}

fn assert_pattern(disk: &dyn ReadAt, extent: Extent) {
    assert!(read(disk, extent).unwrap() == pattern(extent), "{extent:?} reads as something else");
}

/// Random ranges of the pattern, by four threads.
fn assert_pattern_everywhere(disk: &dyn ReadAt, longest: u64) {
    thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let mut random = Random::new(seed);
                for _ in 0..12 {
                    let start = random.below(disk.size());
                    assert_pattern(disk, Extent::at(start, 1 + random.below(longest)).intersect(all(disk)));
                }
            });
        }
    });
    assert_pattern(disk, all(disk));
}

fn data_of(disk: &Client) -> ExtentMap {
    extents::collect(&DataOf(&disk), all(disk)).unwrap()
}

/// What may hold data in the words of nbdinfo: all that is not marked as zero.
fn data_by_nbdinfo(uri: &str) -> ExtentMap {
    let map: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", uri])).unwrap();
    let number = |run: &serde_json::Value, name: &str| run[name].as_u64().unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| number(run, "type") & 2 == 0);
    data.map(|run| Extent::at(number(run, "offset"), number(run, "length"))).collect()
}

/// A file of `size` bytes with runs of random bytes among its holes.
fn sparse_file(path: &Path, size: u64, seed: u64) {
    empty_image(path, size);
    let file = File::options().write(true).open(path).unwrap();
    let mut random = Random::new(seed);
    for _ in 0..20 {
        let len = (1 + random.below(8)) << 16;
        let at = random.below((size - len) >> 16) << 16;
        file.write_all_at(&random.bytes(len.try_into().unwrap()), at).unwrap();
    }
}

/// The lines of nbdkit's log filter.
fn log_lines(log: &Path) -> Vec<String> {
    fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn an_export_reads_as_its_server_serves_it() {
    for server in [
        &["nbdkit", "pattern", "size=10000008"][..],
        &["nbdkit", "--no-sr", "pattern", "size=10000008"],
        &["nbdkit", "--mask-handshake=1", "pattern", "size=10000008"],
        &["nbdkit", "--filter=multi-conn", "pattern", "size=10000008", "multi-conn-mode=disable"],
    ] {
        let served = Served::start(server);
        let disk = served.open();
        assert_eq!(disk.size(), 10_000_008);
        assert_pattern_everywhere(&disk, 2 * MIB);
        let beyond = Extent::at(disk.size() - 1, 2);
        assert_eq!(read(&disk, beyond).unwrap_err().id(), "io.beyond-end", "{server:?}");
    }
}

#[test]
fn requests_keep_to_the_block_sizes_the_server_asks_for() {
    let policy = ["nbdkit", "--filter=blocksize-policy", "pattern", "blocksize-error-policy=error"];
    for (sizes, size) in [
        (["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=131072"], 8 * MIB),
        (["blocksize-minimum=512", "blocksize-preferred=512", "blocksize-maximum=512"], MIB),
        (["blocksize-minimum=65536", "blocksize-preferred=2097152", "blocksize-maximum=33554432"], 8 * MIB),
    ] {
        let served = Served::start(&[&policy[..], &sizes[..], &[&format!("size={size}")]].concat());
        assert_pattern_everywhere(&served.open(), MIB);
    }
    // The end of such a disk is in no request that the server takes.
    let size = ["blocksize-minimum=4096", "size=1000000"];
    let served = Served::start(&[&policy[..], &size[..]].concat());
    let error = connect(&served.uri("")).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Source, "nbd.blocks"));
}

#[test]
fn several_requests_and_connections_are_under_way_together() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let logfile = format!("logfile={}", text(&log));
    let filters =
        ["nbdkit", "--filter=log", "--filter=delay", "pattern", "size=16M", "rdelay=50ms", &logfile];
    let served = Served::start(&filters);
    let disk = served.open();
    assert_pattern(&disk, Extent::at(0, 4 * MIB));
    let (mut now, mut most) = (0, 0);
    for line in log_lines(&log) {
        now += usize::from(line.contains(" Read id="));
        now -= usize::from(line.contains(" ...Read id="));
        most = most.max(now);
    }
    assert!(most >= 4, "{most} requests at a time");
    thread::scope(|scope| {
        (0..4).for_each(|i| {
            drop(scope.spawn({
                let disk = &disk;
                move || assert_pattern(disk, Extent::at(i * 4 * MIB, 4 * MIB))
            }))
        });
    });
    let connections = log_lines(&log).iter().filter(|line| line.contains(" Connect ")).count();
    assert!((2..=4).contains(&connections), "{connections} connections");
}

#[test]
fn a_server_that_takes_one_client_is_read_by_four_threads() {
    let served = Served::start(&["nbdkit", "--filter=limit", "pattern", "size=8M", "limit=1"]);
    assert_pattern_everywhere(&served.open(), MIB);
}

#[test]
fn holes_are_those_that_nbdinfo_sees() {
    let dir = tempfile::tempdir().unwrap();
    let (path, image) = (dir.path().join("disk"), dir.path().join("disk.qcow2"));
    sparse_file(&path, 64 * MIB, 5);
    run("qemu-img", &["convert", "-O", "qcow2", text(&path), text(&image)]);
    for server in [
        &["nbdkit", "file", text(&path)][..],
        &["qemu-nbd", "-t", "-r", "-e", "8", "-f", "qcow2", text(&image)],
        &["qemu-nbd", "-t", "-r", "-f", "raw", text(&path)],
    ] {
        let served = Served::start(server);
        let disk = served.open();
        let data = data_of(&disk);
        assert!(data.bytes() > 0 && data.bytes() < 32 * MIB, "{server:?}: {data:?}");
        let copy = dir.path().join("copy");
        empty_image(&copy, disk.size());
        let file = File::options().write(true).open(&copy).unwrap();
        for run in data.iter() {
            file.write_all_at(&read(&disk, run).unwrap(), run.start).unwrap();
        }
        // qemu-nbd without -e takes one client at a time.
        drop(disk);
        assert_eq!(data, data_by_nbdinfo(&served.uri("")), "{server:?}");
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&copy), &served.uri("")]);
    }
}

#[test]
fn what_a_server_does_not_say_to_be_zero_is_data() {
    let hole = "extents=echo 0 1048576 hole";
    let eval =
        ["nbdkit", "eval", "get_size=echo 1048576", "pread=head -c $3 /dev/zero", "can_extents=exit 0"];
    for server in [
        &[&eval[..], &[hole]].concat()[..],
        &["nbdkit", "--no-sr", "null", "size=1M"],
        &["nbdkit", "--filter=noextents", "null", "size=1M"],
        &["nbdkit", "--filter=error", "null", "size=1M", "error-extents-rate=100%"],
    ] {
        let served = Served::start(server);
        assert_eq!(served.open().next_data(4096).unwrap(), Some(Extent::new(4096, MIB)), "{server:?}");
    }
    let served = Served::start(&["nbdkit", "null", "size=15T"]);
    assert_eq!(data_of(&served.open()).bytes() >> 20, 3, "60 times 64 KiB are asked no more");
}

#[test]
fn a_bad_sector_is_an_error_of_the_source_and_no_reason_to_try_again() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad");
    let trigger = format!("error-file={}", text(&bad));
    let served =
        Served::start(&["nbdkit", "--filter=error", "pattern", "size=8M", "error-rate=100%", &trigger]);
    let (disk, pauses) = impatient(&served, || {});
    File::create(&bad).unwrap();
    let error = read(&disk, Extent::at(4096, MIB)).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Source, "io.read"), "{error}");
    assert!(error.facts().contains(&("offset", "4096".into())), "{error:?}");
    fs::remove_file(&bad).unwrap();
    assert_pattern(&disk, all(&disk));
    assert_eq!(pauses.load(Ordering::Relaxed), 0);
}

#[test]
fn a_server_short_of_memory_is_asked_again_and_one_that_forbids_is_not() {
    let dir = tempfile::tempdir().unwrap();
    for (code, pauses_wanted) in [("ENOMEM", 3), ("EPERM", 0)] {
        let bad = dir.path().join(code);
        File::create(&bad).unwrap();
        let (code, trigger) = (format!("error={code}"), format!("error-file={}", text(&bad)));
        let error = ["error-pread-rate=100%", &code, &trigger];
        let served =
            Served::start(&[&["nbdkit", "--filter=error", "pattern", "size=1M"], &error[..]].concat());
        let tries = AtomicUsize::new(0);
        let (disk, pauses) = impatient(&served, move || {
            if tries.fetch_add(1, Ordering::Relaxed) == 2 {
                fs::remove_file(&bad).unwrap();
            }
        });
        match read(&disk, Extent::at(0, 8)) {
            Ok(_) => assert_eq!(code, "error=ENOMEM"),
            Err(error) => assert_eq!((error.kind(), error.id()), (Kind::Network, "nbd.refused"), "{error}"),
        }
        assert_eq!(pauses.load(Ordering::Relaxed), pauses_wanted, "{code}");
    }
}

#[test]
fn a_server_that_comes_back_is_read_on_and_one_that_changed_is_not() {
    let mut served = Served::start(&["nbdkit", "pattern", "size=4M"]);
    let (disk, pauses) = impatient(&served, || {});
    assert_pattern(&disk, Extent::at(0, MIB));
    served.run(&["nbdkit", "pattern", "size=4M"]);
    assert_pattern(&disk, all(&disk));
    assert_eq!(pauses.load(Ordering::Relaxed), 1);
    served.run(&["nbdkit", "pattern", "size=5M"]);
    let error = read(&disk, Extent::at(0, 8)).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Source, "nbd.changed"), "{error}");
}

#[test]
fn an_outage_is_an_error_once_it_lasts_too_long() {
    let mut served = Served::start(&["nbdkit", "pattern", "size=4M"]);
    let (disk, pauses) = impatient(&served, || {});
    served.kill();
    fs::remove_file(served.dir.path().join("socket")).unwrap();
    let error = read(&disk, Extent::at(512, 8)).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Network, "nbd.connect"), "{error}");
    assert_eq!(error.retry(), Retry::Yes);
    // 0 + 0.5 + 1 + 2 + 4 + 8 + 10 s.
    assert_eq!(pauses.load(Ordering::Relaxed), 7);
}

#[test]
fn a_reply_that_does_not_come_in_time_breaks_the_connection() {
    let served = Served::start(&["nbdkit", "--filter=delay", "pattern", "size=4M", "rdelay=3600"]);
    let options = Options {
        reply: Duration::from_millis(100),
        outage: Duration::ZERO,
        pause: Arc::new(|error, _| Err(Error::new(Kind::Interrupted, "stopped", error.id()))),
        ..Options::default()
    };
    let disk = Client::connect_with(&Uri::parse(&served.uri("")).unwrap(), options).unwrap();
    let error = read(&disk, Extent::at(0, MIB)).unwrap_err();
    assert_eq!((error.id(), error.what()), ("stopped", "nbd.connection"));
}

#[test]
fn an_export_that_cannot_be_read_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    empty_image(&path, MIB);
    fs::write(dir.path().join("keys.psk"), "user:00112233445566778899aabbccddeeff").unwrap();
    let psk = format!("--tls-psk={}", text(&dir.path().join("keys.psk")));
    let exports = ["exportname=disk", "exportname-strict=true"];
    for (server, export, id) in [
        (&["qemu-nbd", "-t", "-r", "-x", "disk", "-f", "raw", text(&path)][..], "other", "nbd.export"),
        (&["qemu-nbd", "-t", "-r", "-x", "disk", "-f", "raw", text(&path)], "disk", ""),
        (
            &["nbdkit", "--filter=exportname", "null", "size=1M", exports[0], exports[1]],
            "other",
            "nbd.export",
        ),
        (&["nbdkit", "--filter=exportname", "null", "size=1M", exports[0], exports[1]], "disk", ""),
        (&["nbdkit", "--tls=require", &psk, "null", "size=1M"], "", "nbd.tls"),
        (&["nbdkit", "--oldstyle", "null", "size=1M"], "", "nbd.oldstyle"),
        (&["nbdkit", "--mask-handshake=0", "null", "size=1M"], "", "nbd.oldstyle"),
    ] {
        let served = Served::start(server);
        match connect(&served.uri(export)) {
            Ok(disk) => assert_eq!((id, disk.size()), ("", MIB), "{server:?}"),
            Err(error) => assert_eq!(error.id(), id, "{server:?}: {error}"),
        }
    }
}
