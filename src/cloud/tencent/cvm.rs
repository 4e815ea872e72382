//! CVM's images and instances (API version 2017-03-12), on the public cloud and on private editions.
//!
//! Answers are decoded leniently: a field may be missing, null or of another type than documented.

use std::fmt;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::{Client, Repeat, api_code, input};
use super::wire::{lenient, member, strings};
use crate::error::{Error, Kind, Result};
use crate::unit::Secret;

/// The API's version.
pub const VERSION: &str = "2017-03-12";

/// Largest system disk that is imported, virtual and stored alike, in bytes. Some public documents say 50 GB stored.
pub const MAX_IMAGE: u64 = 500_000_000_000;
/// Longest image name, in characters.
pub const MAX_NAME: usize = 60;
/// Longest description that every edition takes, in characters.
pub const MAX_DESCRIPTION: usize = 60;
/// How far this machine's clock may be from the server's, in seconds.
pub const MAX_SKEW: u64 = 300;

/// The most a page may hold.
const PAGE: usize = 100;
/// The most pages read of one list: ten thousand entries.
const PAGES: usize = 100;

/// Which kind of cloud answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Edition {
    /// The public cloud.
    #[default]
    Public,
    /// A private edition (TCE): no boot mode in ImportImage, fewer filters.
    Tce,
}

/// The firmware an image boots with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// Legacy BIOS: what the API takes for granted.
    Bios,
    /// UEFI.
    Uefi,
}

/// A processor architecture that images can be imported for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit x86.
    X86_64,
    /// 64-bit ARM.
    Arm64,
}

impl Architecture {
    /// That of a guest whose machine the kernel calls `name`; `None` where the cloud has no such machine.
    pub fn of_guest(name: &str) -> Option<Self> {
        match name {
            "x86_64" => Some(Architecture::X86_64),
            "aarch64" => Some(Architecture::Arm64),
            _ => None,
        }
    }

    /// The name ImportImage takes.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::X86_64 => "x86_64",
            Architecture::Arm64 => "arm_64",
        }
    }
}

/// Operating system names and versions as ImportImage takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OsChoice {
    /// `OsType`, such as `Debian` or `Other Linux`.
    pub os_type: String,
    /// `OsVersion`, such as `10`.
    pub os_version: String,
}

impl fmt::Display for OsChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.os_type, self.os_version)
    }
}

/// What ImportImage is asked for. The link is not here: each try gets a fresh one.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The image's name, unique in account and region, at most 60 characters.
    pub name: String,
    /// At most 60 characters. Unique to the job: it tells an image of an earlier try from somebody else's.
    pub description: String,
    /// The operating system, from [`super::os::choose`].
    pub os: OsChoice,
    /// The architecture.
    pub architecture: Architecture,
    /// The firmware.
    pub boot_mode: BootMode,
    /// Import although the guest has no cloud-init.
    pub force: bool,
}

impl ImportRequest {
    /// Checks what every edition would refuse, before anything is copied.
    pub fn check(&self) -> Result<()> {
        for (what, text, longest) in
            [("name", &self.name, MAX_NAME), ("description", &self.description, MAX_DESCRIPTION)]
        {
            let length = text.chars().count();
            if !(1..=longest).contains(&length) {
                return Err(Error::new(
                    Kind::Usage,
                    "cloud.image-name",
                    format!("the image's {what} has {length} characters"),
                )
                .because(format!("it may have 1 to {longest}"))
                .remedy("choose another one"));
            }
        }
        Ok(())
    }
}

/// What DescribeImportImageOs lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SupportedOs {
    /// Names for Linux and the like.
    pub linux: Vec<String>,
    /// Names for Windows.
    pub windows: Vec<String>,
    /// Versions and architectures by name; empty where the edition does not tell.
    pub details: Vec<OsDetail>,
}

/// The versions of one operating system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct OsDetail {
    /// The name, as in the lists.
    #[serde(deserialize_with = "lenient")]
    pub os_name: String,
    /// Importable versions.
    #[serde(deserialize_with = "lenient")]
    pub os_versions: Vec<String>,
    /// Architectures (`x86_64`, `arm_64`).
    #[serde(deserialize_with = "lenient")]
    pub architecture: Vec<String>,
}

