//! The API 3.0 client: one signed request, one typed answer or error, and the retry rules.
//!
//! Blocking: callers are threads. Redirects are never followed, answers are bounded, and only what cannot have been
//! done already, or may be done twice, is sent again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap};
use serde_json::{Map, Value, json};
use time::PrimitiveDateTime;
use time::macros::format_description;

use super::{sign, wire};
use crate::cloud::{Clock, Credentials, KeySource};
use crate::error::{Error, Kind, Result, Retry};
use crate::net;

/// Longest answer accepted, in bytes: a page of 100 instances is well under 1 MiB.
const ANSWER_LIMIT: u64 = 8 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(60);
/// The pauses between tries; the official SDK's, with one more.
const PAUSES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(8)];

/// Where an API answers: scheme, and host with its port where that is not the scheme's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    scheme: String,
    authority: String,
}

impl Endpoint {
    /// The endpoint of `service`. `given` may be a URL (`http://127.0.0.1:9000`), taken as it is, or the API domain
    /// of a private edition (`api3.example.com`), before which the service's name is put; none is the public cloud.
    pub fn of(service: &str, given: Option<&str>) -> Result<Self> {
        let text = match given {
            None => format!("https://{service}.tencentcloudapi.com"),
            Some(url) if url.contains("://") => url.to_owned(),
            Some(domain) => format!("https://{service}.{domain}"),
        };
        let refused = |why: &str| {
            Error::new(Kind::Usage, "cloud.endpoint", format!("`{text}` is no API endpoint"))
                .because(why)
                .remedy("give it as https://host, http://host:port, or a domain alone")
        };
        let url = url::Url::parse(&text).map_err(|error| refused(&error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.path() != "/" || url.query().is_some() {
            return Err(refused("it must be http or https, with no path"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refused("it must not hold a user name or password"));
        }
        let host = url.host_str().ok_or_else(|| refused("it names no host"))?;
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        Ok(Endpoint { scheme: url.scheme().to_owned(), authority: format!("{host}{port}") })
    }

    fn is_loopback(&self) -> bool {
        ["127.", "localhost", "[::1]"].iter().any(|prefix| self.authority.starts_with(prefix))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

/// What a client of one product needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it answers.
    pub endpoint: Endpoint,
    /// The product in the credential scope, such as `cvm`; a custom endpoint does not tell it.
    pub service: String,
    /// The API's version, such as `2017-03-12`.
    pub version: String,
    /// The region, passed through unvalidated.
    pub region: String,
    /// How to sign.
    pub method: sign::Method,
}

/// What may be done when a call failed in passing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// A read, or a call that changes nothing when repeated: sent again after any passing fault.
    Freely,
    /// A create: sent again only when it certainly was not carried out (no connection, rate limit).
    IfRefused,
    /// A purchase: never sent again.
    Never,
}

/// The error an API answered with.
#[derive(Debug)]
pub struct ApiError {
    /// `Category` or `Category.Detail`.
    pub code: String,
    /// The server's text.
    pub message: String,
    /// What support asks for.
    pub request_id: String,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, request id {})", self.message, self.code, self.request_id)
    }
}

impl std::error::Error for ApiError {}

/// The API's code behind an error of this client, where the API answered at all.
pub fn api_code(error: &Error) -> Option<&str> {
    use std::error::Error as _;
    error.source().and_then(|source| source.downcast_ref::<ApiError>()).map(|api| api.code.as_str())
}

/// Whether the request may have been carried out although it failed.
pub fn outcome_unknown(error: &Error) -> bool {
    matches!(api_code(error), Some(code) if is_of(code, SERVER_FAULTS)) || error.id() == "cloud.unanswered"
}

/// Codes of a fault inside the server, after which the request may or may not have been carried out.
const SERVER_FAULTS: &[&str] = &["InternalError", "InternalServerError", "ServiceUnavailable"];

/// Whether `code` is one of `categories` or a detail of one.
fn is_of(code: &str, categories: &[&str]) -> bool {
    categories.iter().any(|category| {
        code.strip_prefix(category).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// What the server's clock said, for `check`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skew {
    /// Seconds by which this machine's clock is ahead of the server's; negative when behind.
    pub seconds: i64,
}

impl fmt::Display for Skew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.seconds < 0 { "behind" } else { "ahead of" };
        write!(f, "{} s {way} the server's clock", self.seconds.unsigned_abs())
    }
}

/// A client of one product in one region. Clones share connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    settings: Settings,
    keys: KeySource,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Client {
    /// A client; nothing is sent yet. `keys` are asked for before every request, so that temporary ones can be renewed.
    pub fn new(settings: Settings, keys: KeySource, clock: Arc<dyn Clock>) -> Result<Self> {
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            // Whether to send again is decided here, by what the call does.
            .retry(reqwest::retry::never())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT);
        if settings.endpoint.is_loopback() {
            builder = builder.no_proxy();
        }
        // Building inside the runtime lets it install the TLS library's cryptography first.
        let http = net::block_on(async { builder.build() })?.map_err(|error| {
            Error::new(Kind::Network, "cloud.client", "cannot set up HTTPS")
                .caused_by(error)
                .remedy("check this machine's CA certificates (package ca-certificates)")
        })?;
        Ok(Client { http, settings, keys, clock })
    }

