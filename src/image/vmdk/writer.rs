//! The forward VMDK writers: grains and tables leave in one stream, the front last.
//!
//! ```text
//! StreamOptimized   front: header | descriptor
//!                   then:  grains of 32 MiB of the disk | their table … | directory | footer | end-of-stream
//! Sparse            front: header | descriptor | redundant directory | its tables | directory | tables
//!                   then:  grains
//! ```
//! A stream keeps its directory in memory, 4 bytes for each 32 MiB of the disk, and one table. A sparse disk keeps all
//! its tables, since they lie in front of the data. Both follow "Virtual Disk Format 5.0", in grains of 64 KiB.

use libdeflater::{CompressionLvl, Compressor};

use super::SECTOR;
use super::descriptor::embedded;
use super::header::{GD_AT_END, Header, MAX_TABLES, TABLE_ENTRIES, TABLE_SECTORS, bytes, flag, kind, marker};
use super::unpack::MARKER_LEN;
use crate::error::{Error, Kind, Result};
use crate::io::batch::{Cell, Encoder, HashedBatch, Pack, PackedBatch, Piece};
use crate::io::{AlignedBuf, is_zero};
use crate::unit::{Extent, MIB, to_usize};

/// Bytes of a grain.
pub const GRAIN: u64 = GRAIN_SECTORS * SECTOR;
const GRAIN_SECTORS: u64 = 128;
const GRAIN_BYTES: usize = to_usize(GRAIN);
/// Sectors of the descriptor, which is behind the header.
const DESCRIPTOR_SECTORS: u64 = 20;
/// The longest name of an image's file, in bytes: what Linux allows.
const MAX_NAME: usize = 255;
/// The largest disk written as a stream, in bytes: a grain directory of 8 MiB.
pub const MAX_STREAM: u64 = MAX_TABLES * TABLE_ENTRIES * GRAIN;
/// The largest front of a sparse disk, in bytes: that of a disk of 510 GiB.
const MAX_FRONT: u64 = 64 * MIB;
/// How hard grains are compressed, of libdeflate's 12 levels. On system files it is 0.8 % larger than QEMU's image, at
/// five times its speed on each processor; level 1 is 6 % larger, and level 6 is 1 % smaller at 7/10 of the speed.
const LEVEL: i32 = 4;

fn too_large(size: u64, why: String) -> Error {
    Error::new(Kind::Usage, "vmdk.too-large", format!("a disk of {size} bytes"))
        .because(why)
        .remedy("write another format")
}

/// `name` as a descriptor can hold it.
fn file_name(name: &str) -> Result<String> {
    if name.is_empty()
        || name.len() > MAX_NAME
        || name.contains(|c: char| c.is_control() || "\"/\\".contains(c))
    {
        let why = format!("a descriptor holds a file's name: 1 to {MAX_NAME} bytes, no quotes, no slashes");
        return Err(Error::new(Kind::Usage, "vmdk.name", format!("a VMDK image cannot be called {name:?}"))
            .because(why)
            .remedy("give it another name"));
    }
    Ok(name.to_owned())
}

/// The sectors of a disk of `size` bytes: programs refuse one that has none.
fn sectors_of(size: u64) -> u64 {
    size.div_ceil(SECTOR).max(1)
}

fn header(sectors: u64) -> Header {
    Header {
        version: 1,
        flags: flag::LINE_ENDS,
        capacity: sectors,
        grain: GRAIN_SECTORS,
        descriptor_offset: 1,
        descriptor_size: DESCRIPTOR_SECTORS,
        redundant_offset: 0,
        directory_offset: GD_AT_END,
        overhead: GRAIN_SECTORS,
        unclean: false,
    }
}

/// A content id: the same tables give the same one. Its highest bit is clear, since ffffffff and fffffffe have meanings.
fn content_id(checksum: u32) -> u32 {
    checksum & 0x7fff_ffff
}

/// Header and descriptor at the start of `len` bytes.
fn front(header: &Header, descriptor: &str, len: u64) -> Vec<u8> {
    let mut front = Vec::with_capacity(to_usize(len));
    front.extend(header.encode());
    front.extend(descriptor.as_bytes());
    front.resize(to_usize(len), 0);
    front
}

