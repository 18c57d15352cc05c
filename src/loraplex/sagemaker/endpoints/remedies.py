"""What a user can do about an answer of AWS's. AWS has few codes, so that the texts of its messages decide, too."""

import re

USER_POLICY = "docs/sagemaker-user-policy.json"
ROLE_POLICY = "docs/sagemaker-role-policy.json"

# (a regular expression over `CODE: message`, remedy). The first that matches is taken; its groups fill the remedy.
REMEDIES = (
    (
        r"Expired|has expired|SSOToken|TokenRetrieval|TokenLoad",
        "renew the credentials (such as aws sso login), and run the command again: it goes on where it stopped",
    ),
    (
        r"NoCredentials|PartialCredentials|CredentialRetrieval",
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; on AWS, give the machine a role",
    ),
    (r"NoRegion|InvalidRegion", "give --region, or set AWS_REGION"),
    (r"ProfileNotFound", "give --profile one of those that aws configure list-profiles shows"),
    (
        r"UnrecognizedClient|InvalidClientTokenId|InvalidAccessKeyId|Signature",
        "AWS does not know these keys: check AWS_PROFILE or AWS_ACCESS_KEY_ID, and this machine's clock",
    ),
    (
        r"iam:PassRole",
        f"allow iam:PassRole on the role of --role to the user of this command; {USER_POLICY} has the rights",
    ),
    (
        r"not authorized to perform: (?P<action>[\w-]+:\w+)",
        f"allow {{action}} to the user of this command; {USER_POLICY} has all rights that are needed",
    ),
    (
        r"(?i)assume role|AssumeRole|role arn|RoleArn|role.{0,200}(exists|does not exist|trust)",
        f"check --role: the role must exist in this account, and trust sagemaker.amazonaws.com; {ROLE_POLICY} has its "
        "rights",
    ),
    (
        r"(?is)model data|ModelDataUrl|ArtifactUrl|s3://|NoSuchBucket|NoSuchKey",
        "check the s3:// URL: the object must exist in the endpoint's region, and the role of --role must be allowed "
        f"to read it ({ROLE_POLICY})",
    ),
    (r"AccessDenied|403", f"allow this call to the user of this command; {USER_POLICY} has all rights that are needed"),
    (
        r"ResourceLimitExceeded.*?'(?P<quota>[^']+)'",
        "raise the quota '{quota}' in Service Quotas (service: Amazon SageMaker), use another --instance-type or fewer "
        "--instances, or delete what is not used",
    ),
    (
        r"ResourceLimitExceeded|LimitExceeded",
        "raise the quota that the message names in Service Quotas (service: Amazon SageMaker)",
    ),
    (
        r"(?i)insufficient\w*\s*capacity|capacity error",
        "AWS has no such machine free now: try again later, or use another --instance-type or region",
    ),
    (
        r"(?i)image|ecr\b|CannotStartContainer|repository",
        "check --image: it must be in a registry in the endpoint's region that the role may read, be built for "
        "linux/amd64, and start with `serve`",
    ),
    (
        r"(?i)ping health check|health check",
        "read the container's log (loraplex sagemaker logs), or raise --startup-timeout",
    ),
    (r"(?i)already exist", "choose another name, or delete that which has the name"),
    (
        r"(?i)in-progress|in progress|while.{0,60}(creating|updating|deleting)",
        "wait until loraplex sagemaker status shows InService or Failed, and run the command again",
    ),
    (
        r"(?i)could not find|not exist|NotFound",
        "check the name and the region; loraplex sagemaker status shows what exists",
    ),
    (r"(?i)thrott|TooManyRequests|ServiceUnavailable|Internal|Timeout|ModelNotReady", "try again later"),
    (
        r"ModelError|ModelStreamError",
        "the container answered with this error: read its remedy, and the log (loraplex sagemaker logs)",
    ),
    (r"ParamValidation|ValidationE", "change what the message names, and run the command again"),
    (
        r"EndpointConnection|Connect|HTTPClient|SSL|Proxy|Invalid endpoint|ValueError",
        "check the network, the region, and AWS_ENDPOINT_URL",
    ),
)


def remedy_of(code: str, message: str) -> str:
    """Return what to do about an error of AWS's, or about the reason that AWS gives for a failure."""
    for pattern, remedy in REMEDIES:
        if found := re.search(pattern, f"{code}: {message}", re.DOTALL):
            return remedy.format(**found.groupdict())
    return "change what the message names, and run the command again"
