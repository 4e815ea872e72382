//! The options that commands share: flag, then environment, then configuration file, then default.

pub mod file;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::nbd;

/// Which shapes of the cloud's API are spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Edition {
    /// The public cloud.
    #[default]
    Public,
    /// The private edition.
    Tce,
}

/// Where the cloud is. Keys are never options: they come from `TENCENTCLOUD_SECRET_ID` and `_KEY`, or tccli's files.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
#[command(next_help_heading = "Cloud")]
pub struct Cloud {
    /// The region, such as ap-guangzhou
    #[arg(long, env = "HAUL_REGION", value_name = "REGION")]
    pub region: Option<String>,
    /// The object store's URL without the bucket (default: COS of the region)
    #[arg(long, env = "HAUL_COS_ENDPOINT", value_name = "URL")]
    pub cos_endpoint: Option<String>,
    /// Put the bucket into the path of the URL; COS refuses that for new buckets
    #[arg(long, env = "HAUL_PATH_STYLE")]
    pub path_style: bool,
    /// Connect to this address whatever the object store's name resolves to
    #[arg(long, env = "HAUL_CONNECT_TO", value_name = "IP")]
    pub connect_to: Option<IpAddr>,
    /// The CVM API's URL, or the API domain of a private edition (default: the public cloud)
    #[arg(long, env = "HAUL_CVM_ENDPOINT", value_name = "URL")]
    pub cvm_endpoint: Option<String>,
    /// The cloud's edition
    #[arg(long, env = "HAUL_EDITION", value_enum, default_value = "public")]
    pub edition: Edition,
    /// Send at most so many bytes a second, such as 10M; 0 is no limit
    #[arg(long, env = "HAUL_BANDWIDTH_LIMIT", default_value = "0", value_name = "RATE")]
    pub bandwidth_limit: String,
}

impl Cloud {
    /// Whether the user said where the cloud is: else nobody is asked unbidden.
    pub fn is_named(&self) -> bool {
        [&self.region, &self.cvm_endpoint, &self.cos_endpoint].iter().any(|option| option.is_some())
    }
}

impl Default for Cloud {
    /// What the command line gives when nothing is said.
    fn default() -> Self {
        Cloud {
            region: None,
            cos_endpoint: None,
            path_style: false,
            connect_to: None,
            cvm_endpoint: None,
            edition: Edition::default(),
            bandwidth_limit: "0".into(),
        }
    }
}

/// Where haul keeps what it must remember.
#[derive(Clone, Debug, clap::Args)]
pub struct State {
    /// haul's own folder (default: /var/lib/haul for root, else ~/.local/state/haul)
    #[arg(long, env = "HAUL_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

impl State {
    /// The folder, by flag, environment or default.
    pub fn folder(&self) -> Result<PathBuf> {
        if let Some(folder) = &self.state_dir {
            return Ok(folder.clone());
        }
        if is_root() {
            return Ok(PathBuf::from("/var/lib/haul"));
        }
        let home = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")))
            .map(|state| state.join("haul"))
            .ok_or_else(|| {
                Error::new(Kind::Usage, "config.state-dir", "there is no folder to keep state in")
                    .because("HOME is not set")
                    .remedy("name one with --state-dir")
            })
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A bucket and a key, written `cos://bucket/key`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectUrl {
    /// The bucket, on COS `<name>-<APPID>`.
    pub bucket: String,
    /// The key.
    pub key: String,
}

impl std::str::FromStr for ObjectUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.strip_prefix("cos://").and_then(|rest| rest.split_once('/'));
        match parts {
            Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                Ok(ObjectUrl { bucket: bucket.into(), key: key.into() })
            }
            _ => Err(Error::new(Kind::Usage, "usage.object", format!("{text:?} names no object"))
                .remedy("write cos://BUCKET/KEY")),
        }
    }
}

impl fmt::Display for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cos://{}/{}", self.bucket, self.key)
    }
}

/// A disk or an image as its user names it: a path, or an object's URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum Location {
    /// A block device or a file.
    File(PathBuf),
    /// An object in a store.
    Object(ObjectUrl),
    /// An export of an NBD server.
    Nbd(nbd::Uri),
    /// Standard output.
    Stdout,
    /// Nowhere: what is written is thrown away.
    Null,
}

