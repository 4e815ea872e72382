//! The options that commands share: flag, then environment, then default.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

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

impl std::fmt::Display for ObjectUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cos://{}/{}", self.bucket, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
