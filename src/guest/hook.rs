//! What haul appends to an initramfs where nothing can build a new one: a segment with kernel modules, and a program in the
//! place of `/init` that loads them before it becomes the `/init` that was there.
//!
//! The kernel unpacks all segments over each other, later files in the place of earlier ones (init/initramfs.c), from 2.6
//! on. Modules go in as they are, only unpacked, so that their signatures hold.

use std::collections::BTreeSet;
use std::io::{self, Read};

use super::initramfs::{self, Contents, Init};
use crate::error::{Error, Kind, Result};
use crate::unit::{MIB, to_usize};

/// The machines that a program is there for: their number in ELF files (elf(5): e_machine), and the machine code of
/// `drivers/linux/init-NAME.S`.
const MACHINES: [(u8, &[u8]); 2] = [
    (62, include_bytes!("../../drivers/linux/init-x86_64.bin")),
    (183, include_bytes!("../../drivers/linux/init-aarch64.bin")),
];
/// Where the modules are in the initramfs.
const FOLDER: &str = "haul";
/// Most bytes of all modules, unpacked, and of modules.dep; a kernel's virtio has half a MiB.
const MAX_BYTES: u64 = 64 * MIB;
/// Where the program is loaded, as the linker does without options.
const ADDRESS: u64 = 0x40_0000;
/// Lengths of an ELF file's headers, in bytes.
const ELF_HEADERS: usize = 64 + 56;

/// Opens a guest's file by its path; `None` when there is none.
pub type Open<'a> = &'a dyn Fn(&str) -> Result<Option<Box<dyn Read + 'a>>>;

/// Why nothing can be appended to an initramfs with these contents.
pub fn hindrance(contents: &Contents) -> Option<&'static str> {
    match () {
        () if contents.init.is_none() => Some("it has no /init"),
        () if contents.lz4_padded => Some("its lz4 stream is followed by zero bytes"),
        () => None,
    }
}

/// Whether an initramfs with these contents loads modules by a program of ours.
pub fn is_in(contents: &Contents) -> bool {
    let ours = |init: &Init| matches!(init, Init::File(bytes) if is_program(bytes));
    contents.replaced_init.is_some() && contents.init.as_ref().is_some_and(ours)
}

fn is_program(bytes: &[u8]) -> bool {
    let code = bytes.get(ELF_HEADERS..).unwrap_or_default();
    MACHINES.iter().any(|(_, init)| code.starts_with(init))
}

/// What to append to the initramfs `image`, which has `len` bytes, so that kernel `kernel` loads the modules of these names
/// and what they depend on.
pub fn appendix(kernel: &str, image: &str, len: u64, names: &[String], open: Open<'_>) -> Result<Vec<u8>> {
    let failed =
        || Error::new(Kind::Image, "initramfs.append", format!("cannot add drivers to the guest's {image}"));
    let absent = |path: &str| failed().because(format!("there is no {path}"));
    let found = initramfs::read(open(image)?.ok_or_else(|| absent(image))?, image)?;
    if let Some(why) = hindrance(&found) {
        return Err(failed().because(why));
    }
    let root = format!("/lib/modules/{kernel}");
    let dep = format!("{root}/modules.dep");
    let mut text = String::new();
    open(&dep)?
        .ok_or_else(|| absent(&dep))?
        .take(MAX_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| failed().caused_by(error))?;

    let mut archive = Archive::default();
    archive.entry(FOLDER, 0o040_755, &[]);
    let (mut loaded, mut machine) = (Vec::new(), None);
    for file in in_order(&text, names) {
        let path = if file.starts_with('/') { file.to_owned() } else { format!("{root}/{file}") };
        let stream = open(&path)?.ok_or_else(|| absent(&path))?;
        let room = MAX_BYTES.saturating_sub(archive.bytes.len() as u64);
        let bytes =
            unpacked(&path, stream, room).map_err(|error| failed().because(path.clone()).caused_by(error))?;
        machine = bytes.get(18).copied();
        let name = format!("{FOLDER}/{}.ko", initramfs::module_name(&path).unwrap_or_default());
        archive.entry(&name, 0o100_644, &bytes);
        loaded.push((format!("/{name}"), bytes.len() as u64));
    }
    // An appendix to an appendix: the init that was there first.
    match found.replaced_init.as_ref().filter(|_| is_in(&found)).or(found.init.as_ref()) {
        Some(Init::File(bytes)) => archive.entry(initramfs::REPLACED_INIT, 0o100_755, bytes),
        Some(Init::Link(target)) => archive.entry(initramfs::REPLACED_INIT, 0o120_777, target),
        None => return Err(failed().because("it has no /init")),
    }
    let machine = machine.ok_or_else(|| failed().because("none of the drivers is installed as a module"))?;
    archive.entry("init", 0o100_755, &program(machine, &loaded));
    let bytes = archive.end();
    Ok(match found.parts.last() {
        // Where one ends is not marked: only more of the same may follow.
        Some(&"lz4") => lz4(&bytes),
        // A plain archive begins at a multiple of four bytes.
        _ => [vec![0; to_usize(len.next_multiple_of(4) - len)], bytes].concat(),
    })
}

