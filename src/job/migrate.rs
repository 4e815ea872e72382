//! A disk to an image in the cloud: plan, fix in an overlay, copy straight into the store, prove, import, wait.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::copy::{Copy, Settings, Target};
use super::fix;
use super::open::{OBJECT_CACHE, Opener};
use super::report;
use super::services::Services;
use super::source::{self, Source};
use super::state::{Job, State};
use crate::cloud::tencent::Cvm;
use crate::cloud::tencent::cvm::{Architecture, BootMode, ImportRequest, OsChoice, RunRequest};
use crate::cloud::tencent::import::{self, Waiting};
use crate::cloud::tencent::os;
use crate::config::{Cloud, Location, ObjectUrl};
use crate::error::{Error, Kind, Result};
use crate::guest::{self, Guest};
use crate::image::{self, Format, Gate};
use crate::manifest::{Manifest, verify};
use crate::monitor::{Both, Counter, Level, Monitor, Tally};
use crate::preflight;
use crate::store::{ObjectDisk, ObjectStore};
use crate::unit::fault;

/// A link outlives the longest queue an import may wait in.
const LINK_VALID: Duration = Duration::from_secs(12 * 3600);

/// What to migrate, and how: kept with the job, so that a resumed run does the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// A disk or an image.
    pub source: Location,
    /// The source's format.
    pub source_format: Option<Format>,
    /// The object; its key is the job's id where none is given.
    pub bucket: String,
    /// The object's key.
    pub key: Option<String>,
    /// The image's name; the job's id where none is given.
    pub name: Option<String>,
    /// How to copy.
    pub settings: Settings,
    /// What fix-ups may do; none leaves the copy as the source is.
    pub fix: Option<guest::Options>,
    /// The operating system to declare, where it should not be derived.
    pub os: Option<(String, String)>,
    /// Import although the guest has no cloud-init.
    pub force_import: bool,
    /// Keep the object after the import.
    pub keep_object: bool,
    /// Copy a disk that is in use.
    pub inconsistent: bool,
    /// Where the cloud is.
    pub cloud: Cloud,
    /// Worker threads.
    pub threads: usize,
    /// Seconds between two looks at the import.
    pub poll_seconds: u64,
    /// Checks not to make, by id.
    #[serde(default)]
    pub skip_checks: Vec<String>,
    /// Go on although a check fails.
    #[serde(default)]
    pub ignore_checks: bool,
    /// Run an instance of the image in this zone afterwards.
    #[serde(default)]
    pub run_in_zone: Option<String>,
}

/// What a migration found out and did; it grows as the job goes on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// What the guest is.
    pub guest: String,
    /// What was declared to the cloud.
    pub os: String,
    /// `BIOS` or `UEFI`.
    pub boot: String,
    /// Length of the virtual disk in bytes.
    pub size: u64,
    /// Length of the image in bytes.
    pub image_bytes: u64,
    /// Root over the source's chunks.
    pub source_root: String,
    /// Root over the copy's chunks.
    pub image_root: String,
    /// The fix-ups, as a diff.
    pub fixes: String,
    /// What a fresh look at the fixed copy found.
    pub proofs: Vec<String>,
    /// Bytes counted, over all runs of the job.
    pub counters: BTreeMap<String, u64>,
    /// Seconds each step took, over all runs.
    pub seconds: Vec<(String, f64)>,
    /// Non-fatal errors.
    pub warnings: Vec<String>,
    /// Where the image's console will look for it: `img-…`.
    pub image: Option<String>,
    /// The instance run of it: `ins-…`.
    #[serde(default)]
    pub instance: Option<String>,
}

/// A migration's record on disk.
pub type Migration = Job<Options, Results>;

/// What a finished migration leaves behind for its user.
#[derive(Debug, Serialize)]
pub struct Finished {
    /// The job.
    pub job: String,
    /// The image's id.
    pub image: String,
    /// What was done.
    pub results: Results,
    /// The report for people.
    pub report: PathBuf,
    /// The manifest of the copy.
    pub manifest: PathBuf,
}

/// The run of one migration.
struct Run<'a> {
    job: &'a mut Migration,
    stop: &'a Arc<AtomicBool>,
    monitor: Arc<dyn Monitor>,
    tally: Arc<Tally>,
    store: Arc<dyn ObjectStore>,
    cvm: Cvm,
    object: ObjectUrl,
    region: String,
}