fn little_endian(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The number of the sector at `position` of the image.
fn sector_at(position: u64) -> Result<u32> {
    u32::try_from(position / SECTOR).map_err(|_| {
        Error::new(Kind::Destination, "vmdk.too-long", "the image has grown to 2 TiB")
            .because("a VMDK image of this type cannot be longer: its tables number sectors in 32 bits")
            .remedy("write another format")
    })
}

/// The grains of a batch that are not all zero: place in the batch and bytes, zeroes to the grain's end included.
fn grains(batch: &HashedBatch) -> Result<impl Iterator<Item = (usize, &[u8])>> {
    let len = to_usize(batch.extent().len()).next_multiple_of(GRAIN_BYTES);
    let whole = batch.bytes().get(..len).ok_or_else(|| {
        Error::new(Kind::Internal, "vmdk.batch", format!("a buffer of less than {len} bytes"))
    })?;
    Ok(whole
        .chunks(GRAIN_BYTES)
        .enumerate()
        .map(|(i, bytes)| (i * GRAIN_BYTES, bytes))
        .filter(|(_, bytes)| !is_zero(bytes)))
}

/// Lays out a streamOptimized image: what OVF packages hold, and clouds import.
pub struct StreamOptimized {
    name: String,
    sectors: u64,
    position: u64,
    directory: Vec<u32>,
    /// Number of the open table, and its entries; empty while nothing is in it.
    group: u64,
    table: Vec<u32>,
}

impl StreamOptimized {
    /// A writer for a disk of `size` bytes, rounded up to whole sectors, at most [`MAX_STREAM`], in a file called
    /// `name`, without its folder. An error of `Kind::Usage`
    /// when the disk is too large, or the name is one no descriptor can hold.
    pub fn new(size: u64, name: &str) -> Result<Self> {
        if size > MAX_STREAM {
            return Err(too_large(size, format!("a VMDK stream holds at most {MAX_STREAM} bytes")));
        }
        let sectors = sectors_of(size);
        Ok(StreamOptimized {
            name: file_name(name)?,
            sectors,
            position: 0,
            directory: vec![0; to_usize(header(sectors).tables())],
            group: 0,
            table: Vec::new(),
        })
    }

    fn meta(&mut self, mut bytes: Vec<u8>, pieces: &mut Vec<Piece>) {
        bytes.resize(bytes.len().next_multiple_of(to_usize(SECTOR)), 0);
        self.position += bytes.len() as u64;
        pieces.push(Piece::Meta(bytes));
    }

    /// Lays out header and descriptor, unless they are: nothing in them depends on what follows, so that the image can
    /// go into a pipe.
    fn begin(&mut self, pieces: &mut Vec<Piece>) {
        if self.position == 0 {
            let id = content_id(crc32c::crc32c(&self.sectors.to_le_bytes()));
            let descriptor = embedded("streamOptimized", "RDONLY", self.sectors, id, &self.name);
            let front = front(&self.header(GD_AT_END), &descriptor, GRAIN);
            self.meta(front, pieces);
        }
    }

    /// Lays out the open table behind its marker, unless nothing is in it.
    fn close_table(&mut self, pieces: &mut Vec<Piece>) -> Result<()> {
        if self.table.is_empty() {
            return Ok(());
        }
        let table = little_endian(&self.table);
        self.table.clear();
        self.meta(marker(TABLE_SECTORS, kind::TABLE).to_vec(), pieces);
        self.directory[to_usize(self.group)] = sector_at(self.position)?;
        self.meta(table, pieces);
        Ok(())
    }

    fn header(&self, directory_offset: u64) -> Header {
        let flags = flag::LINE_ENDS | flag::COMPRESSED | flag::MARKERS;
        Header { version: 3, flags, directory_offset, ..header(self.sectors) }
    }
}

impl Encoder for StreamOptimized {
    fn front_len(&self) -> u64 {
        0
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        self.begin(&mut pieces);
        let mut at = 0;
        for cell in cells {
            let grain = (extent.start + u64::from(cell.start)) / GRAIN;
            if grain / TABLE_ENTRIES != self.group {
                self.close_table(&mut pieces)?;
                self.group = grain / TABLE_ENTRIES;
            }
            self.table.resize(to_usize(TABLE_ENTRIES), 0);
            self.table[to_usize(grain % TABLE_ENTRIES)] = sector_at(self.position)?;
            self.position += u64::from(cell.stored);
            let range = at..at + cell.stored as usize;
            at = range.end;
            match pieces.last_mut() {
                Some(Piece::Data(last)) if last.end == range.start => last.end = range.end,
                _ => pieces.push(Piece::Data(range)),
            }
        }
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let mut pieces = Vec::new();
        self.begin(&mut pieces);
        self.close_table(&mut pieces)?;
        let directory = little_endian(&self.directory);
        let sectors = (directory.len() as u64).div_ceil(SECTOR);
        self.meta(marker(sectors, kind::DIRECTORY).to_vec(), &mut pieces);
        let footer = self.header(sector_at(self.position)?.into());
        self.meta(directory, &mut pieces);
        self.meta(marker(1, kind::FOOTER).to_vec(), &mut pieces);
        self.meta(footer.encode().to_vec(), &mut pieces);
        self.meta(vec![0; to_usize(SECTOR)], &mut pieces);
        Ok((pieces, Vec::new()))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Ok(Box::new(GrainPacker::new()?))
    }

    fn cells_matter(&self) -> bool {
        true
    }
}

/// Compresses each grain by itself, behind its marker, padded to whole sectors.
struct GrainPacker {
    codec: Compressor,
    /// The most bytes a packed grain takes.
    room: usize,
    packed: AlignedBuf,
}

impl GrainPacker {
    fn new() -> Result<Self> {
        let level = CompressionLvl::new(LEVEL)
            .map_err(|_| Error::new(Kind::Internal, "vmdk.level", "no such level of compression"))?;
        let mut codec = Compressor::new(level);
        let room = (MARKER_LEN + codec.zlib_compress_bound(GRAIN_BYTES)).next_multiple_of(to_usize(SECTOR));
        Ok(GrainPacker { codec, room, packed: AlignedBuf::new(0) })
    }
}

impl Pack for GrainPacker {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        // A grain that does not shrink grows by a sector. The buffer later serves to read a batch into, so it is no
        // shorter than the batch's own.
        let count = to_usize(batch.extent().len().div_ceil(GRAIN));
        let least = batch.bytes().len().max(count * self.room);
        if self.packed.len() < least {
            self.packed = AlignedBuf::new(least);
        }
        let mut cells = Vec::with_capacity(count);
        let mut end = 0;
        for (start, bytes) in grains(&batch)? {
            let room = &mut self.packed[end..end + self.room];
            let lba = (batch.extent().start + start as u64) / SECTOR;
            let len = self.codec.zlib_compress(bytes, &mut room[MARKER_LEN..]).map_err(|error| {
                Error::new(Kind::Internal, "vmdk.deflate", "cannot deflate a grain").caused_by(error)
            })?;
            room[..8].copy_from_slice(&lba.to_le_bytes());
            room[8..MARKER_LEN].copy_from_slice(&to_u32(len).to_le_bytes());
            let stored = (MARKER_LEN + len).next_multiple_of(to_usize(SECTOR));
            room[MARKER_LEN + len..stored].fill(0);
            end += stored;
            cells.push(Cell { start: to_u32(start), stored: to_u32(stored), compressed: true });
        }
        Ok(batch.repacked(cells, &mut self.packed))
    }
}

