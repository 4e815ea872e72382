//! The virtual disk of a VHD image, read from any thread.

use std::sync::Arc;

use super::footer::{DiskType, FOOTER_LEN};
use super::header::{ABSENT, HEADER_LEN, Header};
use super::metadata::{Info, Metadata, refusal};
use super::{SECTOR, bad_field};
use crate::error::{Error, Result};
use crate::image::cache::Cache;
use crate::image::sparse::Sparse;
use crate::io::{ReadAt, check_range, read_vec};
use crate::unit::{Extent, KIB, to_usize};

/// Bytes of the block allocation table read at once.
const PAGE: u64 = 64 * KIB;
/// Entries in a page.
const PAGE_ENTRIES: u64 = PAGE / 4;
/// Bytes of the table kept in memory: at blocks of 2 MiB they map 512 GiB of the disk.
const TABLE_CACHE: usize = 1 << 20;
/// Bytes of sector bitmaps kept in memory; a bitmap that is all ones counts as 64.
const BITMAP_CACHE: usize = 1 << 20;

/// The virtual disk of one image. Holds the two caches; opening one takes 4 bytes more for each block in the file, 4 MiB
/// for the largest disk of the usual blocks and never more than 16 MiB, and gives them back.
pub struct Reader {
    name: String,
    size: u64,
    info: Info,
    file: Arc<Sparse>,
    /// `None` for a fixed disk.
    blocks: Option<Blocks>,
}

/// The blocks of a dynamic disk.
struct Blocks {
    name: String,
    file: Arc<Sparse>,
    /// Bytes of the disk in a block.
    block_size: u64,
    /// Bytes of the sector bitmap in front of a block.
    bitmap_len: u64,
    table: Extent,
    pages: Cache<[u32]>,
    /// The sector bitmap by the place of its block; empty when it is all ones, as in most images it is.
    bitmaps: Cache<[u8]>,
}

impl Reader {
    /// Opens the image on `file` and checks its block allocation table: each block lies in the file, apart from the
    /// footers, the header, the table and every other block. Refuses differencing disks.
    pub fn open(file: Arc<dyn ReadAt>) -> Result<Self> {
        let name = file.name();
        let metadata = Metadata::read(&file)?;
        if metadata.footer.disk_type == DiskType::Differencing {
            return Err(refusal(&name));
        }
        let (size, info) = (metadata.size, metadata.info());
        let file = Sparse::new(file);
        let blocks = match &metadata.header {
            None => None,
            Some(header) => {
                let blocks = Blocks::new(name.clone(), Arc::clone(&file), header, size);
                blocks.check(&metadata, header)?;
                Some(blocks)
            }
        };
        Ok(Reader { name, size, info, file, blocks })
    }

    /// What the image is.
    pub fn info(&self) -> &Info {
        &self.info
    }
}

impl Blocks {
    fn new(name: String, file: Arc<Sparse>, header: &Header, size: u64) -> Self {
        let block_size = u64::from(header.block_size);
        Blocks {
            name,
            file,
            block_size,
            bitmap_len: header.bitmap_len(),
            table: Extent::at(header.table_offset, size.div_ceil(block_size) * 4),
            pages: Cache::new(TABLE_CACHE),
            bitmaps: Cache::new(BITMAP_CACHE),
        }
    }

    /// The number of blocks of the disk.
    fn count(&self) -> u64 {
        self.table.len() / 4
    }