/// The files of the modules called `names` and of all they depend on, by the text of modules.dep: those first that others
/// need. Modules that are built in are not in it.
pub(super) fn in_order<'a>(dep: &'a str, names: &[String]) -> Vec<&'a str> {
    let lines: Vec<(&str, Vec<&str>)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (file, needs.split_whitespace().collect()))
        .collect();
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for name in names {
        let named = |(file, _): &&(&str, Vec<&str>)| initramfs::module_name(file).as_ref() == Some(name);
        let Some((file, needs)) = lines.iter().find(named) else { continue };
        // Each line lists everything below its module, what is needed first last (depmod(8)).
        order.extend(needs.iter().rev().chain([file]).filter(|file| seen.insert(**file)));
    }
    order
}

/// A module's file without its compression, which fits into `room` bytes.
pub(super) fn unpacked(path: &str, stream: Box<dyn Read + '_>, room: u64) -> io::Result<Vec<u8>> {
    let stream = io::BufReader::new(stream);
    let stream: Box<dyn Read + '_> = match path.rsplit('.').next() {
        Some("xz") => Box::new(lzma_rust2::XzReader::new_mem_limit(stream, true, initramfs::XZ_MEMORY)),
        Some("zst") => Box::new(initramfs::Zstd::new(stream)),
        Some("bz2") => Box::new(bzip2::bufread::BzDecoder::new(stream)),
        Some("gz") => Box::new(flate2::bufread::GzDecoder::new(stream)),
        _ => Box::new(stream),
    };
    let mut bytes = Vec::new();
    stream.take(room.saturating_add(1)).read_to_end(&mut bytes)?;
    let why = match () {
        () if bytes.len() as u64 > room => "the modules are too large",
        () if bytes.get(..4) != Some(b"\x7fELF") => "it is no kernel module",
        // What the kernel is for, whatever the programs beside it are for: 64 bits, little-endian, e_machine.
        () if bytes.get(4..6) != Some(&[2, 1])
            || MACHINES.iter().all(|(machine, _)| bytes.get(18) != Some(machine)) =>
        {
            "it is for a machine that haul has no program for"
        }
        () => return Ok(bytes),
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

/// The program for `machine`, one of [`MACHINES`], that loads the files of these names and sizes, then becomes the init that
/// was there: an ELF file of one segment, as in elf(5).
fn program(machine: u8, modules: &[(String, u64)]) -> Vec<u8> {
    let code = MACHINES.iter().find(|(number, _)| *number == machine).map_or(&[][..], |(_, code)| code);
    let last = (format!("/{}", initramfs::REPLACED_INIT), 0);
    let entries: Vec<&(String, u64)> = modules.iter().chain([&last]).collect();
    let (mut table, mut paths) = (Vec::new(), Vec::new());
    for (path, size) in &entries {
        let at = (entries.len() * 16 + paths.len()) as u64;
        table.extend(at.to_le_bytes().into_iter().chain(size.to_le_bytes()));
        paths.extend(path.bytes().chain([0]));
    }
    let len = (ELF_HEADERS + code.len() + table.len() + paths.len()) as u64;
    let mut out = Vec::new();
    // 64 bits, little-endian, version 1, System V.
    out.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable, version 1.
    out.extend([2, 0, machine, 0, 1, 0, 0, 0]);
    // Entry, program headers, section headers.
    for word in [ADDRESS + ELF_HEADERS as u64, 64, 0] {
        out.extend(word.to_le_bytes());
    }
    // Flags; sizes and numbers of headers: one of the program's, none of a section.
    out.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // To load, to be read and run.
    out.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    // Pages of ARM may have 64 KiB.
    for word in [0, ADDRESS, ADDRESS, len, len, 0x1_0000] {
        out.extend(word.to_le_bytes());
    }
    [out.as_slice(), code, &table, &paths].concat()
}

/// A length as the formats have it: all of ours are bounded far below.
fn short(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// A cpio archive in the making ("newc": Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file, folder or link, as its `mode` says (inode(7)).
    pub(super) fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let fields =
            [self.entries, mode, 0, 0, 1, 0, short(data.len()), 0, 0, 0, 0, short(name.len() + 1), 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        for part in [[name.as_bytes(), b"\0"].concat().as_slice(), data] {
            self.bytes.extend(part);
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
    }

    /// The whole archive.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// `bytes` in the old lz4 format.
fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut out = initramfs::LZ4_MAGIC.to_le_bytes().to_vec();
    for block in bytes.chunks(initramfs::LZ4_BLOCK) {
        let packed = lz4_flex::block::compress(block);
        out.extend(short(packed.len()).to_le_bytes());
        out.extend(packed);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_machine_code_is_that_of_its_source() {
        let dir = tempfile::tempdir().unwrap();
        for ((_, init), name) in MACHINES.iter().zip(["x86_64", "aarch64"]) {
            let source = format!("{}/drivers/linux/init-{name}.S", env!("CARGO_MANIFEST_DIR"));
            let (object, code) = (dir.path().join("object"), dir.path().join("code"));
            let tool = |of: &str| Command::new(format!("{name}-linux-gnu-{of}"));
            let built = tool("as").arg(source).arg("-o").arg(&object).status().unwrap();
            let cut = ["-O", "binary", "-j", ".text"];
            let cut = tool("objcopy").args(cut).arg(&object).arg(&code).status().unwrap();
            assert!(built.success() && cut.success());
            assert_eq!(std::fs::read(code).unwrap(), *init, "{name}");
        }
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/a/virtio_blk.ko.xz: kernel/b/virtio_ring.ko.xz kernel/b/virtio.ko.xz\n\
                   kernel/b/virtio.ko.xz:\nkernel/c/virtio-net.ko: kernel/c/failover.ko\nkernel/c/failover.ko:\n";
        let names = ["virtio_blk", "virtio", "built_in", "virtio_net"].map(str::to_owned);
        let order: Vec<String> =
            in_order(dep, &names).into_iter().filter_map(initramfs::module_name).collect();
        assert_eq!(order, ["virtio", "virtio_ring", "virtio_blk", "failover", "virtio_net"]);
    }

    /// An initramfs with one entry, packed by the program `packer`.
    fn packed(packer: &[&str], init: &[u8], mode: u32) -> Vec<u8> {
        let mut archive = Archive::default();
        archive.entry("init", mode, init);
        let plain = archive.end();
        if packer.is_empty() {
            return plain;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("plain"), plain).unwrap();
        let input = std::fs::File::open(dir.path().join("plain")).unwrap();
        Command::new(packer[0]).args(&packer[1..]).stdin(input).output().unwrap().stdout
    }

    /// What begins like a kernel module for this machine.
    fn module(machine: u8, name: &str) -> Vec<u8> {
        let mut out = [b"\x7fELF\x02\x01".as_slice(), &[0; 12], &[machine, 0]].concat();
        out.extend(name.bytes());
        out
    }

    #[test]
    fn a_module_is_taken_for_what_it_is() {
        let of = |bytes: Vec<u8>, room| unpacked("x.ko", Box::new(io::Cursor::new(bytes)), room);
        assert_eq!(of(module(62, ""), 20).unwrap(), module(62, ""));
        assert!(of(module(62, ""), 19).unwrap_err().to_string().contains("too large"));
        assert_eq!(of(module(183, ""), 20).unwrap(), module(183, ""));
        // Of a 32-bit kernel, of RISC-V, and none at all.
        for (bytes, why) in
            [(module(3, ""), "machine"), (module(243, ""), "machine"), (vec![0; 20], "no kernel module")]
        {
            assert!(of(bytes, 100).unwrap_err().to_string().contains(why));
        }
    }

    #[test]
    fn an_appendix_is_read_with_the_initramfs_whatever_that_is_packed_with() {
        let module = module(62, "virtio");
        let zstd = {
            let mut out = vec![0; 200];
            let len = zstd_safe::compress(&mut out[..], &module[..], 1).unwrap();
            out.truncate(len);
            out
        };
        let names = ["virtio_blk".to_owned(), "virtio".to_owned()];
        let packers: [&[&str]; 7] = [
            &[],
            &["gzip"],
            &["xz", "--check=crc32"],
            &["xz", "--format=lzma"],
            &["bzip2"],
            &["zstd"],
            &["lz4", "-l"],
        ];
        for packer in packers {
            for (init, mode) in [
                (Init::File(b"#!/bin/sh\n".to_vec()), 0o100_755),
                (Init::Link(b"/bin/init".to_vec()), 0o120_777),
            ] {
                let (Init::File(bytes) | Init::Link(bytes)) = &init;
                let image = packed(packer, bytes, mode);
                let mut files = BTreeMap::from([
                    ("/boot/i", image.clone()),
                    (
                        "/lib/modules/6.1/modules.dep",
                        b"k/virtio_blk.ko: k/virtio.ko.zst\nk/virtio.ko.zst:\n".to_vec(),
                    ),
                    ("/lib/modules/6.1/k/virtio_blk.ko", module.clone()),
                    ("/lib/modules/6.1/k/virtio.ko.zst", zstd.clone()),
                ]);
                // Twice: the second takes up what the first has replaced.
                for _ in 0..2 {
                    let image = files["/boot/i"].clone();
                    let open = |path: &str| -> Result<Option<Box<dyn Read + '_>>> {
                        Ok(files.get(path).map(|bytes| Box::new(&bytes[..]) as Box<dyn Read>))
                    };
                    let len = image.len() as u64;
                    let more = appendix("6.1", "/boot/i", len, &names, &open).unwrap();
                    let whole = [image, more].concat();
                    let found = initramfs::read(&whole[..], "whole").unwrap();
                    assert!(is_in(&found), "{packer:?}");
                    assert_eq!(found.replaced_init.as_ref(), Some(&init), "{packer:?}");
                    assert_eq!(found.modules.iter().collect::<Vec<_>>(), ["virtio", "virtio_blk"]);
                    files.insert("/boot/i", whole);
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_appended_to_is_told() {
        let of = |init: Option<Init>, lz4_padded| {
            let mut contents = Contents::default();
            (contents.init, contents.lz4_padded) = (init, lz4_padded);
            contents
        };
        let init = Some(Init::File(vec![1]));
        assert_eq!(hindrance(&of(init.clone(), false)), None);
        assert!(hindrance(&of(init, true)).is_some());
        assert!(hindrance(&of(None, false)).is_some());
        let padded = [packed(&["lz4", "-l"], b"x", 0o100_755), vec![0; 4]].concat();
        assert!(initramfs::read(&padded[..], "padded").unwrap().lz4_padded);
    }

    #[test]
    fn the_program_becomes_the_init_that_was_there() {
        // What it loads here is no module: the kernel refuses it, and it goes on.
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("haul")).unwrap();
        let put = |name: &str, bytes: &[u8]| {
            let (path, written) = (dir.path().join(name), dir.path().join("written"));
            std::fs::write(&written, bytes).unwrap();
            // A program must not be open for writing in any process, a child of another test's included.
            let installed =
                Command::new("install").args(["-m", "755"]).args([written, path]).status().unwrap();
            assert!(installed.success());
        };
        put("haul/x.ko", b"no module");
        let modules = [("/haul/x.ko".to_owned(), 9), ("/haul/absent.ko".to_owned(), 9)];
        let source = dir.path().join("init.c");
        let text = "#include <stdio.h>\n#include <stdlib.h>\n\
                    int main(int n, char **words) { printf(\"%s %s %s\", words[0], words[1], getenv(\"HOME\")); return 7; }";
        std::fs::write(&source, text).unwrap();
        let built = Command::new("cc")
            .arg("-static")
            .arg(&source)
            .arg("-o")
            .arg(dir.path().join("init.haul"))
            .status();
        assert!(built.unwrap().success());
        // QEMU has the system calls of ARM's program done by this kernel.
        std::fs::copy("/usr/bin/qemu-aarch64-static", dir.path().join("qemu")).unwrap();
        for (machine, by) in [(62, None), (183, Some("/qemu"))] {
            put("init", &program(machine, &modules));
            let mut command = Command::new("chroot");
            command.arg(dir.path()).args(by).args(["/init", "quiet"]).env("HOME", "/here");
            let ended = command.output().unwrap();
            assert_eq!(ended.status.code(), Some(7), "{ended:?}");
            assert_eq!(String::from_utf8_lossy(&ended.stdout), "/init quiet /here");
        }
    }
}
