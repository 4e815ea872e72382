//! Reads a guest's serial console as it grows and judges how its boot went. The text is hostile: bounded, and
//! stripped of escape sequences and control characters before anything is kept or shown.

/// Longest line kept, in bytes; the rest of a longer one is dropped.
const MAX_LINE: usize = 4096;

/// Pauses in a row after which an unfinished line with the marker counts as a whole one.
const MARKER_PAUSES: u32 = 10;

/// What a boot is to show before it counts as up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A login prompt, systemd's multi-user target, or the end of cloud-init.
    UserSpace,
    /// A line that contains this text, and nothing less.
    Marker(String),
}

/// Where a boot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// User space came up as expected.
    Up,
    /// The kernel panicked.
    KernelPanic,
    /// The initramfs gave up, most often because it lacks the driver of the root disk.
    InitramfsShell,
    /// systemd stopped in emergency or rescue mode.
    EmergencyMode,
    /// GRUB stopped at its prompt, or without a kernel.
    GrubPrompt,
    /// The firmware found nothing to boot.
    NoBootableDevice,
    /// The guest switched itself off.
    PoweredOff,
    /// The guest started again and again.
    RebootLoop,
    /// The time was up first.
    Timeout,
}

impl State {
    /// The name in JSON output and in error ids.
    pub const fn name(self) -> &'static str {
        match self {
            State::Up => "up",
            State::KernelPanic => "kernel-panic",
            State::InitramfsShell => "initramfs-shell",
            State::EmergencyMode => "emergency-mode",
            State::GrubPrompt => "grub-prompt",
            State::NoBootableDevice => "no-bootable-device",
            State::PoweredOff => "powered-off",
            State::RebootLoop => "reboot-loop",
            State::Timeout => "timeout",
        }
    }

    /// What happened, to follow "the guest".
    pub const fn what(self) -> &'static str {
        match self {
            State::Up => "came up",
            State::KernelPanic => "stopped in a kernel panic",
            State::InitramfsShell => "stopped in its initramfs: it did not find its root file system",
            State::EmergencyMode => "stopped in emergency mode",
            State::GrubPrompt => "stopped in GRUB",
            State::NoBootableDevice => "was not found by the firmware: no bootable device",
            State::PoweredOff => "switched itself off",
            State::RebootLoop => "started again and again",
            State::Timeout => "did not come up in time",
        }
    }
}

/// A judgement, and the line of the console that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Where the boot ended.
    pub state: State,
    /// The evidence: the line itself, after an earlier line that explains it.
    pub evidence: String,
}

/// The judge of one boot: fed with the console's bytes, it says when the boot is decided.
pub struct Console {
    expect: Expect,
    line: Vec<u8>,
    pauses: u32,
    returned: bool,
    escape: Escape,
    complaint: Option<String>,
    last: Option<String>,
}

/// Where in an escape sequence the input stands (ECMA-48).
enum Escape {
    None,
    Started,
    Control { parameters: Vec<u8> },
    Text,
}

impl Console {
    /// A judge that waits for `expect`.
    pub fn new(expect: Expect) -> Self {
        Console {
            expect,
            line: Vec::new(),
            pauses: 0,
            returned: false,
            escape: Escape::None,
            complaint: None,
            last: None,
        }
    }

