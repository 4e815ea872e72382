//! The records that cover a log: a system that has nothing to log any more, such as one that is frozen, logs its
//! superblock twice so that the tail follows the head. Replaying these changes no block but the superblock
//! ("XFS Filesystem Structure", "Log Operations").

use super::Superblock;
use crate::layout::field::{bytes, le16, le32, le64};
use crate::unit::to_usize;

/// Bytes of a record's data that are looked at: as far as its first words of basic blocks are known.
const MAX: usize = 32 << 10;
/// Bytes of an operation's header.
const HEADER: usize = 12;
/// The client that logs transactions, and the flags of operations that begin and end one.
const CLIENT_TRANSACTION: u8 = 0x69;
const START: u8 = 0x1;
const COMMIT: u8 = 0x2;
/// What a transaction's header begins with, and its length.
const TRANSACTION: u32 = 0x5452_414e;
const TRANSACTION_LEN: usize = 16;
/// The kind of item that changes a buffer; the flags that make it something else than bytes to be copied.
const BUFFER: u16 = 0x123c;
const BUFFER_FLAGS: u16 = 0x1f;
/// Bytes of a buffer for which a bit stands.
const CHUNK: usize = 128;
/// Where the bits are in the item.
const MAP: usize = 20;

/// Whether the `count` operations in a record's `data` change nothing but the superblock `sb`, and nothing in it that
/// says how the file system is laid out.
pub(super) fn changes_only_counters(data: &[u8], count: u32, sb: &Superblock) -> bool {
    let mut rest = data.get(..data.len().min(MAX)).unwrap_or_default();
    let mut changed = sb.raw().to_vec();
    let mut buffer = Buffer::default();
    for _ in 0..count {
        let len = to_usize(u32::from_be_bytes(bytes(rest, 4)).into());
        let [client, flags] = bytes::<2>(rest, 8);
        let body = rest.get(HEADER..).and_then(|rest| rest.split_at_checked(len));
        let Some((body, next)) = body.filter(|_| client == CLIENT_TRANSACTION) else { return false };
        rest = next;
        let sound = match (flags, len) {
            (START | COMMIT, 0) => buffer.regions == 0,
            (0, TRANSACTION_LEN) if buffer.regions == 0 && le32(body, 0) == TRANSACTION => true,
            (0, _) if buffer.regions > 0 => buffer.apply(body, &mut changed),
            (0, _) => buffer.begin(body, &changed),
            _ => false,
        };
        if !sound {
            return false;
        }
    }
    buffer.regions == 0 && Superblock::parse(&changed).is_some_and(|changed| changed.has_layout_of(sb))
}

/// A change of a buffer of which some regions are still to come.
#[derive(Default)]
struct Buffer {
    regions: u16,
    /// Which chunks of 128 bytes they replace, and the first not yet replaced.
    map: u32,
    next: u32,
}

impl Buffer {
    /// Reads an item; whether it is a change of `superblock` by bytes to be copied.
    fn begin(&mut self, item: &[u8], superblock: &[u8]) -> bool {
        let own = le16(item, 0) == BUFFER
            && le16(item, 2) >= 1
            && le16(item, 4) & BUFFER_FLAGS == 0
            && usize::from(le16(item, 6)) * 512 == superblock.len()
            && le64(item, 8) == 0
            && item.len() >= MAP + 4
            && superblock.len() <= CHUNK * 32;
        *self = Buffer { regions: le16(item, 2).saturating_sub(1), map: le32(item, MAP), next: 0 };
        own
    }

    /// Copies a region to where the next chunks to be replaced lie; whether it fits.
    fn apply(&mut self, region: &[u8], superblock: &mut [u8]) -> bool {
        self.regions -= 1;
        let first = self.next + self.map.checked_shr(self.next).map_or(0, u32::trailing_zeros);
        for (chunk, bit) in region.chunks(CHUNK).zip(first..) {
            let at = to_usize(bit.into()) * CHUNK;
            let listed = self.map.checked_shr(bit).is_some_and(|bits| bits & 1 != 0);
            let Some(place) = superblock.get_mut(at..at + CHUNK).filter(|_| listed && chunk.len() == CHUNK)
            else {
                return false;
            };
            place.copy_from_slice(chunk);
            self.next = bit + 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        let mut raw = vec![0; 512];
        raw[..4].copy_from_slice(b"XFSB");
        raw[102..104].copy_from_slice(&512_u16.to_be_bytes());
        Superblock::parse(&raw).unwrap()
    }

    /// An operation of a transaction.
    fn operation(flags: u8, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[1, 2, 3, 4][..], &len, &[CLIENT_TRANSACTION, flags, 0, 0], body].concat()
    }

