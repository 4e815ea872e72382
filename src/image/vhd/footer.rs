//! The footer: its bytes and back, pure. Field names and offsets are those of the specification's section "Hard Disk
//! Footer Format"; numbers are big-endian.

use super::{SECTOR, bad_field, checksum};
use crate::error::Result;

/// Bytes of a footer.
pub const FOOTER_LEN: usize = 512;
/// The first eight bytes of every footer.
pub const COOKIE: [u8; 8] = *b"conectix";
/// Where the checksum is.
const CHECKSUM: usize = 64;
/// `data_offset` of a fixed disk, which has no header.
const NO_HEADER: u64 = u64::MAX;

/// What kind of disk an image holds (field Disk Type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskType {
    /// The disk as it is, before the footer.
    Fixed = 2,
    /// Blocks, those of zeroes left out.
    Dynamic = 3,
    /// The blocks that differ from another disk.
    Differencing = 4,
}

/// A disk geometry (field Disk Geometry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads: tracks of a cylinder.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Chs {
    /// The largest geometry there is: 127.5 GiB.
    pub const MAX: Chs = Chs { cylinders: u16::MAX, heads: 16, sectors: 255 };

    /// The geometry of a disk of `size` bytes, by the specification's appendix "CHS Calculation": never more than
    /// the disk has.
    pub fn of(size: u64) -> Self {
        let total = (size / SECTOR).min(Chs::MAX.bytes() / SECTOR);
        let (heads, sectors) = if total >= 65_535 * 16 * 63 {
            (16, 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if heads <= 16 && tracks < heads * 1024 {
                (heads, 17)
            } else if total / 31 < 16 * 1024 {
                (16, 31)
            } else {
                (16, 63)
            }
        };
        let cylinders = u16::try_from(total / sectors / heads).unwrap_or(u16::MAX);
        // Both are at most 255 by the lines above.
        let byte = |n: u64| u8::try_from(n).unwrap_or(u8::MAX);
        Chs { cylinders, heads: byte(heads), sectors: byte(sectors) }
    }

    /// Bytes of a disk with this geometry.
    pub const fn bytes(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64 * SECTOR
    }
}

/// A footer, or its copy at the start of a dynamic disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the dynamic disk header is, in bytes of the file; all ones in a fixed disk.
    pub data_offset: u64,
    /// When the image was made, in seconds since 2000-01-01 00:00 UTC.
    pub timestamp: u32,
    /// The program that made it.
    pub creator: [u8; 4],
    /// That program's version: major and minor, 16 bits each.
    pub creator_version: u32,
    /// The system it ran on.
    pub creator_host: [u8; 4],
    /// The disk's length in bytes when it was made.
    pub original_size: u64,
    /// The disk's length in bytes.
    pub current_size: u64,
    /// The disk's geometry.
    pub geometry: Chs,
    /// What the image holds.
    pub disk_type: DiskType,
    /// The image's identifier.
    pub uuid: [u8; 16],
    /// Whether a machine was saved with this disk: the rest of its state is elsewhere.
    pub saved_state: bool,
}

/// The `N` bytes of `bytes` at `at`; zeroes where there are none, which no caller asks for.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

