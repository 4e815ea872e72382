//! The transactions of a log: their items, put together from the operations of its records ("XFS Filesystem Structure",
//! "Log Operations"; `xfs_log_format.h` of Linux).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::changes::{BUFFER, Changes, INODE};
use super::{CLIENT_LOG, Step, UNMOUNT, holds, strange};
use crate::layout::field::{be32, bytes, le16, le32};
use crate::unit::to_usize;

/// Bytes of an operation's header.
const HEADER: usize = 12;
/// The client that logs transactions.
const CLIENT_TRANSACTION: u8 = 0x69;
/// Flags of an operation: it begins or commits a transaction; its region goes on in the next one; it goes on with the last
/// one's region, and ends it.
const START: u8 = 0x1;
const COMMIT: u8 = 0x2;
const GOES_ON: u8 = 0x4;
const WENT_ON: u8 = 0x8;
const END: u8 = 0x10;
/// What a transaction's header begins with, and its length.
const TRANSACTION: u32 = 0x5452_414e;
const TRANSACTION_LEN: usize = 16;
/// The kinds of items (Linux 6.12), from an intent to free extents to one done that exchanges mappings.
const KINDS: RangeInclusive<u16> = 0x1236..=0x1249;
/// Most transactions under way at once, and most bytes of their items.
const MAX_OPEN: usize = 1024;
const MAX_BYTES: usize = 48 << 20;

/// A thing that a transaction changes: its format, and the regions that follow it.
pub(super) struct Item {
    pub kind: u16,
    pub format: Vec<u8>,
    /// Nothing but their number is kept of those of items that change no bytes.
    pub regions: Vec<Vec<u8>>,
}

/// A transaction that is not committed yet.
struct Transaction {
    /// Where the record is in which it began: the cycle above, the basic block below.
    lsn: u64,
    headed: bool,
    items: Vec<Item>,
    /// Regions of the last item still to come.
    left: u16,
    /// A region of which some is still to come.
    partial: Option<Vec<u8>>,
    /// What it takes in memory.
    bytes: usize,
}

/// The transactions under way, and what those changed that are committed.
#[derive(Default)]
pub(super) struct Transactions {
    open: BTreeMap<u32, Transaction>,
    /// Bytes of items of those under way.
    bytes: usize,
    changes: Changes,
}

impl Transactions {
    /// Takes in the `count` operations in `data` of the record at `lsn`.
    pub fn read(&mut self, data: &[u8], count: u32, lsn: u64) -> Step<()> {
        let mut rest = data;
        for _ in 0..count {
            let len = to_usize(be32(rest, 4).into());
            let [client, flags] = bytes::<2>(rest, 8);
            let body = rest.get(HEADER..).and_then(|rest| rest.split_at_checked(len));
            let Some((body, next)) = body else { return Err(strange("an operation is cut off")) };
            match client {
                CLIENT_TRANSACTION => self.operation(be32(rest, 0), flags, body, lsn)?,
                // The system was unmounted, and mounted again.
                CLIENT_LOG if flags & UNMOUNT != 0 => {}
                _ => return Err(strange("an operation is of no known client")),
            }
            rest = next;
        }
        Ok(())
    }

    /// What was changed by what is committed. A transaction still under way is none.
    pub fn changes(self) -> Changes {
        self.changes
    }

    fn operation(&mut self, id: u32, flags: u8, body: &[u8], lsn: u64) -> Step<()> {
        if flags & START != 0 {
            let sound = flags == START && body.is_empty() && self.open.len() < MAX_OPEN;
            let begun =
                Transaction { lsn, headed: false, items: Vec::new(), left: 0, partial: None, bytes: 0 };
            return holds(sound && self.open.insert(id, begun).is_none(), "a transaction begins oddly");
        }
        // One that began before the log's tail is where it belongs already.
        let Some(transaction) = self.open.get_mut(&id) else { return Ok(()) };
        if flags & COMMIT != 0 {
            let whole = transaction.left == 0 && transaction.partial.is_none();
            holds(flags == COMMIT && body.is_empty() && whole, "a transaction is committed unfinished")?;
            let Some(done) = self.open.remove(&id) else { return Ok(()) };
            self.bytes = self.bytes.saturating_sub(done.bytes);
            return self.changes.commit(done.lsn, &done.items);
        }
        holds(flags & !(GOES_ON | WENT_ON | END) == 0, "an operation's flags are not known")?;
        let taken = body.len() + size_of::<Item>();
        transaction.bytes += taken;
        self.bytes += taken;
        holds(self.bytes <= MAX_BYTES, "its transactions are too large")?;
        transaction.region(flags, body)
    }
}

