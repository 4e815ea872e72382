//! The append-only journal of a copy under way: what was laid out, what is safe, where a resumed run went on.
//!
//! ```text
//! file:   "haul-journal 1\n" | record …
//! record: u32 LE length | u32 LE CRC-32C of the payload | payload: u8 type | fields, little endian
//! ```
//! The first record holds the job's parameters as JSON. A torn last record ends the journal; it was never relied on.
//! A batch is written to the journal after its bytes were handed to the destination; it counts only below a later
//! [`Record::Synced`] or [`Record::Part`] mark, which follows the destination's own acknowledgement.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Cell, PackedBatch};
use crate::unit::{Digest, MIB, to_usize};

const MAGIC: &[u8; 15] = b"haul-journal 1\n";
/// No record is longer: a batch has at most 64 Ki cells and chunks.
const MAX_RECORD: u32 = 8 << 20;
const _: () = assert!(MAX_RECORD as u64 == 8 * MIB);

/// A batch as laid out: enough to lay it out again without its bytes, and to seal the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchRecord {
    /// Offset in the disk, in bytes.
    pub start: u64,
    /// One past its last byte.
    pub end: u64,
    /// Bytes of the image laid out with it.
    pub position: u64,
    /// The digest of each chunk of the copy, `None` for zeroes.
    pub digests: Vec<Option<Digest>>,
    /// The same for the source, where the copy was amended.
    pub before: Option<Vec<Option<Digest>>>,
    /// The stored cells, where the format needs them to be laid out again.
    pub cells: Vec<Cell>,
}

impl BatchRecord {
    /// The record of `batch`, which ended at `position` of the image, with its cells when `cells_matter`.
    pub fn of(batch: &PackedBatch, position: u64, cells_matter: bool) -> Self {
        BatchRecord {
            start: batch.extent.start,
            end: batch.extent.end,
            position,
            digests: batch.digests.clone(),
            before: batch.before.clone(),
            cells: if cells_matter { batch.cells.clone() } else { Vec::new() },
        }
    }
}

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The job's parameters, as JSON; always the first record.
    Job(Vec<u8>),
    /// A batch was laid out and its bytes handed on.
    Batch(BatchRecord),
    /// Every byte of the image file below `position` is on stable storage.
    Synced {
        /// Bytes of the image.
        position: u64,
    },
    /// A multipart upload was begun.
    Upload {
        /// The store's id of it.
        id: String,
    },
    /// The store acknowledged a part, checksum included.
    Part(PartRecord),
    /// The store acknowledged the first part with the image's front in it, the last part to go.
    Front(PartRecord),
    /// The image is complete and safe, and only its name is missing.
    Sealed {
        /// Length of the image in bytes.
        bytes: u64,
        /// CRC-64/XZ of the image, where the destination keeps one.
        crc64: Option<u64>,
    },
    /// A later run went on from here: batches at or after `from`, and parts at or after `position`, are void.
    Resumed {
        /// Offset in the disk.
        from: u64,
        /// Bytes of the image.
        position: u64,
    },
}

/// A part as the store acknowledged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartRecord {
    /// Part number, from 1.
    pub number: u32,
    /// First byte of the image in it.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The store's tag of it.
    pub etag: String,
    /// CRC-64/XZ of its bytes; `None` where the store made the part from bytes it had.
    pub crc64: Option<u64>,
}

/// A journal open for appending; records may come from several threads.
pub struct Journal {
    path: PathBuf,
    out: Mutex<Out>,
}

struct Out {
    file: BufWriter<File>,
}

