//! Keys of a cloud account, found where the ecosystem keeps them.
//!
//! Order: explicit options, `TENCENTCLOUD_*` in the environment, tccli's files, and, when asked, the instance role at
//! the metadata service.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::cloud::Clock;
use crate::error::{Error, Kind, Result};
use crate::net;
use crate::unit::Secret;

/// The metadata service inside a CVM.
pub const METADATA: &str = "http://metadata.tencentyun.com";

/// A key file larger than this is not one.
const FILE_LIMIT: u64 = 64 * 1024;

/// A key pair, with the token that temporary ones come with.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The id, sent in clear with each request.
    pub secret_id: String,
    /// The key, which only signs.
    pub secret_key: Secret<String>,
    /// The session token of temporary keys.
    pub token: Option<Secret<String>>,
}

/// Where a client gets its keys, each time it needs them: temporary ones are renewed behind it.
pub type KeySource = Arc<dyn Fn() -> Result<Credentials> + Send + Sync>;

impl Credentials {
    /// These keys, always.
    pub fn fixed(self) -> KeySource {
        Arc::new(move || Ok(self.clone()))
    }
}

/// What the user gave explicitly, and what a search found; any part may be missing.
#[derive(Clone, Debug, Default)]
pub struct Partial {
    /// See [`Credentials::secret_id`].
    pub secret_id: Option<String>,
    /// See [`Credentials::secret_key`].
    pub secret_key: Option<Secret<String>>,
    /// See [`Credentials::token`].
    pub token: Option<Secret<String>>,
    /// The region, such as `ap-guangzhou`; passed through unvalidated, as private editions have their own.
    pub region: Option<String>,
}

/// Keys, and where they came from.
#[derive(Clone, Debug)]
pub struct Found {
    /// The keys.
    pub credentials: Credentials,
    /// The region configured anywhere in the search; explicit options first.
    pub region: Option<String>,
    /// Where the keys came from, for the reader.
    pub origin: String,
}

/// Looks for keys in `explicit`, then the environment, then tccli's default profile under `home`.
///
/// A pair is always taken whole from one place; the region may come from another.
pub fn find(explicit: &Partial, env: impl Fn(&str) -> Option<String>, home: Option<&Path>) -> Result<Found> {
    let places = [
        ("the options given".to_owned(), explicit.clone()),
        ("the environment (TENCENTCLOUD_SECRET_ID)".to_owned(), from_environment(&env)),
        from_tccli(home)?,
    ];
    let region = places.iter().find_map(|(_, partial)| partial.region.clone());
    for (origin, partial) in places {
        match (partial.secret_id, partial.secret_key) {
            (Some(secret_id), Some(secret_key)) => {
                let credentials = Credentials { secret_id, secret_key, token: partial.token };
                return Ok(Found { credentials, region, origin });
            }
            (None, None) => {}
            (id, _) => {
                let missing = if id.is_none() { "id" } else { "key" };
                return Err(Error::new(
                    Kind::Credentials,
                    "credentials.half",
                    format!("{origin} have no secret {missing}"),
                )
                .because("a secret id and its key must come from one place")
                .remedy("give both, or neither"));
            }
        }
    }
    Err(Error::new(Kind::Credentials, "credentials.none", "no cloud credentials were found")
        .because(
            "neither options, nor TENCENTCLOUD_SECRET_ID and _KEY, nor ~/.tccli/default.credential has them",
        )
        .remedy("export TENCENTCLOUD_SECRET_ID and TENCENTCLOUD_SECRET_KEY, or run `tccli configure`"))
}

fn from_environment(env: &impl Fn(&str) -> Option<String>) -> Partial {
    let get = |name: &str| env(name).filter(|value| !value.is_empty());
    Partial {
        secret_id: get("TENCENTCLOUD_SECRET_ID"),
        secret_key: get("TENCENTCLOUD_SECRET_KEY").map(Secret::new),
        token: get("TENCENTCLOUD_TOKEN").map(Secret::new),
        region: get("TENCENTCLOUD_REGION"),
    }
}

fn from_tccli(home: Option<&Path>) -> Result<(String, Partial)> {
    let Some(home) = home else { return Ok((String::new(), Partial::default())) };
    let keys_file = home.join(".tccli/default.credential");
    let keys = read_json(&keys_file)?;
    let configured = read_json(&home.join(".tccli/default.configure"))?;
    let partial = Partial {
        secret_id: text(&keys, "secretId"),
        secret_key: text(&keys, "secretKey").map(Secret::new),
        token: text(&keys, "token").map(Secret::new),
        region: text(&configured["_sys_param"], "region").or_else(|| text(&configured, "region")),
    };
    Ok((keys_file.display().to_string(), partial))
}

fn text(value: &Value, name: &str) -> Option<String> {
    value[name].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

/// The JSON of a small file; `Null` when there is none. Its content never reaches an error.
fn read_json(path: &PathBuf) -> Result<Value> {
    let failed = |why: &str| {
        Error::new(Kind::Credentials, "credentials.file", format!("cannot use {}", path.display()))
            .because(why)
            .remedy("mend it with `tccli configure`, or remove it")
    };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        Ok(about) if about.len() > FILE_LIMIT => return Err(failed("it is too large for a key file")),
        _ => {}
    }
    let bytes = std::fs::read(path).map_err(|error| failed("it cannot be read").caused_by(error))?;
    serde_json::from_slice(&bytes).map_err(|_| failed("it is not JSON"))
}

