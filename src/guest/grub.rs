//! Builds GRUB for another firmware in the guest's tree, as grub-install does, but without a look at the machine.

use std::fs;
use std::path::Path;

use super::steps::{TOOL_TIME, guest_program, has_room, step_error};
use crate::error::{Error, Kind, Result};
use crate::host::child;

/// Where distributions put GRUB's modules: a folder for each platform.
pub const MODULES: [&str; 3] = ["/usr/lib/grub", "/usr/share/grub2", "/usr/lib/grub2"];
/// The program that puts modules together.
const PROGRAMS: [&str; 2] = ["/usr/bin/grub-mkimage", "/usr/bin/grub2-mkimage"];
/// What a folder of modules has.
pub const INDEX: &str = "moddep.lst";

/// Builds `core` for `platform` of these modules; it does first what `config` says. Modules that the menu loads go beside it.
pub fn build(platform: &str, core: &str, modules: &[String], config: &str) -> Result<String> {
    let from = MODULES.iter().map(|folder| format!("{folder}/{platform}"));
    let from = from.into_iter().find(|folder| Path::new(folder).join(INDEX).exists());
    let from =
        from.ok_or_else(|| failed(core).because(format!("the guest has no modules for {platform}")))?;
    let folder = core.rsplit_once('/').map_or("/", |(folder, _)| folder);
    fs::create_dir_all(folder).map_err(|error| step_error("make", folder, error))?;
    let mut files = Vec::new();
    let mut bytes = 0;
    for entry in fs::read_dir(&from).map_err(|error| step_error("read", &from, error))? {
        let entry = entry.map_err(|error| step_error("read", &from, error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let meta = entry.metadata().map_err(|error| step_error("read", &name, error))?;
        if meta.is_file() && [".mod", ".lst", ".img"].iter().any(|end| name.ends_with(end)) {
            bytes += meta.len();
            files.push(name);
        }
    }
    has_room(core, bytes, 0)?;
    for name in files {
        let (from, to) = (format!("{from}/{name}"), format!("{folder}/{name}"));
        fs::copy(from, &to).map_err(|error| step_error("write", &to, error))?;
    }
    let script = format!("{folder}/load.cfg");
    fs::write(&script, config).map_err(|error| step_error("write", &script, error))?;
    let menu = folder.rsplit_once('/').map_or("/", |(folder, _)| folder);
    let mut command = guest_program(&PROGRAMS, "grub-common (grub2-tools)")?;
    command.args(["-O", platform, "-d", &from, "-c", &script, "-p", menu, "-o", core]).args(modules);
    child::run(&mut command, TOOL_TIME)
        .and_then(child::Finished::success)
        .map_err(|error| failed(core).because(format!("{}: {}", error.what(), error.why())))?;
    Ok(format!("built {core}"))
}

fn failed(core: &str) -> Error {
    Error::new(Kind::Image, "guest.grub", format!("cannot build the guest's {core}"))
        .remedy("see that GRUB's programs and modules for that platform are in the guest, or give their packages with --package")
}
