//! The forward VHD writers: the disk and its footer, or blocks that leave in one stream with the front last.
//!
//! ```text
//! fixed:    the disk | footer
//! dynamic:  front: footer's copy | header | block allocation table      known size, written last
//!           then:  3584 zeroes | bitmap, 512 ones | block of 2 MiB | … | footer
//! ```
//! The virtual disk is rounded up to whole MiB, with zeroes: Azure and other clouds refuse an image of any other
//! size. A GPT's backup header is then no longer in the last sector, which whoever fixes the copy's partition table
//! must know. Memory: the table, 4 bytes for each 2 MiB of the disk.

use super::footer::{DiskType, FOOTER_LEN, Footer};
use super::header::{ABSENT, HEADER_LEN, Header};
use super::{MAX_SIZE, SECTOR};
use crate::error::{Error, Kind, Result};
use crate::image::raw;
use crate::io::batch::{Cell, Encoder, HashedBatch, Pack, PackedBatch, Piece};
use crate::io::buffer::ALIGN;
use crate::io::is_zero;
use crate::unit::{Digest, Extent, KIB, MIB, to_usize};

/// Bytes of the disk in a block: what every program makes, and some demand.
pub const BLOCK: u64 = 2 * MIB;
/// Bytes of the sector bitmap in front of a block.
const BITMAP: usize = 512;
const _: () = assert!(BITMAP as u64 == (BLOCK / SECTOR).div_ceil(8).next_multiple_of(SECTOR));
/// The unit in which zeroes are looked for: a file system block.
const UNIT: usize = 4096;
/// Zeroes from this length on are left out of a block as a hole; fewer are written with the data around them.
const HOLE: usize = to_usize(64 * KIB);

/// The length of the virtual disk for a source of `size` bytes.
fn rounded(size: u64) -> Result<u64> {
    if size > MAX_SIZE {
        return Err(Error::new(Kind::Usage, "vhd.too-large", format!("a disk of {size} bytes"))
            .because("a VHD image holds at most 2040 GiB")
            .remedy("write another format, such as qcow2 or raw"));
    }
    Ok(size.next_multiple_of(MIB).max(MIB))
}

/// The footer of a disk of `size` bytes. Programs take the disk's length from `current_size` or from the geometry,
/// by the creator; every program takes `current_size` of what Hyper-V, `win `, makes, so that is what the image says.
///
/// The same source must give the same bytes, so nothing here is the hour or chance: the time is the format's zero,
/// 2000-01-01, and the identifier is a digest of what the layout depends on, `content`. Two images of equal size and
/// layout have the same one, which a program that keeps a catalogue of disks by it must be told.
fn footer(size: u64, disk_type: DiskType, content: &[u8]) -> Footer {
    let seed = [b"haul VHD", &(disk_type as u32).to_be_bytes()[..], &size.to_be_bytes(), content].concat();
    let digest = super::footer::field(&Digest::of(&seed).0, 0);
    let uuid = uuid::Builder::from_custom_bytes(digest).into_uuid().into_bytes();
    Footer {
        creator: *b"win ",
        creator_version: 10 << 16,
        creator_host: *b"Wi2k",
        uuid,
        ..Footer::new(size, disk_type)
    }
}

/// Lays out a fixed disk.
pub struct Fixed {
    size: u64,
    disk: raw::writer::Writer,
    /// Bytes of the footer laid out.
    ended: u64,
}

impl Fixed {
    /// A writer for a disk of `size` bytes, rounded up to whole MiB; at most 2040 GiB, or it is [`Kind::Usage`].
    pub fn new(size: u64) -> Result<Self> {
        let size = rounded(size)?;
        Ok(Fixed { size, disk: raw::writer::Writer::new(size), ended: 0 })
    }
}

impl Encoder for Fixed {
    fn front_len(&self) -> u64 {
        0
    }

    fn position(&self) -> u64 {
        self.disk.position() + self.ended
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        self.disk.put(extent, cells)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let (mut pieces, front) = self.disk.finish()?;
        pieces.push(Piece::Meta(footer(self.size, DiskType::Fixed, &[]).encode().to_vec()));
        self.ended = FOOTER_LEN as u64;
        Ok((pieces, front))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        self.disk.packer()
    }

    fn cells_matter(&self) -> bool {
        self.disk.cells_matter()
    }
}

/// Lays out a dynamic disk whose data comes in order. A batch is a block of the disk.
pub struct Dynamic {
    size: u64,
    position: u64,
    /// The block allocation table: the sector at which a block begins, its bitmap first.
    table: Vec<u32>,
    /// The first block that may still come.
    next: u64,
}

