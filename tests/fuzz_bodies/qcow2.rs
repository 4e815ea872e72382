//! Bytes as a qcow2 image.

use std::sync::Arc;

use haul::image::{self, Format, Gate};

use super::Outcome;
use super::watched::{Watched, judge, read_of, refused};

/// Takes `bytes` as a qcow2 image: it is opened and read within bounds, or fails with an error.
pub fn fuzz_qcow2(bytes: &[u8]) -> Outcome {
    let file = Arc::new(Watched::new(bytes));
    let _ = image::probe(&*file).inspect_err(judge);
    let info = image::inspect(&*file, Some(Format::Qcow2)).inspect_err(judge);
    match image::open_on(file, Some(Format::Qcow2), &Gate::closed()) {
        Ok(image) => {
            assert_eq!(image.disk.size(), info.unwrap().virtual_size);
            read_of(&*image.disk)
        }
        Err(error) => refused(&error),
    }
}
