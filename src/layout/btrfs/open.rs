//! Opening: the superblock is checked, and every chunk is known before anything else is read.

use super::chunk::{Chunk, Chunks};
use super::superblock::{LEN, PLACES};
use super::tree::{Fs, Key, kind};
use super::{Step, Superblock, require};
use crate::io::{ReadAt, read_vec};
use crate::unit::to_usize;

/// The object of the items that describe devices.
const DEV_ITEMS: u64 = 1;

impl<D: ReadAt> Fs<D> {
    /// Opens the file system on `disk`, which is its only device; at most `max_chunks` chunks.
    pub fn open(disk: D, max_chunks: u64) -> Step<Self> {
        let head = read_vec(&disk, 0, to_usize(disk.size().min(PLACES[0] + LEN)))?;
        let sb = Superblock::parse(&head).ok_or_else(|| "its superblock is gone".to_owned())?;
        sb.check(disk.size())?;
        sb.check_mirrors(&disk)?;
        let system = Chunks::of_system(&sb)?;
        let mut fs = Fs::new(disk, sb, system);
        fs.chunks = fs.all_chunks(max_chunks)?;
        Ok(fs)
    }

    /// Reads the whole chunk tree, by the system chunks known so far.
    fn all_chunks(&self, max: u64) -> Step<Chunks> {
        let mut chunks = Chunks::default();
        let mut devices = 0;
        let device = self.sb.device();
        self.items(self.sb.chunk_root(), Key::first_of(0)..Key::MAX, &mut |key, item| match key.kind {
            kind::DEVICE => {
                devices += 1;
                let own = |at: usize, len: usize| {
                    item.get(at..at + len).is_some_and(|bytes| device.get(at..at + len) == Some(bytes))
                };
                // Its number, length and UUID.
                let sound = key.id == DEV_ITEMS && devices == 1 && own(0, 16) && own(66, 16);
                require(sound, || "its chunk tree names another device".into())
            }
            kind::CHUNK => {
                require((chunks.list().len() as u64) < max, || format!("it has more than {max} chunks"))?;
                chunks.push(Chunk::parse(&self.sb, key, item)?)
            }
            other => Err(format!("its chunk tree has an item of kind {other}").into()),
        })?;
        require(devices == 1, || "its chunk tree names no device".into())?;
        let same = self.chunks.list().iter().all(|chunk| chunks.holding(chunk.logical) == Some(chunk));
        require(same, || "its superblock and its chunk tree name different chunks".into())?;
        Ok(chunks)
    }
}
