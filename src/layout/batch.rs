//! A batch of units of a volume with a bit for each: set when it is used. The last few batches are kept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::unit::{Extent, to_usize};

/// Batches kept: two readers at different places do not push each other out.
const CACHED: usize = 2;
/// Doubtful parts remembered by number.
const MAX_DOUBTS: usize = 4096;

/// Consecutive units of a volume, such as blocks, and which of them are used.
pub(super) struct Batch {
    extent: Extent,
    words: Vec<u64>,
}

impl Batch {
    /// The units of `extent`, all used or none. Takes an eighth of a byte a unit: the caller has bounded them.
    pub fn new(extent: Extent, used: bool) -> Self {
        let words = vec![if used { !0 } else { 0 }; to_usize(extent.len().div_ceil(64))];
        Batch { extent, words }
    }

    /// The units of `extent` by their bits, the first one in the lowest bit of the first word.
    pub fn of_words(extent: Extent, words: Vec<u64>) -> Self {
        Batch { extent, words }
    }

    /// One past the last unit.
    pub fn end(&self) -> u64 {
        self.extent.end
    }

    /// Makes the units of `run` used or unused; those outside the batch are left out.
    pub fn set(&mut self, run: Extent, used: bool) {
        let run = run.intersect(self.extent);
        let (mut at, end) = (run.start - self.extent.start, run.end - self.extent.start);
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let mask = (!0 >> (64 - (stop - at))) << (at % 64);
            if let Some(word) = self.words.get_mut(to_usize(at / 64)) {
                *word = if used { *word | mask } else { *word & !mask };
            }
            at = stop;
        }
    }

    /// The first run of used units at or after `from`, which lies in the batch.
    pub fn next_run(&self, from: u64) -> Option<Extent> {
        let first = self.extent.start;
        let end = self.extent.len();
        let start = self.find(from - first, 0).filter(|start| *start < end)?;
        let stop = self.find(start, !0).unwrap_or(end).min(end);
        Some(Extent::new(first + start, first + stop))
    }

    /// The first bit at or after `from` that is set in the words after `flip` turned them over.
    fn find(&self, from: u64, flip: u64) -> Option<u64> {
        let mut i = to_usize(from / 64);
        let mut word = (self.words.get(i)? ^ flip) & (!0 << (from % 64));
        while word == 0 {
            i += 1;
            word = self.words.get(i)? ^ flip;
        }
        Some(i as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

/// The batches last asked for, by number.
#[derive(Default)]
pub(super) struct Batches(Mutex<VecDeque<(u64, Arc<Batch>)>>);

impl Batches {
    /// Batch `number`, by `load` if it is not kept.
    pub fn get(&self, number: u64, load: impl FnOnce() -> Result<Batch>) -> Result<Arc<Batch>> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, batch)) = kept().iter().find(|(kept, _)| *kept == number) {
            return Ok(Arc::clone(batch));
        }
        let batch = Arc::new(load()?);
        let mut kept = kept();
        kept.truncate(CACHED - 1);
        kept.push_front((number, Arc::clone(&batch)));
        Ok(batch)
    }
}

/// The parts of a volume that are copied whole because they contradict themselves, and why.
#[derive(Default)]
pub(super) struct Doubts(Mutex<BTreeMap<u64, String>>);

impl Doubts {
    /// Remembers part `number`.
    pub fn add(&self, number: u64, why: String) {
        let mut doubts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if doubts.len() < MAX_DOUBTS {
            doubts.insert(number, why);
        }
    }

    /// What to tell a reader; `part` is what the parts are called, such as `block group`.
    pub fn findings(&self, part: &str) -> Vec<String> {
        let doubts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let finding = doubts.iter().next().map(|(number, why)| {
            let count = doubts.len();
            let s = if count == 1 { "" } else { "s" };
            format!("{count} {part}{s} copied whole; {part} {number}: {why}")
        });
        finding.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::unit::ExtentMap;

    proptest! {
        #[test]
        fn runs_of_a_batch_are_those_set(
            first in 0..200_u64,
            len in 1..300_u64,
            used: bool,
            sets in prop::collection::vec((0..600_u64, 0..200_u64, any::<bool>()), 0..12),
        ) {
            let extent = Extent::at(first, len);
            let mut batch = Batch::new(extent, used);
            let mut model = ExtentMap::new();
            if used {
                model.insert(extent);
            }
            for (start, len, used) in sets {
                let run = Extent::at(start, len);
                batch.set(run, used);
                let run = run.intersect(extent);
                if used { model.insert(run) } else { model.remove(run) }
            }
            let (mut from, mut runs) = (extent.start, ExtentMap::new());
            while from < batch.end() {
                let Some(run) = batch.next_run(from) else { break };
                prop_assert!(run.start >= from && !run.is_empty());
                runs.insert(run);
                from = run.end;
            }
            prop_assert_eq!(runs, model);
        }
    }
}
