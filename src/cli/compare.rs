//! `haul compare`: where two disks or images differ, and in which files.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::image::{Format, compare};
use crate::io::ReadAt;
use crate::job::open::Opener;
use crate::layout::{self, Owner, Part, VolumeOwners};
use crate::monitor::Monitor;
use crate::unit::{Extent, ExtentMap, Extents};

/// Compare two disks or images of any format, byte by byte, and name the files that differ
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul compare disk.raw disk.qcow2
  haul compare --used /dev/sdb server.qcow2     leave out what no file system of A uses

Exit code 10 when they differ. A longer disk equals a shorter one when its tail is zero.

What differs is named where it lies in ext2, ext3 or ext4, in a partition, a logical volume or alone: the files, or the
file system's own structures, by what either disk says. The first 1000 differing extents are looked up. Names are no
verdict: a difference in one file is as much of a difference as any.")]
pub struct Arguments {
    /// A disk, an image, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    a: Location,
    /// A disk, an image, or an object
    #[arg(value_parser = location_parser())]
    b: Location,
    #[command(flatten)]
    input: Input,
    /// Format of B (-f is that of A)
    #[arg(short = 'F', value_name = "FORMAT")]
    b_format: Option<Format>,
    /// Member of B (--member is that of A)
    #[arg(long, value_name = "NAME")]
    b_member: Option<String>,
    /// Leave out blocks that no file system of A uses
    #[arg(long)]
    used: bool,
    /// List at most so many differing extents
    #[arg(long, default_value = "1000", value_name = "N")]
    limit: usize,
}

/// Extents named in a message at most; JSON output lists them all.
const NAMED: usize = 8;
/// Files named to a reader at most; JSON output lists them all.
const LINES: usize = 200;

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let input = &arguments.input;
    let a = input.image(&arguments.a, stop, &monitor)?;
    let opener = Opener::new(&input.cloud, stop, &monitor).member(arguments.b_member.as_deref());
    let b = opener.image(&arguments.b, arguments.b_format, &input.references.gate())?;
    let used = if arguments.used { Some(layout::used_map(a.disk.clone())?) } else { None };
    progress.begin("compare", Some(a.disk.size().max(b.disk.size())));
    let done = AtomicU64::new(0);
    let advance = |bytes| progress.advance(done.fetch_add(bytes, Ordering::Relaxed) + bytes);
    let options = compare::Options {
        mask: used.as_ref().map(|used| used as &dyn Extents),
        limit: arguments.limit.max(1),
        threads: super::default_threads(),
        advance: &advance,
    };
    let compared = compare(&*a.disk, &*b.disk, &options);
    progress.finish();
    let compared = compared?;
    let extents: Vec<_> = compared.differing.iter().map(|run| (run.start, run.end)).collect();
    if compared.same() {
        output.result(&json!({"same": true, "sizes": compared.sizes}), "the disks are the same");
        return Ok(());
    }
    progress.begin("files", None);
    let files = Files::of([&a.disk, &b.disk], &compared.differing);
    progress.finish();
    output.result(
        &json!({
            "same": false, "sizes": compared.sizes, "extents": extents, "more": compared.more,
            "files": files.named.iter().map(Named::json).collect::<Vec<_>>(),
            "unnamed": files.unnamed.iter().map(Unnamed::json).collect::<Vec<_>>(),
            "notes": files.notes,
        }),
        &files.text(),
    );
    let more = if compared.more || extents.len() > NAMED { ", …" } else { "" };
    let mut error =
        Error::new(Kind::Mismatch, "compare.differ", format!("{} and {} differ", arguments.a, arguments.b))
            .because(format!("bytes {}{more}", first_of(&compared.differing)))
            .remedy("look at the extents named, or leave out free space with --used");
    for (start, end) in extents {
        error = error.fact("extent", format!("{start}..{end}"));
    }
    Err(error)
}

/// The first few of `extents`.
fn first_of(extents: &[Extent]) -> String {
    let first: Vec<_> = extents.iter().take(NAMED).map(|run| format!("{run:?}")).collect();
    first.join(", ")
}

/// A partition, logical volume, or disk without partitions; what lies in none has no content.
#[derive(Clone, PartialEq)]
struct Volume {
    partition: Option<u32>,
    logical: Option<String>,
    content: Option<String>,
}

impl Volume {
    fn text(&self) -> String {
        match (self.partition, &self.logical, &self.content) {
            (Some(number), _, Some(content)) => format!("partition {number} ({content})"),
            (_, Some(name), Some(content)) => format!("{name} ({content})"),
            (_, _, Some(content)) => format!("the whole disk ({content})"),
            (_, _, None) => "outside of all partitions".to_owned(),
        }
    }
}

/// One owner of differing bytes.
struct Named {
    volume: Volume,
    owner: Owner,
    /// Whether it is theirs on A, and on B.
    on: [bool; 2],
    extents: ExtentMap,
}