impl Transaction {
    fn region(&mut self, flags: u8, body: &[u8]) -> Step<()> {
        let went_on = flags & WENT_ON != 0;
        let mut region = match self.partial.take() {
            partial if partial.is_some() != went_on => return Err(strange("a region goes on oddly")),
            partial => partial.unwrap_or_default(),
        };
        region.extend_from_slice(body);
        if flags & GOES_ON != 0 {
            self.partial = Some(region);
            return Ok(());
        }
        if !self.headed {
            self.headed = true;
            let sound = region.len() == TRANSACTION_LEN && le32(&region, 0) == TRANSACTION;
            return holds(sound, "a transaction has no header");
        }
        match self.items.last_mut().filter(|_| self.left > 0) {
            None => {
                let (kind, regions) = (le16(&region, 0), le16(&region, 2));
                holds(KINDS.contains(&kind) && regions > 0, "an item's kind is not known")?;
                self.left = regions - 1;
                self.items.push(Item { kind, format: region, regions: Vec::new() });
            }
            Some(item) => {
                self.left -= 1;
                let kept = matches!(item.kind, BUFFER | INODE);
                item.regions.push(if kept { region } else { Vec::new() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::Extent;

    /// An operation of transaction 7.
    fn operation(flags: u8, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[0, 0, 0, 7][..], &len, &[CLIENT_TRANSACTION, flags, 0, 0], body].concat()
    }

    /// The item of the buffer of one basic block at `block`, with the 128-byte chunks of `map` in `regions` regions.
    fn item(kind: u16, flags: u16, block: u64, map: u32, regions: usize) -> Vec<u8> {
        let count = u16::try_from(regions + 1).unwrap();
        let start = [kind, count, flags, 1].map(u16::to_le_bytes).concat();
        [&start[..], &block.to_le_bytes(), &1_u32.to_le_bytes(), &map.to_le_bytes()].concat()
    }

    /// A transaction with one item and its regions.
    fn transaction(item: &[u8], regions: &[&[u8]]) -> Vec<Vec<u8>> {
        let header = [&TRANSACTION.to_le_bytes()[..], &[0; 12]].concat();
        let mut operations = vec![operation(START, &[]), operation(0, &header), operation(0, item)];
        operations.extend(regions.iter().map(|region| operation(0, region)));
        operations.push(operation(COMMIT, &[]));
        operations
    }

    /// What records of these operations change.
    fn changes(records: &[Vec<Vec<u8>>]) -> Option<Changes> {
        let mut transactions = Transactions::default();
        for (lsn, operations) in (1 << 32..).zip(records) {
            transactions.read(&operations.concat(), u32::try_from(operations.len()).unwrap(), lsn).ok()?;
        }
        Some(transactions.changes())
    }

    /// The chunks of the buffer at `block`: their numbers and first bytes.
    fn chunks(changes: &Changes, block: u64) -> Vec<(u64, u8)> {
        let buffer = changes.buffers.get(&block).into_iter();
        buffer
            .flat_map(|buffer| buffer.chunks.iter().map(|(number, (_, bytes))| (*number, bytes[0])))
            .collect()
    }

    #[test]
    fn committed_chunks_are_changes_the_last_ones_of_each() {
        let first = transaction(&item(BUFFER, 0x2800, 8, 0b1011, 2), &[&[1; 256], &[2; 128]]);
        let second = transaction(&item(BUFFER, 0x2800, 8, 0b0010, 1), &[&[3; 128]]);
        let found = changes(&[first.clone(), second]).unwrap();
        assert_eq!(chunks(&found, 8), [(0, 1), (1, 3), (3, 2)]);
        assert_eq!(found.extents().collect::<Vec<_>>(), [Extent::at(8 * 512, 512)]);
        // A record ends anywhere between two operations.
        for cut in 1..first.len() {
            let found = changes(&[first[..cut].to_vec(), first[cut..].to_vec()]).unwrap();
            assert_eq!(chunks(&found, 8), [(0, 1), (1, 1), (3, 2)], "{cut}");
        }
        // What is not committed is no change, nor is what goes on from before the log's tail.
        assert!(changes(&[first[..5].to_vec()]).unwrap().buffers.is_empty());
        assert!(changes(&[first[1..].to_vec()]).unwrap().buffers.is_empty());
    }

    #[test]
    fn a_region_may_be_cut_anywhere() {
        let item = item(BUFFER, 0x2800, 8, 0b11, 1);
        let region: Vec<u8> = [[1; 128], [2; 128]].concat();
        let whole = transaction(&item, &[&region]);
        for cut in 0..=region.len() {
            let pieces = [operation(GOES_ON, &region[..cut]), operation(WENT_ON | END, &region[cut..])];
            let cut_up = [&whole[..3], &pieces, &whole[4..]].concat();
            assert_eq!(chunks(&changes(&[cut_up]).unwrap(), 8), [(0, 1), (1, 2)], "{cut}");
        }
        let odd = [&whole[..3], &[operation(WENT_ON | END, &region)], &whole[4..]].concat();
        assert!(changes(&[odd]).is_none(), "it goes on with nothing");
        let odd = [&whole[..3], &[operation(GOES_ON, &region)], &whole[4..]].concat();
        assert!(changes(&[odd]).is_none(), "it does not go on");
    }

    #[test]
    fn a_cancelled_buffer_has_no_changes_but_later_ones() {
        let change = transaction(&item(BUFFER, 0x2800, 8, 0b1, 1), &[&[1; 128]]);
        let cancel = transaction(&item(BUFFER, 0x2802, 8, 0, 0), &[]);
        let again = transaction(&item(BUFFER, 0x2800, 8, 0b10, 1), &[&[2; 128]]);
        assert!(changes(&[change.clone(), cancel.clone()]).unwrap().buffers.is_empty());
        assert_eq!(chunks(&changes(&[change, cancel, again]).unwrap(), 8), [(1, 2)]);
    }

    #[test]
    fn what_is_not_known_for_certain_is_no_change() {
        let chunk: &[u8] = &[5; 128];
        for (what, operations) in [
            ("a region of no chunk", transaction(&item(BUFFER, 0, 8, 0b10, 1), &[&[5; 256]])),
            ("half a chunk", transaction(&item(BUFFER, 0, 8, 0b10, 1), &[&[5; 64]])),
            ("a chunk behind the buffer", transaction(&item(BUFFER, 0, 8, 0b1_0000, 1), &[chunk])),
            ("a region too few", transaction(&item(BUFFER, 0, 8, 0b1010, 1), &[chunk])),
            ("regions left out", transaction(&item(BUFFER, 0, 8, 0b1010, 2), &[chunk])),
            ("another kind", transaction(&item(0x1250, 0, 8, 0b10, 1), &[chunk])),
            ("an inode cut off", transaction(&item(INODE, 0, 8, 0b10, 1), &[chunk])),
            ("an item without an end", transaction(&item(BUFFER, 0, 8, 0b10, 1)[..10], &[chunk])),
            ("a place beyond all disks", transaction(&item(BUFFER, 0, u64::MAX / 512, 0b10, 1), &[chunk])),
        ] {
            assert!(changes(&[operations]).is_none(), "{what}");
        }
        let sound = transaction(&item(BUFFER, 0, 8, 0b10, 1), &[chunk]);
        assert!(changes(&[vec![sound[0].clone(), sound[0].clone()]]).is_none(), "begun twice");
        assert!(changes(&[[&sound[..1], &sound[2..]].concat()]).is_none(), "without a header");
        let bytes = sound.concat();
        for len in 0..bytes.len() {
            let read = Transactions::default().read(&bytes[..len], 5, 1);
            assert!(read.is_err(), "cut off after {len} bytes");
        }
    }
}
