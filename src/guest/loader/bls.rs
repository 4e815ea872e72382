//! An entry's own file, as the Boot Loader Specification has it (type 1), and as Fedora's GRUB reads it.

use super::{Entry, split_word};

/// The entry in the file, if it boots a kernel.
pub fn entries(text: &str) -> Vec<Entry> {
    let mut entry = Entry::default();
    for line in text.lines() {
        let (key, value) = split_word(line);
        match key {
            "linux" => entry.kernel = value.trim().to_owned(),
            // May come several times; a variable may stand behind a path (`/initramfs.img $tuned_initrd`).
            "initrd" => {
                let paths = value.split_whitespace().filter(|word| !word.starts_with('$'));
                entry.initrds.extend(paths.map(str::to_owned));
            }
            "options" => entry.arguments.extend(value.split_whitespace().map(str::to_owned)),
            _ => {}
        }
    }
    if entry.kernel.is_empty() { Vec::new() } else { vec![entry] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_with_the_variables_it_names() {
        let text = "title CentOS Stream 8\nversion 4.18\nlinux /vmlinuz-4.18\ninitrd /initramfs-4.18.img $tuned_initrd\n\
                    options $kernelopts quiet\n# options no\n";
        let entries = entries(text);
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].kernel, "/vmlinuz-4.18");
        assert_eq!(entries[0].initrds, ["/initramfs-4.18.img"]);
        assert_eq!(entries[0].arguments, ["$kernelopts", "quiet"]);
        assert!(super::entries("title nothing\n").is_empty());
    }
}
