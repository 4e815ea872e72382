//! The qcow2 header: its bytes and back, pure. Field names and offsets are those of QEMU's docs/interop/qcow2.txt,
//! sections "Header", "Additional fields" and "Header extensions".

use super::table::Geometry;
use crate::error::{Error, Kind, Result};
use crate::unit::{MIB, to_usize};

/// The first four bytes of every qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the longest header known: version 3 with a compression type, padded to 8.
pub const HEADER_LEN: usize = 112;
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// Bytes of the shortest version 3 header.
const V3_LEN: usize = 104;

/// The largest L1 table, in bytes: QEMU's own bound (QCOW_MAX_L1_SIZE).
pub const MAX_L1_BYTES: u64 = 32 * MIB;
/// The largest number of internal snapshots: QEMU's own bound (QCOW_MAX_SNAPSHOTS).
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// The longest backing file name, in bytes (spec: "must not be longer than 1023 bytes").
const MAX_NAME: u32 = 1023;

/// Feature bits of a version 3 header.
pub mod feature {
    /// Incompatible: refcounts may be stale; guest data is not affected.
    pub const DIRTY: u64 = 1 << 0;
    /// Incompatible: a data structure is known to be damaged.
    pub const CORRUPT: u64 = 1 << 1;
    /// Incompatible: guest clusters live in an external data file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Incompatible: the compression type is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// Incompatible: L2 entries are 128 bits wide and map 32 subclusters each.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Every incompatible bit haul knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
    /// Compatible: refcounts may be updated lazily.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// How compressed clusters are compressed (header byte 104).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Raw deflate, without a zlib header.
    Zlib,
    /// A Zstandard frame.
    Zstd,
}

/// The fixed part of the header. Offsets and sizes are bytes of the image file unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Where the backing file's name is (offset, length), if there is one.
    pub backing_name: Option<(u64, u32)>,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// The virtual disk's length in bytes.
    pub virtual_size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries in the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// Clusters the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: u64,
    /// Incompatible [`feature`] bits; 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits; 0 in version 2.
    pub compatible: u64,
    /// Autoclear feature bits; 0 in version 2.
    pub autoclear: u64,
    /// log2 of the refcount width in bits, 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// Length of the header, where header extensions begin.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
}