/// Lays out a monolithicSparse image: the growing disk of hosted products.
pub struct Sparse {
    name: String,
    header: Header,
    position: u64,
    /// Where each grain is, in sectors, in whole tables.
    entries: Vec<u32>,
}

impl Sparse {
    /// A writer for a disk of `size` bytes, rounded up to whole sectors, in a file called `name`, as for
    /// [`StreamOptimized::new`]; at most 510 GiB, since its tables are held in memory.
    pub fn new(size: u64, name: &str) -> Result<Self> {
        let header = Sparse::layout(sectors_of(size));
        if bytes(header.overhead) > MAX_FRONT {
            let why = "the tables in front of a monolithicSparse image's data would take more than 64 MiB; they do \
                       from 511 GiB on";
            return Err(too_large(size, why.into()));
        }
        Ok(Sparse {
            name: file_name(name)?,
            position: bytes(header.overhead),
            entries: vec![0; to_usize(header.tables() * TABLE_ENTRIES)],
            header,
        })
    }

    fn layout(sectors: u64) -> Header {
        let empty = header(sectors);
        let directory = (empty.tables() * 4).div_ceil(SECTOR);
        let both = directory + empty.tables() * TABLE_SECTORS;
        let redundant_offset = 1 + DESCRIPTOR_SECTORS;
        Header {
            flags: flag::LINE_ENDS | flag::REDUNDANT,
            redundant_offset,
            directory_offset: redundant_offset + both,
            overhead: (redundant_offset + 2 * both).next_multiple_of(GRAIN_SECTORS),
            ..empty
        }
    }
}

