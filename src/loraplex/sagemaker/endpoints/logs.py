"""Reads the containers' log from CloudWatch."""

import time
from collections import deque
from collections.abc import Iterator

from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.calls import Call

POLL_S = 3.0
LATE_MS = 60_000  # CloudWatch may show an event this much later than another


def log_group(endpoint: str, component: str | None = None) -> str:
    if component is not None:
        return f"/aws/sagemaker/InferenceComponents/{component}"
    return f"/aws/sagemaker/Endpoints/{endpoint}"


def log_events(aws: Aws, group: str, since_s: float, *, follow: bool = False) -> Iterator[tuple[float, str, str]]:
    """Yield (seconds since 1970, stream, message) of what was logged in the last `since_s` seconds.

    follow:  go on for ever with what is logged from now on. Raises AwsError, also where there is no log yet."""
    start = int((time.time() - since_s) * 1000)
    seen: set[str] = set()
    while True:
        call = Call("logs", "FilterLogEvents", {"logGroupName": group, "startTime": start})
        newest, found = start, set()
        for event in aws.pages(call, "events"):
            found.add(event["eventId"])
            newest = max(newest, event["timestamp"])
            if event["eventId"] not in seen:
                yield event["timestamp"] / 1000, event["logStreamName"], event["message"].rstrip("\n")
        if not follow:
            return
        seen, start = found, max(start, newest - LATE_MS)
        time.sleep(POLL_S)


def last_lines(aws: Aws, group: str, num_lines: int = 20, since_s: float = 3600) -> list[str]:
    """Return the end of the log; nothing where it cannot be read, because another error is told already."""
    try:
        return [message for _, _, message in deque(log_events(aws, group, since_s), num_lines)]
    except AwsError:
        return []
