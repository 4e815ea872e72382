//! The `haul` command: parse, run, print the error once, exit with its code.

fn main() -> std::process::ExitCode {
    // Before anything else, while there is one thread: the process that owns a copy's mounts is this program too, and so is
    // the first process of an appliance.
    match haul::guest::internal_entry(std::env::args_os()).or_else(haul::guest::first_process) {
        Some(code) => code,
        None => haul::cli::main(),
    }
}
