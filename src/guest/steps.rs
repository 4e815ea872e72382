//! The steps of a plan, carried out in the guest's tree, which is all that this process sees.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sha1::{Digest as _, Sha1};

use super::builder::Builder;
use super::grub;
use super::hook;
use super::initramfs;
use super::install::{self, Given};
use super::plan::{Fix, changed};
use crate::error::{Error, Kind, Result};
use crate::host::child;
use crate::unit::MIB;

/// How long one program of the guest may take.
pub(super) const TOOL_TIME: Duration = Duration::from_secs(15 * 60);
/// Room left in a file system after a new initramfs, in bytes.
const MARGIN: u64 = MIB;
/// The id of the error that a new initramfs does not fit.
const NO_ROOM: &str = "guest.no-room";

/// What a step did.
pub struct Done {
    /// In words.
    pub text: String,
    /// What the user must know of it.
    pub warning: Option<String>,
}

/// Carries out `fix`, in a root folder that is the guest's, with the packages that are `given`.
pub fn step(fix: &Fix, given: &Given) -> Result<Done> {
    let mut warning = None;
    let text = match fix {
        Fix::Edit { path, old, new, .. } => {
            expect(path, old)?;
            // In place: owner, mode, links, attributes and labels stay what they are.
            write_in_place(path, new.as_bytes())?;
            format!("edited {path}")
        }
        Fix::Create { path, text, mode, .. } => {
            if let Some((folder, _)) = path.rsplit_once('/') {
                fs::create_dir_all(if folder.is_empty() { "/" } else { folder })
                    .map_err(|error| step_error("make the folder of", path, error))?;
            }
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(*mode)
                .open(path)
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|error| step_error("make", path, error))?;
            format!("made {path}")
        }
        Fix::Remove { path, old, .. } => {
            expect(path, old)?;
            fs::remove_file(path).map_err(|error| step_error("remove", path, error))?;
            format!("removed {path}")
        }
        // They are carried out outside.
        Fix::Copy { .. } | Fix::Partition { .. } | Fix::BootSector { .. } => return Err(changed(fix.path())),
        Fix::Grub { platform, core, modules, config, .. } => grub::build(platform, core, modules, config)?,
        Fix::Install { packages, installer, .. } => install::install(*installer, packages, given)?,
        Fix::Initramfs { kernel, image, builder, modules, .. } => {
            match rebuild(*builder, kernel, image, modules) {
                Ok(()) => format!("built {image}"),
                Err(error) => {
                    // Why the better way failed is what to mend.
                    let Ok(()) = append(kernel, image, modules) else { return Err(error) };
                    let (what, why) = (error.what(), error.why());
                    warning = Some(format!("{what}: {why}; the drivers were added to {image}"));
                    appended(image)
                }
            }
        }
        Fix::Append { kernel, image, modules, .. } => {
            append(kernel, image, modules)?;
            appended(image)
        }
    };
    Ok(Done { text, warning })
}

/// What is said of an initramfs that drivers were added to.
pub(super) fn appended(image: &str) -> String {
    format!("added the drivers to {image}")
}

/// Appends modules to the initramfs; it stays as it was where that fails.
fn append(kernel: &str, image: &str, modules: &[String]) -> Result<()> {
    let old = fs::symlink_metadata(image).map_err(|error| step_error("find", image, error))?;
    if !old.file_type().is_file() {
        return Err(changed(image));
    }
    let bytes = hook::appendix(kernel, image, old.len(), modules, &open)?;
    has_room(image, bytes.len() as u64, 0)?;
    let mut file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(image)
        .map_err(|error| step_error("open", image, error))?;
    if let Err(error) = file.write_all(&bytes) {
        file.set_len(old.len()).map_err(|error| step_error("cut", image, error))?;
        return Err(step_error("write", image, error));
    }
    note_checksum(kernel, image)
}

/// A regular file of the guest's.
fn open(path: &str) -> Result<Option<Box<dyn Read + 'static>>> {
    if !fs::metadata(path).is_ok_and(|meta| meta.is_file()) {
        return Ok(None);
    }
    let file = File::open(path).map_err(|error| step_error("read", path, error))?;
    Ok(Some(Box::new(file)))
}

/// Fails unless the file system of `image` has room for `size` bytes in the place of `freed`.
pub(super) fn has_room(image: &str, size: u64, freed: u64) -> Result<()> {
    let folder = Path::new(image).parent().unwrap_or(Path::new("/"));
    let free = room(folder).map_err(|error| step_error("measure", image, error))?;
    if size + MARGIN <= free.saturating_add(freed) {
        return Ok(());
    }
    Err(Error::new(Kind::Image, NO_ROOM, format!("no room for the new {image}"))
        .because(format!(
            "it needs {size} bytes; its file system has {free} free, and the old one frees {freed}"
        ))
        .remedy("remove an old kernel from the source's /boot, then try again")
        .fact("needed", size)
        .fact("free", free))
}

pub(super) fn step_error(verb: &str, path: &str, error: std::io::Error) -> Error {
    let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
    let error =
        Error::new(Kind::Image, "guest.step", format!("cannot {verb} the guest's {path}")).caused_by(error);
    if full { error.remedy("free space in that file system of the source, then try again") } else { error }
}