/// An error about one field: what it is called, where it is in the file, and what is wrong with it.
pub(super) fn bad_field(image: &str, field: &str, offset: u64, why: impl Into<String>) -> Error {
    Error::new(
        Kind::Image,
        "qcow2.field",
        format!("{image}: qcow2 field `{field}` at offset {offset} is malformed"),
    )
    .because(why)
    .fact("image", image)
    .fact("field", field)
    .fact("offset", offset)
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Header {
    /// A version 3 header with 16-bit refcounts and nothing else set: what a writer starts from.
    pub fn new(virtual_size: u64, cluster_bits: u32, compression: Compression) -> Self {
        let geometry = Geometry { cluster_bits, extended: false };
        let needs_bit = compression != Compression::Zlib;
        Header {
            version: 3,
            backing_name: None,
            cluster_bits,
            virtual_size,
            crypt_method: 0,
            l1_entries: u32::try_from(geometry.l1_entries(virtual_size)).unwrap_or(u32::MAX),
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: if needs_bit { feature::COMPRESSION } else { 0 },
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: if needs_bit { 112 } else { 104 },
            compression,
        }
    }

    /// The shape of the tables this header describes.
    pub fn geometry(&self) -> Geometry {
        Geometry { cluster_bits: self.cluster_bits, extended: self.incompatible & feature::EXTENDED_L2 != 0 }
    }

    /// The header's bytes. The bytes past `header_length` are zero, which is also the end of header extensions.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (name_offset, name_len) = self.backing_name.unwrap_or((0, 0));
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &self.version.to_be_bytes());
        put(8, &name_offset.to_be_bytes());
        put(16, &name_len.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.virtual_size.to_be_bytes());
        put(32, &self.crypt_method.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.header_length.to_be_bytes());
            put(104, &[u8::from(self.compression == Compression::Zstd)]);
        }
        bytes
    }

    /// Reads a header from the first bytes of the image called `image`: [`HEADER_LEN`] of them, or the whole
    /// file if it is shorter. Every field is checked as far as the header alone allows; what depends on the
    /// file's length, and what haul refuses to read ([`Header::refusal`]), is not.
    pub fn decode(image: &str, start: &[u8]) -> Result<Self> {
        let bad = |field: &str, offset: u64, why: String| Err(bad_field(image, field, offset, why));
        if !start.starts_with(&MAGIC) {
            return bad("magic", 0, "the file is no qcow2 image".into());
        }
        let mut bytes = [0; HEADER_LEN];
        let have = start.len().min(HEADER_LEN);
        bytes[..have].copy_from_slice(&start[..have]);

        let version = u32_at(&bytes, 4);
        let shortest = match version {
            2 => V2_LEN,
            3 => V3_LEN,
            _ => return bad("version", 4, format!("it is {version}; versions 2 and 3 exist")),
        };
        if have < shortest {
            return bad("header", 0, format!("the file ends after {have} of its {shortest} bytes"));
        }
        let v3 = version == 3;
        if !v3 {
            bytes[V2_LEN..].fill(0);
        }
        let header_length = if v3 { u32_at(&bytes, 100) } else { 72 };
        if v3 && header_length < 112 {
            bytes[V3_LEN..].fill(0);
        }
        let compression = match bytes[104] {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            n => return bad("compression_type", 104, format!("it is {n}; 0 (zlib) and 1 (zstd) exist")),
        };
        let backing_name = match u64_at(&bytes, 8) {
            0 => None,
            offset => Some((offset, u32_at(&bytes, 16))).filter(|(_, len)| *len > 0),
        };
        let header = Header {
            version,
            backing_name,
            cluster_bits: u32_at(&bytes, 20),
            virtual_size: u64_at(&bytes, 24),
            crypt_method: u32_at(&bytes, 32),
            l1_entries: u32_at(&bytes, 36),
            l1_offset: u64_at(&bytes, 40),
            refcount_table_offset: u64_at(&bytes, 48),
            refcount_table_clusters: u32_at(&bytes, 56),
            snapshots: u32_at(&bytes, 60),
            snapshots_offset: u64_at(&bytes, 64),
            incompatible: u64_at(&bytes, 72),
            compatible: u64_at(&bytes, 80),
            autoclear: u64_at(&bytes, 88),
            refcount_order: if v3 { u32_at(&bytes, 96) } else { 4 },
            header_length,
            compression,
        };
        header.check(image)?;
        Ok(header)
    }

    /// What the fields must satisfy whatever the file's length is.
    fn check(&self, image: &str) -> Result<()> {
        let bad = |field: &str, offset: u64, why: String| Err(bad_field(image, field, offset, why));
        if !(9..=21).contains(&self.cluster_bits) {
            return bad("cluster_bits", 20, format!("it is {}; 9 to 21 are possible", self.cluster_bits));
        }
        let geometry = self.geometry();
        let cluster = geometry.cluster_size();
        if self.version == 3 && !(104..=cluster).contains(&u64::from(self.header_length)) {
            let length = self.header_length;
            return bad("header_length", 100, format!("it is {length}; 104 to {cluster} are possible"));
        }
        if self.refcount_order > 6 {
            return bad("refcount_order", 96, format!("it is {}; 0 to 6 are possible", self.refcount_order));
        }
        if (self.compression == Compression::Zlib) == (self.incompatible & feature::COMPRESSION != 0) {
            return bad("compression_type", 104, "it contradicts incompatible feature bit 3".into());
        }
        if geometry.extended && self.cluster_bits < 14 {
            return bad("cluster_bits", 20, "extended L2 entries need clusters of 16 KiB or more".into());
        }
        if let Some((offset, len)) = self.backing_name
            && (len > MAX_NAME || offset < self.header_length.into() || offset + u64::from(len) > cluster)
        {
            let why = format!("{len} bytes at {offset} are not a name inside the first cluster");
            return bad("backing_file_offset", 8, why);
        }
        let needed = geometry.l1_entries(self.virtual_size);
        if needed > MAX_L1_BYTES / 8 {
            let why = format!("{} bytes need an L1 table of more than 32 MiB", self.virtual_size);
            return bad("size", 24, why);
        }
        if u64::from(self.l1_entries) < needed || u64::from(self.l1_entries) > MAX_L1_BYTES / 8 {
            let why = format!("it is {}; the disk needs {needed}, and 4194304 are allowed", self.l1_entries);
            return bad("l1_size", 36, why);
        }
        if self.l1_entries > 0 && (!self.l1_offset.is_multiple_of(cluster) || self.l1_offset == 0) {
            return bad("l1_table_offset", 40, format!("{} is no cluster boundary", self.l1_offset));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return bad("nb_snapshots", 60, format!("it is {}; 65536 are allowed", self.snapshots));
        }
        if self.snapshots > 0
            && (!self.snapshots_offset.is_multiple_of(cluster) || self.snapshots_offset == 0)
        {
            return bad("snapshots_offset", 64, format!("{} is no cluster boundary", self.snapshots_offset));
        }
        Ok(())
    }

    /// The encryption method's name, if the image is encrypted.
    pub fn encryption(&self) -> Option<String> {
        match self.crypt_method {
            0 => None,
            1 => Some("AES".into()),
            2 => Some("LUKS".into()),
            n => Some(format!("unknown, number {n}")),
        }
    }

    /// Why an image with this header must not be read, if it must not; `extensions` may name unknown features.
    pub fn refusal(&self, image: &str, extensions: &Extensions) -> Option<Error> {
        let refuse = |id, why: String, remedy: &str| {
            let error = Error::new(Kind::Image, id, format!("{image}: this qcow2 image cannot be read"));
            Some(error.because(why).remedy(remedy).fact("image", image))
        };
        if let Some(bit) = (0..64).find(|bit| self.incompatible & !feature::KNOWN & 1 << bit != 0) {
            let name = extensions.feature_name(0, bit).unwrap_or("the image does not name it");
            let why = format!("it uses the unknown incompatible feature of bit {bit} ({name})");
            let remedy = "convert it with the program that wrote it to a qcow2 image without that feature";
            return refuse("qcow2.unknown-feature", why, remedy);
        }
        if self.incompatible & feature::CORRUPT != 0 {
            let why = "its corrupt bit is set (incompatible feature bit 1, header offset 72)".into();
            let remedy = "repair a copy of it with `qemu-img check -r all`, then check what was repaired";
            return refuse("qcow2.corrupt", why, remedy);
        }
        let cipher = self.encryption()?;
        let why = format!("it is encrypted ({cipher}; field `crypt_method`, header offset 32)");
        let remedy = "decrypt it with `qemu-img convert` and its secret first";
        refuse("qcow2.encrypted", why, remedy)
    }
}

