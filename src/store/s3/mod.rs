//! COS and every other S3 store, over the AWS SDK with the settings COS needs.

mod failure;
mod stream;

use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future::ProvideCredentials as ProvideFuture;
use aws_runtime::auth::PayloadSigningOverride;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Credentials, IdentityCache, Intercept, ProvideCredentials, Region,
    RequestChecksumCalculation, ResponseChecksumValidation, RuntimeComponents, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns};
use aws_smithy_runtime_api::http::Response;
use bytes::Bytes;
use md5::{Digest as _, Md5};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::Sha256;

use self::failure::Failure;
use self::stream::{Progress, Sending};
use super::{
    Body, CopySource, ObjectInfo, ObjectStore, Part, Upload, check_key, check_object, check_parts, errors,
    is_proven,
};
use crate::error::{Error, Kind, Result};
use crate::net;
use crate::unit::{Extent, Secret};

/// How long a request without much to carry may take.
const SHORT: Duration = Duration::from_secs(60);

/// How long a store may take to join parts: COS answers at once and trickles blanks until it is done.
const JOIN: Duration = Duration::from_secs(15 * 60);

/// How long an upload may stand still before it is given up.
const STALL: Duration = Duration::from_secs(120);

/// The slowest download waited for, in bytes per second.
const SLOWEST: u64 = 16 << 10;

/// What a path keeps unescaped (RFC 3986).
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// The keys a request is signed with.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Access key id, on Tencent Cloud the SecretId.
    pub id: String,
    /// The secret key.
    pub secret: Secret<String>,
    /// The session token of temporary keys.
    pub token: Option<Secret<String>>,
}

/// Where keys come from; asked before every request, so that temporary ones can be renewed. Must not block for long.
pub type KeySource = Arc<dyn Fn() -> Result<Keys> + Send + Sync>;

/// Where a bucket is and how to talk to it.
#[derive(Clone)]
pub struct Config {
    /// The region's URL without the bucket, such as `https://cos.ap-guangzhou.myqcloud.com`.
    pub endpoint: String,
    /// The region to sign for.
    pub region: String,
    /// The bucket, on COS `<name>-<APPID>`.
    pub bucket: String,
    /// Put the bucket into the path rather than the host name. COS refuses it for buckets made since 2024.
    pub path_style: bool,
    /// Connect here whatever the endpoint's name resolves to, such as an intranet address or a simulator's.
    pub connect_to: Option<IpAddr>,
    /// The keys.
    pub keys: KeySource,
}

/// One bucket of an S3 store.
pub struct S3 {
    client: Client,
    bucket: String,
    /// Whether the line is encrypted; if not, bodies are signed.
    encrypted: bool,
}

struct FromSource(KeySource);

impl std::fmt::Debug for FromSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FromSource")
    }
}

impl ProvideCredentials for FromSource {
    fn provide_credentials<'a>(&'a self) -> ProvideFuture<'a>
    where
        Self: 'a,
    {
        let keys = (self.0)().map_err(CredentialsError::provider_error);
        ProvideFuture::ready(keys.map(|keys| {
            let token = keys.token.map(|token| token.expose().clone());
            Credentials::new(keys.id, keys.secret.expose().clone(), token, None, "haul")
        }))
    }
}

#[derive(Clone, Debug)]
struct Fixed(IpAddr);

impl ResolveDns for Fixed {
    fn resolve_dns<'a>(&'a self, _name: &'a str) -> DnsFuture<'a> {
        DnsFuture::ready(Ok(vec![self.0]))
    }
}

/// Notes what the typed answers leave out.
#[derive(Clone, Debug, Default)]
struct Noted(Arc<Mutex<Headers>>);

#[derive(Clone, Debug, Default)]
struct Headers {
    crc64: Option<u64>,
    /// The store encrypts with a managed key: entity tags are no digests.
    encrypts: bool,
    request: Option<String>,
}

