//! `haul migrate`: the whole job.

use std::ffi::OsStr;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::ValueEnum;

use super::input::Fixes;
use super::output::Output;
use crate::config::{Cloud, Location, State, location_parser};
use crate::error::{Error, Kind, Result};
use crate::guest;
use crate::image::{Compress, Format, Gate};
use crate::job::copy::Settings;
use crate::job::fix;
use crate::job::migrate::{self, Finished, Migration, Options};
use crate::job::open::Opener;
use crate::monitor::{Level, Monitor};
use crate::source::OnReadError;
use crate::unit::bytes::human;

/// Migrate a disk or an image: fix the copy, upload it, import it, prove it
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul migrate --to image --bucket images-1250000000 /dev/sdb
  haul migrate --to image --bucket images-1250000000 --dry-run server.raw    show the changes
  haul migrate --resume server-20260101-0a1b2c                               go on after a stop

Keys come from TENCENTCLOUD_SECRET_ID and TENCENTCLOUD_SECRET_KEY, or tccli's files.
The source is never written: fix-ups are made in the copy, and listed in the report.")]
pub struct Arguments {
    /// A disk such as /dev/sdb, an image file, or an object as cos://BUCKET/KEY
    #[arg(required_unless_present = "resume", value_parser = location_parser())]
    src: Option<Location>,
    /// What to make
    #[arg(long, value_enum, default_value = "image")]
    to: To,
    /// The bucket that holds the image until it is imported
    #[arg(long, env = "HAUL_BUCKET", value_name = "BUCKET")]
    bucket: Option<String>,
    /// The object's key (default: the job's id)
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The image's name (default: the job's id)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Go on with this job
    #[arg(long, value_name = "ID", conflicts_with = "src")]
    resume: Option<String>,
    /// Format of SRC (default: probed; a device is raw)
    #[arg(short = 'f', value_name = "FORMAT")]
    from: Option<Format>,
    /// Compression of the image; importers may refuse zstd
    #[arg(long, value_enum, default_value = "zlib", value_name = "METHOD")]
    compress: Method,
    /// Use zstd although importers may refuse it
    #[arg(long)]
    force: bool,
    /// Leave the copy as the source is
    #[arg(long)]
    no_fix: bool,
    #[command(flatten)]
    fixes: Fixes,
    /// The operating system to declare, such as Debian (default: derived)
    #[arg(long, value_name = "NAME", requires = "os_version")]
    os_type: Option<String>,
    /// Its version
    #[arg(long, value_name = "VERSION", requires = "os_type")]
    os_version: Option<String>,
    /// Keep the object after the import
    #[arg(long)]
    keep_object: bool,
    /// Copy a disk that is in use; the copy may be torn, and the report says so
    #[arg(long)]
    inconsistent: bool,
    /// Copy blocks that no file system uses, too
    #[arg(long)]
    all_blocks: bool,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Worker threads (default: one per processor)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Seconds between two looks at the import
    #[arg(long, default_value = "10", value_name = "S")]
    poll: u64,
    /// Leave this check out (see `haul check`); may be given again
    #[arg(long, value_name = "ID")]
    skip_check: Vec<String>,
    /// Go on although a check fails
    #[arg(long)]
    ignore_check: bool,
    /// Afterwards run an instance of the image in this zone; this buys one
    #[arg(long, value_name = "ZONE")]
    run_in_zone: Option<String>,
    #[command(flatten)]
    cloud: Cloud,
    #[command(flatten)]
    state: State,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    /// An image in the cloud, by way of object storage
    Image,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    None,
    Zlib,
    Zstd,
}

