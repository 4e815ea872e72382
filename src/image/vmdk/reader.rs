//! The virtual disk of a VMDK image, read from any thread: its extents one after the other.

use std::sync::Arc;

use super::descriptor::{ExtentKind, ExtentLine};
use super::header::{Header, MAX_TABLES, bad_field, bytes};
use super::metadata::Metadata;
use super::sparse::{Shared, SparseExtent};
use crate::error::Result;
use crate::io::{ReadAt, Window, check_range};
use crate::unit::{Extent, to_usize};

/// The virtual disk of one image.
pub struct Reader {
    name: String,
    size: u64,
    parts: Vec<Part>,
}

/// An extent's place in the disk, and its bytes; `None` for zeroes.
struct Part {
    extent: Extent,
    disk: Option<Arc<dyn ReadAt>>,
}

impl Reader {
    /// The disk of the image on `file`. `extents` opens an extent file by the name the descriptor has for it, which
    /// is no path; it is where a caller refuses files that were not named to it.
    pub fn open(
        file: Arc<dyn ReadAt>,
        mut extents: impl FnMut(&str) -> Result<Arc<dyn ReadAt>>,
    ) -> Result<Self> {
        let name = file.name();
        let metadata = Metadata::read(&file)?;
        if let Some(refusal) = metadata.refusal(&name) {
            return Err(refusal);
        }
        let lines = &metadata.descriptor.extents;
        let shared = Arc::new(Shared::new());
        let mut parts = Vec::with_capacity(lines.len());
        let (mut size, mut tables) = (0, 0);
        // Directories are held in memory: so many extents are bounded like one.
        let mut count = |file: &str, header: &Header| {
            tables += header.tables();
            let why = format!("with its {} sectors the disk has too many grain tables", header.capacity);
            if tables > MAX_TABLES { Err(bad_field(file, "capacity", 12, why)) } else { Ok(()) }
        };
        for (owner, line) in (0..).zip(lines) {
            let extent = Extent::at(size, bytes(line.sectors));
            size = extent.end;
            let disk: Option<Arc<dyn ReadAt>> = match (&metadata.header, &line.kind) {
                (Some(header), ExtentKind::Sparse) if lines.len() == 1 => {
                    let file = Arc::clone(&file);
                    let shared = Arc::clone(&shared);
                    Some(Arc::new(SparseExtent::new(file, header.clone(), line.sectors, owner, shared)?))
                }
                (Some(_), _) => {
                    let why = "a descriptor inside a sparse extent describes that extent alone";
                    return Err(bad_field(&name, "extent", line.at, why));
                }
                (None, ExtentKind::Zero) => None,
                (None, ExtentKind::Sparse) => {
                    let file = extents(line.file.as_deref().unwrap_or_default())?;
                    let header = Header::read(&file, 0)?;
                    count(&file.name(), &header)?;
                    let shared = Arc::clone(&shared);
                    Some(Arc::new(SparseExtent::new(file, header, line.sectors, owner, shared)?))
                }
                // What is none of these was refused above.
                (None, ExtentKind::Flat | ExtentKind::Other(_)) => {
                    let file = extents(line.file.as_deref().unwrap_or_default())?;
                    Some(Arc::new(flat(&name, line, file)?))
                }
            };
            parts.push(Part { extent, disk });
        }
        Ok(Reader { name, size, parts })
    }

    /// The extents from the one that holds `at` on.
    fn parts_from(&self, at: u64) -> &[Part] {
        &self.parts[self.parts.partition_point(|part| part.extent.end <= at)..]
    }
}

/// The bytes of a flat extent, which must all be in its file.
fn flat(image: &str, line: &ExtentLine, file: Arc<dyn ReadAt>) -> Result<Window<Arc<dyn ReadAt>>> {
    let place = Extent::at(bytes(line.offset), bytes(line.sectors));
    let name = file.name();
    if place.len() < bytes(line.sectors) || place.end > file.size() {
        let why = format!("its bytes {place:?} end beyond the end of {name} at {}", file.size());
        return Err(bad_field(image, "extent", line.at, why).fact("file", name));
    }
    Ok(Window::new(file, place, name))
}

impl ReadAt for Reader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self, buf.len(), offset)?;
        let mut rest = buf;
        let mut at = offset;
        for part in self.parts_from(offset) {
            let len = to_usize((part.extent.end - at).min(rest.len() as u64));
            let (here, after) = rest.split_at_mut(len);
            match &part.disk {
                Some(disk) if !here.is_empty() => disk.read_at(here, at - part.extent.start)?,
                _ => here.fill(0),
            }
            if after.is_empty() {
                break;
            }
            at = part.extent.end;
            rest = after;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Extent>> {
        for part in self.parts_from(from) {
            let Some(disk) = &part.disk else { continue };
            let within = from.saturating_sub(part.extent.start);
            if let Some(data) = disk.next_data(within)? {
                return Ok(Some(data.shifted(part.extent.start)));
            }
        }
        Ok(None)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