impl Noted {
    fn take(&self) -> Headers {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Intercept for Noted {
    fn name(&self) -> &'static str {
        "Noted"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let headers = context.response().headers();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Headers {
            crc64: headers.get("x-cos-hash-crc64ecma").and_then(|crc| crc.parse().ok()),
            encrypts: headers.get("x-amz-server-side-encryption").is_some_and(|how| how != "AES256"),
            request: failure::request_id(headers),
        };
        Ok(())
    }
}

/// How a streamed body is signed: by its digest, or not at all.
#[derive(Debug)]
struct Payload(PayloadSigningOverride);

impl Intercept for Payload {
    fn name(&self) -> &'static str {
        "Payload"
    }

    fn modify_before_signing(
        &self,
        _: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        cfg: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        cfg.interceptor_state().store_put(self.0.clone());
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs a request to its end, within `limit`.
async fn within<T, E>(
    limit: Duration,
    request: impl Future<Output = std::result::Result<T, SdkError<E, Response>>>,
) -> std::result::Result<T, Failure>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match tokio::time::timeout(limit, request).await {
        Ok(done) => done.map_err(Failure::from),
        Err(_) => Err(Failure::timeout("answer")),
    }
}

fn number(number: u32) -> Result<i32> {
    i32::try_from(number).ok().filter(|n| (1..=10_000).contains(n)).ok_or_else(|| {
        Error::new(Kind::Internal, "store.parts", format!("{number} is no part number"))
            .because("parts are numbered 1 to 10,000")
    })
}

impl S3 {
    /// A client of one bucket. Nothing is sent yet.
    pub fn new(config: Config) -> Result<Self> {
        let encrypted = match config.endpoint.split_once("://") {
            Some(("https", host)) if !host.is_empty() => true,
            Some(("http", host)) if !host.is_empty() => false,
            _ => {
                return Err(Error::new(
                    Kind::Usage,
                    "store.endpoint",
                    format!("{:?} is not an endpoint", config.endpoint),
                )
                .remedy("write it as https://cos.<region>.myqcloud.com"));
            }
        };
        let tls = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let http = aws_smithy_http_client::Builder::new().tls_provider(tls);
        let http = match config.connect_to {
            Some(address) => http.build_with_resolver(Fixed(address)),
            None => http.build_https(),
        };
        let settings = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(config.endpoint)
            .region(Region::new(config.region))
            .credentials_provider(FromSource(config.keys))
            .identity_cache(IdentityCache::no_cache())
            .force_path_style(config.path_style)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // Tries are counted and bounded by our own wrapper; time by `within` and `Progress`, which know that
            // an upload held to a rate is slow but not stalled.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(Duration::from_secs(10))
                    .disable_read_timeout()
                    .disable_operation_timeout()
                    .disable_operation_attempt_timeout()
                    .build(),
            )
            .http_client(http)
            .build();
        Ok(S3 { client: Client::from_conf(settings), bucket: config.bucket, encrypted })
    }

    fn fail(&self, verb: &str, key: &str, failure: Failure) -> Error {
        let name = self.name(key);
        failure.error(&format!("cannot {verb} {name}"), &name)
    }

