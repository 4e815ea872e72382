//! An object store on loopback that judges clients as COS does: signatures, part rules, checksums, refusals.

mod disk;
mod fault;
mod front;
mod native;
mod ops;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::host::{S3Host, VirtualHost};
use s3s::path::S3Path;
use s3s::service::S3ServiceBuilder;
use s3s::{S3Result, s3_error};
use serde::Serialize;
use tokio::task::JoinHandle;

use self::disk::Disk;
use self::fault::Faults;
use self::front::Front;
use self::ops::Ops;
use crate::error::{Error, Kind, Result};
use crate::net;

pub use fault::{Effect, Fault};

/// Requests kept in the log.
const LOG: usize = 200_000;

/// A key pair the lab takes.
#[derive(Clone)]
pub struct Key {
    /// Access key id.
    pub id: String,
    /// Secret key.
    pub secret: String,
    /// The token that must come with it, for temporary keys.
    pub token: Option<String>,
    /// Whether it is refused as expired.
    pub expired: bool,
}

/// What the lab's store is like.
#[derive(Clone)]
pub struct Config {
    /// The folder of the buckets.
    pub folder: PathBuf,
    /// The port on 127.0.0.1; 0 for any free one.
    pub port: u16,
    /// The key pairs.
    pub keys: Vec<Key>,
    /// Domains whose subdomains are buckets, beside `cos.…` names and `localhost`.
    pub domains: Vec<String>,
    /// Refuse the bucket in the path, as COS does for buckets made since 2024.
    pub refuse_path_style: bool,
    /// Take `aws-chunked` bodies, which COS refuses.
    pub accept_chunked: bool,
    /// Entries in a page of a listing.
    pub page: usize,
}

impl Config {
    /// A store in `folder` that takes one key pair, on any free port.
    pub fn new(folder: impl Into<PathBuf>, id: &str, secret: &str) -> Self {
        let key = Key { id: id.to_owned(), secret: secret.to_owned(), token: None, expired: false };
        Config {
            folder: folder.into(),
            port: 0,
            keys: vec![key],
            domains: Vec::new(),
            refuse_path_style: false,
            accept_chunked: false,
            page: 1000,
        }
    }
}

/// A request the lab got.
#[derive(Clone, Debug, Serialize)]
pub struct Request {
    /// The S3 operation.
    pub operation: String,
    /// The bucket, if any.
    pub bucket: String,
    /// The object's key, if any.
    pub key: String,
    /// The part's number, for parts.
    pub part: Option<u32>,
    /// The Range header.
    pub range: Option<String>,
    /// HTTP status of the answer; 0 while there is none, or there never was one.
    pub status: u64,
    /// Bytes of body received.
    pub received: u64,
    /// Bytes of body sent.
    pub sent: u64,
}

/// A log entry while its request runs.
#[derive(Clone)]
struct Seen {
    operation: &'static str,
    bucket: String,
    key: String,
    part: Option<u32>,
    range: Option<String>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    status: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

/// What the server's tasks and its handle share.
struct Shared {
    config: Config,
    keys: Mutex<Vec<Key>>,
    log: Mutex<(u64, Vec<Seen>)>,
    faults: Mutex<Faults>,
    /// Seconds the lab's clock is ahead of the machine's.
    clock: AtomicI64,
}

/// Marks a request whose native signature was good.
#[derive(Clone)]
struct NativeSigned;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn keys(&self) -> Vec<Key> {
        locked(&self.keys).clone()
    }

    /// Adds to the log; returns the request's number.
    fn log(&self, seen: &Seen) -> u64 {
        let mut log = locked(&self.log);
        log.0 += 1;
        if log.1.len() < LOG {
            log.1.push(seen.clone());
        }
        log.0
    }

    fn strike(&self, operation: &str) -> Option<Effect> {
        locked(&self.faults).strike(operation)
    }

    fn inject(&self, fault: Fault) {
        locked(&self.faults).add(fault);
    }

    fn clear_faults(&self) {
        locked(&self.faults).clear();
    }

    fn requests(&self) -> Vec<Request> {
        let log = locked(&self.log);
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let entries = log.1.iter().map(|seen| Request {
            operation: seen.operation.to_owned(),
            bucket: seen.bucket.clone(),
            key: seen.key.clone(),
            part: seen.part,
            range: seen.range.clone(),
            status: count(&seen.counts.status),
            received: count(&seen.counts.received),
            sent: count(&seen.counts.sent),
        });
        entries.collect()
    }

