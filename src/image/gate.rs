//! Which files an image may make haul open: none but those the user named.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// The files the user allowed an image to refer to. An image asks by name, and gets the first file not used yet
/// whose file name is the last part of that name: it can neither choose a path nor use one file twice.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    backing: Vec<PathBuf>,
    data: Vec<PathBuf>,
    extents: Vec<PathBuf>,
}

impl Gate {
    /// Nothing may be opened.
    pub fn closed() -> Self {
        Gate::default()
    }

    /// Allows `path` as a backing file.
    #[must_use]
    pub fn backing(mut self, path: impl Into<PathBuf>) -> Self {
        self.backing.push(path.into());
        self
    }

    /// Allows `path` as an external data file.
    #[must_use]
    pub fn data_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.data.push(path.into());
        self
    }

    /// Allows `path` as an extent file of a disk that consists of several.
    #[must_use]
    pub fn extent(mut self, path: impl Into<PathBuf>) -> Self {
        self.extents.push(path.into());
        self
    }

    /// The file that serves as the backing file `wanted` by `image`.
    pub(super) fn take_backing(&mut self, image: &str, wanted: &str) -> Result<PathBuf> {
        take(&mut self.backing, wanted)
            .ok_or_else(|| refused("image.backing-not-named", image, "backing file", wanted, "--backing"))
    }

    /// The file that serves as the external data file `wanted` by `image`.
    pub(super) fn take_data_file(&mut self, image: &str, wanted: &str) -> Result<PathBuf> {
        take(&mut self.data, wanted)
            .ok_or_else(|| refused("image.data-file-not-named", image, "data file", wanted, "--data-file"))
    }

    /// The file that serves as the extent file `wanted` by `image`.
    pub(super) fn take_extent(&mut self, image: &str, wanted: &str) -> Result<PathBuf> {
        take(&mut self.extents, wanted)
            .ok_or_else(|| refused("image.extent-not-named", image, "extent file", wanted, "--extent"))
    }
}

fn take(allowed: &mut Vec<PathBuf>, wanted: &str) -> Option<PathBuf> {
    // "file:base.raw" is QEMU's spelling of a local file.
    let wanted = Path::new(wanted.strip_prefix("file:").unwrap_or(wanted)).file_name()?;
    let i = allowed.iter().position(|path| path.file_name() == Some(wanted))?;
    Some(allowed.remove(i))
}

fn refused(id: &'static str, image: &str, role: &str, wanted: &str, flag: &str) -> Error {
    Error::new(Kind::Image, id, format!("{image} wants the {role} {wanted:?}"))
        .because("an image may refer to any file of this machine, so only files named by you are opened")
        .remedy(format!(
            "if that is right, add `{flag} PATH`, a file of that name for each image of the chain"
        ))
        .fact("image", image)
        .fact("wanted", wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_named_file_is_given_and_only_once() {
        let mut gate = Gate::closed().backing("/mine/base.raw");
        assert!(gate.take_data_file("x", "base.raw").is_err() && gate.take_extent("x", "base.raw").is_err());
        assert!(gate.take_backing("x", "/etc/shadow").is_err());
        assert!(gate.take_backing("x", "..").is_err());
        assert_eq!(gate.take_backing("x", "/theirs/base.raw").unwrap(), Path::new("/mine/base.raw"));
        let error = gate.take_backing("x", "/theirs/base.raw").unwrap_err();
        assert!(error.what().contains("/theirs/base.raw") && error.what_to_do().contains("--backing"));
    }
}
