//! Has a guest say, when it is booted on trial, how it came up: by a script in a copy that is thrown away.

use super::at_start::{self, Script};
use crate::error::{Error, Kind, Result};
use crate::guest::inspect::Guest;
use crate::guest::plan::{Draft, Plan};

/// What the line begins with that the script prints.
pub const MARKER: &str = "HAUL-BOOT ";
/// Where the script is put, and the user's own.
const OURS: &str = "/usr/local/sbin/haul-boot-probe";
const THEIRS: &str = "/usr/local/sbin/haul-boot-script";
const REASON: &str = "haul boot: it says how the guest came up";
/// An address may come after everything else. What is mounted is held against fstab, which all systems have; it may name a
/// point by a link or with a slash behind it. There is no network to mount anything over.
const TEXT: &str = r#"#!/bin/sh
# Written by haul into a copy that is thrown away: says on the serial port how this server came up.
PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
list() { tr '\n' ',' | sed 's/,$//'; }
say() { for port in /dev/ttyS0 /dev/ttyAMA0; do printf '\r\n%s\r\n' "$*" >$port; done 2>/dev/null; }
root=$(findmnt -no SOURCE / 2>/dev/null || awk '$2 == "/" {device = $1} END {print device}' /proc/mounts)
addresses() { ip -o -4 addr show scope global 2>/dev/null | awk '{print $2 ":" $4}' | list; }
tries=60
while [ -z "$(addresses)" ] && [ $tries -gt 0 ]; do sleep 1; tries=$((tries - 1)); done
mounted() { awk -v point="$1" '$2 == point {found = 1} END {exit !found}' /proc/mounts; }
unmounted=$(awk '$1 !~ /^#/ && $2 ~ /^\// && $3 !~ /^(nfs|cifs|smb|ceph|gluster|lustre|fuse|9p|afs)/ &&
  $4 !~ /noauto|nofail|_netdev/ {print $2}' /etc/fstab | while read -r point; do
  mounted "$point" || mounted "$(readlink -f "$point")" || echo "$point"
done | list)
dmesg -n 1 2>/dev/null
script=
if [ -x /usr/local/sbin/haul-boot-script ]; then
  said=$(/usr/local/sbin/haul-boot-script 2>&1 </dev/null)
  script=$?
  printf '%s\n' "$said" | tail -n 50 | while read -r line; do say "HAUL-SCRIPT $line"; done
fi
say "HAUL-BOOT root=$root addresses=$(addresses) unmounted=$unmounted script=$script END"
"#;

/// The changes that have `guest` print its line, after it has run `script`.
pub fn plan(guest: &Guest, script: Option<&str>) -> Result<Plan> {
    let mut draft = Draft::new(&guest.tree, &[]);
    if let Some(script) = script {
        draft.write(THEIRS, script, 0o755, REASON)?;
    }
    let ours = Script {
        path: OURS,
        text: TEXT,
        unit: "haul-boot-probe",
        description: "Say how this server came up",
        after: "multi-user.target",
        reason: REASON,
    };
    if !at_start::install(&ours, &mut draft)? {
        return Err(Error::new(Kind::Image, "guest.probe", "cannot have the guest say how it came up")
            .because("nothing would start it: there is no systemd and no rc.local"));
    }
    Ok(draft.plan(guest))
}

/// What a guest says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Inside {
    /// The device of its root.
    pub root: String,
    /// Its network cards and their addresses: `eth0:10.0.2.15/24`.
    pub addresses: Vec<String>,
    /// What fstab mounts, and is not mounted.
    pub unmounted: Vec<String>,
    /// The exit code of the user's script.
    pub script: Option<i32>,
}

