//! What a request passes before the S3 operations: the log, COS's own rules, ordered faults, native signatures.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use s3s::service::S3Service;
use time::OffsetDateTime;
use time::macros::format_description;

use super::fault::Effect;
use super::native::{self, Signed};
use super::ops::{CRC64, refusal};
use super::{Counts, NativeSigned, Seen, Shared};
use crate::unit::to_usize;

type Answer = Response<s3s::Body>;
type Query = Vec<(String, String)>;

const DATE: &[time::format_description::FormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
const AMZ_DATE: &[time::format_description::FormatItem<'_>] =
    format_description!("[year][month][day]T[hour][minute][second]Z");

/// Where a body's bytes are counted.
enum Count {
    Received(Arc<Counts>),
    Sent(Arc<Counts>),
    Nothing,
}

impl Count {
    fn add(&self, bytes: u64) {
        match self {
            Count::Received(counts) => counts.received.fetch_add(bytes, Ordering::Relaxed),
            Count::Sent(counts) => counts.sent.fetch_add(bytes, Ordering::Relaxed),
            Count::Nothing => 0,
        };
    }
}

/// A body that counts what passes, and breaks off where told.
struct Counted<B> {
    inner: B,
    count: Count,
    left: u64,
}

impl<B> Counted<B> {
    fn new(inner: B, count: Count, cut_after: Option<u64>) -> Self {
        Counted { inner, count, left: cut_after.unwrap_or(u64::MAX) }
    }
}

impl<B> HttpBody for Counted<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
        }
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            let mut frame = frame.map_err(io::Error::other)?;
            if let Some(data) = frame.data_mut() {
                data.truncate(to_usize(self.left));
                let len = data.len() as u64;
                self.left -= len;
                self.count.add(len);
            }
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// What a request is about.
struct Place {
    bucket: String,
    key: String,
    virtual_host: bool,
}

fn query_of(request: &Request<Incoming>) -> Query {
    let query = request.uri().query().unwrap_or_default();
    url::form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn header<'a>(request: &'a Request<Incoming>, name: &str) -> Option<&'a str> {
    request.headers().get(name).and_then(|value| value.to_str().ok())
}

fn find<'a>(query: &'a Query, name: &str) -> Option<&'a str> {
    query.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// The S3 operation a request asks for.
fn operation(request: &Request<Incoming>, place: &Place, query: &Query) -> &'static str {
    let has = |name: &str| find(query, name).is_some();
    let method = request.method();
    if place.bucket.is_empty() {
        return "ListBuckets";
    }
    if place.key.is_empty() {
        return match *method {
            Method::GET if has("uploads") => "ListMultipartUploads",
            Method::GET => "ListObjects",
            Method::POST if has("delete") => "DeleteObjects",
            Method::PUT => "CreateBucket",
            Method::HEAD => "HeadBucket",
            _ => "Other",
        };
    }
    match *method {
        Method::PUT if has("partNumber") && request.headers().contains_key("x-amz-copy-source") => {
            "UploadPartCopy"
        }
        Method::PUT if has("partNumber") => "UploadPart",
        Method::PUT if has("acl") => "PutObjectAcl",
        Method::PUT => "PutObject",
        Method::POST if has("uploads") => "CreateMultipartUpload",
        Method::POST if has("uploadId") => "CompleteMultipartUpload",
        Method::DELETE if has("uploadId") => "AbortMultipartUpload",
        Method::DELETE => "DeleteObject",
        Method::GET if has("uploadId") => "ListParts",
        Method::GET => "GetObject",
        Method::HEAD => "HeadObject",
        _ => "Other",
    }
}

/// The access key id a request names, whatever it is signed with.
fn access_key(request: &Request<Incoming>, query: &Query) -> Option<String> {
    let credential = match header(request, "authorization") {
        Some(value) => value.split_once("Credential=").map(|(_, rest)| rest),
        None => find(query, "X-Amz-Credential"),
    };
    credential.and_then(|credential| credential.split('/').next()).map(str::to_owned)
}

async fn drain(body: impl HttpBody<Data = Bytes, Error = io::Error> + Unpin) {
    let mut body = body;
    while let Some(Ok(_)) = body.frame().await {}
}

