//! Options from flags, the environment and the configuration file, in that order.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: a failure is the finding")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn haul(config: &Path, variables: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    command.arg("--config").arg(config).args(args);
    command
        .env_remove("HAUL_REGION")
        .env_remove("HAUL_STATE_DIR")
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn a_flag_counts_before_the_environment_before_the_file_before_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("haul.toml");
    fs::write(&file, "region = \"from-file\"\nbandwidth_limit = \"5M\"\n").unwrap();
    let show = |variables: &[(&str, &str)]| -> Value {
        let output = haul(&file, variables, &["config", "show", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let plain = show(&[]);
    assert_eq!(plain["region"]["value"], "from-file");
    assert_eq!(plain["bandwidth_limit"]["from"], file.to_str().unwrap());
    assert_eq!(plain["bucket"]["value"], Value::Null);
    let named = show(&[("HAUL_REGION", "from-environment"), ("TENCENTCLOUD_SECRET_KEY", "canary")]);
    assert_eq!(named["region"]["value"], "from-environment");
    assert!(!named.to_string().contains("canary"));
}

#[cfg(feature = "net")]
#[test]
fn what_the_file_sets_is_what_the_commands_do() {
    let dir = tempfile::tempdir().unwrap();
    let (file, state) = (dir.path().join("haul.toml"), dir.path().join("state"));
    let job = state.join("jobs/one");
    fs::create_dir_all(&job).unwrap();
    fs::write(job.join("job.json"), "{}").unwrap();
    fs::write(&file, format!("state_dir = {state:?}\n")).unwrap();
    // The job's record is damaged: that it is complained of shows that it was found.
    let told = |args: &[&str], variables: &[(&str, &str)]| {
        let output = haul(&file, variables, args);
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(told(&["jobs", "show", "one"], &[]).contains(state.to_str().unwrap()));
    let other = dir.path().join("other");
    let (other, flag) = (other.to_str().unwrap(), ["jobs", "--state-dir", "/flag", "show", "one"]);
    assert!(told(&["jobs", "show", "one"], &[("HAUL_STATE_DIR", other)]).contains(other));
    assert!(told(&flag, &[("HAUL_STATE_DIR", other)]).contains("/flag"));
}

#[test]
fn a_file_that_cannot_be_used_stops_every_command_in_three_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("haul.toml");
    for text in ["regoin = \"x\"\n", "region = \n"] {
        fs::write(&file, text).unwrap();
        let output = haul(&file, &[], &["config", "show"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 3), "{stderr}");
        assert!(stderr.contains("haul.toml"), "{stderr}");
    }
    let missing = haul(Path::new("/nonexistent.toml"), &[], &["config", "show"]);
    assert_eq!(missing.status.code(), Some(2));
}