    /// Sends what `request` makes of the body; returns the answer's entity tag, proven to be of these bytes.
    fn send<E>(
        &self,
        verb: &str,
        key: &str,
        body: &Body,
        request: impl AsyncFnOnce(
            ByteStream,
            Noted,
            Payload,
        ) -> std::result::Result<Option<String>, SdkError<E, Response>>,
    ) -> Result<(String, u64)>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let crc64 = body.crc64()?;
        // An encrypted line proves the body by itself.
        let payload = Payload(match self.encrypted {
            true => PayloadSigningOverride::UnsignedPayload,
            false => {
                let mut sha = Sha256::new();
                body.scan(|bytes| sha.update(bytes))?;
                PayloadSigningOverride::Precomputed(hex(&sha.finalize()))
            }
        });
        let noted = Noted::default();
        let progress = Progress::new();
        let stream = ByteStream::new(SdkBody::from_body_1_x(Sending::new(body.clone(), progress.clone())));
        let etag = net::block_on(async {
            tokio::select! {
                done = request(stream, noted.clone(), payload) => done.map_err(Failure::from),
                () = progress.stalled(STALL) => Err(Failure::timeout("progress")),
            }
        })?
        .map_err(|failure| self.fail(verb, key, failure))?;
        let etag = etag.unwrap_or_default();
        self.prove(key, body, crc64, &etag, &noted.take())?;
        Ok((etag, crc64))
    }

    /// Proves by the answer that the store has the bytes sent: by CRC-64 where it gives one, else by an entity tag
    /// that is an MD5.
    fn prove(&self, key: &str, body: &Body, crc64: u64, etag: &str, answer: &Headers) -> Result<()> {
        let tag = etag.trim_matches('"');
        let (what, sent, got) = if let Some(got) = answer.crc64 {
            ("CRC-64", crc64.to_string(), got.to_string())
        } else if !answer.encrypts && tag.len() == 32 && tag.bytes().all(|c| c.is_ascii_hexdigit()) {
            let mut md5 = Md5::new();
            body.scan(|bytes| md5.update(bytes))?;
            ("MD5", hex(&md5.finalize()), tag.to_ascii_lowercase())
        } else {
            return Ok(());
        };
        if sent == got {
            return Ok(());
        }
        let name = self.name(key);
        let error = Error::new(Kind::Mismatch, "store.checksum", format!("{name} arrived damaged"))
            .because(format!("the {what} of what was sent is {sent}, of what the store has {got}"))
            .remedy("run the same command with --resume; if it happens again, suspect this machine's memory or network card")
            .fact("object", &name)
            .retryable();
        Err(match &answer.request {
            Some(request) => error.fact("request", request),
            None => error,
        })
    }

    /// A HEAD, whose error answers carry no code.
    fn ask(&self, key: &str) -> std::result::Result<Option<ObjectInfo>, Failure> {
        let noted = Noted::default();
        let request =
            self.client.head_object().bucket(&self.bucket).key(key).customize().interceptor(noted.clone());
        match net::block_on(within(SHORT, request.send())).map_err(Failure::odd)? {
            Ok(head) => Ok(Some(ObjectInfo {
                size: head.content_length.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
                etag: head.e_tag.unwrap_or_default(),
                crc64: noted.take().crc64,
            })),
            Err(failure) if failure.status == Some(404) => Ok(None),
            Err(failure) if matches!(failure.status, Some(400..=403)) => {
                let get = self.client.get_object().bucket(&self.bucket).key(key).range("bytes=0-0");
                match net::block_on(within(SHORT, get.send())).map_err(Failure::odd)? {
                    Ok(_) => Err(failure),
                    Err(told) => Err(told),
                }
            }
            Err(failure) => Err(failure),
        }
    }

    /// The object that an upload whose fate is in doubt has become, if it can be proven to be that one.
    fn completed(&self, upload: &Upload, parts: &[Part]) -> Option<ObjectInfo> {
        let object = self.ask(&upload.key).ok()??;
        is_proven(&self.name(&upload.key), parts, &object).then_some(object)
    }
}

impl ObjectStore for S3 {
    fn name(&self, key: &str) -> String {
        format!("cos://{}/{key}", self.bucket)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        check_key(key)?;
        self.ask(key).map_err(|failure| self.fail("look up", key, failure))
    }

