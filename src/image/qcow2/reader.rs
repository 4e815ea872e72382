//! The virtual disk of a qcow2 image, read from any thread.

use std::sync::{Arc, Mutex, PoisonError};

use super::header::{Compression, bad_field, feature};
use super::metadata::Metadata;
use super::table::{Entries, Geometry, Mapping, OFFSET_MASK};
use super::unpack::Unpacker;
use crate::error::{Error, Result};
use crate::image::cache::Cache;
use crate::image::sparse::Sparse;
use crate::io::{ReadAt, check_range, read_vec};
use crate::unit::{Extent, MIB, to_usize};

/// Bytes of L2 tables kept in memory: at 64 KiB clusters they map 128 GiB of the virtual disk.
const TABLE_CACHE: usize = 16 << 20;
/// Bytes of unpacked clusters kept in memory, for reads of less than a cluster.
const CLUSTER_CACHE: usize = 8 << 20;
/// The most compressed bytes read at once for clusters that follow, in bytes.
const READ_AHEAD: u64 = MIB;
/// The longest run of data reported at once, in bytes: it bounds what one question about data looks at.
const LONGEST_RUN: u64 = 16 * MIB;

/// The virtual disk of one image. Holds the L1 table (at most 32 MiB), the two caches, and for each thread that
/// reads compressed clusters at once a decompressor with up to 4 MiB of input.
pub struct Reader {
    name: String,
    size: u64,
    entries: Entries,
    compression: Compression,
    /// Metadata and compressed clusters.
    file: Arc<Sparse>,
    /// Plain clusters.
    data: Arc<Sparse>,
    backing: Option<Arc<dyn ReadAt>>,
    /// Offsets of L2 tables, 0 for none.
    l1: Vec<u64>,
    tables: Cache<[u64]>,
    clusters: Cache<[u8]>,
    unpackers: Mutex<Vec<Unpacker>>,
}

/// A piece of the virtual disk that comes from one place.
struct Run {
    mapping: Mapping,
    len: u64,
}

