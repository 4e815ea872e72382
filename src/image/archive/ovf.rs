//! The descriptor of an OVA (DMTF DSP0243, "Open Virtualization Format"): which of its files are disks.

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

/// The longest descriptor that is read, in bytes.
pub(super) const MAX_LEN: u64 = 1 << 20;

/// Whether `head` may begin a descriptor: XML, perhaps after a byte order mark.
pub(super) fn begins(head: &[u8]) -> bool {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    text.starts_with(b"<?xml") || text.starts_with(b"<Envelope") || text.starts_with(b"<ovf:Envelope")
}

/// The `href` of each file that a disk refers to, in the order of References; `None` if `xml` is no descriptor.
pub(super) fn disks(xml: &[u8]) -> Option<Vec<String>> {
    let mut reader = Reader::from_reader(xml.strip_prefix(b"\xef\xbb\xbf").unwrap_or(xml));
    let (mut is_envelope, mut files, mut used) = (false, Vec::new(), Vec::new());
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) | Event::Empty(element) => {
                let name = element.local_name();
                is_envelope |= name.as_ref() == b"Envelope";
                match name.as_ref() {
                    b"File" => files.push((attribute(&element, b"id")?, attribute(&element, b"href")?)),
                    // A disk that is empty at first refers to no file.
                    b"Disk" => used.extend(attribute(&element, b"fileRef")),
                    _ => {}
                }
            }
            Event::Eof => break,
            _ => {}
        }
    }
    let disks = files.into_iter().filter(|(id, _)| used.contains(id)).map(|(_, href)| href);
    is_envelope.then(|| disks.collect())
}

fn attribute(element: &BytesStart<'_>, name: &[u8]) -> Option<String> {
    let attribute = element.attributes().flatten().find(|each| each.key.local_name().as_ref() == name)?;
    attribute.normalized_value(XmlVersion::Implicit1_0).ok().map(|value| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_disk_if_the_disk_section_says_so() {
        let xml = br#"<?xml version="1.0"?>
            <ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
            <ovf:References>
              <ovf:File ovf:href="tools.iso" ovf:id="file1" ovf:size="100"/>
              <ovf:File ovf:href="a&amp;b.vmdk" ovf:id="file2"></ovf:File>
            </ovf:References>
            <ovf:DiskSection><ovf:Info>x</ovf:Info>
              <ovf:Disk ovf:capacity="8" ovf:diskId="d1" ovf:fileRef="file2"/>
              <ovf:Disk ovf:capacity="8" ovf:diskId="empty"/>
            </ovf:DiskSection></ovf:Envelope>"#;
        assert!(begins(xml));
        assert_eq!(disks(xml).unwrap(), ["a&b.vmdk"]);
    }

    #[test]
    fn other_or_broken_xml_is_no_descriptor() {
        for xml in ["<html/>", "<Envelope><File", "<Envelope><File id='x'/></Envelope>", "", "<a></b>"] {
            assert_eq!(disks(xml.as_bytes()), None, "{xml}");
        }
        assert_eq!(disks(b"<Envelope/>").unwrap(), Vec::<String>::new());
    }
}
