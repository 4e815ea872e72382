//! The programs that build an initramfs: which of them a guest has, and how each is called. They are told which modules
//! to take, never to look at the machine they run on.

use serde::{Deserialize, Serialize};

use super::tree::Tree;
use crate::error::Result;

/// A program that builds an initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Builder {
    /// initramfs-tools: Debian, Ubuntu.
    InitramfsTools,
    /// dracut: Red Hat from 6 on, SUSE from 12 on, and whoever has chosen it.
    Dracut,
    /// mkinitcpio: Arch.
    Mkinitcpio,
    /// booster.
    Booster,
    /// make-initrd: ALT.
    MakeInitrd,
    /// mkinitrd of SUSE up to 11.
    MkinitrdSuse,
    /// mkinitrd of Red Hat up to 5.
    MkinitrdRedHat,
}

/// All of them, those first that a system would not have beside another.
const ALL: [Builder; 7] = [
    Builder::InitramfsTools,
    Builder::Dracut,
    Builder::Mkinitcpio,
    Builder::Booster,
    Builder::MakeInitrd,
    Builder::MkinitrdSuse,
    Builder::MkinitrdRedHat,
];

impl Builder {
    /// Finds the program of `tree` that builds initramfs images called like `image`.
    pub fn find(tree: &Tree, image: &str) -> Result<Option<Builder>> {
        let mut found = Vec::new();
        for builder in ALL {
            let mut installed = false;
            for program in builder.programs() {
                installed |= tree.exists(program)?;
            }
            // Later systems keep the name for a wrapper of dracut.
            let is_suse = tree.exists("/lib/mkinitrd/scripts")?;
            installed &= match builder {
                Builder::MkinitrdSuse => is_suse,
                Builder::MkinitrdRedHat => !is_suse && found.is_empty(),
                _ => true,
            };
            if installed {
                found.push(builder);
            }
        }
        // Only Debian's own is called so; where a system has two, the name of the image tells which one made it.
        let is_debians = image.contains("/initrd.img-");
        let made_it = |builder: &&Builder| (**builder == Builder::InitramfsTools) == is_debians;
        Ok(found.iter().find(made_it).or(found.first()).copied())
    }

