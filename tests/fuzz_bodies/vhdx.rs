//! What any bytes must satisfy as a VHDX image: open and read within bounds, or fail with an error.

#[path = "watched.rs"]
mod watched;

use std::sync::Arc;

use haul::image::vhdx;
use watched::{Watched, judge, read};

/// Takes `bytes` as a VHDX image. Returns whether it could be opened. What could be opened could be read: its whole
/// table is checked first.
pub fn fuzz_vhdx(bytes: &[u8]) -> bool {
    let file = Arc::new(Watched::new(bytes));
    let probed = vhdx::probe(&*file).unwrap();
    let info = vhdx::inspect(&*file).inspect_err(judge).ok();
    let reader = vhdx::Reader::open(file).inspect_err(judge).ok();
    let Some(reader) = reader else { return false };
    assert!(probed);
    assert_eq!(info.as_ref(), Some(reader.info()));
    read(&reader).unwrap();
    true
}
