//! What an appliance is made of: a kernel of the guest's, and an archive with its modules, haul, and what is to be done.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::init::{LIST, MODULES, PACKAGES, PLAN};
use crate::error::{Error, Kind, Result};
use crate::guest::hook::{Archive, in_order, unpacked};
use crate::guest::inspect::Guest;
use crate::guest::kernels::Kernel;
use crate::guest::package::unreadable;
use crate::guest::plan::{Fix, Plan};
use crate::guest::tree::Tree;
use crate::unit::{GIB, MIB};

/// Most bytes of a kernel, of all its modules, and of its modules.dep.
const MAX_KERNEL: u64 = 256 * MIB;
const MAX_MODULES: u64 = 256 * MIB;
const MAX_TEXT: u64 = 64 * MIB;
/// Most bytes of all packages.
const MAX_PACKAGES: u64 = GIB;
/// The disk, and what file systems stand on. The kernel asks for the checksums by names that modules.dep does not have.
const NEEDED: [&str; 11] = [
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "loop",
    "crc32c_generic",
    "crc32c_intel",
    "xxhash_generic",
    "blake2b_generic",
    "sha256_generic",
];

/// The kernel's arguments: it says what it must on the serial port, and ends at a panic.
pub fn arguments(arch: &str) -> String {
    let port = if arch == "aarch64" { "ttyAMA0" } else { "ttyS0,115200" };
    format!("console={port} quiet loglevel=2 panic=-1")
}

fn failed(why: impl Into<String>) -> Error {
    Error::new(Kind::Image, "appliance.make", "cannot make an appliance of the guest's kernel").because(why)
}

/// The kernel, and the archive it unpacks, which has `program` (haul) and does `plan`.
pub fn files(plan: &Plan, guest: &Guest, program: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    if guest.arch != std::env::consts::ARCH {
        return Err(failed(format!("it is for {}, and this haul is not", guest.arch))
            .remedy("fix it by root, with --no-guest-programs where its programs cannot run"));
    }
    // The newest one that is whole; the guest boots by it, so it mounts the guest's file systems.
    let kernel = guest.kernels.iter().rfind(|kernel| kernel.has_modules);
    let kernel = kernel.ok_or_else(|| failed("no kernel of it has its modules installed"))?;
    let bytes = whole(&guest.tree, &kernel.image, MAX_KERNEL)?;
    Ok((bytes, archive(plan, guest, kernel, program)?))
}

fn archive(plan: &Plan, guest: &Guest, kernel: &Kernel, program: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", &MODULES[1..], &PACKAGES[1..]] {
        archive.entry(folder, 0o040_755, &[]);
    }
    let mut list = String::new();
    let mut room = MAX_MODULES;
    let root = format!("/lib/modules/{}", kernel.version);
    let dep = whole(&guest.tree, &format!("{root}/modules.dep"), MAX_TEXT)?;
    let mut names: Vec<String> = NEEDED.map(str::to_owned).to_vec();
    names.extend(plan.mounts.iter().map(|mount| mount.kind.clone()));
    for file in in_order(&String::from_utf8_lossy(&dep), &names) {
        let path = if file.starts_with('/') { file.to_owned() } else { format!("{root}/{file}") };
        let stream = guest.tree.open(&path)?.ok_or_else(|| failed(format!("there is no {path}")))?;
        let bytes = unpacked(&path, stream, room).map_err(|error| failed(path.clone()).caused_by(error))?;
        room -= bytes.len() as u64;
        let name = format!("{MODULES}/{}.ko", list.lines().count());
        archive.entry(&name[1..], 0o100_644, &bytes);
        list.push_str(&format!("{name}\n"));
    }
    archive.entry(&LIST[1..], 0o100_644, list.as_bytes());
    let task = serde_json::to_vec(plan).map_err(|error| {
        Error::new(Kind::Internal, "guest.task", "cannot write the task").caused_by(error)
    })?;
    archive.entry(&PLAN[1..], 0o100_644, &task);
    let given = plan.fixes.iter().filter_map(|fix| match fix {
        Fix::Install { packages, .. } => Some(packages),
        _ => None,
    });
    for path in given.flatten() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = read(path, MAX_PACKAGES).map_err(|error| unreadable(path).caused_by(error))?;
        archive.entry(&format!("{}/{name}", &PACKAGES[1..]), 0o100_644, &bytes);
    }
    let haul =
        read(program, MAX_KERNEL).map_err(|error| failed("haul cannot read itself").caused_by(error))?;
    if !is_static(&haul) {
        return Err(failed("this haul needs libraries, which an appliance does not have")
            .remedy("take the static one: scripts/build.sh"));
    }
    archive.entry("init", 0o100_755, &haul);
    Ok(archive.end())
}

fn read(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    BufReader::new(File::open(path)?).take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// The guest's file at `path`, of at most `most` bytes.
fn whole(tree: &Tree, path: &str, most: u64) -> Result<Vec<u8>> {
    let stream = tree.open(path)?.ok_or_else(|| failed(format!("there is no {path}")))?;
    let mut bytes = Vec::new();
    stream.take(most + 1).read_to_end(&mut bytes).map_err(|error| failed(path).caused_by(error))?;
    if bytes.len() as u64 > most { Err(failed(format!("{path} is too large"))) } else { Ok(bytes) }
}

/// Whether an ELF program of 64 bits asks for no interpreter (elf(5), `PT_INTERP`).
fn is_static(program: &[u8]) -> bool {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, len: usize| {
        let bytes = program.get(at..at + len)?;
        Some(bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    (0..count).all(|i| {
        let at = table.saturating_add(i * size);
        let kind = usize::try_from(at).ok().filter(|at| *at < program.len()).and_then(|at| number(at, 4));
        kind.is_some_and(|kind| kind != u64::from(INTERPRETER))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_asks_for_an_interpreter_is_not_static() {
        // This one does, as every test does, and so does a shell.
        assert!(!is_static(&std::fs::read("/bin/sh").unwrap()));
        assert!(!is_static(b"\x7fELF"));
        let header = |kind: u32| {
            let mut program = vec![0; 64 + 56];
            program[32] = 64;
            program[54] = 56;
            program[56] = 1;
            program[64..68].copy_from_slice(&kind.to_le_bytes());
            program
        };
        assert!(is_static(&header(1)));
        assert!(!is_static(&header(3)));
    }
}
