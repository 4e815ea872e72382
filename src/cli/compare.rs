//! `haul compare`: where two disks or images differ.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::json;

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::image::{Format, compare};
use crate::job::open::Opener;
use crate::layout;
use crate::monitor::Monitor;
use crate::unit::Extents;

/// Compare two disks or images of any format, byte by byte
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul compare disk.raw disk.qcow2
  haul compare --used /dev/sdb server.qcow2     leave out what no file system of A uses

Exit code 10 when they differ. A longer disk equals a shorter one when its tail is zero.")]
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
    let named: Vec<_> = compared.differing.iter().take(NAMED).map(|run| format!("{run:?}")).collect();
    let more = if compared.more || extents.len() > NAMED { ", …" } else { "" };
    let mut error =
        Error::new(Kind::Mismatch, "compare.differ", format!("{} and {} differ", arguments.a, arguments.b))
            .because(format!("bytes {}{more}", named.join(", ")))
            .remedy("look at the extents named, or leave out free space with --used");
    for (start, end) in extents {
        error = error.fact("extent", format!("{start}..{end}"));
    }
    Err(error)
}
