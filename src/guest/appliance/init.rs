//! haul as the first process of an appliance: it loads the modules, carries out the plan on the disk, and switches off.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use super::END;
use crate::error::{Error, Kind, Result};
use crate::guest::install::Given;
use crate::guest::mounted;
use crate::guest::plan::Plan;
use crate::guest::say::Say;
use crate::host::first;

/// Where its archive has what it works with.
pub const MODULES: &str = "/modules";
pub const LIST: &str = "/modules.list";
pub const PLAN: &str = "/plan.json";
pub const PACKAGES: &str = "/packages";
/// The copy.
const DISK: &str = "/dev/vda";

/// The entry of an appliance's first process: `None` in every other one. To be called while there is one thread.
pub fn first_process() -> Option<ExitCode> {
    if !first::is_first(c"/init") || !Path::new(PLAN).exists() {
        return None;
    }
    match first::begin().and_then(|()| carry_out()) {
        Ok(true) => drop(Say::Done.send()),
        // What failed was said.
        Ok(false) => {}
        Err(error) => drop(Say::failed(&error).send()),
    }
    let _ = writeln!(std::io::stdout(), "\n{END}");
    first::power_off();
    Some(ExitCode::FAILURE)
}

fn carry_out() -> Result<bool> {
    let broken = |what: &str, error: std::io::Error| {
        Error::new(Kind::Internal, "appliance.start", format!("the appliance cannot {what}")).caused_by(error)
    };
    let list = fs::read_to_string(LIST).map_err(|error| broken("read its modules", error))?;
    for module in list.lines() {
        first::load(Path::new(module))?;
    }
    let plan = fs::read(PLAN).map_err(|error| broken("read its plan", error))?;
    let plan: Plan = serde_json::from_slice(&plan).map_err(|error| broken("read its plan", error.into()))?;
    let inside = |path: &Path| Path::new(PACKAGES).join(path.file_name().unwrap_or_default());
    let packages = Given::open(&plan.fixes, inside)?;
    first::leave_archive()?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(DISK)
        .map_err(|error| broken("open its disk", error))?;
    let root = Path::new("/root");
    fs::create_dir(root).map_err(|error| broken("make a folder", error))?;
    let done = mounted::carry_out(&disk, &plan, root, &packages)?;
    // What is said after this is so on the disk.
    disk.sync_all().map_err(|error| broken("write its disk", error))?;
    Ok(done)
}
