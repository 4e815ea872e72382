//! Carries out a plan on an overlay.
//!
//! Three processes. This one serves the overlay by FUSE and holds no mount. A child of it owns a mount namespace:
//! there it mounts FUSE, a loop device over each file system, and the guest's tree. A child of that is locked into
//! the guest's tree, edits its files and runs its programs. Each dies with its parent, so a kill anywhere takes
//! every mount, loop device and connection with it; the overlay stays unsealed and is thrown away.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::disk;
use super::extended::Extended;
use super::fat;
use super::hook;
use super::inspect::inspect;
use super::install::Given;
use super::partition;
use super::plan::{Fix, Plan, PlannedMount, changed};
use super::steps;
use super::tree::Node;
use super::twin::Twins;
use crate::error::{Error, Kind, Result};
use crate::host::child::{self, Guarded};
use crate::host::export::{self, FuseDevice, MemoryLock};
use crate::host::labels;
use crate::host::loopdev::LoopDevice;
use crate::host::mounts;
use crate::host::namespace::{self, Limits};
use crate::image::overlay::{Overlay, Sealed};
use crate::io::ReadAt;
use crate::monitor::{Level, Monitor};
use crate::unit::{Extent, GIB, fault};

/// The hidden first argument that makes `haul` the owner of the mounts.
const ENTRY: &str = "internal-guest-mounts";
/// The name of the exported file: udev's rule knows the loop devices over it by this name.
const EXPORT: &str = "haul-guest-copy";
/// How long all of a plan may take.
const TIME: Duration = Duration::from_secs(30 * 60);
/// What the guest's programs may use.
const LIMITS: Limits = Limits { memory: 2 * GIB, processes: 512, time: TIME };
/// Longest line of the protocol between the processes, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// What applying needs of its surroundings.
#[derive(Clone, Debug)]
pub struct Setup {
    /// An empty folder of haul's own; mount points lie in it.
    pub folder: PathBuf,
    /// The `haul` program, which starts itself again.
    pub program: PathBuf,
}

impl Setup {
    /// `folder`, and the running program.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Setup { folder: folder.into(), program: "/proc/self/exe".into() }
    }
}

/// What the child is to do.
#[derive(Serialize, Deserialize)]
struct Task {
    parent: i32,
    folder: PathBuf,
    plan: Plan,
}

/// What the children say, one line of JSON each.
#[derive(Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
enum Say {
    /// FUSE is mounted: serve it.
    Mounted,
    /// A step is done.
    Step { text: String },
    /// What the user must know of it.
    Warning { text: String },
    /// Something failed.
    Failed { exit_code: u8, cause: String, what: String, why: String, remedy: String },
    /// Everything is done, written and unmounted.
    Done,
}

impl Say {
    fn failed(error: &Error) -> Self {
        Say::Failed {
            exit_code: error.kind().exit_code(),
            cause: error.id().to_owned(),
            what: error.what().to_owned(),
            why: error.why(),
            remedy: error.what_to_do().to_owned(),
        }
    }

    fn send(&self) -> bool {
        let Ok(line) = serde_json::to_string(self) else { return false };
        let mut out = std::io::stdout().lock();
        // One write: the lines of two processes must not mix.
        out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).is_ok()
    }
}

