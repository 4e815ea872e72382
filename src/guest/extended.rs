//! A disk with its logical volumes laid out behind its end, so that every file system on it is one run of bytes: what a
//! guest's disk is inspected through, and what a loop device stands on when its file systems are mounted.

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, WriteAt, check_range};
use crate::layout::{self, LogicalVolume};
use crate::unit::{Extent, MIB, to_usize};

/// What a volume's place begins at a multiple of.
const ALIGN: u64 = MIB;

/// A logical volume and its place behind the disk.
pub struct Placed {
    /// The name of its volume group, and its own.
    pub group: String,
    /// Its name in the group.
    pub name: String,
    /// Where it is, in bytes from the disk's start: beyond the disk's end.
    pub extent: Extent,
    volume: Arc<LogicalVolume>,
}

/// The disk `D` and the volumes on it. The same disk gives the same places.
pub struct Extended<D> {
    disk: D,
    end: u64,
    volumes: Vec<Placed>,
}

impl<D: ReadAt> Extended<D> {
    /// `disk`, with the linear and striped volumes that `layout` finds on `source`, which is the same disk. Others, and
    /// those that are not whole on it, are left out.
    pub fn new(disk: D, source: &Arc<dyn ReadAt>) -> Result<Self> {
        let mut end = disk.size();
        let mut volumes = Vec::new();
        for found in layout::logical_volumes(source)? {
            let Ok(volume) = found.volume else { continue };
            let start = end.next_multiple_of(ALIGN);
            let Some(after) = start.checked_add(volume.size()) else { continue };
            end = after;
            volumes.push(Placed {
                group: found.group,
                name: found.name,
                extent: Extent::new(start, end),
                volume,
            });
        }
        Ok(Extended { disk, end, volumes })
    }

    /// The volumes, in the order of their places.
    pub fn volumes(&self) -> &[Placed] {
        &self.volumes
    }

    /// Where on the disk the bytes at `offset` lie, as far as they are together; `None` in a gap.
    pub fn place(&self, offset: u64) -> Option<Extent> {
        if offset < self.disk.size() {
            return Some(Extent::new(offset, self.disk.size()));
        }
        let volume = self.volumes.iter().find(|volume| volume.extent.contains(Extent::at(offset, 1)))?;
        volume.volume.place(offset - volume.extent.start)
    }

    /// Gives `each` the pieces of `len` bytes at `offset`: their range, and where on the disk they are.
    fn pieces(
        &self,
        len: usize,
        offset: u64,
        mut each: impl FnMut(std::ops::Range<usize>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        check_range(self, len, offset)?;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let place = self.place(at);
            // A gap ends where the next volume begins.
            let together = place.map_or_else(|| ALIGN - at % ALIGN, |place| place.len());
            let n = to_usize(together.min((len - done) as u64));
            each(done..done + n, place.map(|place| place.start))?;
            done += n;
        }
        Ok(())
    }
}

impl<D: ReadAt> ReadAt for Extended<D> {
    fn size(&self) -> u64 {
        self.end
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.pieces(buf.len(), offset, |range, place| match place {
            Some(start) => self.disk.read_at(&mut buf[range], start),
            None => {
                buf[range].fill(0);
                Ok(())
            }
        })
    }

    fn name(&self) -> String {
        self.disk.name()
    }
}

impl<D: ReadAt + WriteAt> WriteAt for Extended<D> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.pieces(bytes.len(), offset, |range, place| match place {
            Some(start) => self.disk.write_at(&bytes[range], start),
            None => Err(Error::new(Kind::Internal, "guest.gap", "a write between two logical volumes")
                .fact("offset", offset)),
        })
    }

    fn sync(&self) -> Result<()> {
        self.disk.sync()
    }
}

/// The names a volume has in the guest: `/dev/group/name`, and `/dev/mapper/group-name` with dashes doubled.
pub fn device_names(group: &str, name: &str) -> [String; 2] {
    let doubled = |text: &str| text.replace('-', "--");
    [format!("/dev/{group}/{name}"), format!("/dev/mapper/{}-{}", doubled(group), doubled(name))]
}
