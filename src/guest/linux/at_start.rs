//! A script of haul's that runs at the end of each start: by systemd, or by what does so where there is none.

use super::has_systemd;
use crate::error::Result;
use crate::guest::plan::Draft;

/// What runs at the end of a start where there is no systemd: of Red Hat, of Debian and Ubuntu, and SUSE's, which need not be
/// there yet beside the other.
const WITHOUT_SYSTEMD: [(&str, &str); 3] = [
    ("/etc/rc.d/rc.local", "/etc/rc.d/rc.local"),
    ("/etc/rc.local", "/etc/rc.local"),
    ("/etc/init.d/boot.local", "/etc/init.d/after.local"),
];

/// A script.
pub struct Script<'a> {
    /// Where it is put.
    pub path: &'a str,
    /// The script.
    pub text: &'a str,
    /// What systemd calls it, without `.service`.
    pub unit: &'a str,
    /// What it does, for systemd's messages.
    pub description: &'a str,
    /// The unit that comes before it.
    pub after: &'a str,
    /// Why it is there.
    pub reason: &'a str,
}

/// Installs it; false when nothing would start it.
pub fn install(script: &Script<'_>, draft: &mut Draft<'_>) -> Result<bool> {
    let Script { path, text, unit, description, after, reason } = script;
    draft.write(path, text, 0o755, reason)?;
    if has_systemd(draft.tree())? {
        let service = format!(
            "# Written by haul.\n[Unit]\nDescription={description}\nAfter={after}\n[Service]\nType=oneshot\nExecStart={path}\n"
        );
        draft.write(&format!("/etc/systemd/system/{unit}.service"), &service, 0o644, reason)?;
        // By a file, since a link is no text.
        let wanted = format!("/etc/systemd/system/multi-user.target.d/50-{unit}.conf");
        draft.write(&wanted, &format!("[Unit]\nWants={unit}.service\n"), 0o644, reason)?;
        return Ok(true);
    }
    for (beside, file) in WITHOUT_SYSTEMD {
        if draft.is_file(beside)? {
            let old = draft.text(file)?.unwrap_or_else(|| "#!/bin/sh\n".into());
            draft.write(file, &with_line(&old, path), 0o755, reason)?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// The script `old` with `line`, before what ends it.
fn with_line(old: &str, line: &str) -> String {
    if old.lines().any(|there| there == line) {
        return old.to_owned();
    }
    let end = old.lines().rev().find(|line| !line.trim().is_empty()).filter(|line| line.trim() == "exit 0");
    let at = end.and_then(|end| old.rfind(end)).unwrap_or(old.len());
    let (head, tail) = old.split_at(at);
    let gap = if head.is_empty() || head.ends_with('\n') { "" } else { "\n" };
    format!("{head}{gap}{line}\n{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_comes_once_and_before_the_end() {
        let with = |old: &str| with_line(old, "/x/script");
        assert_eq!(with("#!/bin/sh\ntouch x"), "#!/bin/sh\ntouch x\n/x/script\n");
        let ended = with("#!/bin/sh -e\n# exit 0\nexit 0\n\n");
        assert_eq!(ended, "#!/bin/sh -e\n# exit 0\n/x/script\nexit 0\n\n");
        assert_eq!(with(&ended), ended);
    }
}
