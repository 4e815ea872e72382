//! The S3 operations, with COS's rules, over the lab's own storage.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use s3s::dto::*;
use s3s::{HttpResponse, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::disk::{Data, Disk, Object};
use crate::unit::{MIB, to_usize};

/// Smallest part but the last, in bytes.
const MIN_PART: u64 = MIB;
/// Bytes read from a data file at once.
const STEP: u64 = 256 << 10;
/// The header with an object's or part's CRC-64/XZ.
pub const CRC64: &str = "x-cos-hash-crc64ecma";

/// The S3 service of a [`Disk`], with at most so many entries in a page of a listing.
pub struct Ops(pub Arc<Disk>, pub usize);

fn internal(error: crate::error::Error) -> S3Error {
    S3Error::internal_error(error)
}

fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn etag(value: &str) -> Option<ETag> {
    Some(ETag::Strong(value.to_owned()))
}

fn time(seconds: i64) -> Option<Timestamp> {
    time::OffsetDateTime::from_unix_timestamp(seconds).ok().map(Timestamp::from)
}

fn is_public(acl: Option<&str>, headers: &hyper::HeaderMap) -> bool {
    let cos = headers.get("x-cos-acl").and_then(|value| value.to_str().ok());
    acl.or(cos).is_some_and(|acl| acl.starts_with("public-read"))
}

fn part_number(number: i32) -> S3Result<u32> {
    let number = u32::try_from(number).ok().filter(|n| (1..=10_000).contains(n));
    number.ok_or_else(|| s3_error!(InvalidArgument, "part numbers are 1 to 10000"))
}

fn with_crc<T>(output: T, crc64: u64) -> S3Response<T> {
    let mut response = S3Response::new(output);
    response.headers.insert(CRC64, crc64.into());
    response
}

/// The bytes `start..end` of an object.
fn stream(disk: &Disk, bucket: &str, object: &Object, start: u64, end: u64) -> StreamingBlob {
    let steps = disk.pieces(bucket, object, start, end).into_iter().flat_map(|(path, offset, len)| {
        (0..len.div_ceil(STEP)).map(move |i| (path.clone(), offset + i * STEP, STEP.min(len - i * STEP)))
    });
    StreamingBlob::wrap(futures::stream::iter(steps).map(|(path, offset, len)| {
        let mut bytes = vec![0; to_usize(len)];
        std::fs::File::open(path)?.read_exact_at(&mut bytes, offset)?;
        Ok::<_, std::io::Error>(Bytes::from(bytes))
    }))
}

impl Ops {
    fn page(&self, asked: Option<i32>) -> usize {
        asked.and_then(|n| usize::try_from(n).ok()).map_or(self.1, |n| n.min(self.1))
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Arc<Object>> {
        let buckets = self.0.buckets();
        let state = buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        state.objects.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
    }

    fn has_bucket(&self, bucket: &str) -> S3Result<()> {
        if self.0.buckets().contains_key(bucket) { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
    }

    /// Stores a body; what it should hash to is checked before it counts.
    async fn receive<S, E>(
        &self,
        bucket: &str,
        body: Option<S>,
        length: Option<i64>,
        md5: Option<&str>,
    ) -> S3Result<Data>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut writer = self.0.writer(bucket).map_err(internal)?;
        if let Some(mut body) = body {
            while let Some(bytes) = body.next().await {
                let bytes =
                    bytes.map_err(|error| S3Error::with_source(S3ErrorCode::IncompleteBody, error.into()))?;
                writer.write(&bytes).map_err(S3Error::internal_error)?;
            }
        }
        let data = writer.finish();
        let wrong_md5 = md5.is_some_and(|md5| {
            use base64::Engine as _;
            let given = base64::engine::general_purpose::STANDARD.decode(md5).unwrap_or_default();
            given.iter().map(|byte| format!("{byte:02x}")).collect::<String>() != data.md5
        });
        if wrong_md5 {
            self.0.discard(bucket, &data);
            return Err(s3_error!(BadDigest));
        }
        if length.is_some_and(|length| length != int(data.size)) {
            self.0.discard(bucket, &data);
            return Err(s3_error!(IncompleteBody));
        }
        Ok(data)
    }

    fn check_match(object: &Object, condition: Option<&ETagCondition>) -> S3Result<()> {
        match condition {
            Some(ETagCondition::ETag(tag)) if tag.value() != object.etag => {
                Err(s3_error!(PreconditionFailed))
            }
            _ => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl S3 for Ops {
    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let names: Vec<String> = self.0.buckets().keys().cloned().collect();
        let buckets =
            names.into_iter().map(|name| Bucket { name: Some(name), ..Default::default() }).collect();
        Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets), ..Default::default() }))
    }

    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let public = is_public(req.input.acl.as_ref().map(BucketCannedACL::as_str), &req.headers);
        match self.0.create_bucket(&req.input.bucket, public).map_err(internal)? {
            true => Ok(S3Response::new(CreateBucketOutput::default())),
            false => Err(s3_error!(BucketAlreadyOwnedByYou)),
        }
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.has_bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.has_bucket(&req.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        self.has_bucket(&input.bucket)?;
        let public = is_public(input.acl.as_ref().map(ObjectCannedACL::as_str), &req.headers);
        let data = self
            .receive(&input.bucket, input.body, input.content_length, input.content_md5.as_deref())
            .await?;
        let object = self.0.put(&input.bucket, &input.key, public, data).map_err(internal)?;
        let object = object.ok_or_else(|| s3_error!(NoSuchBucket))?;
        Ok(with_crc(PutObjectOutput { e_tag: etag(&object.etag), ..Default::default() }, object.crc64))
    }

    async fn put_object_acl(
        &self,
        req: S3Request<PutObjectAclInput>,
    ) -> S3Result<S3Response<PutObjectAclOutput>> {
        let public = is_public(req.input.acl.as_ref().map(ObjectCannedACL::as_str), &req.headers);
        self.has_bucket(&req.input.bucket)?;
        match self.0.set_public(&req.input.bucket, &req.input.key, public).map_err(internal)? {
            true => Ok(S3Response::new(PutObjectAclOutput::default())),
            false => Err(s3_error!(NoSuchKey)),
        }
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let object = self.object(&req.input.bucket, &req.input.key)?;
        Self::check_match(&object, req.input.if_match.as_ref())?;
        let output = HeadObjectOutput {
            content_length: Some(int(object.size)),
            e_tag: etag(&object.etag),
            last_modified: time(object.modified),
            accept_ranges: Some("bytes".to_owned()),
            ..Default::default()
        };
        Ok(with_crc(output, object.crc64))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let object = self.object(&input.bucket, &input.key)?;
        Self::check_match(&object, input.if_match.as_ref())?;
        let range = match &input.range {
            Some(range) => range.check(object.size)?,
            None => 0..object.size,
        };
        let content_range =
            input.range.map(|_| format!("bytes {}-{}/{}", range.start, range.end - 1, object.size));
        let output = GetObjectOutput {
            body: Some(stream(&self.0, &input.bucket, &object, range.start, range.end)),
            content_length: Some(int(range.end - range.start)),
            content_range,
            e_tag: etag(&object.etag),
            last_modified: time(object.modified),
            accept_ranges: Some("bytes".to_owned()),
            ..Default::default()
        };
        Ok(with_crc(output, object.crc64))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.has_bucket(&req.input.bucket)?;
        self.0.delete(&req.input.bucket, &req.input.key).map_err(internal)?;
        Ok(S3Response::with_status(DeleteObjectOutput::default(), hyper::StatusCode::NO_CONTENT))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        self.has_bucket(&req.input.bucket)?;
        let mut deleted = Vec::new();
        for object in req.input.delete.objects {
            self.0.delete(&req.input.bucket, &object.key).map_err(internal)?;
            deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..Default::default() }))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        if input.delimiter.as_ref().is_some_and(|delimiter| !delimiter.is_empty()) {
            return Err(s3_error!(NotImplemented, "the lab lists without delimiter"));
        }
        let buckets = self.0.buckets();
        let state = buckets.get(&input.bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after.clone()).unwrap_or_default();
        let most = self.page(input.max_keys);
        let mut found = state.objects.values().filter(|o| o.key.starts_with(&prefix) && o.key > after);
        let contents: Vec<_> = found.by_ref().take(most).cloned().collect();
        let more = found.next().is_some();
        let next = contents.last().map(|object| object.key.clone()).filter(|_| more);
        let count = contents.len();
        let contents = contents.iter().map(|object| s3s::dto::Object {
            key: Some(object.key.clone()),
            size: Some(int(object.size)),
            e_tag: etag(&object.etag),
            last_modified: time(object.modified),
            ..Default::default()
        });
        Ok(S3Response::new(ListObjectsV2Output {
            contents: Some(contents.collect()),
            key_count: i32::try_from(count).ok(),
            is_truncated: Some(more),
            next_continuation_token: next,
            name: Some(input.bucket),
            prefix: input.prefix,
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        let public = is_public(input.acl.as_ref().map(ObjectCannedACL::as_str), &req.headers);
        let id = self.0.begin(&input.bucket, &input.key, public).map_err(internal)?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            upload_id: Some(id.ok_or_else(|| s3_error!(NoSuchBucket))?),
            bucket: Some(input.bucket),
            key: Some(input.key),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        let number = part_number(input.part_number)?;
        self.has_upload(&input.bucket, &input.key, &input.upload_id)?;
        let data = self
            .receive(&input.bucket, input.body, input.content_length, input.content_md5.as_deref())
            .await?;
        let (tag, crc64) = (etag(&data.md5), data.crc64);
        if !self.0.add_part(&input.bucket, &input.upload_id, number, data).map_err(internal)? {
            return Err(s3_error!(NoSuchUpload));
        }
        Ok(with_crc(UploadPartOutput { e_tag: tag, ..Default::default() }, crc64))
    }

    async fn upload_part_copy(
        &self,
        req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        let input = req.input;
        let number = part_number(input.part_number)?;
        self.has_upload(&input.bucket, &input.key, &input.upload_id)?;
        let CopySource::Bucket { bucket, key, .. } = &input.copy_source else {
            return Err(s3_error!(InvalidArgument, "copy from a bucket"));
        };
        let source = self.object(bucket, key)?;
        Self::check_match(&source, input.copy_source_if_match.as_ref())?;
        let range = match input.copy_source_range.as_deref().map(Range::parse) {
            Some(range) => {
                range.map_err(|_| s3_error!(InvalidArgument, "copy-source-range"))?.check(source.size)?
            }
            None => 0..source.size,
        };
        let body = stream(&self.0, bucket, &source, range.start, range.end);
        let data = self.receive(&input.bucket, Some(body), None, None).await?;
        let (result, crc64) = (
            CopyPartResult {
                e_tag: etag(&data.md5),
                last_modified: time(super::disk::now()),
                ..Default::default()
            },
            data.crc64,
        );
        if !self.0.add_part(&input.bucket, &input.upload_id, number, data).map_err(internal)? {
            return Err(s3_error!(NoSuchUpload));
        }
        Ok(with_crc(UploadPartCopyOutput { copy_part_result: Some(result), ..Default::default() }, crc64))
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        self.has_upload(&input.bucket, &input.key, &input.upload_id)?;
        let buckets = self.0.buckets();
        let pending = buckets.get(&input.bucket).and_then(|state| state.uploads.get(&input.upload_id));
        let pending = pending.ok_or_else(|| s3_error!(NoSuchUpload))?;
        let after = input.part_number_marker.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let mut rest = pending.parts.range(after + 1..);
        let listed: Vec<_> = rest.by_ref().take(self.page(input.max_parts)).collect();
        let parts = listed.iter().map(|(number, data)| Part {
            part_number: i32::try_from(**number).ok(),
            size: Some(int(data.size)),
            e_tag: etag(&data.md5),
            last_modified: time(pending.begun),
            ..Default::default()
        });
        Ok(S3Response::new(ListPartsOutput {
            parts: Some(parts.collect()),
            is_truncated: Some(rest.next().is_some()),
            next_part_number_marker: listed.last().and_then(|(number, _)| i32::try_from(**number).ok()),
            part_number_marker: input.part_number_marker,
            max_parts: i32::try_from(self.page(input.max_parts)).ok(),
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        self.has_upload(&input.bucket, &input.key, &input.upload_id)?;
        let parts = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let numbers: Vec<u32> = parts
            .iter()
            .map(|part| part.part_number.ok_or_else(|| s3_error!(MalformedXML)).and_then(part_number))
            .collect::<S3Result<_>>()?;
        if !numbers.is_sorted_by(|a, b| a < b) {
            return Err(s3_error!(InvalidPartOrder));
        }
        {
            let buckets = self.0.buckets();
            let pending = buckets.get(&input.bucket).and_then(|state| state.uploads.get(&input.upload_id));
            let pending = pending.ok_or_else(|| s3_error!(NoSuchUpload))?;
            for ((number, wanted), part) in numbers.iter().zip(1u32..).zip(&parts) {
                let found = pending.parts.get(number);
                let found =
                    found.filter(|data| part.e_tag.as_ref().is_some_and(|tag| tag.value() == data.md5));
                // COS wants the numbers without gaps.
                let found = found.filter(|_| *number == wanted);
                let found = found.ok_or_else(|| s3_error!(InvalidPart, "part {number}"))?;
                if Some(number) != numbers.last() && found.size < MIN_PART {
                    return Err(s3_error!(EntityTooSmall, "part {number} has {} bytes", found.size));
                }
            }
        }
        if numbers.is_empty() {
            return Err(s3_error!(MalformedXML));
        }
        let object = self.0.complete(&input.bucket, &input.upload_id, &numbers).map_err(internal)?;
        let object = object.ok_or_else(|| s3_error!(NoSuchUpload))?;
        let output = CompleteMultipartUploadOutput {
            e_tag: etag(&object.etag),
            location: Some(format!("http://{}/{}", input.bucket, input.key)),
            bucket: Some(input.bucket),
            key: Some(input.key),
            ..Default::default()
        };
        Ok(with_crc(output, object.crc64))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.has_upload(&req.input.bucket, &req.input.key, &req.input.upload_id)?;
        match self.0.abort(&req.input.bucket, &req.input.upload_id).map_err(internal)? {
            true => Ok(S3Response::with_status(Default::default(), hyper::StatusCode::NO_CONTENT)),
            false => Err(s3_error!(NoSuchUpload)),
        }
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let buckets = self.0.buckets();
        let state = buckets.get(&input.bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = (input.key_marker.unwrap_or_default(), input.upload_id_marker.unwrap_or_default());
        let mut all: Vec<_> =
            state.uploads.iter().map(|(id, pending)| (pending.key.clone(), id, pending.begun)).collect();
        all.sort();
        let matching = all.into_iter().filter(|(key, id, _)| {
            key.starts_with(&prefix) && (key.as_str(), id.as_str()) > (after.0.as_str(), after.1.as_str())
        });
        let mut matching = matching.peekable();
        let listed: Vec<_> = matching.by_ref().take(self.page(input.max_uploads)).collect();
        let more = matching.peek().is_some();
        let last = listed.last().filter(|_| more);
        Ok(S3Response::new(ListMultipartUploadsOutput {
            is_truncated: Some(more),
            next_key_marker: last.map(|(key, ..)| key.clone()),
            next_upload_id_marker: last.map(|(_, id, _)| (*id).clone()),
            uploads: Some(
                listed
                    .iter()
                    .map(|(key, id, begun)| MultipartUpload {
                        key: Some(key.clone()),
                        upload_id: Some((*id).clone()),
                        initiated: time(*begun),
                        ..Default::default()
                    })
                    .collect(),
            ),
            bucket: Some(input.bucket),
            prefix: input.prefix,
            ..Default::default()
        }))
    }
}

impl Ops {
    fn has_upload(&self, bucket: &str, key: &str, id: &str) -> S3Result<()> {
        let buckets = self.0.buckets();
        let state = buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        match state.uploads.get(id) {
            Some(pending) if pending.key == key => Ok(()),
            _ => Err(s3_error!(NoSuchUpload)),
        }
    }
}

/// An error as S3 sends it, for what is refused before the operation is looked at.
pub fn refusal(status: u16, code: &str, message: &str) -> HttpResponse {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    let mut response = HttpResponse::new(s3s::Body::from(body));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::BAD_REQUEST);
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/xml"));
    response
}