/// Carries `job` from where it stands to its end.
pub fn run(job: &mut Migration, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<Finished> {
    let tally = Arc::new(Tally::default());
    let both: Arc<dyn Monitor> = Arc::new(Both(monitor.clone(), tally.clone()));
    let options = job.record.options.clone();
    let services = Services::new(&options.cloud)?;
    let object = ObjectUrl {
        bucket: options.bucket.clone(),
        key: options.key.clone().unwrap_or_else(|| format!("{}.{}", job.record.id, options.settings.format)),
    };
    let store = services.store(&object.bucket, stop, &both)?;
    let cvm = services.cvm(stop)?;
    let region = services.region().to_owned();
    let mut run = Run { job, stop, monitor: both, tally, store, cvm, object, region };
    let done = run.steps(&options);
    run.note_counters();
    let saved = run.job.save();
    done?;
    saved?;
    finished(run.job)
}

fn finished(job: &Migration) -> Result<Finished> {
    let report = report::write(job)?;
    Ok(Finished {
        job: job.record.id.clone(),
        image: job.record.results.image.clone().unwrap_or_default(),
        results: job.record.results.clone(),
        report,
        manifest: job.folder().join("manifest"),
    })
}

impl Run<'_> {
    fn steps(&mut self, options: &Options) -> Result<()> {
        if !matches!(self.job.record.state, State::Done { .. }) {
            self.make_image(options)?;
        }
        if let (Some(zone), State::Done { image }) = (&options.run_in_zone, self.job.record.state.clone()) {
            self.timed("instance", |run| run.instance(zone, &image, options.poll_seconds))?;
        }
        Ok(())
    }

    /// Runs an instance of the image. The job's id is the client token, so that a repeated request buys no second one.
    fn instance(&mut self, zone: &str, image: &str, poll_seconds: u64) -> Result<()> {
        let request = RunRequest {
            zone: zone.to_owned(),
            image_id: image.to_owned(),
            name: self.job.record.id.clone(),
            client_token: self.job.record.id.clone(),
            ..RunRequest::default()
        };
        let id = self.cvm.run_instance(&request)?;
        self.job.record.results.instance = Some(id.clone());
        self.job.save()?;
        loop {
            let found = self.cvm.instance(&id)?;
            match found.as_ref().map(|instance| instance.instance_state.as_str()) {
                Some("RUNNING") => return Ok(()),
                None | Some("LAUNCH_FAILED") => {
                    return Err(Error::new(
                        Kind::Cloud,
                        "cloud.launch",
                        format!("instance {id} did not start"),
                    )
                    .remedy("look at it in the console; the image itself is done")
                    .fact("instance", id));
                }
                Some(_) => self.cvm.client().clock().sleep(Duration::from_secs(poll_seconds.max(1)))?,
            }
        }
    }

    fn make_image(&mut self, options: &Options) -> Result<()> {
        let request = self.prepare(options)?;
        if self.job.record.state == State::Begun {
            self.copy(options)?;
        }
        if self.job.record.state == State::Copied {
            self.timed("verify", Run::verify)?;
            self.job.enter(State::Verified)?;
        }
        let waiting =
            Waiting { interval: Duration::from_secs(options.poll_seconds.max(1)), ..Waiting::default() };
        if self.job.record.state == State::Verified {
            fault::point("import");
            let image = self.timed("import", |run| run.import(&request, waiting))?;
            fault::point("import");
            self.job.record.results.image = Some(image.clone());
            self.job.enter(State::Importing { image })?;
            fault::point("import");
        }
        if let State::Importing { image } = self.job.record.state.clone() {
            self.monitor.begin("import", None);
            self.timed("wait", |run| import::wait(&run.cvm, &image, waiting, &*run.monitor))?;
            fault::point("import");
            if !options.keep_object {
                self.store.delete(&self.object.key)?;
            }
            fault::point("import");
            self.job.enter(State::Done { image })?;
        }
        Ok(())
    }

    fn opener(&self, options: &Options) -> Opener {
        Opener::new(&options.cloud, self.stop, &self.monitor)
    }

    /// Everything that can be refused before the first byte is copied.
    fn prepare(&mut self, options: &Options) -> Result<ImportRequest> {
        let gate = Gate::closed();
        let disk = self.opener(options).image(&options.source, options.source_format, &gate);
        let target =
            preflight::Target { location: options.source.clone(), disk: disk.map(|image| image.disk) };
        if self.job.record.state == State::Begun {
            self.check(&target, options)?;
        }
        let guest = guest::inspect(target.disk?)?;
        let wanted = Wanted {
            name: options.name.as_deref().unwrap_or(&self.job.record.id),
            description: format!("haul job {}", self.job.record.id),
            os: options.os.as_ref(),
            force: options.force_import,
            fixes: options.fix.as_ref(),
        };
        let request = request(wanted, &guest, &self.cvm)?;
        let results = &mut self.job.record.results;
        results.guest = format!("{} {}", guest.os.name, guest.arch);
        results.os = request.os.to_string();
        results.boot = if request.boot_mode == BootMode::Uefi { "UEFI" } else { "BIOS" }.to_owned();
        Ok(request)
    }

    /// The preflight: a failed check ends the job before anything is copied.
    fn check(&mut self, target: &preflight::Target, options: &Options) -> Result<()> {
        let mut skip = options.skip_checks.clone();
        if options.inconsistent {
            skip.push("source.in-use".to_owned());
        }
        let checks = preflight::Options {
            skip,
            ignore: options.ignore_checks,
            cloud: Some(Cloud { region: Some(self.region.clone()), ..options.cloud.clone() }),
            state: Some(self.job.folder().to_owned()),
            fixes: options.fix.clone().unwrap_or_default(),
            ..preflight::Options::default()
        };
        let report = preflight::run(std::slice::from_ref(target), &checks)?;
        for finding in report.findings.iter().filter(|finding| finding.severity == preflight::Severity::Warn)
        {
            self.monitor.note(Level::Warning, &format!("{}: {}", finding.id, finding.evidence));
        }
        report.pass()
    }

    fn copy(&mut self, options: &Options) -> Result<()> {
        let gate = Gate::closed();
        let open = source::Options {
            format: options.source_format,
            gate: &gate,
            all_blocks: options.settings.all_blocks,
            inconsistent: options.inconsistent,
        };
        let opened = self.opener(options).open(&options.source)?;
        let mut source = Source::open(opened, &open, &*self.monitor)?;
        if let Some(fixes) = &options.fix {
            source = self.timed("fix", |run| {
                let guest = guest::inspect(source.disk().clone())?;
                let plan = fix::plan(&guest, fixes, &*run.monitor)?;
                let (source, fixed) =
                    fix::fix(source, plan, fixes.executor(), run.job.folder(), &*run.monitor)?;
                let results = &mut run.job.record.results;
                results.fixes = fixed.plan.to_string();
                results.proofs = fixed.proofs.into_iter().map(|proof| proof.claim).collect();
                Ok(source)
            })?;
        }
        let folder = self.job.folder().to_owned();
        let copy = Copy {
            source: &source,
            settings: options.settings,
            target: Target::Object {
                store: self.store.clone(),
                key: self.object.key.clone(),
                folder: folder.clone(),
            },
            journal: folder.join("journal"),
            manifest: folder.join("manifest"),
            threads: options.threads,
            base: None,
        };
        let copied = self.timed("copy", |run| copy.run(true, run.stop, &run.monitor))?;
        let head = copied.manifest.head;
        let results = &mut self.job.record.results;
        results.size = head.size;
        results.image_bytes = head.image_bytes;
        results.source_root = head.source_root.0.to_string();
        results.image_root = head.image_root.0.to_string();
        self.job.enter(State::Copied)?;
        fault::point("complete");
        copy.clear();
        Ok(())
    }

    /// Reads the object back, as the importer will, and holds it against the manifest.
    fn verify(&mut self) -> Result<()> {
        let manifest = Manifest::open(&self.job.folder().join("manifest"))?;
        let object = ObjectDisk::open(self.store.clone(), &self.object.key, OBJECT_CACHE)?;
        let format = self.job.record.options.settings.format;
        let image = image::open_on(Arc::new(object), Some(format), &Gate::closed())?;
        let threads = self.job.record.options.threads.max(4);
        self.monitor.begin("verify", Some(manifest.head.size));
        let advance = |done| self.monitor.advance(done);
        let verdict = verify::verify(&manifest, &*image.disk, threads, self.stop, &advance)?;
        match verdict.differing.iter().next() {
            None => Ok(()),
            Some(first) => Err(Error::new(
                Kind::Mismatch,
                "migrate.verify",
                format!("{} is not what was read from the source", self.object),
            )
            .because(format!("{} extents differ, the first at {first:?}", verdict.differing.len()))
            .fact("object", &self.object)),
        }
    }

    fn import(&mut self, request: &ImportRequest, waiting: Waiting) -> Result<String> {
        let (store, key) = (self.store.clone(), self.object.key.clone());
        let mut link = || store.presign_get(&key, LINK_VALID);
        import::rehearse(&self.cvm, request, &mut link)?;
        fault::point("import");
        import::start(&self.cvm, request, waiting, &mut link)
    }

    fn timed<T>(&mut self, step: &str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work(self);
        self.job.record.results.seconds.push((step.to_owned(), start.elapsed().as_secs_f64()));
        result
    }

    /// Adds what this run counted to what earlier ones did.
    fn note_counters(&mut self) {
        let results = &mut self.job.record.results;
        for counter in [Counter::Read, Counter::Skipped, Counter::Zero, Counter::Written] {
            *results.counters.entry(counter.name().to_owned()).or_default() += self.tally.get(counter);
        }
        let notes = self.tally.notes().into_iter();
        results.warnings.extend(notes.filter(|(level, _)| *level == Level::Warning).map(|(_, text)| text));
    }
}

