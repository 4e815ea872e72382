//! One suite of store behaviours, run against memory, the lab and moto; and what the lab's faults do to our client.
#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use haul::error::{Error, Kind, Retry as Again};
use haul::io::{ReadAt, read_vec};
use haul::lab::s3::{Config as LabConfig, Effect, Fault, Handle, Key, Server};
use haul::monitor::Tally;
use haul::store::fault::Faulty;
use haul::store::limit::{Limit, Limiter};
use haul::store::memory::Memory;
use haul::store::retry::{Policy, Retry};
use haul::store::s3::{Config, Keys, S3};
use haul::store::{CopySource, ObjectDisk, ObjectStore, Part, Upload, crc64};
use haul::unit::rate::Rate;
use haul::unit::{Extent, MIB, Secret, to_usize};

const BUCKET: &str = "images-1250000000";

fn lab() -> (tempfile::TempDir, Handle) {
    let dir = tempfile::tempdir().unwrap();
    let lab = Server::start(LabConfig::new(dir.path(), "AKIDlab", "lab-secret")).unwrap();
    lab.create_bucket(BUCKET, false).unwrap();
    (dir, lab)
}

fn config(endpoint: &str) -> Config {
    keyed(endpoint, "AKIDlab", "lab-secret")
}

fn keyed(endpoint: &str, id: &str, secret: &str) -> Config {
    let keys = Keys { id: id.to_owned(), secret: Secret::new(secret.to_owned()), token: None };
    Config {
        endpoint: endpoint.to_owned(),
        region: "ap-lab".to_owned(),
        bucket: BUCKET.to_owned(),
        path_style: true,
        connect_to: None,
        keys: Arc::new(move || Ok(keys.clone())),
    }
}

fn client(lab: &Handle) -> S3 {
    S3::new(config(&lab.endpoint())).unwrap()
}

fn patient(store: impl ObjectStore + 'static) -> Retry {
    let policy = Policy { attempts: 30, ..Policy::default() };
    Retry::new(Arc::new(store), policy, Arc::new(Tally::default()), |_| Ok(()))
}

/// Bytes that differ from place to place.
fn bytes(seed: u32, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    std::iter::repeat_with(next).take(usize::try_from(len).unwrap()).collect()
}

/// A plain GET by someone who has nothing but the link.
fn fetch(url: &str) -> (u16, Vec<u8>) {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), answer[end + 4..].to_vec())
}

// ---- the suite ----

/// Small objects: what is written is there, in whole and in part, until it is deleted.
fn objects(store: &dyn ObjectStore) {
    for key in ["plain", "dir/a b/虚拟机+1%&=?#.qcow2", "~-_.!*'()"] {
        let text = bytes(7, 5000);
        let put = store.put(key, text.clone().into()).unwrap();
        let head = store.head(key).unwrap().unwrap();
        assert_eq!((head.size, &head.etag), (5000, &put.etag), "{key}");
        assert!(head.crc64.is_none_or(|crc| crc == crc64::of(&text)), "{key}");
        assert_eq!(store.get(key, Extent::new(0, 5000), None).unwrap(), text);
        assert_eq!(store.get(key, Extent::new(9, 77), Some(&head.etag)).unwrap(), text[9..77]);
        assert!(store.get(key, Extent::new(3, 3), None).unwrap().is_empty());

        store.put(key, b"new".as_slice().into()).unwrap();
        let changed = store.get(key, Extent::new(0, 3), Some(&head.etag)).unwrap_err();
        assert_eq!(
            (changed.kind(), changed.id(), changed.retry()),
            (Kind::Source, "store.changed", Again::No)
        );
        let short = store.get(key, Extent::new(1, 4), None).unwrap_err();
        assert!(short.what().contains(&store.name(key)), "{short:?}");

        store.delete(key).unwrap();
        store.delete(key).unwrap();
        assert_eq!(store.head(key).unwrap(), None);
        assert_eq!(store.get(key, Extent::new(0, 1), None).unwrap_err().id(), "store.no-object");
    }
    for key in ["", "/a", "a/../b", &"k".repeat(851)] {
        assert_eq!(store.put(key, b"".as_slice().into()).unwrap_err().kind(), Kind::Usage, "{key}");
    }
}

