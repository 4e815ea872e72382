//! The log trees: what fsync made safe since the last transaction. Neither their blocks nor the data that only they
//! refer to are in the extent tree until the next mount has replayed them.

use super::tree::{Fs, Key, Pointer, Seen, kind, owner};
use super::{Step, require};
use crate::io::ReadAt;
use crate::layout::field::{bytes, le64};
use crate::unit::{Extent, ExtentMap};

/// Most runs that the log trees may refer to: 4 MiB of them.
const MAX_RUNS: usize = 1 << 18;
/// Length of an item that refers to data on the disk.
const EXTENT_DATA: usize = 53;
const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const PREALLOCATED: u8 = 2;

/// The addresses that the log trees take and refer to; none when there is nothing to be replayed.
pub(super) fn logged<D: ReadAt>(fs: &Fs<D>) -> Step<ExtentMap> {
    let Some(root) = fs.sb.log_root() else { return Ok(ExtentMap::new()) };
    let mut logged = Logged { fs, runs: Vec::new() };
    let mut trees = Vec::new();
    fs.walk(root, Key::first_of(0)..Key::MAX, &mut |seen| match seen {
        Seen::Block(address) => logged.block(address),
        Seen::Item(key, item) => {
            require(key.kind == kind::ROOT, || format!("its log has an item of kind {}", key.kind))?;
            trees.push(Pointer::of_root_item(item, owner::LOG)?);
            logged.bound(trees.len())
        }
    })?;
    for tree in trees {
        fs.walk(tree, Key::first_of(0)..Key::MAX, &mut |seen| match seen {
            Seen::Block(address) => logged.block(address),
            Seen::Item(key, item) if key.kind == kind::EXTENT_DATA => logged.data(item),
            Seen::Item(..) => Ok(()),
        })?;
    }
    logged.runs.sort_unstable();
    Ok(logged.runs.into_iter().collect())
}

struct Logged<'a, D> {
    fs: &'a Fs<D>,
    runs: Vec<Extent>,
}

impl<D: ReadAt> Logged<'_, D> {
    fn bound(&self, count: usize) -> Step<()> {
        require(count <= MAX_RUNS, || "its log is too long".into())
    }

    fn add(&mut self, run: Extent) -> Step<()> {
        let sound = !run.is_empty() && self.fs.chunks.holding(run).is_some();
        require(sound, || format!("its log refers to {run:?}, which is in no chunk"))?;
        self.runs.push(run);
        self.bound(self.runs.len())
    }

    fn block(&mut self, address: u64) -> Step<()> {
        self.add(Extent::at(address, self.fs.sb.node_size))
    }

    /// What an item of a file refers to.
    fn data(&mut self, item: &[u8]) -> Step<()> {
        let [form] = bytes(item, 20);
        let sound = match form {
            INLINE => true,
            REGULAR | PREALLOCATED => item.len() == EXTENT_DATA,
            _ => false,
        };
        require(sound, || format!("its log has data of form {form}"))?;
        let (address, len) = (le64(item, 21), le64(item, 29));
        // A hole has no address.
        if form == INLINE || address == 0 { Ok(()) } else { self.add(Extent::at(address, len)) }
    }
}
