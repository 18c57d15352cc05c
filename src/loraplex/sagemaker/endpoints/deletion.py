"""Deletes an endpoint with all that belongs to it."""

from dataclasses import dataclass

from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.resources import Inventory, Resource, describe_component, describe_endpoint
from loraplex.sagemaker.endpoints.waiting import BUSY, Report, wait_until_deletable, wait_until_gone

ORDER = ("scaling policy", "scalable target", "adapter", "base component", "endpoint", "alarm", "config", "model")
# What AWS deletes in its own time: kind -> the call that shows how far it is.
DESCRIBED = {"adapter": describe_component, "base component": describe_component, "endpoint": describe_endpoint}


@dataclass(frozen=True)
class Left:
    """What was not deleted, and why."""

    resource: Resource
    reason: str


def delete(aws: Aws, name: str, found: Inventory, report: Report) -> list[Left]:
    """Delete all of the inventory and return what is left. Goes on after an error.

    Waits for the components and the endpoint: while the endpoint exists, its config and model are kept."""
    left: list[Left] = []
    status = "" if found.endpoint is None else found.endpoint["EndpointStatus"]
    if status in BUSY and not aws.is_dry:
        report(f"endpoint {name} is {status}: AWS deletes it only when that is over")
        wait_until_deletable(aws, name, report)
    for kind in ORDER:
        resources = found.of(kind)
        if kind in ("config", "model") and any(one.resource.kind == "endpoint" for one in left):
            left += [Left(one, "the endpoint that uses it is left") for one in resources]
            continue
        deleted = [one for one in resources if _delete_one(aws, one, left, report)]
        describe = DESCRIBED.get(kind)
        if describe is None or aws.is_dry:
            continue
        for one in deleted:
            status = wait_until_gone(aws, describe(one.name), f"{kind} {one.name}", report)
            if status is not None:
                left.append(Left(one, f"its status is {status}"))
    return left


def _delete_one(aws: Aws, one: Resource, left: list[Left], report: Report) -> bool:
    """Return whether it is deleted, or is being deleted. What is gone already counts."""
    try:
        if not one.state.startswith("Deleting"):
            aws.run(one.delete)
    except AwsError as error:
        if not error.is_missing:
            left.append(Left(one, str(error)))
            return False
    if not aws.is_dry:
        report(f"deleted {one.kind} {one.name}")
    return True