/// The requests of one server on their way to the S3 service.
pub struct Front {
    pub service: S3Service,
    pub shared: Arc<Shared>,
}

impl Front {
    /// Answers a request; an error closes the connection without an answer.
    pub async fn handle(self: Arc<Self>, request: Request<Incoming>) -> io::Result<Answer> {
        let query = query_of(&request);
        let place = self.place(&request);
        let operation = operation(&request, &place, &query);
        let seen = Seen {
            operation,
            bucket: place.bucket.clone(),
            key: place.key.clone(),
            part: find(&query, "partNumber").and_then(|n| n.parse().ok()),
            range: header(&request, "range").map(str::to_owned),
            counts: Arc::default(),
        };
        let number = self.shared.log(&seen);

        let expects = request.headers().contains_key("expect");
        let result = if request.uri().path().starts_with("/-lab/") {
            Ok(self.control(request).await)
        } else {
            self.serve(request, &place, &query, &seen).await
        };
        let mut answer = named(result?, &format!("/{}/{}", place.bucket, place.key), number).await;
        seen.counts.status.store(u64::from(answer.status().as_u16()), Ordering::Relaxed);
        self.stamp(&mut answer, number);
        if expects && seen.counts.received.load(Ordering::Relaxed) == 0 && !answer.status().is_success() {
            // Refused before the body was asked for: the client may be sending it all the same (RFC 9110, 10.1.1).
            answer.headers_mut().insert("connection", HeaderValue::from_static("close"));
        }
        Ok(answer.map(|body| {
            s3s::Body::http_body_unsync(Counted::new(body, Count::Sent(seen.counts.clone()), None))
        }))
    }

    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc() + time::Duration::seconds(self.shared.clock.load(Ordering::Relaxed))
    }

    /// The request's name and the server's time, as COS puts them on every answer.
    fn stamp(&self, answer: &mut Answer, number: u64) {
        let id = format!("lab{number:016x}");
        let date = self.now().format(DATE).unwrap_or_default();
        for (name, value) in [("x-cos-request-id", &id), ("x-amz-request-id", &id), ("date", &date)] {
            if let Ok(value) = HeaderValue::from_str(value) {
                answer.headers_mut().insert(HeaderName::from_static(name), value);
            }
        }
    }

    fn place(&self, request: &Request<Incoming>) -> Place {
        let path = decode(request.uri().path());
        let path = path.strip_prefix('/').unwrap_or(&path);
        let host = header(request, "host").unwrap_or_default();
        match self.shared.bucket_in_host(host) {
            Some(bucket) => Place { bucket, key: path.to_owned(), virtual_host: true },
            None => {
                let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
                Place { bucket: bucket.to_owned(), key: key.to_owned(), virtual_host: false }
            }
        }
    }

    /// What COS refuses that S3 would take.
    fn refused(
        &self,
        request: &Request<Incoming>,
        place: &Place,
        operation: &str,
        query: &Query,
    ) -> Option<Answer> {
        let config = &self.shared.config;
        if config.refuse_path_style && !place.virtual_host && !place.bucket.is_empty() {
            return Some(refusal(
                403,
                "PathStyleDomainForbidden",
                "The path style is forbidden for this bucket.",
            ));
        }
        let chunked = header(request, "content-encoding").is_some_and(|value| value.contains("aws-chunked"));
        let streaming =
            header(request, "x-amz-content-sha256").is_some_and(|value| value.starts_with("STREAMING-"));
        if !config.accept_chunked && (chunked || streaming || request.headers().contains_key("x-amz-trailer"))
        {
            return Some(refusal(400, "InvalidArgument", "aws-chunked bodies are not supported."));
        }
        if operation == "DeleteObjects" && !request.headers().contains_key("content-md5") {
            return Some(refusal(
                400,
                "InvalidRequest",
                "Missing required header for this request: Content-MD5",
            ));
        }
        let date = header(request, "x-amz-date").or(find(query, "X-Amz-Date"));
        let date = date.and_then(|date| time::PrimitiveDateTime::parse(date, AMZ_DATE).ok());
        // A link may be used long after it was made: its own expiry is looked at elsewhere.
        let link = find(query, "X-Amz-Signature").is_some();
        if date
            .is_some_and(|date| !link && (self.now() - date.assume_utc()).abs() > time::Duration::minutes(15))
        {
            return Some(refusal(
                403,
                "RequestTimeTooSkewed",
                "The request time and the server's differ too much.",
            ));
        }
        self.refused_token(request, query)
    }

    fn refused_token(&self, request: &Request<Incoming>, query: &Query) -> Option<Answer> {
        let id = access_key(request, query)?;
        let keys = self.shared.keys();
        let key = keys.iter().find(|key| key.id == id)?;
        let token = header(request, "x-amz-security-token").or(find(query, "X-Amz-Security-Token"));
        if key.expired {
            return Some(refusal(400, "ExpiredToken", "The provided token has expired."));
        }
        if key.token.as_deref() != token {
            return Some(refusal(403, "InvalidAccessKeyId", "The access key does not fit the token."));
        }
        None
    }

    /// Checks a native signature; a good one is taken off the request and noted on it.
    fn native(&self, request: &mut Request<Incoming>, query: &Query) -> Option<Answer> {
        let mut q: BTreeMap<String, String> = BTreeMap::new();
        match header(request, "authorization") {
            Some(value) if value.contains("q-sign-algorithm=") => q = native::of_header(value),
            Some(_) => return None,
            None => q.extend(query.iter().filter(|(name, _)| name.starts_with("q-")).cloned()),
        }
        q.get("q-sign-algorithm")?;
        let part = |name: &str| q.get(name).map_or("", String::as_str);
        let keys = self.shared.keys();
        let Some(key) = keys.iter().find(|key| key.id == part("q-ak")) else {
            return Some(refusal(403, "InvalidAccessKeyId", "The access key id does not exist."));
        };
        let headers = request.headers().iter();
        let headers =
            headers.map(|(n, v)| (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()));
        let mut headers: native::Pairs = headers.collect();
        let path = decode(request.uri().path());
        let fits = |headers: &native::Pairs| {
            let signed = Signed { method: request.method().as_str(), path: &path, query, headers };
            signed.signature(&key.secret, &q) == part("q-signature")
        };
        let fitting = fits(&headers) || {
            // COS has no port in its names, and Tencent's SDKs sign none.
            for (_, value) in headers.iter_mut().filter(|(name, _)| name == "host") {
                *value = value.rsplit_once(':').map_or(value.clone(), |(name, _)| name.to_owned());
            }
            fits(&headers)
        };
        if !fitting {
            return Some(refusal(403, "SignatureDoesNotMatch", "The signature does not match."));
        }
        if !native::is_current(part("q-sign-time"), self.now().unix_timestamp()) {
            return Some(refusal(403, "AccessDenied", "Request has expired"));
        }
        request.headers_mut().remove("authorization");
        let rest = query.iter().filter(|(name, _)| !name.starts_with("q-") && name != "x-cos-security-token");
        let rest = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(rest).finish();
        if let Ok(uri) = format!("{}?{rest}", request.uri().path()).parse() {
            *request.uri_mut() = uri;
        }
        request.extensions_mut().insert(NativeSigned);
        None
    }

    async fn serve(
        &self,
        mut request: Request<Incoming>,
        place: &Place,
        query: &Query,
        seen: &Seen,
    ) -> io::Result<Answer> {
        let refused =
            self.refused(&request, place, seen.operation, query).or_else(|| self.native(&mut request, query));
        let effect = match &refused {
            Some(_) => None,
            None => self.shared.strike(seen.operation),
        };
        let refused = match &effect {
            Some(Effect::Refuse { status, code }) => Some(refusal(*status, code, "As ordered.")),
            Some(Effect::Trickle { blanks, every_millis, error: Some(code) }) => {
                Some(trickle(refusal(200, code, "As ordered."), *blanks, *every_millis))
            }
            _ => refused,
        };
        let cut = match effect {
            Some(Effect::CutRequest { after }) => Some(after),
            _ => None,
        };
        let request = request.map(|body| Counted::new(body, Count::Received(seen.counts.clone()), cut));
        if let Some(answer) = refused {
            drain(request.into_body()).await;
            return Ok(answer);
        }
        if let Some(Effect::Delay { millis }) = effect {
            tokio::time::sleep(Duration::from_millis(millis)).await;
        }
        let answer = self.service.call(request.map(s3s::Body::http_body_unsync)).await;
        let mut answer = answer.map_err(|error| io::Error::other(format!("{error:?}")))?;
        match effect {
            Some(Effect::CutRequest { .. } | Effect::LoseAnswer) => {
                Err(io::ErrorKind::ConnectionReset.into())
            }
            Some(Effect::CutAnswer { after }) => Ok(answer
                .map(|body| s3s::Body::http_body_unsync(Counted::new(body, Count::Nothing, Some(after))))),
            Some(Effect::WrongChecksum) => {
                answer.headers_mut().insert(CRC64, HeaderValue::from_static("1"));
                Ok(answer)
            }
            Some(Effect::Trickle { blanks, every_millis, .. }) => Ok(trickle(answer, blanks, every_millis)),
            _ => Ok(answer),
        }
    }

    /// The lab's own requests: order and clear faults, read the log. They carry a secret key of the lab.
    async fn control(&self, request: Request<Incoming>) -> Answer {
        let given = header(&request, "authorization").and_then(|value| value.strip_prefix("Bearer "));
        if !self.shared.keys().iter().any(|key| Some(key.secret.as_str()) == given) {
            return refusal(
                403,
                "AccessDenied",
                "The lab's own requests carry `Authorization: Bearer <secret key>`.",
            );
        }
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        match (method.as_str(), path.as_str()) {
            ("POST", "/-lab/faults") => {
                let body = http_body_util::Limited::new(request.into_body(), 1 << 20).collect().await;
                let body = body.map(|body| body.to_bytes()).unwrap_or_default();
                match serde_json::from_slice(&body) {
                    Ok(fault) => self.shared.inject(fault),
                    Err(error) => return refusal(400, "MalformedJSON", &error.to_string()),
                }
                Response::new(s3s::Body::empty())
            }
            ("DELETE", "/-lab/faults") => {
                self.shared.clear_faults();
                Response::new(s3s::Body::empty())
            }
            ("GET", "/-lab/requests") => {
                let text = serde_json::to_vec(&self.shared.requests()).unwrap_or_default();
                Response::new(s3s::Body::from(text))
            }
            _ => refusal(404, "NoSuchPage", "The lab knows /-lab/faults and /-lab/requests."),
        }
    }
}

