//! cloud-init: finds the cloud's config drive, boots without one, and leaves the server who it is.

use super::{os_conf, packages};
use crate::error::Result;
use crate::guest::inspect::{CLOUD_INIT_OFF, CloudInit, Guest, cloud_configs};
use crate::guest::plan::{Draft, Line, Options};

/// Sorts after the distribution's own files.
const OURS: &str = "/etc/cloud/cloud.cfg.d/99-haul.cfg";
/// What Ubuntu's installer leaves: a data source with the installation's users, which sorts after ours.
const INSTALLER: &str = "/etc/cloud/cloud.cfg.d/99-installer.cfg";

/// cloud-init keeps the server's identity: every default that would change it on a first boot is switched off.
/// `None` last: without a config drive there is nothing to wait for.
const CONFIG: &str = "\
# Written by haul: this server was migrated, not made from a template. It keeps its names, users and keys.
datasource_list: [ ConfigDrive, NoCloud, None ]
preserve_hostname: true
manage_etc_hosts: false
ssh_deletekeys: false
disable_root: false
users: []
apt:
  preserve_sources_list: true
locale: false
";

/// cloud-init as it will be there: from a package that the user gives, or as it is.
fn installed(guest: &Guest, options: &Options) -> Result<Option<CloudInit>> {
    let given = packages::missing(guest, options)?.into_iter().find(|package| package.name == "cloud-init");
    Ok(match given {
        Some(package) => Some(CloudInit {
            version: package.version,
            datasources: None,
            disabled: guest.tree.exists(CLOUD_INIT_OFF)?,
        }),
        None => guest.cloud_init.clone(),
    })
}

/// Writes haul's settings for cloud-init.
pub fn fix(guest: &Guest, options: &Options, draft: &mut Draft<'_>) -> Result<()> {
    let Some(installed) = installed(guest, options)? else {
        if options.force_import {
            return os_conf::fix(draft);
        }
        draft.warn(
            "cloud-init.none",
            "cloud-init is not installed: the cloud cannot set a password, keys or addresses",
            "it boots all the same; give its package with --package, or let --force-import set a password without it",
        );
        return Ok(());
    };
    if installed.disabled {
        draft.warn(
            "cloud-init.disabled",
            "cloud-init is switched off by /etc/cloud/cloud-init.disabled",
            "remove that file in the source if the cloud should set the machine up",
        );
    }
    draft.remove(INSTALLER, "the installer's data source would be taken instead of the cloud's")?;
    for path in cloud_configs(draft.tree())?.into_iter().filter(|path| path.as_str() > OURS) {
        draft.edit_lines(&path, "it would override the data sources haul sets", |line| {
            match line.starts_with("datasource_list:") {
                true => Line::Replace(format!("#{line}")),
                false => Line::Keep,
            }
        })?;
    }
    let mut text = CONFIG.to_owned();
    // Else it makes keys of the types the server does not have.
    let keys = draft.tree().files("/etc/ssh", "_key")?;
    let types: Vec<&str> = keys
        .iter()
        .filter_map(|path| path.strip_prefix("/etc/ssh/ssh_host_")?.strip_suffix("_key"))
        .filter(|kind| kind.chars().all(|c| c.is_ascii_alphanumeric()))
        .collect();
    if !types.is_empty() {
        text.push_str(&format!("ssh_genkeytypes: [ {} ]\n", types.join(", ")));
    }
    if options.no_cloud_init_network {
        text.push_str("network:\n  config: disabled\n");
    }
    draft.write(OURS, &text, 0o644, "the cloud's config drive is found, and the server keeps its identity")
}

/// The file of ifupdown that cloud-init overwrites when it configures the network; `None` when it does not.
pub fn configures_network<'a>(
    guest: &Guest,
    options: &Options,
    draft: &Draft<'_>,
) -> Result<Option<&'a str>> {
    let Some(installed) = installed(guest, options)? else { return Ok(None) };
    if installed.disabled || options.no_cloud_init_network {
        return Ok(None);
    }
    for path in cloud_configs(draft.tree())? {
        let text = draft.text(&path)?.unwrap_or_default();
        let packed: String = text.split_whitespace().collect();
        if packed.contains("network:{config:disabled}") || packed.contains("network:config:disabled") {
            return Ok(None);
        }
    }
    // The name lost its suffix in cloud-init 20.
    let major: Option<u32> = installed.version.split('.').next().and_then(|major| major.parse().ok());
    Ok(Some(match major {
        Some(major) if major < 20 => "/etc/network/interfaces.d/50-cloud-init.cfg",
        _ => "/etc/network/interfaces.d/50-cloud-init",
    }))
}
