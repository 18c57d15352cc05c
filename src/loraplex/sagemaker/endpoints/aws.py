"""Makes calls to AWS through boto3, and turns its errors into ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.remedies import remedy_of

MISSING_CODES = ("ValidationException", "ObjectNotFoundException", "ResourceNotFoundException", "ResourceNotFound")
S3_MISSING_CODES = ("404", "NoSuchBucket", "NoSuchKey")
MISSING = ("could not find", "cannot find", "does not exist", "not found", "no scalable target", "no scaling policy")
READS_OR_DELETES = ("Describe", "List", "Head", "Delete", "Deregister")
READ_TIMEOUT_S = 90  # SageMaker itself waits 60 s for a container


class AwsError(ConfigurationError):
    """AWS refused a call, or was not reached. The message has the call, AWS's code and its message."""

    def __init__(self, call: Call, aws_code: str, message: str) -> None:
        super().__init__(call.action, f"{aws_code}: {message}", remedy=remedy_of(aws_code, message))
        self.aws_code = aws_code
        self._may_be_missing = call.operation.startswith(READS_OR_DELETES)

    @property
    def is_missing(self) -> bool:
        """Whether what the call names does not exist. SageMaker has no code for it.

        Only calls that read or delete can say so: others name more than one thing."""
        text = self.message.lower()
        is_text = self.aws_code in MISSING_CODES and any(one in text for one in MISSING)
        return self._may_be_missing and (is_text or self.aws_code in S3_MISSING_CODES)


class Aws:
    """One account and region.

    show:     takes each call that would change something, instead of AWS.
    offline:  with `show`: nothing is read either, as if nothing existed.
    attempts: at a call that AWS throttles or does not answer.
    made:     (action, ARN or name) of all that was created.
    """

    def __init__(
        self,
        *,
        region: str | None = None,
        profile: str | None = None,
        show: Callable[[Call], None] | None = None,
        offline: bool = False,
        attempts: int = 4,
    ) -> None:
        self.made: list[tuple[str, str]] = []
        self.show = show
        self._region, self._profile, self._offline, self._attempts = region, profile, offline, attempts
        self._clients: dict[str, Any] = {}

    @property
    def is_dry(self) -> bool:
        return self.show is not None

    def region(self) -> str:
        """Return the region's name. Raises AwsError if none is set."""
        return str(self._client(Call("sagemaker", "DescribeEndpoint", {})).meta.region_name)

    def run(self, call: Call) -> dict[str, Any]:
        """Make the call and return AWS's answer, or show it. Raises AwsError."""
        if self.show is not None and call.changes:
            self.show(call)
            return {}
        client = self._client(call)
        with translated(call):
            answer: dict[str, Any] = getattr(client, call.method)(**call.parameters)
        if call.operation.startswith(("Create", "Put", "Register")):
            names = [value for key, value in answer.items() if key.lower().endswith("arn")]
            names += [value for key, value in call.parameters.items() if key.endswith(("Name", "ResourceId"))]
            self.made.append((call.action, names[0]))
        return answer

    def find(self, call: Call) -> dict[str, Any] | None:
        """Make a call that reads; return None if what it names does not exist."""
        if self._offline:
            return None
        try:
            return self.run(call)
        except AwsError as error:
            if error.is_missing:
                return None
            raise

    def pages(self, call: Call, key: str) -> Iterator[dict[str, Any]]:
        """Yield the items under `key` of all pages of a listing."""
        if self._offline:
            return
        token = "nextToken" if call.service == "logs" else "NextToken"
        parameters = dict(call.parameters)
        while True:
            page = self.run(Call(call.service, call.operation, parameters))
            yield from page.get(key) or ()
            if not page.get(token):
                return
            parameters[token] = page[token]

    def _client(self, call: Call) -> Any:
        if call.service not in self._clients:
            try:
                import boto3
                from botocore.config import Config
            except ImportError:
                raise ConfigurationError(
                    "boto3", "is missing, and all calls to AWS need it", remedy="pip install 'loraplex[aws]'"
                ) from None
            config = Config(
                connect_timeout=10,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
            )
            with translated(call):
                session = boto3.session.Session(region_name=self._region, profile_name=self._profile)
                self._clients[call.service] = session.client(call.service, config=config)
        return self._clients[call.service]


@contextmanager
def translated(call: Call) -> Iterator[None]:
    """Raise botocore's errors as AwsError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        found = error.response.get("Error", {})
        message = found.get("Message") or error.response.get("OriginalMessage") or str(error)
        raise AwsError(call, found.get("Code", "Error"), message) from None
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is not a URL
        name = type(error).__name__.removesuffix("Error")
        raise AwsError(call, name, str(error)) from None