/// Multipart: unequal parts in any order, the first last; replaced, listed, joined once, proven.
fn multipart(store: &dyn ObjectStore) {
    let parts = [bytes(1, 5 * MIB), bytes(2, 5 * MIB + 4097), bytes(3, 6 * MIB + 1), bytes(4, 3)];
    let whole = parts.concat();
    let upload = store.begin("dir/image").unwrap();
    store.put_part(&upload, 3, bytes(9, 100).into()).unwrap();
    let mut sent: Vec<Part> = [2u32, 4, 3, 1]
        .into_iter()
        .map(|n| store.put_part(&upload, n, parts[n as usize - 1].clone().into()).unwrap())
        .collect();
    sent.sort_by_key(|part| part.number);
    for (part, bytes) in sent.iter().zip(&parts) {
        assert_eq!((part.size, part.crc64), (bytes.len() as u64, Some(crc64::of(bytes))));
    }
    let listed = store.list_parts(&upload).unwrap();
    let facts = |parts: &[Part]| parts.iter().map(|p| (p.number, p.size, p.etag.clone())).collect::<Vec<_>>();
    assert_eq!(facts(&listed), facts(&sent));
    assert!(store.uploads("dir/").unwrap().contains(&upload));
    assert!(!store.uploads("other").unwrap().contains(&upload));
    assert_eq!(store.head("dir/image").unwrap(), None, "an object appeared before it was completed");

    let wrong = Part { etag: "\"00000000000000000000000000000000\"".into(), ..sent[1].clone() };
    store.complete(&upload, &[sent[0].clone(), wrong]).unwrap_err();
    let gap = store.complete(&upload, &[sent[0].clone(), sent[2].clone()]).unwrap_err();
    assert_eq!(gap.kind(), Kind::Internal);
    store.complete(&upload, &[]).unwrap_err();

    let object = store.complete(&upload, &sent).unwrap();
    assert_eq!(object.size, whole.len() as u64);
    assert!(object.crc64.is_none_or(|crc| crc == crc64::of(&whole)));
    assert_eq!(store.head("dir/image").unwrap().unwrap(), object);
    assert_eq!(store.get("dir/image", Extent::new(0, whole.len() as u64), None).unwrap(), whole);
    let border = Extent::at(5 * MIB - 2, 4);
    assert_eq!(
        store.get("dir/image", border, Some(&object.etag)).unwrap(),
        whole[to_usize(5 * MIB) - 2..][..4]
    );
    assert!(!store.uploads("dir/").unwrap().contains(&upload));
    assert_eq!(store.complete(&upload, &sent).unwrap(), object, "a Complete whose answer was lost");

    copies(store, &object.etag, &whole);
    store.delete("dir/image").unwrap();
}

/// Parts made inside the store.
fn copies(store: &dyn ObjectStore, etag: &str, whole: &[u8]) {
    let upload = store.begin("copy").unwrap();
    let source = CopySource { key: "dir/image", etag, range: Extent::new(5, 6 * MIB) };
    let first = store.copy_part(&upload, 1, &source).unwrap();
    let second = store.put_part(&upload, 2, b"end".as_slice().into()).unwrap();
    let object = store.complete(&upload, &[first, second]).unwrap();
    let expected = [&whole[5..to_usize(6 * MIB)], b"end"].concat();
    assert_eq!(store.get("copy", Extent::new(0, object.size), None).unwrap(), expected);
    store.delete("copy").unwrap();
}

/// Uploads that come to nothing leave nothing.
fn refused_uploads(store: &dyn ObjectStore) {
    let upload = store.begin("small").unwrap();
    let parts: Vec<Part> =
        (1..=2).map(|n| store.put_part(&upload, n, bytes(n, 1000).into()).unwrap()).collect();
    let small = store.complete(&upload, &parts).unwrap_err();
    assert_eq!(small.retry(), Again::No, "{small:?}");
    assert!(small.why().contains("EntityTooSmall"), "{small:?}");
    store.abort(&upload).unwrap();
    store.abort(&upload).unwrap();
    assert_eq!(store.list_parts(&upload).unwrap_err().id(), "store.no-upload");
    assert_eq!(store.head("small").unwrap(), None);
}

