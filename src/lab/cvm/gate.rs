//! From an HTTP request to a verified call: both signatures, the clock, replays, in the real API's order of checks.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::{HeaderMap, Method, Uri};
use serde_json::{Value, json};

use super::schema;
use crate::cloud::Credentials;
use crate::cloud::tencent::{Edition, cvm, sign, wire};

/// How far a request's time may be from the server's, in seconds.
const WINDOW: i64 = cvm::MAX_SKEW.cast_signed();
const SERVICE: &str = "cvm";
const FORM: &str = "application/x-www-form-urlencoded";

/// An error as the API answers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The documented code.
    pub code: &'static str,
    /// Text for people.
    pub message: String,
}

impl Fault {
    /// An error with a documented code.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Fault { code, message: message.into() }
    }

    /// The body of the answer.
    pub fn response(&self) -> Value {
        json!({"Error": {"Code": self.code, "Message": self.message}})
    }
}

/// A request whose sender is who it says.
#[derive(Debug)]
pub struct Call {
    /// The action, one that the lab has.
    pub action: String,
    /// Its parameters, checked against the action's schema.
    pub parameters: BTreeMap<&'static str, Value>,
}

/// The gate of one server.
pub struct Gate {
    /// Whose requests pass.
    pub keys: Vec<Credentials>,
    /// Which shapes are spoken.
    pub edition: Edition,
    /// The one region there is.
    pub region: String,
    /// Nonces of v1 requests inside the window, with their times: a request counts once.
    pub nonces: BTreeSet<(i64, String)>,
}

/// A request as it came.
pub struct Incoming<'a> {
    /// GET or POST.
    pub method: &'a Method,
    /// Path and query.
    pub uri: &'a Uri,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// The body, bounded by the server.
    pub body: &'a [u8],
    /// The server's time, in seconds since 1970.
    pub now: i64,
}

impl Incoming<'_> {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    fn fields(&self) -> BTreeMap<String, String> {
        let text = if self.method == Method::GET {
            self.uri.query().unwrap_or_default().as_bytes()
        } else {
            self.body
        };
        url::form_urlencoded::parse(text).into_owned().collect()
    }
}

/// What a request claims before anything is verified.
struct Claims {
    action: String,
    version: String,
    region: String,
    secret_id: String,
    timestamp: i64,
    token: String,
    form: bool,
    parameters: Value,
}

impl Gate {
    /// Verifies a request: action, version, key, time, signature, token, region, then its parameters.
    pub fn admit(&mut self, incoming: &Incoming<'_>) -> Result<Call, Fault> {
        let tc3 =
            incoming.headers.contains_key("authorization") || incoming.headers.contains_key("x-tc-action");
        let claims = if tc3 { claims_of_headers(incoming)? } else { claims_of_fields(incoming)? };
        if !schema::knows(&claims.action) {
            return Err(Fault::new(
                "InvalidAction",
                format!("The action `{}` does not exist.", claims.action),
            ));
        }
        if claims.version != cvm::VERSION {
            return Err(Fault::new(
                "NoSuchVersion",
                format!("The version `{}` does not exist.", claims.version),
            ));
        }
        let key = self.keys.iter().find(|key| key.secret_id == claims.secret_id).ok_or_else(|| {
            Fault::new(
                "AuthFailure.SecretIdNotFound",
                "The SecretId is not found, please ensure it is correct.",
            )
        })?;
        if (incoming.now - claims.timestamp).saturating_abs() > WINDOW {
            let why = "The difference between the request time and the server time is more than 5 minutes.";
            return Err(Fault::new("AuthFailure.SignatureExpire", why));
        }
        let genuine = if tc3 {
            tc3_matches(incoming, &claims, key.secret_key.expose())
        } else {
            v1_matches(incoming, key.secret_key.expose())
        };
        if genuine != Some(true) {
            return Err(Fault::new(
                "AuthFailure.SignatureFailure",
                "The provided credentials could not be validated.",
            ));
        }
        if key.token.as_ref().map_or("", |token| token.expose()) != claims.token {
            return Err(Fault::new("AuthFailure.TokenFailure", "The token is not valid."));
        }
        if !tc3 {
            self.count_once(incoming, &claims)?;
        }
        if claims.region != self.region {
            return Err(Fault::new(
                "UnsupportedRegion",
                format!("The region `{}` is not supported.", claims.region),
            ));
        }
        let parameters = schema::check(&claims.action, self.edition, &claims.parameters, claims.form)?;
        Ok(Call { action: claims.action, parameters })
    }

