//! The one error type: what failed, why, what to do, and the facts behind it. A leaf that knows no domain type.
//!
//! An error carries a stable message `id` and named facts (disk, offset, object, request id) beside its English
//! text, so that a front end can render it as three lines, as JSON, or in another language.

use std::error::Error as StdError;
use std::fmt;

/// The result of anything that can fail in haul.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure this is; each kind has one process exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A broken assumption inside haul.
    Internal,
    /// The command line or a configuration file is wrong.
    Usage,
    /// Preflight found something that blocks the job.
    Preflight,
    /// The source cannot be read, or it changed while it was read.
    Source,
    /// An image, partition table or file system is malformed or unsupported.
    Image,
    /// The destination is full or cannot be written.
    Destination,
    /// The network or the object store failed.
    Network,
    /// The cloud's API refused the request.
    Cloud,
    /// Credentials are missing or wrong, or the clock is off.
    Credentials,
    /// A copy is not what its manifest says.
    Mismatch,
    /// A boot test failed.
    Boot,
    /// Stopped on request; the job can be resumed.
    Interrupted,
    /// A privilege or an external program is missing.
    Privilege,
}

impl Kind {
    /// The process exit code of this kind (docs/exit-codes.md).
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Internal => 1,
            Kind::Usage => 2,
            Kind::Preflight => 3,
            Kind::Source => 4,
            Kind::Image => 5,
            Kind::Destination => 6,
            Kind::Network => 7,
            Kind::Cloud => 8,
            Kind::Credentials => 9,
            Kind::Mismatch => 10,
            Kind::Boot => 11,
            Kind::Interrupted => 12,
            Kind::Privilege => 13,
        }
    }

    /// What to do about an error of this kind when the place that raised it knew nothing better.
    const fn default_remedy(self) -> &'static str {
        match self {
            Kind::Internal => "report this with the output of the same command under -v",
            Kind::Usage => "see the command's --help",
            Kind::Preflight => "mend what `haul check` lists, or skip a check by its id",
            Kind::Source => "check the disk (dmesg, smartctl) and run again",
            Kind::Image => "check the image with the tool that wrote it",
            Kind::Destination => "free space at the destination or choose another one",
            Kind::Network => "check the endpoint and the network, then run the same command with --resume",
            Kind::Cloud => "look the error code up in the cloud's API documentation",
            Kind::Credentials => "check the credentials and this machine's clock",
            Kind::Mismatch => "the copy must not be used: make it again",
            Kind::Boot => "look at the console log named above",
            Kind::Interrupted => "run the same command with --resume",
            Kind::Privilege => "run as root, or install the program named above",
        }
    }
}

/// Whether doing the same thing again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request would fail the same way.
    No,
    /// A passing fault: worth another try after a pause.
    Yes,
}

/// An error: kind, message id, text, facts and cause. Small to return (one pointer).
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    id: &'static str,
    what: String,
    why: Option<String>,
    remedy: Option<String>,
    facts: Vec<(&'static str, String)>,
    retry: Retry,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` with the stable message id `id`; `what` says what failed, naming the thing it failed on.
    pub fn new(kind: Kind, id: &'static str, what: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            kind,
            id,
            what: what.into(),
            why: None,
            remedy: None,
            facts: Vec::new(),
            retry: Retry::No,
            source: None,
        }))
    }

    /// Adds the reason, where it is not simply the source error.
    #[must_use]
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.0.why = Some(why.into());
        self
    }

    /// Adds what the reader should do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Adds a named fact for JSON output and translation.
    #[must_use]
    pub fn fact(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.facts.push((name, value.to_string()));
        self
    }

    /// Adds the error underneath.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Marks the error as a passing fault.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.0.retry = Retry::Yes;
        self
    }

    /// The same error as another kind: for a place that knows whether a file is a source or a destination.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.0.kind = kind;
        self
    }

    /// The kind, which decides the exit code.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The stable message id, such as `qcow2.field`.
    pub fn id(&self) -> &'static str {
        self.0.id
    }

    /// What failed.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Why it failed: the given reason, followed by the chain of sources.
    pub fn why(&self) -> String {
        let mut parts: Vec<String> = self.0.why.iter().cloned().collect();
        let mut source = self.source();
        while let Some(error) = source {
            parts.push(error.to_string());
            source = error.source();
        }
        if parts.is_empty() {
            parts.push("no further reason is known".into());
        }
        parts.join(": ")
    }

    /// What to do about it.
    pub fn what_to_do(&self) -> &str {
        match &self.0.remedy {
            Some(remedy) => remedy,
            None => self.0.kind.default_remedy(),
        }
    }

    /// The named facts, in the order they were added.
    pub fn facts(&self) -> &[(&'static str, String)] {
        &self.0.facts
    }

    /// Whether another try can help.
    pub fn retry(&self) -> Retry {
        self.0.retry
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        match &self.0.why {
            Some(why) => write!(f, ": {why}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}[{}] {}: {}", self.0.kind, self.0.id, self.0.what, self.why())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_followed_by_every_source() {
        let error = Error::new(Kind::Source, "io.read", "cannot read /dev/sdx at 4096")
            .because("the disk answered late")
            .caused_by(std::io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(error.why(), "the disk answered late: Input/output error (os error 5)");
        assert_eq!(error.to_string(), "cannot read /dev/sdx at 4096: the disk answered late");
    }

    #[test]
    fn every_kind_has_its_own_exit_code() {
        use Kind::*;
        let all = [
            Internal,
            Usage,
            Preflight,
            Source,
            Image,
            Destination,
            Network,
            Cloud,
            Credentials,
            Mismatch,
            Boot,
            Interrupted,
            Privilege,
        ];
        let codes: std::collections::BTreeSet<u8> = all.iter().map(|kind| kind.exit_code()).collect();
        assert_eq!(codes.len(), all.len());
        assert!(!codes.contains(&0));
    }
}