    /// The clock the client signs and waits with.
    pub fn clock(&self) -> &dyn Clock {
        self.clock.as_ref()
    }

    /// The settings the client was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Calls `action` with a JSON object as `input` and gives the `Response` object.
    ///
    /// # Errors
    /// [`Kind::Credentials`] for refused keys or a clock off by more than 300 s, [`Kind::Network`] when there is no
    /// readable answer, [`Kind::Cloud`] for everything else the API refuses; see [`api_code`].
    pub fn call(&self, action: &str, input: &Value, repeat: Repeat) -> Result<Value> {
        let mut pauses = PAUSES.iter();
        loop {
            let keys = (self.keys)()?;
            let error = match net::block_on(self.send(action, input, &keys))? {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let may = match repeat {
                Repeat::Freely => true,
                Repeat::IfRefused => !outcome_unknown(&error),
                Repeat::Never => false,
            };
            match pauses.next() {
                Some(pause) if may && error.retry() == Retry::Yes => self.clock.sleep(*pause)?,
                _ => return Err(error),
            }
        }
    }

    /// Asks the endpoint for nothing, unsigned, to see that it answers and what time it has; none when it does not
    /// say.
    pub fn skew(&self) -> Result<Option<Skew>> {
        let get = self.http.get(self.settings.endpoint.to_string());
        let answer = net::block_on(async { get.send().await })?
            .map_err(|error| self.unreachable("the endpoint check", error))?;
        Ok(self.skew_of(answer.headers()))
    }

    fn skew_of(&self, headers: &HeaderMap) -> Option<Skew> {
        // IMF-fixdate, the only form a server may send (RFC 9110 §5.6.7).
        let format = format_description!(
            "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
        );
        let date = PrimitiveDateTime::parse(headers.get(DATE)?.to_str().ok()?, format).ok()?;
        Some(Skew { seconds: self.clock.unix() - date.assume_utc().unix_timestamp() })
    }

    async fn send(&self, action: &str, input: &Value, keys: &Credentials) -> Result<Value> {
        let request = match self.settings.method {
            sign::Method::Tc3 => self.tc3(action, input, keys)?,
            sign::Method::HmacSha256 => self.v1(action, input, keys, true),
            sign::Method::HmacSha1 => self.v1(action, input, keys, false),
        };
        let answer = request.send().await.map_err(|error| self.unreachable(action, error))?;
        let (status, skew) = (answer.status(), self.skew_of(answer.headers()));
        if status.is_redirection() || status.is_client_error() {
            return Err(Error::new(
                Kind::Network,
                "cloud.endpoint",
                format!(
                    "{} is not the API: {action} was answered with HTTP {status}",
                    self.settings.endpoint
                ),
            )
            .remedy("check the endpoint; a signed request is never sent on to where a redirect points"));
        }
        if !status.is_success() {
            return Err(self.unanswered(action, format!("HTTP {status}")));
        }
        let bytes = net::body(answer, ANSWER_LIMIT)
            .await
            .map_err(|error| self.unanswered(action, error.to_string()))?;
        let mut answer: Value = serde_json::from_slice(&bytes)
            .map_err(|error| self.unanswered(action, format!("the answer is not JSON: {error}")))?;
        let response = answer["Response"].take();
        if !response.is_object() {
            return Err(self.unanswered(action, "the answer has no `Response`"));
        }
        if response["Error"].is_object() {
            return Err(self.refused(action, &scrubber(input, keys), &response, skew));
        }
        Ok(response)
    }

    fn tc3(&self, action: &str, input: &Value, keys: &Credentials) -> Result<reqwest::RequestBuilder> {
        let Settings { endpoint, service, version, region, .. } = &self.settings;
        let content_type = "application/json";
        let payload = input.to_string().into_bytes();
        let timestamp = self.clock.unix();
        let signed = sign::Tc3Request {
            method: "POST",
            query: "",
            headers: &[("content-type", content_type), ("host", &endpoint.authority)],
            payload: &payload,
            service,
            timestamp,
        };
        let authorization = signed.authorization(&keys.secret_id, keys.secret_key.expose())?;
        let mut request = self
            .http
            .post(endpoint.to_string())
            .header(AUTHORIZATION, authorization)
            .header(CONTENT_TYPE, content_type)
            .header("x-tc-action", action)
            .header("x-tc-version", version)
            .header("x-tc-timestamp", timestamp)
            .header("x-tc-language", "en-US")
            .header("x-tc-requestclient", concat!("haul/", env!("CARGO_PKG_VERSION")));
        if !region.is_empty() {
            request = request.header("x-tc-region", region);
        }
        if let Some(token) = &keys.token {
            request = request.header("x-tc-token", token.expose());
        }
        Ok(request.body(payload))
    }

    fn v1(&self, action: &str, input: &Value, keys: &Credentials, sha256: bool) -> reqwest::RequestBuilder {
        let Settings { endpoint, version, region, .. } = &self.settings;
        let mut fields = wire::flatten(input);
        let nonce = uuid::Uuid::new_v4().as_fields().0;
        let common = json!({
            "Action": action, "Version": version, "Region": region, "Timestamp": self.clock.unix(),
            "Nonce": nonce, "SecretId": keys.secret_id, "Language": "en-US",
            "SignatureMethod": if sha256 { "HmacSHA256" } else { "HmacSHA1" },
            "Token": keys.token.as_ref().map(|token| token.expose().as_str()),
        });
        fields.extend(wire::flatten(&common));
        let string = sign::v1_string("POST", &endpoint.authority, "/", &fields);
        let signature = sign::v1_signature(sha256, keys.secret_key.expose(), &string);
        fields.insert("Signature".into(), signature);
        let form = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(&fields).finish();
        self.http
            .post(endpoint.to_string())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form)
    }

