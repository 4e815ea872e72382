//! An image that leaves in one stream: standard output, or nowhere. It cannot be taken up again.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;

use super::{Destination, Sealed};
use crate::error::{Error, Kind, Result};
use crate::manifest::journal::{Journal, Record};
use crate::unit::{KIB, to_usize};

/// Zeroes written at a time.
const ZEROES: &[u8] = &[0; to_usize(64 * KIB)];

/// Takes an image front to back.
pub struct Pipe {
    out: Option<File>,
    position: u64,
    journal: Arc<Journal>,
}

impl Pipe {
    /// An image that goes into `out`, or nowhere. Into `out` go only images whose front is empty.
    pub fn new(out: Option<File>, front_len: u64, journal: Arc<Journal>) -> Result<Self> {
        if out.is_some() && front_len > 0 {
            return Err(Error::new(
                Kind::Usage,
                "pipe.front",
                "an image of this format cannot go into a pipe",
            )
            .because("what is at its start is known only at the end")
            .remedy(
                "write -O raw, -O vhd -o subformat=fixed, or -O vmdk -o subformat=streamOptimized; or a file",
            ));
        }
        Ok(Pipe { out, position: front_len, journal })
    }
}

impl Destination for Pipe {
    fn append(&mut self, bytes: Bytes) -> Result<()> {
        if let Some(out) = &mut self.out {
            out.write_all(&bytes).map_err(|error| {
                Error::new(Kind::Destination, "pipe.write", "cannot write to standard output")
                    .remedy("look at the program that reads it, and begin again")
                    .fact("offset", self.position)
                    .caused_by(error)
            })?;
        }
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, count: u64) -> Result<()> {
        if self.out.is_none() {
            self.position += count;
            return Ok(());
        }
        let mut left = count;
        while left > 0 {
            let n = left.min(ZEROES.len() as u64);
            self.append(Bytes::from_static(&ZEROES[..to_usize(n)]))?;
            left -= n;
        }
        Ok(())
    }

    fn batch_border(&mut self) -> Result<()> {
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.journal.append(&Record::Synced { position: self.position })
    }

    fn finish(self: Box<Self>, _front: Vec<u8>) -> Result<Sealed> {
        Ok(Sealed::new(self.position, None, || Ok(None)))
    }
}
