//! From what inspection found in a guest to the `OsType` and `OsVersion` that ImportImage takes here.

use super::cvm::{Architecture, OsChoice, OsDetail, SupportedOs};
use crate::error::{Error, Kind, Result};

/// The name under which the cloud takes any Linux it has no name for.
const OTHER: &str = "Other Linux";

/// `ID` of os-release(5), and the names clouds list it by; compared without case and spaces.
const NAMES: &[(&str, &[&str])] = &[
    ("almalinux", &["AlmaLinux"]),
    ("centos", &["CentOS"]),
    ("coreos", &["CoreOS"]),
    ("debian", &["Debian"]),
    ("fedora", &["Fedora"]),
    ("freebsd", &["FreeBSD"]),
    ("opencloudos", &["OpenCloudOS"]),
    ("openeuler", &["openEuler"]),
    ("opensuse", &["OpenSUSE"]),
    ("opensuse-leap", &["OpenSUSE"]),
    ("rhel", &["Redhat", "Red Hat Enterprise Linux"]),
    ("rocky", &["RockyLinux", "Rocky"]),
    ("sled", &["SUSE"]),
    ("sles", &["SUSE"]),
    ("tencentos", &["TencentOS", "TencentOS Server"]),
    ("ubuntu", &["Ubuntu"]),
];

/// Chooses the operating system to declare for a guest with os-release's `id` and `version` (`VERSION_ID`).
///
/// A version the cloud does not list becomes `Other Linux`, never the nearest listed one: the cloud fits the image to
/// what is declared. An error when that is not offered either.
pub fn choose(id: &str, version: &str, arch: Architecture, supported: &SupportedOs) -> Result<OsChoice> {
    let id = id.to_ascii_lowercase();
    let names = NAMES.iter().find(|(known, _)| *known == id).map_or(&[][..], |(_, names)| names);
    let major = version.split('.').next().unwrap_or_default();
    let listed = supported.linux.iter().find(|name| names.iter().any(|known| same(known, name)));
    if let Some(name) = listed {
        let version = match detail(name, arch, supported) {
            Some(detail) => [version, major].into_iter().find(|v| detail.os_versions.iter().any(|o| o == v)),
            // An edition that lists names alone takes the major version.
            None if supported.details.is_empty() && !major.is_empty() => Some(major),
            None => None,
        };
        if let Some(version) = version {
            return Ok(OsChoice { os_type: name.clone(), os_version: version.to_owned() });
        }
    }
    let other = detail(OTHER, arch, supported);
    if let Some(version) = other.and_then(|detail| detail.os_versions.last()) {
        return Ok(OsChoice { os_type: OTHER.to_owned(), os_version: version.clone() });
    }
    Err(Error::new(
        Kind::Cloud,
        "cloud.os",
        format!("the cloud imports neither {id} {version} nor `{OTHER}` for {}", arch.name()),
    )
    .because(format!("it lists {}", supported.linux.join(", ")))
    .remedy("give the operating system to declare with --os-type and --os-version"))
}

fn detail<'a>(name: &str, arch: Architecture, supported: &'a SupportedOs) -> Option<&'a OsDetail> {
    supported.details.iter().find(|detail| {
        same(&detail.os_name, name)
            && (detail.architecture.is_empty() || detail.architecture.iter().any(|a| a == arch.name()))
    })
}

fn same(a: &str, b: &str) -> bool {
    let letters = |text: &str| text.replace(' ', "").to_ascii_lowercase();
    letters(a) == letters(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(details: &[(&str, &[&str])]) -> SupportedOs {
        SupportedOs {
            linux: ["CentOS", "Debian", "Ubuntu", OTHER].map(str::to_owned).into(),
            windows: vec!["Windows".into()],
            details: details
                .iter()
                .map(|(name, versions)| OsDetail {
                    os_name: (*name).into(),
                    os_versions: versions.iter().map(|v| (*v).to_owned()).collect(),
                    architecture: vec!["x86_64".into()],
                })
                .collect(),
        }
    }

    fn chosen(id: &str, version: &str, supported: &SupportedOs) -> String {
        choose(id, version, Architecture::X86_64, supported).unwrap().to_string()
    }

    #[test]
    fn a_listed_version_is_declared_and_a_newer_one_is_other_linux() {
        let os = supported(&[("Debian", &["9", "10"]), ("Ubuntu", &["18", "20"]), (OTHER, &["8"])]);
        assert_eq!(chosen("debian", "10", &os), "Debian 10");
        assert_eq!(chosen("debian", "12", &os), "Other Linux 8");
        assert_eq!(chosen("ubuntu", "20.04", &os), "Ubuntu 20");
        assert_eq!(chosen("arch", "", &os), "Other Linux 8");
    }

    #[test]
    fn an_edition_without_versions_takes_the_major_one() {
        assert_eq!(chosen("centos", "7.9", &supported(&[])), "CentOS 7");
    }

    #[test]
    fn another_architecture_is_refused_with_the_list() {
        let os = supported(&[("Debian", &["10"]), (OTHER, &["8"])]);
        let error = choose("debian", "10", Architecture::Arm64, &os).unwrap_err();
        assert_eq!(error.id(), "cloud.os");
        assert!(error.why().contains("CentOS, Debian"));
    }
}
