//! NBD, the network block device: an export of another program read like a disk, and a disk served to QEMU.
//!
//! Protocol: `doc/proto.md` and `doc/uri.md` of the NBD project. No TLS.

mod answer;
mod client;
mod connection;
mod conversation;
mod fault;
mod handshake;
#[cfg(test)]
mod hostile;
mod link;
mod reply;
mod server;
mod wire;

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

pub use client::{Client, Options, Pause};
pub use server::Server;

/// The port that IANA assigned to NBD.
const PORT: u16 = 10809;

/// Where an export is: `nbd://host[:port]/export` or `nbd+unix:///export?socket=/path` (doc/uri.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The name of the export, at most 4096 bytes; empty for the server's default one.
    pub export: String,
    text: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host name or IP address (IPv6 without brackets), and a port.
    Tcp(String, u16),
    /// The path of a Unix socket; one that begins with a NUL byte is in the abstract namespace.
    Unix(PathBuf),
}

impl Uri {
    /// Reads an NBD URI. One that asks for TLS, has a part that means nothing here, or names no server is an error of
    /// [`Kind::Usage`].
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(Kind::Usage, "usage.nbd-uri", format!("{text:?} is not an NBD URI that can be read"))
                .because(why)
                .remedy("write nbd://host[:port]/export or nbd+unix:///export?socket=/path")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("it has no scheme such as nbd://"))?;
        if rest.contains('#') {
            return Err(bad("a # in a name is written %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let pairs = || query.split('&').filter(|pair| !pair.is_empty());
        let scheme = scheme.to_ascii_lowercase();
        if matches!(scheme.as_str(), "nbds" | "nbds+unix") || pairs().any(|pair| pair.starts_with("tls-")) {
            return Err(no_tls(text));
        }
        let export = decode(path).and_then(|bytes| String::from_utf8(bytes).ok());
        let export = export.ok_or_else(|| bad("the name of the export is not UTF-8 in percent-encoding"))?;
        if export.contains('\0') || export.len() > wire::MAX_STRING {
            return Err(bad("the name of an export has at most 4096 bytes, none of them NUL"));
        }
        let mut socket = None;
        for pair in pairs() {
            match pair.strip_prefix("socket=") {
                Some(path) if socket.is_none() && scheme == "nbd+unix" => {
                    let path = decode(path).filter(|path| !path.is_empty());
                    socket = Some(path.ok_or_else(|| bad("the path of the socket cannot be read"))?);
                }
                _ => return Err(bad(&format!("{pair:?} means nothing here"))),
            }
        }
        let address = match (scheme.as_str(), socket) {
            ("nbd", _) => tcp(authority).ok_or_else(|| bad("it names no host, or a port that is none"))?,
            ("nbd+unix", Some(path)) if authority.is_empty() => {
                Address::Unix(PathBuf::from(OsString::from_vec(path)))
            }
            ("nbd+unix", Some(_)) => return Err(bad("a Unix socket has no host: write nbd+unix:///")),
            ("nbd+unix", None) => return Err(bad("it names no socket")),
            _ => return Err(bad("the schemes are nbd and nbd+unix")),
        };
        Ok(Uri { address, export, text: text.to_owned() })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// TLS is left to programs made for it.
fn no_tls(name: &str) -> Error {
    Error::new(Kind::Usage, "nbd.tls", format!("{name} asks for TLS"))
        .because("haul speaks NBD without TLS only")
        .remedy("reach the server through stunnel or an ssh tunnel, or through nbdkit's nbd plugin on a Unix socket")
        .fact("export", name)
}

/// `host`, `host:port`, `[address]` or `[address]:port`. A user name serves TLS only and is not taken.
fn tcp(authority: &str) -> Option<Address> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = match port {
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => port.parse().ok()?,
        Some(_) => return None,
        None => PORT,
    };
    let fine = !host.is_empty() && !host.contains(['@', '[', ']', '%']);
    fine.then(|| Address::Tcp(host.to_owned(), port))
}

/// Undoes percent-encoding (RFC 3986, section 2.1).
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16).and_then(|n| u8::try_from(n).ok());
                digit()? << 4 | digit()?
            }
            _ => byte,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &str) -> Address {
        Address::Unix(path.into())
    }

    fn host(name: &str, port: u16) -> Address {
        Address::Tcp(name.into(), port)
    }

    #[test]
    fn the_examples_of_the_uri_specification_are_read_as_it_says() {
        for (text, address, export) in [
            ("nbd://example.com:10810/export", host("example.com", 10810), "export"),
            ("nbd://example.com/disk", host("example.com", 10809), "disk"),
            ("nbd+unix:///disk?socket=sock", unix("sock"), "disk"),
            ("nbd://example.com/", host("example.com", 10809), ""),
            ("nbd://example.com", host("example.com", 10809), ""),
            ("nbd://example.com//disk", host("example.com", 10809), "/disk"),
            ("nbd://example.com/hello%20world", host("example.com", 10809), "hello world"),
            ("NBD://[::1]:1/a/b", host("::1", 1), "a/b"),
            ("nbd://[fe80::1]", host("fe80::1", 10809), ""),
            ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract"), ""),
            ("nbd+unix:///?socket=/run/a%26b/s", unix("/run/a&b/s"), ""),
            ("nbd+unix://?socket=/s", unix("/s"), ""),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!((uri.address, uri.export.as_str()), (address, export), "{text}");
        }
    }

    #[test]
    fn what_is_no_uri_of_a_server_is_refused() {
        let long = format!("nbd://h/{}", "x".repeat(wire::MAX_STRING + 1));
        for text in [
            "",
            "nbd",
            "nbd:",
            "nbd:host",
            "http://host/",
            "nbd:///export",
            "nbd://:1/",
            "nbd://h:/x",
            "nbd://h:0x1/",
            "nbd://h:65536/",
            "nbd://h:-1/",
            "nbd://h:+1/",
            "nbd://[::1/",
            "nbd://[::1]x/",
            "nbd://user@h/",
            "nbd://h/%",
            "nbd://h/%2",
            "nbd://h/%zz",
            "nbd://h/%ff",
            "nbd://h/%00",
            "nbd://h/#x",
            "nbd://h/?socket=/s",
            "nbd://h/?x=1",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix://h/x?socket=/s",
            "nbd+unix:///x?socket=/s&socket=/t",
            "nbd+unix:///x?socket=/s&y=1",
            &long,
        ] {
            let error = Uri::parse(text).unwrap_err();
            assert_eq!((error.kind(), error.id()), (Kind::Usage, "usage.nbd-uri"), "{text}");
        }
    }

    #[test]
    fn tls_is_refused_by_name_with_what_to_do() {
        for text in ["nbds://host/x", "nbds+unix:///x?socket=/s", "NBDS://host", "nbd://host/?tls-type=x509"]
        {
            let error = Uri::parse(text).unwrap_err();
            assert_eq!(error.id(), "nbd.tls", "{text}");
            assert!(error.what().contains(text) && error.what_to_do().contains("stunnel"), "{error:?}");
        }
    }
}
