//! `$LogFile`: whether a mount would change anything by it. It does not when it is empty, or when its newer restart page
//! says so. Everything else, a log that merely looks strange included, counts as one to be replayed.

use super::record::{Stream, fix_up};
use super::volume::Volume;
use super::{Step, require};
use crate::io::ReadAt;
use crate::layout::field::{has, le16, le32, le64};
use crate::unit::to_usize;

/// Sizes of a restart page, in bytes.
const PAGES: std::ops::RangeInclusive<u32> = 4096..=65_536;
/// Bytes at the start in which both restart pages lie.
const HEAD: u64 = 2 << 16;
/// No client.
const NONE: u16 = 0xffff;
/// Flag of a restart area: all changes are in place.
const CLEAN: u16 = 0x2;
/// Length of a restart area without its clients, as far as it is looked at.
const AREA: usize = 24;

/// Stops unless `log` is in order.
pub(super) fn require_clean<D: ReadAt>(volume: &Volume<D>, log: &Stream) -> Step<()> {
    let head = volume.read(log, 0, HEAD.min(log.size))?;
    // What Linux's tools leave: a log with nothing in it.
    if !head.is_empty() && head.iter().all(|byte| *byte == 0xff) {
        return Ok(());
    }
    let size = le32(&head, 16);
    require(has(&head, 0, b"RSTR") && PAGES.contains(&size) && size.is_power_of_two(), || {
        "has no restart page".into()
    })?;
    let page = |i: usize| head.chunks_exact(to_usize(size.into())).nth(i).unwrap_or_default();
    let pages = [Restart::parse(page(0))?, Restart::parse(page(1))?];
    let newest = pages.iter().map(|page| page.lsn).max();
    let clean = pages.iter().filter(|page| Some(page.lsn) == newest).all(|page| page.clean);
    require(clean, || "must be replayed first".into())
}

/// What a restart page says.
struct Restart {
    /// How new it is.
    lsn: u64,
    /// Whether there is nothing to be replayed.
    clean: bool,
}

impl Restart {
    fn parse(page: &[u8]) -> Step<Restart> {
        let damaged = || "has damaged restart pages".to_owned();
        require(has(page, 0, b"RSTR") && to_usize(le32(page, 16).into()) == page.len(), damaged)?;
        let mut page = page.to_vec();
        fix_up(&mut page)?;
        let (major, minor) = (le16(&page, 28), le16(&page, 26));
        // Windows writes version 2.0 while it keeps some of the metadata to itself, over a fast start-up as well.
        require((major, minor) != (2, 0), || "shows that Windows has not let go of it".into())?;
        require((major, minor) == (1, 1), || format!("is of version {major}.{minor}"))?;
        let at = usize::from(le16(&page, 24));
        let area = page.get(at..at + AREA).filter(|_| at.is_multiple_of(8) && at >= 32);
        let area = area.ok_or_else(damaged)?;
        let (clients, in_use) = (le16(area, 8), le16(area, 12));
        require(in_use == NONE || in_use < clients, damaged)?;
        Ok(Restart { lsn: le64(area, 0), clean: in_use == NONE || le16(area, 14) & CLEAN != 0 })
    }
}
