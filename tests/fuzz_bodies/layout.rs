//! Bytes as a disk: its partition table, what its partitions hold, and the bytes in use. Every map of a file system or
//! volume manager is reached from here.

use std::collections::BTreeSet;
use std::sync::Arc;

use haul::io::ReadAt;
use haul::layout::{self, Usage};
use haul::unit::{Extent, Extents};

use super::watched::Watched;
use super::{Outcome, input, words};

/// Longest disk, in bytes: what a map reads grows with it.
const LONGEST: u64 = 2 << 30;
/// Runs of used bytes that are looked at.
const RUNS: usize = 20_000;

/// Takes `bytes` as a disk: its used map is made and walked within bounds, whatever it holds. It is fine when some map
/// of it is used, broken when it is copied whole.
pub fn fuzz_layout(bytes: &[u8]) -> Outcome {
    let file = input::disk(bytes, LONGEST);
    let size = file.size();
    let disk: Arc<dyn ReadAt> =
        Arc::new(Watched::within(file, 400_000, 4 * size.min(64 << 20) + (512 << 20)));
    let map = layout::used_map(Arc::clone(&disk)).unwrap_or_else(|error| panic!("{error:?}"));
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size && runs.len() < RUNS {
        let Some(run) = map.next_extent(at).unwrap() else { break };
        assert!(at <= run.start && run.start < run.end && run.end <= size, "{at}: {run:?} of {size}");
        runs.push(run);
        at = run.end;
    }
    // The same places give the same answers in any order.
    for run in runs.iter().rev().take(50).chain(runs.iter().take(50)) {
        assert_eq!(map.next_extent(run.start).unwrap(), Some(*run));
        let middle = run.start + run.len() / 2;
        assert_eq!(map.next_extent(middle).unwrap().map(|run| run.start), Some(middle), "within {run:?}");
    }
    assert!(map.used_bytes() <= size, "{} of {size} bytes are used", map.used_bytes());
    let mut seen = BTreeSet::new();
    for volume in map.volumes() {
        let usage = match &volume.usage {
            Usage::Mapped { used_bytes } => {
                assert!(*used_bytes <= volume.extent.len(), "{used_bytes} bytes of {:?}", volume.extent);
                "mapped".to_owned()
            }
            Usage::Whole { reason } => words(reason),
        };
        assert!(
            volume.logical.is_some() || Extent::new(0, size).contains(volume.extent),
            "{:?}",
            volume.extent
        );
        seen.insert(format!("{}: {usage}", volume.content.name()));
    }
    seen.extend(map.findings().into_iter().map(|finding| words(&finding.what)));
    for found in layout::logical_volumes(&disk).unwrap_or_default() {
        if let Ok(volume) = found.volume {
            let n = usize::try_from(volume.size().min(512)).unwrap();
            let _ = volume.read_at(&mut vec![0; n], volume.size() - n as u64);
        }
    }
    let is_mapped = map.volumes().iter().any(|volume| matches!(volume.usage, Usage::Mapped { .. }));
    let seen: Vec<String> = seen.into_iter().take(6).collect();
    if is_mapped { Outcome::Fine(seen.join("; ")) } else { Outcome::Broken(seen.join("; ")) }
}