impl Journal {
    /// Starts a journal at `path`, replacing any, with the job's parameters.
    pub fn create(path: &Path, job: &[u8]) -> Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| failed(path, "create", error))?;
        let journal = Journal::on(path, file);
        journal.out().file.write_all(MAGIC).map_err(|error| failed(path, "write", error))?;
        journal.append(&Record::Job(job.to_vec()))?;
        journal.sync()?;
        Ok(journal)
    }

    /// Opens the journal at `path` to go on after `valid` bytes, the length [`replay`] returned.
    pub fn reopen(path: &Path, valid: u64) -> Result<Self> {
        let open = || {
            OpenOptions::new().write(true).open(path)?.set_len(valid)?;
            OpenOptions::new().append(true).open(path)
        };
        open().map(|file| Journal::on(path, file)).map_err(|error| failed(path, "open", error))
    }

    fn on(path: &Path, file: File) -> Self {
        let out = Out { file: BufWriter::with_capacity(1 << 18, file) };
        Journal { path: path.to_owned(), out: Mutex::new(out) }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a record; it reaches the disk at the next [`Journal::sync`].
    pub fn append(&self, record: &Record) -> Result<()> {
        let payload = encode(record);
        let length = u32::try_from(payload.len()).ok().filter(|n| *n <= MAX_RECORD).ok_or_else(|| {
            Error::new(Kind::Internal, "journal.record", format!("a record of {} bytes", payload.len()))
        })?;
        let mut out = self.out();
        let mut write = || {
            out.file.write_all(&length.to_le_bytes())?;
            out.file.write_all(&crc32c::crc32c(&payload).to_le_bytes())?;
            out.file.write_all(&payload)
        };
        write().map_err(|error| failed(&self.path, "write", error))?;
        // The record is written, nothing after it happens.
        #[cfg(feature = "fault-points")]
        if crate::unit::fault::reached("journal") {
            let _ = out.file.flush();
            crate::unit::fault::die();
        }
        Ok(())
    }

    /// Returns once every record appended is on stable storage.
    pub fn sync(&self) -> Result<()> {
        let mut out = self.out();
        out.file
            .flush()
            .and_then(|()| out.file.get_ref().sync_data())
            .map_err(|error| failed(&self.path, "sync", error))
    }
}

fn failed(path: &Path, verb: &str, error: std::io::Error) -> Error {
    Error::new(Kind::Destination, "journal.io", format!("cannot {verb} the journal {}", path.display()))
        .fact("path", path.display())
        .caused_by(error)
}

/// Reads the journal at `path` and hands each whole record to `each`, in order. Returns the length in bytes of the
/// valid part, after which a resumed run appends.
pub fn replay(path: &Path, mut each: impl FnMut(Record) -> Result<()>) -> Result<u64> {
    let file = File::open(path).map_err(|error| failed(path, "open", error))?;
    let mut input = BufReader::with_capacity(1 << 18, file);
    let mut magic = [0; MAGIC.len()];
    let whole = read_or_end(&mut input, &mut magic).map_err(|error| failed(path, "read", error))?;
    if !whole || magic != *MAGIC {
        return Err(Error::new(Kind::Image, "journal.magic", format!("{} cannot be used", path.display()))
            .because("it is not a journal of this version of haul")
            .remedy("remove it and start again without --resume"));
    }
    let mut valid = MAGIC.len() as u64;
    let mut payload = Vec::new();
    loop {
        let mut head = [0; 8];
        if !read_or_end(&mut input, &mut head).map_err(|error| failed(path, "read", error))? {
            break;
        }
        let [l0, l1, l2, l3, c0, c1, c2, c3] = head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length > MAX_RECORD {
            break;
        }
        payload.resize(length as usize, 0);
        let whole = read_or_end(&mut input, &mut payload).map_err(|error| failed(path, "read", error))?;
        if !whole || crc32c::crc32c(&payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
            break;
        }
        let Some(record) = decode(&payload) else { break };
        each(record)?;
        valid += 8 + u64::from(length);
    }
    Ok(valid)
}