/// Carries out `plan` on `overlay` and seals it. Needs root, FUSE and loop devices. A plan with nothing to do
/// seals the overlay as it is. Fails without sealing when any step fails.
pub fn apply(plan: &Plan, overlay: &Arc<Overlay>, setup: &Setup, monitor: &dyn Monitor) -> Result<Sealed> {
    if plan.is_empty() || overlay.is_sealed() {
        return overlay.seal();
    }
    monitor.begin("fix", None);
    let shown = Extended::new(Arc::clone(overlay), &(Arc::clone(overlay) as Arc<dyn ReadAt>))?;
    let shown: Arc<dyn export::Disk> = Arc::new(shown);
    let all = || plan.fixes.iter();
    for fix in all() {
        if let Fix::Partition { start, end, purpose, .. } = fix {
            let text = partition::add(&shown, Extent::new(*start, *end), *purpose)?;
            monitor.note(Level::Info, &text);
        }
    }
    let on_disk = |fix: &Fix| matches!(fix, Fix::Partition { .. } | Fix::BootSector { .. });
    let fixes: Vec<Fix> = all().filter(|fix| !on_disk(fix) && plan.fat_of(fix).is_none()).cloned().collect();
    if !fixes.is_empty() {
        mounted(&Plan { fixes, findings: Vec::new(), mounts: plan.mounts.clone() }, &shown, setup, monitor)?;
    }
    for fix in all() {
        let text = match (fix, plan.fat_of(fix)) {
            (Fix::BootSector { core, start, end, .. }, _) => {
                let extent = Extent::new(*start, *end);
                let boot = in_tree(overlay, &beside(core, "boot.img"))?;
                partition::write_boot_sector(&*shown, extent, &boot, &in_tree(overlay, core)?)?;
                format!("put {core} where a BIOS looks")
            }
            (Fix::Append { kernel, image, modules, .. }, Some(mount)) => {
                // The modules are in another file system.
                let guest = inspect(Arc::clone(overlay) as Arc<dyn ReadAt>)?;
                let Some(Node::File(len)) = guest.tree.node(image)? else { return Err(changed(image)) };
                let open = |path: &str| guest.tree.open(path);
                let bytes = hook::appendix(kernel, image, len, modules, &open)?;
                fat::append(&shown, mount, image, len, &bytes)?;
                steps::appended(image)
            }
            (Fix::Copy { from, path, .. }, Some(mount)) if !from.starts_with(&mount.point) => {
                fat::put(&shown, mount, path, &in_tree(overlay, from)?)?;
                format!("copied {from} to {path}")
            }
            (_, Some(mount)) => fat::step(&shown, mount, fix)?,
            _ => continue,
        };
        monitor.note(Level::Info, &text);
    }
    fault::point("fix");
    let sealed = overlay.seal();
    fault::point("fix");
    sealed
}

/// The boot loader's file at `path`, as it is in the copy by now.
fn in_tree(overlay: &Arc<Overlay>, path: &str) -> Result<Vec<u8>> {
    let tree = disk::open(Arc::clone(overlay) as Arc<dyn ReadAt>)?.tree;
    let stream = tree.open(path)?.ok_or_else(|| changed(path))?;
    let mut bytes = Vec::new();
    stream.take(fat::MAX_FILE).read_to_end(&mut bytes).map_err(|error| {
        Error::new(Kind::Image, "guest.read", format!("cannot read the copy's {path}")).caused_by(error)
    })?;
    Ok(bytes)
}

fn beside(path: &str, name: &str) -> String {
    format!("{}/{name}", path.rsplit_once('/').map_or("", |(folder, _)| folder))
}

/// Carries out what needs the kernel's file systems.
fn mounted(plan: &Plan, shown: &Arc<dyn export::Disk>, setup: &Setup, monitor: &dyn Monitor) -> Result<()> {
    let folder = fs::canonicalize(&setup.folder).map_err(|error| folder_error(&setup.folder, error))?;
    let shown: Arc<dyn export::Disk> =
        Arc::new(Twins::new(Arc::clone(shown), plan.mounts.iter(), Path::new(mounts::BTRFS))?);
    let _lock = MemoryLock::new();
    let _rule = UdevRule::write();
    let fuse = FuseDevice::open()?;
    let task = Task { parent: std::process::id().cast_signed(), folder: folder.clone(), plan: plan.clone() };
    let bytes = serde_json::to_vec(&task).map_err(|error| {
        Error::new(Kind::Internal, "guest.task", "cannot write the task").caused_by(error)
    })?;
    let task_file = folder.join("task.json");
    crate::io::atomic::write(&task_file, &bytes)?;

    let device = fuse.as_fd().try_clone_to_owned().map_err(|error| folder_error(&folder, error))?;
    let mut command = Command::new(&setup.program);
    command
        .arg(ENTRY)
        .arg(&task_file)
        .env_clear()
        .stdin(Stdio::from(device))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = Guarded::spawn(&mut command)?;
    // The command still holds the descriptor given to the child.
    drop(command);
    let served = listen(&mut child, fuse, &shown, monitor);
    // The namespace goes with the child; the server ends when the last mount of it is gone.
    let status = served.as_ref().is_ok().then(|| child.child().wait());
    child.kill();
    let (outcome, server) = match served {
        Ok(server) => (Ok(()), server),
        Err((error, server)) => (Err(error), server),
    };
    if let Some(server) = server {
        // However it ended: what counts is that nothing is being served any more.
        let _ = server.join();
    }
    let _ = fs::remove_file(&task_file);
    outcome?;
    match status {
        Some(Ok(status)) if status.success() => Ok(()),
        status => {
            Err(Error::new(Kind::Internal, "guest.child", "the process that held the copy's mounts failed")
                .because(format!("{status:?}")))
        }
    }
}

