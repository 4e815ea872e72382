//! The virtual disk of a VHDX image, read from any thread.

use std::sync::Arc;

use super::header::{Header, REGION_TABLE_LEN, REGION_TABLES, Regions, SIGNATURE};
use super::metadata::Metadata;
use super::{Subformat, bad_field, guid_text, log};
use crate::error::{Error, Kind, Result};
use crate::image::cache::Cache;
use crate::image::sparse::Sparse;
use crate::io::{ReadAt, check_range, read_array, read_vec};
use crate::unit::{Extent, KIB, MIB, TIB, to_usize};

/// Bytes of the block allocation table read at once.
const PAGE: u64 = 64 * KIB;
/// Entries in a page.
const PAGE_ENTRIES: u64 = PAGE / 8;
/// Bytes of the table kept in memory: at blocks of 32 MiB they map 4 TiB of the disk.
const TABLE_CACHE: usize = 1 << 20;
/// Blocks lie below this offset of the file: twice the largest disk. A bit for each MiB is held while an image is
/// opened.
const MAX_FILE: u64 = 128 * TIB;

/// The facts of a VHDX image for `haul inspect`. Control characters in names are escaped.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Info {
    /// How the disk is held.
    pub subformat: Subformat,
    /// Length of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes of a sector as the disk counts them.
    pub logical_sector_size: u32,
    /// Bytes of a sector as the disk writes them.
    pub physical_sector_size: u32,
    /// The program that made the image.
    pub creator: String,
    /// The disk's identifier.
    pub disk_id: String,
    /// Whether the image was not closed cleanly: haul replays its log in memory.
    pub log_replayed: bool,
}

/// The virtual disk of one image. Holds a cache of its table and what its log changed, 17 MiB at most; opening one
/// takes up to 16 MiB more, a bit for each MiB of the file and the log once, and gives them back.
pub struct Reader {
    name: String,
    info: Info,
    metadata: Metadata,
    file: Arc<Sparse>,
    table: Extent,
    pages: Cache<[u64]>,
}

/// Whether `file` seems to be a VHDX image: it begins with the format's signature.
pub fn probe(file: &dyn ReadAt) -> Result<bool> {
    Ok(file.size() >= SIGNATURE.len() as u64 && read_array::<8>(file, 0)? == SIGNATURE)
}

/// What the image on `file` is, even if it is one that haul does not read.
pub fn inspect(file: &dyn ReadAt) -> Result<Info> {
    let name = file.name();
    let header = Header::read(file, &name)?;
    let facts = match &header.log_guid {
        Some(guid) => Facts::read(&log::replay(file, &name, &header, guid)?, &name, &header),
        None => Facts::read(file, &name, &header),
    };
    Ok(facts?.info)
}

/// What an image says about itself before its block allocation table is read.
struct Facts {
    info: Info,
    regions: Regions,
    metadata: Metadata,
}

impl Facts {
    /// Reads the facts from `file`, on which the log that `header` names was replayed.
    fn read(file: &dyn ReadAt, name: &str, header: &Header) -> Result<Self> {
        let regions = Regions::read(file, name, header.log)?;
        let metadata = Metadata::read(file, name, regions.metadata)?;
        let info = Info {
            subformat: match (metadata.has_parent, metadata.fixed) {
                (true, _) => Subformat::Differencing,
                (false, true) => Subformat::Fixed,
                (false, false) => Subformat::Dynamic,
            },
            virtual_size: metadata.size,
            block_size: metadata.block_size,
            logical_sector_size: metadata.logical_sector,
            physical_sector_size: metadata.physical_sector,
            creator: header.creator.clone(),
            disk_id: guid_text(&metadata.disk_id),
            log_replayed: header.log_guid.is_some(),
        };
        Ok(Facts { info, regions, metadata })
    }
}

impl Reader {
    /// Opens the image on `file` and checks its block allocation table: each block lies in the file, apart from the
    /// header section, the log, every region and every other block. A log is replayed in memory. Refuses differencing
    /// disks.
    pub fn open(file: Arc<dyn ReadAt>) -> Result<Self> {
        let name = file.name();
        let header = Header::read(&file, &name)?;
        let file = match &header.log_guid {
            Some(guid) => Arc::new(log::replay(file, &name, &header, guid)?),
            None => file,
        };
        let Facts { info, regions, metadata } = Facts::read(&file, &name, &header)?;
        if metadata.has_parent {
            return Err(Error::new(Kind::Image, "vhdx.differencing", format!("{name}: this VHDX image cannot be read"))
                .because("it is a differencing disk (file parameters, HasParent): it holds only what differs from its parent")
                .remedy("merge it with its parent first, with the program that made it")
                .fact("image", name));
        }
        let entries = match metadata.blocks() {
            0 => 0,
            blocks => metadata.entry_of(blocks - 1) + 1,
        };
        let table = Extent::at(regions.bat.start, entries * 8);
        if table.len() > regions.bat.len() {
            let why = format!(
                "a disk of {} bytes has {entries} entries, and the region has {} bytes",
                metadata.size,
                regions.bat.len()
            );
            return Err(bad_field(&name, "block allocation table", table.start, why));
        }
        let file = Sparse::new(file);
        let reader = Reader { name, info, metadata, file, table, pages: Cache::new(TABLE_CACHE) };
        reader.check(&regions)?;
        Ok(reader)
    }

