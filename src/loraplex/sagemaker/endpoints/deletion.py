"""Deletes an endpoint with all that belongs to it."""

from dataclasses import dataclass

from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.resources import Inventory, Resource, describe_component, describe_endpoint
from loraplex.sagemaker.endpoints.waiting import BUSY, Report, wait_until_deletable, wait_until_gone

ORDER = ("scaling policy", "scalable target", "adapter", "base component", "endpoint", "alarm", "config", "model")
COMPONENTS = ("adapter", "base component")
# What AWS deletes in its own time: kind -> the call that shows how far it is.
DESCRIBED = {"adapter": describe_component, "base component": describe_component, "endpoint": describe_endpoint}


@dataclass(frozen=True)
class Left:
    """A resource that was not deleted, and the reason."""

    resource: Resource
    reason: str


def delete(aws: Aws, name: str, found: Inventory, report: Report) -> list[Left]:
    """Delete all of the inventory and return what is left. Goes on after an error.

    Waits for the components and the endpoint. While a component exists, its endpoint is kept; while the endpoint
    exists, its config and model are kept."""
    left: list[Left] = []
    for kind in ("endpoint", *COMPONENTS):
        for one in found.of(kind):
            what, status = f"{kind} {one.name}", one.state.partition(",")[0]
            if status in BUSY and not aws.is_dry:
                report(f"{what} is {status}: AWS deletes it only when that is over")
                wait_until_deletable(aws, DESCRIBED[kind](one.name), what, report)
    for kind in ORDER:
        resources = found.of(kind)
        components = [one.resource.name for one in left if one.resource.kind in COMPONENTS]
        if kind == "endpoint" and components:
            left += [Left(one, f"its component {components[0]} is left") for one in resources]
            continue
        if kind in ("config", "model") and any(one.resource.kind == "endpoint" for one in left):
            left += [Left(one, "the endpoint that uses it is left") for one in resources]
            continue
        deleted = [one for one in resources if _delete_one(aws, one, left, report)]
        describe = DESCRIBED.get(kind)
        if describe is None or aws.is_dry:
            continue
        for one in deleted:
            remains = wait_until_gone(aws, describe(one.name), f"{kind} {one.name}", report)
            if remains is not None:
                left.append(Left(one, f"its status is {remains}"))
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
