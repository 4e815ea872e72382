//! Which operating system a guest is, by what its distribution has written down about itself.

use serde::Serialize;

use super::tree::Tree;
use crate::error::Result;

/// The operating system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Os {
    /// What os-release(5) calls `ID`, such as `debian`; of a system older than that file, what it would be.
    pub id: String,
    /// `VERSION_ID`, such as `12`.
    pub version: String,
    /// `PRETTY_NAME`, or the line the system greets with.
    pub name: String,
    /// `ID_LIKE`: the systems it is made from.
    pub like: Vec<String>,
}

impl Os {
    /// Whether it is, or is made from, `id`.
    pub fn is_like(&self, id: &str) -> bool {
        self.id == id || self.like.iter().any(|like| like == id)
    }
}

/// Files of one line by which a system without os-release tells, the more special ones first.
const RELEASES: &[&str] =
    &["/etc/oracle-release", "/etc/centos-release", "/etc/redhat-release", "/etc/system-release"];

/// What the files of `tree` say.
pub fn detect(tree: &Tree) -> Result<Os> {
    for path in ["/etc/os-release", "/usr/lib/os-release"] {
        if let Some(text) = tree.text(path)? {
            return Ok(release(&text));
        }
    }
    for path in RELEASES {
        if let Some(text) = tree.text(path)? {
            return Ok(red_hat(text.trim()));
        }
    }
    if let Some(text) = tree.text("/etc/SuSE-release")? {
        return Ok(suse(&text));
    }
    if let Some(text) = tree.text("/etc/lsb-release")? {
        let value = |key: &str| value(&text, key);
        let id = value("DISTRIB_ID").to_lowercase();
        let like = if id == "ubuntu" { vec!["debian".to_owned()] } else { Vec::new() };
        return Ok(Os { id, version: value("DISTRIB_RELEASE"), name: value("DISTRIB_DESCRIPTION"), like });
    }
    if let Some(text) = tree.text("/etc/debian_version")? {
        let full = text.trim();
        let version = full.split('.').next().unwrap_or_default().to_owned();
        return Ok(Os {
            id: "debian".into(),
            version,
            name: format!("Debian GNU/Linux {full}"),
            ..Os::default()
        });
    }
    Ok(Os::default())
}

fn value(text: &str, key: &str) -> String {
    let line =
        text.lines().find_map(|line| line.trim_start().strip_prefix(key)?.trim_start().strip_prefix('='));
    line.map(|value| value.trim().trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
}

/// os-release(5).
fn release(text: &str) -> Os {
    Os {
        id: value(text, "ID"),
        version: value(text, "VERSION_ID"),
        name: value(text, "PRETTY_NAME"),
        like: value(text, "ID_LIKE").split_whitespace().map(str::to_owned).collect(),
    }
}

/// `CentOS release 6.10 (Final)`, `Red Hat Enterprise Linux Server release 5.11 (Tikanga)`.
fn red_hat(line: &str) -> Os {
    let ids = [
        ("Red Hat Enterprise", "rhel"),
        ("CentOS", "centos"),
        ("Oracle", "ol"),
        ("Enterprise Linux Enterprise Linux", "ol"),
        ("Scientific", "scientific"),
        ("Fedora", "fedora"),
        ("Amazon", "amzn"),
        ("TencentOS", "tencentos"),
        ("Tencent", "tencentos"),
    ];
    let id = ids.iter().find(|(start, _)| line.starts_with(start)).map_or("", |(_, id)| id);
    let version = line.split_once(" release ").and_then(|(_, rest)| rest.split_whitespace().next());
    Os {
        id: id.to_owned(),
        version: version.unwrap_or_default().to_owned(),
        name: line.to_owned(),
        like: if id == "rhel" { Vec::new() } else { vec!["rhel".to_owned()] },
    }
}

/// Three lines: the name, `VERSION = 11`, `PATCHLEVEL = 4`.
fn suse(text: &str) -> Os {
    let name = text.lines().next().unwrap_or_default().trim();
    let id = match name {
        _ if name.starts_with("openSUSE") => "opensuse",
        _ if name.contains("Desktop") => "sled",
        _ => "sles",
    };
    let (version, patch) = (value(text, "VERSION"), value(text, "PATCHLEVEL"));
    let version = if matches!(patch.as_str(), "" | "0") { version } else { format!("{version}.{patch}") };
    Os { id: id.into(), version, name: name.to_owned(), like: vec!["suse".to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tree::TextVolume;

    #[test]
    fn every_system_is_known_by_what_it_writes_about_itself() {
        for (path, text, expected) in [
            (
                "/etc/os-release",
                "NAME=\"Rocky Linux\"\nID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"Rocky Linux 9.4\"\n",
                "rocky 9.4",
            ),
            ("/usr/lib/os-release", "ID=debian\nVERSION_ID=\"12\"\n", "debian 12"),
            ("/etc/redhat-release", "Red Hat Enterprise Linux Server release 5.11 (Tikanga)\n", "rhel 5.11"),
            ("/etc/centos-release", "CentOS release 6.10 (Final)\n", "centos 6.10"),
            ("/etc/redhat-release", "Scientific Linux release 6.9 (Carbon)\n", "scientific 6.9"),
            ("/etc/system-release", "Amazon Linux AMI release 2013.09\n", "amzn 2013.09"),
            (
                "/etc/SuSE-release",
                "SUSE Linux Enterprise Server 11 (x86_64)\nVERSION = 11\nPATCHLEVEL = 4\n",
                "sles 11.4",
            ),
            (
                "/etc/SuSE-release",
                "openSUSE 12.1 (x86_64)\nVERSION = 12.1\nCODENAME = Asparagus\n",
                "opensuse 12.1",
            ),
            (
                "/etc/lsb-release",
                "DISTRIB_ID=Ubuntu\nDISTRIB_RELEASE=10.04\nDISTRIB_DESCRIPTION=\"Ubuntu 10.04.4 LTS\"\n",
                "ubuntu 10.04",
            ),
            ("/etc/debian_version", "6.0.10\n", "debian 6"),
            ("/etc/issue", "hello", " "),
        ] {
            let os = detect(&Tree::new(Box::new(TextVolume::default().file(path, text)))).unwrap();
            assert_eq!(format!("{} {}", os.id, os.version), expected, "{path}: {text}");
        }
        // Oracle ships Red Hat's file too.
        let both = TextVolume::default()
            .file("/etc/redhat-release", "Red Hat Enterprise Linux Server release 6.10\n")
            .file("/etc/oracle-release", "Oracle Linux Server release 6.10\n");
        let os = detect(&Tree::new(Box::new(both))).unwrap();
        assert!(os.id == "ol" && os.is_like("rhel"), "{os:?}");
    }
}
