//! `haul jobs`: the migrations of this host.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Subcommand;

use super::output::Output;
use crate::config;
use crate::error::Result;
use crate::job::migrate::{self, Migration, Options, Results};
use crate::job::state::{self, Record, State};
use crate::monitor::Monitor;
use crate::unit::bytes::human;

/// List the jobs of this host, look at one, or clean up after one
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul jobs
  haul jobs show server-20260101-0a1b2c
  haul jobs clean server-20260101-0a1b2c     drops its upload, its object and its folder")]
pub struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    state: config::State,
}

#[derive(Subcommand)]
enum Action {
    /// Everything known of one job
    Show {
        /// The job's id
        id: String,
    },
    /// Drop an unfinished upload and its object, and forget the job; an imported image stays
    Clean {
        /// The job's id
        id: String,
    },
}

/// Runs the command.
pub fn run(arguments: &Arguments, output: &Output, stop: &Arc<AtomicBool>) -> Result<()> {
    let folder = arguments.state.folder()?;
    match &arguments.action {
        None => {
            let jobs: Vec<Record<Options, Results>> = state::list(&folder)
                .iter()
                .filter_map(|id| state::read(&state::jobs_folder(&folder).join(id)).ok())
                .collect();
            let mut text = String::new();
            for job in &jobs {
                let _ = writeln!(text, "{:<32} {:<9} {}", job.id, word(&job.state), job.options.source);
            }
            output.result(&jobs, if jobs.is_empty() { "no jobs" } else { &text });
            Ok(())
        }
        Some(Action::Show { id }) => {
            let job: Record<Options, Results> = state::read(&state::jobs_folder(&folder).join(id))?;
            output.result(&job, &describe(&job));
            Ok(())
        }
        Some(Action::Clean { id }) => {
            let job = Migration::open(&folder, id)?;
            let monitor: Arc<dyn Monitor> = Arc::new(output.progress());
            migrate::discard(&job, stop, &monitor)?;
            output.result(&serde_json::json!({"cleaned": id}), &format!("{id}: nothing is left"));
            Ok(())
        }
    }
}

fn word(state: &State) -> &'static str {
    match state {
        State::Begun => "copying",
        State::Copied => "verifying",
        State::Verified => "verified",
        State::Importing { .. } => "importing",
        State::Done { .. } => "done",
    }
}

fn describe(job: &Record<Options, Results>) -> String {
    let results = &job.results;
    let mut text = String::new();
    let _ = writeln!(text, "job    {}, begun {}, {}", job.id, job.created, word(&job.state));
    let _ = writeln!(text, "source {}", job.options.source);
    if !results.guest.is_empty() {
        let _ = writeln!(text, "guest  {}, declared as {}, {}", results.guest, results.os, results.boot);
    }
    for (name, bytes) in &results.counters {
        let _ = writeln!(text, "{name:<8} {}", human(*bytes));
    }
    for warning in &results.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    if let Some(image) = &results.image {
        let _ = writeln!(text, "image  {image}");
    }
    if !matches!(job.state, State::Done { .. }) {
        let _ = writeln!(text, "go on with: haul migrate --resume {}", job.id);
    }
    text
}