impl Reader {
    /// The disk of the image on `file`, of which `metadata` was read and not refused; `data` is its external data
    /// file and `backing` its backing file's disk, if it has them. Reads and checks the L1 table.
    pub fn new(
        file: Arc<dyn ReadAt>,
        metadata: &Metadata,
        data: Option<Arc<dyn ReadAt>>,
        backing: Option<Arc<dyn ReadAt>>,
    ) -> Result<Self> {
        let header = &metadata.header;
        let name = file.name();
        let geometry = header.geometry();
        let needed = geometry.l1_entries(header.virtual_size);
        let table = Extent::at(header.l1_offset, needed * 8);
        if table.end > file.size() {
            let why = format!("{needed} entries lie beyond the end of the file at {}", file.size());
            return Err(bad_field(&name, "l1_table_offset", 40, why));
        }
        let bytes = read_vec(&file, table.start, to_usize(table.len()))?;
        let l1: Vec<u64> =
            bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry) & OFFSET_MASK).collect();
        check_l1(&name, &l1, table, geometry, file.size())?;
        let file = Sparse::new(file);
        Ok(Reader {
            name,
            size: header.virtual_size,
            entries: Entries {
                geometry,
                version: header.version,
                external: header.incompatible & feature::DATA_FILE != 0,
            },
            compression: header.compression,
            data: data.map_or_else(|| Arc::clone(&file), Sparse::new),
            file,
            backing,
            l1,
            tables: Cache::new(TABLE_CACHE),
            clusters: Cache::new(CLUSTER_CACHE),
            unpackers: Mutex::default(),
        })
    }

    /// The L2 table that L1 entry `index` names; `None` if it maps nothing.
    fn table(&self, index: usize) -> Result<Option<Arc<[u64]>>> {
        let offset = self.l1[index];
        if offset == 0 {
            return Ok(None);
        }
        if let Some(table) = self.tables.get(offset) {
            return Ok(Some(table));
        }
        let whole = Extent::at(offset, self.entries.geometry.cluster_size());
        // A table in a hole of a sparse file maps nothing: terabytes of such tables cost no reading.
        if self.file.data_in(whole)?.is_none() {
            return Ok(None);
        }
        let bytes = read_vec(&self.file.file, offset, to_usize(whole.len()))?;
        let table: Arc<[u64]> =
            bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        self.tables.put(offset, Arc::clone(&table), bytes.len());
        Ok(Some(table))
    }

    fn bad_entry(&self, index: usize, entry: usize, why: impl Into<String>) -> Error {
        let offset = self.l1[index] + entry as u64 * 8 * self.entries.geometry.entry_words();
        bad_field(&self.name, "L2 entry", offset, why)
    }

    /// The run of the virtual disk at `at`, not beyond `limit` (at < limit <= size).
    fn run_at(&self, at: u64, limit: u64) -> Result<Run> {
        let geometry = self.entries.geometry;
        let span = geometry.l2_span();
        let index = to_usize(at / span);
        let Some(table) = self.table(index)? else {
            let none = self.l1[index + 1..].iter().take_while(|offset| **offset == 0).count();
            let end = (index as u64 + 1 + none as u64).saturating_mul(span).min(limit);
            return Ok(Run { mapping: Mapping::Unallocated, len: end - at });
        };
        let limit = limit.min((index as u64 + 1).saturating_mul(span));
        let unit = geometry.unit();
        let words = to_usize(geometry.entry_words());
        let units_per_entry = geometry.cluster_size() / unit;

        let mut end = at;
        let mut first = None;
        while end < limit {
            let nth = end % span / unit;
            let entry = to_usize(nth / units_per_entry);
            let bitmap = if words == 2 { table[entry * 2 + 1] } else { 0 };
            let decoded = self.entries.decode(table[entry * words], bitmap, nth % units_per_entry);
            let mapping = decoded.map_err(|why| self.bad_entry(index, entry, why))?;
            let unit_end = (end / unit + 1).saturating_mul(unit).min(limit);
            let mapping = match mapping {
                Mapping::Plain(host) => Mapping::Plain(host + end % unit),
                other => other,
            };
            let goes_on = match (first, mapping) {
                (None, Mapping::Compressed(packed)) => {
                    if packed.start >= self.file.file.size() {
                        let why =
                            format!("compressed bytes at {} lie beyond the end of the file", packed.start);
                        return Err(self.bad_entry(index, entry, why));
                    }
                    let cluster_end =
                        (at / geometry.cluster_size() + 1).saturating_mul(geometry.cluster_size());
                    return Ok(Run { mapping, len: cluster_end.min(limit) - at });
                }
                (None, Mapping::Plain(host)) if host + (unit_end - end) > self.data.file.size() => {
                    let why = format!(
                        "the cluster at {host} ends beyond the end of the file at {}",
                        self.data.file.size()
                    );
                    return Err(self.bad_entry(index, entry, why));
                }
                (None, _) => true,
                (Some(Mapping::Plain(start)), Mapping::Plain(host)) => {
                    host == start + (end - at) && host + (unit_end - end) <= self.data.file.size()
                }
                (Some(first), mapping) => first == mapping && !matches!(mapping, Mapping::Compressed(_)),
            };
            if !goes_on {
                break;
            }
            first = first.or(Some(mapping));
            end = unit_end;
        }
        Ok(Run { mapping: first.unwrap_or(Mapping::Unallocated), len: end - at })
    }

    /// What may be data in the run at `at`, and where the run ends.
    fn data_in_run(&self, at: u64) -> Result<(Option<Extent>, u64)> {
        let run = self.run_at(at, self.size)?;
        let whole = Extent::at(at, run.len);
        let data = match (run.mapping, &self.backing) {
            (Mapping::Zero, _) | (Mapping::Unallocated, None) => None,
            (Mapping::Unallocated, Some(backing)) => backing.next_data(at)?,
            // A preallocated image maps every cluster, and its file is a hole where nothing was written.
            (Mapping::Plain(host), _) => {
                let data = self.data.data_in(Extent::at(host, run.len))?;
                data.map(|data| Extent::at(at + (data.start - host), data.len()))
            }
            (Mapping::Compressed(_), _) => Some(whole),
        };
        Ok((data.map(|data| data.intersect(whole)).filter(|data| !data.is_empty()), whole.end))
    }

    fn read_backing(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let inside = to_usize(backing.size().saturating_sub(at).min(buf.len() as u64));
        let (inside, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { backing.read_at(inside, at) }
    }

    /// Reads the part of a compressed cluster at `at`; `remaining` bytes of the disk are still wanted from there.
    fn read_compressed(
        &self,
        unpacker: &mut Unpacker,
        buf: &mut [u8],
        at: u64,
        packed: Extent,
        remaining: u64,
    ) -> Result<()> {
        let cluster_size = self.entries.geometry.cluster_size();
        let packed = Extent::new(packed.start, packed.end.min(self.file.file.size()));
        let mut unpack = |cluster: &mut [u8]| {
            let ahead = remaining.min(READ_AHEAD);
            unpacker.unpack(&*self.file.file, packed, ahead, cluster)?.map_err(|why| {
                bad_field(&self.name, "compressed cluster", packed.start, why).fact("disk_offset", at)
            })
        };
        if buf.len() as u64 == cluster_size {
            return unpack(buf);
        }
        let key = at / cluster_size;
        let cluster = match self.clusters.get(key) {
            Some(cluster) => cluster,
            None => {
                let mut cluster = vec![0; to_usize(cluster_size)];
                unpack(&mut cluster)?;
                let cluster: Arc<[u8]> = cluster.into();
                self.clusters.put(key, Arc::clone(&cluster), cluster.len());
                cluster
            }
        };
        let from = to_usize(at % cluster_size);
        buf.copy_from_slice(&cluster[from..from + buf.len()]);
        Ok(())
    }

    fn unpackers(&self) -> std::sync::MutexGuard<'_, Vec<Unpacker>> {
        self.unpackers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every L2 table must be a whole cluster of the file, apart from the header, the L1 table and every other one:
/// so the tables of an image are no larger than its file, and looking through them ends.
fn check_l1(name: &str, l1: &[u64], table: Extent, geometry: Geometry, file_size: u64) -> Result<()> {
    let bad = |i: usize, why: String| Err(bad_field(name, "L1 entry", table.start + i as u64 * 8, why));
    for (i, offset) in l1.iter().enumerate().filter(|(_, offset)| **offset != 0) {
        let l2 = Extent::at(*offset, geometry.cluster_size());
        if !offset.is_multiple_of(geometry.cluster_size()) {
            return bad(i, format!("{offset} is no cluster boundary"));
        }
        if l2.end > file_size {
            return bad(
                i,
                format!("the L2 table at {offset} ends beyond the end of the file at {file_size}"),
            );
        }
        if !l2.intersect(table).is_empty() {
            return bad(i, format!("the L2 table at {offset} overlaps the L1 table"));
        }
    }
    let mut used: Vec<(u64, usize)> =
        l1.iter().enumerate().filter(|(_, offset)| **offset != 0).map(|(i, offset)| (*offset, i)).collect();
    used.sort_unstable();
    match used.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => {
            bad(pair[1].1, format!("the L2 table at {} is entry {}'s already", pair[1].0, pair[0].1))
        }
        None => Ok(()),
    }
}

