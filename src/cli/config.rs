//! `haul config show`: what the options are when none is given on the command line.

use std::fmt::Write;

use clap::{Command, Subcommand};
use serde_json::json;

use super::output::Output;
use crate::config::file::{self, File};
use crate::error::Result;

/// Show the options that the environment and the configuration file set
#[derive(clap::Args)]
#[command(after_help = "Examples:
  haul config show
  haul --config site.toml config show --json

An option on the command line counts before the environment, the environment before the file, the file before
what haul does by itself. Keys of the cloud are shown by where they were found, never themselves.")]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Print each option, its value, and where that comes from
    Show,
}

/// Runs the command.
pub fn run(arguments: &Arguments, file: &File, output: &Output) -> Result<()> {
    let Action::Show = arguments.action;
    let mut text = String::new();
    let mut document = serde_json::Map::new();
    let origin = file.path.as_ref().map_or_else(String::new, |path| path.display().to_string());
    for key in file::KEYS {
        let variable = file::variable(key);
        let (value, from) = match (std::env::var(&variable), file.get(key)) {
            (Ok(value), _) => (Some(value), variable),
            (Err(_), Some(value)) => (Some(value.to_owned()), origin.clone()),
            (Err(_), None) => (None, "not set".to_owned()),
        };
        let _ = writeln!(text, "{key:<16} {:<32} {from}", value.as_deref().unwrap_or("-"));
        document.insert(key.into(), json!({"value": value, "from": from}));
    }
    let keys = keys();
    let _ = writeln!(text, "{:<16} {keys}", "keys");
    document.insert("keys".into(), json!({"from": keys}));
    output.result(&document, &text);
    Ok(())
}

/// Where the keys of the cloud are found.
#[cfg(feature = "net")]
fn keys() -> String {
    let home = std::env::var_os("HOME").map(std::path::PathBuf::from);
    let found = crate::cloud::credentials::find(
        &crate::cloud::credentials::Partial::default(),
        |name| std::env::var(name).ok(),
        home.as_deref(),
    );
    found.map_or_else(|error| error.what().to_owned(), |found| format!("from {}", found.origin))
}

#[cfg(not(feature = "net"))]
fn keys() -> String {
    "this haul was built without the network".into()
}

/// Makes what the file sets the defaults of the options of these names.
pub fn with_defaults(command: Command, file: &File) -> Command {
    command.mut_subcommands(|command| {
        command.mut_args(|argument| {
            let key = argument.get_id().as_str().to_owned();
            let shared = argument.get_env().is_some_and(|name| *name == *file::variable(&key));
            match file.get(&key).filter(|_| shared) {
                Some(value) => argument.default_value(value.to_owned()),
                None => argument,
            }
        })
    })
}
