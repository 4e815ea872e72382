//! Which member of an archive is meant: the one the user named, or the only disk image.

use std::sync::Arc;

use super::stream::{Codec, Stream};
use super::tar::Member;
use super::{ovf, sniff};
use crate::error::{Error, Kind, Result};
use crate::io::{ReadAt, read_vec};
use crate::unit::bytes::human;
use crate::unit::to_usize;

/// Most compressed members whose beginning is unpacked to see what they are.
const MAX_PEEKS: usize = 64;
/// Bytes read at once for that.
const PEEK_STEP: usize = 64 << 10;
/// Most members that an error lists.
const MAX_LISTED: usize = 20;
/// A sector, in bytes.
const SECTOR: u64 = 512;

/// What a member was found to be.
enum Content {
    /// A disk or disk image, perhaps compressed.
    Disk(String),
    /// The descriptor of an OVA, with the names of its disks.
    Descriptor(Vec<String>),
    Other,
}

/// The member of the archive `disk` called `named`, or, where the user named none, its only disk image.
pub(super) fn choose<'a>(
    disk: &Arc<dyn ReadAt>,
    members: &'a [Member],
    named: Option<&str>,
) -> Result<&'a Member> {
    let archive = disk.name();
    if let Some(name) = named {
        let mut same = members.iter().filter(|member| plain(&member.name) == plain(name));
        return match (same.next(), same.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => {
                Err(undecided("archive.no-member", &archive, format!("it has no member {name:?}"), members))
            }
            (Some(_), Some(_)) => Err(twice(&archive, name)),
        };
    }

    let mut peeks = 0;
    let mut disks = Vec::new();
    let mut descriptors = Vec::new();
    for member in members {
        match look(disk, member, &mut peeks)? {
            Content::Disk(what) => disks.push((member, what)),
            Content::Descriptor(hrefs) => descriptors.push(hrefs),
            Content::Other => {}
        }
    }
    let by_descriptor = |hrefs: &[String]| {
        let [href] = hrefs else { return None };
        let described = members.iter().find(|member| plain(&member.name) == plain(href))?;
        let agrees = disks.is_empty() || disks.iter().any(|(disk, _)| disk.at() == described.at());
        agrees.then_some(described)
    };
    let only = match (&descriptors[..], &disks[..], members) {
        // A descriptor tells the disk from a CD image or another file.
        ([hrefs], _, _) if !hrefs.is_empty() => by_descriptor(hrefs),
        (_, [(only, _)], _) => Some(*only),
        // A disk may begin with anything.
        (_, [], [only]) => Some(only),
        _ => None,
    };
    let Some(only) = only else {
        if disks.is_empty() {
            let why = "none of its members looks like a disk image".to_owned();
            return Err(undecided("archive.no-disk", &archive, why, members));
        }
        let found = disks.iter().take(MAX_LISTED);
        let found: Vec<_> = found.map(|(member, what)| format!("{:?} ({what})", member.name)).collect();
        let why = format!("which of its members is meant is not clear: disks are {}", found.join(", "));
        return Err(undecided("archive.which-disk", &archive, why, members));
    };
    let same = members.iter().filter(|member| plain(&member.name) == plain(&only.name));
    if same.count() > 1 { Err(twice(&archive, &only.name)) } else { Ok(only) }
}

/// A name without the `./` that `tar -c .` puts before it.
fn plain(name: &str) -> &str {
    name.strip_prefix("./").unwrap_or(name)
}

/// What `member` is, by its content. One that cannot be read may be a disk: if it is chosen, it gives its error.
fn look(archive: &Arc<dyn ReadAt>, member: &Member, peeks: &mut usize) -> Result<Content> {
    let file = match member.open(archive) {
        Ok(file) => file,
        Err(error) if error.kind() == Kind::Image => return Ok(Content::Disk("unreadable".to_owned())),
        Err(error) => return Err(error),
    };
    let head = read_vec(&file, 0, to_usize(file.size().min(sniff::HEAD as u64)))?;
    if ovf::begins(&head) && file.size() <= ovf::MAX_LEN {
        let xml = read_vec(&file, 0, to_usize(file.size()))?;
        return Ok(ovf::disks(&xml).map_or(Content::Other, Content::Descriptor));
    }
    if let Some(codec) = Codec::probe(&file)? {
        *peeks += 1;
        if *peeks > MAX_PEEKS {
            return Ok(Content::Disk(format!("unknown, in {codec}")));
        }
        let mut unpacked = vec![0; sniff::HEAD];
        let what = match Stream::new(file, codec, PEEK_STEP).read_full(&mut unpacked) {
            Ok(len) => unpacked.get(..len).and_then(|head| sniff::disk(head, &[])),
            Err(error) if error.kind() == Kind::Image => Some("unreadable"),
            Err(error) => return Err(error),
        };
        return Ok(what.map_or(Content::Other, |what| Content::Disk(format!("{what}, in {codec}"))));
    }
    if file.size() < SECTOR {
        return Ok(Content::Other);
    }
    let tail = read_vec(&file, file.size() - SECTOR, to_usize(SECTOR))?;
    Ok(sniff::disk(&head, &tail).map_or(Content::Other, |what| Content::Disk(what.to_owned())))
}

fn twice(archive: &str, name: &str) -> Error {
    Error::new(Kind::Image, "archive.two-members", format!("{archive} has two members {name:?}"))
        .because("a later one replaces an earlier one, or someone hides a disk")
        .remedy("unpack the archive with tar, and give haul the image")
        .fact("image", archive)
}

fn undecided(id: &'static str, archive: &str, why: String, members: &[Member]) -> Error {
    let listed = members.iter().take(MAX_LISTED);
    let list: Vec<_> = listed.map(|member| format!("{:?} ({})", member.name, human(member.size))).collect();
    let more = members.len().saturating_sub(MAX_LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let error = Error::new(Kind::Usage, id, format!("cannot choose a disk image in {archive}"))
        .because(why)
        .remedy(format!("name a member with --member: {}{more}", list.join(", ")))
        .fact("image", archive);
    members.iter().take(MAX_LISTED).fold(error, |error, member| error.fact("member", &member.name))
}