/// What the user wants of an import.
struct Wanted<'a> {
    name: &'a str,
    description: String,
    os: Option<&'a (String, String)>,
    force: bool,
    /// How the guest is fixed before.
    fixes: Option<&'a guest::Options>,
}

/// What to ask ImportImage for.
fn request(wanted: Wanted<'_>, guest: &Guest, cvm: &Cvm) -> Result<ImportRequest> {
    let architecture = architecture(guest)?;
    let os = match wanted.os {
        Some((os_type, os_version)) => OsChoice { os_type: os_type.clone(), os_version: os_version.clone() },
        None => os::choose(&guest.os.id, &guest.os.version, architecture, &cvm.supported_os()?)?,
    };
    let force = wanted.force;
    let comes = wanted.fixes.is_some_and(|fixes| guest::package::are_with(&fixes.packages, "cloud-init"));
    if guest.cloud_init.is_none() && !comes && !force {
        return Err(Error::new(Kind::Preflight, "import.cloud-init", "the cloud would refuse the image")
            .because("the guest has no cloud-init")
            .remedy(
                "give the package of cloud-init with --package, or import without it with --force-import",
            ));
    }
    Ok(ImportRequest {
        name: wanted.name.to_owned(),
        description: wanted.description,
        os,
        architecture,
        boot_mode: boot_mode(wanted.fixes.and_then(|fixes| fixes.firmware).unwrap_or(guest.boot)),
        force,
    })
}