/// An image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Image {
    /// `img-…`.
    #[serde(deserialize_with = "lenient")]
    pub image_id: String,
    /// Its name.
    #[serde(deserialize_with = "lenient")]
    pub image_name: String,
    /// Its description.
    #[serde(deserialize_with = "lenient")]
    pub image_description: String,
    /// `NORMAL`, `IMPORTING`, `IMPORTFAILED`, …; unknown ones mean busy.
    #[serde(deserialize_with = "lenient")]
    pub image_state: String,
    /// Size in GB.
    #[serde(deserialize_with = "lenient")]
    pub image_size: u64,
    /// Platform as the cloud names it.
    #[serde(deserialize_with = "lenient")]
    pub platform: String,
}

/// An instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Instance {
    /// `ins-…`.
    #[serde(deserialize_with = "lenient")]
    pub instance_id: String,
    /// Its name.
    #[serde(deserialize_with = "lenient")]
    pub instance_name: String,
    /// `PENDING`, `RUNNING`, `LAUNCH_FAILED`, …; unknown ones mean busy.
    #[serde(deserialize_with = "lenient")]
    pub instance_state: String,
    /// The image it was made from.
    #[serde(deserialize_with = "lenient")]
    pub image_id: String,
    /// Addresses inside the VPC.
    #[serde(deserialize_with = "lenient")]
    pub private_ip_addresses: Vec<String>,
    /// Public addresses.
    #[serde(deserialize_with = "lenient")]
    pub public_ip_addresses: Vec<String>,
}

/// What RunInstances is asked for; one instance, paid by the hour.
#[derive(Clone, Debug, Default)]
pub struct RunRequest {
    /// The image.
    pub image_id: String,
    /// The zone, such as `ap-guangzhou-6`.
    pub zone: String,
    /// The type, such as `S5.MEDIUM2`; the cloud's choice when none.
    pub instance_type: Option<String>,
    /// The instance's name, at most 60 characters.
    pub name: String,
    /// VPC and subnet ids; the account's default when none.
    pub network: Option<(String, String)>,
    /// At most 64 ASCII characters; a second request with it buys nothing.
    pub client_token: String,
}

/// CVM in one region.
#[derive(Clone, Debug)]
pub struct Cvm {
    client: Client,
    edition: Edition,
}

