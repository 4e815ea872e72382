//! What the simulated account owns: images, instances, and the messages it was sent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::Injected;
use crate::cloud::tencent::Edition;

/// Messages kept; older ones are forgotten.
const NOTIFICATIONS: usize = 1000;

/// An image's life: `IMPORTING` to `NORMAL` or `IMPORTFAILED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Being fetched, judged and booted.
    Importing,
    /// Usable.
    Normal,
    /// Given up; why is in the messages only.
    Failed,
}

impl ImageState {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            ImageState::Importing => "IMPORTING",
            ImageState::Normal => "NORMAL",
            ImageState::Failed => "IMPORTFAILED",
        }
    }
}

/// A custom image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// What was declared.
    pub os_type: String,
    /// What was declared.
    pub os_version: String,
    /// What was declared.
    pub architecture: String,
    /// Whether UEFI was declared.
    pub uefi: bool,
    /// Where it is in its life.
    pub state: ImageState,
    /// Its virtual size in bytes, once known.
    pub size: u64,
    /// The raw disk, once it is `NORMAL`.
    pub disk: PathBuf,
    /// When it was made, seconds since 1970.
    pub created: i64,
}

impl Image {
    /// As DescribeImages shows it.
    pub fn shown(&self, id: &str, edition: Edition) -> Value {
        let mut shown = json!({
            "ImageId": id, "ImageName": self.name, "ImageDescription": self.description,
            "ImageState": self.state.name(), "ImageType": "PRIVATE_IMAGE", "ImageSource": "EXTERNAL_IMPORT",
            "ImageCreator": "100000000001", "ImageSize": self.size.div_ceil(crate::unit::GIB),
            "OsName": format!("{} {} 64bit", self.os_type, self.os_version), "Platform": self.os_type,
            "Architecture": self.architecture, "CreatedTime": super::iso_time(self.created),
            "SyncPercent": null, "IsSupportCloudinit": true, "SnapshotSet": [], "Tags": [],
        });
        if edition == Edition::Tce {
            shown["ImageFormat"] = "qcow2".into();
            shown["OsType"] = "linux".into();
            shown["OsVersion"] = self.os_version.clone().into();
        }
        shown
    }
}

/// An instance's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceState {
    /// Bought, not started yet.
    Pending,
    /// It never got power, or died at once.
    LaunchFailed,
    /// It has power.
    Running,
    /// It was asked to stop.
    Stopping,
    /// It has no power.
    Stopped,
    /// It was asked to start.
    Starting,
}

impl InstanceState {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            InstanceState::Pending => "PENDING",
            InstanceState::LaunchFailed => "LAUNCH_FAILED",
            InstanceState::Running => "RUNNING",
            InstanceState::Stopping => "STOPPING",
            InstanceState::Stopped => "STOPPED",
            InstanceState::Starting => "STARTING",
        }
    }
}

/// An instance.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// The image it runs.
    pub image_id: String,
    /// Its zone.
    pub zone: String,
    /// Its type.
    pub kind: String,
    /// The host name it is told in the config drive.
    pub hostname: String,
    /// What cloud-init runs.
    pub user_data: Option<String>,
    /// Where it is in its life.
    pub state: InstanceState,
    /// Its serial console.
    pub console: PathBuf,
    /// Set to take its power away.
    pub stop: Arc<AtomicBool>,
    /// When it was made, seconds since 1970.
    pub created: i64,
}

impl Instance {
    /// As DescribeInstances shows it.
    pub fn shown(&self, id: &str) -> Value {
        json!({
            "InstanceId": id, "InstanceName": self.name, "InstanceState": self.state.name(),
            "ImageId": self.image_id, "InstanceType": self.kind, "CPU": 1, "Memory": 1,
            "Placement": {"Zone": self.zone, "ProjectId": 0}, "RestrictState": "NORMAL",
            "InstanceChargeType": "POSTPAID_BY_HOUR", "CreatedTime": super::iso_time(self.created),
            // QEMU's user network gives every guest this one (slirp's first DHCP address).
            "PrivateIpAddresses": ["10.0.2.15"], "PublicIpAddresses": null, "DataDisks": null,
            "LatestOperationState": "SUCCESS", "Uuid": id,
        })
    }
}

/// Everything, behind one lock.
#[derive(Default)]
pub struct World {
    /// Images by id.
    pub images: BTreeMap<String, Image>,
    /// Instances by id.
    pub instances: BTreeMap<String, Instance>,
    /// Instance ids by client token.
    pub client_tokens: BTreeMap<String, Vec<String>>,
    /// Links that were handed to an import: each is good for one fetch.
    pub used_urls: BTreeSet<String>,
    /// Faults to show, by action.
    pub injected: BTreeMap<String, VecDeque<Injected>>,
    notifications: VecDeque<Value>,
}

impl World {
    /// Sends the account a message, as the cloud does by mail and console.
    pub fn notify(&mut self, image_id: &str, name: &str, code: &str, why: &str) {
        if self.notifications.len() == NOTIFICATIONS {
            self.notifications.pop_front();
        }
        self.notifications
            .push_back(json!({"ImageId": image_id, "ImageName": name, "Code": code, "LabReason": why}));
    }

    /// The messages, oldest first.
    pub fn notifications(&self) -> Vec<Value> {
        self.notifications.iter().cloned().collect()
    }
}
