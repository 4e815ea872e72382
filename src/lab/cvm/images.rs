//! The image actions: ImportImage and its checks, DescribeImportImageOs, DescribeImages, DeleteImages and the rest.

use std::sync::Arc;

use serde_json::{Value, json};

use super::gate::{Call, Fault};
use super::importer;
use super::world::{Image, ImageState};
use super::{Lab, Shapes, flag, new_id, page, text, texts};
use crate::cloud::tencent::Edition;

/// Custom images an account may have in a region.
const QUOTA: usize = 50;

/// What can be imported: the documented lists at the time of writing.
const SUPPORTED: &[(&str, &[&str])] = &[
    ("CentOS", &["5", "6", "7", "8"]),
    ("Ubuntu", &["10", "12", "14", "16", "18", "20"]),
    ("Debian", &["6", "7", "8", "9", "10"]),
    ("OpenSUSE", &["11", "12"]),
    ("SUSE", &["10", "11", "12", "13"]),
    ("CoreOS", &["7"]),
    ("FreeBSD", &["10"]),
    ("Redhat", &["5", "6", "7"]),
    ("Other Linux", &["8"]),
    ("Windows", &["2008", "2012", "2016"]),
];

pub(super) fn describe_import_image_os(lab: &Lab) -> Value {
    let linux: Vec<&str> =
        SUPPORTED.iter().map(|(name, _)| *name).filter(|name| *name != "Windows").collect();
    let versions: Vec<Value> = SUPPORTED
        .iter()
        .map(|(name, versions)| json!({"OsName": name, "OsVersions": versions, "Architecture": ["x86_64"]}))
        .collect();
    match (lab.config.edition, lab.config.shapes) {
        (Edition::Public, _) => json!({
            "ImportImageOsListSupported": {"Linux": linux, "Windows": ["Windows"]},
            "ImportImageOsVersionSet": versions,
        }),
        (Edition::Tce, Shapes::New) => json!({
            "ImportImageOsListSupported": {"Linux": linux, "Windows": ["Windows"]},
            "ImportImageOsInfoSupported": versions,
        }),
        (Edition::Tce, Shapes::Old) => {
            json!({"ImportImageOsListSupported": {"linux": linux, "windows": ["Windows"]}})
        }
    }
}

pub(super) fn import_image(lab: &Arc<Lab>, call: &Call) -> Result<Value, Fault> {
    let edition = lab.config.edition;
    let declared = declared(lab, call)?;
    let url = text(call, "ImageUrl").to_owned();
    let id = new_id("img");
    {
        let mut world = lab.world();
        if world.images.values().any(|image| image.name == declared.name) {
            let why = format!("The image name `{}` already exists.", declared.name);
            return Err(Fault::new("InvalidImageName.Duplicate", why));
        }
        if world.images.len() >= QUOTA {
            return Err(Fault::new("ImageQuotaLimitExceeded", format!("The quota is {QUOTA} images.")));
        }
        if flag(call, "DryRun") {
            return match edition {
                Edition::Public => Err(Fault::new(
                    "DryRunOperation",
                    "The request would have succeeded, but DryRun was set.",
                )),
                Edition::Tce => Ok(json!({})),
            };
        }
        world.images.insert(id.clone(), declared);
    }
    importer::spawn(lab, &id, url, flag(call, "Force"));
    Ok(match (edition, lab.config.shapes) {
        (Edition::Public, Shapes::New) => json!({"ImageId": id}),
        (Edition::Public, Shapes::Old) => json!({}),
        (Edition::Tce, _) => json!({"ImageId": id, "TaskId": "1000001", "flowId": 1_000_001}),
    })
}

/// The image as asked for, every parameter checked.
fn declared(lab: &Lab, call: &Call) -> Result<Image, Fault> {
    let edition = lab.config.edition;
    let architecture = text(call, "Architecture");
    let architectures: &[&str] = match edition {
        Edition::Public => &["x86_64", "i386", "arm_64"],
        Edition::Tce => &["x86_64", "arm_64"],
    };
    if !architectures.contains(&architecture) {
        return Err(Fault::new("InvalidParameterValue", format!("`{architecture}` is not an Architecture.")));
    }
    let (os_type, os_version) = (text(call, "OsType"), text(call, "OsVersion"));
    let versions = SUPPORTED.iter().find(|(name, _)| *name == os_type).ok_or_else(|| {
        Fault::new("InvalidImageOsType.Unsupported", format!("The OsType `{os_type}` is not supported."))
    })?;
    if !versions.1.contains(&os_version) {
        let why = format!("The OsVersion `{os_version}` is not supported for {os_type}.");
        return Err(Fault::new("InvalidImageOsVersion.Unsupported", why));
    }
    let (name, description) = (text(call, "ImageName"), text(call, "ImageDescription"));
    check_names(edition, name, description)?;
    let url = url::Url::parse(text(call, "ImageUrl")).ok();
    if !url.is_some_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host()) {
        return Err(Fault::new("InvalidParameter.InvalidParameterUrlError", "The ImageUrl is not a URL."));
    }
    let boot_mode = text(call, "BootMode");
    if !matches!(boot_mode, "" | "Legacy BIOS" | "UEFI") {
        return Err(Fault::new(
            "InvalidParameterValue.InvalidBootMode",
            format!("`{boot_mode}` is no BootMode."),
        ));
    }
    if !matches!(text(call, "LicenseType"), "" | "TencentCloud" | "BYOL") {
        return Err(Fault::new("InvalidParameterValue.InvalidLicenseType", "Use TencentCloud or BYOL."));
    }
    Ok(Image {
        name: name.to_owned(),
        description: description.to_owned(),
        os_type: os_type.to_owned(),
        os_version: os_version.to_owned(),
        architecture: architecture.to_owned(),
        uefi: boot_mode == "UEFI",
        state: ImageState::Importing,
        size: 0,
        disk: std::path::PathBuf::new(),
        created: lab.config.clock.unix(),
    })
}