impl Encoder for Sparse {
    fn front_len(&self) -> u64 {
        bytes(self.header.overhead)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn put(&mut self, extent: Extent, cells: &[Cell]) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for cell in cells {
            let grain = (extent.start + u64::from(cell.start)) / GRAIN;
            self.entries[to_usize(grain)] = sector_at(self.position)?;
            self.position += u64::from(cell.stored);
            let start = cell.start as usize;
            let range = start..start + cell.stored as usize;
            match pieces.last_mut() {
                Some(Piece::Data(last)) if last.end == range.start => last.end = range.end,
                _ => pieces.push(Piece::Data(range)),
            }
        }
        Ok(pieces)
    }

    fn finish(&mut self) -> Result<(Vec<Piece>, Vec<u8>)> {
        let tables = little_endian(&self.entries);
        let cid =
            content_id(crc32c::crc32c_append(crc32c::crc32c(&self.header.capacity.to_le_bytes()), &tables));
        let descriptor = embedded("monolithicSparse", "RW", self.header.capacity, cid, &self.name);
        let mut front = front(&self.header, &descriptor, bytes(self.header.overhead));
        for offset in [self.header.redundant_offset, self.header.directory_offset] {
            let first = offset + (self.header.tables() * 4).div_ceil(SECTOR);
            let directory: Vec<u32> = (0..self.header.tables())
                .map(|table| sector_at(bytes(first + table * TABLE_SECTORS)))
                .collect::<Result<_>>()?;
            let mut put = |sector: u64, bytes: &[u8]| {
                let at = to_usize(sector * SECTOR);
                front[at..at + bytes.len()].copy_from_slice(bytes);
            };
            put(offset, &little_endian(&directory));
            put(first, &tables);
        }
        Ok((Vec::new(), front))
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        Ok(Box::new(PlainPacker))
    }

    fn cells_matter(&self) -> bool {
        true
    }
}

/// Stores grains as they are, straight from the buffer they were read into.
struct PlainPacker;

impl Pack for PlainPacker {
    fn pack(&mut self, batch: HashedBatch) -> Result<PackedBatch> {
        let cells = grains(&batch)?
            .map(|(start, bytes)| Cell {
                start: to_u32(start),
                stored: to_u32(bytes.len()),
                compressed: false,
            })
            .collect();
        Ok(batch.packed(cells))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_disks_have_bounded_tables() {
        assert!(Sparse::new(510 << 30, "x").unwrap().front_len() <= MAX_FRONT);
        for size in [511 << 30, u64::MAX] {
            assert_eq!(Sparse::new(size, "x").err().unwrap().id(), "vmdk.too-large");
        }
        assert_eq!(StreamOptimized::new(MAX_STREAM, "x").unwrap().directory.len() as u64, MAX_TABLES);
        assert_eq!(StreamOptimized::new(MAX_STREAM + 1, "x").err().unwrap().id(), "vmdk.too-large");
    }

    #[test]
    fn a_name_that_no_descriptor_can_hold_is_refused_and_the_longest_fits() {
        for name in ["", "a\"b", "a/b", "a\\b", "a\nRW 1 ZERO", "a\0", &"x".repeat(256)] {
            assert_eq!(StreamOptimized::new(512, name).err().unwrap().id(), "vmdk.name", "{name:?}");
            assert_eq!(Sparse::new(512, name).err().unwrap().id(), "vmdk.name", "{name:?}");
        }
        let name = "x".repeat(MAX_NAME);
        let (pieces, _) = StreamOptimized::new(MAX_STREAM, &name).unwrap().finish().unwrap();
        let Some(Piece::Meta(front)) = pieces.first() else { panic!("{pieces:?}") };
        assert_eq!(front.len() as u64, GRAIN);
        let text = &front[512..512 * (1 + to_usize(DESCRIPTOR_SECTORS))];
        let found = super::super::descriptor::Descriptor::parse("x", text, 512).unwrap();
        assert_eq!((found.extents[0].file.as_deref(), found.sectors()), (Some(&*name), MAX_STREAM / SECTOR));
    }

    #[test]
    fn an_image_that_outgrows_its_tables_is_an_error() {
        let mut writer = StreamOptimized::new(8 << 40, "x").unwrap();
        writer.position = (2 << 40) - 512;
        let cell = Cell { start: 0, stored: 512, compressed: true };
        writer.put(Extent::at(0, 2 << 20), std::slice::from_ref(&cell)).unwrap();
        let error = writer.put(Extent::at(2 << 20, 2 << 20), &[cell]).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Destination, "vmdk.too-long"));
    }
}