/// Fills `buf`; false when the input ends before.
fn read_or_end(input: &mut impl Read, buf: &mut [u8]) -> std::io::Result<bool> {
    match input.read_exact(buf) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

const COMPRESSED: u32 = 1 << 31;
/// Set in a part's number when its CRC-64 is not known.
const NO_CRC: u64 = 1 << 63;

fn encode(record: &Record) -> Vec<u8> {
    let mut to = Vec::new();
    match record {
        Record::Job(json) => {
            to.push(0);
            to.extend_from_slice(json);
        }
        Record::Batch(batch) => {
            to.push(1);
            put_u64s(&mut to, &[batch.start, batch.end, batch.position]);
            put_digests(&mut to, &batch.digests);
            to.push(u8::from(batch.before.is_some()));
            if let Some(before) = &batch.before {
                put_digests(&mut to, before);
            }
            put_len(&mut to, batch.cells.len());
            for cell in &batch.cells {
                to.extend_from_slice(&cell.start.to_le_bytes());
                let flag = if cell.compressed { COMPRESSED } else { 0 };
                to.extend_from_slice(&(cell.stored | flag).to_le_bytes());
            }
        }
        Record::Synced { position } => {
            to.push(2);
            put_u64s(&mut to, &[*position]);
        }
        Record::Upload { id } => {
            to.push(3);
            to.extend_from_slice(id.as_bytes());
        }
        Record::Part(part) | Record::Front(part) => {
            to.push(if matches!(record, Record::Part(_)) { 4 } else { 7 });
            let flag = if part.crc64.is_none() { NO_CRC } else { 0 };
            let number = u64::from(part.number) | flag;
            put_u64s(&mut to, &[number, part.start, part.end, part.crc64.unwrap_or(0)]);
            to.extend_from_slice(part.etag.as_bytes());
        }
        Record::Resumed { from, position } => {
            to.push(5);
            put_u64s(&mut to, &[*from, *position]);
        }
        Record::Sealed { bytes, crc64 } => {
            to.push(6);
            put_u64s(&mut to, &[*bytes, u64::from(crc64.is_some()), crc64.unwrap_or(0)]);
        }
    }
    to
}

fn put_u64s(to: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|number| to.extend_from_slice(&number.to_le_bytes()));
}

fn put_len(to: &mut Vec<u8>, len: usize) {
    put_u64s(to, &[len as u64]);
}

fn put_digests(to: &mut Vec<u8>, digests: &[Option<Digest>]) {
    put_len(to, digests.len());
    for digest in digests {
        to.push(u8::from(digest.is_some()));
        if let Some(digest) = digest {
            to.extend_from_slice(&digest.0);
        }
    }
}

fn decode(payload: &[u8]) -> Option<Record> {
    let (kind, rest) = payload.split_first()?;
    let mut from = Fields(rest);
    Some(match kind {
        0 => Record::Job(rest.to_vec()),
        1 => Record::Batch(BatchRecord {
            start: from.u64()?,
            end: from.u64()?,
            position: from.u64()?,
            digests: from.digests()?,
            before: if from.u8()? == 0 { None } else { Some(from.digests()?) },
            cells: (0..from.u64()?)
                .map(|_| {
                    let start = from.u32()?;
                    let stored = from.u32()?;
                    Some(Cell { start, stored: stored & !COMPRESSED, compressed: stored & COMPRESSED != 0 })
                })
                .collect::<Option<_>>()?,
        }),
        2 => Record::Synced { position: from.u64()? },
        3 => Record::Upload { id: from.text()? },
        4 | 7 => {
            let (number, start, end, crc64) = (from.u64()?, from.u64()?, from.u64()?, from.u64()?);
            let crc64 = (number & NO_CRC == 0).then_some(crc64);
            let number = u32::try_from(number & !NO_CRC).ok()?;
            let part = PartRecord { number, start, end, crc64, etag: from.text()? };
            if *kind == 4 { Record::Part(part) } else { Record::Front(part) }
        }
        5 => Record::Resumed { from: from.u64()?, position: from.u64()? },
        6 => {
            let (bytes, known, crc64) = (from.u64()?, from.u64()?, from.u64()?);
            Record::Sealed { bytes, crc64: (known != 0).then_some(crc64) }
        }
        _ => return None,
    })
}