/// What moto lacks: it copies of any version, and breaks down over uploads that are gone.
fn strictly(store: &dyn ObjectStore) {
    store.put("source", bytes(1, 100).into()).unwrap();
    let upload = store.begin("copy").unwrap();
    let source = CopySource { key: "source", etag: "\"0\"", range: Extent::new(5, 9) };
    let changed = store.copy_part(&upload, 1, &source).unwrap_err();
    assert_eq!((changed.kind(), changed.id()), (Kind::Source, "store.changed"), "{changed:?}");
    let part = store.put_part(&upload, 1, bytes(2, 10).into()).unwrap();
    store.abort(&upload).unwrap();
    assert_eq!(store.put_part(&upload, 1, bytes(2, 10).into()).unwrap_err().id(), "store.no-upload");
    assert_eq!(store.complete(&upload, &[part]).unwrap_err().id(), "store.no-upload");
}

fn suite(store: &dyn ObjectStore) {
    objects(store);
    multipart(store);
    refused_uploads(store);
}

// ---- who must pass it ----

#[test]
fn memory_behaves_like_a_store() {
    let store = Memory::new(BUCKET);
    suite(&store);
    strictly(&store);
}

#[test]
fn our_client_and_the_lab_behave_like_a_store() {
    let (_dir, lab) = lab();
    suite(&client(&lab));
    strictly(&client(&lab));
}

#[test]
fn the_bucket_may_be_in_the_host_name() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Server::start(LabConfig {
        refuse_path_style: true,
        page: 2,
        ..LabConfig::new(dir.path(), "AKIDlab", "lab-secret")
    });
    let lab = lab.unwrap();
    lab.create_bucket(BUCKET, false).unwrap();
    let forbidden = client(&lab).put("k", b"x".as_slice().into()).unwrap_err();
    assert_eq!((forbidden.kind(), forbidden.id()), (Kind::Usage, "store.path-style"));
    let endpoint = format!("http://cos.ap-lab.myqcloud.com:{}", lab.addr.port());
    let connect_to = Some(lab.addr.ip());
    // Pages of two: listings go on until they end.
    suite(&S3::new(Config { path_style: false, connect_to, ..config(&endpoint) }).unwrap());
}

#[test]
fn a_store_that_loses_requests_and_answers_is_outlived() {
    let (_dir, lab) = lab();
    let flaky = Faulty::new(Arc::new(client(&lab)), 20_260_401, 150);
    suite(&patient(flaky));
}

/// moto, an S3 by other people; ends with the test.
struct Moto(Child);

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn moto() -> (Moto, String) {
    let cache = std::env::var_os("HAUL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"));
    let program = cache.join("pydeps/bin/moto_server");
    assert!(program.exists(), "{} is missing: run scripts/pydeps.sh", program.display());
    let mut command = Command::new(program);
    command.args(["-H", "127.0.0.1", "-p", "0"]).env("PYTHONUNBUFFERED", "1");
    let mut server = Moto(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
    let address = lines.find_map(|line| line.unwrap().split_once("http://").map(|(_, rest)| rest.to_owned()));
    let address = address.expect("moto_server says where it listens");
    let address = address.split_whitespace().next().unwrap().to_owned();
    std::thread::spawn(move || lines.for_each(drop));
    (server, format!("http://{address}"))
}

