//! What stands in for cloud-init in a forced import: a script that takes the password from the disk of settings which the cloud
//! attaches at each start.

use super::at_start::{self, Script};
use crate::error::Result;
use crate::guest::plan::{Draft, Severity};

/// Where the script is put.
const SCRIPT: &str = "/usr/local/sbin/haul-cloud-settings";
/// Addresses come by DHCP, names and keys stay the server's own. A password is set once: what the user makes of it later
/// stays, until the cloud has another one.
const TEXT: &str = r#"#!/bin/sh
# Written by haul: sets root's password to the one that the cloud gives this server, on the disk labelled config-2.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
known=/var/lib/haul/cloud-password
disk=$(blkid -t LABEL=config-2 -o device 2>/dev/null | head -n 1)
at=$(mktemp -d) || exit 1
trap 'umount "$at" 2>/dev/null; rmdir "$at"' EXIT
mount -t iso9660 -o ro "${disk:-/dev/cdrom}" "$at" 2>/dev/null || exit 0
for conf in "$at/qcloud_action/os.conf" "$at/os_action/os.conf"; do
  [ -f "$conf" ] || continue
  # Read, never run: who can write this disk must not be root here.
  password=$(sed -n 's/^password=//p' "$conf" | head -n 1 | tr -d '"\r')
  case $password in '$'*) ;; *) exit 0 ;; esac
  [ "$(cat "$known" 2>/dev/null)" != "$password" ] || exit 0
  printf 'root:%s\n' "$password" | chpasswd -e || exit 1
  mkdir -p "${known%/*}"
  (umask 077; printf '%s\n' "$password" >"$known")
  exit
done
"#;
const REASON: &str = "without cloud-init, it sets the password that the cloud gives the server";

/// Installs it.
pub fn fix(draft: &mut Draft<'_>) -> Result<()> {
    let script = Script {
        path: SCRIPT,
        text: TEXT,
        unit: "haul-cloud-settings",
        description: "Set the password that the cloud gives this server",
        after: "local-fs.target",
        reason: REASON,
    };
    if !at_start::install(&script, draft)? {
        draft.find(
            "cloud-init.no-start",
            Severity::Warning,
            &format!("nothing starts {SCRIPT}: there is no systemd and no rc.local"),
            "start it at the end of each start",
        );
    }
    Ok(())
}
