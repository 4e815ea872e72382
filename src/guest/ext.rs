//! An ext2/3/4 file system read from a disk as a [`Volume`]: no mount, no root, its journal honoured.

use std::io::Read;

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType};

use super::tree::{MAX_NAMES, Node, Volume};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;

/// An ext2/3/4 file system.
pub struct ExtVolume {
    fs: Ext4,
    name: String,
}

/// Adapts our port to the crate's.
struct Disk<T>(T);

impl<T: ReadAt> Ext4Read for Disk<T> {
    fn read(
        &mut self,
        start: u64,
        bytes: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.read_at(bytes, start)?)
    }
}

impl ExtVolume {
    /// Opens the file system that begins at byte 0 of `disk`. Committed transactions in a journal not yet
    /// replayed are seen as if they were.
    pub fn open(disk: impl ReadAt + 'static) -> Result<Self> {
        let name = disk.name();
        match Ext4::load(Box::new(Disk(disk))) {
            Ok(fs) => Ok(ExtVolume { fs, name }),
            Err(error) => Err(failed(&name, "/", error)),
        }
    }
}

fn failed(name: &str, path: &str, error: Ext4Error) -> Error {
    Error::new(Kind::Image, "guest.ext", format!("cannot read {path} in the file system on {name}"))
        .remedy("run e2fsck on the source while it is unmounted, then try again")
        .fact("path", path)
        .caused_by(error)
}

/// `None` for what is simply not there.
fn present<T>(name: &str, path: &str, found: std::result::Result<T, Ext4Error>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::MalformedPath) => Ok(None),
        Err(error) => Err(failed(name, path, error)),
    }
}

impl Volume for ExtVolume {
    fn node(&self, path: &str) -> Result<Option<Node>> {
        let found = present(&self.name, path, self.fs.symlink_metadata(path))?;
        Ok(found.map(|meta| match meta.file_type() {
            FileType::Regular => Node::File(meta.len()),
            FileType::Directory => Node::Folder,
            FileType::Symlink => Node::Link,
            _ => Node::Other,
        }))
    }

    fn link(&self, path: &str) -> Result<String> {
        let target = self.fs.read_link(path).map_err(|error| failed(&self.name, path, error))?;
        // Not UTF-8: a path nothing of ours leads to.
        Ok(target.to_str().unwrap_or("\u{fffd}").to_owned())
    }

    fn names(&self, path: &str) -> Result<Vec<String>> {
        let entries = self.fs.read_dir(path).map_err(|error| failed(&self.name, path, error))?;
        let mut names = Vec::new();
        for entry in entries.take(MAX_NAMES) {
            let entry = entry.map_err(|error| failed(&self.name, path, error))?;
            match entry.file_name().as_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>> {
        let file = self.fs.open(path).map_err(|error| failed(&self.name, path, error))?;
        Ok(Box::new(file))
    }
}
