//! Judges the serial consoles of real boots: Debian 12 in QEMU, its disk damaged in the way the file's name says.

#![allow(clippy::unwrap_used, reason = "a test: a failure is the finding")]

use std::path::Path;

use haul::boot::{Console, Expect, State, Verdict};

/// The verdict on a sample, its bytes arriving `step` at a time.
fn judged(name: &str, expect: &Expect, step: usize) -> Option<Verdict> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/console").join(name);
    let bytes = std::fs::read(path).unwrap();
    let mut console = Console::new(expect.clone());
    bytes.chunks(step).find_map(|chunk| console.feed(chunk)).or_else(|| console.pause())
}

#[test]
fn real_consoles_are_judged_by_what_happened() {
    for (name, state, evidence) in [
        ("up.log", State::Up, "Reached target multi-user.target - Multi-User System."),
        ("initramfs-shell.log", State::InitramfsShell, "ALERT!  /dev/sda1 does not exist."),
        ("kernel-panic.log", State::KernelPanic, "VFS: Unable to mount root fs on unknown-block(0,0)"),
        ("grub-rescue.log", State::GrubPrompt, "normal.mod' not found"),
        ("emergency.log", State::EmergencyMode, "Timed out waiting for device dev-sdz1.device"),
        ("seabios.log", State::NoBootableDevice, "No bootable device"),
    ] {
        for step in [1, 7, 4096] {
            let verdict =
                judged(name, &Expect::UserSpace, step).unwrap_or_else(|| panic!("{name}: undecided"));
            assert_eq!(verdict.state, state, "{name}: {}", verdict.evidence);
            assert!(verdict.evidence.contains(evidence), "{name}: {}", verdict.evidence);
            assert!(!verdict.evidence.contains(char::is_control), "{name}");
        }
    }
}

#[test]
fn a_console_that_stopped_early_decides_nothing() {
    assert_eq!(judged("hangs-in-kvm.log", &Expect::UserSpace, 16), None);
}

#[test]
fn the_marker_is_the_guests_own_line() {
    let verdict = judged("up.log", &Expect::Marker("HAUL-BEACON up".into()), 100).unwrap();
    assert!(verdict.evidence.starts_with("HAUL-BEACON up root=/dev/sda1 "));
    assert!(verdict.evidence.ends_with(" END"));
}