/// A name the image gives to a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub class: u8,
    /// Bit number.
    pub bit: u8,
    /// What the image calls it.
    pub name: String,
}

/// The header extensions haul knows; all others may be ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Names of feature bits.
    pub feature_names: Vec<FeatureName>,
}

impl Extensions {
    const END: u32 = 0;
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    const FEATURE_NAMES: u32 = 0x6803_f857;
    const DATA_FILE: u32 = 0x4441_5441;

    /// Reads the extensions in `area`, the bytes of the image called `image` from offset `at` (the header's
    /// length) to the backing file's name or the end of the first cluster.
    pub fn decode(image: &str, area: &[u8], at: u64) -> Result<Self> {
        let mut found = Extensions::default();
        let mut rest = area;
        while let Some((head, body)) = rest.split_first_chunk::<8>() {
            let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            if kind == Self::END {
                break;
            }
            let len = to_usize(len.into());
            let Some(data) = body.get(..len) else {
                let offset = at + (area.len() - rest.len()) as u64;
                let why = format!("extension {kind:#010x} of {len} bytes leaves the first cluster");
                return Err(bad_field(image, "header extension length", offset + 4, why));
            };
            let text = || String::from_utf8_lossy(data).into_owned();
            match kind {
                Self::BACKING_FORMAT => found.backing_format = Some(text()),
                Self::DATA_FILE => found.data_file = Some(text()),
                Self::FEATURE_NAMES => found.feature_names = feature_names(data),
                _ => {}
            }
            rest = body.get(len.next_multiple_of(8)..).unwrap_or(&[]);
        }
        Ok(found)
    }

    /// What the image calls `bit` of `class` (0 incompatible, 1 compatible, 2 autoclear).
    pub fn feature_name(&self, class: u8, bit: u8) -> Option<&str> {
        let entry = self.feature_names.iter().find(|entry| (entry.class, entry.bit) == (class, bit));
        entry.map(|entry| entry.name.as_str())
    }
}

