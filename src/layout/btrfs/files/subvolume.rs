//! Subvolumes: trees of files, entered by a name in another one.

use super::item::{self, Entry, Location};
use super::{BtrfsFiles, FileId, Step, owner, require};
use crate::error::Result;
use crate::layout::btrfs::tree::{Key, Pointer, kind};
use crate::layout::field::{le32, le64};

/// Subvolumes remembered.
const REMEMBERED: usize = 256;
/// The number of the empty folder that Linux shows where a name leads to a subvolume that is not there: it was deleted,
/// or the folder is a snapshot's.
const STUB: u64 = 2;

/// Whether `file` is such an empty folder.
pub(super) fn is_stub(file: FileId) -> bool {
    file.number == STUB
}

/// A subvolume that is not being deleted.
#[derive(Clone, Copy)]
pub(super) struct Subvolume {
    tree: Pointer,
    /// The number of its root folder.
    folder: u64,
}

impl BtrfsFiles {
    /// The id of the subvolume that is mounted when none is named: 5, the top-level one, unless
    /// `btrfs subvolume set-default` chose another.
    pub fn default_subvolume(&self) -> Result<u64> {
        self.about(self.root, self.default_id())
    }

    /// The root folder of subvolume `id`, for `subvolid=`; `None` when there is none or it is being deleted.
    pub fn subvolume(&self, id: u64) -> Result<Option<FileId>> {
        let file = FileId { tree: id, number: 0 };
        if owner::is_subvolume(id) { self.about(file, self.folder_of(id)) } else { Ok(None) }
    }

    /// The same file system with subvolume `id` as its root; `None` when there is none.
    pub fn rooted_at(self, id: u64) -> Result<Option<Self>> {
        Ok(self.subvolume(id)?.map(|root| BtrfsFiles { root, ..self }))
    }

    fn default_id(&self) -> Step<u64> {
        let key = Key { id: self.fs.sb.root_folder(), kind: kind::NAME, offset: item::hash(b"default") };
        let leaf = self.fs.leaf(self.fs.sb.root(), key)?;
        let found = leaf.floor(key).0.filter(|(found, _)| *found == key);
        match found.map(|(_, item)| Entry::named(item, b"default")).transpose()?.flatten() {
            Some(Location::Subvolume(id)) => Ok(id),
            Some(Location::Inode(_)) => Err("its default subvolume is none".to_owned().into()),
            None => Ok(owner::TOP),
        }
    }

    /// The root folder of a subvolume.
    pub(super) fn folder_of(&self, id: u64) -> Step<Option<FileId>> {
        Ok(self.subvolume_of(id)?.map(|found| FileId { tree: id, number: found.folder }))
    }

    /// The tree of a subvolume.
    pub(super) fn tree(&self, id: u64) -> Step<Pointer> {
        let found = self.subvolume_of(id)?;
        Ok(found.ok_or_else(|| format!("subvolume {id} is not there"))?.tree)
    }

    fn subvolume_of(&self, id: u64) -> Step<Option<Subvolume>> {
        if let Some(known) = self.subvolumes.borrow().get(&id) {
            return Ok(*known);
        }
        let found = if owner::is_subvolume(id) { self.read_subvolume(id)? } else { None };
        let mut known = self.subvolumes.borrow_mut();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(id, found);
        Ok(found)
    }

    fn read_subvolume(&self, id: u64) -> Step<Option<Subvolume>> {
        // The offset is the generation of a snapshot, else 0; one being deleted has no references.
        let key = Key { id, kind: kind::ROOT, offset: u64::MAX };
        let leaf = self.fs.leaf(self.fs.sb.root(), key)?;
        let Some((_, item)) = leaf.floor(key).0 else { return Ok(None) };
        let tree = Pointer::of_root_item(item, id)?;
        let folder = le64(item, 168);
        require(folder >= 256, || format!("the root folder of subvolume {id} is inode {folder}"))?;
        Ok((le32(item, 216) > 0).then_some(Subvolume { tree, folder }))
    }

    /// Where `name` in `folder` leads, which is said to be subvolume `id`: as in Linux, only if that knows of it.
    pub(super) fn entered(&self, folder: FileId, name: &[u8], id: u64) -> Step<FileId> {
        let key = Key { id: folder.tree, kind: kind::ROOT_REF, offset: id };
        let leaf = self.fs.leaf(self.fs.sb.root(), key)?;
        let found = leaf.floor(key).0.filter(|(found, _)| *found == key);
        let is_known = found.is_some_and(|(_, item)| item::reference(item) == (folder.number, name));
        let root = if is_known { self.folder_of(id)? } else { None };
        Ok(root.unwrap_or(FileId { tree: folder.tree, number: STUB }))
    }
}