    /// The bucket a Host header names, when it is in virtual-host style.
    fn bucket_in_host(&self, host: &str) -> Option<String> {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        if name.parse::<IpAddr>().is_ok() {
            return None;
        }
        let cos = [".cos.", ".cos-internal.", ".cosd."].iter().find_map(|mark| name.find(mark));
        let known = self.config.domains.iter().map(String::as_str).chain(["localhost"]);
        let mut known = known.filter_map(|domain| name.strip_suffix(domain)?.strip_suffix('.'));
        let bucket = cos.and_then(|at| name.get(..at)).or_else(|| known.next())?;
        // `cos.<region>.localhost` is an endpoint, not a bucket.
        (!bucket.is_empty() && !bucket.starts_with("cos.") && bucket != "cos").then(|| bucket.to_owned())
    }
}

struct Access {
    shared: Arc<Shared>,
    disk: Arc<Disk>,
}

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        if cx.credentials().is_some() || cx.extensions_mut().get::<NativeSigned>().is_some() {
            return Ok(());
        }
        let S3Path::Object { bucket, key } = cx.s3_path() else {
            return Err(s3_error!(AccessDenied, "Signature is required"));
        };
        let buckets = self.disk.buckets();
        let bucket = buckets.get(&**bucket);
        let public =
            bucket.is_some_and(|b| b.public || b.objects.get(&**key).is_some_and(|object| object.public));
        match cx.s3_op().name() {
            "GetObject" | "HeadObject" if public => Ok(()),
            _ => Err(s3_error!(AccessDenied, "Signature is required")),
        }
    }
}

#[async_trait::async_trait]
impl S3Auth for Access {
    async fn get_secret_key(&self, id: &str) -> S3Result<SecretKey> {
        let keys = self.shared.keys();
        let key = keys.into_iter().find(|key| key.id == id);
        key.map(|key| SecretKey::from(key.secret)).ok_or_else(|| s3_error!(InvalidAccessKeyId))
    }
}

struct Hosts(Arc<Shared>);

impl S3Host for Hosts {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        let found = VirtualHost::new(host);
        Ok(match self.0.bucket_in_host(host) {
            Some(bucket) => found.with_bucket(bucket),
            None => found,
        })
    }
}

/// The lab's object store.
pub struct Server;

impl Server {
    /// Starts a store that lives as long as the handle; buckets of an earlier run in the same folder are there.
    pub fn start(config: Config) -> Result<Handle> {
        let disk = Arc::new(Disk::open(&config.folder)?);
        let failed = |error: std::io::Error| {
            Error::new(Kind::Network, "lab.listen", "the lab's object store cannot listen").caused_by(error)
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, config.port)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let page = config.page;
        let shared = Arc::new(Shared {
            keys: Mutex::new(config.keys.clone()),
            config,
            log: Mutex::default(),
            faults: Mutex::default(),
            clock: AtomicI64::new(0),
        });
        let mut builder = S3ServiceBuilder::new(Ops(disk.clone(), page));
        builder.set_auth(Access { shared: shared.clone(), disk: disk.clone() });
        builder.set_access(Access { shared: shared.clone(), disk: disk.clone() });
        builder.set_host(Hosts(shared.clone()));
        let front = Arc::new(Front { service: builder.build(), shared: shared.clone() });
        let task = net::spawn(serve(listener, front))?;
        Ok(Handle { addr, shared, disk, task })
    }
}

async fn serve(listener: TcpListener, front: Arc<Front>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let front = front.clone();
                connections.spawn(async move {
                    let service = service_fn(|request| front.clone().handle(request));
                    let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new()).http1_only();
                    // A connection that breaks is the client's affair, and often the point of a test.
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A running store; dropped, it stops and its connections break.
pub struct Handle {
    /// Where it listens, on loopback.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    disk: Arc<Disk>,
    task: JoinHandle<()>,
}

impl Handle {
    /// Its URL for clients that put the bucket into the path.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Makes a bucket, if it is not there; `public` lets anyone read its objects.
    pub fn create_bucket(&self, bucket: &str, public: bool) -> Result<()> {
        self.disk.create_bucket(bucket, public).map(|_| ())
    }

    /// Every request so far, in order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests()
    }

    /// Bytes of body received by requests of one operation, repeated ones again.
    pub fn received(&self, operation: &str) -> u64 {
        self.requests()
            .iter()
            .filter(|request| request.operation == operation)
            .map(|request| request.received)
            .sum()
    }

    /// Orders a fault.
    pub fn inject(&self, fault: Fault) {
        self.shared.inject(fault);
    }

    /// Takes every ordered fault back.
    pub fn clear_faults(&self) {
        self.shared.clear_faults();
    }

    /// Replaces the key pairs.
    pub fn set_keys(&self, keys: Vec<Key>) {
        *locked(&self.shared.keys) = keys;
    }

    /// Sets the lab's clock `seconds` ahead of the machine's (behind, if negative).
    pub fn set_clock(&self, seconds: i64) {
        self.shared.clock.store(seconds, Ordering::Relaxed);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}
