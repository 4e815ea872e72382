//! `haul convert`: a disk or image into an image file.

use std::ffi::OsStr;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::ValueEnum;

use super::input::Input;
use super::output::{Output, leave_stdout};
use super::progress::Progress;
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::guest;
use crate::image::{Compress, Format, Subformat};
use crate::job::convert::{self, Convert};
use crate::job::copy::Settings;
use crate::job::round::{self, Finished, Updated};
use crate::job::source;
use crate::monitor::{Counter, Level, Monitor};
use crate::source::OnReadError;
use crate::unit::bytes::human;

/// Convert a disk or image, copying only what its file systems use
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul convert /dev/sdb server.qcow2
  haul convert --compress zstd disk.raw disk.qcow2
  haul convert -f qcow2 -O raw server.qcow2 server.img
  haul convert -O vhd -o subformat=fixed server.qcow2 server.vhd
  haul convert appliance.ova cos://images-1250000000/appliance.qcow2
  haul convert -O raw nbd+unix:///?socket=/run/vddk.sock - | zstd > server.raw.zst
  haul convert --resume /dev/sdb server.qcow2       go on after an interruption

Blocks that no file system uses are left out and read as zeroes in the copy; --all-blocks copies
them too. Beside DST a DST.manifest is written: `haul verify DST.manifest DST` proves the copy.")]
pub struct Arguments {
    /// A disk such as /dev/sdb, an image file, cos://BUCKET/KEY, or nbd://HOST/EXPORT
    #[arg(value_parser = location_parser())]
    src: Location,
    /// The image to write: a file, an object, - for standard output, or null: for nowhere
    #[arg(value_parser = location_parser())]
    dst: Location,
    #[command(flatten)]
    input: Input,
    /// Format of DST (default: by its extension, else raw)
    #[arg(short = 'O', value_name = "FORMAT")]
    to: Option<Format>,
    /// How a vhd or vmdk DST is laid out: subformat=fixed|dynamic, subformat=monolithicSparse|streamOptimized
    #[arg(short, value_name = "OPTION")]
    options: Option<String>,
    /// Compress a qcow2 DST
    #[arg(long, value_enum, default_value = "none", value_name = "METHOD")]
    compress: Method,
    /// Copy blocks that no file system uses, too
    #[arg(long)]
    all_blocks: bool,
    /// Fix the copy so that it boots on virtio hardware (see `haul plan`); needs root and FUSE
    #[arg(long)]
    fix: bool,
    /// Replace DST if it exists
    #[arg(long)]
    force: bool,
    /// Bring DST, a copy of SRC made before, up to date: to qcow2 what changed is appended; of an object that is raw or
    /// a fixed vhd the touched parts are sent again
    #[arg(long, conflicts_with_all = ["fix", "force", "to", "options", "compress", "dry_run"])]
    update: bool,
    /// Go on with an interrupted conversion of the same SRC with the same options
    #[arg(long)]
    resume: bool,
    /// Copy a disk that is in use; the copy may be torn, and its manifest says so
    #[arg(long)]
    inconsistent: bool,
    /// What to do about unreadable sectors
    #[arg(long, value_enum, default_value = "fail", value_name = "ACTION")]
    on_read_error: Action,
    /// Write the manifest to this file (default: DST.manifest; none beside standard output)
    #[arg(long, value_name = "FILE", conflicts_with = "update")]
    manifest: Option<PathBuf>,
    /// Worker threads (default: one per processor)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    None,
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    Fail,
    Zero,
}

impl Arguments {
    fn job(&self) -> Result<Convert> {
        let format = self.to.unwrap_or_else(|| format_by_extension(self.dst.file_name()));
        let compress = match self.compress {
            Method::None => Compress::None,
            Method::Zlib => Compress::Zlib,
            Method::Zstd => Compress::Zstd,
        };
        Ok(Convert {
            source: self.src.clone(),
            destination: self.dst.clone(),
            cloud: self.input.cloud.clone(),
            source_format: self.input.format,
            member: self.input.member.clone(),
            gate: self.input.references.gate(),
            settings: Settings {
                format,
                subformat: self.options.as_deref().map(subformat).transpose()?,
                compress,
                all_blocks: self.all_blocks,
                on_read_error: match self.on_read_error {
                    Action::Fail => OnReadError::Fail,
                    Action::Zero => OnReadError::Zero,
                },
            },
            inconsistent: self.inconsistent,
            force: self.force || self.update,
            resume: self.resume,
            fix: self.fix.then(guest::Options::default),
            manifest: self.manifest.clone(),
            threads: self.threads.unwrap_or_else(super::default_threads),
        })
    }
}

/// Appends a round to DST; false when a whole copy is due instead.
fn update(
    arguments: &Arguments,
    job: &mut Convert,
    output: &Output,
    stop: &Arc<AtomicBool>,
    progress: &Arc<Progress>,
) -> Result<bool> {
    let monitor: Arc<dyn Monitor> = progress.clone();
    let finished = Finished {
        copy: job.destination.clone(),
        cloud: job.cloud.clone(),
        resume: job.resume,
        threads: job.threads,
    };
    let options = source::Options {
        format: job.source_format,
        gate: &job.gate,
        all_blocks: job.settings.all_blocks,
        inconsistent: arguments.inconsistent,
    };
    let updated = job
        .open_source(stop, &monitor)
        .and_then(|opened| round::update(&finished, opened, &options, stop, &monitor));
    progress.finish();
    match updated? {
        Updated::Round(report) => {
            output.result(&report, &super::fix::text(&report));
            Ok(true)
        }
        Updated::Dead { bytes, settings } => {
            job.settings = settings;
            let dead = human(bytes);
            monitor.note(Level::Info, &format!("{dead} of the image are dead: a whole copy is made"));
            Ok(false)
        }
    }
}

/// The value of QEMU's only option that has a meaning here.
fn subformat(option: &str) -> Result<Subformat> {
    match option.split_once('=') {
        Some(("subformat", name)) => name.parse(),
        _ => Err(Error::new(Kind::Usage, "convert.option", format!("unknown option {option:?}"))
            .remedy("the only one is subformat=NAME")),
    }
}

fn format_by_extension(name: &OsStr) -> Format {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    extension.parse().unwrap_or(Format::Raw)
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let mut job = arguments.job()?;
    if job.destination == Location::Stdout {
        leave_stdout();
    }
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    if arguments.update && update(arguments, &mut job, output, stop, &progress)? {
        return Ok(());
    }
    if arguments.dry_run {
        let plan = convert::dry_run(&job, stop, &monitor)?;
        progress.finish();
        output.result(&plan, &plan.to_string());
        return Ok(());
    }
    let converted = convert::convert(&job, stop, &monitor);
    progress.finish();
    let report = converted?;
    let (read, skipped) = (progress.get(Counter::Read), progress.get(Counter::Skipped));
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{}: {} {} image of a {} disk",
        report.destination,
        human(report.image_bytes),
        job.settings.format,
        human(report.size)
    );
    let _ = writeln!(
        text,
        "read {}, skipped {} unused, in {:.1} s",
        human(read),
        human(skipped),
        progress.elapsed().as_secs_f64()
    );
    if let Some(fixes) = &report.fixes {
        text.insert_str(0, fixes);
    }
    if report.resumed_from > 0 {
        let _ = writeln!(text, "resumed at {}", human(report.resumed_from));
    }
    let _ = writeln!(text, "source root {}", report.source_root.0);
    if let Some(manifest) = &report.manifest {
        let _ = writeln!(text, "manifest    {}", manifest.display());
    }
    output.result(&report, &text);
    Ok(())
}
