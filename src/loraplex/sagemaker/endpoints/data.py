"""Checks that the data exists on S3 that an endpoint loads."""

from urllib.parse import urlsplit

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import ARCHIVE
from loraplex.sagemaker.endpoints.remedies import ROLE_POLICY


def check_data(aws: Aws, url: str) -> str | None:
    """Raise ConfigurationError where what an endpoint loads is missing on S3, or in another region than the endpoint.

    Return why it could not be looked up, or None. The role may be allowed to read what the user may not."""
    place = urlsplit(url)
    bucket, key = place.netloc, place.path.removeprefix("/")
    try:
        found = aws.run(Call("s3", "HeadBucket", {"Bucket": bucket}))
        region = found.get("BucketRegion") or aws.region()
        if region != aws.region():
            raise ConfigurationError(
                url,
                f"is in {region}, and the endpoint would be in {aws.region()}",
                remedy=f"copy it into a bucket in {aws.region()}, or give --region {region}",
            )
        if key.endswith(ARCHIVE):
            aws.run(Call("s3", "HeadObject", {"Bucket": bucket, "Key": key}))
        elif not aws.run(Call("s3", "ListObjectsV2", {"Bucket": bucket, "Prefix": key, "MaxKeys": 1})).get("KeyCount"):
            raise ConfigurationError(url, "holds no objects", remedy="loraplex sagemaker pack writes it")
    except AwsError as error:
        if error.is_missing:
            raise ConfigurationError(
                url, f"does not exist ({error.message})", remedy="check the URL; loraplex sagemaker pack writes it"
            ) from None
        if error.aws_code in ("403", "AccessDenied"):
            return f"{url} was not checked: {error.message}; the role must be allowed to read it ({ROLE_POLICY})"
        raise
    return None
