//! Swap areas: only the header page is worth copying, unless a hibernated system sleeps in it (the format is
//! `union swap_header` of Linux's uapi; hibernation replaces the signature).

use uuid::Uuid;

use super::field::{bytes, has, le32, text};
use super::used::VolumeMap;
use super::{Stop, require};
use crate::unit::Extent;

/// Page sizes whose last ten bytes may be the signature.
const PAGE_SIZES: [u32; 5] = [4096, 8192, 16384, 32768, 65536];
/// What software suspend, its user-space variant, LinHib and TuxOnIce write over the signature.
const HIBERNATED: [&[u8]; 5] =
    [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"];

/// A swap area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapInfo {
    /// Label; empty when it has none.
    pub label: String,
    /// UUID, all zeroes when it has none.
    pub uuid: Uuid,
    /// The page size it was made for, in bytes.
    pub page_size: u32,
    /// Whether it holds a hibernated system's memory.
    pub hibernated: bool,
    /// Header version: 1, or 0 for the format before Linux 2.2.
    pub version: u32,
    /// The number of its last page.
    pub last_page: u32,
}

/// Recognises a swap area by its first 64 KiB (or less, when it is shorter).
pub(super) fn parse(head: &[u8]) -> Option<SwapInfo> {
    PAGE_SIZES.into_iter().find_map(|page_size| {
        let at = page_size as usize - 10;
        let hibernated = HIBERNATED.iter().any(|magic| has(head, at, magic));
        let (v1, v0) = (has(head, at, b"SWAPSPACE2"), has(head, at, b"SWAP-SPACE"));
        (v1 || v0 || hibernated).then(|| SwapInfo {
            label: text(&bytes::<16>(head, 1052)),
            uuid: Uuid::from_bytes(bytes(head, 1036)),
            page_size,
            hibernated,
            version: if v0 { 0 } else { le32(head, 1024) },
            last_page: le32(head, 1028),
        })
    })
}

/// A swap area of which only the header is copied.
pub(super) struct SwapMap {
    header: u64,
    end: u64,
}

impl SwapMap {
    /// The map of `swap` in a volume of `size` bytes.
    pub fn of(swap: &SwapInfo, size: u64) -> Result<Self, Stop> {
        let page = u64::from(swap.page_size);
        let end = (u64::from(swap.last_page) + 1) * page;
        require(!swap.hibernated, || "a hibernated system sleeps in it".into())?;
        require(swap.version == 1, || format!("swap header version {} is not known", swap.version))?;
        require(page < end && end <= size, || {
            format!("its last page {} lies beyond its end", swap.last_page)
        })?;
        Ok(SwapMap { header: page, end })
    }
}

impl VolumeMap for SwapMap {
    fn len(&self) -> u64 {
        self.end
    }

    fn used_bytes(&self) -> u64 {
        self.header
    }

    fn next_used(&self, from: u64) -> crate::error::Result<Option<Extent>> {
        Ok((from < self.header).then(|| Extent::new(from, self.header)))
    }
}
