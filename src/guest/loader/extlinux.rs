//! SYSLINUX's configuration: keywords of any case, an entry for each LABEL.

use super::{Entry, split_word, unquoted};

/// The entries that boot Linux.
pub fn entries(text: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut current = Entry::default();
    let mut end = |entry: &mut Entry| {
        let whole = std::mem::take(entry);
        if !whole.kernel.is_empty() {
            entries.push(whole);
        }
    };
    for line in text.lines() {
        let (key, value) = split_word(line);
        match key.to_ascii_lowercase().as_str() {
            "label" => end(&mut current),
            "kernel" | "linux" => current.kernel = unquoted(value.trim()),
            "initrd" => current.initrds.extend(value.trim().split(',').map(str::to_owned)),
            "append" => {
                for word in value.split_whitespace() {
                    match word.strip_prefix("initrd=") {
                        Some(paths) => current.initrds.extend(paths.split(',').map(str::to_owned)),
                        None => current.arguments.push(word.to_owned()),
                    }
                }
            }
            _ => {}
        }
    }
    end(&mut current);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_end_where_the_next_label_begins() {
        let text = "DEFAULT linux\nLABEL linux\n  KERNEL /boot/vmlinuz-linux\n  APPEND root=/dev/sda1 initrd=/boot/a.img,/boot/b.img\n\
                    label other\n linux /vmlinuz\n initrd /initrd\n append ro\n";
        let entries = entries(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].initrds, ["/boot/a.img", "/boot/b.img"]);
        assert_eq!(entries[0].arguments, ["root=/dev/sda1"]);
        assert_eq!((entries[1].kernel.as_str(), entries[1].arguments.len()), ("/vmlinuz", 1));
    }
}
