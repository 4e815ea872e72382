//! Which programs have files of a file system open for writing: they wait while it is frozen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::mounts::{Mount, mounts, parse_mountinfo};

/// A program that writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its number.
    pub pid: u32,
    /// Its name, as the kernel has it: at most 15 bytes.
    pub name: String,
    /// How many files it has open for writing.
    pub files: usize,
}

/// The programs, other than this one, that have files open for writing in what is mounted at `points`, in whatever
/// namespace; the ones with the most files first. As far as this user may look.
pub fn writers(points: &BTreeSet<PathBuf>) -> Vec<Writer> {
    let ours = mounts().unwrap_or_default();
    let mut of_namespace: BTreeMap<PathBuf, BTreeSet<u64>> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let process = entry.path();
        // Processes come and go, and some may not be looked into: they are no answer, not an error.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        let ids = of_namespace.entry(namespace).or_insert_with(|| {
            let text = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
            let all = parse_mountinfo(&text);
            all.iter().filter(|mount| lies_on(mount, points, &ours)).map(|mount| mount.id).collect()
        });
        if ids.is_empty() || pid == std::process::id() {
            continue;
        }
        let files = fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
        let files = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        let files = files.filter(|text| written_mount(text).is_some_and(|id| ids.contains(&id))).count();
        if files > 0 {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.push(Writer { pid, name: name.trim_end().to_owned(), files });
        }
    }
    found.sort_by(|a, b| b.files.cmp(&a.files).then(a.pid.cmp(&b.pid)));
    found
}

/// Whether what is written to `mount` gets to one at `points`; a container's overlay writes into a folder of ours.
fn lies_on(mount: &Mount, points: &BTreeSet<PathBuf>, ours: &[Mount]) -> bool {
    let upper = mount.options.split(',').find_map(|option| option.strip_prefix("upperdir="));
    match upper {
        Some(upper) if mount.kind == "overlay" => {
            let below =
                ours.iter().map(|mount| &mount.point).filter(|point| Path::new(upper).starts_with(point));
            below.max_by_key(|point| point.as_os_str().len()).is_some_and(|point| points.contains(point))
        }
        _ => points.contains(&mount.point),
    }
}

/// The mount that a file is in, where it is open for writing (proc(5), `/proc/PID/fdinfo`; since Linux 3.15).
fn written_mount(text: &str) -> Option<u64> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let flags = i32::from_str_radix(field("flags:")?, 8).ok()?;
    if flags & libc::O_ACCMODE == libc::O_RDONLY { None } else { field("mnt_id:")?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_open_for_writing_has_a_mount_that_counts() {
        let text = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t29\nino:\t7\n");
        assert_eq!(written_mount(&text("0100002")), Some(29));
        assert_eq!(written_mount(&text("02100001")), Some(29));
        assert_eq!(written_mount(&text("0100000")), None);
        assert_eq!(written_mount("pos:\t0\nflags:\t0100002\n"), None);
    }

    #[test]
    fn an_overlay_lies_where_its_upper_folder_is() {
        let mount = |line: &str| parse_mountinfo(line).remove(0);
        let ours = [
            mount("25 1 8:1 / / rw - ext4 /dev/sda1 rw"),
            mount("26 25 8:17 / /var/lib/docker rw - xfs /dev/sdb1 rw"),
        ];
        let overlay = mount(
            "90 80 0:50 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/var/lib/docker/o/1/diff,workdir=/w",
        );
        let on = |point: &str| lies_on(&overlay, &BTreeSet::from([PathBuf::from(point)]), &ours);
        assert!(on("/var/lib/docker"));
        // Its own root is called as the host's.
        assert!(!on("/"));
        assert!(lies_on(&ours[0], &BTreeSet::from([PathBuf::from("/")]), &ours));
    }
}
