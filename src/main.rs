//! The `haul` command: parse, run, print the error once, exit with its code.

fn main() -> std::process::ExitCode {
    haul::cli::main()
}
