//! A disk served on a Unix socket, as nbdinfo, nbdcopy and QEMU's own client see it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use haul::error::Kind;
use haul::io::fake::{FaultyDisk, MemoryDisk};
use haul::io::nbd::{Client, Server, Uri};
use haul::io::{DataOf, ReadAt, WriteAt};
use haul::unit::{Extent, extents};
use support::{Random, empty_image, run, text, try_run};
use tempfile::TempDir;

const SIZE: u64 = (24 << 20) + 512;

/// A disk with runs of random bytes among its holes, and the same as a file.
fn disk(dir: &Path) -> (Arc<MemoryDisk>, PathBuf) {
    let (disk, path) = (MemoryDisk::sparse(SIZE), dir.join("disk"));
    empty_image(&path, SIZE);
    let file = File::options().write(true).open(&path).unwrap();
    let mut random = Random::new(11);
    for _ in 0..40 {
        let len = 1 + random.below(100_000);
        let (at, bytes) = (random.below(SIZE - len), random.bytes(len.try_into().unwrap()));
        disk.write_at(&bytes, at).unwrap();
        file.write_all_at(&bytes, at).unwrap();
    }
    (Arc::new(disk), path)
}

struct Served {
    dir: TempDir,
    disk: Arc<MemoryDisk>,
    /// The disk once more.
    path: PathBuf,
    server: Server,
    uri: String,
}

fn served() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = disk(dir.path());
    let (server, uri) = serve(dir.path(), disk.clone());
    Served { dir, disk, path, server, uri }
}

fn serve(dir: &Path, disk: Arc<dyn ReadAt>) -> (Server, String) {
    let server = Server::start(disk, &dir.join("socket")).unwrap();
    let uri = format!("nbd+unix:///?socket={}", text(server.path()));
    (server, uri)
}

#[test]
fn nbdinfo_sees_a_read_only_disk_that_several_clients_may_read() {
    let served = served();
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &served.uri])).unwrap();
    assert_eq!((&info["protocol"], &info["structured"]), (&"newstyle-fixed".into(), &true.into()));
    let export = &info["exports"][0];
    assert_eq!(export["export-size"].as_u64(), Some(SIZE));
    assert_eq!(export["contexts"].as_array().unwrap(), &["base:allocation"]);
    for (what, is) in
        [("is_read_only", true), ("can_multi_conn", true), ("can_trim", false), ("can_zero", false)]
    {
        assert_eq!(export[what].as_bool(), Some(is), "{what}");
    }
    let list = run("nbdinfo", &["--list", "--json", &served.uri]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["exports"].as_array().unwrap().len(), 1);
}

#[test]
fn nbdinfo_sees_the_holes_of_the_disk() {
    let served = served();
    let map = run("nbdinfo", &["--map", "--json", &served.uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut end = 0;
    for run in map.as_array().unwrap() {
        let number = |name: &str| run[name].as_u64().unwrap();
        let extent = Extent::at(number("offset"), number("length"));
        assert_eq!(extent.start, end);
        end = extent.end;
        let data = extents::collect(&DataOf(&served.disk), extent).unwrap();
        match number("type") {
            0 => assert_eq!(data.bytes(), extent.len(), "{extent:?}"),
            kind => assert_eq!((kind, data.bytes()), (3, 0), "{extent:?}"),
        }
    }
    assert_eq!(end, SIZE);
}

#[test]
fn nbdcopy_and_qemu_img_read_the_same_bytes() {
    let served = served();
    let copy = served.dir.path().join("copy");
    for args in
        [&[][..], &["--connections=4", "--requests=64"], &["--synchronous"], &["--request-size=33554432"]]
    {
        run("nbdcopy", &[args, &[&served.uri, text(&copy)]].concat());
        run("cmp", &[text(&served.path), text(&copy)]);
        fs::remove_file(&copy).unwrap();
    }
    let qemu = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={}",
        text(served.server.path())
    );
    let this = format!("driver=raw,file.driver=file,file.filename={}", text(&served.path));
    run("qemu-img", &["compare", "--image-opts", &this, &qemu]);
    run("qemu-img", &["convert", "--image-opts", "-O", "qcow2", &qemu, text(&copy)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&served.path), text(&copy)]);
    served.server.stop().unwrap();
}

#[test]
fn qemu_reads_at_any_offset_and_cannot_write() {
    let served = served();
    let mut random = Random::new(3);
    let mut qemu_io = vec!["-r".to_owned(), "-f".into(), "raw".into()];
    for _ in 0..20 {
        let len = 1 + random.below(200_000);
        let at = random.below(SIZE - len);
        qemu_io.extend(["-c".into(), format!("read {at} {len}")]);
    }
    qemu_io.push(served.uri.clone());
    let args: Vec<&str> = qemu_io.iter().map(String::as_str).collect();
    let out = run("qemu-io", &args);
    assert_eq!(out.matches("bytes at offset").count(), 20, "{out}");
    let (code, out, err) = try_run("qemu-io", &["-f", "raw", "-c", "write 0 4096", &served.uri]);
    // QEMU does not even open it for writing.
    assert!(code != 0 && err.contains("Permission denied"), "{out}{err}");
}

