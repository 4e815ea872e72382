//! What the lab asks of a hypervisor, and QEMU as one.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::boot::config_drive::ConfigDrive;
use crate::boot::{self, Accelerator, Expect, Firmware, Format, State, Vm};
use crate::error::{Error, Kind, Result};
use crate::host::programs::Programs;
use crate::monitor::{Counter, Level, Monitor};

/// A machine to start: one disk on virtio-blk, one card on virtio-net, nothing of the source's hardware.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its id, for names and messages.
    pub id: String,
    /// A raw disk that must not change: writes go to a throwaway overlay.
    pub disk: PathBuf,
    /// Start it with UEFI instead of BIOS.
    pub uefi: bool,
    /// What cloud-init is told; without a user's own data an image that is proved says when it is up.
    pub config_drive: ConfigDrive,
    /// Where the serial console is written; its folder is there.
    pub console: PathBuf,
}

/// Runs machines. Calls block; each comes on a thread of its own.
pub trait Hypervisor: Send + Sync {
    /// Boots the machine until its user space is up, and ends it. An error when it does not come up.
    fn prove(&self, machine: &Machine) -> Result<()>;

    /// Runs the machine until it powers off or `stop` is set. `started` is called once when it has power.
    fn run(&self, machine: &Machine, started: &dyn Fn(), stop: &AtomicBool) -> Result<()>;
}

/// How soon a running machine notices that it is to stop.
const STOP_CHECK: Duration = Duration::from_millis(200);

/// The network card's first three bytes are QEMU's own range.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x4c, 0x41, 0x42];

/// QEMU, through haul's boot test.
pub struct Qemu {
    programs: Programs,
    accelerator: Accelerator,
    timeout: Duration,
}

impl Qemu {
    /// QEMU under `accelerator`; an image that is not up after `timeout` does not boot.
    pub fn new(programs: Programs, accelerator: Accelerator, timeout: Duration) -> Self {
        Qemu { programs, accelerator, timeout }
    }

    /// The boot test's machine, with the config drive in a file beside the console.
    fn machine(&self, machine: &Machine) -> Result<boot::Machine> {
        let drive = machine.console.with_extension("iso");
        let told = ConfigDrive { macs: vec![MAC], ..machine.config_drive.clone() };
        std::fs::write(&drive, told.iso()?).map_err(|error| {
            Error::new(Kind::Destination, "lab.config-drive", format!("cannot write {}", drive.display()))
                .caused_by(error)
        })?;
        Ok(boot::Machine {
            firmware: if machine.uefi { Firmware::Uefi } else { Firmware::Bios },
            mac: MAC,
            config_drive: Some(drive),
            accelerator: self.accelerator,
            ..boot::Machine::new(&machine.disk, Format::Raw)
        })
    }
}

/// What cloud-init is told in a proof: a server without a console on its serial port is heard there too.
const SAY_WHEN_UP: &str =
    "#cloud-config\nruncmd:\n- echo 'Cloud-init v. any finished at multi-user' >/dev/ttyS0\n";

impl Hypervisor for Qemu {
    fn prove(&self, machine: &Machine) -> Result<()> {
        let mut machine = machine.clone();
        machine.config_drive.user_data.get_or_insert_with(|| SAY_WHEN_UP.to_owned());
        let guest = self.machine(&machine)?;
        let (expect, console) = (Expect::UserSpace, &machine.console);
        let outcome = boot::run(&self.programs, &guest, expect, self.timeout, console, &Log)?.up()?;
        tracing::info!(machine = machine.id, evidence = outcome.verdict.evidence, "up");
        Ok(())
    }

    fn run(&self, machine: &Machine, started: &dyn Fn(), stop: &AtomicBool) -> Result<()> {
        let guest = self.machine(machine)?;
        let mut vm = Vm::start(&self.programs, &guest, Expect::UserSpace, &machine.console, &Log)?;
        started();
        while !stop.load(Ordering::SeqCst) {
            let verdict = vm.watch(Instant::now() + STOP_CHECK, &Log)?;
            if verdict.is_some_and(|verdict| matches!(verdict.state, State::PoweredOff | State::RebootLoop)) {
                break;
            }
        }
        Ok(())
    }
}

/// Notes go to the lab's log.
struct Log;

impl Monitor for Log {
    fn begin(&self, _phase: &'static str, _total: Option<u64>) {}

    fn count(&self, _counter: Counter, _bytes: u64) {}

    fn advance(&self, _done: u64) {}

    fn note(&self, _level: Level, text: &str) {
        tracing::info!("{text}");
    }
}
