//! COS's own signature (`q-sign-algorithm=sha1`), in a header or in a link; api reference: "Request signature" of COS.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha1::{Digest, Sha1};

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Names (any case) and values, decoded.
pub type Pairs = Vec<(String, String)>;

/// What a signature covers.
pub struct Signed<'a> {
    pub method: &'a str,
    /// The path, decoded.
    pub path: &'a str,
    /// All query parameters, decoded.
    pub query: &'a Pairs,
    pub headers: &'a Pairs,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hmac(key: &str, text: &str) -> String {
    // HMAC takes a key of any length.
    let Ok(mut mac) = Hmac::<Sha1>::new_from_slice(key.as_bytes()) else { return String::new() };
    mac.update(text.as_bytes());
    hex(&mac.finalize().into_bytes())
}

fn escape(text: &str) -> String {
    utf8_percent_encode(text, UNRESERVED).to_string()
}

/// The pairs named in `list` (`a;b`), as the signature joins them.
fn joined(pairs: &Pairs, list: &str) -> String {
    let wanted: Vec<String> =
        list.split(';').filter(|name| !name.is_empty()).map(str::to_lowercase).collect();
    let named =
        pairs.iter().map(|(name, value)| (escape(&name.to_lowercase()).to_lowercase(), escape(value)));
    let named: BTreeMap<_, _> = named.filter(|(name, _)| wanted.contains(name)).collect();
    named.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

impl Signed<'_> {
    /// The signature over this request with the header and parameter lists and the time span of `q`.
    pub fn signature(&self, secret: &str, q: &BTreeMap<String, String>) -> String {
        let part = |name: &str| q.get(name).map_or("", String::as_str);
        let text = format!(
            "{}\n{}\n{}\n{}\n",
            self.method.to_lowercase(),
            self.path,
            joined(self.query, part("q-url-param-list")),
            joined(self.headers, part("q-header-list")),
        );
        let to_sign = format!("sha1\n{}\n{}\n", part("q-sign-time"), hex(&Sha1::digest(text)));
        hmac(&hmac(secret, part("q-key-time")), &to_sign)
    }
}

/// The `q-…` parameters of an Authorization header.
pub fn of_header(value: &str) -> BTreeMap<String, String> {
    let pairs = value.split('&').filter_map(|pair| pair.trim().split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Whether `now` (Unix seconds) lies in the span `start;end`.
pub fn is_current(span: &str, now: i64) -> bool {
    let Some((start, end)) = span.split_once(';') else { return false };
    matches!((start.parse::<i64>(), end.parse::<i64>()), (Ok(start), Ok(end)) if start - 900 <= now && now <= end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "BQYIM75p8x0iWVFSIgqEKwFprpRSVHlz";

    fn pairs(list: &[(&str, &str)]) -> Pairs {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn sign(
        method: &str,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
        time: &str,
    ) -> String {
        let names = |list: &[(&str, &str)]| {
            let mut names: Vec<String> = list.iter().map(|(name, _)| name.to_lowercase()).collect();
            names.sort();
            names.join(";")
        };
        let q = [
            ("q-sign-time", time.to_owned()),
            ("q-key-time", time.to_owned()),
            ("q-url-param-list", names(query)),
            ("q-header-list", names(headers)),
        ];
        let q = q.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Signed { method, path, query: &pairs(query), headers: &pairs(headers) }.signature(SECRET, &q)
    }

    #[test]
    fn the_published_vectors_hold() {
        let host = ("Host", "examplebucket-1250000000.cos.ap-beijing.myqcloud.com");
        assert_eq!(
            sign(
                "PUT",
                "/exampleobject(腾讯云)",
                &[],
                &[
                    ("Date", "Thu, 16 May 2019 06:45:51 GMT"),
                    host,
                    ("Content-Type", "text/plain"),
                    ("Content-Length", "13"),
                    ("Content-MD5", "mQ/fVh815F3k6TAUm8m0eg=="),
                    ("x-cos-acl", "private"),
                    ("x-cos-grant-read", "uin=\"100000000011\""),
                ],
                "1557989151;1557996351"
            ),
            "3b8851a11a569213c17ba8fa7dcf2abec6935172"
        );
        assert_eq!(
            sign(
                "GET",
                "/exampleobject(腾讯云)",
                &[
                    ("response-content-type", "application/octet-stream"),
                    ("response-cache-control", "max-age=600")
                ],
                &[("Date", "Thu, 16 May 2019 06:55:53 GMT"), host],
                "1557989753;1557996953"
            ),
            "01681b8c9d798a678e43b685a9f1bba0f6c0e012"
        );
        assert_eq!(
            sign("GET", "/img.qcow2", &[], &[host], "1557989151;1557996351"),
            "13fa0104d9e524df3cc688d62b17990b5e665477"
        );
    }

    #[test]
    fn a_link_is_good_within_its_span() {
        assert!(is_current("100;200", 150));
        assert!(!is_current("100;200", 201) && !is_current("2000;3000", 1000) && !is_current("x", 1));
    }
}
