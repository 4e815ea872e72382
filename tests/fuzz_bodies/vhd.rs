//! Bytes as a VHD image.

use std::sync::Arc;

use haul::image::vhd;

use super::Outcome;
use super::watched::{Watched, judge, read_of, refused};

/// Takes `bytes` as a VHD image: it is opened and read within bounds, or fails with an error. What could be opened can
/// be read: its whole table is checked first.
pub fn fuzz_vhd(bytes: &[u8]) -> Outcome {
    let file = Arc::new(Watched::new(bytes));
    let probed = vhd::probe(&*file).unwrap();
    let info = vhd::inspect(&*file).inspect_err(judge).ok();
    match vhd::Reader::open(file) {
        Ok(reader) => {
            assert!(probed, "an image that can be read is not recognised");
            assert_eq!(info.as_ref(), Some(reader.info()));
            let outcome = read_of(&reader);
            assert!(matches!(outcome, Outcome::Fine(_)), "{outcome:?}");
            outcome
        }
        Err(error) => refused(&error),
    }
}