    /// Takes more of the console; returns the first verdict its finished lines give.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<Verdict> {
        let mut verdict = None;
        self.pauses = 0;
        for &byte in bytes {
            // A carriage return and more text overwrite the line: systemd's progress, a boot loader's countdown.
            let overwrites = self.returned && byte >= b' ' && matches!(self.escape, Escape::None);
            if overwrites || byte == b'\n' {
                self.returned = false;
            }
            if overwrites {
                verdict = verdict.or(self.end_line());
            }
            if self.push(byte) {
                verdict = verdict.or(self.end_line());
            }
        }
        verdict
    }

    fn end_line(&mut self) -> Option<Verdict> {
        let line = self.text();
        self.line.clear();
        self.judge(&line)
    }

    /// Judges the unfinished line, a prompt perhaps: to be called when the console pauses. A line with the marker is
    /// no prompt: a slow guest may pause within it, so it gets more time to be finished.
    pub fn pause(&mut self) -> Option<Verdict> {
        self.pauses = self.pauses.saturating_add(1);
        let line = self.text();
        let waits = matches!(&self.expect, Expect::Marker(marker) if line.contains(marker.as_str()));
        if waits && self.pauses < MARKER_PAUSES { None } else { self.judge(&line) }
    }

    /// The last line that was not empty, for a boot that was never decided.
    pub fn last_line(&self) -> &str {
        self.complaint.as_deref().or(self.last.as_deref()).unwrap_or("nothing came over the serial console")
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.line).chars().filter(|c| !c.is_control()).collect()
    }

    /// Takes one byte; true when it ends a line.
    fn push(&mut self, byte: u8) -> bool {
        match (&mut self.escape, byte) {
            (_, 0x1b) => self.escape = Escape::Started,
            (Escape::None, b'\n') => return true,
            (Escape::None, b'\r') => self.returned = true,
            (Escape::None, 0..=0x1f | 0x7f) => {}
            (Escape::None, _) if self.line.len() < MAX_LINE => self.line.push(byte),
            (Escape::None, _) => {}
            (Escape::Started, b'[') => self.escape = Escape::Control { parameters: Vec::new() },
            (Escape::Started, b']' | b'P' | b'^' | b'_') => self.escape = Escape::Text,
            (Escape::Started, _) => self.escape = Escape::None,
            (Escape::Control { parameters }, 0x20..=0x3f) => {
                if parameters.len() < 16 {
                    parameters.push(byte);
                }
            }
            // A boot loader starts a line by moving the cursor to the first column.
            (Escape::Control { parameters }, b'H') => {
                let column = parameters.split(|&b| b == b';').nth(1).unwrap_or_default();
                let first = matches!(column.strip_prefix(b"0").unwrap_or(column), b"" | b"1");
                self.escape = Escape::None;
                return first && !self.line.is_empty();
            }
            (Escape::Control { .. }, _) => self.escape = Escape::None,
            (Escape::Text, 0x07) => self.escape = Escape::None,
            (Escape::Text, _) => {}
        }
        false
    }

    fn judge(&mut self, line: &str) -> Option<Verdict> {
        let line = line.trim();
        if line.is_empty() {
            return None;
        }
        let up = match &self.expect {
            Expect::Marker(marker) => line.contains(marker.as_str()),
            Expect::UserSpace => is_user_space(line),
        };
        let state = if up { Some(State::Up) } else { failure(line) };
        let line: String = line.chars().take(MAX_LINE).collect();
        if let Some(state) = state {
            let evidence = match self.complaint.take() {
                Some(complaint) if state != State::Up && complaint != line => format!("{complaint} / {line}"),
                _ => line,
            };
            return Some(Verdict { state, evidence });
        }
        // What failed for want of something else says less than what was said of that.
        let follows = line.contains("Dependency failed for") && self.complaint.is_some();
        if is_complaint(&line) && !follows {
            self.complaint = Some(line.clone());
        }
        self.last = Some(line);
        None
    }
}

fn is_user_space(line: &str) -> bool {
    // agetty: `HOST login: `; the host name is one word.
    let login = line.strip_suffix("login:").is_some_and(|host| {
        let host = host.trim_end();
        !host.is_empty() && !host.contains(' ')
    });
    const TARGETS: [&str; 4] =
        ["multi-user.target", "Multi-User System", "graphical.target", "Graphical Interface"];
    login
        || (line.contains("Reached target") && TARGETS.iter().any(|target| line.contains(target)))
        || (line.starts_with("Cloud-init v.") && line.contains(" finished at "))
}

