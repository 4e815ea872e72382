//! Why a request came to nothing, and the error made of it.

use std::io;

use super::Uri;
use super::wire::errno;
use crate::error::{Error, Kind};

/// Most of a server's own words shown, in characters.
const MAX_WORDS: usize = 200;

/// Why a request came to nothing.
#[derive(Debug)]
pub enum Fault {
    /// No connection could be made.
    Unreachable(io::Error),
    /// The connection is gone or too slow. Another one may serve.
    Broken(io::Error),
    /// The server broke the protocol, in this way. The connection is of no more use.
    Protocol(String),
    /// The server answered with an error; the connection is as good as before.
    Refused {
        /// One of [`errno`].
        errno: u32,
        /// Where, in bytes of the export.
        offset: u64,
        /// The server's own words, possibly none.
        words: String,
    },
    /// There is no using this export.
    Unusable(Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Broken(error)
    }
}

/// The fault of a server that sent `what`.
pub fn protocol(what: impl Into<String>) -> Fault {
    Fault::Protocol(what.into())
}

/// A server's words on one line, bounded.
pub fn readable(words: &[u8]) -> String {
    String::from_utf8_lossy(words).chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect()
}

impl Fault {
    /// Whether another try may do better.
    pub fn is_passing(&self) -> bool {
        match self {
            Fault::Unreachable(_) | Fault::Broken(_) => true,
            Fault::Refused { errno, .. } => *errno == errno::ENOMEM,
            Fault::Protocol(_) | Fault::Unusable(_) => false,
        }
    }

    /// The same fault for another thread that was waiting.
    pub fn shared(&self) -> Fault {
        let again = |error: &io::Error| io::Error::new(error.kind(), error.to_string());
        match self {
            Fault::Unreachable(error) => Fault::Unreachable(again(error)),
            Fault::Broken(error) => Fault::Broken(again(error)),
            Fault::Protocol(what) => Fault::Protocol(what.clone()),
            Fault::Refused { errno, offset, words } => {
                Fault::Refused { errno: *errno, offset: *offset, words: words.clone() }
            }
            Fault::Unusable(error) => Fault::Broken(io::Error::other(error.to_string())),
        }
    }

    /// haul's error, of the first connection or of a request at `offset`.
    pub fn error(self, uri: &Uri, offset: Option<u64>) -> Error {
        let place = |offset: Option<u64>| offset.map(|at| format!(" at offset {at}")).unwrap_or_default();
        let (error, offset) = match self {
            Fault::Unusable(error) => (error, offset),
            Fault::Unreachable(cause) => {
                let what = match offset {
                    Some(at) => format!("cannot connect to {uri} again, to read it at offset {at}"),
                    None => format!("cannot connect to {uri}"),
                };
                (named(Kind::Network, "nbd.connect", what, uri).caused_by(cause).retryable(), offset)
            }
            Fault::Broken(cause) => {
                let what = format!("the connection to {uri} broke{}", place(offset));
                (named(Kind::Network, "nbd.connection", what, uri).caused_by(cause).retryable(), offset)
            }
            Fault::Protocol(why) => {
                let what = format!("{uri} does not keep to the NBD protocol{}", place(offset));
                let remedy =
                    "check that an NBD server listens there, and which; newer versions may do better";
                let error = named(Kind::Network, "nbd.protocol", what, uri);
                (error.because(format!("the server sent {why}")).remedy(remedy), offset)
            }
            Fault::Refused { errno, offset, words } => {
                let what = format!("cannot read {uri}{}", place(Some(offset)));
                let error = match errno {
                    // Named as for a disk of this machine, so that it is treated as one with bad sectors.
                    errno::EIO => named(Kind::Source, "io.read", what, uri),
                    errno::ENOMEM => named(Kind::Network, "nbd.refused", what, uri).retryable(),
                    _ => named(Kind::Network, "nbd.refused", what, uri),
                };
                let number = i32::try_from(errno).unwrap_or(libc::EINVAL);
                let error = error.caused_by(io::Error::from_raw_os_error(number));
                let said =
                    if words.is_empty() { error } else { error.because(format!("the server says: {words}")) };
                (said, Some(offset))
            }
        };
        match offset {
            Some(offset) => error.fact("offset", offset),
            None => error,
        }
    }
}

fn named(kind: Kind, id: &'static str, what: String, uri: &Uri) -> Error {
    Error::new(kind, id, what).fact("export", uri)
}