/// The fields of a payload not read yet; every read is bounded by what is there.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn digests(&mut self) -> Option<Vec<Option<Digest>>> {
        let len = to_usize(self.u64()?);
        if len > self.0.len() {
            return None;
        }
        (0..len)
            .map(|_| if self.u8()? == 0 { Some(None) } else { self.take().map(|d| Some(Digest(d))) })
            .collect()
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(std::mem::take(&mut self.0).to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digests() -> impl Strategy<Value = Vec<Option<Digest>>> {
        prop::collection::vec(prop::option::of(any::<[u8; 32]>().prop_map(Digest)), 0..40)
    }

    fn cell() -> impl Strategy<Value = Cell> {
        (any::<u32>(), 0..COMPRESSED, any::<bool>()).prop_map(|(start, stored, compressed)| Cell {
            start,
            stored,
            compressed,
        })
    }

    fn part() -> impl Strategy<Value = PartRecord> {
        (any::<u32>(), any::<u64>(), any::<u64>(), "\"[a-f0-9]{32}\"", any::<Option<u64>>())
            .prop_map(|(number, start, end, etag, crc64)| PartRecord { number, start, end, etag, crc64 })
    }

    fn record() -> impl Strategy<Value = Record> {
        prop_oneof![
            (any::<[u64; 3]>(), digests(), prop::option::of(digests()), prop::collection::vec(cell(), 0..40))
                .prop_map(|([start, end, position], digests, before, cells)| {
                    Record::Batch(BatchRecord { start, end, position, digests, before, cells })
                }),
            any::<u64>().prop_map(|position| Record::Synced { position }),
            "[a-zA-Z0-9~]{0,60}".prop_map(|id| Record::Upload { id }),
            (any::<bool>(), part())
                .prop_map(|(front, part)| { if front { Record::Front(part) } else { Record::Part(part) } }),
            (any::<u64>(), any::<u64>()).prop_map(|(from, position)| Record::Resumed { from, position }),
            (any::<u64>(), prop::option::of(any::<u64>()))
                .prop_map(|(bytes, crc64)| Record::Sealed { bytes, crc64 }),
        ]
    }

    proptest! {
        #[test]
        fn a_journal_cut_or_damaged_anywhere_yields_a_prefix_of_its_records(
            records in prop::collection::vec(record(), 0..12),
            cut in any::<prop::sample::Index>(),
            flip in prop::option::of((any::<prop::sample::Index>(), 0..8u32)),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            let journal = Journal::create(&path, b"{}").unwrap();
            records.iter().for_each(|record| journal.append(record).unwrap());
            journal.sync().unwrap();

            let mut bytes = std::fs::read(&path).unwrap();
            bytes.truncate(MAGIC.len() + cut.index(bytes.len() - MAGIC.len() + 1));
            if let (Some((at, bit)), true) = (flip, bytes.len() > MAGIC.len()) {
                let at = MAGIC.len() + at.index(bytes.len() - MAGIC.len());
                bytes[at] ^= 1 << bit;
            }
            std::fs::write(&path, &bytes).unwrap();

            let mut written = vec![Record::Job(b"{}".to_vec())];
            written.extend(records);
            let mut seen = Vec::new();
            let valid = replay(&path, |record| { seen.push(record); Ok(()) }).unwrap();
            prop_assert!(valid <= bytes.len() as u64);
            prop_assert_eq!(&seen[..], &written[..seen.len()]);
        }
    }

    #[test]
    fn a_resumed_journal_goes_on_after_its_last_whole_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = Journal::create(&path, b"{}").unwrap();
        journal.append(&Record::Synced { position: 1 }).unwrap();
        journal.sync().unwrap();
        drop(journal);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[9; 11]).unwrap();

        let valid = replay(&path, |_| Ok(())).unwrap();
        let journal = Journal::reopen(&path, valid).unwrap();
        journal.append(&Record::Synced { position: 2 }).unwrap();
        journal.sync().unwrap();

        let mut seen = Vec::new();
        replay(&path, |record| {
            seen.push(record);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen[1..], [Record::Synced { position: 1 }, Record::Synced { position: 2 }]);
    }

    #[test]
    fn a_part_whose_checksum_is_known_is_written_as_ever() {
        let part = PartRecord { number: 3, start: 16, end: 32, etag: "tag".into(), crc64: Some(5) };
        let mut old = vec![4];
        put_u64s(&mut old, &[3, 16, 32, 5]);
        old.extend_from_slice(b"tag");
        assert_eq!(encode(&Record::Part(part.clone())), old);
        let unknown = encode(&Record::Part(PartRecord { crc64: None, ..part }));
        assert_eq!(unknown[8], 0x80, "a version that does not know the flag must not take it for a part");
    }

    #[test]
    fn a_file_that_is_no_journal_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"something else entirely").unwrap();
        assert_eq!(replay(file.path(), |_| Ok(())).unwrap_err().id(), "journal.magic");
    }
}
