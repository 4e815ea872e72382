//! Superblocks of md mirrors, made by hand since no array can be assembled here; mdadm judges them.

#![allow(clippy::cast_possible_truncation, reason = "sizes of test disks")]

use std::path::Path;

/// The array's UUID as mdadm prints it.
pub const ARRAY: &str = "11223344:55667788:99aabbcc:ddeeff00";
const UUID: [u32; 4] = [0x1122_3344, 0x5566_7788, 0x99aa_bbcc, 0xddee_ff00];

/// Makes `image` the first of two members of the mirror `name`, by a superblock of `version`; returns where its data
/// begins and how long it is, in bytes.
pub fn member(image: &Path, version: &str, name: &str) -> (u64, u64) {
    let mut bytes = std::fs::read(image).unwrap();
    let size = bytes.len() as u64;
    let (place, start, len) = match version {
        "1.2" => (4096, 1 << 20, size - (1 << 20)),
        "1.1" => (0, 1 << 20, size - (1 << 20)),
        "1.0" => (((size / 512 - 16) & !7) * 512, 0, size - (128 << 10)),
        "0.90" => ((size & !0xffff) - 0x10000, 0, (size & !0xffff) - 0x10000),
        _ => panic!("{version}"),
    };
    let mut sb = vec![0_u8; if version == "0.90" { 4096 } else { 256 + 2 * 2 }];
    let put32 =
        |sb: &mut Vec<u8>, at: usize, value: u32| sb[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put32(&mut sb, 0, 0xa92b_4efc);
    let own = if version == "0.90" {
        let words =
            [(2, 90), (5, UUID[0]), (6, 1), (7, 1), (8, (len / 1024) as u32), (9, 2), (10, 2), (11, 0)];
        let more = [(13, UUID[1]), (14, UUID[2]), (15, UUID[3]), (32, 1), (33, 1), (34, 2), (35, 2)];
        // Its own descriptor, and the two of all: number, device, place, state.
        let disks = [(128 + 3, 6), (160, 1), (160 + 2, 1), (160 + 3, 6), (992 + 3, 6)];
        for (word, value) in words.into_iter().chain(more).chain(disks) {
            put32(&mut sb, word * 4, value);
        }
        38 * 4
    } else {
        put32(&mut sb, 4, 1);
        sb[16..32].copy_from_slice(&UUID.map(u32::to_be_bytes).concat());
        sb[32..32 + name.len()].copy_from_slice(name.as_bytes());
        for (at, value) in [(64, 1), (72, 1), (92, 2), (192, 1), (200, 1), (220, 2)] {
            put32(&mut sb, at, value);
        }
        for (at, value) in
            [(80, len / 512), (128, start / 512), (136, len / 512), (144, place / 512), (208, u64::MAX)]
        {
            sb[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        sb[168..184].copy_from_slice(&[7; 16]);
        // The roles of its members: this is the first.
        sb[258] = 1;
        216
    };
    let sum: u64 = sb.chunks(4).map(|word| u64::from(u32::from_le_bytes(word.try_into().unwrap()))).sum();
    let sum = ((sum & 0xffff_ffff) + (sum >> 32)) as u32;
    put32(&mut sb, own, sum);
    bytes[place as usize..place as usize + sb.len()].copy_from_slice(&sb);
    std::fs::write(image, bytes).unwrap();
    (start, len)
}