    /// Refuses a v1 request that came before. TC3 has no nonce: equal calls within a second are equal requests.
    fn count_once(&mut self, incoming: &Incoming<'_>, claims: &Claims) -> Result<(), Fault> {
        self.nonces.retain(|(at, _)| (incoming.now - at).saturating_abs() <= WINDOW);
        let nonce = incoming.fields().remove("Nonce").unwrap_or_default();
        if self.nonces.insert((claims.timestamp, format!("{}:{nonce}", claims.secret_id))) {
            return Ok(());
        }
        Err(Fault::new(
            "AuthFailure.SignatureFailure",
            "The nonce was used before: this request is a replay.",
        ))
    }
}

fn claims_of_headers(incoming: &Incoming<'_>) -> Result<Claims, Fault> {
    let content_type = incoming.header("content-type");
    let get = incoming.method == Method::GET;
    let parameters = if get {
        wire::unflatten(&incoming.fields())
    } else if content_type.split(';').next() == Some("application/json") {
        let wrong = |_| Fault::new("InvalidParameter", "The request body is not JSON.");
        serde_json::from_slice(incoming.body).map_err(wrong)?
    } else {
        return Err(Fault::new("UnsupportedProtocol", "Use POST with application/json, or GET."));
    };
    let missing = || Fault::new("AuthFailure.InvalidAuthorization", "The Authorization header is not valid.");
    let credential = authorization_part(incoming, "Credential").ok_or_else(missing)?;
    Ok(Claims {
        action: incoming.header("x-tc-action").to_owned(),
        version: incoming.header("x-tc-version").to_owned(),
        region: incoming.header("x-tc-region").to_owned(),
        secret_id: credential.split('/').next().unwrap_or_default().to_owned(),
        timestamp: incoming.header("x-tc-timestamp").parse().map_err(|_| missing())?,
        token: incoming.header("x-tc-token").to_owned(),
        form: get,
        parameters,
    })
}

fn claims_of_fields(incoming: &Incoming<'_>) -> Result<Claims, Fault> {
    if incoming.method == Method::POST && !incoming.header("content-type").starts_with(FORM) {
        return Err(Fault::new("UnsupportedProtocol", "Use POST with a form, or GET."));
    }
    let fields = incoming.fields();
    let get = |name: &str| fields.get(name).cloned().unwrap_or_default();
    let missing = |name| Fault::new("MissingParameter", format!("The request is missing `{name}`."));
    if let Some(name) = ["SecretId", "Nonce", "Signature"].into_iter().find(|name| get(name).is_empty()) {
        return Err(missing(name));
    }
    Ok(Claims {
        action: get("Action"),
        version: get("Version"),
        region: get("Region"),
        secret_id: get("SecretId"),
        timestamp: get("Timestamp").parse().map_err(|_| missing("Timestamp"))?,
        token: get("Token"),
        form: true,
        parameters: wire::unflatten(&fields),
    })
}

/// `Name=value` in the Authorization header.
fn authorization_part<'a>(incoming: &'a Incoming<'_>, name: &str) -> Option<&'a str> {
    let parts = incoming.header("authorization").strip_prefix(sign::TC3)?;
    parts.split(',').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
}

/// Whether the TC3 signature is the key's; none when the header is malformed.
fn tc3_matches(incoming: &Incoming<'_>, claims: &Claims, secret_key: &str) -> Option<bool> {
    let credential = authorization_part(incoming, "Credential")?;
    let names: Vec<&str> = authorization_part(incoming, "SignedHeaders")?.split(';').collect();
    let scope = format!("/{}/{SERVICE}/tc3_request", sign::utc_date(claims.timestamp).ok()?);
    if !credential.ends_with(&scope) || !["content-type", "host"].iter().all(|name| names.contains(name)) {
        return Some(false);
    }
    let headers: Vec<(&str, &str)> = names.iter().map(|name| (*name, incoming.header(name))).collect();
    let unsigned = incoming.header("x-tc-content-sha256") == "UNSIGNED-PAYLOAD";
    let get = incoming.method == Method::GET;
    let request = sign::Tc3Request {
        method: incoming.method.as_str(),
        query: if get { incoming.uri.query().unwrap_or_default() } else { "" },
        headers: &headers,
        payload: if unsigned { b"UNSIGNED-PAYLOAD" } else { incoming.body },
        service: SERVICE,
        timestamp: claims.timestamp,
    };
    Some(request.signature(secret_key).ok()? == authorization_part(incoming, "Signature")?)
}

fn v1_matches(incoming: &Incoming<'_>, secret_key: &str) -> Option<bool> {
    let fields = incoming.fields();
    let sha256 = match fields.get("SignatureMethod").map(String::as_str) {
        None | Some("HmacSHA1") => false,
        Some("HmacSHA256") => true,
        Some(_) => return Some(false),
    };
    let host = incoming.header("host");
    let string = sign::v1_string(incoming.method.as_str(), host, incoming.uri.path(), &fields);
    Some(sign::v1_signature(sha256, secret_key, &string) == *fields.get("Signature")?)
}
