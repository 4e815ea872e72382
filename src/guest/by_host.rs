//! Carries out a plan with the kernel of this machine.
//!
//! Three processes. This one serves the overlay by FUSE and holds no mount. A child of it owns a mount namespace:
//! there it mounts FUSE, a loop device over each file system, and the guest's tree. A child of that is locked into
//! the guest's tree, edits its files and runs its programs. Each dies with its parent, so a kill anywhere takes
//! every mount, loop device and connection with it; the overlay stays unsealed and is thrown away.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::apply::{Setup, folder_error};
use super::install::Given;
use super::mounted;
use super::plan::Plan;
use super::say::{MAX_LINE, Say};
use super::twin::Twins;
use crate::error::{Error, Kind, Result};
use crate::host::child::{self, Guarded};
use crate::host::export::{self, FuseDevice, MemoryLock};
use crate::host::mounts;
use crate::host::namespace;
use crate::monitor::Monitor;
use crate::unit::fault;

/// The hidden first argument that makes `haul` the owner of the mounts.
const ENTRY: &str = "internal-guest-mounts";
/// The name of the exported file: udev's rule knows the loop devices over it by this name.
const EXPORT: &str = "haul-guest-copy";

/// What the child is to do.
#[derive(Serialize, Deserialize)]
struct Task {
    parent: i32,
    folder: PathBuf,
    plan: Plan,
}

/// Carries out `plan` on the disk `shown`. Needs root, FUSE and loop devices.
pub fn carry_out(
    plan: &Plan,
    shown: &Arc<dyn export::Disk>,
    setup: &Setup,
    monitor: &dyn Monitor,
) -> Result<()> {
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
            Ok(Say::Done) => return Ok(server),
            Ok(said) => said.pass_on(monitor).map_err(|error| (error, server.take()))?,
            Err(error) => return Err((broken(error.to_string()), server)),
        }
    }
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
    let packages = Given::open(&task.plan.fixes, Path::to_owned)?;
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
    let done = mounted::carry_out(&disk, &task.plan, &root, &packages)?;
    drop(disk);
    namespace::unmount(&export)?;
    Ok(done)
}