impl Inside {
    /// From the line; `None` when it is not whole. The line is hostile.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, words) = line.split_once(MARKER)?;
        let words = words.trim_end().strip_suffix(" END")?;
        let value = |key: &str| words.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let list = |key: &str| -> Option<Vec<String>> {
            Some(value(key)?.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect())
        };
        Some(Inside {
            root: value("root")?.to_owned(),
            addresses: list("addresses")?,
            unmounted: list("unmounted")?,
            script: value("script")?.parse().ok(),
        })
    }

    /// What is not as it should be.
    pub fn complaints(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.root.is_empty() {
            found.push("its root has no device".to_owned());
        }
        if self.addresses.is_empty() {
            found.push("no network card has an address".to_owned());
        }
        found.extend(self.unmounted.iter().map(|point| format!("{point} is not mounted")));
        if let Some(code) = self.script.filter(|code| *code != 0) {
            found.push(format!("the script ended with exit code {code}"));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_names_what_fstab_mounts_and_is_not_there_and_runs_the_users() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::create_dir(at("data")).unwrap();
        std::os::unix::fs::symlink(at("data"), at("link")).unwrap();
        let mounts = format!("/dev/vda1 / ext4 rw 0 0\n/dev/vda2 {} ext4 rw 0 0\n", at("data"));
        std::fs::write(at("mounts"), mounts).unwrap();
        let (link, slash) = (at("link"), at("data") + "/");
        let fstab = format!(
            "# /dev/x /comment ext4\nUUID=1 / ext4 defaults 0 1\nUUID=2 {link} ext4 defaults\nUUID=2 {slash} ext4 defaults\n\
             UUID=3 /gone xfs defaults 0 2\nUUID=4 /maybe ext4 nofail\nUUID=5 /later ext4 noauto\n\
             nas:/x /nas nfs4 rw 0 0\n/dev/x /remote ext4 _netdev\nUUID=6 none swap sw 0 0\n"
        );
        std::fs::write(at("fstab"), fstab).unwrap();
        std::fs::write(at("script"), "#!/bin/sh\necho hello\nexit 4\n").unwrap();
        std::fs::write(at("port"), "").unwrap();
        let script = TEXT
            .replace("/dev/ttyS0 /dev/ttyAMA0", &at("port"))
            .replace(">$port", ">>$port")
            .replace("/proc/mounts", &at("mounts"))
            .replace("/etc/fstab", &at("fstab"))
            .replace(THEIRS, &at("script"))
            .replace("dmesg -n 1", "true")
            .replace("tries=60", "tries=0");
        for executable in [false, true] {
            std::fs::write(at("port"), "").unwrap();
            let mode = if executable { "755" } else { "644" };
            assert!(
                std::process::Command::new("chmod").args([mode, &at("script")]).status().unwrap().success()
            );
            let done = std::process::Command::new("sh").args(["-c", &script]).status().unwrap();
            assert!(done.success());
            let said = std::fs::read_to_string(at("port")).unwrap();
            let line = said.lines().find(|line| line.starts_with(MARKER)).unwrap();
            let inside = Inside::parse(line).unwrap();
            assert_eq!(inside.unmounted, ["/gone"], "{said}");
            assert_eq!(inside.script, executable.then_some(4), "{said}");
            assert_eq!(said.contains("HAUL-SCRIPT hello"), executable, "{said}");
        }
    }

    #[test]
    fn what_a_guest_says_is_told_and_what_is_missing_is_complained_of() {
        let whole = "x HAUL-BOOT root=/dev/vda1 addresses=eth0:10.0.2.15/24 unmounted= script=0 END";
        let inside = Inside::parse(whole).unwrap();
        assert_eq!((inside.root.as_str(), inside.addresses.len()), ("/dev/vda1", 1));
        assert_eq!(inside.complaints(), [""; 0]);
        let broken = "HAUL-BOOT root= addresses= unmounted=/data,/srv script=3 END";
        let told = Inside::parse(broken).unwrap().complaints().join("; ");
        let expected = "its root has no device; no network card has an address; /data is not mounted; \
                        /srv is not mounted; the script ended with exit code 3";
        assert_eq!(told, expected);
        let without = "HAUL-BOOT root=/dev/vda1 addresses=eth0:10.0.2.15/24 unmounted= script= END";
        assert_eq!(Inside::parse(without).unwrap().script, None);
        for cut in 0..whole.len() {
            assert_eq!(Inside::parse(&whole[..cut]), None, "{cut}");
        }
    }
}
