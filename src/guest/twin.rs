//! The btrfs of a copy whose original is mounted here, shown to the kernel under another UUID.

use std::ops::Range;

use uuid::Uuid;

use super::plan::PlannedMount;
use crate::error::{Error, Kind, Result};
use crate::host::mounts;
use crate::io::{ReadAt, WriteAt, read_vec};
use crate::layout::BtrfsAlias;
use crate::unit::{Extent, to_usize};

/// The disk `D` with other UUIDs in the superblocks that are read of it. Written, they have their own again.
pub struct Twins<D> {
    disk: D,
    superblocks: Vec<(Extent, BtrfsAlias)>,
}

impl<D: ReadAt> Twins<D> {
    /// `disk`, of which `mounts` are to be mounted. Fails where the original of one is mounted and the kernel knows no
    /// other UUIDs.
    pub fn new<'a>(disk: D, mounts: impl Iterator<Item = &'a PlannedMount>) -> Result<Self> {
        let mut superblocks: Vec<(Extent, BtrfsAlias)> = Vec::new();
        for mount in mounts.filter(|mount| mount.kind == "btrfs") {
            let place = |at: u64| Extent::at(mount.start + at, BtrfsAlias::LEN as u64);
            let [first, ..] = BtrfsAlias::PLACES.map(place);
            if first.end > mount.end || superblocks.iter().any(|(other, _)| *other == first) {
                continue;
            }
            let superblock = read_vec(&disk, first.start, BtrfsAlias::LEN)?;
            let Some(alias) = BtrfsAlias::new(&superblock, Uuid::new_v4()) else { continue };
            if !mounts::has_btrfs(&alias.uuid()) {
                continue;
            }
            if !mounts::knows_btrfs_aliases() {
                return Err(Error::new(
                    Kind::Privilege,
                    "guest.twin",
                    format!("cannot mount the copy's btrfs {}", alias.uuid()),
                )
                .because("one with its UUID is mounted here, and Linux before 5.0 takes no second one")
                .remedy("run haul fix on another machine"));
            }
            let places = BtrfsAlias::PLACES.map(place).into_iter().filter(|place| place.end <= mount.end);
            superblocks.extend(places.map(|place| (place, alias.clone())));
        }
        Ok(Twins { disk, superblocks })
    }

    /// The superblocks that the bytes of `range` are a part of.
    fn within(&self, range: Extent) -> impl Iterator<Item = &(Extent, BtrfsAlias)> {
        self.superblocks.iter().filter(move |(place, _)| place.start < range.end && range.start < place.end)
    }
}

/// Where the bytes that `place` and `range` share are in each of them.
fn shared(place: Extent, range: Extent) -> (Range<usize>, Range<usize>) {
    let (start, end) = (place.start.max(range.start), place.end.min(range.end));
    let of = |whole: Extent| to_usize(start - whole.start)..to_usize(end - whole.start);
    (of(place), of(range))
}

impl<D: ReadAt> ReadAt for Twins<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)?;
        let range = Extent::at(offset, buf.len() as u64);
        for (place, alias) in self.within(range) {
            let mut block = read_vec(&self.disk, place.start, BtrfsAlias::LEN)?;
            alias.show(&mut block);
            let (from, to) = shared(*place, range);
            buf[to].copy_from_slice(&block[from]);
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.disk.name()
    }
}

impl<D: ReadAt + WriteAt> WriteAt for Twins<D> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let range = Extent::at(offset, bytes.len() as u64);
        let mut kept = Vec::new();
        for (place, alias) in self.within(range) {
            // As the writer sees it, then as it is.
            let mut block = read_vec(self, place.start, BtrfsAlias::LEN)?;
            let (to, from) = shared(*place, range);
            block[to].copy_from_slice(&bytes[from]);
            alias.keep(&mut block);
            kept.push((place.start, block));
        }
        self.disk.write_at(bytes, offset)?;
        kept.iter().try_for_each(|(at, block)| self.disk.write_at(block, *at))
    }

    fn sync(&self) -> Result<()> {
        self.disk.sync()
    }
}
