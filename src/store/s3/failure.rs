//! What went wrong, in the store's terms and in ours: kind, reason, remedy, and whether another try can help.

use std::error::Error as StdError;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::http::{Headers, Response};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use crate::error::{Error, Kind};
use crate::store::errors;

/// A failed request, with what its answer said.
pub struct Failure {
    /// The store's error code, such as `NoSuchKey`.
    pub code: Option<String>,
    /// The HTTP status; `None` when there was no answer at all.
    pub status: Option<u16>,
    message: Option<String>,
    request: Option<String>,
    /// Seconds the store's clock is ahead of ours.
    ahead: Option<i64>,
    source: Box<dyn StdError + Send + Sync>,
}

impl<E> From<SdkError<E, Response>> for Failure
where
    E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
{
    fn from(error: SdkError<E, Response>) -> Self {
        let answer = error.raw_response();
        let headers = answer.map(Response::headers);
        Failure {
            code: error.code().map(str::to_owned),
            status: answer.map(|answer| answer.status().as_u16()),
            message: error.message().map(str::to_owned),
            request: headers.and_then(request_id),
            ahead: headers.and_then(clock_ahead),
            source: match error {
                SdkError::ServiceError(service) => Box::new(service.into_err()),
                other => Box::new(other),
            },
        }
    }
}

/// The store's name for a request.
pub fn request_id(headers: &Headers) -> Option<String> {
    ["x-cos-request-id", "x-amz-request-id"].iter().find_map(|name| headers.get(name)).map(str::to_owned)
}

fn clock_ahead(headers: &Headers) -> Option<i64> {
    let date = headers.get("date")?.replace(" GMT", " +0000");
    let theirs = OffsetDateTime::parse(&date, &Rfc2822).ok()?;
    Some((theirs - OffsetDateTime::now_utc()).whole_seconds())
}

impl Failure {
    /// No answer within the time allowed.
    pub fn timeout(what: &str) -> Self {
        Failure {
            code: None,
            status: None,
            message: None,
            request: None,
            ahead: None,
            source: format!("no {what} within the time allowed").into(),
        }
    }

    /// An answer that is not what was asked for, such as a short one.
    pub fn odd(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Failure { source: source.into(), ..Failure::timeout("answer") }
    }

    /// The failure as haul's error: `what` names the operation and the object, `name` is the object.
    pub fn error(self, what: &str, name: &str) -> Error {
        let passing = self.is_passing();
        let error = self.explain(what, name).fact("object", name);
        let error = match &self.code {
            Some(code) => error.fact("code", code),
            None => error,
        };
        let error = match &self.request {
            Some(request) => error.fact("request", request),
            None => error,
        };
        if passing { error.retryable() } else { error }
    }

    /// Whether the same request may succeed later.
    fn is_passing(&self) -> bool {
        const CODES: [&str; 9] = [
            "BadDigest",
            "IncompleteBody",
            "RequestTimeout",
            "UserNetworkTooSlow",
            "SlowDown",
            "InternalError",
            "ServiceUnavailable",
            "Throttling",
            "OperationAborted",
        ];
        match (&self.code, self.status) {
            (Some(code), _) if CODES.contains(&code.as_str()) => true,
            (_, Some(501)) => false,
            (_, Some(status)) => {
                status >= 500 || status == 429 || status == 408 || (200..300).contains(&status)
            }
            (_, None) => !self.is_certificate(),
        }
    }

    /// Whether the server's certificate was refused: no later try is better.
    fn is_certificate(&self) -> bool {
        let mut source: Option<&(dyn StdError + 'static)> = Some(self.source.as_ref());
        while let Some(error) = source {
            // What wraps an error in std::io::Error hides it from `source`.
            let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            let found =
                inner.and_then(|e| e.downcast_ref()).or_else(|| error.downcast_ref::<rustls::Error>());
            if let Some(rustls::Error::InvalidCertificate(_)) = found {
                return true;
            }
            source = error.source();
        }
        false
    }

    fn explain(&self, what: &str, name: &str) -> Error {
        let why = || match (&self.code, &self.message) {
            (Some(code), Some(message)) => format!("the store says {code}: {message}"),
            (Some(code), None) => format!("the store says {code}"),
            (None, _) => match self.status {
                Some(status) => {
                    format!("the store answered with HTTP status {status}: {}", chain(&*self.source))
                }
                None => chain(&*self.source),
            },
        };
        let error = |kind, id| Error::new(kind, id, what).because(why());
        match (self.code.as_deref().unwrap_or(""), self.status) {
            ("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "NotSignedUp" | "AuthFailure", _) => {
                error(Kind::Credentials, "store.credentials")
                    .remedy("check the key id, the secret key and that both belong to one account")
            }
            ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => {
                error(Kind::Credentials, "store.token")
                    .remedy("get new temporary credentials, then run the same command with --resume")
            }
            ("RequestTimeTooSkewed" | "RequestExpired", _) => self.skewed(what),
            ("PathStyleDomainForbidden", _) => {
                error(Kind::Usage, "store.path-style").remedy("leave out --path-style: this store wants the bucket in the host name")
            }
            ("AccessDenied" | "Forbidden", _) | ("", Some(401 | 403)) => error(Kind::Credentials, "store.denied")
                .remedy("grant the key reading, writing and multipart uploads on this bucket; an overdue account is refused too"),
            ("NoSuchBucket", _) => error(Kind::Network, "store.no-bucket")
                .remedy("create the bucket in this region, or correct its name (on COS it ends in the account's APPID)"),
            ("NoSuchUpload", _) => errors::no_upload(name, ""),
            ("NoSuchKey", _) => errors::no_object(name),
            (_, Some(412)) => errors::changed(name),
            (_, None) => error(Kind::Network, "store.unreachable"),
            _ if self.is_passing() => error(Kind::Network, "store.busy"),
            _ => error(Kind::Network, "store.refused"),
        }
    }

    fn skewed(&self, what: &str) -> Error {
        let by = match self.ahead {
            Some(ahead) => {
                let side = if ahead >= 0 { "behind" } else { "ahead of" };
                format!("this machine's clock is {} s {side} the store's", ahead.unsigned_abs())
            }
            None => "this machine's clock is more than 15 minutes off the store's".to_owned(),
        };
        let error = Error::new(Kind::Credentials, "store.clock", what)
            .because(by)
            .remedy("set the clock (chronyc makestep, or timedatectl set-ntp true) and run again");
        match self.ahead {
            Some(ahead) => error.fact("clock_behind_seconds", ahead),
            None => error,
        }
    }
}

/// An error and every source beneath it, without repeating one that its parent's text already ends in.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}
