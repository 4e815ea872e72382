//! What any bytes must satisfy as a VHD image: open and read within bounds, or fail with an error.

#[path = "watched.rs"]
mod watched;

use std::sync::Arc;

use haul::image::vhd;
use watched::{Watched, judge, read};

/// Takes `bytes` as a VHD image. Returns whether it could be opened. What could be opened could be read: its whole
/// table is checked first.
pub fn fuzz_vhd(bytes: &[u8]) -> bool {
    let file = Arc::new(Watched::new(bytes));
    let probed = vhd::probe(&*file).unwrap();
    let info = vhd::inspect(&*file).inspect_err(judge).ok();
    let reader = vhd::Reader::open(file).inspect_err(judge).ok();
    let Some(reader) = reader else { return false };
    assert!(probed, "an image that can be read is not recognised");
    assert_eq!(info.as_ref(), Some(reader.info()));
    read(&reader).unwrap();
    true
}