fn check_names(edition: Edition, name: &str, description: &str) -> Result<(), Fault> {
    let (code, longest) = match edition {
        Edition::Public => ("InvalidParameterValue.TooLarge", 256),
        Edition::Tce => ("InvalidParameter.ValueTooLarge", 60),
    };
    if name.is_empty() {
        return Err(Fault::new("InvalidParameterValue", "The ImageName is empty."));
    }
    if name.chars().count() > 60 || description.chars().count() > longest {
        return Err(Fault::new(code, format!("ImageName takes 60 characters, ImageDescription {longest}.")));
    }
    Ok(())
}

pub(super) fn describe_images(lab: &Lab, call: &Call) -> Result<Value, Fault> {
    let edition = lab.config.edition;
    let ids = texts(call, "ImageIds");
    let filters = filters(call, edition)?;
    if !ids.is_empty() && !filters.is_empty() {
        let why = "ImageIds and Filters exclude each other.";
        return Err(Fault::new("InvalidParameter.InvalidParameterCoexistImageIdsFilters", why));
    }
    let world = lab.world();
    let chosen: Vec<Value> = world
        .images
        .iter()
        .filter(|(id, image)| {
            (ids.is_empty() || ids.contains(&id.as_str()))
                && filters.iter().all(|(name, values)| match name.as_str() {
                    "image-id" => values.contains(id),
                    "image-type" => values.iter().any(|value| value == "PRIVATE_IMAGE"),
                    "image-name" => values.iter().any(|value| image.name.contains(value.as_str())),
                    "platform" => values.contains(&image.os_type),
                    // No image has a tag.
                    _ => false,
                })
        })
        .map(|(id, image)| image.shown(id, edition))
        .collect();
    page(call, chosen, "ImageSet")
}

fn filters(call: &Call, edition: Edition) -> Result<Vec<(String, Vec<String>)>, Fault> {
    let known: &[&str] = match edition {
        Edition::Public => &["image-id", "image-type", "image-name", "platform", "tag-key", "tag-value"],
        Edition::Tce => &["image-id", "image-type"],
    };
    super::filters(call, known)
}

pub(super) fn describe_image_quota() -> Value {
    json!({"ImageNumQuota": QUOTA})
}

pub(super) fn delete_images(lab: &Lab, call: &Call) -> Result<Value, Fault> {
    let ids = texts(call, "ImageIds");
    let mut world = lab.world();
    for id in &ids {
        let image = find(&world.images, id)?;
        let in_use = world.instances.values().any(|instance| instance.image_id == *id);
        if image.state == ImageState::Importing || in_use {
            return Err(Fault::new("InvalidImageId.IncorrectState", format!("The image `{id}` is in use.")));
        }
    }
    if flag(call, "DryRun") {
        return Err(Fault::new("DryRunOperation", "The request would have succeeded, but DryRun was set."));
    }
    for id in ids {
        world.images.remove(id);
        lab.remove_folder(id);
    }
    Ok(json!({}))
}

pub(super) fn modify_image_attribute(lab: &Lab, call: &Call) -> Result<Value, Fault> {
    let id = text(call, "ImageId");
    let mut world = lab.world();
    let image = find(&world.images, id)?;
    let given = |name: &str, old: &str| match text(call, name) {
        "" => old.to_owned(),
        new => new.to_owned(),
    };
    let (name, description) =
        (given("ImageName", &image.name), given("ImageDescription", &image.description));
    check_names(lab.config.edition, &name, &description)?;
    if world.images.iter().any(|(other, image)| other != id && image.name == name) {
        return Err(Fault::new(
            "InvalidImageName.Duplicate",
            format!("The image name `{name}` already exists."),
        ));
    }
    if let Some(image) = world.images.get_mut(id) {
        image.name = name;
        image.description = description;
    }
    Ok(json!({}))
}

/// The image with this id, or the fault that says there is none.
pub(super) fn find<'a>(
    images: &'a std::collections::BTreeMap<String, Image>,
    id: &str,
) -> Result<&'a Image, Fault> {
    if !id.starts_with("img-") {
        return Err(Fault::new("InvalidImageId.Malformed", format!("`{id}` is no image id.")));
    }
    images
        .get(id)
        .ok_or_else(|| Fault::new("InvalidImageId.NotFound", format!("The image `{id}` does not exist.")))
}
