//! The btrfs of a copy whose original is mounted here, shown to the kernel under another UUID.

use std::ops::Range;
use std::path::Path;

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
    /// `disk`, of which `mounts` are to be mounted by the kernel that tells of btrfs in the folder `btrfs`
    /// ([`mounts::BTRFS`]). Fails where the original of one is mounted and the kernel knows no other UUIDs.
    pub fn new<'a>(disk: D, mounts: impl Iterator<Item = &'a PlannedMount>, btrfs: &Path) -> Result<Self> {
        let mut superblocks: Vec<(Extent, BtrfsAlias)> = Vec::new();
        for mount in mounts.filter(|mount| mount.kind == "btrfs") {
            let place = |at: u64| Extent::at(mount.start + at, BtrfsAlias::LEN as u64);
            let [first, ..] = BtrfsAlias::PLACES.map(place);
            if first.end > mount.end || superblocks.iter().any(|(other, _)| *other == first) {
                continue;
            }
            let superblock = read_vec(&disk, first.start, BtrfsAlias::LEN)?;
            let Some(alias) = BtrfsAlias::new(&superblock, Uuid::new_v4()) else { continue };
            if !mounts::has_btrfs(btrfs, &alias.uuid()) {
                continue;
            }
            if !mounts::knows_btrfs_aliases(btrfs) {
                return Err(Error::new(
                    Kind::Privilege,
                    "guest.twin",
                    format!("cannot mount the guest's {} (btrfs {})", mount.point, alias.uuid()),
                )
                .because("one with its UUID is mounted here, and Linux before 5.0 takes no second one")
                .remedy("run haul fix on another machine")
                .fact("disk", disk.name())
                .fact("offset", mount.start));
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::io::fake::MemoryDisk;
    use crate::unit::MIB;

    const START: u64 = MIB;
    const AT: u64 = START + BtrfsAlias::PLACES[0];

    /// A disk with a superblock of btrfs at the place of the first, and noise around it.
    fn disk() -> (Arc<MemoryDisk>, Uuid) {
        let uuid = Uuid::from_bytes([9; 16]);
        let mut block: Vec<u8> = (0..BtrfsAlias::LEN).map(|i| u8::try_from(i % 251).unwrap()).collect();
        block[32..48].copy_from_slice(uuid.as_bytes());
        block[64..72].copy_from_slice(b"_BHRfS_M");
        block[188..196].copy_from_slice(&0x361_u64.to_le_bytes());
        block[196..198].copy_from_slice(&[0, 0]);
        block[..32].fill(0);
        let sum = crc32c::crc32c(&block[32..]);
        block[..4].copy_from_slice(&sum.to_le_bytes());
        let disk = MemoryDisk::sparse(80 * MIB);
        disk.write_at(&[5; 16384], AT - 8192).unwrap();
        disk.write_at(&block, AT).unwrap();
        (Arc::new(disk), uuid)
    }

    fn mounts() -> Vec<PlannedMount> {
        // Two subvolumes of one file system.
        ["/", "/var"]
            .map(|point| PlannedMount {
                start: START,
                end: 80 * MIB,
                kind: "btrfs".into(),
                point: point.into(),
                options: String::new(),
            })
            .to_vec()
    }

    /// What a kernel tells that has `uuid` mounted.
    fn kernel(uuid: &Uuid, knows_aliases: bool) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(uuid.to_string())).unwrap();
        std::fs::create_dir_all(dir.path().join("features")).unwrap();
        if knows_aliases {
            std::fs::write(dir.path().join("features/metadata_uuid"), "0").unwrap();
        }
        dir
    }

    #[test]
    fn bytes_of_a_superblock_are_shown_and_kept_however_they_are_cut() {
        let (disk, uuid) = disk();
        let before = read_vec(&disk, AT - 8192, 16384).unwrap();
        let twins = Twins::new(Arc::clone(&disk), mounts().iter(), kernel(&uuid, true).path()).unwrap();
        let shown = read_vec(&twins, AT - 8192, 16384).unwrap();
        assert_ne!(shown[8192 + 32..8192 + 48], before[8192 + 32..8192 + 48]);
        assert_eq!(shown[8192 + 571..8192 + 587], *uuid.as_bytes());
        assert_eq!((&shown[..8192], &shown[12288..]), (&before[..8192], &before[12288..]));
        for step in [512, 1024, 4096, 16384] {
            let pieces = (0..16384_usize).step_by(step);
            let cut: Vec<u8> =
                pieces.flat_map(|at| read_vec(&twins, AT - 8192 + at as u64, step).unwrap()).collect();
            assert_eq!(cut, shown, "in pieces of {step}");
        }
        // The kernel writes it whole, with what is beside it or alone.
        for (from, to) in [(8192, 12288), (0, 16384), (4096, 16384)] {
            twins.write_at(&shown[from..to], AT - 8192 + from as u64).unwrap();
            assert_eq!(read_vec(&disk, AT - 8192, 16384).unwrap(), before);
        }
    }

    #[test]
    fn a_file_system_whose_original_is_elsewhere_is_shown_as_it_is() {
        let (disk, uuid) = disk();
        let other = kernel(&Uuid::from_bytes([8; 16]), false);
        let twins = Twins::new(Arc::clone(&disk), mounts().iter(), other.path()).unwrap();
        let read = |disk: &dyn ReadAt| read_vec(disk, AT, BtrfsAlias::LEN).unwrap();
        assert_eq!(read(&twins), read(&disk));
        assert_eq!(read(&twins)[32..48], *uuid.as_bytes());
    }

    #[test]
    fn a_kernel_that_takes_no_second_one_is_told() {
        let (disk, uuid) = disk();
        let error = Twins::new(disk, mounts().iter(), kernel(&uuid, false).path()).err().unwrap();
        assert_eq!((error.kind(), error.id()), (Kind::Privilege, "guest.twin"));
        assert!(error.what().contains("the guest's / (btrfs 09090909-"), "{error:?}");
        assert!(
            error.facts().iter().any(|(name, value)| *name == "offset" && value == "1048576"),
            "{error:?}"
        );
    }
}
