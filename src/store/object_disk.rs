//! An object read like a disk: ranged GETs held to one version of it, a bounded cache, read-ahead for runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{ObjectInfo, ObjectStore, errors};
use crate::error::Result;
use crate::io::{ReadAt, check_range};
use crate::unit::{Extent, MIB, to_usize};

/// What is fetched and cached as one, in bytes, by a disk that is mostly read from front to back.
const BLOCK: u64 = MIB;

/// Most blocks fetched by one request.
const AHEAD: u64 = 8;

/// An object as a disk. Any write to the object after opening makes reads fail.
pub struct ObjectDisk {
    store: Arc<dyn ObjectStore>,
    key: String,
    info: ObjectInfo,
    /// What is fetched and cached as one, in bytes.
    block_size: u64,
    /// Most blocks kept.
    capacity: usize,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    /// Block number, then when it was last used and its bytes.
    blocks: HashMap<u64, (u64, Bytes)>,
    now: u64,
}

impl Cache {
    fn get(&mut self, block: u64) -> Option<Bytes> {
        self.now += 1;
        let (used, bytes) = self.blocks.get_mut(&block)?;
        *used = self.now;
        Some(bytes.clone())
    }

    fn put(&mut self, block: u64, bytes: Bytes, capacity: usize) {
        self.now += 1;
        while self.blocks.len() >= capacity {
            let oldest = self.blocks.iter().min_by_key(|(_, (used, _))| *used).map(|(block, _)| *block);
            oldest.and_then(|block| self.blocks.remove(&block));
        }
        self.blocks.insert(block, (self.now, bytes));
    }
}

impl ObjectDisk {
    /// Opens an object, keeping at most `cache` bytes of it (at least 2 MiB) in memory.
    pub fn open(store: Arc<dyn ObjectStore>, key: &str, cache: u64) -> Result<Self> {
        Self::in_blocks(store, key, cache, BLOCK)
    }

    /// The same, fetching `block_size` bytes at a time (4 KiB to 1 MiB, a power of two): less than 1 MiB for reads that
    /// are few and far between.
    pub fn in_blocks(store: Arc<dyn ObjectStore>, key: &str, cache: u64, block_size: u64) -> Result<Self> {
        let info = store.head(key)?.ok_or_else(|| errors::no_object(&store.name(key)))?;
        let capacity = to_usize((cache / block_size).max(2));
        Ok(ObjectDisk { store, key: key.to_owned(), info, block_size, capacity, cache: Mutex::default() })
    }

    /// What the store said about the object when it was opened.
    pub fn info(&self) -> &ObjectInfo {
        &self.info
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many blocks to fetch from `block` on: as many as were read just before it, up to one that is there.
    fn run_length(&self, block: u64) -> u64 {
        let cache = self.cache();
        let most = AHEAD.min(self.capacity as u64 / 2);
        let before =
            (1..=most).take_while(|n| block >= *n && cache.blocks.contains_key(&(block - n))).count();
        (1..(before as u64).max(1)).take_while(|n| !cache.blocks.contains_key(&(block + n))).count() as u64
            + 1
    }

    fn block(&self, block: u64) -> Result<Bytes> {
        if let Some(bytes) = self.cache().get(block) {
            return Ok(bytes);
        }
        let run = Extent::at(block * self.block_size, self.run_length(block) * self.block_size)
            .intersect(Extent::new(0, self.info.size));
        let fetched = self.store.get(&self.key, run, Some(&self.info.etag))?;
        let mut cache = self.cache();
        // A copy of each: a slice would keep the whole run in memory.
        for (bytes, number) in fetched.chunks(to_usize(self.block_size)).zip(block..) {
            cache.put(number, Bytes::copy_from_slice(bytes), self.capacity);
        }
        drop(cache);
        Ok(fetched.slice(..to_usize(self.block_size).min(fetched.len())))
    }
}

impl ReadAt for ObjectDisk {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let block = self.block(at / self.block_size)?;
            let bytes = &block[to_usize(at % self.block_size)..];
            let n = bytes.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&bytes[..n]);
            done += n;
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.store.name(&self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::io::read_vec;
    use crate::store::memory::Memory;

    fn disk(size: usize, cache: u64) -> (Arc<Memory>, Vec<u8>, ObjectDisk) {
        let store = Arc::new(Memory::new("b"));
        let bytes: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
        store.put("disk", bytes.clone().into()).unwrap();
        let disk = ObjectDisk::open(store.clone(), "disk", cache).unwrap();
        (store, bytes, disk)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn reads_are_the_objects_bytes_within_the_cache(
            size in 1usize..9_000_000, cache in 0u64..6, reads in prop::collection::vec((0.0..1.0f64, 0usize..3_000_000), 1..12),
        ) {
            let (_, bytes, disk) = disk(size, cache * MIB);
            for (at, len) in reads {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in the test's object")]
                let at = (at * size as f64) as usize;
                let len = len.min(size - at);
                prop_assert_eq!(read_vec(&disk, at as u64, len).unwrap(), &bytes[at..at + len]);
                prop_assert!(disk.cache().blocks.len() <= (to_usize(cache)).max(2));
            }
        }
    }

    #[test]
    fn a_run_is_fetched_once_and_ahead_and_a_jump_costs_one_block() {
        let (store, _, disk) = disk(32 << 20, 16 * MIB);
        for at in (0..16u64 << 20).step_by(64 << 10) {
            read_vec(&disk, at, 64 << 10).unwrap();
        }
        assert!((16 * MIB..=24 * MIB).contains(&store.read()), "{} bytes read", store.read());
        let before = store.read();
        read_vec(&disk, 30 << 20, 512).unwrap();
        assert_eq!(store.read() - before, MIB);
    }

    #[test]
    fn small_blocks_fetch_no_more_than_they_must() {
        let (store, bytes, _) = disk(8 << 20, 0);
        let disk = ObjectDisk::in_blocks(store.clone(), "disk", MIB, 64 << 10).unwrap();
        for at in [5_u64 << 20, 1 << 20, 7 << 20] {
            let before = store.read();
            assert_eq!(read_vec(&disk, at, 64 << 10).unwrap(), &bytes[to_usize(at)..][..64 << 10]);
            assert_eq!(store.read() - before, 64 << 10);
        }
    }

    #[test]
    fn an_object_that_changes_fails_the_read() {
        let (store, _, disk) = disk(4 << 20, 0);
        read_vec(&disk, 0, 512).unwrap();
        store.put("disk", vec![1; 4 << 20].into()).unwrap();
        let error = read_vec(&disk, 3 << 20, 512).unwrap_err();
        assert_eq!((error.kind(), error.id()), (Kind::Source, "store.changed"));
    }
}
