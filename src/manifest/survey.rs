//! What a journal proves: the job, what is safe at the destination, and the batches that still count.

use std::path::Path;

use super::journal::{BatchRecord, PartRecord, Record, replay};
use crate::error::Result;

/// One reading of a journal.
#[derive(Debug, Default)]
pub struct Survey {
    /// The job's parameters, as JSON.
    pub job: Vec<u8>,
    /// Bytes of the journal that are whole.
    pub valid: u64,
    /// Bytes of an image file that are on stable storage.
    pub synced: u64,
    /// The multipart upload begun last.
    pub upload: Option<String>,
    /// The parts acknowledged and not void, in the order of their numbers.
    pub parts: Vec<PartRecord>,
    /// The first part as it was sent, with the front in it.
    pub front: Option<PartRecord>,
    /// Length and CRC-64 of the image, once it was complete.
    pub sealed: Option<(u64, Option<u64>)>,
    /// For each resumption: the number of records before it, and the offset batches are void from.
    resumed: Vec<(u64, u64)>,
}

impl Survey {
    /// Reads the journal at `path`.
    pub fn of(path: &Path) -> Result<Self> {
        let mut survey = Survey::default();
        let mut records = 0;
        survey.valid = replay(path, |record| {
            match record {
                Record::Job(job) => survey.job = job,
                Record::Batch(_) => {}
                Record::Synced { position } => survey.synced = survey.synced.max(position),
                Record::Upload { id } => {
                    survey.upload = Some(id);
                    survey.parts.clear();
                }
                Record::Part(part) => {
                    survey.parts.retain(|old| old.number != part.number);
                    survey.parts.push(part);
                }
                Record::Front(part) => survey.front = Some(part),
                Record::Sealed { bytes, crc64 } => survey.sealed = Some((bytes, crc64)),
                Record::Resumed { from, position } => {
                    survey.sealed = None;
                    survey.front = None;
                    survey.parts.retain(|part| part.end <= position);
                    survey.resumed.push((records, from));
                }
            }
            records += 1;
            Ok(())
        })?;
        survey.parts.sort_by_key(|part| part.number);
        Ok(survey)
    }

    /// Hands the batches that still count to `each`, in the order of the disk, reading the journal at `path` again.
    pub fn batches(&self, path: &Path, mut each: impl FnMut(BatchRecord) -> Result<()>) -> Result<()> {
        let mut records = 0;
        replay(path, |record| {
            let at = records;
            records += 1;
            match record {
                Record::Batch(batch) if !self.is_void(at, batch.start) => each(batch),
                _ => Ok(()),
            }
        })
        .map(|_| ())
    }

    fn is_void(&self, record: u64, start: u64) -> bool {
        self.resumed.iter().any(|(at, from)| record < *at && start >= *from)
    }

    /// Bytes of the image that reached the store without a gap, from `front` on, where the first part after the
    /// one that holds the front begins.
    pub fn uploaded(&self, front: u64) -> u64 {
        self.parts.iter().fold(front, |end, part| if part.start == end { part.end } else { end })
    }
}

#[cfg(test)]
mod tests {
    use super::super::journal::Journal;
    use super::*;

    #[test]
    fn batches_after_the_point_a_later_run_went_on_from_are_void() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = Journal::create(&path, b"{}").unwrap();
        let batch =
            |start: u64| Record::Batch(BatchRecord { start, end: start + 1, ..BatchRecord::default() });
        let part = |number, start, end| {
            Record::Part(PartRecord { number, start, end, etag: String::new(), crc64: None })
        };
        for record in [
            batch(0),
            batch(1),
            batch(2),
            Record::Synced { position: 20 },
            part(2, 10, 20),
            part(4, 30, 40),
            Record::Resumed { from: 1, position: 20 },
            batch(1),
            batch(3),
            Record::Resumed { from: 3, position: 20 },
            batch(4),
        ] {
            journal.append(&record).unwrap();
        }
        journal.sync().unwrap();

        let survey = Survey::of(&path).unwrap();
        let mut starts = Vec::new();
        survey
            .batches(&path, |batch| {
                starts.push(batch.start);
                Ok(())
            })
            .unwrap();
        assert_eq!(starts, [0, 1, 4]);
        assert_eq!((survey.synced, survey.parts.len(), survey.uploaded(10)), (20, 1, 20));
    }
}
