//! Sparse files in tar archives: the runs of data are stored one after the other, and a map says where they belong.

use std::sync::Arc;

use super::header::{BLOCK, Header, Sparse};
use super::pax::decimal;
use crate::error::Result;
use crate::io::{ReadAt, check_range, read_array};
use crate::unit::{Extent, to_usize};

/// Most runs of one file; a run takes 24 bytes of memory.
pub(super) const MAX_RUNS: usize = 1 << 20;
/// Bytes read at once of a map before the data.
const STEP: u64 = 1 << 16;
/// Most digits of a number in such a map.
const MAX_DIGITS: usize = 20;

/// Offset and length of each run; an error says what is wrong with the map.
pub(super) type Runs = std::result::Result<Vec<(u64, u64)>, String>;

fn too_many<T>() -> std::result::Result<T, String> {
    Err(format!("it has more than {MAX_RUNS} runs"))
}

/// The map in the old GNU header at `at` of `disk` and in the blocks after it.
pub(super) fn from_header(disk: &dyn ReadAt, at: u64) -> Result<Runs> {
    let mut runs = Vec::new();
    let mut add = |piece: &Sparse<'_>| {
        for run in piece.runs() {
            runs.push(run.ok_or_else(|| "an entry is no number".to_owned())?);
        }
        if runs.len() > MAX_RUNS { too_many() } else { Ok(piece.extended) }
    };
    let block = read_array(disk, at)?;
    let Some(header) = Header::new(&block) else { return Ok(Err("it has no header".to_owned())) };
    let mut more = add(&header.sparse());
    let mut next = at + BLOCK;
    loop {
        match more {
            Err(why) => return Ok(Err(why)),
            Ok(false) => return Ok(Ok(runs)),
            Ok(true) => {
                more = add(&Sparse::extension(&read_array(disk, next)?));
                next += BLOCK;
            }
        }
    }
}

/// The map at the beginning of `data` (version 1.0: decimal numbers, each on a line, the number of runs first), and
/// the rest of `data`, from the next whole block on.
pub(super) fn from_data(disk: &dyn ReadAt, data: Extent) -> Result<(Extent, Runs)> {
    let mut lines = Lines { disk, data, at: data.start, buf: Vec::new(), used: 0 };
    let mut next = || -> Result<std::result::Result<u64, String>> {
        Ok(lines.next()?.ok_or_else(|| "it is cut off, or a line of it is no number".to_owned()))
    };
    let count = match next()? {
        Ok(count) if count <= MAX_RUNS as u64 => count,
        Ok(_) => return Ok((data, too_many())),
        Err(why) => return Ok((data, Err(why))),
    };
    let mut runs = Vec::new();
    for _ in 0..count {
        match (next()?, next()?) {
            (Ok(offset), Ok(len)) => runs.push((offset, len)),
            (Err(why), _) | (_, Err(why)) => return Ok((data, Err(why))),
        }
    }
    let map_len = (lines.at - data.start).next_multiple_of(BLOCK);
    Ok((Extent::new(data.start.saturating_add(map_len).min(data.end), data.end), Ok(runs)))
}

/// Numbers, each ended by a newline.
struct Lines<'a> {
    disk: &'a dyn ReadAt,
    data: Extent,
    /// Where the next number begins.
    at: u64,
    buf: Vec<u8>,
    used: usize,
}

impl Lines<'_> {
    fn next(&mut self) -> Result<Option<u64>> {
        let mut digits = Vec::new();
        loop {
            if self.used == self.buf.len() {
                let len = (self.data.end - self.at - digits.len() as u64).min(STEP);
                if len == 0 {
                    return Ok(None);
                }
                self.buf.resize(to_usize(len), 0);
                self.disk.read_at(&mut self.buf, self.at + digits.len() as u64)?;
                self.used = 0;
            }
            let Some(byte) = self.buf.get(self.used).copied() else { return Ok(None) };
            self.used += 1;
            if byte == b'\n' {
                self.at += digits.len() as u64 + 1;
                return Ok(decimal(&digits));
            }
            if digits.len() == MAX_DIGITS {
                return Ok(None);
            }
            digits.push(byte);
        }
    }
}

/// A run of data.
struct Run {
    /// Where it belongs in the file.
    start: u64,
    len: u64,
    /// Where it is stored in the archive.
    stored: u64,
}

/// A sparse file, read in place.
pub(super) struct SparseFile {
    archive: Arc<dyn ReadAt>,
    name: String,
    size: u64,
    runs: Vec<Run>,
}

impl SparseFile {
    /// The file of `size` bytes whose `runs` are stored in `data` of `archive`; an error says why the map is wrong.
    pub(super) fn new(
        archive: Arc<dyn ReadAt>,
        data: Extent,
        runs: Vec<(u64, u64)>,
        size: u64,
        name: &str,
    ) -> std::result::Result<Self, String> {
        let mut kept = Vec::new();
        let (mut end, mut stored) = (0, data.start);
        for (start, len) in runs {
            let run_end = start.checked_add(len).filter(|run_end| end <= start && *run_end <= size);
            end = run_end.ok_or_else(|| {
                format!("{len} bytes at {start} overlap a run before them or the end at {size}")
            })?;
            if len > data.end - stored {
                return Err(format!("its runs are longer than the {} bytes stored", data.len()));
            }
            if len > 0 {
                kept.push(Run { start, len, stored });
            }
            stored += len;
        }
        if stored != data.end {
            return Err(format!("its runs are shorter than the {} bytes stored", data.len()));
        }
        Ok(SparseFile { archive, name: name.to_owned(), size, runs: kept })
    }

    /// The runs that end behind `from`.
    fn from(&self, from: u64) -> &[Run] {
        let first = self.runs.partition_point(|run| run.start + run.len <= from);
        self.runs.get(first..).unwrap_or_default()
    }
}

impl ReadAt for SparseFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let asked = Extent::at(offset, buf.len() as u64);
        buf.fill(0);
        for run in self.from(offset) {
            let part = Extent::at(run.start, run.len).intersect(asked);
            if part.is_empty() {
                break;
            }
            let place = to_usize(part.start - offset)..to_usize(part.end - offset);
            self.archive.read_at(&mut buf[place], run.stored + (part.start - run.start))?;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        Ok(self.from(from).first().map(|run| Extent::new(run.start.max(from), run.start + run.len)))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