    /// Where block `index` is in the file, its sector bitmap first; `None` when it is absent.
    fn block(&self, index: u64) -> Result<Option<u64>> {
        let number = index / PAGE_ENTRIES;
        let page = match self.pages.get(number) {
            Some(page) => page,
            None => {
                let place = Extent::at(self.table.start + number * PAGE, PAGE).intersect(self.table);
                let bytes = read_vec(&self.file.file, place.start, to_usize(place.len()))?;
                let page: Arc<[u32]> =
                    bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry)).collect();
                self.pages.put(number, Arc::clone(&page), bytes.len());
                page
            }
        };
        let entry = page.get(to_usize(index % PAGE_ENTRIES)).copied().unwrap_or(ABSENT);
        Ok((entry != ABSENT).then(|| u64::from(entry) * SECTOR))
    }

    fn bad_entry(&self, index: u64, why: String) -> Error {
        bad_field(&self.name, "block allocation table entry", self.table.start + index * 4, why)
            .fact("block", index)
    }

    /// Checks where the blocks are. Two blocks in one place would show one part of the disk in another.
    fn check(&self, metadata: &Metadata, header: &Header) -> Result<()> {
        let file_size = self.file.file.size();
        let footer = FOOTER_LEN as u64;
        let end = if metadata.copied { file_size } else { file_size - footer };
        let taken = [
            Extent::new(0, footer),
            Extent::at(metadata.footer.data_offset, HEADER_LEN as u64),
            Extent::at(header.table_offset, u64::from(header.max_entries) * 4).intersect(Extent::new(0, end)),
        ];
        let mut starts: Vec<u32> = Vec::new();
        for index in 0..self.count() {
            let Some(start) = self.block(index)? else { continue };
            // The end of the last block may lie beyond the disk's, and then need not be there.
            let used = self.block_size.min(metadata.size - index * self.block_size);
            let block = Extent::at(start, self.bitmap_len + used);
            if block.end > end {
                return Err(
                    self.bad_entry(index, format!("the block at {start} ends beyond the end at {end}"))
                );
            }
            if taken.iter().any(|taken| !taken.intersect(block).is_empty()) {
                let why = format!("the block at {start} overlaps the footer's copy, the header or the table");
                return Err(self.bad_entry(index, why));
            }
            // It was a sector number of 32 bits.
            starts.push(u32::try_from(start / SECTOR).unwrap_or(ABSENT));
        }
        starts.sort_unstable();
        let whole = self.bitmap_len + self.block_size;
        match starts.windows(2).find(|pair| u64::from(pair[1] - pair[0]) * SECTOR < whole) {
            Some(pair) => Err(self.overlap(u64::from(pair[0]) * SECTOR, u64::from(pair[1]) * SECTOR)),
            None => Ok(()),
        }
    }

    /// The error for the blocks at `first` and `second` of the file.
    fn overlap(&self, first: u64, second: u64) -> Error {
        let mut found = None;
        for index in 0..self.count() {
            match self.block(index) {
                Ok(Some(start)) if start == second => found = Some(index),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
        self.bad_entry(
            found.unwrap_or(0),
            format!("the block at {second} overlaps another block, at {first}"),
        )
    }

    /// The sector bitmap of the block at `start` of the file, or nothing when it is all ones.
    fn bitmap(&self, start: u64) -> Result<Arc<[u8]>> {
        if let Some(bitmap) = self.bitmaps.get(start) {
            return Ok(bitmap);
        }
        let sectors = self.block_size / SECTOR;
        let bytes = read_vec(&self.file.file, start, to_usize(sectors.div_ceil(8)))?;
        let full = (0..sectors).all(|sector| written(&bytes, sector));
        let bitmap: Arc<[u8]> = if full { Arc::new([]) } else { bytes.into() };
        self.bitmaps.put(start, Arc::clone(&bitmap), bitmap.len().max(64));
        Ok(bitmap)
    }

    /// Reads into `buf` from the disk's offset `at`.
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let within = at % self.block_size;
            let len = to_usize(self.block_size - within).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            match self.block(at / self.block_size)? {
                None => part.fill(0),
                Some(start) => {
                    let bitmap = self.bitmap(start)?;
                    self.file.file.read_at(part, start + self.bitmap_len + within)?;
                    clear_unwritten(part, &bitmap, within);
                }
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    /// The next run of the disk of `size` bytes that may hold data, at or after `from`.
    fn next_data(&self, from: u64, size: u64) -> Result<Option<Extent>> {
        let mut at = from;
        while at < size {
            let first = at / self.block_size * self.block_size;
            let end = (first + self.block_size).min(size);
            if let Some(start) = self.block(at / self.block_size)? {
                let bitmap = self.bitmap(start)?;
                let data_start = start + self.bitmap_len;
                // A writer of sparse files leaves holes inside blocks too.
                while let Some(data) =
                    self.file.data_in(Extent::new(data_start + (at - first), data_start + (end - first)))?
                {
                    let data = Extent::new(data.start - data_start, data.end - data_start);
                    if let Some(run) = next_written(&bitmap, data) {
                        return Ok(Some(run.shifted(first)));
                    }
                    at = first + data.end;
                }
            }
            at = end;
        }
        Ok(None)
    }
}

/// Whether the bitmap, most significant bit first, has the bit of sector `sector`.
fn written(bitmap: &[u8], sector: u64) -> bool {
    bitmap.get(to_usize(sector / 8)).is_none_or(|byte| byte << (sector % 8) & 0x80 != 0)
}

/// Makes zeroes of the sectors that were never written: `part` was read from offset `within` of a block. Their bits
/// are 0, and what is in the file there means nothing ("Data Blocks": "if the bit is 0, the sector is free").
fn clear_unwritten(part: &mut [u8], bitmap: &[u8], within: u64) {
    if bitmap.is_empty() {
        return;
    }
    let end = within + part.len() as u64;
    for sector in within / SECTOR..end.div_ceil(SECTOR) {
        if !written(bitmap, sector) {
            let unwritten = Extent::at(sector * SECTOR, SECTOR).intersect(Extent::new(within, end));
            part[to_usize(unwritten.start - within)..to_usize(unwritten.end - within)].fill(0);
        }
    }
}

/// The first run of written sectors in `data`, offsets in the block.
fn next_written(bitmap: &[u8], data: Extent) -> Option<Extent> {
    if bitmap.is_empty() {
        return Some(data).filter(|data| !data.is_empty());
    }
    let mut sectors = data.start / SECTOR..data.end.div_ceil(SECTOR);
    let first = sectors.find(|sector| written(bitmap, *sector))?;
    let end = sectors.find(|sector| !written(bitmap, *sector)).unwrap_or(data.end.div_ceil(SECTOR));
    Some(Extent::new(first * SECTOR, end * SECTOR).intersect(data)).filter(|run| !run.is_empty())
}

impl ReadAt for Reader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        match &self.blocks {
            None => self.file.file.read_at(buf, offset),
            Some(blocks) => blocks.read(buf, offset),
        }
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        match &self.blocks {
            Some(blocks) => blocks.next_data(from, self.size),
            None if from < self.size => {
                let data =
                    self.file.file.next_data(from)?.map(|data| data.intersect(Extent::new(0, self.size)));
                Ok(data.filter(|data| !data.is_empty()))
            }
            None => Ok(None),
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn unwritten_sectors_read_as_zeroes_and_are_no_data(
            bitmap in prop::collection::vec(any::<u8>(), 4), within in 0u64..8192, len in 1u64..8192,
        ) {
            let whole = Extent::at(within, len);
            let mut part = vec![7; to_usize(len)];
            clear_unwritten(&mut part, &bitmap, within);
            let mut runs = Vec::new();
            let mut at = within;
            while let Some(run) = next_written(&bitmap, Extent::new(at, whole.end)) {
                prop_assert!(whole.contains(run) && run.start >= at && !run.is_empty());
                runs.push(run);
                at = run.end;
            }
            for (i, byte) in part.iter().enumerate() {
                let at = within + i as u64;
                // Sectors beyond the bitmap's end do not exist in an image, and count as written.
                let bit = bitmap.get(to_usize(at / 512 / 8)).is_none_or(|byte| byte >> (7 - at / 512 % 8) & 1 == 1);
                prop_assert_eq!(*byte == 7, bit);
                prop_assert_eq!(runs.iter().any(|run| run.contains(Extent::at(at, 1))), bit);
            }
        }
    }
}
