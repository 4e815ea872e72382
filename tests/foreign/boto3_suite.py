"""Judges the lab's object store as boto3 sees it: boto3_suite.py PORT BUCKET ID SECRET [clock seconds]."""
import base64
import hashlib
import socket
import sys
import urllib.error
import urllib.request
from datetime import timedelta

import boto3
import botocore.auth
from botocore.config import Config
from botocore.exceptions import ClientError
from qcloud_cos import CosConfig, CosS3Client

PORT, BUCKET, ID, SECRET = sys.argv[1:5]
REGION = "ap-lab"
MIB = 1 << 20


def client(secret=SECRET, key_id=ID, style="path", when="when_required", port=PORT):
    host = "127.0.0.1" if style == "path" else f"cos.{REGION}.myqcloud.com"
    return boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name=REGION,
        aws_access_key_id=key_id, aws_secret_access_key=secret,
        config=Config(s3={"addressing_style": style}, retries={"max_attempts": 1},
                      request_checksum_calculation=when, response_checksum_validation=when))


def refused(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ClientError as error:
        got = error.response["Error"]["Code"]
        assert got == code, f"{got} instead of {code}"
        return error.response
    raise AssertionError(f"not refused with {code}")


def fetch(url, headers={}):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def crc64(data):
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xC96C5795D7870F42 if crc & 1 else 0)
    return str(crc ^ 0xFFFFFFFFFFFFFFFF)


def objects(s3):
    text = "虚拟机 image+1%.txt".encode()
    key = "dir/a b/" + text.decode()
    put = s3.put_object(Bucket=BUCKET, Key=key, Body=text)
    assert put["ETag"] == f'"{hashlib.md5(text).hexdigest()}"'
    assert put["ResponseMetadata"]["HTTPHeaders"]["x-cos-hash-crc64ecma"] == crc64(text)
    head = s3.head_object(Bucket=BUCKET, Key=key)
    assert head["ContentLength"] == len(text) and head["ETag"] == put["ETag"]
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == text
    part = s3.get_object(Bucket=BUCKET, Key=key, Range="bytes=3-9", IfMatch=put["ETag"])
    assert part["Body"].read() == text[3:10] and part["ContentRange"] == f"bytes 3-9/{len(text)}"
    refused("PreconditionFailed", s3.get_object, Bucket=BUCKET, Key=key, IfMatch='"0"')
    refused("InvalidRange", s3.get_object, Bucket=BUCKET, Key=key, Range="bytes=999-")
    refused("NoSuchKey", s3.get_object, Bucket=BUCKET, Key="none")
    refused("NoSuchBucket", s3.put_object, Bucket="none-1250000000", Key="k", Body=b"")
    wrong = base64.b64encode(b"0" * 16).decode()
    refused("BadDigest", s3.put_object, Bucket=BUCKET, Key="bad", Body=b"x", ContentMD5=wrong)
    assert [o["Key"] for o in s3.list_objects_v2(Bucket=BUCKET, Prefix="dir/")["Contents"]] == [key]
    s3.delete_object(Bucket=BUCKET, Key=key)
    refused("404", s3.head_object, Bucket=BUCKET, Key=key)


def multipart(s3):
    sizes = [MIB, 2 * MIB + 7, MIB + 1, 5]
    parts = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="image")["UploadId"]
    which = dict(Bucket=BUCKET, Key="image", UploadId=upload)
    tags = {}
    for number in [2, 3, 4, 1]:  # the part with the image's front comes last
        tags[number] = s3.upload_part(**which, PartNumber=number, Body=parts[number - 1])["ETag"]
    listed = [p for page in s3.get_paginator("list_parts").paginate(**which, PaginationConfig={"PageSize": 3})
              for p in page["Parts"]]
    assert [(p["PartNumber"], p["Size"], p["ETag"]) for p in listed] == [(i, sizes[i - 1], tags[i]) for i in range(1, 5)]
    assert upload in [u["UploadId"] for u in s3.list_multipart_uploads(Bucket=BUCKET, Prefix="im")["Uploads"]]

    def complete(numbers, tags=tags):
        return s3.complete_multipart_upload(
            **which, MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tags[n]} for n in numbers]})

    refused("InvalidPartOrder", complete, [2, 1, 3, 4])
    refused("InvalidPart", complete, [1, 3, 4])
    refused("InvalidPart", complete, [1, 2], {1: tags[1], 2: '"0"'})
    done = complete([1, 2, 3, 4])
    digests = b"".join(hashlib.md5(part).digest() for part in parts)
    assert done["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-4"'
    whole = b"".join(parts)
    assert s3.get_object(Bucket=BUCKET, Key="image")["Body"].read() == whole
    assert s3.get_object(Bucket=BUCKET, Key="image", Range=f"bytes={MIB - 3}-{MIB + 2}")["Body"].read() == b"AAABBB"
    refused("NoSuchUpload", complete, [1, 2, 3, 4])

    copy = s3.create_multipart_upload(Bucket=BUCKET, Key="copy")["UploadId"]
    which_copy = dict(Bucket=BUCKET, Key="copy", UploadId=copy)
    source = {"Bucket": BUCKET, "Key": "image"}
    refused("PreconditionFailed", s3.upload_part_copy, **which_copy, PartNumber=1, CopySource=source, CopySourceIfMatch='"0"')
    first = s3.upload_part_copy(**which_copy, PartNumber=1, CopySource=source, CopySourceIfMatch=done["ETag"],
                                CopySourceRange=f"bytes=5-{2 * MIB}")["CopyPartResult"]["ETag"]
    small = s3.upload_part(**which_copy, PartNumber=2, Body=b"end")["ETag"]
    s3.complete_multipart_upload(**which_copy, MultipartUpload={
        "Parts": [{"PartNumber": 1, "ETag": first}, {"PartNumber": 2, "ETag": small}]})
    assert s3.get_object(Bucket=BUCKET, Key="copy")["Body"].read() == whole[5:2 * MIB + 1] + b"end"

    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="small")["UploadId"]
    which = dict(Bucket=BUCKET, Key="small", UploadId=upload)
    tags = {n: s3.upload_part(**which, PartNumber=n, Body=b"x" * 1000)["ETag"] for n in (1, 2)}
    refused("EntityTooSmall", s3.complete_multipart_upload, **which, MultipartUpload={
        "Parts": [{"PartNumber": n, "ETag": tags[n]} for n in (1, 2)]})
    s3.abort_multipart_upload(**which)
    refused("NoSuchUpload", s3.list_parts, **which)