#[test]
fn a_disk_that_may_be_written_is_by_qemu_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = disk(dir.path());
    let server = Server::writable(disk.clone(), disk.clone(), &dir.path().join("socket")).unwrap();
    let uri = format!("nbd+unix:///?socket={}", text(server.path()));
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    for (what, is) in [
        ("is_read_only", false),
        ("can_flush", true),
        // What one client has written another one might not see.
        ("can_multi_conn", false),
        ("can_trim", false),
        ("can_zero", false),
        ("can_fua", false),
    ] {
        assert_eq!(info["exports"][0][what].as_bool(), Some(is), "{what}");
    }
    let mut random = Random::new(5);
    let mut commands = Vec::new();
    for i in 0..40 {
        // The longest are more than one request, and the last one ends with the disk.
        let len = 1 + random.below(if i % 10 == 0 { 3 << 20 } else { 100_000 });
        let at = if i == 39 { SIZE - len } else { random.below(SIZE - len) };
        commands.extend(["-c".into(), format!("write -P {} {at} {len}", 1 + i)]);
        // Patterns, as writes of zeroes are another request, which the server does not offer.
        commands.extend(["-c".into(), format!("write -z {} 70000", random.below(SIZE - 70_000))]);
    }
    commands.extend(["-c".into(), "flush".into()]);
    for target in [&uri, text(&path)] {
        let mut words = vec!["-f", "raw"];
        words.extend(commands.iter().map(String::as_str));
        words.push(target);
        let out = run("qemu-io", &words);
        assert_eq!(out.matches("bytes at offset").count(), 80, "{out}");
    }
    server.stop().unwrap();
    let mut bytes = vec![0; SIZE.try_into().unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == fs::read(&path).unwrap());
}

/// A disk that nothing can be written to.
struct Full;

impl WriteAt for Full {
    fn write_at(&self, _: &[u8], offset: u64) -> haul::error::Result<()> {
        Err(haul::error::Error::new(Kind::Destination, "io.write", format!("cannot write at {offset}")))
    }

    fn sync(&self) -> haul::error::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_cannot_be_written_is_an_error_of_its_clients_and_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = disk(dir.path());
    let server = Server::writable(disk, Arc::new(Full), &dir.path().join("socket")).unwrap();
    let uri = format!("nbd+unix:///?socket={}", text(server.path()));
    let (code, out, err) = try_run("qemu-io", &["-f", "raw", "-c", "write 0 4096", &uri]);
    assert!(code != 0 && format!("{out}{err}").contains("Input/output error"), "{out}{err}");
    let error = server.stop().unwrap_err();
    assert_eq!((error.id(), error.what()), ("io.write", "cannot write at 0"));
}

#[test]
fn our_own_client_sees_the_disk_and_its_holes() {
    let served = served();
    let client = Client::connect(&Uri::parse(&served.uri).unwrap()).unwrap();
    let all = Extent::new(0, SIZE);
    assert_eq!(client.size(), SIZE);
    let holes = |disk: &dyn ReadAt| extents::collect(&DataOf(disk), all).unwrap();
    assert_eq!(holes(&client), holes(&served.disk));
    thread::scope(|scope| {
        for seed in 0..6 {
            let (client, disk) = (&client, &served.disk);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                for _ in 0..20 {
                    let part = Extent::at(random.below(SIZE), 1 + random.below(3 << 20)).intersect(all);
                    let mut bytes = [vec![1; part.len().try_into().unwrap()], Vec::new()];
                    bytes[1] = vec![2; bytes[0].len()];
                    client.read_at(&mut bytes[0], part.start).unwrap();
                    disk.read_at(&mut bytes[1], part.start).unwrap();
                    assert!(bytes[0] == bytes[1], "{part:?}");
                }
            });
        }
    });
}

#[test]
fn a_disk_that_cannot_be_read_is_an_error_of_its_clients_and_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = disk(dir.path());
    let bad = Extent::at(8 << 20, 512);
    disk.write_at(&[1; 4096], bad.start).unwrap();
    let (server, uri) = serve(dir.path(), Arc::new(FaultyDisk::new(disk, vec![bad])));
    let (code, _, err) = try_run("nbdcopy", &[&uri, "null:"]);
    assert!(code != 0 && err.contains("Input/output error"), "{err}");
    let client = Client::connect(&Uri::parse(&uri).unwrap()).unwrap();
    let mut bytes = [0; 4096];
    let error = client.read_at(&mut bytes, bad.start).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Source, "io.read"));
    assert!(error.why().contains("cannot read memory disk"), "{}", error.why());
    client.read_at(&mut bytes, bad.end).unwrap();
    drop(client);
    assert_eq!(server.stop().unwrap_err().id(), "io.read");
}

#[test]
fn the_socket_is_new_is_for_this_user_alone_and_goes_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let disk = Arc::new(MemoryDisk::sparse(512));
    let server = Server::start(disk.clone(), &path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = Server::start(disk.clone(), &path).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Usage, "nbd.listen"));
    drop(server);
    assert!(!path.exists());
    let error = Server::start(disk, &dir.path().join("none/socket")).err().unwrap();
    assert_eq!((error.kind(), error.id()), (Kind::Destination, "nbd.listen"));
}