/// What a line says of a boot that will not go on by itself.
fn failure(line: &str) -> Option<State> {
    const STARTS: [(&str, State); 6] = [
        ("(initramfs)", State::InitramfsShell),
        ("dracut:/#", State::InitramfsShell),
        ("grub rescue>", State::GrubPrompt),
        ("grub>", State::GrubPrompt),
        ("Shell>", State::NoBootableDevice), // the UEFI shell, OVMF's last resort
        ("No bootable device", State::NoBootableDevice),
    ];
    const CONTAINS: [(&str, State); 9] = [
        ("error: you need to load the kernel first", State::GrubPrompt),
        ("Kernel panic - not syncing", State::KernelPanic),
        ("Entering emergency mode. Exit the shell to continue", State::InitramfsShell), // dracut
        ("/run/initramfs/rdsosreport.txt", State::InitramfsShell),                      // dracut
        ("You are in emergency mode", State::EmergencyMode),
        ("You are in rescue mode", State::EmergencyMode),
        ("Give root password for maintenance", State::EmergencyMode),
        ("Press Enter for maintenance", State::EmergencyMode),
        ("No bootable option or device was found", State::NoBootableDevice), // OVMF
    ];
    STARTS
        .iter()
        .find(|(text, _)| line.starts_with(text))
        .or_else(|| CONTAINS.iter().find(|(text, _)| line.contains(text)))
        .map(|(_, state)| *state)
}

/// Lines that explain a failure which shows itself only later.
fn is_complaint(line: &str) -> bool {
    const CONTAINS: [&str; 6] = [
        "ALERT!",
        "VFS: Cannot open root device",
        "VFS: Unable to mount root fs",
        "Dependency failed for",
        "Timed out waiting for device",
        "dracut-initqueue timeout",
    ];
    line.starts_with("error: ") || CONTAINS.iter().any(|text| line.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn judged(expect: Expect, text: &str) -> Option<Verdict> {
        let mut console = Console::new(expect);
        console.feed(text.as_bytes()).or_else(|| console.pause())
    }

    fn state(text: &str) -> Option<State> {
        judged(Expect::UserSpace, text).map(|verdict| verdict.state)
    }

    #[test]
    fn escape_sequences_and_control_characters_never_reach_a_verdict() {
        let text = "\x1b]0;evil\x07\x1b[31mx\x1b[0m\x08\u{9b} MARK\u{7f}ED\r\n";
        let verdict = judged(Expect::Marker("MARKED".into()), text).unwrap();
        assert_eq!(verdict.evidence, "x MARKED");
    }

    #[test]
    fn a_marker_is_judged_when_its_line_is_whole() {
        let mut console = Console::new(Expect::Marker("BEACON".into()));
        assert_eq!(console.feed(b"BEACON up root=/dev"), None);
        assert_eq!(console.pause(), None);
        let verdict = console.feed(b"/vda1 END\r\n").unwrap();
        assert_eq!((verdict.state, verdict.evidence.as_str()), (State::Up, "BEACON up root=/dev/vda1 END"));
    }

    #[test]
    fn a_login_prompt_is_not_enough_for_a_marker() {
        assert_eq!(judged(Expect::Marker("BEACON".into()), "source-01 login: "), None);
    }

    #[test]
    fn text_that_only_mentions_a_prompt_decides_nothing() {
        for text in
            ["press e for grub rescue> mode\n", "see (initramfs)\n", "Last login: Mon\n", "a b login:\n"]
        {
            assert_eq!(state(text), None, "{text}");
        }
    }

    #[test]
    fn an_overwritten_line_is_judged_by_itself() {
        let verdict = judged(
            Expect::Marker("MARK".into()),
            "\r[*  ] waiting\r\r\x1b[K[ ** ] waiting\r\x1b[KMARK\r\r\n",
        );
        assert_eq!(verdict.unwrap().evidence, "MARK");
    }

    #[test]
    fn an_endless_line_takes_bounded_memory() {
        let mut console = Console::new(Expect::UserSpace);
        for _ in 0..100 {
            assert_eq!(console.feed(&[b'x'; 4096]), None);
        }
        assert!(console.line.capacity() <= 2 * MAX_LINE);
    }

    proptest! {
        #[test]
        fn the_verdict_does_not_depend_on_how_the_console_arrives(
            noise in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..400,
        ) {
            let mut text = noise;
            text.extend_from_slice(b"\x1b\\\x07\r\n[    5.1] Kernel panic - not syncing: VFS\r\n");
            let whole = Console::new(Expect::Marker("no such text".into())).feed(&text);
            let mut console = Console::new(Expect::Marker("no such text".into()));
            let (a, b) = text.split_at(cut.min(text.len()));
            let parts = console.feed(a).or_else(|| console.feed(b));
            prop_assert_eq!(whole.map(|v| v.state), parts.map(|v| v.state));
        }
    }
}