impl Location {
    /// Reads a command line's argument. Whatever begins like a URL must be one that haul knows; a file of such a name
    /// is written `./name`.
    pub fn parse(text: OsString) -> Result<Self> {
        match text.to_str() {
            Some("-") => Ok(Location::Stdout),
            Some("null:") => Ok(Location::Null),
            Some(url) if url.starts_with("cos://") => url.parse().map(Location::Object),
            Some(url) if url.starts_with("nbd") && url.contains("://") => {
                nbd::Uri::parse(url).map(Location::Nbd)
            }
            Some(url) if url.contains("://") && !url.starts_with(['.', '/']) => {
                Err(Error::new(Kind::Usage, "usage.location", format!("{url:?} cannot be opened"))
                    .because("its scheme is not known")
                    .remedy("name a disk, a file, cos://BUCKET/KEY, or nbd://HOST/EXPORT"))
            }
            _ => Ok(Location::File(text.into())),
        }
    }

    /// Its path, if it is a file or a device.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Location::File(path) => Some(path),
            _ => None,
        }
    }

    /// The last part of its name.
    pub fn file_name(&self) -> &OsStr {
        let path = match self {
            Location::File(path) => path,
            Location::Object(url) => Path::new(&url.key),
            Location::Nbd(uri) => Path::new(&uri.export),
            Location::Stdout => Path::new("stdout"),
            Location::Null => Path::new("null"),
        };
        path.file_name().unwrap_or_default()
    }
}

/// How clap reads a [`Location`].
pub fn location_parser() -> impl clap::builder::TypedValueParser<Value = Location> {
    use clap::builder::TypedValueParser;
    clap::builder::OsStringValueParser::new().try_map(Location::parse)
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::File(path) => path.display().fmt(f),
            Location::Object(url) => url.fmt(f),
            Location::Nbd(uri) => uri.fmt(f),
            Location::Stdout => f.write_str("-"),
            Location::Null => f.write_str("null:"),
        }
    }
}

impl From<PathBuf> for Location {
    /// What was parsed once parses again; what was never parsed is a path.
    fn from(path: PathBuf) -> Self {
        Location::parse(path.clone().into()).unwrap_or(Location::File(path))
    }
}

impl From<Location> for PathBuf {
    fn from(location: Location) -> Self {
        match location {
            Location::File(path) => path,
            other => other.to_string().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_path_or_an_object_and_survives_its_record() {
        let parse = |text: &str| Location::parse(text.into());
        assert_eq!(parse("/dev/sda").unwrap().path(), Some(Path::new("/dev/sda")));
        assert_eq!(parse("./cos://b/k").unwrap().path(), Some(Path::new("./cos://b/k")));
        for bad in ["cos://b", "s3://b/k", "nfs://server/x"] {
            assert_eq!(parse(bad).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
        let object = parse("cos://b-1/folder/k.qcow2").unwrap();
        assert_eq!((object.path(), object.file_name()), (None, OsStr::new("k.qcow2")));
        for other in ["nbd://host:1/x%20y", "nbd+unix:///?socket=/run/s", "-", "null:", "./-"] {
            assert_eq!(parse(other).unwrap().to_string(), other);
        }
        let export = parse("nbd://host/server").unwrap();
        assert_eq!((export.path(), export.file_name()), (None, OsStr::new("server")));
        for location in [object, export, Location::Null, parse("disk.raw").unwrap()] {
            let json = serde_json::to_string(&location).unwrap();
            assert_eq!(json, format!("{:?}", location.to_string()));
            assert_eq!(serde_json::from_str::<Location>(&json).unwrap(), location);
        }
    }

    #[test]
    fn an_object_has_a_bucket_and_a_key() {
        let url: ObjectUrl = "cos://images-1250000000/a/b.qcow2".parse().unwrap();
        assert_eq!((url.bucket.as_str(), url.key.as_str()), ("images-1250000000", "a/b.qcow2"));
        assert_eq!(url.to_string(), "cos://images-1250000000/a/b.qcow2");
        for bad in ["", "cos://", "cos://b", "cos://b/", "s3://b/k", "b/k"] {
            assert!(bad.parse::<ObjectUrl>().is_err(), "{bad}");
        }
    }
}