impl Dynamic {
    /// A writer for a disk of `size` bytes, rounded up to whole MiB; at most 2040 GiB, or it is [`Kind::Usage`].
    pub fn new(size: u64) -> Result<Self> {
        let size = rounded(size)?;
        // Exactly as many entries as blocks: some programs refuse more.
        let table = vec![ABSENT; to_usize(size.div_ceil(BLOCK))];
        let mut writer = Dynamic { size, position: 0, table, next: 0 };
        writer.position = writer.front_len();
        Ok(writer)
    }

    /// The table's bytes, padded to a whole sector with entries that name no block.
    fn table_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(to_usize(SECTOR)), 0xff);
        bytes
    }

    fn footer(&self) -> Footer {
        footer(self.size, DiskType::Dynamic, &self.table_bytes())
    }
}

impl Encoder for Dynamic {
    /// Whole pages, so that blocks lie at page borders of the file, where O_DIRECT can write them and zeroes are holes.
    fn front_len(&self) -> u64 {
        let table = (self.table.len() as u64 * 4).next_multiple_of(SECTOR);
        (FOOTER_LEN as u64 + HEADER_LEN as u64 + table).next_multiple_of(ALIGN as u64)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        if cells.is_empty() {
            return Ok(pieces);
        }
        let index = extent.start / BLOCK;
        let wrong = || {
            Error::new(Kind::Internal, "vhd.batch", format!("the batch {extent:?} is no block of the disk"))
        };
        if !extent.start.is_multiple_of(BLOCK) || extent.len() > BLOCK || index < self.next {
            return Err(wrong());
        }
        let start = self.position + (ALIGN - BITMAP) as u64;
        *self.table.get_mut(to_usize(index)).ok_or_else(wrong)? =
            u32::try_from(start / SECTOR).map_err(|_| wrong())?;
        self.next = index + 1;
        let mut bitmap = vec![0; ALIGN];
        bitmap[ALIGN - BITMAP..].fill(0xff);
        pieces.push(Piece::Meta(bitmap));
        let mut at = 0;
        for cell in cells {
            let (start, stored) = (u64::from(cell.start), u64::from(cell.stored));
            if start < at || start + stored > extent.len() {
                return Err(wrong());
            }
            if start > at {
                pieces.push(Piece::Zeros(start - at));
            }
            at = start + stored;
            pieces.push(Piece::Data(to_usize(start)..to_usize(at)));
        }
        if at < BLOCK {
            pieces.push(Piece::Zeros(BLOCK - at));
        }
        self.position += ALIGN as u64 + BLOCK;
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let footer = self.footer().encode();
        let header = Header {
            table_offset: (FOOTER_LEN + HEADER_LEN) as u64,
            // The largest disk has 1,044,480 blocks.
            max_entries: u32::try_from(self.table.len()).unwrap_or(u32::MAX),
            block_size: u32::try_from(BLOCK).unwrap_or(u32::MAX),
        };
        let mut front = [&footer[..], &header.encode(), &self.table_bytes()].concat();
        front.resize(to_usize(self.front_len()), 0);
        self.position += FOOTER_LEN as u64;
        Ok((vec![Piece::Meta(footer.to_vec())], front))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Ok(Box::new(Packer))
    }

    /// Which blocks are there follows from the cells: a batch whose fix-ups left only zeroes has none.
    fn cells_matter(&self) -> bool {
        true
    }
}

/// Finds the runs of a batch that are not zero, and stores them straight from the buffer they were read into.
struct Packer;

impl Pack for Packer {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        let too_long = |_| Error::new(Kind::Internal, "vhd.batch", "a batch is longer than 4 GiB");
        let len = to_usize(batch.extent().len());
        // Runs of units, in bytes; one that follows closely joins the one before, with the zeroes between them.
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (i, unit) in batch.bytes()[..len].chunks(UNIT).enumerate().filter(|(_, unit)| !is_zero(unit)) {
            let (start, end) = (i * UNIT, i * UNIT + unit.len());
            match runs.last_mut() {
                Some(last) if start - last.end < HOLE => last.end = end,
                _ => runs.push(start..end),
            }
        }
        let cell = |run: std::ops::Range<usize>| {
            let start = u32::try_from(run.start).map_err(too_long)?;
            Ok(Cell { start, stored: u32::try_from(run.len()).map_err(too_long)?, compressed: false })
        };
        let cells = runs.into_iter().map(cell).collect::<Result<_>>()?;
        Ok(batch.packed(cells))
    }
}
