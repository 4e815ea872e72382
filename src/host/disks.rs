//! The whole disks of this machine.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Names under /sys/block of what is no disk of its own: loop, memory and network devices, optical and floppy
/// drives, and what is stacked on other disks.
const NOT_DISKS: [&str; 10] = ["loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "bcache", "mtdblock"];

/// The device nodes of this machine's disks, by name; drives without a medium and hidden paths left out.
pub fn whole() -> Result<Vec<PathBuf>> {
    whole_of(Path::new("/sys/block"))
}

fn whole_of(sys: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::new(Kind::Source, "disks.list", "cannot list the disks").caused_by(error);
    let mut disks = Vec::new();
    for entry in fs::read_dir(sys).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let value = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        // The parts of a multipath NVMe name-space are hidden: they have no node.
        let hidden = value("hidden").trim() == "1" || matches!(value("size").trim(), "" | "0");
        if !hidden && !NOT_DISKS.iter().any(|prefix| name.starts_with(prefix)) {
            // The kernel writes the slash of `cciss/c0d0` as `!`.
            disks.push(Path::new("/dev").join(name.replace('!', "/")));
        }
    }
    disks.sort();
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_with_a_size_are_listed() {
        let sys = tempfile::tempdir().unwrap();
        for (name, size) in [
            ("sda", "8"),
            ("vdb", "8"),
            ("sr0", "8"),
            ("loop1", "8"),
            ("sdz", "0"),
            ("cciss!c0d0", "8"),
            ("dm-0", "8"),
        ] {
            let folder = sys.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("size"), format!("{size}\n")).unwrap();
        }
        let found = whole_of(sys.path()).unwrap();
        assert_eq!(found, ["/dev/cciss/c0d0", "/dev/sda", "/dev/vdb"].map(PathBuf::from));
    }
}