/// Differing bytes of a volume that nothing can be told about.
struct Unnamed {
    volume: Volume,
    why: Vec<String>,
    on: [bool; 2],
    extents: ExtentMap,
}

/// Whose the differing bytes are, by both disks.
#[derive(Default)]
struct Files {
    named: Vec<Named>,
    unnamed: Vec<Unnamed>,
    notes: Vec<String>,
}

/// The name of a disk for those it holds for.
fn on(on: [bool; 2]) -> &'static str {
    match on {
        [true, true] => "both",
        [true, false] => "a",
        _ => "b",
    }
}

/// The same for a reader: nothing when it is both.
fn only_on(on: [bool; 2]) -> &'static str {
    match on {
        [true, true] => "",
        [true, false] => ", on A only",
        _ => ", on B only",
    }
}

fn pairs(extents: &ExtentMap) -> Vec<(u64, u64)> {
    extents.iter().map(|run| (run.start, run.end)).collect()
}

impl Files {
    /// Asks both disks. That one cannot be asked is a note: the disks differ all the same.
    fn of(disks: [&Arc<dyn ReadAt>; 2], differing: &[Extent]) -> Self {
        let mut files = Files::default();
        for (side, disk) in disks.into_iter().enumerate() {
            match layout::owners(disk, differing) {
                Ok(volumes) => volumes.into_iter().for_each(|volume| files.add(side, volume)),
                Err(error) => files.note(format!("{}: {}", error.what(), error.why())),
            }
        }
        files
    }

    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn add(&mut self, side: usize, told: VolumeOwners) {
        let VolumeOwners { partition, logical, content, owners, unnamed, notes } = told;
        let volume = Volume { partition, logical, content };
        let here = [side == 0, side == 1];
        let both = |on: [bool; 2]| [on[0] || here[0], on[1] || here[1]];
        for (owner, extents) in owners {
            match self.named.iter_mut().find(|named| named.volume == volume && named.owner == owner) {
                Some(named) => {
                    named.on = both(named.on);
                    named.extents.extend(extents);
                }
                None => {
                    let extents = extents.into_iter().collect();
                    self.named.push(Named { volume: volume.clone(), owner, on: here, extents });
                }
            }
        }
        if unnamed.is_empty() {
            for note in notes {
                self.note(format!("{}: {note}", volume.text()));
            }
            return;
        }
        match self.unnamed.iter_mut().find(|known| known.volume == volume && known.why == notes) {
            Some(known) => {
                known.on = both(known.on);
                known.extents.extend(unnamed);
            }
            None => {
                let extents = unnamed.into_iter().collect();
                self.unnamed.push(Unnamed { volume, why: notes, on: here, extents });
            }
        }
    }

    /// A line for each owner, volume by volume.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut last = None;
        for named in self.named.iter().take(LINES) {
            if last.replace(&named.volume) != Some(&named.volume) {
                let _ = writeln!(text, "{}:", named.volume.text());
            }
            let _ = writeln!(text, "  {}{}: {}", named.owner, only_on(named.on), bytes(&named.extents));
        }
        if let Some(more @ 1..) = self.named.len().checked_sub(LINES) {
            let _ = writeln!(text, "  and {more} more: --json lists them all");
        }
        for unnamed in &self.unnamed {
            let why: String = unnamed.why.iter().map(|why| format!("; {why}")).collect();
            let place = unnamed.volume.text();
            let _ = writeln!(text, "{place}{}: {}{why}", only_on(unnamed.on), bytes(&unnamed.extents));
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }
}

/// The first few extents for a reader.
fn bytes(extents: &ExtentMap) -> String {
    let list: Vec<Extent> = extents.iter().take(NAMED + 1).collect();
    let more = if list.len() > NAMED { ", …" } else { "" };
    format!("bytes {}{more}", first_of(&list))
}

impl Named {
    fn json(&self) -> Value {
        let (kind, inode, part, path, more) = match &self.owner {
            Owner::Metadata(name) => (&**name, None, None, None, 0),
            Owner::Free => ("free blocks", None, None, None, 0),
            Owner::Unknown => ("unknown", None, None, None, 0),
            Owner::Inode { number, kind, part, path, more } => {
                let part = match part {
                    Part::Content => "content",
                    Part::Map => "block map",
                    Part::Attributes => "extended attributes",
                };
                (*kind, Some(number), Some(part), path.as_ref(), *more)
            }
        };
        json!({
            "partition": self.volume.partition, "logical_volume": self.volume.logical,
            "path": path, "more_names": more, "kind": kind, "inode": inode, "part": part,
            "on": on(self.on), "extents": pairs(&self.extents),
        })
    }
}

impl Unnamed {
    fn json(&self) -> Value {
        json!({
            "partition": self.volume.partition, "logical_volume": self.volume.logical,
            "content": self.volume.content, "why": self.why, "on": on(self.on),
            "extents": pairs(&self.extents),
        })
    }
}
