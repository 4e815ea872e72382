//! `haul verify`: proves a copy against its manifest, whole or by a sample.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use super::input::Input;
use super::output::Output;
use crate::config::{Location, location_parser};
use crate::error::{Error, Kind, Result};
use crate::manifest::sample::{self, Sampled, Share};
use crate::manifest::{Manifest, verify};
use crate::monitor::Monitor;
use crate::unit::bytes::human;

/// Prove a copy against its manifest: every chunk, and zeroes everywhere else
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul verify server.qcow2.manifest server.qcow2
  haul verify server.qcow2.manifest /dev/vdb        the image, written to a disk
  haul verify server.qcow2.manifest cos://images-1250000000/server.qcow2
  haul verify --sample 1% server.qcow2.manifest cos://images-1250000000/server.qcow2

A sample is drawn at random from the chunks that the manifest lists, those that are not all zero, and nothing else is
read. It says from how many damaged chunks on such a sample finds one with a probability of 99 %; it does not prove the
copy. The seed is printed: with --seed the same chunks are read again.")]
pub struct Arguments {
    /// The manifest written beside the copy
    manifest: PathBuf,
    /// The copy: an image file, a disk, or an object as cos://BUCKET/KEY
    #[arg(value_parser = location_parser())]
    copy: Location,
    #[command(flatten)]
    input: Input,
    /// Worker threads (default: one per processor)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Read only this share of the chunks, drawn at random: 1%, 0.5% or 500ppm
    #[arg(long, value_name = "SHARE")]
    sample: Option<Share>,
    /// Draw the sample that this number decides (default: a random one)
    #[arg(long, value_name = "N", requires = "sample")]
    seed: Option<u64>,
}

/// Extents named in a message at most; JSON output lists them all.
const NAMED: usize = 8;

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let manifest = Manifest::open(&arguments.manifest)?;
    let progress = Arc::new(output.progress());
    let monitor: Arc<dyn Monitor> = progress.clone();
    let input = &arguments.input;
    let threads = arguments.threads.unwrap_or_else(super::default_threads);
    let opener = input.opener(stop, &monitor);
    let opener = if arguments.sample.is_some() { opener.scattered() } else { opener };
    let image = opener.image(&arguments.copy, input.format, &input.references.gate())?;
    progress.begin("verify", Some(manifest.head.size));
    let advance = |done| progress.advance(done);
    if let Some(share) = arguments.sample {
        // Few enough digits to be typed again.
        let seed = arguments.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().1 >> 16 & 0xffff_ffff);
        let options = sample::Options { share, seed };
        let sampled = sample::verify(&manifest, &*image.disk, options, threads, stop, &advance);
        progress.finish();
        return tell_sample(arguments, &manifest, options, &sampled?, output);
    }
    let verdict = verify::verify(&manifest, &*image.disk, threads, stop, &advance);
    progress.finish();
    let verdict = verdict?;
    if let Some(error) = difference(arguments, &verdict) {
        return Err(error);
    }
    output.result(
        &json!({
            "copy": arguments.copy, "size": manifest.head.size, "compared": verdict.compared,
            "image_root": manifest.head.image_root, "source_root": manifest.head.source_root,
        }),
        &format!(
            "{}: proven, {} compared\nimage root  {}\nsource root {}",
            arguments.copy,
            human(verdict.compared),
            manifest.head.image_root.0,
            manifest.head.source_root.0
        ),
    );
    Ok(())
}

/// The error for a copy that differs.
fn difference(arguments: &Arguments, verdict: &verify::Verdict) -> Option<Error> {
    if verdict.differing.is_empty() {
        return None;
    }
    let count = verdict.differing.len();
    let named: Vec<_> = verdict.differing.iter().take(NAMED).map(|run| format!("{run:?}")).collect();
    let more = if count > NAMED { ", …" } else { "" };
    let error = Error::new(
        Kind::Mismatch,
        "verify.differs",
        format!("{} is not the copy its manifest describes", arguments.copy),
    )
    .because(format!("{count} extents differ (bytes {}{more})", named.join(", ")));
    let extents = verdict.differing.iter().map(|run| format!("{}..{}", run.start, run.end));
    Some(extents.fold(error, |error, extent| error.fact("extent", extent)))
}

/// Says what a sample found, and what that proves.
fn tell_sample(
    arguments: &Arguments,
    manifest: &Manifest,
    options: sample::Options,
    sampled: &Sampled,
    output: &Output,
) -> Result<()> {
    let Sampled { verdict, drawn, listed, found_from } = sampled;
    let unread = listed - drawn;
    if let Some(error) = difference(arguments, verdict) {
        return Err(error
            .fact("sample_seed", options.seed)
            .fact("sample_millionths", options.share.millionths())
            .fact("chunks_read", drawn)
            .fact("chunks_listed", listed)
            .fact("chunks_unread", unread));
    }
    let bytes_of = |chunks: u64| chunks.saturating_mul(manifest.head.chunk).min(manifest.head.bytes);
    let mut text = format!(
        "{}: {drawn} of {listed} chunks read ({} of {}), all as the manifest says; this is a sample, no proof\n\
         drawn at random: --sample {}ppm --seed {}",
        arguments.copy,
        human(verdict.compared),
        human(manifest.head.bytes),
        options.share.millionths(),
        options.seed,
    );
    match found_from {
        None => text.push_str("\nthe manifest lists no chunks: the copy should be zeroes, which are unread"),
        Some(1) => text.push_str("\nif any chunk were damaged, such a sample would find it with a probability of 99 % or more"),
        Some(bad) => text.push_str(&format!(
            "\nif {bad} or more chunks ({}) were damaged, wherever, such a sample would find one with a probability of \
             99 % or more; fewer may be missed",
            human(bytes_of(*bad))
        )),
    }
    text.push_str(&format!(
        "\nunread: the other {unread} chunks ({}), and whether all else is zeroes",
        human(manifest.head.bytes - verdict.compared.min(manifest.head.bytes))
    ));
    output.result(
        &json!({
            "copy": arguments.copy, "size": manifest.head.size, "compared": verdict.compared, "proven": false,
            "sample": {
                "millionths": options.share.millionths(), "seed": options.seed,
                "chunks_read": drawn, "chunks_listed": listed, "chunks_unread": unread,
                "bytes_read": verdict.compared, "bytes_listed": manifest.head.bytes, "zeroes_read": false,
                "found_with_99_percent": found_from.map(|bad| json!({"chunks": bad, "bytes": bytes_of(bad)})),
            },
        }),
        &text,
    );
    Ok(())
}
