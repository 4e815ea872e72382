//! Sees every write to a block device, by the kernel's own trace points.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A tracefs instance that records what is asked of one device and is no read; gone when dropped.
pub struct WriteTrace {
    instance: PathBuf,
}

impl WriteTrace {
    /// Begins to watch `device`. Needs root and tracefs.
    pub fn of(device: &Path) -> WriteTrace {
        let root = Path::new("/sys/kernel/tracing");
        if !root.join("instances").is_dir() {
            super::run("mount", &["-t", "tracefs", "tracefs", "/sys/kernel/tracing"]);
        }
        let name = format!("haul-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let instance = root.join("instances").join(name);
        fs::create_dir(&instance).expect("a tracefs instance");
        let trace = WriteTrace { instance };
        let rdev = fs::metadata(device).unwrap().rdev();
        // The kernel's own encoding of device numbers: 20 bits of minor.
        let dev = u64::from(libc::major(rdev)) << 20 | u64::from(libc::minor(rdev));
        let event = trace.instance.join("events/block/block_bio_queue");
        fs::write(event.join("filter"), format!("dev == {dev} && !(rwbs ~ \"R*\")")).unwrap();
        fs::write(event.join("enable"), "1").unwrap();
        trace
    }

    /// The writes, discards and flushes with data so far, a line each.
    pub fn writes(&self) -> Vec<String> {
        let trace = fs::read_to_string(self.instance.join("trace")).unwrap();
        let lost: u64 = fs::read_dir(self.instance.join("per_cpu"))
            .unwrap()
            .map(|cpu| fs::read_to_string(cpu.unwrap().path().join("stats")).unwrap())
            .flat_map(|stats| {
                let overrun =
                    stats.lines().find_map(|line| line.strip_prefix("overrun: ").map(str::to_owned));
                overrun.and_then(|count| count.trim().parse::<u64>().ok())
            })
            .sum();
        assert_eq!(lost, 0, "the trace buffer ran over");
        trace.lines().filter(|line| line.contains("block_bio_queue:")).map(str::to_owned).collect()
    }
}

impl Drop for WriteTrace {
    fn drop(&mut self) {
        let _ = fs::write(self.instance.join("events/block/block_bio_queue/enable"), "0");
        let _ = fs::remove_dir(&self.instance);
    }
}
