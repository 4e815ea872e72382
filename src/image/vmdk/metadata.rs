//! What a VMDK file says about itself before any of its tables is read: header and descriptor.

use super::SECTOR;
use super::descriptor::{Descriptor, ExtentKind, NO_PARENT, SIGNATURE, is_one};
use super::header::{Header, MAX_DESCRIPTOR, bad_field, bytes};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_vec};
use crate::unit::to_usize;

/// The types of disk (`createType`) haul reads.
const TYPES: [&str; 11] = [
    "monolithicSparse",
    "monolithicFlat",
    "streamOptimized",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "2GbMaxExtentSparse",
    "2GbMaxExtentFlat",
    "vmfs",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
];

/// The facts of a VMDK disk for `haul inspect`. Control characters in names are escaped.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Info {
    /// The type of disk, as its descriptor names it.
    pub create_type: String,
    /// The disk adapter it was made for.
    pub adapter_type: Option<String>,
    /// The virtual hardware version it was made for.
    pub hardware_version: Option<String>,
    /// The content id.
    pub content_id: Option<String>,
    /// The parent disk of a delta disk: its name, or its content id.
    pub parent: Option<String>,
    /// Version of the sparse extent, where the file is one.
    pub version: Option<u32>,
    /// Bytes of a grain, where the file is a sparse extent.
    pub grain_size: Option<u64>,
    /// Whether grains are compressed.
    pub compressed: bool,
    /// Whether the file was not closed cleanly.
    pub unclean: bool,
    /// Names of the other files it needs.
    pub extents: Vec<String>,
}

/// Everything but the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The descriptor.
    pub descriptor: Descriptor,
    /// The header, where the descriptor is embedded in a sparse extent.
    pub header: Option<Header>,
}

impl Metadata {
    /// Reads and checks header and descriptor of the disk on `file`. Opens nothing else.
    pub fn read(file: &(impl ReadAt + ?Sized)) -> Result<Self> {
        let name = file.name();
        let start = read_vec(file, 0, to_usize(file.size().min(SIGNATURE.len() as u64)))?;
        if is_one(&start) {
            if file.size() > bytes(MAX_DESCRIPTOR) {
                let why = format!("it has {} bytes; 1 MiB is the most haul reads", file.size());
                return Err(bad_field(&name, "descriptor", 0, why));
            }
            let text = read_vec(file, 0, to_usize(file.size()))?;
            return Ok(Metadata { descriptor: Descriptor::parse(&name, &text, 0)?, header: None });
        }
        let header = Header::read(file, 0)?;
        let place = header.descriptor();
        if place.end > file.size() {
            let why =
                format!("the descriptor at {place:?} ends beyond the end of the file at {}", file.size());
            return Err(bad_field(&name, "descriptorOffset", 28, why));
        }
        let text = read_vec(file, place.start, to_usize(place.len()))?;
        if text.iter().all(|byte| *byte == 0) {
            return Err(Error::new(Kind::Image, "vmdk.extent-alone", format!("{name} is a part of a disk"))
                .because("it is one extent and has no descriptor")
                .remedy("name the descriptor, the small text file of the disk, and its extents by `--extent PATH`")
                .fact("image", &name));
        }
        let descriptor = Descriptor::parse(&name, &text, place.start)?;
        Ok(Metadata { descriptor, header: Some(header) })
    }

    /// Length of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.descriptor.sectors() * SECTOR
    }

    /// The facts.
    pub fn info(&self) -> Info {
        let Metadata { descriptor, header } = self;
        let shown = |name: &Option<String>| name.as_deref().map(printable);
        let parent = descriptor.parent_hint.clone();
        let parent = parent.or_else(|| {
            (descriptor.parent_cid != NO_PARENT).then(|| format!("{:08x}", descriptor.parent_cid))
        });
        let others = match header {
            Some(_) => &[],
            None => descriptor.extents.as_slice(),
        };
        Info {
            create_type: printable(&descriptor.create_type),
            adapter_type: shown(&descriptor.adapter_type),
            hardware_version: shown(&descriptor.hardware_version),
            content_id: shown(&descriptor.cid),
            parent: shown(&parent),
            version: header.as_ref().map(|header| header.version),
            grain_size: header.as_ref().map(|header| bytes(header.grain)),
            compressed: header.as_ref().is_some_and(Header::compressed),
            unclean: header.as_ref().is_some_and(|header| header.unclean),
            extents: others.iter().filter_map(|extent| shown(&extent.file)).collect(),
        }
    }

    /// Why the disk called `image` must not be read, if it must not.
    pub fn refusal(&self, image: &str) -> Option<Error> {
        let refuse = |id, why: String, remedy: &str| {
            let error = Error::new(Kind::Image, id, format!("{image}: this VMDK disk cannot be read"));
            Some(error.because(why).remedy(remedy).fact("image", image))
        };
        let clone = "make a full clone of the disk with the product that wrote it, and copy the clone";
        if let Some(parent) = self.info().parent {
            let why = format!("it is a delta disk: it holds only what differs from its parent {parent:?}");
            return refuse("vmdk.delta", why, clone);
        }
        let name = &self.descriptor.create_type;
        if !TYPES.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            let why = format!("its type (createType) is {name:?}, which haul does not read");
            return refuse("vmdk.create-type", why, clone);
        }
        for extent in &self.descriptor.extents {
            if let ExtentKind::Other(kind) = &extent.kind {
                let why = format!("its extent at offset {} is of type {kind:?}", extent.at);
                return refuse("vmdk.extent-type", why, clone);
            }
            if !extent.readable {
                let why = format!("its extent at offset {} must not be read (NOACCESS)", extent.at);
                return refuse("vmdk.no-access", why, clone);
            }
            let Some(file) = extent.file.as_deref().filter(|_| self.header.is_none()) else { continue };
            if file.contains(['/', '\\']) || matches!(file, "" | "." | "..") {
                let why = format!("its extent at offset {} names the path {file:?}", extent.at);
                let remedy =
                    "if that is right, put a file name without a folder there, in a copy of the descriptor";
                return refuse("vmdk.extent-path", why, remedy);
            }
        }
        None
    }
}

/// A name from an image as it may be shown: control characters could drive a terminal.
fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