    /// There was no answer: either the request never left, or nobody knows what became of it.
    fn unreachable(&self, action: &str, error: reqwest::Error) -> Error {
        if !error.is_connect() {
            return self
                .unanswered(action, "the connection broke or timed out")
                .caused_by(error.without_url());
        }
        Error::new(
            Kind::Network,
            "cloud.connect",
            format!("cannot reach {} for {action}", self.settings.endpoint),
        )
        .caused_by(error.without_url())
        .remedy("check the endpoint, the name server and the network")
        .retryable()
    }

    fn unanswered(&self, action: &str, why: impl Into<String>) -> Error {
        Error::new(
            Kind::Network,
            "cloud.unanswered",
            format!("{} gave no readable answer to {action}", self.settings.endpoint),
        )
        .because(why)
        .fact("action", action)
        .retryable()
    }

    fn refused(
        &self,
        action: &str,
        scrub: &dyn Fn(String) -> String,
        response: &Value,
        skew: Option<Skew>,
    ) -> Error {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let api = ApiError {
            code: text(&response["Error"]["Code"]),
            message: scrub(text(&response["Error"]["Message"])),
            request_id: text(&response["RequestId"]),
        };
        let code = api.code.clone();
        let what = format!("{action} was refused with {code}");
        let error = match code.as_str() {
            "AuthFailure.SignatureExpire" => {
                let error = Error::new(Kind::Credentials, "cloud.clock", what);
                let error = match skew {
                    Some(skew) => error
                        .because(format!("this machine's clock is {skew}; 300 s are allowed"))
                        .fact("skew_seconds", skew.seconds),
                    None => error.because("this machine's clock is off by more than 300 s"),
                };
                error.remedy("set the clock (`chronyc makestep`, `timedatectl set-ntp true`) and run again")
            }
            "AuthFailure.UnauthorizedOperation" | "UnauthorizedOperation" => {
                let service = &self.settings.service;
                Error::new(Kind::Cloud, "cloud.denied", what)
                    .remedy(format!("let the account's administrator grant {service}:{action} to this key"))
            }
            "AuthFailure.SignatureFailure" => Error::new(Kind::Credentials, "cloud.credentials", what)
                .remedy("check the secret key; behind a proxy, that it leaves host and content type alone"),
            code if is_of(code, &["AuthFailure"]) => Error::new(Kind::Credentials, "cloud.credentials", what)
                .remedy("check the secret id, its key, and that a temporary token has not run out"),
            _ => Error::new(Kind::Cloud, "cloud.refused", what),
        };
        let passing = is_of(&code, &["RequestLimitExceeded"]) || is_of(&code, SERVER_FAULTS);
        let error = error
            .fact("action", action)
            .fact("code", &code)
            .fact("request_id", &api.request_id)
            .caused_by(api);
        if passing { error.retryable() } else { error }
    }
}