/// The feature name table: 48-byte entries of class, bit and a name padded with zeroes.
fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let (entries, _) = data.as_chunks::<48>();
    let name = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).escape_default().to_string()
    };
    // One entry for each bit of each class is all there can be.
    let entries = entries.iter().take(3 * 64);
    entries.map(|entry| FeatureName { class: entry[0], bit: entry[1], name: name(&entry[2..]) }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers() -> impl Strategy<Value = Header> {
        let first =
            (2u32..=3, 14u32..=21, 0u64..1 << 44, any::<bool>(), any::<bool>(), 0u32..4, any::<u64>());
        let second = (0u32..=6, any::<bool>(), any::<u64>(), any::<u32>(), 0u32..=MAX_SNAPSHOTS, 0u64..99);
        (first, second).prop_map(|(first, second)| {
            let (version, cluster_bits, virtual_size, zstd, extended, crypt_method, offsets) = first;
            let (refcount_order, named, compatible, refcount_table_clusters, snapshots, extra) = second;
            let v3 = version == 3;
            let zstd = zstd && v3;
            let cluster = 1u64 << cluster_bits;
            let offset = (offsets % (1 << 30) + 1) * cluster;
            let mut header = Header {
                version,
                crypt_method,
                l1_offset: offset,
                refcount_table_offset: offsets,
                refcount_table_clusters,
                snapshots,
                snapshots_offset: if snapshots == 0 { 0 } else { offset },
                compatible: if v3 { compatible } else { 0 },
                autoclear: if v3 { offsets } else { 0 },
                refcount_order: if v3 { refcount_order } else { 4 },
                header_length: if v3 { 112 } else { 72 },
                backing_name: named.then_some((512 + extra, 1023)),
                ..Header::new(
                    virtual_size,
                    cluster_bits,
                    if zstd { Compression::Zstd } else { Compression::Zlib },
                )
            };
            if extended && v3 {
                header.incompatible |= feature::EXTENDED_L2;
            }
            let needed = header.geometry().l1_entries(virtual_size);
            header.l1_entries = u32::try_from((needed + extra).min(MAX_L1_BYTES / 8)).unwrap();
            header
        })
    }

    proptest! {
        #[test]
        fn a_header_survives_its_bytes(header in headers()) {
            prop_assert_eq!(Header::decode("x", &header.encode()).unwrap(), header);
        }

        #[test]
        fn any_bytes_are_a_header_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..160), v in 0u8..5) {
            for (to, from) in bytes.iter_mut().zip([b"QFI\xfb\0\0\0".as_slice(), &[v]].concat()) {
                *to = from;
            }
            if let Ok(header) = Header::decode("x", &bytes) {
                prop_assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
                prop_assert!((9..=21).contains(&header.cluster_bits));
            }
        }

        #[test]
        fn any_bytes_are_extensions_or_an_error(
            kinds in prop::collection::vec((prop::sample::select(vec![0xe279_2acau32, 0x6803_f857, 0x4441_5441, 7]), 0u32..200), 0..6),
            fill in any::<u8>(), len in 0usize..1000,
        ) {
            let mut bytes = vec![fill; len];
            let mut at = 0;
            for (kind, n) in kinds {
                if let Some(head) = bytes.get_mut(at..at + 8) {
                    head[..4].copy_from_slice(&kind.to_be_bytes());
                    head[4..].copy_from_slice(&n.to_be_bytes());
                }
                at += 8 + n.next_multiple_of(8) as usize;
            }
            let _ = Extensions::decode("x", &bytes, 112);
        }
    }

    fn sample() -> Header {
        Header { l1_offset: 0x30000, ..Header::new(1 << 30, 16, Compression::Zlib) }
    }

    #[test]
    fn each_bad_field_is_named_with_its_offset() {
        type Damage = fn(&mut Header);
        let cases: [(Damage, &str, u64); 10] = [
            (|h| h.version = 4, "version", 4),
            (|h| h.cluster_bits = 22, "cluster_bits", 20),
            (|h| h.virtual_size = u64::MAX, "size", 24),
            (|h| h.l1_entries = 1, "l1_size", 36),
            (|h| h.l1_entries = u32::MAX, "l1_size", 36),
            (|h| h.l1_offset += 8, "l1_table_offset", 40),
            (|h| h.snapshots = 65_537, "nb_snapshots", 60),
            (|h| h.refcount_order = 7, "refcount_order", 96),
            (|h| h.header_length = 96, "header_length", 100),
            (|h| h.compression = Compression::Zstd, "compression_type", 104),
        ];
        for (damage, field, offset) in cases {
            let mut header = Header { header_length: 112, ..sample() };
            damage(&mut header);
            let error = Header::decode("a.qcow2", &header.encode()).unwrap_err();
            let facts: Vec<_> = error.facts().iter().map(|(name, value)| (*name, value.as_str())).collect();
            let expected = [("image", "a.qcow2"), ("field", field), ("offset", &offset.to_string())];
            assert_eq!(facts, expected, "{error:?}");
            assert_eq!(error.kind(), Kind::Image);
        }
    }

    #[test]
    fn an_unknown_feature_is_refused_by_bit_and_by_its_name() {
        let mut table = vec![0; 8 + 48];
        table[..8].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48]);
        table[9] = 37;
        table[10..16].copy_from_slice(b"bridge");
        let extensions = Extensions::decode("x", &table, 104).unwrap();
        let mut header = sample();
        assert!(header.refusal("x", &extensions).is_none());
        header.incompatible = 1 << 37 | feature::DIRTY;
        let error = header.refusal("x", &extensions).unwrap();
        assert_eq!(error.id(), "qcow2.unknown-feature");
        assert!(error.why().contains("bit 37 (bridge)"), "{error:?}");
    }

    #[test]
    fn corrupt_and_encrypted_images_are_refused_by_name() {
        let corrupt = Header { incompatible: feature::CORRUPT, ..sample() };
        let error = corrupt.refusal("x", &Extensions::default()).unwrap();
        assert!(error.what_to_do().contains("qemu-img check -r all"), "{error:?}");
        let luks = Header { crypt_method: 2, ..sample() };
        assert!(luks.refusal("x", &Extensions::default()).unwrap().why().contains("LUKS"));
    }
}
