//! The `haul` command.

fn main() -> std::process::ExitCode {
    if let Some(code) = haul::guest::internal_entry(std::env::args_os()) {
        return code;
    }
    std::process::ExitCode::SUCCESS
}