#[test]
fn our_client_finds_an_s3_in_moto() {
    let (_server, endpoint) = moto();
    let host = endpoint.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(
        stream,
        "PUT /{BUCKET} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut made = String::new();
    stream.read_to_string(&mut made).unwrap();
    assert!(made.starts_with("HTTP/1.1 200"), "{made}");
    let store = S3::new(config(&endpoint)).unwrap();
    suite(&store);
    store.put("k", b"linked".as_slice().into()).unwrap();
    let link = store.presign_get("k", Duration::from_secs(60)).unwrap();
    assert_eq!(fetch(link.expose()), (200, b"linked".to_vec()));
}

// ---- faults ----

fn part_of(store: &dyn ObjectStore, upload: &Upload, body: &[u8]) -> Result<Part, Error> {
    store.put_part(upload, 1, body.to_vec().into())
}

#[test]
fn faults_of_a_part_are_passing_and_the_part_is_sent_again() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    let body = bytes(5, MIB);
    for (effect, kind, id) in [
        (Effect::Refuse { status: 503, code: "SlowDown".into() }, Kind::Network, "store.busy"),
        (Effect::Refuse { status: 500, code: "InternalError".into() }, Kind::Network, "store.busy"),
        (Effect::Refuse { status: 400, code: "RequestTimeout".into() }, Kind::Network, "store.busy"),
        (Effect::CutRequest { after: 300_000 }, Kind::Network, "store.unreachable"),
        (Effect::LoseAnswer, Kind::Network, "store.unreachable"),
        (Effect::WrongChecksum, Kind::Mismatch, "store.checksum"),
    ] {
        let upload = store.begin("image").unwrap();
        lab.inject(Fault::once("UploadPart", effect.clone()));
        let error = part_of(&store, &upload, &body).unwrap_err();
        assert_eq!(
            (error.kind(), error.id(), error.retry()),
            (kind, id, Again::Yes),
            "{effect:?}: {error:?}"
        );
        assert!(error.what().contains("cos://images-1250000000/image"), "{error:?}");

        let before = lab.received("UploadPart");
        lab.inject(Fault::once("UploadPart", effect.clone()));
        let part = part_of(&patient(client(&lab)), &upload, &body).unwrap();
        assert_eq!(part.crc64, Some(crc64::of(&body)));
        let sent = lab.received("UploadPart") - before;
        assert!(
            (MIB + 1..=2 * MIB).contains(&sent),
            "{effect:?}: {sent} bytes received for one part sent twice"
        );
        store.complete(&upload, &[part]).unwrap();
    }
}

#[test]
fn a_complete_in_doubt_is_settled_by_asking_the_object() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    let body = bytes(6, MIB);
    let trickle = |error: Option<&str>| Effect::Trickle {
        blanks: 20,
        every_millis: 5,
        error: error.map(str::to_owned),
    };
    for effect in [Effect::LoseAnswer, Effect::CutAnswer { after: 50 }, trickle(None)] {
        let upload = store.begin("image").unwrap();
        let part = part_of(&store, &upload, &body).unwrap();
        lab.inject(Fault::once("CompleteMultipartUpload", effect.clone()));
        let object = store.complete(&upload, &[part]).unwrap_or_else(|error| panic!("{effect:?}: {error:?}"));
        assert_eq!((object.size, object.crc64), (MIB, Some(crc64::of(&body))), "{effect:?}");
        store.delete("image").unwrap();
    }
    // An <Error> in a 200: nothing was joined, so it is tried again.
    let upload = store.begin("image").unwrap();
    let part = part_of(&store, &upload, &body).unwrap();
    lab.inject(Fault { times: 2, ..Fault::once("CompleteMultipartUpload", trickle(Some("InternalError"))) });
    let error = store.complete(&upload, std::slice::from_ref(&part)).unwrap_err();
    assert_eq!((error.retry(), store.head("image").unwrap()), (Again::Yes, None), "{error:?}");
    assert_eq!(patient(client(&lab)).complete(&upload, &[part]).unwrap().size, MIB);
}

#[test]
fn an_object_of_another_upload_never_passes_for_this_one() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    let other = store.begin("image").unwrap();
    let part = part_of(&store, &other, &bytes(1, MIB)).unwrap();
    store.complete(&other, &[part]).unwrap();
    let upload = store.begin("image").unwrap();
    let part = part_of(&store, &upload, &bytes(2, MIB)).unwrap();
    lab.inject(Fault::once(
        "CompleteMultipartUpload",
        Effect::Refuse { status: 500, code: "InternalError".into() },
    ));
    store.complete(&upload, &[part]).unwrap_err();
}

#[test]
fn a_download_cut_short_is_an_error_to_try_again() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    store.put("k", bytes(1, MIB).into()).unwrap();
    lab.inject(Fault::once("GetObject", Effect::CutAnswer { after: 5000 }));
    let error = store.get("k", Extent::new(0, MIB), None).unwrap_err();
    assert_eq!((error.kind(), error.retry()), (Kind::Network, Again::Yes), "{error:?}");
    lab.inject(Fault::once("GetObject", Effect::CutAnswer { after: 5000 }));
    assert_eq!(patient(store).get("k", Extent::new(0, MIB), None).unwrap(), bytes(1, MIB));
}

