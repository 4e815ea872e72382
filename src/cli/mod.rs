//! The command line: raw arguments to a job, its outcome to a person or a program. One file per command.

mod boot;
mod check;
mod compare;
mod config;
mod convert;
mod fix;
#[cfg(feature = "net")]
mod import;
mod input;
mod inspect;
#[cfg(feature = "net")]
mod jobs;
#[cfg(feature = "net")]
mod lab;
#[cfg(feature = "net")]
mod migrate;
mod output;
mod plan;
mod progress;
#[cfg(feature = "net")]
mod upload;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::file::File;
use crate::error::{Error, Kind, Result};
use output::Output;

/// Exit code of a command that did its work but met non-fatal errors, which it listed.
const WITH_WARNINGS: u8 = 14;

#[derive(Parser)]
#[command(
    name = "haul",
    version,
    about = "Moves a server's disks, or a disk image, into the cloud: checked, copied, proven",
    after_help = "Exit codes: 0 done, 1 internal, 2 usage, 3 preflight, 4 source, 5 image, 6 destination, 7 network, \
                  8 cloud, 9 credentials, 10 mismatch, 11 boot, 12 interrupted (resumable), 13 privileges, \
                  14 done with warnings"
)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options every command has.
#[derive(clap::Args)]
struct Global {
    /// Print JSON: one document, or for long work one event a line
    #[arg(long, global = true, help_heading = "Every command")]
    json: bool,
    /// Print the result and errors only
    #[arg(short, long, global = true, help_heading = "Every command")]
    quiet: bool,
    /// Say more on standard error; twice for debugging
    #[arg(short, long, global = true, help_heading = "Every command", action = clap::ArgAction::Count)]
    verbose: u8,
    /// Read defaults from this file (default: /etc/haul/haul.toml, if it is there)
    #[arg(long, global = true, help_heading = "Every command", env = "HAUL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Arguments),
    Convert(convert::Arguments),
    Compare(compare::Arguments),
    Verify(verify::Arguments),
    Check(check::Arguments),
    Plan(plan::Arguments),
    Fix(fix::Fix),
    Undo(fix::Undo),
    Config(config::Arguments),
    Boot(boot::Arguments),
    #[cfg(feature = "net")]
    Migrate(Box<migrate::Arguments>),
    #[cfg(feature = "net")]
    Upload(Box<upload::Arguments>),
    #[cfg(feature = "net")]
    Import(Box<import::Arguments>),
    #[cfg(feature = "net")]
    Jobs(jobs::Arguments),
    #[cfg(feature = "net")]
    Lab(lab::Arguments),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let file = match File::find(std::env::args_os(), std::env::var_os("HAUL_CONFIG")) {
        Ok(file) => file,
        Err(error) => {
            Output::new(false, false).error(&error);
            return ExitCode::from(error.kind().exit_code());
        }
    };
    let matches = config::with_defaults(Arguments::command(), &file).try_get_matches();
    let arguments = match matches.and_then(|matches| Arguments::from_arg_matches(&matches)) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors; clap prints each where it belongs.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { Kind::Usage.exit_code() } else { 0 });
        }
    };
    start_log(arguments.global.verbose);
    let output = Output::new(arguments.global.json, arguments.global.quiet);
    let outcome = stop_on_signal().and_then(|stop| run(&arguments.command, &file, &output, &stop));
    match outcome {
        Ok(()) if let Some(kind) = output.failed() => ExitCode::from(kind.exit_code()),
        Ok(()) if output.warned() => ExitCode::from(WITH_WARNINGS),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn run(command: &Command, file: &File, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    match command {
        Command::Inspect(arguments) => inspect::run(arguments, output, stop),
        Command::Convert(arguments) => convert::run(arguments, output, stop),
        Command::Compare(arguments) => compare::run(arguments, output, stop),
        Command::Verify(arguments) => verify::run(arguments, output, stop),
        Command::Check(arguments) => check::run(arguments, output),
        Command::Fix(arguments) => fix::run(arguments, output, stop),
        Command::Undo(arguments) => fix::undo(arguments, output, stop),
        Command::Config(arguments) => config::run(arguments, file, output),
        Command::Plan(arguments) => plan::run(arguments, output, stop),
        Command::Boot(arguments) => boot::run(arguments, output, stop),
        #[cfg(feature = "net")]
        Command::Migrate(arguments) => migrate::run(arguments, output, stop),
        #[cfg(feature = "net")]
        Command::Upload(arguments) => upload::run(arguments, output, stop),
        #[cfg(feature = "net")]
        Command::Import(arguments) => import::run(arguments, output, stop),
        #[cfg(feature = "net")]
        Command::Jobs(arguments) => jobs::run(arguments, output, stop),
        #[cfg(feature = "net")]
        Command::Lab(arguments) => lab::run(arguments, output, stop),
    }
}

/// A flag that the first SIGINT or SIGTERM sets; the second ends the process at once.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|error| {
                Error::new(Kind::Internal, "signal.register", "cannot listen to signals").caused_by(error)
            })?;
    }
    Ok(stop)
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
}

/// Worker threads when the user names no number: one for each processor this process may use.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