/// An error's document completed by what COS puts into it: the resource and the request's names.
async fn named(answer: Answer, resource: &str, number: u64) -> Answer {
    if !(answer.status().is_client_error() || answer.status().is_server_error()) {
        return answer;
    }
    let (mut parts, body) = answer.into_parts();
    let text = BodyExt::collect(body).await.map(|body| body.to_bytes()).unwrap_or_default();
    let resource = resource.replace('&', "&amp;").replace('<', "&lt;");
    let id = format!("lab{number:016x}");
    let more =
        format!("<Resource>{resource}</Resource><RequestId>{id}</RequestId><TraceId>{id}</TraceId></Error>");
    let text = String::from_utf8_lossy(&text).replace("</Error>", &more);
    parts.headers.remove("content-length");
    Answer::from_parts(parts, s3s::Body::from(text))
}

/// The same answer with status 200 at once, and blanks before its body.
fn trickle(answer: Answer, blanks: u32, every_millis: u64) -> Answer {
    let (mut parts, body) = answer.into_parts();
    parts.status = hyper::StatusCode::OK;
    parts.headers.remove("content-length");
    let blanks = futures::stream::unfold(blanks, move |left| async move {
        if left == 0 {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(every_millis)).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from_static(b" "))), left - 1))
    });
    let blanks = blanks.map(|frame| frame.map_err(io::Error::other));
    let rest = body.into_data_stream().map(|data| data.map(Frame::data).map_err(io::Error::other));
    Answer::from_parts(parts, s3s::Body::http_body_unsync(StreamBody::new(blanks.chain(rest))))
}
