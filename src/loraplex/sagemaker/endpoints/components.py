"""Adapters as inference components: SageMaker loads each of them into the base component's container, through the
container's `POST /adapters`."""

from collections.abc import Mapping
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.aws import Aws
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.data import check_data
from loraplex.sagemaker.endpoints.deployment import ARCHIVE, NAME, NAME_RULE, OBJECT, base_component, check, tags_of
from loraplex.sagemaker.endpoints.resources import describe_component, known_endpoint
from loraplex.sagemaker.endpoints.waiting import Report, rolled_back, wait_for_component, wait_until_gone


def add_adapter(aws: Aws, endpoint: str, name: str, url: str, *, wait: bool, report: Report) -> None:
    """Load the adapter at `url` into the endpoint under `name`, or replace the adapter of this name.

    Done twice, it changes nothing. Raises ConfigurationError where the endpoint has no base component, or another
    endpoint has a component of this name."""
    check("NAME", name, NAME.fullmatch(name), NAME_RULE.format(63))
    check("URL", url, OBJECT.fullmatch(url) and url.endswith(ARCHIVE), f"s3://BUCKET/NAME{ARCHIVE}")
    base = base_component(endpoint)
    known_endpoint(aws, endpoint)
    if aws.find(describe_component(base)) is None:
        raise ConfigurationError(
            f"endpoint {endpoint}",
            f"has no base component {base}",
            remedy="deploy it with --inference-components; other endpoints load adapters from their model data, or "
            "through the server's own routes",
        )
    if warning := check_data(aws, url):
        report(warning)
    specification = {"BaseInferenceComponentName": base, "Container": {"ArtifactUrl": url}}
    names = {"InferenceComponentName": name}
    found = aws.find(describe_component(name))
    if found is None:
        more = {"EndpointName": endpoint, "Specification": specification, "Tags": tags_of(endpoint, {})}
        aws.run(Call("sagemaker", "CreateInferenceComponent", {**names, **more}))
    elif found["EndpointName"] != endpoint or name == base:
        raise ConfigurationError(
            f"component {name}", f"belongs to endpoint {found['EndpointName']}", remedy="choose another name"
        )
    elif _source_of(found) != (base, url):
        aws.run(Call("sagemaker", "UpdateInferenceComponent", {**names, "Specification": specification}))
    else:
        report(f"{endpoint} has {name} from {url}")
    if wait and not aws.is_dry:
        again = f"then loraplex sagemaker adapter remove {endpoint} {name}, and add it again"
        wait_for_component(aws, name, report, again=again)
        found = aws.run(describe_component(name))
        if _source_of(found) != (base, url):
            raise rolled_back(f"component {name}", found)


def _source_of(component: Mapping[str, Any]) -> tuple[object, object]:
    """Return an adapter's base component and URL. AWS answers with the image as an object, the URL as text."""
    found = component.get("Specification") or {}
    return found.get("BaseInferenceComponentName"), (found.get("Container") or {}).get("ArtifactUrl")


def remove_adapter(aws: Aws, endpoint: str, name: str, report: Report) -> bool:
    """Unload an adapter from the endpoint; return False if there is none of this name."""
    found = aws.find(describe_component(name))
    if found is None:
        return False
    if found["EndpointName"] != endpoint or name == base_component(endpoint):
        raise ConfigurationError(
            f"component {name}",
            f"is not an adapter of {endpoint}",
            remedy="loraplex sagemaker status shows the endpoint's adapters; delete removes the base component",
        )
    aws.run(Call("sagemaker", "DeleteInferenceComponent", {"InferenceComponentName": name}))
    if not aws.is_dry:
        wait_until_gone(aws, describe_component(name), f"component {name}", report)
    return True