/// A server may repeat what it was sent: keys, and links that carry a signature, go no further.
fn scrubber<'a>(input: &'a Value, keys: &'a Credentials) -> impl Fn(String) -> String + 'a {
    let token = keys.token.as_ref().map(|token| token.expose().as_str());
    let secrets = [Some(keys.secret_key.expose().as_str()), token, input["ImageUrl"].as_str()];
    move |message| {
        let secrets = secrets.into_iter().flatten().filter(|secret| !secret.is_empty());
        secrets.fold(message, |text, secret| text.replace(secret, "[secret]"))
    }
}

/// `{}` with the members that are not null: optional input is sent only when set.
pub(super) fn input(value: Value) -> Value {
    let Value::Object(members) = value else { return value };
    Value::Object(members.into_iter().filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_url_a_domain_or_the_public_cloud() {
        let of = |given| Endpoint::of("cvm", given).unwrap().to_string();
        assert_eq!(of(None), "https://cvm.tencentcloudapi.com");
        assert_eq!(of(Some("api3.example.cn")), "https://cvm.api3.example.cn");
        assert_eq!(of(Some("http://127.0.0.1:8080")), "http://127.0.0.1:8080");
        assert_eq!(of(Some("https://Host:443/")), "https://host");
        for bad in ["ftp://host", "https://host/path", "https://user:pass@host", "https://"] {
            assert_eq!(Endpoint::of("cvm", Some(bad)).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn a_code_is_of_its_category_and_of_no_longer_word() {
        assert!(is_of("RequestLimitExceeded.UinLimitExceeded", &["RequestLimitExceeded"]));
        assert!(is_of("InternalError", &["InternalError"]));
        assert!(!is_of("InternalErrorX", &["InternalError"]));
    }

    #[test]
    fn a_skew_says_which_clock_is_ahead() {
        assert_eq!(Skew { seconds: -400 }.to_string(), "400 s behind the server's clock");
        assert_eq!(Skew { seconds: 3 }.to_string(), "3 s ahead of the server's clock");
    }
}
