//! The guest's only program: mounts the disk, writes and reports what is safe, until the power is cut.
//!
//! The kernel's command line gives `fs` and `seed`. A panic ends the kernel, and with it the machine.

#[allow(dead_code, reason = "half of it is for the host")]
#[path = "workload.rs"]
mod workload;

use std::collections::VecDeque;
use std::ffi::{CString, c_char, c_int, c_long, c_ulong};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, sync_channel};

use workload::{FOLDERS, Op, Random, folder, op, path};

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_char,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn tcdrain(fd: c_int) -> c_int;
}

/// finit_module(2) on x86-64.
const FINIT_MODULE: c_long = 313;
/// Most bytes of noise at a time.
const NOISE: usize = 70 << 20;

fn mounted(source: &str, target: &str, kind: &str) {
    let [source, target, kind] = [source, target, kind].map(|text| CString::new(text).unwrap());
    let done = unsafe { mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, c"".as_ptr()) };
    assert_eq!(done, 0, "mount {source:?}: {}", std::io::Error::last_os_error());
}

/// Loads the modules in the order of their names.
fn load_modules() {
    let mut paths: Vec<_> = fs::read_dir("/modules").unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let file = File::open(&path).unwrap();
        let done = unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
        assert_eq!(done, 0, "{}: {}", path.display(), std::io::Error::last_os_error());
    }
}

/// Writes and deletes files that nobody was promised, one beside each step, so that what is free changes all the time.
fn noise(mut random: Random, steps: &Receiver<u64>) {
    let mut kept = VecDeque::new();
    let mut held = 0;
    for n in steps {
        let longest = [4_000, 60_000, 1_500_000][random.below(3)];
        let len = random.below(longest);
        let bytes = random.bytes(len);
        held += bytes.len();
        kept.push_back((n, bytes.len()));
        // A full disk is no reason to stop.
        let _ = fs::write(format!("noise/n{n}"), bytes);
        while held > NOISE {
            // Any of the older half, so that holes are left.
            let (n, len) = kept.remove(random.below(kept.len() / 2 + 1)).unwrap();
            let _ = fs::remove_file(format!("noise/n{n}"));
            held -= len;
        }
        report(&format!("NOISE {n}"));
    }
}

fn sync_folder(path: &str) {
    File::open(path).unwrap().sync_all().unwrap();
}

/// Does a step and makes it safe.
fn carry_out(op: Op) {
    let open = |slot| File::options().write(true).create(true).open(path(slot)).unwrap();
    match op {
        Op::Write(slot, bytes) => {
            let mut file = File::create(path(slot)).unwrap();
            file.write_all(&bytes).unwrap();
            file.sync_all().unwrap();
            sync_folder(&folder(slot));
        }
        Op::Replace(slot, bytes) => {
            let new = format!("{}/new", folder(slot));
            let mut file = File::create(&new).unwrap();
            file.write_all(&bytes).unwrap();
            file.sync_all().unwrap();
            fs::rename(new, path(slot)).unwrap();
            sync_folder(&folder(slot));
        }
        Op::Append(slot, bytes) => {
            let file = open(slot);
            file.write_all_at(&bytes, file.metadata().unwrap().len()).unwrap();
            file.sync_all().unwrap();
            sync_folder(&folder(slot));
        }
        Op::Patch(slot, at, bytes) => {
            let file = open(slot);
            file.write_all_at(&bytes, at as u64).unwrap();
            file.sync_all().unwrap();
            sync_folder(&folder(slot));
        }
        Op::Resize(slot, len) => {
            let file = open(slot);
            file.set_len(len as u64).unwrap();
            file.sync_all().unwrap();
            sync_folder(&folder(slot));
        }
        Op::Delete(slot) => {
            let _ = fs::remove_file(path(slot));
            sync_folder(&folder(slot));
        }
        Op::Rename(from, to) => {
            if fs::exists(path(from)).unwrap() {
                fs::rename(path(from), path(to)).unwrap();
            }
            sync_folder(&folder(to));
            sync_folder(&folder(from));
        }
    }
}

/// Says on the console what is safe. The line has left the machine when this returns.
fn report(line: &str) {
    println!("{line}");
    assert_eq!(unsafe { tcdrain(1) }, 0);
}

fn main() {
    mounted("proc", "/proc", "proc");
    mounted("dev", "/dev", "devtmpfs");
    load_modules();
    // What is written is on its way to the disk soon, and not only by fsync.
    for name in ["dirty_writeback_centisecs", "dirty_expire_centisecs"] {
        fs::write(format!("/proc/sys/vm/{name}"), "50").unwrap();
    }
    mounted("/dev/vda", "/disk", &std::env::var("fs").unwrap());
    std::env::set_current_dir("/disk").unwrap();
    let seed: u64 = std::env::var("seed").unwrap().parse().unwrap();
    (0..FOLDERS).for_each(|slot| fs::create_dir(folder(slot)).unwrap());
    fs::create_dir("noise").unwrap();
    sync_folder(".");
    let (begun, steps) = sync_channel(1);
    std::thread::spawn(move || noise(Random(!seed), &steps));
    for n in 1.. {
        begun.send(n).unwrap();
        carry_out(op(seed, n));
        report(&format!("SYNCED {n}"));
    }
}