    /// A transaction that replaces the superblock's 128-byte chunks of `map` by `regions`; the item's kind, flags and
    /// block number.
    fn transaction(kind: u16, flags: u16, block: u64, map: u32, regions: &[&[u8]]) -> Vec<Vec<u8>> {
        let count = u16::try_from(regions.len() + 1).unwrap();
        let item = [
            &kind.to_le_bytes()[..],
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
            &1_u16.to_le_bytes(),
            &block.to_le_bytes(),
            &1_u32.to_le_bytes(),
            &map.to_le_bytes(),
        ];
        let header = [&TRANSACTION.to_le_bytes()[..], &[0; 12]].concat();
        let mut operations = vec![operation(START, &[]), operation(0, &header), operation(0, &item.concat())];
        operations.extend(regions.iter().map(|region| operation(0, region)));
        operations.push(operation(COMMIT, &[]));
        operations
    }

    fn only_counters(operations: &[Vec<u8>]) -> bool {
        let count = u32::try_from(operations.len()).unwrap();
        changes_only_counters(&operations.concat(), count, &superblock())
    }

    #[test]
    fn new_counters_of_the_superblock_cover_a_log() {
        let raw = superblock().raw().to_vec();
        let mut counters = raw[128..256].to_vec();
        counters[..32].fill(9);
        let whole = [&raw[..128], &counters].concat();
        assert!(only_counters(&transaction(BUFFER, 0x9000, 0, 0b11, &[&whole])));
        assert!(only_counters(&transaction(BUFFER, 0x9000, 0, 0b10, &[&counters])));
        assert!(only_counters(&transaction(BUFFER, 0x9000, 0, 0b1010, &[&counters, &[5; 128]])));
    }

    #[test]
    fn whatever_else_a_log_holds_does_not_cover_it() {
        let raw = superblock().raw().to_vec();
        let same = &raw[128..256];
        let mut grown = raw[..128].to_vec();
        grown[15] = 1;
        let mut features = same.to_vec();
        features[90] = 1;
        for (what, operations) in [
            ("more blocks", transaction(BUFFER, 0x9000, 0, 0b1, &[&grown])),
            ("more features", transaction(BUFFER, 0x9000, 0, 0b10, &[&features])),
            ("another block", transaction(BUFFER, 0x9000, 8, 0b10, &[same])),
            ("a cancelled buffer", transaction(BUFFER, 0x9002, 0, 0b10, &[same])),
            ("an inode", transaction(0x123b, 0, 0, 0b10, &[same])),
            ("an intent to free", transaction(0x1236, 0, 0, 0b10, &[same])),
            ("a region of no chunk", transaction(BUFFER, 0x9000, 0, 0b10, &[&raw[..256]])),
            ("a region too many", transaction(BUFFER, 0x9000, 0, 0b10, &[same, same])),
            ("half a chunk", transaction(BUFFER, 0x9000, 0, 0b10, &[&same[..64]])),
            ("beyond the sector", transaction(BUFFER, 0x9000, 0, 0b1_0000, &[same])),
        ] {
            assert!(!only_counters(&operations), "{what}");
        }
        let sound = transaction(BUFFER, 0x9000, 0, 0b10, &[same]);
        for cut in 1..sound.len() {
            let missing = [&sound[..cut - 1], &sound[cut..]].concat();
            let item_or_region = cut == 3 || cut == 4;
            assert_eq!(only_counters(&missing), !item_or_region, "without operation {cut}");
        }
        let bytes = sound.concat();
        for len in 0..bytes.len() {
            assert!(!changes_only_counters(&bytes[..len], 5, &superblock()), "cut off after {len} bytes");
        }
    }
}
