//! QEMU's control protocol, as much of it as a boot test needs: commands, and the guest's events.
//! (QEMU docs/interop/qmp-spec.rst: one JSON object per line.)

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::host::child::wait_readable;

/// Longest answer taken, in bytes.
const MAX_LINE: usize = 1 << 20;

/// How long QEMU may take to answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What the guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It reset the machine.
    Reset,
    /// It switched the machine off.
    Shutdown,
}

/// A connection to a running QEMU.
pub struct Qmp {
    stream: UnixStream,
    pending: Vec<u8>,
    events: Vec<Event>,
}

fn failed(why: impl Into<String>) -> Error {
    Error::new(Kind::Boot, "boot.qmp", "QEMU's control connection failed").because(why)
}

impl Qmp {
    /// Takes the greeting on `stream` and enters command mode.
    pub fn connect(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(true).map_err(|error| failed("setting it up").caused_by(error))?;
        let mut qmp = Qmp { stream, pending: Vec::new(), events: Vec::new() };
        let deadline = Instant::now() + TIMEOUT;
        while qmp.message(deadline)?.get("QMP").is_none() {}
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The connection, to wait on.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Runs a command and returns its result.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({ "execute": name, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).map_err(|error| failed(name).caused_by(error))?;
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let mut message = self.message(deadline)?;
            if let Some(error) = message.pointer("/error/desc") {
                return Err(failed(format!("{name}: {error}")));
            }
            if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// What the guest did since the last call.
    pub fn events(&mut self) -> Result<Vec<Event>> {
        while self.fill()? {}
        while self.next_line()?.is_some() {}
        Ok(std::mem::take(&mut self.events))
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(message) = self.next_line()? {
                return Ok(message);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed("no answer in time"));
            }
            wait_readable(&[self.stream.as_fd()], left)
                .map_err(|error| failed("waiting").caused_by(error))?;
            self.fill()?;
        }
    }

    /// The next whole message; an event is noted and skipped.
    fn next_line(&mut self) -> Result<Option<Value>> {
        while let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let message: Value =
                serde_json::from_slice(&line).map_err(|error| failed("it is not JSON").caused_by(error))?;
            match message.get("event").and_then(Value::as_str) {
                Some("RESET") => self.events.push(Event::Reset),
                Some("SHUTDOWN") => self.events.push(Event::Shutdown),
                Some(_) => {}
                None => return Ok(Some(message)),
            }
        }
        Ok(None)
    }

    /// Reads what is there; true when there may be more.
    fn fill(&mut self) -> Result<bool> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(failed("QEMU closed it")),
            Ok(_) if self.pending.len() > MAX_LINE => Err(failed("an endless answer")),
            Ok(n) => {
                self.pending.extend_from_slice(&buffer[..n]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(failed("reading").caused_by(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_between_answers_are_kept_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let script = [
            r#"{"QMP": {"version": {}}}"#,
            r#"{"return": {}}"#,
            r#"{"event": "RESET", "data": {"guest": true}}"#,
            r#"{"event": "NIC_RX_FILTER_CHANGED"}"#,
            r#"{"return": [1]}"#,
            r#"{"event": "SHUTDOWN"}"#,
        ];
        theirs.write_all((script.join("\r\n") + "\r\n").as_bytes()).unwrap();
        let mut qmp = Qmp::connect(ours).unwrap();
        assert_eq!(qmp.command("query-x", json!({})).unwrap(), json!([1]));
        assert_eq!(qmp.events().unwrap(), [Event::Reset, Event::Shutdown]);
        drop(theirs);
        assert!(qmp.events().is_err());
    }

    #[test]
    fn a_refused_command_says_why() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = "{\"QMP\": {}}\n{\"return\": {}}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no way\"}}\n";
        theirs.write_all(answer.as_bytes()).unwrap();
        let error = Qmp::connect(ours).unwrap().command("screendump", json!({})).unwrap_err();
        assert!(error.why().contains("screendump") && error.why().contains("no way"), "{error:?}");
    }
}