/// Fails unless the file holds what the plan saw.
fn expect(path: &str, old: &str) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(|error| step_error("find", path, error))?;
    if !meta.file_type().is_file() || meta.file_type().is_fifo() || meta.len() != old.len() as u64 {
        return Err(changed(path));
    }
    match fs::read(path) {
        Ok(text) if text == old.as_bytes() => Ok(()),
        Ok(_) => Err(changed(path)),
        Err(error) => Err(step_error("read", path, error)),
    }
}

fn write_in_place(path: &str, bytes: &[u8]) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| step_error("write", path, error))
}

/// A program of the guest, with nothing of the host's environment.
pub(super) fn guest_program(candidates: &[&str], package: &str) -> Result<Command> {
    let found = candidates.iter().find(|path| Path::new(path).exists()).ok_or_else(|| {
        Error::new(Kind::Image, "guest.no-tool", format!("the guest has no {}", candidates.join(", nor ")))
            .remedy(format!("install {package} in the source, then try again"))
    })?;
    let mut command = Command::new(found);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .env("HOME", "/root")
        .env("TMPDIR", "/var/tmp")
        .current_dir("/")
        .stdin(Stdio::null());
    Ok(command)
}

/// Builds the initramfs aside, looks into it, and puts it in the old one's place: /boot never has to hold both.
/// Where there is no room for it, it is packed as tightly as the kernel can unpack.
fn rebuild(builder: Builder, kernel: &str, image: &str, modules: &[String]) -> Result<()> {
    let aside = builder.output(kernel, &format!("/var/tmp/haul-initramfs-{}", std::process::id()));
    let attempt = |tight| {
        let done = build(builder, kernel, &aside, modules, tight)
            .and_then(|()| replace(builder, &aside, image, kernel, modules));
        // It may not be there; what matters has been said.
        let _ = fs::remove_file(&aside);
        done
    };
    match attempt(false) {
        Err(error) if error.id() == NO_ROOM && unpacks_xz(kernel) => attempt(true).map_err(|_| error),
        done => done,
    }
}

fn unpacks_xz(kernel: &str) -> bool {
    let config = fs::read_to_string(format!("/boot/config-{kernel}")).unwrap_or_default();
    config.lines().any(|line| line == "CONFIG_RD_XZ=y") && Path::new("/usr/bin/xz").exists()
}

fn build(builder: Builder, kernel: &str, aside: &str, modules: &[String], tight: bool) -> Result<()> {
    let program = || guest_program(builder.programs(), builder.package());
    let mut help = String::new();
    if builder.has_versions() {
        let said = child::run(program()?.arg("--help"), TOOL_TIME)?;
        help = String::from_utf8_lossy(&said.stdout).into_owned();
    }
    let mut command = program()?;
    command.args(builder.arguments(kernel, aside, modules, &help, tight));
    match child::run(&mut command, TOOL_TIME).and_then(child::Finished::success) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::new(
            Kind::Image,
            "guest.initramfs",
            format!("cannot build the initramfs of kernel {kernel}"),
        )
        .because(format!("{}: {}", error.what(), error.why()))
        .remedy(format!(
            "run {} for that kernel in the source to see more; it needs room in /var/tmp",
            builder.package()
        ))),
    }
}

/// Room for files in a file system, in bytes, as root has it: ext4 keeps root's reserve for us, but never gives
/// its own (2 %, at most 4096 blocks; fs/ext4/super.c, `ext4_calculate_resv_clusters`).
fn room(folder: &Path) -> std::io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    let own = (stat.blocks() / 50).min(4096);
    Ok(stat.blocks_free().saturating_sub(own).saturating_mul(stat.fragment_size()))
}

fn replace(builder: Builder, aside: &str, image: &str, kernel: &str, modules: &[String]) -> Result<()> {
    let file = File::open(aside).map_err(|error| step_error("read", aside, error))?;
    let size = file.metadata().map_err(|error| step_error("read", aside, error))?.len();
    let found = initramfs::read(file, image)?;
    if let Some(absent) = modules.iter().find(|module| !found.modules.contains(*module)) {
        let package = builder.package();
        return Err(Error::new(Kind::Image, "guest.initramfs", format!("the new {image} has no {absent}"))
            .because(format!("{package} left it out for kernel {kernel}"))
            .remedy(format!("look for a setting of {package} in the guest that excludes it")));
    }
    let old = fs::symlink_metadata(image).map_err(|error| step_error("find", image, error))?;
    if !old.file_type().is_file() {
        return Err(changed(image));
    }
    has_room(image, size, old.len())?;
    let mut from = File::open(aside).map_err(|error| step_error("read", aside, error))?;
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(image)
        .and_then(|mut to| std::io::copy(&mut from, &mut to))
        .map_err(|error| step_error("write", image, error))?;
    note_checksum(kernel, image)
}

/// update-initramfs keeps a checksum of what it made, and leaves alone what does not match it.
fn note_checksum(kernel: &str, image: &str) -> Result<()> {
    let record = format!("/var/lib/initramfs-tools/{kernel}");
    if !fs::symlink_metadata(&record).is_ok_and(|meta| meta.is_file()) {
        return Ok(());
    }
    let mut sum = Sha1::new();
    File::open(image)
        .and_then(|mut file| std::io::copy(&mut file, &mut sum))
        .map_err(|error| step_error("read", image, error))?;
    let digits: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    write_in_place(&record, format!("{digits}  {image}\n").as_bytes())
}
