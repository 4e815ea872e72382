//! Disk contents with everything in them, and the programs that make images of them.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::print_stdout, reason = "a failed test shows its seed")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// The seed of this run: `HAUL_SEED`, else the commit's, so that each commit tries other places. It is printed.
pub fn seed() -> u64 {
    let commit = || {
        let out = Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
        u64::from_str_radix(std::str::from_utf8(&out.stdout).ok()?.get(..16)?, 16).ok()
    };
    let given = std::env::var("HAUL_SEED").ok().map(|text| text.parse().expect("HAUL_SEED is a number"));
    let seed = given.or_else(commit).unwrap_or(1);
    println!("HAUL_SEED={seed}");
    seed
}

/// `size` bytes: runs of noise, text and zeroes whose borders mostly fall on no round number.
pub fn contents(size: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut disk = vec![0; size];
    let mut at = 0;
    while at < size {
        let longest = [600, 9_000, 200_000, 3_000_000][usize::try_from(random.below(4)).unwrap()];
        // No run may fill a small disk.
        let len = usize::try_from(random.below(longest) + 1).unwrap().min(size / 8 + 1).min(size - at);
        let run = &mut disk[at..at + len];
        match random.below(4) {
            0 => random.fill(run),
            1 => run.iter_mut().enumerate().for_each(|(i, byte)| *byte = b"the quick brown fox "[i % 20]),
            2 => run.chunks_mut(64).for_each(|line| line[0] = 1 + u8::try_from(random.below(255)).unwrap()),
            _ => {}
        }
        at += len;
    }
    disk
}

/// Runs a program; a program that is missing or fails fails the test with its name and output.
pub fn run(program: &str, args: &[&str]) -> Output {
    let out = output(program, args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {}\n{text}", out.status);
    out
}

/// Runs a program that may fail.
pub fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} (qemu-utils): {e}"))
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with a raw disk in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub raw: PathBuf,
    pub bytes: Vec<u8>,
}

impl Bench {
    pub fn new(size: usize, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("disk.raw");
        let bytes = contents(size, seed);
        std::fs::write(&raw, &bytes).unwrap();
        Bench { dir, raw, bytes }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image of the disk made by `qemu-img convert` with the options `options`; `-c` among `flags` compresses.
    pub fn convert(&self, name: &str, options: &str, flags: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        args.extend(flags);
        args.extend([arg(&self.raw), arg(&path)]);
        run("qemu-img", &args);
        path
    }

    /// Runs qemu-io commands on an image.
    pub fn io(&self, image: &Path, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| args.extend(["-c", *command]));
        args.push(arg(image));
        run("qemu-io", &args);
    }
}

/// The virtual disk of an image, as QEMU reads it.
pub fn as_qemu_reads(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("qemu.raw");
    run("qemu-img", &["convert", "-O", "raw", arg(image), arg(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}
