//! Symbolic links ("Symbolic Links"): the target in the inode, or in blocks of their own, each run of which has a header
//! where there are checksums.

use super::inode::{Format, Inode};
use super::{Own, XfsFiles};
use crate::error::Result;
use crate::io::read_vec;
use crate::layout::field::{be32, has};
use crate::unit::to_usize;

/// Longest target, in bytes.
const MAX_TARGET: u64 = 1024;
/// Most neighbouring blocks with a target: the longest and a header, in blocks of 512 bytes.
const MAX_BLOCKS: u64 = 3;
const HEADER: u64 = 56;
const OWN: Own = Own { sum: 12, address: 40, uuid: 16, owner: 32 };

impl XfsFiles {
    /// Where the link `inode` leads.
    pub(super) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>> {
        let require = |holds, what: &str| self.require(inode.number, holds, what);
        require((1..=MAX_TARGET).contains(&inode.size), "its target is empty or too long")?;
        let size = to_usize(inode.size);
        if inode.format == Format::Local {
            return Ok(inode.fork.get(..size).unwrap_or_default().to_vec());
        }
        let block_size = self.sb.block_size;
        let mut target = Vec::with_capacity(size);
        let mut block = 0;
        while target.len() < size {
            let run = self.run_at(inode, block)?;
            let place =
                run.place.ok_or_else(|| self.wrong(inode.number, "a block of its target is nowhere"))?;
            require(run.count <= MAX_BLOCKS, "its target takes too many blocks")?;
            let at = place * block_size;
            let raw = read_vec(&self.disk, at, to_usize(run.count * block_size))?;
            let left = size - target.len();
            let part = if self.sb.checksums() {
                require(has(&raw, 0, b"XSLM"), "a block of its target has no magic number")?;
                self.check_own(inode.number, &raw, at, OWN)?;
                let len = to_usize(be32(&raw, 8).into());
                let follows = to_usize(be32(&raw, 4).into()) == target.len() && (1..=left).contains(&len);
                raw.get(to_usize(HEADER)..).and_then(|rest| rest.get(..len)).filter(|_| follows)
            } else {
                raw.get(..left.min(raw.len()))
            };
            target.extend(part.ok_or_else(|| self.wrong(inode.number, "a part of its target does not fit"))?);
            block += run.count;
        }
        Ok(target)
    }
}
