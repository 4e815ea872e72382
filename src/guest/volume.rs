//! A file system read file by file as a [`Volume`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, BufReader, Read};

use super::tree::{MAX_NAMES, Node, Volume};
use crate::error::{Error, Kind, Result};
use crate::layout::{FileId, FileKind, Files};

/// Paths whose files are remembered.
const REMEMBERED: usize = 4096;
/// Bytes read at a time from a file that is read to its end.
const STEP: usize = 64 << 10;

/// A file system, or a part of it, whose files are found by their numbers.
pub struct FilesVolume {
    files: Box<dyn Files>,
    root: FileId,
    name: String,
    /// What paths lead to: the same folders are looked through again and again.
    known: RefCell<HashMap<String, Option<FileId>>>,
}

impl FilesVolume {
    /// All of the file system `files`, called `name` in messages.
    pub fn new(files: Box<dyn Files>, name: String) -> Self {
        let root = files.root();
        FilesVolume { files, root, name, known: RefCell::default() }
    }

    /// The part below `path`, as a bind mount or `subvol=` shows it; `None` when no folder is there.
    pub fn below(self, path: &str) -> Result<Option<Self>> {
        match self.find(path)? {
            Some(root) if self.files.info(root)?.kind == FileKind::Folder => {
                Ok(Some(FilesVolume { root, known: RefCell::default(), ..self }))
            }
            _ => Ok(None),
        }
    }

    /// Why what is read may be older than what was committed.
    pub fn stale(&self) -> Option<&'static str> {
        self.files.stale()
    }

    /// The file at `path`, which goes through no link; `None` when nothing is there.
    pub fn find(&self, path: &str) -> Result<Option<FileId>> {
        let path = path.trim_end_matches('/');
        let Some((folder, name)) = path.rsplit_once('/') else { return Ok(Some(self.root)) };
        if let Some(known) = self.known.borrow().get(path) {
            return Ok(*known);
        }
        let found = match self.find(folder)? {
            Some(folder) if self.files.info(folder)?.kind == FileKind::Folder => {
                self.files.lookup(folder, name.as_bytes())?
            }
            _ => None,
        };
        let mut known = self.known.borrow_mut();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(path.to_owned(), found);
        Ok(found)
    }

    fn found(&self, path: &str) -> Result<FileId> {
        self.find(path)?.ok_or_else(|| {
            Error::new(
                Kind::Image,
                "guest.gone",
                format!("cannot read {path} in the file system on {}", self.name),
            )
            .because("it is not there")
            .fact("path", path)
        })
    }
}

impl Volume for FilesVolume {
    fn node(&self, path: &str) -> Result<Option<Node>> {
        let Some(file) = self.find(path)? else { return Ok(None) };
        let info = self.files.info(file)?;
        Ok(Some(match info.kind {
            FileKind::Regular => Node::File(info.size),
            FileKind::Folder => Node::Folder,
            FileKind::Link => Node::Link,
            FileKind::Other => Node::Other,
        }))
    }

    fn link(&self, path: &str) -> Result<String> {
        let target = self.files.target(self.found(path)?)?;
        // Not UTF-8: a path nothing of ours leads to.
        Ok(String::from_utf8(target).unwrap_or_else(|_| "\u{fffd}".to_owned()))
    }

    fn names(&self, path: &str) -> Result<Vec<String>> {
        let names = self.files.names(self.found(path)?, MAX_NAMES)?;
        Ok(names.into_iter().filter_map(|name| String::from_utf8(name).ok()).collect())
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>> {
        let file = self.found(path)?;
        Ok(Box::new(BufReader::with_capacity(STEP, Stream { files: &*self.files, file, at: 0 })))
    }
}

/// A file from its start to its end.
struct Stream<'a> {
    files: &'a dyn Files,
    file: FileId,
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.files.read(self.file, self.at, buf).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}