impl Cvm {
    /// CVM behind `client`.
    pub fn new(client: Client, edition: Edition) -> Self {
        Cvm { client, edition }
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What can be imported here.
    pub fn supported_os(&self) -> Result<SupportedOs> {
        let answer = self.client.call("DescribeImportImageOs", &json!({}), Repeat::Freely)?;
        let lists = member(&answer, "ImportImageOsListSupported");
        let details = match member(&answer, "ImportImageOsVersionSet") {
            Value::Null => member(&answer, "ImportImageOsInfoSupported"),
            details => details,
        };
        Ok(SupportedOs {
            linux: strings(member(lists, "Linux")),
            windows: strings(member(lists, "Windows")),
            details: items(details),
        })
    }

    /// One request of ImportImage; the new image's id, where the answer names it.
    ///
    /// With `dry_run` nothing is made: the parameters are checked. An image's name must be looked up before this is
    /// sent again: see [`super::import`].
    pub fn import_image(
        &self,
        request: &ImportRequest,
        url: &Secret<String>,
        dry_run: bool,
    ) -> Result<Option<String>> {
        request.check()?;
        let boot_mode = match (self.edition, request.boot_mode) {
            (_, BootMode::Bios) => None,
            (Edition::Public, BootMode::Uefi) => Some("UEFI"),
            (Edition::Tce, BootMode::Uefi) => {
                return Err(Error::new(
                    Kind::Cloud,
                    "cloud.uefi",
                    format!("image {} cannot be imported: it boots with UEFI only", request.name),
                )
                .because("a private edition's ImportImage has no boot mode and starts images with BIOS")
                .remedy("install a BIOS boot loader in the source, or import on the public cloud"));
            }
        };
        let body = input(json!({
            "Architecture": request.architecture.name(),
            "OsType": request.os.os_type,
            "OsVersion": request.os.os_version,
            "ImageUrl": url.expose(),
            "ImageName": request.name,
            "ImageDescription": request.description,
            "Force": request.force.then_some(true),
            "DryRun": dry_run.then_some(true),
            "BootMode": boot_mode,
        }));
        let repeat = if dry_run { Repeat::Freely } else { Repeat::IfRefused };
        match self.client.call("ImportImage", &body, repeat) {
            Ok(answer) => Ok(answer["ImageId"].as_str().filter(|id| !id.is_empty()).map(str::to_owned)),
            Err(error) if dry_run && api_code(&error) == Some("DryRunOperation") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The image with this id; none when there is none.
    pub fn image(&self, id: &str) -> Result<Option<Image>> {
        let found: Result<Vec<Image>> = self.all("DescribeImages", json!({"ImageIds": [id]}), "ImageSet");
        match found {
            Ok(images) => Ok(images.into_iter().find(|image| image.image_id == id)),
            Err(error) if api_code(&error) == Some("InvalidImageId.NotFound") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The account's own image of this exact name; none when there is none.
    pub fn image_by_name(&self, name: &str) -> Result<Option<Image>> {
        let mut filters = vec![json!({"Name": "image-type", "Values": ["PRIVATE_IMAGE"]})];
        if self.edition == Edition::Public {
            // It matches parts of names, so the exact comparison below stays.
            filters.push(json!({"Name": "image-name", "Values": [name]}));
        }
        let images: Vec<Image> = self.all("DescribeImages", json!({"Filters": filters}), "ImageSet")?;
        Ok(images.into_iter().find(|image| image.image_name == name))
    }

    /// How many custom images the account may have in the region; none when the edition does not tell.
    pub fn image_quota(&self) -> Result<Option<u64>> {
        let answer = self.client.call("DescribeImageQuota", &json!({}), Repeat::Freely)?;
        Ok(answer["ImageNumQuota"].as_u64())
    }

    /// Deletes images.
    pub fn delete_images(&self, ids: &[String]) -> Result<()> {
        self.client.call("DeleteImages", &json!({"ImageIds": ids}), Repeat::IfRefused).map(drop)
    }

    /// Buys one instance; its id. Never repeated by itself: after an unknown outcome the caller may ask again with
    /// the same client token.
    pub fn run_instance(&self, request: &RunRequest) -> Result<String> {
        let network = request.network.as_ref().map(|(vpc, subnet)| json!({"VpcId": vpc, "SubnetId": subnet}));
        let body = input(json!({
            "Placement": {"Zone": request.zone},
            "ImageId": request.image_id,
            "InstanceType": request.instance_type,
            "InstanceChargeType": "POSTPAID_BY_HOUR",
            "InstanceName": request.name,
            "InstanceCount": 1,
            "VirtualPrivateCloud": network,
            // The guest keeps the users and passwords it came with.
            "LoginSettings": {"KeepImageLogin": "TRUE"},
            "ClientToken": request.client_token,
        }));
        let answer = self.client.call("RunInstances", &body, Repeat::Never)?;
        strings(&answer["InstanceIdSet"]).into_iter().next().ok_or_else(|| {
            Error::new(Kind::Cloud, "cloud.answer", "RunInstances named no instance")
                .fact("request_id", answer["RequestId"].as_str().unwrap_or_default())
        })
    }

    /// The instance with this id; none when there is none.
    pub fn instance(&self, id: &str) -> Result<Option<Instance>> {
        let found: Result<Vec<Instance>> =
            self.all("DescribeInstances", json!({"InstanceIds": [id]}), "InstanceSet");
        match found {
            Ok(instances) => Ok(instances.into_iter().find(|instance| instance.instance_id == id)),
            Err(error) if api_code(&error) == Some("InvalidInstanceId.NotFound") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Destroys instances.
    pub fn terminate_instances(&self, ids: &[String]) -> Result<()> {
        self.client.call("TerminateInstances", &json!({"InstanceIds": ids}), Repeat::IfRefused).map(drop)
    }

    /// Every entry of a paged list.
    fn all<T: DeserializeOwned + Default>(
        &self,
        action: &str,
        mut body: Value,
        list: &str,
    ) -> Result<Vec<T>> {
        let mut found = Vec::new();
        for _ in 0..PAGES {
            body["Offset"] = json!(found.len());
            body["Limit"] = json!(PAGE);
            let answer = self.client.call(action, &body, Repeat::Freely)?;
            let page: Vec<T> = items(&answer[list]);
            let length = page.len();
            found.extend(page);
            let total = answer["TotalCount"].as_u64().map(crate::unit::to_usize);
            if length == 0 || total.map_or(length < PAGE, |total| found.len() >= total) {
                return Ok(found);
            }
        }
        Err(Error::new(
            Kind::Cloud,
            "cloud.answer",
            format!("{action} lists more than {} entries", PAGES * PAGE),
        ))
    }
}

/// Each entry of an array; what is not an object decodes as the default.
fn items<T: DeserializeOwned + Default>(list: &Value) -> Vec<T> {
    let entries = list.as_array().map(Vec::as_slice).unwrap_or_default();
    entries.iter().map(|entry| T::deserialize(entry).unwrap_or_default()).collect()
}
