//! One header block of a tar archive (POSIX pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format").

use crate::unit::to_usize;

/// The unit of a tar archive, in bytes.
pub(in crate::image::archive) const BLOCK: u64 = 512;
/// The bytes of one block.
pub(super) type Block = [u8; to_usize(BLOCK)];

/// Where the size is in the block, for messages.
pub(super) const SIZE: u64 = 124;
/// Where the sparse map of an old GNU sparse header begins.
const SPARSE: usize = 386;
/// Entries of the map in the header itself, and in an extension block.
const SPARSE_IN_HEADER: usize = 4;
const SPARSE_IN_EXTENSION: usize = 21;
/// Two numbers of 12 bytes.
const SPARSE_ENTRY: usize = 24;

/// A header block whose checksum is right.
pub(super) struct Header<'a>(&'a Block);

/// Whether a file with the first block `block` is a tar archive. A boot sector's signature, which no tar archive has,
/// says that it is a disk whose owner made it look like one.
pub(in crate::image::archive) fn begins(block: &Block) -> bool {
    Header::new(block).is_some_and(|header| header.has_magic()) && block[510..] != [0x55, 0xaa]
}

fn field(block: &Block, at: usize, len: usize) -> &[u8] {
    block.get(at..at + len).unwrap_or_default()
}

/// The bytes before the first NUL.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

impl<'a> Header<'a> {
    /// The header in `block`, if its checksum says that it is one.
    pub(super) fn new(block: &'a Block) -> Option<Self> {
        let stored = number(field(block, 148, 8))?;
        let byte = |i: usize, byte: u8| if (148..156).contains(&i) { b' ' } else { byte };
        let unsigned: u64 = block.iter().enumerate().map(|(i, b)| u64::from(byte(i, *b))).sum();
        // Some old programs added signed bytes.
        let signed: i64 = block.iter().enumerate().map(|(i, b)| i64::from(byte(i, *b).cast_signed())).sum();
        (stored == unsigned || i64::try_from(stored) == Ok(signed)).then_some(Header(block))
    }

    /// Whether it has the magic number of POSIX or of GNU tar: the oldest archives have none.
    pub(super) fn has_magic(&self) -> bool {
        matches!(field(self.0, 257, 6), b"ustar\0" | b"ustar ")
    }

    /// What kind of entry it is.
    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// Length of the entry's data in bytes, by this header alone; `None` if it is no number.
    pub(super) fn size(&self) -> Option<u64> {
        number(field(self.0, to_usize(SIZE), 12))
    }

    /// The name, by this header alone.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(field(self.0, 0, 100));
        let prefix = text(field(self.0, 345, 155));
        // In a GNU header other fields are in the place of the prefix.
        if field(self.0, 257, 6) != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    /// What an old GNU sparse header says of its file.
    pub(super) fn sparse(&self) -> Sparse<'a> {
        Sparse { entries: &self.0[SPARSE..], most: SPARSE_IN_HEADER, extended: self.0[482] != 0 }
    }

    /// The length of the whole file of an old GNU sparse header; `None` if it is no number.
    pub(super) fn real_size(&self) -> Option<u64> {
        number(field(self.0, 483, 12))
    }
}

/// A piece of an old GNU sparse map.
pub(super) struct Sparse<'a> {
    entries: &'a [u8],
    most: usize,
    /// Whether an extension block follows.
    pub(super) extended: bool,
}

impl<'a> Sparse<'a> {
    /// The extension block `block`.
    pub(super) fn extension(block: &'a Block) -> Self {
        Sparse { entries: block, most: SPARSE_IN_EXTENSION, extended: block[504] != 0 }
    }

    /// Offset and length of each run of data, up to the first empty entry; `None` for one that is no number.
    pub(super) fn runs(&self) -> impl Iterator<Item = Option<(u64, u64)>> {
        let (entries, _) = self.entries.as_chunks::<SPARSE_ENTRY>();
        let used = entries.iter().take(self.most).take_while(|entry| entry[12] != 0);
        used.map(|entry| {
            let (offset, len) = entry.split_at(SPARSE_ENTRY / 2);
            Some((number(offset)?, number(len)?))
        })
    }
}

/// A number as tar writes it: octal digits between spaces and NULs, or, after a first byte of 0x80, big-endian.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, bytes @ ..] = field {
        return bytes.iter().try_fold(0u64, |n, byte| Some(n.checked_mul(256)? | u64::from(*byte)));
    }
    let padding = |byte: &u8| matches!(byte, 0 | b' ');
    let digits = field.trim_ascii_start();
    let len = digits.iter().position(padding).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(len);
    if digits.is_empty() || !rest.iter().all(padding) {
        return None;
    }
    digits.iter().try_fold(0u64, |n, byte| match byte {
        b'0'..=b'7' => Some(n.checked_mul(8)? | u64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary_and_nothing_else() {
        for (field, n) in [
            (&b"00000001750\0"[..], Some(1000)),
            (b"   1750 \0\0\0\0", Some(1000)),
            (b"777777777777", Some((1 << 36) - 1)),
            (b"\x80\0\0\0\0\0\0\x10\0\0\0\0", Some(1 << 36)),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", Some(u64::MAX)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\x01", None),
            (b"            ", None),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"0000001758\0\0", None),
            (b"-0000000001\0", None),
            (b"0000\x001750\0\0\0", None),
        ] {
            assert_eq!(number(field), n, "{field:?}");
        }
    }
}
