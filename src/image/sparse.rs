//! An image's file and the holes in it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::io::ReadAt;
use crate::unit::Extent;

/// A file, and the stretch of it last found to hold data: asking a file system where a hole begins costs more than
/// reading a cluster, and an image's file mostly has none.
pub(super) struct Sparse {
    /// The file itself, for reading.
    pub(super) file: Arc<dyn ReadAt>,
    known: Mutex<Extent>,
}

impl Sparse {
    /// `file`, of which nothing is known yet.
    pub(super) fn new(file: Arc<dyn ReadAt>) -> Arc<Self> {
        Arc::new(Sparse { file, known: Mutex::new(Extent::new(0, 0)) })
    }

    /// What may be data in `asked`: one stretch, the first.
    pub(super) fn data_in(&self, asked: Extent) -> Result<Option<Extent>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains(asked) {
            let Some(data) = self.file.next_data(asked.start)? else { return Ok(None) };
            *known = data;
        }
        Ok(Some(known.intersect(asked)).filter(|data| !data.is_empty()))
    }
}