    /// What the image is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    fn bad_entry(&self, block: u64, why: String) -> Error {
        let at = self.table.start + self.metadata.entry_of(block) * 8;
        bad_field(&self.name, "block allocation table entry", at, why).fact("block", block)
    }

    /// Page `number` of the table; empty where the file has a hole, as it has for most of a large and empty disk.
    fn page(&self, number: u64) -> Result<Arc<[u64]>> {
        if let Some(page) = self.pages.get(number) {
            return Ok(page);
        }
        let place = Extent::at(self.table.start + number * PAGE, PAGE).intersect(self.table);
        let page: Arc<[u64]> = match self.file.data_in(place)? {
            None => Arc::new([]),
            Some(_) => {
                let bytes = read_vec(&self.file.file, place.start, to_usize(place.len()))?;
                bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect()
            }
        };
        self.pages.put(number, Arc::clone(&page), (page.len() * 8).max(64));
        Ok(page)
    }

    /// Where block `index` is in the file; `None` when it reads as zeroes.
    fn block(&self, index: u64) -> Result<Option<u64>> {
        let entry = self.metadata.entry_of(index);
        let page = self.page(entry / PAGE_ENTRIES)?;
        let word = page.get(to_usize(entry % PAGE_ENTRIES)).copied().unwrap_or(0);
        place(word).map_err(|why| self.bad_entry(index, why))
    }

    /// The first block at or after block `from` that is in the file, and where.
    fn next_block(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let mut index = from;
        while index < self.metadata.blocks() {
            let number = self.metadata.entry_of(index) / PAGE_ENTRIES;
            let page = self.page(number)?;
            let after = self.metadata.block_from((number + 1) * PAGE_ENTRIES).min(self.metadata.blocks());
            while index < after && !page.is_empty() {
                let word =
                    page.get(to_usize(self.metadata.entry_of(index) % PAGE_ENTRIES)).copied().unwrap_or(0);
                if let Some(start) = place(word).map_err(|why| self.bad_entry(index, why))? {
                    return Ok(Some((index, start)));
                }
                index += 1;
            }
            index = after;
        }
        Ok(None)
    }

    /// Bytes of the disk in block `index`: the last one may be cut off.
    fn used(&self, index: u64) -> u64 {
        self.metadata.block_size.min(self.metadata.size - index * self.metadata.block_size)
    }

    /// Checks where the blocks are. Two blocks in one place would show one part of the disk in another.
    fn check(&self, regions: &Regions) -> Result<()> {
        let end = self.file.file.size().min(MAX_FILE);
        let first_free = REGION_TABLES[1] + REGION_TABLE_LEN;
        let mut used = vec![0u64; to_usize(end.div_ceil(64 * MIB))];
        let mut next = 0;
        while let Some((index, start)) = self.next_block(next)? {
            next = index + 1;
            // The end of the last block may lie beyond the disk's, and then need not be there.
            let block = Extent::at(start, self.used(index));
            if block.end > end {
                return Err(
                    self.bad_entry(index, format!("the block at {start} ends beyond the end at {end}"))
                );
            }
            if start < first_free || regions.taken.iter().any(|taken| !taken.intersect(block).is_empty()) {
                let why = format!("the block at {start} overlaps the header section, the log or a region");
                return Err(self.bad_entry(index, why));
            }
            for mib in start / MIB..block.end.div_ceil(MIB) {
                let bit = 1 << (mib % 64);
                if let Some(word) = used.get_mut(to_usize(mib / 64)) {
                    if *word & bit != 0 {
                        let why = format!("the block at {start} overlaps another block, at {}", mib * MIB);
                        return Err(self.bad_entry(index, why));
                    }
                    *word |= bit;
                }
            }
        }
        Ok(())
    }
}

/// Where the block of the entry `word` is ([MS-VHDX] 2.5.1.1); `None` when it reads as zeroes; `Err` says what is wrong
/// with the entry. A block that was never written, or that was given back, may read as anything: it reads as zeroes.
fn place(word: u64) -> std::result::Result<Option<u64>, String> {
    let (state, reserved, offset) = (word & 7, word >> 3 & 0x1_ffff, word >> 20 << 20);
    if reserved != 0 {
        return Err(format!("the reserved bits of {word:#x} are set"));
    }
    match state {
        // Not present, undefined, zero, unmapped.
        0..=3 => Ok(None),
        6 => Ok(Some(offset)),
        7 => Err("the block is partially present, which only one of a differencing disk can be".into()),
        state => Err(format!("the block's state is {state}, which is none")),
    }
}

impl ReadAt for Reader {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let within = at % self.metadata.block_size;
            let len = to_usize(self.metadata.block_size - within).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            match self.block(at / self.metadata.block_size)? {
                None => part.fill(0),
                Some(start) => self.file.file.read_at(part, start + within)?,
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let mut at = from;
        while at < self.metadata.size
            && let Some((index, start)) = self.next_block(at / self.metadata.block_size)?
        {
            let first = index * self.metadata.block_size;
            at = at.max(first);
            // A fixed disk has every block, and its file is a hole where nothing was written.
            let host = Extent::new(start + (at - first), start + self.used(index));
            if let Some(data) = self.file.data_in(host)? {
                return Ok(Some(Extent::new(first + (data.start - start), first + (data.end - start))));
            }
            at = first + self.used(index);
        }
        Ok(None)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_a_block_has_its_meaning() {
        for zeroes in [0, 1, 2, 3, 1 | 5 << 20, 3 | 5 << 20] {
            assert_eq!(place(zeroes), Ok(None), "{zeroes:#x}");
        }
        assert_eq!(place(6 | 5 << 20), Ok(Some(5 * MIB)));
        assert_eq!(place(u64::MAX << 20 | 6), Ok(Some(u64::MAX << 20)));
        for wrong in [4, 5, 7, 6 | 1 << 3, 6 | 1 << 19, u64::MAX] {
            assert!(place(wrong).is_err(), "{wrong:#x}");
        }
    }
}
