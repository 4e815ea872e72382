//! LVM: nothing that keeps it from seeing its disks under their new names.

use crate::error::Result;
use crate::guest::plan::{Draft, Line};

/// The devices LVM may use, by what the old machine said of them (lvmdevices(8)).
const DEVICES: &str = "/etc/lvm/devices/system.devices";
/// What old versions have found before.
const CACHES: [&str; 2] = ["/etc/lvm/cache/.cache", "/etc/lvm/.cache"];
/// Where filters are set.
const CONF: &str = "/etc/lvm/lvm.conf";

/// Frees LVM of the old machine's disks.
pub fn fix(draft: &mut Draft<'_>) -> Result<()> {
    draft
        .remove(DEVICES, "it lists disks by ids that the cloud's do not have: LVM would use none of them")?;
    for path in CACHES {
        draft.remove(path, "it lists disks by their old names")?;
    }
    draft.edit_lines(CONF, "it keeps LVM from disks of other names than those it lists", |line| {
        let name = line.trim_start().split(['=', ' ', '\t']).next().unwrap_or_default();
        match matches!(name, "filter" | "global_filter") && hides_disks(line) {
            true => Line::Replace(format!("# {line}")),
            false => Line::Keep,
        }
    })
}

/// Whether a filter rejects everything at its end, after accepting some.
fn hides_disks(line: &str) -> bool {
    let patterns = line.split('"').skip(1).step_by(2);
    patterns.last().is_some_and(|last| {
        let inner = last.strip_prefix('r').map(|rest| rest.trim_matches(['|', '/', '!', '#']));
        matches!(inner, Some(".*" | "" | "."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_ends_with_everything_rejected_hides_disks() {
        for (line, hides) in [
            (r#"filter = [ "a|^/dev/sda|", "r|.*|" ]"#, true),
            (r#"    global_filter = [ "a/sd.*/", "r/.*/" ]"#, true),
            (r#"filter = [ "a|.*|" ]"#, false),
            (r#"filter = [ "r|/dev/cdrom|" ]"#, false),
        ] {
            assert_eq!(hides_disks(line), hides, "{line}");
        }
    }
}