#[test]
fn refusals_are_told_apart_with_what_to_do() {
    let (_dir, lab) = lab();
    let store = |config| S3::new(config).unwrap();
    let request = |error: &Error| {
        error.facts().iter().any(|(name, value)| *name == "request" && value.starts_with("lab"))
    };
    let check = |store: &S3, kind, id| {
        let body = || b"x".as_slice().into();
        // A HEAD's refusal has no body: its reason is found all the same.
        for error in
            [store.put("k", body()).unwrap_err(), store.begin("k").unwrap_err(), store.head("k").unwrap_err()]
        {
            assert_eq!((error.kind(), error.id(), error.retry()), (kind, id, Again::No), "{error:?}");
            assert!(request(&error), "{error:?}");
        }
        store.begin("k").unwrap_err()
    };
    check(&store(keyed(&lab.endpoint(), "AKIDlab", "wrong")), Kind::Credentials, "store.credentials");
    check(&store(keyed(&lab.endpoint(), "AKIDnobody", "lab-secret")), Kind::Credentials, "store.credentials");

    lab.set_clock(3600);
    let error = check(&client(&lab), Kind::Credentials, "store.clock");
    assert!(
        error.why().contains("clock is 3600 s behind") || error.why().contains("clock is 3599 s behind"),
        "{error:?}"
    );
    lab.set_clock(-7200);
    let error = client(&lab).begin("k").unwrap_err();
    assert!(error.why().contains("s ahead of the store's"), "{error:?}");
    lab.set_clock(0);

    let missing = store(Config { bucket: "none-1250000000".into(), ..config(&lab.endpoint()) });
    assert_eq!(missing.begin("k").unwrap_err().id(), "store.no-bucket");

    let nowhere = store(config("http://127.0.0.1:1"));
    let error = nowhere.begin("k").unwrap_err();
    assert_eq!((error.id(), error.retry()), ("store.unreachable", Again::Yes), "{error:?}");
    assert!(error.why().contains("refused"), "{error:?}");
    assert!(S3::new(config("cos.ap-lab.myqcloud.com")).is_err());
}

#[test]
fn an_expired_token_stops_the_upload_and_a_new_one_goes_on() {
    let (_dir, lab) = lab();
    let key = |token: &str, expired| Key {
        id: "AKIDtmp".into(),
        secret: "tmp-secret".into(),
        token: Some(token.into()),
        expired,
    };
    lab.set_keys(vec![key("t1", false)]);
    let token = Arc::new(Mutex::new("t1".to_owned()));
    let current = token.clone();
    let keys = move || {
        let token = Secret::new(current.lock().unwrap().clone());
        Ok(Keys { id: "AKIDtmp".into(), secret: Secret::new("tmp-secret".into()), token: Some(token) })
    };
    let store = S3::new(Config { keys: Arc::new(keys), ..config(&lab.endpoint()) }).unwrap();
    let upload = store.begin("image").unwrap();
    let first = store.put_part(&upload, 1, bytes(1, MIB).into()).unwrap();

    lab.set_keys(vec![key("t1", true)]);
    let error = store.put_part(&upload, 2, bytes(2, 10).into()).unwrap_err();
    assert_eq!((error.kind(), error.id(), error.retry()), (Kind::Credentials, "store.token", Again::No));
    lab.set_keys(vec![key("t2", false)]);
    *token.lock().unwrap() = "t2".to_owned();
    let second = store.put_part(&upload, 2, bytes(2, 10).into()).unwrap();
    assert_eq!(store.complete(&upload, &[first, second]).unwrap().size, MIB + 10);
    let link = store.presign_get("image", Duration::from_secs(60)).unwrap();
    assert_eq!(fetch(link.expose()).0, 200);
}