impl Footer {
    /// The footer's bytes, checksum included.
    pub fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut bytes = [0; FOOTER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &COOKIE);
        // Features: the reserved bit, which is always set.
        put(8, &2u32.to_be_bytes());
        put(12, &0x0001_0000u32.to_be_bytes());
        put(16, &self.data_offset.to_be_bytes());
        put(24, &self.timestamp.to_be_bytes());
        put(28, &self.creator);
        put(32, &self.creator_version.to_be_bytes());
        put(36, &self.creator_host);
        put(40, &self.original_size.to_be_bytes());
        put(48, &self.current_size.to_be_bytes());
        put(56, &self.geometry.cylinders.to_be_bytes());
        put(58, &[self.geometry.heads, self.geometry.sectors]);
        put(60, &(self.disk_type as u32).to_be_bytes());
        put(68, &self.uuid);
        put(84, &[self.saved_state.into()]);
        let sum = checksum(&bytes, CHECKSUM);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Reads the footer `bytes`, which are at offset `at` of the image called `image`.
    pub fn decode(image: &str, at: u64, bytes: &[u8; FOOTER_LEN]) -> Result<Self> {
        let bad = |field: &str, offset: u64, why: String| {
            Err(bad_field(image, field, at.saturating_add(offset), why))
        };
        if !bytes.starts_with(&COOKIE) {
            return bad("cookie", 0, "it is not \"conectix\": no VHD footer is here".into());
        }
        let (stored, sum) = (u32::from_be_bytes(field(bytes, CHECKSUM)), checksum(bytes, CHECKSUM));
        if stored != sum {
            return bad(
                "checksum",
                64,
                format!("it is {stored:#010x}, and the footer sums up to {sum:#010x}"),
            );
        }
        let version = u32::from_be_bytes(field(bytes, 12));
        if version >> 16 != 1 {
            return bad("file_format_version", 12, format!("it is {version:#010x}; version 1 exists"));
        }
        let disk_type = match u32::from_be_bytes(field(bytes, 60)) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            n => {
                let why = format!("it is {n}; 2 (fixed), 3 (dynamic) and 4 (differencing) exist");
                return bad("disk_type", 60, why);
            }
        };
        let [heads, sectors] = field(bytes, 58);
        let footer = Footer {
            data_offset: u64::from_be_bytes(field(bytes, 16)),
            timestamp: u32::from_be_bytes(field(bytes, 24)),
            creator: field(bytes, 28),
            creator_version: u32::from_be_bytes(field(bytes, 32)),
            creator_host: field(bytes, 36),
            original_size: u64::from_be_bytes(field(bytes, 40)),
            current_size: u64::from_be_bytes(field(bytes, 48)),
            geometry: Chs { cylinders: u16::from_be_bytes(field(bytes, 56)), heads, sectors },
            disk_type,
            uuid: field(bytes, 68),
            saved_state: bytes[84] != 0,
        };
        if !footer.current_size.is_multiple_of(SECTOR) {
            let why = format!("it is {}, no whole number of sectors", footer.current_size);
            return bad("current_size", 48, why);
        }
        if disk_type != DiskType::Fixed && footer.data_offset == NO_HEADER {
            return bad("data_offset", 16, "the image is not fixed, and no header is named".into());
        }
        Ok(footer)
    }

    /// A footer as a writer begins it: of a disk of `size` bytes, with nothing else set.
    pub fn new(size: u64, disk_type: DiskType) -> Self {
        Footer {
            data_offset: if disk_type == DiskType::Fixed { NO_HEADER } else { FOOTER_LEN as u64 },
            timestamp: 0,
            creator: [0; 4],
            creator_version: 0,
            creator_host: [0; 4],
            original_size: size,
            current_size: size,
            geometry: Chs::of(size),
            disk_type,
            uuid: [0; 16],
            saved_state: false,
        }
    }

    /// The first field, and its offset, in which the two describe different disks or other places for the same one.
    pub(super) fn first_difference(&self, other: &Footer) -> Option<(&'static str, u64)> {
        let differs = [
            (self.data_offset != other.data_offset, "data_offset", 16),
            (self.creator != other.creator, "creator_application", 28),
            (self.current_size != other.current_size, "current_size", 48),
            (self.geometry != other.geometry, "disk_geometry", 56),
            (self.disk_type != other.disk_type, "disk_type", 60),
        ];
        differs.into_iter().find(|(differs, ..)| *differs).map(|(_, field, offset)| (field, offset))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::unit::{GIB, MIB};

    fn footers() -> impl Strategy<Value = Footer> {
        let types = prop::sample::select(vec![DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing]);
        let numbers = (any::<u32>(), any::<u32>(), 0..u64::MAX, 0u64..1 << 55, any::<u64>());
        (types, numbers, any::<[u8; 8]>(), any::<[u8; 16]>(), any::<(u16, u8, u8, bool)>()).prop_map(
            |(
                disk_type,
                (timestamp, creator_version, data_offset, size, original_size),
                creators,
                uuid,
                chs,
            )| {
                Footer {
                    data_offset,
                    timestamp,
                    creator: field(&creators, 0),
                    creator_version,
                    creator_host: field(&creators, 4),
                    original_size,
                    geometry: Chs { cylinders: chs.0, heads: chs.1, sectors: chs.2 },
                    uuid,
                    saved_state: chs.3,
                    ..Footer::new(size * SECTOR, disk_type)
                }
            },
        )
    }

    proptest! {
        #[test]
        fn a_footer_survives_its_bytes(footer in footers()) {
            prop_assert_eq!(Footer::decode("x", 0, &footer.encode()).unwrap(), footer);
        }

        #[test]
        fn a_changed_byte_is_noticed(footer in footers(), at in 0usize..85, value in any::<u8>()) {
            let mut bytes = footer.encode();
            prop_assume!(bytes[at] != value);
            bytes[at] = value;
            prop_assert!(Footer::decode("x", 0, &bytes).is_err());
        }

        #[test]
        fn a_geometry_is_never_more_than_the_disk_and_misses_less_than_a_cylinder(size in 1u64..200 << 21) {
            let size = size * SECTOR;
            let chs = Chs::of(size);
            prop_assert!(chs.bytes() <= size);
            let cylinder = u64::from(chs.heads) * u64::from(chs.sectors) * SECTOR;
            let most = Chs::MAX.bytes().min(size);
            prop_assert!(chs.bytes() + cylinder > most, "{:?} for {}", chs, size);
        }
    }

    #[test]
    fn geometries_are_those_of_other_programs() {
        // As qemu-img writes them for the sizes these geometries are exact for.
        for (size, cylinders, heads, sectors) in [
            (8_390_656, 241, 4, 17),
            (104_865_792, 1004, 12, 17),
            (1_073_995_776, 2081, 16, 63),
            (10_737_893_376, 20806, 16, 63),
            (200 * GIB, 65_535, 16, 255),
        ] {
            assert_eq!(Chs::of(size), Chs { cylinders, heads, sectors }, "{size}");
        }
        assert_eq!(Chs::of(MIB), Chs { cylinders: 30, heads: 4, sectors: 17 });
    }

    #[test]
    fn each_bad_field_is_named_with_its_offset() {
        type Damage = fn(&mut [u8; FOOTER_LEN]);
        let cases: [(Damage, bool, &str, u64); 6] = [
            (|b| b[7] = b'X', false, "cookie", 0),
            (|b| b[64] ^= 1, false, "checksum", 64),
            (|b| b[13] = 2, true, "file_format_version", 12),
            (|b| b[63] = 5, true, "disk_type", 60),
            (|b| b[55] = 1, true, "current_size", 48),
            (|b| b[16..24].fill(255), true, "data_offset", 16),
        ];
        for (damage, sum, field, offset) in cases {
            let mut bytes = Footer::new(MIB, DiskType::Dynamic).encode();
            damage(&mut bytes);
            if sum {
                let sum = checksum(&bytes, CHECKSUM);
                bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
            }
            let error = Footer::decode("a.vhd", 7 << 20, &bytes).unwrap_err();
            let facts: Vec<_> = error.facts().iter().map(|(name, value)| (*name, value.as_str())).collect();
            let at = ((7 << 20) + offset).to_string();
            assert_eq!(facts, [("image", "a.vhd"), ("field", field), ("offset", &at)], "{error:?}");
            assert_eq!(error.kind(), Kind::Image);
        }
    }
}