type Server = std::thread::JoinHandle<std::io::Result<()>>;

/// Serves FUSE when the child has mounted it, and follows what it says to the end.
fn listen(
    child: &mut Guarded,
    fuse: FuseDevice,
    shown: &Arc<dyn export::Disk>,
    monitor: &dyn Monitor,
) -> std::result::Result<Option<Server>, (Error, Option<Server>)> {
    let mut fuse = Some(fuse);
    let mut server = None;
    let broken = |why: String| {
        Error::new(Kind::Internal, "guest.child", "the process that held the copy's mounts ended early")
            .because(why)
    };
    let Some(output) = child.child().stdout.take() else {
        return Err((broken("it has no output".into()), None));
    };
    let mut lines = BufReader::new(output);
    loop {
        let mut line = String::new();
        match (&mut lines).take(MAX_LINE).read_line(&mut line) {
            Ok(0) => return Err((broken("it was killed, or could not start".into()), server)),
            Ok(_) => {}
            Err(error) => return Err((broken(error.to_string()), server)),
        }
        fault::point("fix");
        match serde_json::from_str(&line) {
            Ok(Say::Mounted) => {
                server = fuse.take().map(|fuse| fuse.serve(Arc::clone(shown)));
            }
            Ok(Say::Step { text }) => {
                monitor.note(Level::Info, &text);
            }
            Ok(Say::Warning { text }) => monitor.note(Level::Warning, &text),
            Ok(Say::Failed { exit_code, cause, what, why, remedy }) => {
                let known = [Kind::Privilege, Kind::Source, Kind::Destination, Kind::Internal];
                let kind =
                    known.into_iter().find(|kind| kind.exit_code() == exit_code).unwrap_or(Kind::Image);
                let error =
                    Error::new(kind, "guest.apply", what).because(why).remedy(remedy).fact("cause", cause);
                return Err((error, server));
            }
            Ok(Say::Done) => return Ok(server),
            Err(error) => return Err((broken(error.to_string()), server)),
        }
    }
}

fn folder_error(folder: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "guest.folder", format!("cannot use {}", folder.display())).caused_by(error)
}

/// A udev rule, for as long as it lives, by which the host leaves loop devices over the copy alone: no by-uuid
/// link moves to a twin, nothing is activated or mounted.
struct UdevRule(Option<PathBuf>);

impl UdevRule {
    fn write() -> Self {
        let folder = Path::new("/run/udev/rules.d");
        if !Path::new("/run/udev").is_dir() || fs::create_dir_all(folder).is_err() {
            return UdevRule(None);
        }
        let path = folder.join("59-haul-guest-copy.rules");
        let rule = format!(
            "SUBSYSTEM==\"block\", KERNEL==\"loop*\", ATTR{{loop/backing_file}}==\"*/{EXPORT}\", \
             ENV{{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}}=\"1\", ENV{{SYSTEMD_READY}}=\"0\", \
             ENV{{UDISKS_IGNORE}}=\"1\"\n"
        );
        match fs::write(&path, rule) {
            Ok(()) => {
                reload_udev();
                UdevRule(Some(path))
            }
            Err(_) => UdevRule(None),
        }
    }
}

