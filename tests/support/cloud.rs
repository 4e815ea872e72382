//! What the tests of the cloud client and of the lab share: clocks, a lab, a store of one object, small disks.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: a failure is the finding")]

#[path = "cloud_disk.rs"]
pub mod disk;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use haul::cloud::tencent::cvm::{Architecture, BootMode, ImportRequest, OsChoice};
use haul::cloud::tencent::import::{self, Waiting};
use haul::cloud::tencent::sign::Method;
use haul::cloud::tencent::{Client, Cvm, Edition, Endpoint, Settings};
use haul::cloud::{Clock, Credentials, SystemClock};
use haul::error::{Error, Kind, Result};
use haul::lab::cvm::hypervisor::{Hypervisor, Machine};
use haul::lab::cvm::{self, Config, Handle};
use haul::unit::Secret;

/// The machine's clock with an offset; it notes pauses and cuts them to a few milliseconds.
pub struct TestClock {
    real: SystemClock,
    /// Seconds to be wrong by.
    pub offset: i64,
    /// The pauses asked for.
    pub pauses: Mutex<Vec<Duration>>,
}

impl TestClock {
    pub fn wrong_by(offset: i64) -> Arc<Self> {
        Arc::new(TestClock { real: SystemClock::new(), offset, pauses: Mutex::default() })
    }

    pub fn right() -> Arc<Self> {
        TestClock::wrong_by(0)
    }
}

impl Clock for TestClock {
    fn unix(&self) -> i64 {
        self.real.unix() + self.offset
    }

    fn elapsed(&self) -> Duration {
        self.pauses.lock().unwrap().iter().sum()
    }

    fn sleep(&self, pause: Duration) -> Result<()> {
        self.pauses.lock().unwrap().push(pause);
        self.real.sleep(pause.min(Duration::from_millis(5)))
    }
}

/// A hypervisor that boots nothing: it says what the test wants, and notes what it was given.
#[derive(Default)]
pub struct FakeHypervisor {
    /// Images do not come up.
    pub broken: AtomicBool,
    /// The machines that were proved or run.
    pub machines: Mutex<Vec<Machine>>,
}

impl Hypervisor for FakeHypervisor {
    fn prove(&self, machine: &Machine) -> Result<()> {
        self.machines.lock().unwrap().push(machine.clone());
        if self.broken.load(Ordering::SeqCst) {
            return Err(Error::new(Kind::Boot, "test.boot", "the kernel found no root"));
        }
        Ok(())
    }

    fn run(&self, machine: &Machine, started: &dyn Fn(), stop: &AtomicBool) -> Result<()> {
        self.machines.lock().unwrap().push(machine.clone());
        std::fs::write(&machine.console, "login: ").unwrap();
        started();
        while !stop.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// A lab with its keys and folder.
pub struct Lab {
    pub handle: Handle,
    pub keys: Credentials,
    pub hypervisor: Arc<FakeHypervisor>,
    pub folder: tempfile::TempDir,
}

impl Lab {
    /// A lab with a hypervisor that boots anything, changed by `change`.
    pub fn start(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys = cvm::generate_keys();
        let hypervisor = Arc::new(FakeHypervisor::default());
        let mut config = Config::new(folder.path(), vec![keys.clone()]);
        config.hypervisor = Some(hypervisor.clone());
        change(&mut config);
        Lab { handle: cvm::start(config).unwrap(), keys, hypervisor, folder }
    }

    pub fn cvm(&self) -> Cvm {
        cvm_at(&self.handle.url(), self.keys.clone(), Edition::Public, TestClock::right())
    }

    /// The codes the account was told, in order.
    pub fn codes(&self) -> Vec<String> {
        let messages = self.handle.notifications();
        messages.iter().map(|message| message["Code"].as_str().unwrap().to_owned()).collect()
    }
}

pub fn cvm_at(url: &str, keys: Credentials, edition: Edition, clock: Arc<dyn Clock>) -> Cvm {
    cvm_signing(url, keys, edition, clock, Method::Tc3)
}

pub fn cvm_signing(
    url: &str,
    keys: Credentials,
    edition: Edition,
    clock: Arc<dyn Clock>,
    method: Method,
) -> Cvm {
    let settings = Settings {
        endpoint: Endpoint::of("cvm", Some(url)).unwrap(),
        service: "cvm".into(),
        version: "2017-03-12".into(),
        region: "ap-guangzhou".into(),
        method,
    };
    Cvm::new(Client::new(settings, keys, clock).unwrap(), edition)
}

pub fn request(name: &str) -> ImportRequest {
    ImportRequest {
        name: name.into(),
        description: format!("haul job {name}"),
        os: OsChoice { os_type: "Debian".into(), os_version: "10".into() },
        architecture: Architecture::X86_64,
        boot_mode: BootMode::Bios,
        force: false,
    }
}

/// Polls fast; gives up after what the clock takes for ten minutes.
pub const WAITING: Waiting =
    Waiting { interval: Duration::from_millis(50), timeout: Duration::from_secs(600) };

/// Starts an import of the store's object.
pub fn start(cvm: &Cvm, request: &ImportRequest, store: &OneObject) -> Result<String> {
    import::start(cvm, request, WAITING, &mut || Ok(store.link()))
}

/// Rehearses an import of the store's object.
pub fn rehearse(cvm: &Cvm, request: &ImportRequest, store: &OneObject) -> Result<()> {
    import::rehearse(cvm, request, &mut || Ok(store.link()))
}

/// A store of one object, which counts how it is asked for it.
pub struct OneObject {
    pub url: String,
    /// GETs so far.
    pub gets: Arc<AtomicUsize>,
    /// Links made so far.
    pub links: AtomicUsize,
    /// Requests that were no plain GET of the whole object.
    pub odd: Arc<AtomicUsize>,
}

impl OneObject {
    pub fn serve(path: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (gets, odd) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let counters = (gets.clone(), odd.clone());
        let path: PathBuf = path.into();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (gets, odd) = &counters;
                let mut head = Vec::new();
                for line in BufReader::new(&stream).lines().map_while(std::result::Result::ok) {
                    if line.is_empty() {
                        break;
                    }
                    head.push(line.to_ascii_lowercase());
                }
                let plain = head.first().is_some_and(|line| line.starts_with("get "))
                    && !head.iter().any(|line| line.starts_with("range:"));
                let counter = if plain { gets } else { odd };
                counter.fetch_add(1, Ordering::SeqCst);
                let mut file = std::fs::File::open(&path).unwrap();
                let length = file.metadata().unwrap().len();
                let mut out = &stream;
                let _ =
                    write!(out, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                let _ = std::io::copy(&mut file, &mut out);
            }
        });
        OneObject { url: format!("http://{addr}/img.qcow2"), gets, links: AtomicUsize::new(0), odd }
    }

    /// A link that no other call gives.
    pub fn link(&self) -> Secret<String> {
        Secret::new(format!("{}?signature={}", self.url, self.links.fetch_add(1, Ordering::SeqCst)))
    }

    /// How many links were made, and how many GETs came.
    pub fn counts(&self) -> (usize, usize) {
        (self.links.load(Ordering::SeqCst), self.gets.load(Ordering::SeqCst))
    }
}

/// The interpreter of the tests' virtualenv, which has the clouds' official SDKs (scripts/pydeps.sh).
pub fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("HAUL_CACHE").map_or_else(|| root.join("target"), PathBuf::from);
    let path = cache.join("pydeps/bin/python");
    assert!(path.exists(), "this test needs {}: run scripts/pydeps.sh", path.display());
    path
}
