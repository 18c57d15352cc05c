"""Waits until AWS has made, changed or deleted something, and says how far it is."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.aws import Aws
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.logs import last_lines, log_group
from loraplex.sagemaker.endpoints.remedies import remedy_of
from loraplex.sagemaker.endpoints.resources import describe_component, describe_endpoint

POLL_S = 10.0
REPEAT_S = 60.0  # after which an unchanged status is reported again
BUSY = ("Creating", "Updating", "SystemUpdating", "RollingBack")  # SageMaker refuses to change or delete it

Report = Callable[[str], None]


def wait_for_endpoint(aws: Aws, name: str, report: Report) -> dict[str, Any]:
    """Return what DescribeEndpoint says when the endpoint is in service. Raises ConfigurationError with AWS's reason
    and the end of the container's log where it fails."""
    answer = _settled(aws, describe_endpoint(name), "EndpointStatus", f"endpoint {name}", report)
    if answer is None or answer["EndpointStatus"] != "InService":
        raise endpoint_failure(aws, name, answer)
    return answer


def wait_for_component(aws: Aws, name: str, report: Report, *, again: str) -> None:
    """Return when the inference component is in service. Raises as `wait_for_endpoint` does.

    again:  what the user does then, after the cause is gone."""
    what = f"component {name}"
    answer = _settled(aws, describe_component(name), "InferenceComponentStatus", what, report)
    if answer is None or answer["InferenceComponentStatus"] != "InService":
        status = "gone" if answer is None else answer["InferenceComponentStatus"]
        raise _failure(aws, what, status, answer, log_group("", name), again)


def wait_until_deletable(aws: Aws, call: Call, what: str, report: Report) -> None:
    """Return when the creation or update of what the call describes is over, or it does not exist."""
    _settled(aws, call, _status_key(call), what, report)


def wait_until_gone(aws: Aws, call: Call, what: str, report: Report) -> str | None:
    """Return None when what the call describes is deleted, or AWS's status if AWS gives up."""
    key = _status_key(call)
    answer = _settled(aws, call, key, what, report, ("Deleting", *BUSY))
    return None if answer is None else str(answer[key])


def _status_key(call: Call) -> str:
    return "EndpointStatus" if call.operation == "DescribeEndpoint" else "InferenceComponentStatus"


def endpoint_failure(aws: Aws, name: str, answer: Mapping[str, Any] | None) -> ConfigurationError:
    """Return the error for an endpoint that did not come into service."""
    status = "gone" if answer is None else answer["EndpointStatus"]
    again = f"then loraplex sagemaker delete {name}, and deploy again"
    return _failure(aws, f"endpoint {name}", status, answer, log_group(name), again)


def rolled_back(what: str, answer: Mapping[str, Any]) -> ConfigurationError:
    """Return the error for an update of which AWS kept nothing."""
    reason = answer.get("FailureReason") or "AWS gives no reason: an alarm went off, or the new container did not start"
    remedy = remedy_of("", reason)
    return ConfigurationError(
        what,
        f"the update was rolled back, and the endpoint serves as before: {reason}",
        remedy=f"{remedy}; loraplex sagemaker logs shows the container's log",
    )


def _failure(
    aws: Aws, what: str, status: str, answer: Mapping[str, Any] | None, group: str, again: str
) -> ConfigurationError:
    reason = (answer or {}).get("FailureReason") or "AWS gives no reason"
    lines = last_lines(aws, group)
    end = "".join(f"\n  {line}" for line in ("the last lines of its log:", *lines)) if lines else ""
    return ConfigurationError(what, f"{status}: {reason}{end}", remedy=f"{remedy_of('', reason)}; {again}")


def _settled(
    aws: Aws, call: Call, key: str, what: str, report: Report, busy: tuple[str, ...] = (*BUSY, "Deleting")
) -> dict[str, Any] | None:
    """Return the description as soon as its status is none of `busy`; None if there is nothing to describe."""
    start = told = time.monotonic()
    before = ""
    while True:
        answer = aws.find(call)
        status = "gone" if answer is None else answer[key]
        now = time.monotonic()
        if status != before or now - told >= REPEAT_S:
            report(f"{now - start:5.0f} s  {what}: {status}")
            before, told = status, now
        if answer is None or status not in busy:
            return answer
        time.sleep(POLL_S)
