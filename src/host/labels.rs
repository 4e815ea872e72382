//! SELinux labels on the files of a tree that is not this system's: bytes in an attribute, whatever this host itself enforces.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use super::namespace::open_folder;
use crate::error::{Error, Kind, Result};

/// The attribute (Linux's `XATTR_NAME_SELINUX`).
const ATTRIBUTE: &str = "security.selinux";
/// Longest label that is copied, in bytes.
const LONGEST: usize = 4096;
/// Files that are looked at for one with a label.
const NEIGHBOURS: usize = 100;

/// Labels the new file at `path` in the tree `root` as a file beside it is, and new folders above it as the folder above
/// them. What has a label keeps it, and so does a tree without labels its state. No link is followed.
pub fn adopt(root: &Path, path: &str) -> Result<()> {
    adopt_in(root, path).map_err(|errno| {
        Error::new(Kind::Image, "guest.label", format!("cannot label the guest's {path} for SELinux"))
            .caused_by(std::io::Error::from(errno))
    })
}

fn adopt_in(root: &Path, path: &str) -> nix::Result<()> {
    let mut folder = open_folder(root, "")?;
    let Some(mut above) = label(&folder)? else { return Ok(()) };
    let mut names = path.split('/').filter(|name| !name.is_empty()).peekable();
    while let Some(name) = names.next() {
        let is_last = names.peek().is_none();
        let kind = if is_last { OFlag::empty() } else { OFlag::O_DIRECTORY };
        let found = openat(
            &folder,
            name,
            kind | OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        above = match label(&found)? {
            Some(own) => own,
            None => {
                let label = if is_last { beside(&folder)?.unwrap_or(above) } else { above };
                setxattr(of(&found), ATTRIBUTE, &label, XattrFlags::CREATE).map_err(errno)?;
                label
            }
        };
        folder = found;
    }
    Ok(())
}

/// The label of a regular file in `folder`: the first by name that has one.
fn beside(folder: &OwnedFd) -> nix::Result<Option<Vec<u8>>> {
    let mut open = nix::dir::Dir::openat(
        folder,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in open.iter().take(NEIGHBOURS) {
        names.push(entry?.file_name().to_owned());
    }
    names.sort();
    for name in names {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(folder, name.as_c_str(), flags, Mode::empty())?;
        let is_file = SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        if is_file && let Some(label) = label(&file)? {
            return Ok(Some(label));
        }
    }
    Ok(None)
}

fn label(file: &OwnedFd) -> nix::Result<Option<Vec<u8>>> {
    let mut label = vec![0; LONGEST];
    match getxattr(of(file), ATTRIBUTE, &mut label[..]) {
        Ok(len) => {
            label.truncate(len);
            Ok(Some(label))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOTSUP | rustix::io::Errno::RANGE) => Ok(None),
        Err(error) => Err(errno(error)),
    }
}

/// A path by which an attribute of the open `file` is reached: a descriptor of the kind O_PATH does not do.
fn of(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn set(path: &Path, label: &str) {
        setxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()).unwrap();
    }

    fn get(path: &Path) -> Option<String> {
        let mut label = [0; 100];
        let len = getxattr(path, ATTRIBUTE, &mut label[..]).ok()?;
        Some(String::from_utf8_lossy(&label[..len]).into_owned())
    }

    #[test]
    fn new_files_and_folders_are_labelled_as_their_neighbours_are() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("etc/new/deep")).unwrap();
        for name in ["etc/fstab", "etc/made", "etc/new/deep/made", "bare"] {
            File::create(root.join(name)).unwrap();
        }
        adopt(root, "/etc/made").unwrap();
        assert_eq!(get(&root.join("etc/made")), None, "the tree had no labels");

        set(root, "root_t");
        set(&root.join("etc"), "etc_dir_t");
        set(&root.join("etc/fstab"), "etc_t");
        for path in ["/etc/made", "/etc/new/deep/made", "/bare", "/etc/fstab"] {
            adopt(root, path).unwrap();
        }
        let labels = ["etc/made", "etc/new", "etc/new/deep", "etc/new/deep/made", "bare", "etc/fstab"];
        let found = labels.map(|path| get(&root.join(path)).unwrap_or_default());
        assert_eq!(found, ["etc_t", "etc_dir_t", "etc_dir_t", "etc_dir_t", "root_t", "etc_t"]);
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        set(&root, "root_t");
        File::create(dir.path().join("outside")).unwrap();
        std::os::unix::fs::symlink("..", root.join("out")).unwrap();
        assert!(adopt(&root, "/out/outside").is_err());
        assert_eq!(get(&dir.path().join("outside")), None);
    }
}