impl Arguments {
    fn options(&self, opener: &Opener) -> Result<Options> {
        let To::Image = self.to;
        let missing = || {
            Error::new(Kind::Usage, "usage.missing", "a migration needs SRC and a bucket")
                .remedy("name the bucket with --bucket, HAUL_BUCKET or `bucket` in the configuration file")
        };
        if self.compress == Method::Zstd && !self.force {
            return Err(Error::new(
                Kind::Usage,
                "migrate.zstd",
                "zstd images may be refused by the importer",
            )
            .remedy("use --compress zlib, or add --force if your cloud takes zstd"));
        }
        Ok(Options {
            source: self.src.clone().ok_or_else(missing)?,
            source_format: self.from,
            bucket: self.bucket.clone().ok_or_else(missing)?,
            key: self.key.clone(),
            name: self.name.clone(),
            settings: Settings {
                format: Format::Qcow2,
                subformat: None,
                compress: match self.compress {
                    Method::None => Compress::None,
                    Method::Zlib => Compress::Zlib,
                    Method::Zstd => Compress::Zstd,
                },
                all_blocks: self.all_blocks,
                on_read_error: OnReadError::Fail,
            },
            fix: (!self.no_fix).then(|| self.fixes.options(opener)).transpose()?,
            os: self.os_type.clone().zip(self.os_version.clone()),
            force_import: self.fixes.force_import,
            keep_object: self.keep_object,
            inconsistent: self.inconsistent,
            cloud: self.cloud.clone(),
            threads: self.threads.unwrap_or_else(super::default_threads),
            poll_seconds: self.poll,
            skip_checks: self.skip_check.clone(),
            ignore_checks: self.ignore_check,
            run_in_zone: self.run_in_zone.clone(),
        })
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let folder = arguments.state.folder()?;
    let opener = Opener::new(&arguments.cloud, stop, &monitor);
    if arguments.dry_run {
        return dry_run(arguments, output, &opener, &monitor);
    }
    let mut job = match &arguments.resume {
        Some(id) => Migration::open(&folder, id)?,
        None => {
            let options = arguments.options(&opener)?;
            let stem = Path::new(options.source.file_name()).file_stem().map(OsStr::to_string_lossy);
            let name = stem.map_or_else(|| "disk".to_owned(), |stem| stem.into_owned());
            Migration::begin(&folder, &name, options)?
        }
    };
    let id = job.record.id.clone();
    let finished = migrate::run(&mut job, stop, &monitor);
    progress.finish();
    if finished.is_err() {
        let text = format!("job {id} is kept; `haul jobs clean {id}` drops it and what it has in the store");
        monitor.note(Level::Info, &text);
    }
    let finished = finished.map_err(|error| match error.kind() {
        Kind::Interrupted | Kind::Network | Kind::Credentials => {
            error.remedy(format!("go on with: haul migrate --resume {id}"))
        }
        _ => error.fact("job", id),
    })?;
    output.result(&finished, &text(&finished));
    Ok(())
}

fn dry_run(
    arguments: &Arguments,
    output: &Output,
    opener: &Opener,
    monitor: &Arc<dyn Monitor>,
) -> Result<()> {
    let options = arguments.options(opener)?;
    let image = opener.image(&options.source, options.source_format, &Gate::closed())?;
    let guest = guest::inspect(image.disk)?;
    let plan = match &options.fix {
        Some(fixes) => fix::plan(&guest, fixes, &**monitor)?,
        None => guest::Plan::default(),
    };
    let text = format!("{} on {} would be migrated; changes to the copy:\n{plan}", guest.os.name, guest.arch);
    output.result(&plan, &text);
    Ok(())
}

fn text(finished: &Finished) -> String {
    let results = &finished.results;
    let counter = |name: &str| human(results.counters.get(name).copied().unwrap_or(0));
    let mut text = String::new();
    let _ = writeln!(text, "image    {} ({}, {})", finished.image, results.os, results.boot);
    if let Some(instance) = &results.instance {
        let _ = writeln!(text, "instance {instance} is running");
    }
    let _ = writeln!(
        text,
        "bytes    read {}, skipped {}, sent {}",
        counter("read"),
        counter("skipped"),
        counter("written")
    );
    let times: Vec<_> = results.seconds.iter().map(|(step, took)| format!("{step} {took:.0} s")).collect();
    let _ = writeln!(text, "time     {}", times.join(", "));
    let _ = writeln!(text, "manifest {}", finished.manifest.display());
    let _ = writeln!(text, "report   {}", finished.report.display());
    text
}
