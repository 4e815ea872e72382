//! What tests that run other people's programs share: running them, loop mounts that always go away, and images.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Runs a program to success and returns what it printed; a missing one fails the test by name.
pub fn run(program: &str, args: &[&str]) -> String {
    let (code, out, err) = try_run(program, args);
    assert_eq!(code, 0, "{program} {args:?}: {out}{err}");
    out
}

/// Runs a program and returns its exit code and what it printed on both channels.
pub fn try_run(program: &str, args: &[&str]) -> (i32, String, String) {
    let done = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("this test needs the program {program}: {error}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
}

/// The path as text, for argument lists.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A new empty (sparse) file of `size` bytes.
pub fn empty_image(path: &Path, size: u64) {
    File::create(path).and_then(|file| file.set_len(size)).unwrap();
}

/// A copy that keeps holes.
pub fn copy_image(from: &Path, to: &Path) {
    run("cp", &["--sparse=always", text(from), text(to)]);
}

/// A file system image mounted through a loop device; unmounted and detached when dropped, also by a panic.
pub struct LoopMount {
    dir: Option<TempDir>,
}

impl LoopMount {
    /// Mounts `image`; `options` are mount's, such as `ro` or `offset=1048576`.
    pub fn new(image: &Path, options: &str) -> LoopMount {
        let dir = tempfile::tempdir().unwrap();
        // The loop device goes by itself with the mount (LO_FLAGS_AUTOCLEAR).
        let options = format!("loop,{options}");
        let args = ["-o", options.trim_end_matches(','), text(image), text(dir.path())];
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let (code, out, err) = try_run("mount", &args);
            if code == 0 {
                return LoopMount { dir: Some(dir) };
            }
            // Another process may win the race for the free loop device mount found.
            let raced = err.contains("failed to setup loop device");
            assert!(raced && Instant::now() < deadline, "mount {args:?}: {out}{err}");
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        self.dir.take().into_iter().for_each(unmount);
    }
}

/// Unmounts what is mounted on a folder, and removes the folder.
pub fn unmount(dir: TempDir) {
    // A process another test is just starting may hold a file open between fork and exec: try for a while.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (code, _, err) = try_run("umount", &[text(dir.path())]);
        if code == 0 {
            return;
        }
        if Instant::now() > deadline {
            // Let it go as soon as it can, and never remove files under a mount.
            try_run("umount", &["-l", text(dir.path())]);
            let kept = dir.keep();
            assert!(std::thread::panicking(), "umount {}: {err}", kept.display());
            return;
        }
    }
}

/// A loop device of its own; detached when dropped.
pub struct LoopDevice {
    /// Such as `/dev/loop3`.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches `image` with logical sectors of `sector` bytes.
    pub fn new(image: &Path, sector: u32) -> LoopDevice {
        let out = run("losetup", &["-f", "--show", "-b", &sector.to_string(), text(image)]);
        LoopDevice { path: PathBuf::from(out.trim()) }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        try_run("losetup", &["-d", text(&self.path)]);
    }
}

/// A reproducible stream of numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// Writes files into `dir` and deletes every other one, so that free space is in pieces and holds junk.
pub fn age(dir: &Path, seed: u64, files: u64, largest: u64) {
    let mut random = Random::new(seed);
    for i in 0..files {
        let sub = dir.join(format!("d{}", i % 7));
        fs::create_dir_all(&sub).unwrap();
        let len = usize::try_from(random.below(largest)).unwrap();
        fs::write(sub.join(format!("f{i}")), random.bytes(len)).unwrap();
    }
    run("sync", &["-f", text(dir)]);
    for i in (0..files).step_by(2) {
        fs::remove_file(dir.join(format!("d{}/f{i}", i % 7))).unwrap();
    }
}
