//! Bytes as a VMDK image.

use std::sync::Arc;

use haul::error::{Error, Kind};
use haul::image::vmdk::{self, Metadata, Reader};

use super::Outcome;
use super::watched::{Watched, judge, read_of, refused};

/// Extent files an image gets at most.
const EXTENTS: usize = 8;
/// The extent that the seeds of split disks name: of 40 sectors.
const EXTENT: &[u8] = include_bytes!("../corpus/vmdk-extent/refused-s001");
/// A disk of one extent of 1 MiB.
const SPLIT: &[u8] = b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
    createType=\"twoGbMaxExtentSparse\"\nRW 2048 SPARSE \"a-s001\"\n";

/// Takes `bytes` as a VMDK image whose extent files, if it names any, are all the same sparse one.
pub fn fuzz_image(bytes: &[u8]) -> Outcome {
    fuzz_vmdk(bytes, EXTENT)
}

/// Takes `bytes` as the only extent of a split disk.
pub fn fuzz_extent(bytes: &[u8]) -> Outcome {
    fuzz_vmdk(SPLIT, bytes)
}

/// Takes `bytes` as a VMDK image whose extent files, if it names any, all hold `extent`: it is opened and read within
/// bounds, or fails with an error.
pub fn fuzz_vmdk(bytes: &[u8], extent: &[u8]) -> Outcome {
    let file = Arc::new(Watched::new(bytes));
    let _ = vmdk::probe(&*file).inspect_err(judge);
    let _ = Metadata::read(&*file).map(|metadata| metadata.info()).inspect_err(judge);
    let mut opened = 0;
    let disk = Reader::open(file, |wanted| {
        assert!(!wanted.contains(['/', '\\']), "{wanted:?} is a path");
        opened += 1;
        if opened > EXTENTS {
            return Err(Error::new(Kind::Image, "image.extent-not-named", "fuzz wants too much"));
        }
        Ok(Arc::new(Watched::new(extent)))
    });
    match disk {
        Ok(disk) => read_of(&disk),
        Err(error) => refused(&error),
    }
}