impl ReadAt for Reader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let end = offset + buf.len() as u64;
        let mut unpacker = None;
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let run = self.run_at(at, end)?;
            let (part, after) = rest.split_at_mut(to_usize(run.len));
            match run.mapping {
                Mapping::Zero => part.fill(0),
                Mapping::Unallocated => self.read_backing(part, at)?,
                Mapping::Plain(host) => self.data.file.read_at(part, host)?,
                Mapping::Compressed(packed) => {
                    let unpacker = unpacker.get_or_insert_with(|| {
                        let kept = self.unpackers().pop();
                        kept.unwrap_or_else(|| Unpacker::new(self.compression))
                    });
                    self.read_compressed(unpacker, part, at, packed, end - at)?;
                }
            }
            at += run.len;
            rest = after;
        }
        self.unpackers().extend(unpacker);
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        let mut found: Option<Extent> = None;
        let mut at = from;
        while at < self.size {
            let (data, end) = self.data_in_run(at)?;
            found = match (found, data) {
                (None, data) => data,
                (Some(found), Some(data)) if data.start == found.end => {
                    Some(Extent::new(found.start, data.end))
                }
                (Some(_), _) => return Ok(found),
            };
            if found.is_some_and(|found| found.end < end || found.len() >= LONGEST_RUN) {
                return Ok(found);
            }
            at = end;
        }
        Ok(found)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
