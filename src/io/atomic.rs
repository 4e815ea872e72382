//! Small files that are either the old ones or the new ones, whole: temporary name, fsync, rename, fsync of the folder.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

fn failed(path: &Path, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "io.write", format!("cannot write {}", path.display()))
        .fact("path", path.display())
        .caused_by(error)
}

/// `path` with `suffix` added to its file name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Replaces the file at `path` by one holding `bytes`, readable by its owner only.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = with_suffix(path, ".tmp");
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written {
        // The file half written is of no use to anyone; failing to remove it changes nothing.
        let _ = fs::remove_file(&temporary);
        return Err(failed(path, error));
    }
    rename(&temporary, path)
}

/// Gives the finished, synced file `from` the name `to`, durably.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).and_then(|()| sync_folder_of(to)).map_err(|error| failed(to, error))
}

fn sync_folder_of(path: &Path) -> std::io::Result<()> {
    let folder = folder_of(path);
    File::open(folder)?.sync_all()
}

/// The folder that `path` is in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_content_replaces_the_old_and_no_temporary_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = write(Path::new("/nonexistent/state"), b"x").unwrap_err();
        assert_eq!(error.kind(), Kind::Destination);
        assert!(error.what().contains("/nonexistent/state"));
    }
}