/// The temporary keys of the role bound to the CVM this runs on, from the metadata service at `base`
/// ([`METADATA`] on a real one). They last for hours: ask again for a long job.
pub fn instance_role(base: &str) -> Result<Credentials> {
    net::block_on(fetch_role(base))?.map_err(|why| {
        Error::new(Kind::Credentials, "credentials.role", format!("{base} gave no instance role's keys"))
            .because(why)
            .remedy("bind a CAM role to this instance, or give keys in the environment")
    })
}

/// How long keys of an instance role are kept; the metadata service renews them hours before they run out.
const ROLE_KEPT: Duration = Duration::from_secs(300);

/// The keys of the instance role behind `base`, asked for again every five minutes of `clock`.
pub fn role_source(base: &str, clock: Arc<dyn Clock>) -> KeySource {
    let (base, kept) = (base.to_owned(), Mutex::new(None::<(Duration, Credentials)>));
    Arc::new(move || {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock.elapsed();
        if let Some((_, keys)) = kept.as_ref().filter(|(since, _)| now.saturating_sub(*since) < ROLE_KEPT) {
            return Ok(keys.clone());
        }
        let keys = instance_role(&base)?;
        *kept = Some((now, keys.clone()));
        Ok(keys)
    })
}

async fn fetch_role(base: &str) -> std::result::Result<Credentials, String> {
    let http = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(Duration::from_secs(5))
        .build()
        .map_err(|error| error.to_string())?;
    let folder = format!("{base}/latest/meta-data/cam/security-credentials/");
    let get = async |url: String| -> std::result::Result<String, String> {
        let answer = http.get(url).send().await.map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("HTTP {}", answer.status()));
        }
        let bytes = net::body(answer, FILE_LIMIT).await.map_err(|error| error.why())?;
        String::from_utf8(bytes).map_err(|_| "the answer is not text".to_owned())
    };
    let role = get(folder.clone()).await?;
    let role = role.trim();
    if role.is_empty() || role.contains(['/', '?', '#', '\n']) {
        return Err("no role is bound to this instance".to_owned());
    }
    let keys: Value = serde_json::from_str(&get(format!("{folder}{role}")).await?)
        .map_err(|_| "the answer is not JSON".to_owned())?;
    match (text(&keys, "TmpSecretId"), text(&keys, "TmpSecretKey"), text(&keys, "Token")) {
        (Some(secret_id), Some(key), Some(token)) => {
            Ok(Credentials { secret_id, secret_key: Secret::new(key), token: Some(Secret::new(token)) })
        }
        _ => Err(format!("the role `{role}` has no keys")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home_with_tccli() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".tccli")).unwrap();
        let keys = r#"{"secretId": "AKIDfile", "secretKey": "canary-file", "token": null}"#;
        std::fs::write(home.path().join(".tccli/default.credential"), keys).unwrap();
        let configured = r#"{"_sys_param": {"region": "ap-file"}, "cvm": {"version": "2017-03-12"}}"#;
        std::fs::write(home.path().join(".tccli/default.configure"), configured).unwrap();
        home
    }

    fn environment(name: &str) -> Option<String> {
        match name {
            "TENCENTCLOUD_SECRET_ID" => Some("AKIDenv".into()),
            "TENCENTCLOUD_SECRET_KEY" => Some("canary-env".into()),
            "TENCENTCLOUD_TOKEN" => Some("canary-token".into()),
            _ => None,
        }
    }

    #[test]
    fn options_win_over_the_environment_and_that_over_tccli() {
        let home = home_with_tccli();
        let given = Partial {
            secret_id: Some("AKIDopt".into()),
            secret_key: Some(Secret::new("canary".into())),
            ..Partial::default()
        };
        let id = |found: Result<Found>| found.unwrap().credentials.secret_id;
        assert_eq!(id(find(&given, environment, Some(home.path()))), "AKIDopt");
        assert_eq!(id(find(&Partial::default(), environment, Some(home.path()))), "AKIDenv");
        let found = find(&Partial::default(), |_| None, Some(home.path())).unwrap();
        assert_eq!(found.credentials.secret_id, "AKIDfile");
        assert_eq!(found.credentials.token, None);
        assert_eq!(found.region.as_deref(), Some("ap-file"));
    }

    #[test]
    fn keys_of_two_places_are_never_mixed() {
        let given = Partial { secret_id: Some("AKIDopt".into()), ..Partial::default() };
        let error = find(&given, environment, None).unwrap_err();
        assert_eq!(error.id(), "credentials.half");
        assert_eq!(find(&Partial::default(), |_| None, None).unwrap_err().id(), "credentials.none");
    }

    #[test]
    fn no_secret_is_printed_and_none_is_in_the_error_of_a_broken_file() {
        let home = home_with_tccli();
        let found = find(&Partial::default(), environment, None).unwrap();
        assert!(!format!("{found:?}").contains("canary"));
        let keys = home.path().join(".tccli/default.credential");
        std::fs::write(&keys, r#"{"secretKey": "canary"#).unwrap();
        let error = find(&Partial::default(), |_| None, Some(home.path())).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("canary"));
        assert!(error.what().contains("default.credential"));
    }
}
