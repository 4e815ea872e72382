//! The cloud a job talks to: store and image service, put together from the options.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::wait;
use crate::cloud::tencent::sign::Method;
use crate::cloud::tencent::{self, Client, Cvm, Endpoint, Settings};
use crate::cloud::{Credentials, SystemClock, credentials};
use crate::config::{Cloud, Edition};
use crate::error::{Error, Kind, Result};
use crate::monitor::Monitor;
use crate::store::ObjectStore;
use crate::store::limit::{Limit, Limiter};
use crate::store::retry::{Policy, Retry};
use crate::store::s3::{self, Keys, S3};
use crate::unit::rate::Rate;

/// How to reach the cloud, with the keys found.
pub struct Services {
    options: Cloud,
    region: String,
    credentials: Credentials,
}

impl Services {
    /// Finds keys and region; talks to no one yet.
    pub fn new(options: &Cloud) -> Result<Self> {
        let explicit = credentials::Partial { region: options.region.clone(), ..Default::default() };
        let home = std::env::var_os("HOME").map(std::path::PathBuf::from);
        let found = credentials::find(&explicit, |name| std::env::var(name).ok(), home.as_deref())?;
        let region = found.region.ok_or_else(|| {
            Error::new(Kind::Usage, "config.region", "no region is known")
                .because(
                    "neither --region, HAUL_REGION, TENCENTCLOUD_REGION nor tccli's configuration names one",
                )
                .remedy("add --region, such as --region ap-guangzhou")
        })?;
        Ok(Services { options: options.clone(), region, credentials: found.credentials })
    }

    /// The region.
    pub fn region(&self) -> &str {
        &self.region
    }

    /// One bucket, each request sent once and as fast as it goes.
    pub fn bucket(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let keys = Keys {
            id: self.credentials.secret_id.clone(),
            secret: self.credentials.secret_key.clone(),
            token: self.credentials.token.clone(),
        };
        let endpoint = self.options.cos_endpoint.clone();
        let config = s3::Config {
            endpoint: endpoint.unwrap_or_else(|| format!("https://cos.{}.myqcloud.com", self.region)),
            region: self.region.clone(),
            bucket: bucket.to_owned(),
            path_style: self.options.path_style,
            connect_to: self.options.connect_to,
            keys: Arc::new(move || Ok(keys.clone())),
        };
        Ok(Arc::new(S3::new(config)?))
    }

    /// One bucket, with retries and the bandwidth limit; a wait ends when `stop` is set.
    pub fn store(
        &self,
        bucket: &str,
        stop: &Arc<AtomicBool>,
        monitor: &Arc<dyn Monitor>,
    ) -> Result<Arc<dyn ObjectStore>> {
        let mut store = self.bucket(bucket)?;
        if let Some(rate) = Rate::parse(&self.options.bandwidth_limit)? {
            store = Arc::new(Limit::new(store, Arc::new(Limiter::at(Some(rate)))));
        }
        let stop = stop.clone();
        Ok(Arc::new(Retry::new(store, Policy::default(), monitor.clone(), move |pause| wait(pause, &stop))))
    }

    /// The CVM API; a wait ends when `stop` is set.
    pub fn cvm(&self, stop: &Arc<AtomicBool>) -> Result<Cvm> {
        let settings = Settings {
            endpoint: Endpoint::of("cvm", self.options.cvm_endpoint.as_deref())?,
            service: "cvm".into(),
            version: "2017-03-12".into(),
            region: self.region.clone(),
            method: Method::Tc3,
        };
        let edition = match self.options.edition {
            Edition::Public => tencent::Edition::Public,
            Edition::Tce => tencent::Edition::Tce,
        };
        let client = Client::new(
            settings,
            self.credentials.clone().fixed(),
            Arc::new(SystemClock::until(stop.clone())),
        )?;
        Ok(Cvm::new(client, edition))
    }
}
