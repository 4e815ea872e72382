//! GRUB 2's script, GRUB 0.97's menu, and the environment block that GRUB 2 keeps variables in.

use super::{Entry, unquoted};

/// Bytes of an environment block: its file has always this length.
const ENVIRONMENT: usize = 1024;
/// What an environment block begins with.
const HEADER: &str = "# GRUB Environment Block\n";

/// The entries of a GRUB 2 menu that boot Linux.
pub fn entries(text: &str) -> Vec<Entry> {
    menu(text, &["linux", "linux16", "linuxefi"], &["initrd", "initrd16", "initrdefi"])
}

/// The entries of a GRUB 0.97 menu that boot Linux. Under Xen the kernel is a module, and so is its initramfs.
pub fn legacy_entries(text: &str) -> Vec<Entry> {
    menu(text, &["kernel"], &["initrd"])
}

fn menu(text: &str, kernel: &[&str], initrd: &[&str]) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some(word) if kernel.contains(&word) => {
                // `kernel --no-mem-option /vmlinuz`.
                let Some(path) = words.find(|word| !word.starts_with("--")) else { continue };
                entries.push(Entry {
                    kernel: unquoted(path),
                    arguments: words.map(str::to_owned).collect(),
                    initrds: Vec::new(),
                });
            }
            Some(word) if initrd.contains(&word) => {
                if let Some(entry) = entries.last_mut() {
                    entry.initrds.extend(words.map(unquoted));
                }
            }
            _ => {}
        }
    }
    entries
}

/// An environment block with the value of `name` as `edit` makes it; `None` when it is no such block, has no such
/// variable, keeps it as it is, or has no room for it.
pub fn with_variable(block: &str, name: &str, edit: impl Fn(&str) -> Option<String>) -> Option<String> {
    if block.len() != ENVIRONMENT || !block.starts_with(HEADER) {
        return None;
    }
    let mut new = String::with_capacity(ENVIRONMENT);
    let mut changed = false;
    // What follows the last variable is filling.
    for line in block.trim_end_matches('#').lines() {
        match line.split_once('=').filter(|(key, _)| *key == name).and_then(|(_, value)| edit(value)) {
            Some(value) => {
                changed = true;
                new.push_str(&format!("{name}={value}\n"));
            }
            None => new.push_str(&format!("{line}\n")),
        }
    }
    let filling = ENVIRONMENT.checked_sub(new.len())?;
    new.push_str(&"#".repeat(filling));
    changed.then_some(new)
}

/// The value of `name` in an environment block.
pub fn variable<'a>(block: &'a str, name: &str) -> Option<&'a str> {
    block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_menu_is_read_with_its_arguments_and_initramfs() {
        let text = "menuentry 'Debian' {\n\tlinux\t/vmlinuz-6.1 root=/dev/sda1 ro\n\tinitrd /ucode /initrd.img-6.1\n}\n\
                    # linux /commented\nlinux16 /memtest\n";
        let menu = entries(text);
        assert_eq!(menu.len(), 2);
        assert_eq!(menu[0].arguments, ["root=/dev/sda1", "ro"]);
        assert_eq!(menu[0].initrds.last().unwrap(), "/initrd.img-6.1");
        assert_eq!(menu[1].kernel, "/memtest");
        let legacy = legacy_entries(
            "title CentOS\n\troot (hd0,0)\n\tkernel /vmlinuz-2.6 ro root=/dev/hda1\n\tinitrd /initrd\n",
        );
        assert_eq!((legacy.len(), legacy[0].kernel.as_str()), (1, "/vmlinuz-2.6"));
    }

    #[test]
    fn an_environment_block_keeps_its_length() {
        let mut block = format!("{HEADER}saved_entry=x\nkernelopts=root=/dev/sda1 ro\n");
        block.push_str(&"#".repeat(ENVIRONMENT - block.len()));
        assert_eq!(variable(&block, "kernelopts"), Some("root=/dev/sda1 ro"));
        let new = with_variable(&block, "kernelopts", |value| Some(format!("{value} quiet"))).unwrap();
        assert_eq!(new.len(), ENVIRONMENT);
        assert!(new.contains("\nkernelopts=root=/dev/sda1 ro quiet\n####"), "{new}");
        assert!(new.starts_with(&format!("{HEADER}saved_entry=x\n")));
        assert_eq!(with_variable(&block, "kernelopts", |_| None), None);
        assert_eq!(with_variable(&block, "other", |_| Some(String::new())), None);
        assert_eq!(with_variable(&block, "kernelopts", |_| Some("x".repeat(1000))), None);
        assert_eq!(with_variable("kernelopts=x\n", "kernelopts", |_| Some(String::new())), None);
    }
}