fn reload_udev() {
    // udev notices a new file by itself within seconds; asked, it does so at once.
    for program in ["/usr/bin/udevadm", "/bin/udevadm", "/sbin/udevadm"] {
        if Path::new(program).exists() {
            let mut command = Command::new(program);
            command.args(["control", "--reload"]).env_clear().stdin(Stdio::null());
            let _ = child::run(&mut command, Duration::from_secs(10));
            return;
        }
    }
}

impl Drop for UdevRule {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
            reload_udev();
        }
    }
}

/// The entry of the process that owns the mounts: `Some` when `arguments` ask for it. To be called first in
/// `main`, before any thread exists.
pub fn internal_entry(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1);
    if arguments.next()? != ENTRY {
        return None;
    }
    let outcome = match arguments.next() {
        Some(task) => own_mounts(Path::new(&task)),
        None => Err(Error::new(Kind::Usage, "guest.task", "this is no command for people")),
    };
    let said = match outcome {
        Ok(true) => Say::Done.send(),
        // The box has said why.
        Ok(false) => false,
        Err(error) => {
            Say::failed(&error).send();
            false
        }
    };
    Some(if said { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Mounts everything, lets the box work, unmounts everything.
fn own_mounts(task: &Path) -> Result<bool> {
    let bytes = fs::read(task).map_err(|error| folder_error(task, error))?;
    let task: Task = serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(Kind::Internal, "guest.task", "cannot read the task").caused_by(error))?;
    namespace::die_with_parent(nix::unistd::Pid::from_raw(task.parent))?;
    // They may lie on what is let go below.
    let packages = Given::open(&task.plan.fixes)?;
    namespace::own_mounts(&task.folder)?;
    namespace::scratch(&task.folder)?;
    let export = task.folder.join(EXPORT);
    export::mount(std::io::stdin().as_fd(), &export)?;
    // From now on only the server holds the connection: its death ends it.
    namespace::drop_stdin()?;
    Say::Mounted.send();

    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(&export)
        .map_err(|error| folder_error(&export, error))?;
    // The kernel asks for the size of a FUSE mount's root when somebody else does; a loop device takes what is known.
    disk.metadata().map_err(|error| folder_error(&export, error))?;
    let root = task.folder.join("root");
    fs::create_dir(&root).map_err(|error| folder_error(&root, error))?;
    // One device for each file system, however often it is mounted: two of one btrfs would be taken for two of its disks.
    let mut devices: BTreeMap<u64, LoopDevice> = BTreeMap::new();
    let mounts = || task.plan.mounts.iter().filter(|mount| !mount.is_fat());
    for mount in mounts() {
        let device = match devices.entry(mount.start) {
            Entry::Occupied(device) => device.into_mut(),
            Entry::Vacant(room) => {
                room.insert(LoopDevice::attach(&disk, Extent::new(mount.start, mount.end), false)?)
            }
        };
        namespace::mount_beneath(device.path(), &mount.kind, &root, &mount.point, &mount_options(mount))?;
    }
    let fixes = &task.plan.fixes;
    let done = namespace::confined(&root, LIMITS, || in_the_box(fixes, &packages))?;
    for fix in fixes.iter().filter(|fix| done && matches!(fix, Fix::Create { .. })) {
        // The box may not.
        labels::adopt(&root, fix.path())?;
    }
    for mount in mounts().rev() {
        namespace::unmount(&root.join(mount.point.trim_start_matches('/')))?;
    }
    drop(devices);
    drop(disk);
    namespace::unmount(&export)?;
    Ok(done)
}

/// What the kernel is told beside the guest's own options: XFS refuses a second file system of one UUID, and the host may
/// have the very original mounted.
fn mount_options(mount: &PlannedMount) -> String {
    match mount.kind.as_str() {
        "xfs" => "nouuid".to_owned(),
        _ => mount.options.clone(),
    }
}

/// The steps, in the guest's tree.
fn in_the_box(fixes: &[Fix], packages: &Given) -> bool {
    for fix in fixes {
        match steps::step(fix, packages) {
            Ok(done) => {
                if let Some(text) = done.warning {
                    Say::Warning { text }.send();
                }
                Say::Step { text: done.text }.send();
            }
            Err(error) => {
                Say::failed(&error).send();
                return false;
            }
        }
    }
    true
}
