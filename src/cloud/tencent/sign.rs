//! The two request signatures of Tencent Cloud's API: TC3-HMAC-SHA256 and v1 (HmacSHA1, HmacSHA256). Pure.
//!
//! Source: "Signature v3" and "Signature v1" in the API 3.0 documentation of every product. Nothing here reads a
//! clock: the time of signing is a parameter.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::error::{Error, Kind, Result};

/// The name of the TC3 algorithm in the `Authorization` header.
pub const TC3: &str = "TC3-HMAC-SHA256";

/// How a request is signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// TC3-HMAC-SHA256, with a JSON body.
    #[default]
    Tc3,
    /// Signature v1 with HmacSHA256, with a form body: for old private editions.
    HmacSha256,
    /// Signature v1 with HmacSHA1, with a form body: for older ones.
    HmacSha1,
}

/// What of a request TC3 signs.
#[derive(Clone, Copy, Debug)]
pub struct Tc3Request<'a> {
    /// `GET` or `POST`.
    pub method: &'a str,
    /// The encoded query string as sent; empty for POST.
    pub query: &'a str,
    /// The signed headers, names in lower case and sorted; at least `content-type` and `host`.
    pub headers: &'a [(&'a str, &'a str)],
    /// The body as sent; empty for GET.
    pub payload: &'a [u8],
    /// The product, such as `cvm`.
    pub service: &'a str,
    /// Seconds since 1970 UTC, as in `X-TC-Timestamp`.
    pub timestamp: i64,
}

impl Tc3Request<'_> {
    /// The canonical request; its hash is what is signed.
    pub fn canonical(&self) -> String {
        let mut headers = String::new();
        for (name, value) in self.headers {
            // Writing to a String cannot fail.
            let _ = writeln!(headers, "{name}:{}", value.trim().to_lowercase());
        }
        let Tc3Request { method, query, .. } = self;
        let names = self.signed_headers();
        format!("{method}\n/\n{query}\n{headers}\n{names}\n{}", sha256_hex(self.payload))
    }

    /// The string that the derived key signs.
    pub fn string_to_sign(&self) -> Result<String> {
        let hash = sha256_hex(self.canonical().as_bytes());
        Ok(format!("{TC3}\n{}\n{}\n{hash}", self.timestamp, self.scope()?))
    }

    /// The signature, in lower-case hex.
    pub fn signature(&self, secret_key: &str) -> Result<String> {
        let key = signing_key(secret_key, &utc_date(self.timestamp)?, self.service);
        Ok(hex(&hmac_sha256(&key, self.string_to_sign()?.as_bytes())))
    }

    /// The `Authorization` header.
    pub fn authorization(&self, secret_id: &str, secret_key: &str) -> Result<String> {
        Ok(format!(
            "{TC3} Credential={secret_id}/{}, SignedHeaders={}, Signature={}",
            self.scope()?,
            self.signed_headers(),
            self.signature(secret_key)?
        ))
    }

    fn scope(&self) -> Result<String> {
        Ok(format!("{}/{}/tc3_request", utc_date(self.timestamp)?, self.service))
    }

    fn signed_headers(&self) -> String {
        self.headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";")
    }
}

/// The key TC3 derives for one service and UTC day (`YYYY-MM-DD`).
pub fn signing_key(secret_key: &str, date: &str, service: &str) -> Vec<u8> {
    let date_key = hmac_sha256(format!("TC3{secret_key}").as_bytes(), date.as_bytes());
    hmac_sha256(&hmac_sha256(&date_key, service.as_bytes()), b"tc3_request")
}

/// The UTC day of a Unix time, as `YYYY-MM-DD`.
pub fn utc_date(unix: i64) -> Result<String> {
    let date = OffsetDateTime::from_unix_timestamp(unix)
        .ok()
        .and_then(|at| at.format(format_description!("[year]-[month]-[day]")).ok());
    date.ok_or_else(|| {
        Error::new(Kind::Credentials, "cloud.clock", format!("the time {unix} s since 1970 is no date"))
            .remedy("set this machine's clock")
    })
}

