"""Drives the lab's CVM with the official SDK (tencentcloud-sdk-python-cvm): both sides must agree on every byte signed.

Arguments: host:port, secret id, object URL; the secret key in SECRET_KEY.
"""

import json
import os
import sys
import time

from tencentcloud.common import credential
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile
from tencentcloud.cvm.v20170312 import cvm_client, models

host, secret_id, url = sys.argv[1:4]
secret_key = os.environ["SECRET_KEY"]


def client(method="TC3-HMAC-SHA256", http="POST", key=secret_key, region="ap-guangzhou", unsigned=False):
    http_profile = HttpProfile(protocol="http", endpoint=host, reqMethod=http, reqTimeout=30)
    profile = ClientProfile(signMethod=method, httpProfile=http_profile)
    profile.unsignedPayload = unsigned
    return cvm_client.CvmClient(credential.Credential(secret_id, key), region, profile)


def request(kind, **fields):
    built = kind()
    built.from_json_string(json.dumps(fields))
    return built


def refused(code, call, *arguments):
    try:
        call(*arguments)
    except TencentCloudSDKException as error:
        assert error.code == code, (error.code, code, error.message)
        assert error.requestId, "no request id"
        return
    raise AssertionError(f"not refused with {code}")


# Every signature the SDK can make, with nested input, and each refused under another key.
filters = [{"Name": "image-type", "Values": ["PRIVATE_IMAGE", "a value with spaces, ü and +&="]}]
listing = request(models.DescribeImagesRequest, Filters=filters, Offset=0, Limit=10)
for method in ("TC3-HMAC-SHA256", "HmacSHA256", "HmacSHA1"):
    for http in ("POST", "GET"):
        answer = client(method, http).DescribeImages(listing)
        assert answer.TotalCount == 0, answer.to_json_string()
        refused("AuthFailure.SignatureFailure", client(method, http, key="wrong").DescribeImages, listing)
assert client(unsigned=True).DescribeImages(listing).TotalCount == 0
refused("UnsupportedRegion", client(region="ap-nowhere").DescribeImages, listing)

cvm = client()
systems = cvm.DescribeImportImageOs(models.DescribeImportImageOsRequest())
assert "Debian" in systems.ImportImageOsListSupported.Linux
debian = [entry for entry in systems.ImportImageOsVersionSet if entry.OsName == "Debian"][0]
assert "10" in debian.OsVersions and debian.Architecture == ["x86_64"]
assert cvm.DescribeImageQuota(models.DescribeImageQuotaRequest()).ImageNumQuota > 0

wanted = dict(Architecture="x86_64", OsType="Debian", OsVersion="10", ImageUrl=url, ImageName="by-sdk",
              ImageDescription="from the SDK", BootMode="Legacy BIOS")


def wish(**changes):
    return request(models.ImportImageRequest, **{**wanted, **changes})


refused("DryRunOperation", cvm.ImportImage, wish(DryRun=True))
refused("InvalidImageOsType.Unsupported", cvm.ImportImage, wish(OsType="Plan 9"))
refused("InvalidImageOsVersion.Unsupported", cvm.ImportImage, wish(OsVersion="12"))
refused("InvalidParameterValue.InvalidBootMode", cvm.ImportImage, wish(BootMode="BIOS"))
refused("InvalidParameterValue.TooLarge", cvm.ImportImage, wish(ImageName="x" * 61))
refused("InvalidParameter.InvalidParameterUrlError", cvm.ImportImage, wish(ImageUrl="img.qcow2"))
refused("MissingParameter", cvm.ImportImage, wish(ImageName=None))


def poll(look, done):
    for _ in range(3000):
        found = look()
        if found in done:
            return found
        time.sleep(0.02)
    raise AssertionError(f"still {found}")


image = cvm.ImportImage(wish()).ImageId
refused("InvalidImageName.Duplicate", cvm.ImportImage, wish())
by_id = request(models.DescribeImagesRequest, ImageIds=[image])
state = poll(lambda: cvm.DescribeImages(by_id).ImageSet[0].ImageState, ("NORMAL", "IMPORTFAILED"))
assert state == "NORMAL", state
described = cvm.DescribeImages(by_id).ImageSet[0]
assert (described.ImageName, described.Platform, described.ImageSize) == ("by-sdk", "Debian", 1)

cvm.ModifyImageAttribute(request(models.ModifyImageAttributeRequest, ImageId=image, ImageName="renamed"))
assert cvm.DescribeImages(by_id).ImageSet[0].ImageName == "renamed"

buy = request(models.RunInstancesRequest, Placement={"Zone": "ap-guangzhou-6"}, ImageId=image, InstanceCount=2,
              InstanceName="sdk", ClientToken="once", UserData="I2Nsb3VkLWNvbmZpZwo=")
ids = cvm.RunInstances(buy).InstanceIdSet
assert len(ids) == 2 and cvm.RunInstances(buy).InstanceIdSet == ids
of_them = request(models.DescribeInstancesStatusRequest, InstanceIds=ids)


def states():
    return {entry.InstanceState for entry in cvm.DescribeInstancesStatus(of_them).InstanceStatusSet}


poll(lambda: states() == {"RUNNING"}, (True,))
named = request(models.DescribeInstancesRequest, Filters=[{"Name": "instance-name", "Values": ["sdk"]}])
found = cvm.DescribeInstances(named)
assert found.TotalCount == 2 and found.InstanceSet[0].Placement.Zone == "ap-guangzhou-6"
one = request(models.StopInstancesRequest, InstanceIds=ids[:1])
cvm.StopInstances(one)
poll(lambda: states() == {"RUNNING", "STOPPED"}, (True,))
cvm.StartInstances(request(models.StartInstancesRequest, InstanceIds=ids[:1]))
poll(lambda: states() == {"RUNNING"}, (True,))
cvm.TerminateInstances(request(models.TerminateInstancesRequest, InstanceIds=ids))
assert cvm.DescribeInstances(models.DescribeInstancesRequest()).TotalCount == 0

cvm.DeleteImages(request(models.DeleteImagesRequest, ImageIds=[image]))
refused("InvalidImageId.NotFound", cvm.DeleteImages, request(models.DeleteImagesRequest, ImageIds=[image]))
print("all good")