#[test]
fn objects_are_private_and_a_link_opens_one_for_its_time() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    store.put("dir/a b+c.img", b"linked".as_slice().into()).unwrap();
    store.put("other", b"other".as_slice().into()).unwrap();
    let link = store.presign_get("dir/a b+c.img", Duration::from_secs(60)).unwrap();
    assert!(!format!("{link:?}{link}").contains("Signature"));
    let link = link.expose();
    assert_eq!(fetch(link), (200, b"linked".to_vec()));
    assert_eq!(fetch(link.split('?').next().unwrap()).0, 403);
    assert_eq!(fetch(&link.replace("dir/a%20b%2Bc.img", "other")).0, 403);
    assert_eq!(store.presign_get("k", Duration::from_secs(8 * 86_400)).unwrap_err().id(), "store.presign");
}

#[test]
fn an_upload_outlives_the_stores_restart() {
    let (dir, lab) = lab();
    let store = client(&lab);
    store.put("kept", b"kept".as_slice().into()).unwrap();
    let upload = store.begin("image").unwrap();
    let first = store.put_part(&upload, 1, bytes(1, MIB).into()).unwrap();
    drop(lab);
    let lab = Server::start(LabConfig::new(dir.path(), "AKIDlab", "lab-secret")).unwrap();
    let store = client(&lab);
    assert_eq!(store.get("kept", Extent::new(0, 4), None).unwrap(), b"kept".as_slice());
    assert_eq!(store.list_parts(&upload).unwrap(), [Part { crc64: None, ..first.clone() }]);
    let second = store.put_part(&upload, 2, bytes(2, 10).into()).unwrap();
    let object = store.complete(&upload, &[first, second]).unwrap();
    assert_eq!(object.crc64, Some(crc64::of(&[bytes(1, MIB), bytes(2, 10)].concat())));
    assert_eq!((lab.received("UploadPart"), lab.requests().len()), (10, 5));
}

#[test]
fn an_object_reads_like_a_disk() {
    let (_dir, lab) = lab();
    let store = client(&lab);
    let content = bytes(3, 9 * MIB + 17);
    store.put("disk.raw", content.clone().into()).unwrap();
    let disk = ObjectDisk::open(Arc::new(patient(client(&lab))), "disk.raw", 4 * MIB).unwrap();
    assert_eq!((disk.size(), disk.name()), (content.len() as u64, format!("cos://{BUCKET}/disk.raw")));
    lab.inject(Fault { times: 3, ..Fault::once("GetObject", Effect::CutAnswer { after: 10 }) });
    assert_eq!(read_vec(&disk, 0, content.len()).unwrap(), content);
    store.put("disk.raw", content.into()).unwrap();
    // The same bytes have the same tag; other ones do not.
    store.put("disk.raw", bytes(4, 9 * MIB + 17).into()).unwrap();
    assert_eq!(read_vec(&disk, 0, 512).unwrap_err().id(), "store.changed");
}

/// The receiving socket's view: a listener that notes when bytes arrive and acknowledges one PUT.
#[test]
#[ignore = "long: measures seconds of real time; scripts/test.sh --long"]
fn the_limit_holds_at_the_receiving_socket() {
    const RATE: u64 = 2 << 20;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (start, mut arrivals, mut seen) = (Instant::now(), Vec::new(), 0);
        let mut buffer = vec![0; 1 << 16];
        while seen < 8 << 20 {
            let n = stream.read(&mut buffer).unwrap();
            assert!(n > 0, "the connection ended early");
            seen += n;
            arrivals.push((start.elapsed(), n as u64));
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: \"x\"\r\n\r\n").unwrap();
        arrivals
    });
    let limiter = Arc::new(Limiter::at(Rate::per_second(RATE)));
    let store = Limit::new(Arc::new(S3::new(config(&endpoint)).unwrap()), limiter);
    store.put("k", bytes(1, 8 * MIB).into()).unwrap();
    let arrivals = receiver.join().unwrap();
    let window = |from: Duration| {
        let inside = arrivals.iter().filter(|(at, _)| (from..from + Duration::from_secs(1)).contains(at));
        inside.map(|(_, n)| n).sum::<u64>()
    };
    let most = arrivals.iter().map(|(at, _)| window(*at)).max().unwrap();
    let took = arrivals.last().unwrap().0;
    println!("fullest second {most} bytes at {RATE}; {took:?} for 8 MiB");
    assert!(most <= RATE + RATE / 20, "{most} bytes in one second");
    assert!(took < Duration::from_millis(4600), "{took:?}: slower than the limit asks for");
}