    fn get(&self, key: &str, range: Extent, if_match: Option<&str>) -> Result<Bytes> {
        check_key(key)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let limit = SHORT + Duration::from_secs(range.len() / SLOWEST);
        let request = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key)
            .range(format!("bytes={}-{}", range.start, range.end - 1))
            .set_if_match(if_match.map(str::to_owned));
        let got = net::block_on(async {
            let download = async {
                let answer = request.send().await.map_err(Failure::from)?;
                // A store may answer a range with the whole object: refuse before it fills the memory.
                if answer.content_length.is_some_and(|n| u64::try_from(n).ok() != Some(range.len())) {
                    return Err(Failure::odd(format!(
                        "{} bytes were asked for and {} came",
                        range.len(),
                        answer.content_length.unwrap_or(0)
                    )));
                }
                answer.body.collect().await.map(|body| body.into_bytes()).map_err(Failure::odd)
            };
            match tokio::time::timeout(limit, download).await {
                Ok(done) => done,
                Err(_) => Err(Failure::timeout("answer")),
            }
        })?;
        match got {
            Ok(bytes) if bytes.len() as u64 == range.len() => Ok(bytes),
            Ok(bytes) => {
                Err(self.fail("read", key, Failure::odd(format!("only {} bytes came", bytes.len()))))
            }
            Err(failure) if failure.status == Some(416) => {
                Err(errors::short(&self.name(key), range, self.head(key)?.map_or(0, |info| info.size)))
            }
            Err(failure) => Err(self.fail("read", key, failure)),
        }
    }

    fn put(&self, key: &str, body: Body) -> Result<ObjectInfo> {
        check_key(key)?;
        let size = body.len();
        let length = i64::try_from(size).unwrap_or(i64::MAX);
        let (etag, crc64) = self.send("write", key, &body, async |stream, noted, payload| {
            let request =
                self.client.put_object().bucket(&self.bucket).key(key).content_length(length).body(stream);
            request.customize().interceptor(noted).interceptor(payload).send().await.map(|done| done.e_tag)
        })?;
        Ok(ObjectInfo { size, etag, crc64: Some(crc64) })
    }

    fn delete(&self, key: &str) -> Result<()> {
        check_key(key)?;
        let request = self.client.delete_object().bucket(&self.bucket).key(key);
        match net::block_on(within(SHORT, request.send()))? {
            Ok(_) => Ok(()),
            Err(failure) if failure.code.as_deref() == Some("NoSuchKey") => Ok(()),
            Err(failure) => Err(self.fail("delete", key, failure)),
        }
    }

    fn begin(&self, key: &str) -> Result<Upload> {
        check_key(key)?;
        let request = self.client.create_multipart_upload().bucket(&self.bucket).key(key);
        let begun = net::block_on(within(SHORT, request.send()))?
            .map_err(|failure| self.fail("begin the upload of", key, failure))?;
        match begun.upload_id {
            Some(id) => Ok(Upload { key: key.to_owned(), id }),
            None => Err(self.fail("begin the upload of", key, Failure::odd("the answer names no upload"))),
        }
    }

    fn put_part(&self, upload: &Upload, part: u32, body: Body) -> Result<Part> {
        let size = body.len();
        let (length, index) = (i64::try_from(size).unwrap_or(i64::MAX), number(part)?);
        let verb = format!("send part {part} of");
        let (etag, crc64) = self.send(&verb, &upload.key, &body, async |stream, noted, payload| {
            let request = self
                .client
                .upload_part()
                .bucket(&self.bucket)
                .key(&upload.key)
                .upload_id(&upload.id)
                .part_number(index)
                .content_length(length)
                .body(stream);
            request.customize().interceptor(noted).interceptor(payload).send().await.map(|done| done.e_tag)
        })?;
        Ok(Part { number: part, size, etag, crc64: Some(crc64) })
    }

    fn copy_part(&self, upload: &Upload, part: u32, source: &CopySource<'_>) -> Result<Part> {
        let place = format!("{}/{}", self.bucket, source.key);
        let request = self
            .client
            .upload_part_copy()
            .bucket(&self.bucket)
            .key(&upload.key)
            .upload_id(&upload.id)
            .part_number(number(part)?)
            .copy_source(utf8_percent_encode(&place, PATH).to_string())
            .copy_source_if_match(source.etag)
            .copy_source_range(format!(
                "bytes={}-{}",
                source.range.start,
                source.range.end.saturating_sub(1)
            ));
        let copied = net::block_on(within(JOIN, request.send()))?
            .map_err(|failure| self.fail("copy a part out of", source.key, failure))?;
        let etag = copied.copy_part_result.and_then(|result| result.e_tag).unwrap_or_default();
        Ok(Part { number: part, size: source.range.len(), etag, crc64: None })
    }

    fn list_parts(&self, upload: &Upload) -> Result<Vec<Part>> {
        let verb = "list the parts of";
        let mut parts: Vec<Part> = Vec::new();
        let mut marker = None;
        loop {
            let request = self
                .client
                .list_parts()
                .bucket(&self.bucket)
                .key(&upload.key)
                .upload_id(&upload.id)
                .set_part_number_marker(marker.clone());
            let page = net::block_on(within(SHORT, request.send()))?
                .map_err(|failure| self.fail(verb, &upload.key, failure))?;
            let more = page.is_truncated == Some(true);
            for part in page.parts.unwrap_or_default() {
                let number = part.part_number.and_then(|n| u32::try_from(n).ok());
                let size = part.size.and_then(|n| u64::try_from(n).ok());
                let (Some(number), Some(size), Some(etag)) = (number, size, part.e_tag) else {
                    return Err(self.fail(
                        verb,
                        &upload.key,
                        Failure::odd("a part lacks its number, size or tag"),
                    ));
                };
                parts.push(Part { number, size, etag, crc64: None });
            }
            if !more {
                break;
            }
            // A page that does not move on would be asked for ever.
            if page.next_part_number_marker.is_none() || page.next_part_number_marker == marker {
                return Err(self.fail(verb, &upload.key, Failure::odd("the listing does not end")));
            }
            marker = page.next_part_number_marker;
        }
        parts.sort_by_key(|part| part.number);
        Ok(parts)
    }

    fn complete(&self, upload: &Upload, parts: &[Part]) -> Result<ObjectInfo> {
        let name = self.name(&upload.key);
        check_parts(&name, parts)?;
        let listed = parts.iter().map(|part| {
            Ok(CompletedPart::builder().part_number(number(part.number)?).e_tag(&part.etag).build())
        });
        let listed =
            CompletedMultipartUpload::builder().set_parts(Some(listed.collect::<Result<_>>()?)).build();
        let request = self
            .client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(&upload.key)
            .upload_id(&upload.id)
            .multipart_upload(listed);
        if let Err(failure) = net::block_on(within(JOIN, request.send()))? {
            // The answer was lost, cut off, or came after the upload was joined by an earlier try.
            let gone = failure.code.as_deref() == Some("NoSuchUpload");
            let error = self.fail("complete", &upload.key, failure);
            if gone || error.retry() == crate::error::Retry::Yes {
                return self.completed(upload, parts).ok_or(error);
            }
            return Err(error);
        }
        let object = self.head(&upload.key)?.ok_or_else(|| {
            self.fail("complete", &upload.key, Failure::odd("the object is not there after it was completed"))
        })?;
        check_object(&name, parts, &object)?;
        Ok(object)
    }

    fn abort(&self, upload: &Upload) -> Result<()> {
        let request =
            self.client.abort_multipart_upload().bucket(&self.bucket).key(&upload.key).upload_id(&upload.id);
        match net::block_on(within(SHORT, request.send()))? {
            Ok(_) => Ok(()),
            Err(failure) if failure.code.as_deref() == Some("NoSuchUpload") => Ok(()),
            Err(failure) => Err(self.fail("abort the upload of", &upload.key, failure)),
        }
    }

    fn uploads(&self, prefix: &str) -> Result<Vec<Upload>> {
        let mut uploads = Vec::new();
        let (mut after_key, mut after_id) = (None, None);
        loop {
            let request = self
                .client
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .prefix(prefix)
                .set_key_marker(after_key.clone())
                .set_upload_id_marker(after_id.clone());
            let page = net::block_on(within(SHORT, request.send()))?
                .map_err(|failure| self.fail("list the uploads of", prefix, failure))?;
            for upload in page.uploads.unwrap_or_default() {
                if let (Some(key), Some(id)) = (upload.key, upload.upload_id) {
                    uploads.push(Upload { key, id });
                }
            }
            let next = (page.next_key_marker, page.next_upload_id_marker);
            if page.is_truncated != Some(true) || next == (after_key.clone(), after_id.clone()) {
                return Ok(uploads);
            }
            (after_key, after_id) = next;
        }
    }

    fn presign_get(&self, key: &str, valid: Duration) -> Result<Secret<String>> {
        check_key(key)?;
        let failed = |error: BoxError| {
            Error::new(
                Kind::Credentials,
                "store.presign",
                format!("cannot sign a link to {}", self.name(key)),
            )
            .caused_by(error)
        };
        let valid = PresigningConfig::expires_in(valid).map_err(|error| failed(error.into()))?;
        let request = self.client.get_object().bucket(&self.bucket).key(key);
        let link = net::block_on(request.presigned(valid))?.map_err(|error| failed(error.into()))?;
        Ok(Secret::new(link.uri().to_owned()))
    }
}