/// An object to be imported as it is.
pub struct Import {
    /// Its bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The cloud.
    pub cvm: Cvm,
    /// Its key.
    pub key: String,
    /// Its format; probed when not given.
    pub format: Option<Format>,
    /// The image's name.
    pub name: String,
    /// The operating system to declare, where it should not be derived.
    pub os: Option<(String, String)>,
    /// Import although the guest has no cloud-init.
    pub force: bool,
    /// Seconds between two looks at the import.
    pub poll_seconds: u64,
}

/// Imports an object and waits for the image; returns its id and what was asked for. Repeated, it finds the image an
/// earlier run started: name, object and its tag are the same.
pub fn import_object(import: &Import, monitor: &dyn Monitor) -> Result<(String, ImportRequest)> {
    let object = ObjectDisk::open(import.store.clone(), &import.key, OBJECT_CACHE)?;
    let tag: String = object.info().etag.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    let image = image::open_on(Arc::new(object), import.format, &Gate::closed())?;
    let guest = guest::inspect(image.disk)?;
    let wanted = Wanted {
        name: &import.name,
        description: format!("haul import {tag}"),
        os: import.os.as_ref(),
        force: import.force,
        fixes: None,
    };
    let request = request(wanted, &guest, &import.cvm)?;
    let waiting = Waiting { interval: Duration::from_secs(import.poll_seconds.max(1)), ..Waiting::default() };
    let mut link = || import.store.presign_get(&import.key, LINK_VALID);
    import::rehearse(&import.cvm, &request, &mut link)?;
    let id = import::start(&import.cvm, &request, waiting, &mut link)?;
    monitor.begin("import", None);
    import::wait(&import.cvm, &id, waiting, monitor)?;
    Ok((id, request))
}

/// The architecture to declare.
fn architecture(guest: &Guest) -> Result<Architecture> {
    Architecture::of_guest(guest.arch).ok_or_else(|| {
        Error::new(Kind::Preflight, "import.arch", "the cloud cannot run this system")
            .because(format!("its programs are for {}", guest.arch))
    })
}

/// The firmware to declare.
fn boot_mode(firmware: guest::disk::BootMode) -> BootMode {
    match firmware {
        guest::disk::BootMode::Bios => BootMode::Bios,
        guest::disk::BootMode::Uefi => BootMode::Uefi,
    }
}

/// Drops what an unfinished job holds: its upload, its object, its folder.
pub fn discard(job: &Migration, stop: &Arc<AtomicBool>, monitor: &Arc<dyn Monitor>) -> Result<()> {
    let options = job.record.options.clone();
    let journal = job.folder().join("journal");
    if journal.exists() || job.record.state != State::Begun {
        let key =
            options.key.clone().unwrap_or_else(|| format!("{}.{}", job.record.id, options.settings.format));
        let store = Services::new(&options.cloud)?.store(&options.bucket, stop, monitor)?;
        for upload in store.uploads(&key)?.iter().filter(|upload| upload.key == key) {
            store.abort(upload)?;
        }
        if !options.keep_object && !matches!(job.record.state, State::Begun | State::Done { .. }) {
            store.delete(&key)?;
        }
    }
    remove_folder(job.folder())
}

fn remove_folder(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder).map_err(|error| {
        Error::new(Kind::Destination, "job.remove", format!("cannot remove {}", folder.display()))
            .caused_by(error)
    })
}