    /// Where the program may be.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Builder::InitramfsTools => &["/usr/sbin/mkinitramfs", "/sbin/mkinitramfs"],
            Builder::Dracut => &["/usr/bin/dracut", "/sbin/dracut", "/usr/sbin/dracut"],
            Builder::Mkinitcpio => &["/usr/bin/mkinitcpio", "/sbin/mkinitcpio"],
            Builder::Booster => &["/usr/bin/booster"],
            Builder::MakeInitrd => &["/usr/sbin/make-initrd"],
            Builder::MkinitrdSuse | Builder::MkinitrdRedHat => &["/sbin/mkinitrd"],
        }
    }

    /// The package that it comes with.
    pub fn package(self) -> &'static str {
        match self {
            Builder::InitramfsTools => "initramfs-tools",
            Builder::Dracut => "dracut",
            Builder::Mkinitcpio => "mkinitcpio",
            Builder::Booster => "booster",
            Builder::MakeInitrd => "make-initrd",
            Builder::MkinitrdSuse | Builder::MkinitrdRedHat => "mkinitrd",
        }
    }

    /// The arguments by which it builds `aside` for `kernel` with `modules`. `help` is what it says of itself; `tight`
    /// asks for the tightest packing, where it can.
    pub fn arguments(
        self,
        kernel: &str,
        aside: &str,
        modules: &[String],
        help: &str,
        tight: bool,
    ) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |more: &[&str]| words.extend(more.iter().map(|word| (*word).to_owned()));
        match self {
            Builder::InitramfsTools => {
                if tight {
                    add(&["-c", "xz"]);
                }
                add(&["-o", aside, kernel]);
            }
            Builder::Dracut => {
                add(&["-f", "--add-drivers", &modules.join(" ")]);
                for option in ["--no-hostonly", "--no-hostonly-cmdline", "--no-hostonly-default-device"] {
                    if help.contains(option) {
                        add(&[option]);
                    }
                }
                if tight && help.contains("--xz") {
                    add(&["--xz"]);
                }
                add(&[aside, kernel]);
            }
            Builder::Mkinitcpio => add(&["-k", kernel, "-g", aside, "-S", "autodetect"]),
            Builder::Booster => add(&["build", "--force", "--universal", "--kernel-version", kernel, aside]),
            Builder::MakeInitrd => add(&["-k", kernel, "-b", "/var/tmp"]),
            // It knows names in /boot only.
            Builder::MkinitrdSuse => {
                let (image, name) =
                    (format!("vmlinuz-{kernel}"), format!("../{}", aside.trim_start_matches('/')));
                add(&["-k", &image, "-i", &name, "-m", &modules.join(" ")]);
            }
            Builder::MkinitrdRedHat => {
                add(&["-f"]);
                modules.iter().for_each(|module| add(&[&format!("--with={module}")]));
                add(&[aside, kernel]);
            }
        }
        words
    }

    /// The file it builds when told to build `aside`: make-initrd chooses the name itself.
    pub fn output(self, kernel: &str, aside: &str) -> String {
        match self {
            Builder::MakeInitrd => format!("/var/tmp/initrd-{kernel}.img"),
            _ => aside.to_owned(),
        }
    }

    /// Whether it must be asked what it can do first.
    pub fn has_versions(self) -> bool {
        self == Builder::Dracut
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tree::TextVolume;

    #[test]
    fn the_builder_is_found_by_what_is_there_and_what_it_made() {
        let find = |files: &[&str], image: &str| {
            let volume = files.iter().fold(TextVolume::default(), |volume, path| volume.file(path, ""));
            Builder::find(&Tree::new(Box::new(volume)), image).unwrap()
        };
        let (debian, red_hat) = ("/boot/initrd.img-6.1", "/boot/initramfs-5.14.img");
        assert_eq!(find(&["/usr/sbin/mkinitramfs"], debian), Some(Builder::InitramfsTools));
        assert_eq!(find(&["/usr/bin/dracut"], debian), Some(Builder::Dracut));
        let both = ["/usr/bin/dracut", "/usr/sbin/mkinitramfs"];
        assert_eq!(find(&both, debian), Some(Builder::InitramfsTools));
        assert_eq!(find(&both, red_hat), Some(Builder::Dracut));
        // SUSE 12 and Red Hat 7 have a mkinitrd that calls dracut.
        assert_eq!(
            find(&["/sbin/dracut", "/sbin/mkinitrd"], "/boot/initrd-3.12-default"),
            Some(Builder::Dracut)
        );
        assert_eq!(find(&["/sbin/mkinitrd"], "/boot/initrd-2.6.18.img"), Some(Builder::MkinitrdRedHat));
        let suse = ["/sbin/mkinitrd", "/lib/mkinitrd/scripts/setup-lvm2.sh"];
        assert_eq!(find(&suse, "/boot/initrd-3.0-default"), Some(Builder::MkinitrdSuse));
        assert_eq!(find(&[], debian), None);
    }

    #[test]
    fn dracut_is_asked_only_for_what_it_knows() {
        let modules = ["virtio_blk".to_owned(), "virtio_net".to_owned()];
        let words = |help| Builder::Dracut.arguments("5.14", "/var/tmp/x", &modules, help, true).join(" ");
        assert_eq!(words(""), "-f --add-drivers virtio_blk virtio_net /var/tmp/x 5.14");
        assert_eq!(
            words("--no-hostonly\n--xz"),
            "-f --add-drivers virtio_blk virtio_net --no-hostonly --xz /var/tmp/x 5.14"
        );
    }
}
