//! What stands in for cloud-init in a forced import: a script that takes the password from the disk of settings which the cloud
//! attaches at each start.

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
const UNIT: &str = "\
# Written by haul, in the place of cloud-init.
[Unit]
Description=Set the password that the cloud gives this server
After=local-fs.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/haul-cloud-settings
";
/// Starts it: by a file, since a link is no text.
const WANTED: &str = "[Unit]\nWants=haul-cloud-settings.service\n";
const REASON: &str = "without cloud-init, it sets the password that the cloud gives the server";
/// What runs at the end of a start where there is no systemd: of Red Hat, of Debian and Ubuntu, and SUSE's, which need not be
/// there yet beside the other.
const AT_START: [(&str, &str); 3] = [
    ("/etc/rc.d/rc.local", "/etc/rc.d/rc.local"),
    ("/etc/rc.local", "/etc/rc.local"),
    ("/etc/init.d/boot.local", "/etc/init.d/after.local"),
];

/// Installs it.
pub fn fix(has_systemd: bool, draft: &mut Draft<'_>) -> Result<()> {
    draft.write(SCRIPT, TEXT, 0o755, REASON)?;
    if has_systemd {
        draft.write("/etc/systemd/system/haul-cloud-settings.service", UNIT, 0o644, REASON)?;
        return draft.write("/etc/systemd/system/multi-user.target.d/50-haul.conf", WANTED, 0o644, REASON);
    }
    for (beside, path) in AT_START {
        if !draft.is_file(beside)? {
            continue;
        }
        let old = draft.text(path)?.unwrap_or_else(|| "#!/bin/sh\n".into());
        return draft.write(path, &with_line(&old), 0o755, REASON);
    }
    draft.find(
        "cloud-init.no-start",
        Severity::Warning,
        &format!("nothing starts {SCRIPT}: there is no systemd and no rc.local"),
        "start it at the end of each start",
    );
    Ok(())
}

/// A script with the line that runs ours, before the one that ends it.
fn with_line(script: &str) -> String {
    if script.lines().any(|line| line == SCRIPT) {
        return script.to_owned();
    }
    let end =
        script.lines().rev().find(|line| !line.trim().is_empty()).filter(|line| line.trim() == "exit 0");
    let at = end.and_then(|end| script.rfind(end)).unwrap_or(script.len());
    let (head, tail) = script.split_at(at);
    let gap = if head.is_empty() || head.ends_with('\n') { "" } else { "\n" };
    format!("{head}{gap}{SCRIPT}\n{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_comes_once_and_before_the_end() {
        assert_eq!(with_line("#!/bin/sh\ntouch x"), format!("#!/bin/sh\ntouch x\n{SCRIPT}\n"));
        let ended = with_line("#!/bin/sh -e\n# exit 0\nexit 0\n\n");
        assert_eq!(ended, format!("#!/bin/sh -e\n# exit 0\n{SCRIPT}\nexit 0\n\n"));
        assert_eq!(with_line(&ended), ended);
    }
}
