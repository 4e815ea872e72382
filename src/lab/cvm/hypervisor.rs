//! What the lab asks of a hypervisor, and the config drive that a guest's cloud-init reads.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use crate::error::Result;

/// A machine to start: one disk on virtio-blk, one card on virtio-net, nothing of the source's hardware.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its id, for names and messages.
    pub id: String,
    /// A raw disk that must not change: writes go to a throwaway overlay.
    pub disk: PathBuf,
    /// Start it with UEFI instead of BIOS.
    pub uefi: bool,
    /// Files of the config drive by path; none means no drive.
    pub config_drive: Option<BTreeMap<String, Vec<u8>>>,
    /// Where the serial console is written.
    pub console: PathBuf,
}

/// Runs machines. Calls block; each comes on a thread of its own.
pub trait Hypervisor: Send + Sync {
    /// Boots the machine until its user space is up, and ends it. An error when it does not come up.
    fn prove(&self, machine: &Machine) -> Result<()>;

    /// Runs the machine until it powers off or `stop` is set. `started` is called once when it has power.
    fn run(&self, machine: &Machine, started: &dyn Fn(), stop: &AtomicBool) -> Result<()>;
}

/// The label that makes a volume a config drive for cloud-init.
pub const CONFIG_DRIVE_LABEL: &str = "config-2";

/// The files of a config drive in OpenStack's layout, as CVM's guests get them.
pub fn config_drive(
    instance_id: &str,
    hostname: &str,
    zone: &str,
    user_data: &[u8],
) -> BTreeMap<String, Vec<u8>> {
    let about = json!({
        "uuid": instance_id, "hostname": hostname, "name": hostname, "availability_zone": zone, "launch_index": 0,
    });
    let mut files =
        BTreeMap::from([("openstack/latest/meta_data.json".to_owned(), about.to_string().into_bytes())]);
    if !user_data.is_empty() {
        files.insert("openstack/latest/user_data".to_owned(), user_data.to_vec());
    }
    files
}