/// The string signature v1 signs: parameters sorted by name, values not encoded, `Signature` left out.
///
/// The reference clients write `.` for `_` in names while signing.
pub fn v1_string(method: &str, host: &str, path: &str, parameters: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = parameters
        .iter()
        .filter(|(name, _)| *name != "Signature")
        .map(|(name, value)| format!("{}={value}", name.replace('_', ".")))
        .collect();
    format!("{method}{host}{path}?{}", pairs.join("&"))
}

/// The v1 signature of [`v1_string`], in base64, by HmacSHA256 or HmacSHA1.
pub fn v1_signature(sha256: bool, secret_key: &str, string: &str) -> String {
    let mac = if sha256 {
        hmac_sha256(secret_key.as_bytes(), string.as_bytes())
    } else {
        keyed::<Sha1, Hmac<Sha1>>(secret_key.as_bytes(), string.as_bytes())
    };
    BASE64_STANDARD.encode(mac)
}

/// SHA-256 in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    keyed::<Sha256, Hmac<Sha256>>(key, message)
}

/// HMAC with the key padded to the hash's block as RFC 2104 §2 says, because a key of that length cannot be refused.
fn keyed<D: Digest, M: Mac + KeyInit>(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = hmac::digest::Key::<M>::default();
    let short = if key.len() > block.len() { D::digest(key).to_vec() } else { key.to_vec() };
    for (to, from) in block.iter_mut().zip(short) {
        *to = from;
    }
    let mut mac = <M as Mac>::new(&block);
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn vectors(kind: &str) -> (Value, Vec<Value>) {
        let all: Value =
            serde_json::from_str(include_str!("../../../tests/data/signing-vectors.json")).unwrap();
        let chosen: Vec<Value> =
            all["vectors"].as_array().unwrap().iter().filter(|v| v["kind"] == kind).cloned().collect();
        (all, chosen)
    }

    #[test]
    fn tc3_matches_every_published_vector() {
        let (all, vectors) = vectors("tc3");
        assert_eq!(vectors.len(), 7);
        let key = all["secret_key"].as_str().unwrap();
        for vector in &vectors {
            let text = |name: &str| vector[name].as_str().unwrap();
            let request = Tc3Request {
                method: text("method"),
                query: text("query"),
                headers: &[("content-type", text("content_type")), ("host", text("host"))],
                payload: text("payload").as_bytes(),
                service: text("service"),
                timestamp: vector["timestamp"].as_i64().unwrap(),
            };
            assert_eq!(request.canonical(), text("canonical_request"));
            assert_eq!(sha256_hex(request.canonical().as_bytes()), text("canonical_hash"));
            assert_eq!(request.string_to_sign().unwrap(), text("string_to_sign"));
            assert_eq!(hex(&signing_key(key, text("date"), text("service"))), text("signing_key_hex"));
            assert_eq!(request.signature(key).unwrap(), text("signature"));
            let id = all["secret_id"].as_str().unwrap();
            assert_eq!(request.authorization(id, key).unwrap(), text("authorization"));
        }
    }

    #[test]
    fn v1_matches_every_published_vector() {
        let (all, vectors) = vectors("v1");
        assert_eq!(vectors.len(), 8);
        let key = all["secret_key"].as_str().unwrap();
        for vector in &vectors {
            let text = |name: &str| vector[name].as_str().unwrap();
            let mut parameters: BTreeMap<String, String> =
                serde_json::from_value(vector["params"].clone()).unwrap();
            parameters.insert("Signature".into(), "must not be signed".into());
            let string = v1_string(text("method"), text("host"), text("path"), &parameters);
            assert_eq!(string, text("string_to_sign"));
            assert_eq!(v1_signature(text("algorithm") == "HmacSHA256", key, &string), text("signature"));
        }
    }

    #[test]
    fn keys_longer_than_a_block_are_hashed_first() {
        // RFC 4231, test case 6.
        let mac = hmac_sha256(&[0xaa; 131], b"Test Using Larger Than Block-Size Key - Hash Key First");
        assert_eq!(hex(&mac), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    }

    #[test]
    fn a_clock_beyond_the_calendar_is_an_error() {
        assert_eq!(utc_date(i64::MAX).unwrap_err().kind(), Kind::Credentials);
        assert_eq!(utc_date(1_735_689_599).unwrap(), "2024-12-31");
    }
}