def links(s3):
    s3.put_object(Bucket=BUCKET, Key="a link.img", Body=b"linked")
    url = s3.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "a link.img"}, ExpiresIn=60)
    assert fetch(url) == (200, b"linked")
    assert fetch(url, {"Range": "bytes=0-1"}) == (206, b"li")
    tampered = url[:-1] + ("0" if url[-1] != "0" else "1")
    status, body = fetch(tampered)
    assert status == 403 and b"SignatureDoesNotMatch" in body, body
    plain = url.split("?")[0]
    status, body = fetch(plain)
    assert status == 403 and b"AccessDenied" in body, body
    s3.put_object_acl(Bucket=BUCKET, Key="a link.img", ACL="public-read")
    assert fetch(plain) == (200, b"linked")


def refusals(s3):
    refused("SignatureDoesNotMatch", client(secret="wrong").put_object, Bucket=BUCKET, Key="k", Body=b"x")
    refused("InvalidAccessKeyId", client(key_id="AKIDnobody").put_object, Bucket=BUCKET, Key="k", Body=b"x")
    refused("InvalidRequest", s3.delete_objects, Bucket=BUCKET, Delete={"Objects": [{"Key": "k"}]})

    def add_md5(request, **_):
        request.headers["Content-MD5"] = base64.b64encode(hashlib.md5(request.body).digest()).decode()

    s3.put_object(Bucket=BUCKET, Key="k", Body=b"x")
    s3.meta.events.register("before-sign.s3.DeleteObjects", add_md5)
    assert s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": "k"}]})["Deleted"][0]["Key"] == "k"
    real = botocore.auth.get_current_datetime
    botocore.auth.get_current_datetime = lambda *args, **kwargs: real(*args, **kwargs) + timedelta(hours=1)
    try:
        refused("RequestTimeTooSkewed", s3.put_object, Bucket=BUCKET, Key="k", Body=b"x")
    finally:
        botocore.auth.get_current_datetime = real


def chunked_is_refused():
    s3 = client()

    def chunk(request, **_):
        request.headers["Content-Encoding"] = "aws-chunked"
        request.headers["X-Amz-Trailer"] = "x-amz-checksum-crc32"

    s3.meta.events.register("before-sign.s3.PutObject", chunk)
    refused("InvalidArgument", s3.put_object, Bucket=BUCKET, Key="k", Body=b"x")


def native():
    """Tencent's own SDK, which signs the COS way."""
    config = dict(Region=REGION, Scheme="http", Endpoint=f"cos.{REGION}.myqcloud.com:{PORT}")
    cos = CosS3Client(CosConfig(SecretId=ID, SecretKey=SECRET, **config))
    cos.put_object(Bucket=BUCKET, Body=b"native " * 1000, Key="本地/a b.txt")
    got = cos.get_object(Bucket=BUCKET, Key="本地/a b.txt")
    assert got["Body"].get_raw_stream().read() == b"native " * 1000
    assert cos.head_object(Bucket=BUCKET, Key="本地/a b.txt")["x-cos-hash-crc64ecma"] == crc64(b"native " * 1000)
    assert fetch(cos.get_presigned_url(Method="GET", Bucket=BUCKET, Key="本地/a b.txt"))[0] == 200
    wrong = CosS3Client(CosConfig(SecretId=ID, SecretKey="wrong", **config))
    try:
        wrong.get_object(Bucket=BUCKET, Key="本地/a b.txt")
        raise AssertionError("a wrong native signature was taken")
    except Exception as error:
        assert "SignatureDoesNotMatch" in str(error), error


def main():
    resolve = socket.getaddrinfo
    # Every name is the lab: the clients must put the bucket into the host name, not resolve it.
    socket.getaddrinfo = lambda host, *args, **kwargs: resolve("127.0.0.1", *args, **kwargs)
    for style in ["virtual", "path"]:
        for check in [objects, multipart, links, refusals]:
            check(client(style=style))
            print("ok", style, check.__name__, flush=True)
    chunked_is_refused()
    native()
    print("ok all")


main()
