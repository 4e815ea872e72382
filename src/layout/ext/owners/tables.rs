//! The inode tables: where each group's is, how much of it was ever used, and a walk over it.

use super::inode::Inode;
use super::{Fs, Notes, Overlay, Step, Stop};
use crate::io::ReadAt;
use crate::layout::field::le16;
use crate::unit::{Extent, to_usize};

/// Bytes of a table read at a time.
const READ: u64 = 1 << 20;
/// Most inodes looked at: 64 GiB of tables at the usual 256 bytes.
const MAX_INODES: u64 = 1 << 28;

/// One group's inode table.
struct Table {
    /// Its first block; 0 when the group's descriptor cannot be used.
    start: u64,
    /// How many of its inodes may be in use; the rest was never written.
    inodes: u64,
}

/// Every group's inode table, in order.
pub(super) struct Tables {
    tables: Vec<Table>,
    group_inodes: u64,
}

impl Tables {
    pub fn new(group_inodes: u64) -> Self {
        Tables { tables: Vec::new(), group_inodes }
    }

    /// Adds the next group, by its descriptor and where that puts its table.
    pub fn push<D: ReadAt>(&mut self, fs: &Fs<D>, raw: &[u8], table: Extent) {
        let high = if raw.len() >= 64 { u64::from(le16(raw, 0x32)) << 16 } else { 0 };
        let unused = match fs.sb.has_group_checksums() {
            // INODE_UNINIT: nothing of the table was ever written.
            true if le16(raw, 0x12) & 1 != 0 => self.group_inodes,
            true => high | u64::from(le16(raw, 0x1c)),
            false => 0,
        };
        self.tables.push(Table { start: table.start, inodes: self.group_inodes.saturating_sub(unused) });
    }

    /// Adds the next group, whose table cannot be found.
    pub fn push_unknown(&mut self) {
        self.tables.push(Table { start: 0, inodes: 0 });
    }

    /// The group of an inode, which is at least 1.
    pub fn group_of(&self, inode: u32) -> u64 {
        u64::from(inode).saturating_sub(1) / self.group_inodes
    }

    /// The bytes of one inode.
    pub fn read<D: ReadAt>(&self, fs: &Fs<D>, overlay: &Overlay, inode: u32) -> Step<Vec<u8>> {
        let index = u64::from(inode).checked_sub(1).map(|number| number % self.group_inodes);
        let table = self.tables.get(to_usize(self.group_of(inode)));
        let known = index.zip(table).filter(|(index, table)| *index < table.inodes);
        let (index, table) = known.ok_or_else(|| format!("there is no inode {inode}"))?;
        let at = index * fs.sb.inode_size;
        let block = fs.read(Some(overlay), table.start + at / fs.sb.block_size, 1)?;
        let inode = block.get(to_usize(at % fs.sb.block_size)..).unwrap_or_default();
        Ok(inode.get(..to_usize(fs.sb.inode_size)).unwrap_or_default().to_vec())
    }

    /// Gives every inode that has a name, or is the file system's own, to `each`, which says whether to go on.
    pub fn scan<D: ReadAt>(
        &self,
        fs: &Fs<D>,
        overlay: &Overlay,
        notes: &mut Notes,
        each: &mut dyn FnMut(u32, Inode<'_>) -> Step<bool>,
    ) -> Step<()> {
        let (block_size, inode_size) = (fs.sb.block_size, fs.sb.inode_size);
        let mut left = MAX_INODES;
        for (group, table) in (0..).zip(&self.tables) {
            let blocks = (table.inodes * inode_size).div_ceil(block_size);
            let mut rest = Extent::at(table.start, blocks);
            while !rest.is_empty() {
                let piece = Extent::at(rest.start, rest.len().min(READ / block_size));
                let first = (rest.start - table.start) * block_size / inode_size;
                rest.start = piece.end;
                if is_hole(fs, overlay, piece)? {
                    continue;
                }
                let bytes = match fs.read(Some(overlay), piece.start, piece.len()).map_err(Stop::from) {
                    Err(Stop::Whole(why)) => {
                        notes.add(format!("inode table of group {group}: {why}"));
                        continue;
                    }
                    bytes => bytes?,
                };
                let inodes = bytes.chunks_exact(to_usize(inode_size)).zip(first..table.inodes);
                for (raw, index) in inodes {
                    let Ok(number) = u32::try_from(group * self.group_inodes + index + 1) else { break };
                    if left == 0 {
                        notes.add(format!("it has more inodes than are looked at ({MAX_INODES})"));
                        return Ok(());
                    }
                    left -= 1;
                    if Inode(raw).links() > 0 && !each(number, Inode(raw))? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether a piece of a table is known to be zeroes without being read.
fn is_hole<D: ReadAt>(fs: &Fs<D>, overlay: &Overlay, piece: Extent) -> Step<bool> {
    let size = fs.sb.block_size;
    let data = fs.disk.next_data(piece.start * size)?;
    let is_hole = data.is_none_or(|run| run.start >= piece.end * size);
    Ok(is_hole && overlay.range(piece.start..piece.end).next().is_none())
}
