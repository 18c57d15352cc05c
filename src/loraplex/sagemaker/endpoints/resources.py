"""What belongs to an endpoint in the account. It is found by names and tags, so that no file must remember it."""

from dataclasses import dataclass, field
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.alarms import alarm_names
from loraplex.sagemaker.endpoints.autoscaling import NAMESPACE, component_target, variant_target
from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import TAG, base_component, stem_of


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One thing in the account. state: AWS's word for it, or its settings. delete: the call that deletes it."""

    kind: str
    name: str
    arn: str
    delete: Call
    state: str = ""


@dataclass
class Inventory:
    """All that belongs to an endpoint.

    endpoint:  what DescribeEndpoint says; None if there is no such endpoint.
    problems:  why some of it could not be looked up."""

    endpoint: dict[str, Any] | None
    resources: list[Resource] = field(default_factory=list)
    problems: list[AwsError] = field(default_factory=list)

    def of(self, kind: str) -> list[Resource]:
        return [one for one in self.resources if one.kind == kind]


def describe_endpoint(name: str) -> Call:
    return Call("sagemaker", "DescribeEndpoint", {"EndpointName": name})


def describe_config(name: str) -> Call:
    return Call("sagemaker", "DescribeEndpointConfig", {"EndpointConfigName": name})


def describe_component(name: str) -> Call:
    return Call("sagemaker", "DescribeInferenceComponent", {"InferenceComponentName": name})


def tags_at(aws: Aws, arn: str) -> dict[str, str]:
    found = aws.pages(Call("sagemaker", "ListTags", {"ResourceArn": arn}), "Tags")
    return {tag["Key"]: tag["Value"] for tag in found}


def find_endpoint(aws: Aws, name: str) -> dict[str, Any] | None:
    """Return what DescribeEndpoint says, or None. Raises ConfigurationError if the endpoint is not Loraplex's."""
    found = aws.find(describe_endpoint(name))
    if found is not None and tags_at(aws, found["EndpointArn"]).get(TAG) != name:
        raise ConfigurationError(
            f"endpoint {name}",
            "exists, and was not made by loraplex sagemaker deploy",
            remedy="choose another name; change and delete that endpoint with what made it",
        )
    return found


def known_endpoint(aws: Aws, name: str) -> dict[str, Any]:
    """Return what DescribeEndpoint says. Raises ConfigurationError if there is no such endpoint."""
    found = find_endpoint(aws, name)
    if found is None:
        raise ConfigurationError(
            f"endpoint {name}",
            f"does not exist in {aws.region()}",
            remedy="check the name and --region; loraplex sagemaker deploy makes an endpoint",
        )
    return found


def has_components(aws: Aws, endpoint: dict[str, Any]) -> bool:
    """Return whether the endpoint's models are inference components: then its variant names no model."""
    config = aws.find(describe_config(endpoint["EndpointConfigName"]))
    return config is None or "ModelName" not in config["ProductionVariants"][0]


def inventory(aws: Aws, name: str) -> Inventory:
    """Look up all that belongs to the endpoint `name`, also where the endpoint itself does not exist.

    Raises AwsError where not even the endpoint can be looked up, and ConfigurationError where it is not Loraplex's."""
    found = Inventory(find_endpoint(aws, name))
    for look in (_endpoint, _components, scaling_of, _alarms, _configs, _models):
        try:
            found.resources += look(aws, name, found.endpoint)
        except AwsError as error:
            found.problems.append(error)
    return found


def _components(aws: Aws, name: str, endpoint: dict[str, Any] | None) -> list[Resource]:
    if endpoint is None or not has_components(aws, endpoint):
        return []
    listing = aws.pages(
        Call("sagemaker", "ListInferenceComponents", {"EndpointNameEquals": name}), "InferenceComponents"
    )
    base = base_component(name)
    return [
        Resource(
            kind="base component" if one["InferenceComponentName"] == base else "adapter",
            name=one["InferenceComponentName"],
            arn=one["InferenceComponentArn"],
            state=one.get("InferenceComponentStatus", ""),
            delete=Call(
                "sagemaker", "DeleteInferenceComponent", {"InferenceComponentName": one["InferenceComponentName"]}
            ),
        )
        for one in listing
    ]


def scaling_of(aws: Aws, name: str, endpoint: dict[str, Any] | None = None) -> list[Resource]:
    """Return the endpoint's autoscaling. Both kinds are asked for, because the endpoint and its config may be gone."""
    found: list[Resource] = []
    scaled = [variant_target(name).resource, component_target(base_component(name)).resource]
    for resource in scaled:
        listing = Call(NAMESPACE, "DescribeScalingPolicies", {"ServiceNamespace": "sagemaker", "ResourceId": resource})
        for one in aws.pages(listing, "ScalingPolicies"):
            delete = Call(NAMESPACE, "DeleteScalingPolicy", {"PolicyName": one["PolicyName"], **_place_of(one)})
            target = one.get("TargetTrackingScalingPolicyConfiguration", {}).get("TargetValue")
            state = "" if target is None else f"{target:g} concurrent requests each"
            arn = one["PolicyARN"]
            found.append(Resource(kind="scaling policy", name=one["PolicyName"], arn=arn, state=state, delete=delete))
    listing = Call(NAMESPACE, "DescribeScalableTargets", {"ServiceNamespace": "sagemaker", "ResourceIds": scaled})
    for one in aws.pages(listing, "ScalableTargets"):
        delete = Call(NAMESPACE, "DeregisterScalableTarget", _place_of(one))
        state, arn = f"{one['MinCapacity']} to {one['MaxCapacity']}", one.get("ScalableTargetARN", "")
        found.append(Resource(kind="scalable target", name=one["ResourceId"], arn=arn, state=state, delete=delete))
    return found


def _place_of(described: dict[str, Any]) -> dict[str, Any]:
    return {key: described[key] for key in ("ServiceNamespace", "ResourceId", "ScalableDimension")}


def _endpoint(aws: Aws, name: str, endpoint: dict[str, Any] | None) -> list[Resource]:
    if endpoint is None:
        return []
    variants = [
        f"{one.get('CurrentInstanceCount', 0)} of {one.get('DesiredInstanceCount', 0)} instances"
        for one in endpoint.get("ProductionVariants", ())
    ]
    state = ", ".join((endpoint["EndpointStatus"], *variants))
    delete = Call("sagemaker", "DeleteEndpoint", {"EndpointName": name})
    return [Resource(kind="endpoint", name=name, arn=endpoint["EndpointArn"], state=state, delete=delete)]


def _alarms(aws: Aws, name: str, endpoint: dict[str, Any] | None) -> list[Resource]:
    call = Call("cloudwatch", "DescribeAlarms", {"AlarmNames": alarm_names(name), "AlarmTypes": ["MetricAlarm"]})
    return [
        Resource(
            kind="alarm",
            name=one["AlarmName"],
            arn=one["AlarmArn"],
            state=one.get("StateValue", ""),
            delete=Call("cloudwatch", "DeleteAlarms", {"AlarmNames": [one["AlarmName"]]}),
        )
        for one in aws.pages(call, "MetricAlarms")
    ]


def _configs(aws: Aws, name: str, endpoint: dict[str, Any] | None) -> list[Resource]:
    listing = aws.pages(Call("sagemaker", "ListEndpointConfigs", {"NameContains": stem_of(name)}), "EndpointConfigs")
    return [
        Resource(
            kind="config",
            name=one["EndpointConfigName"],
            arn=one["EndpointConfigArn"],
            state="in use" if endpoint and endpoint["EndpointConfigName"] == one["EndpointConfigName"] else "",
            delete=Call("sagemaker", "DeleteEndpointConfig", {"EndpointConfigName": one["EndpointConfigName"]}),
        )
        for one in listing
        if _is_of(aws, name, one["EndpointConfigName"], one["EndpointConfigArn"])
    ]


def _models(aws: Aws, name: str, endpoint: dict[str, Any] | None) -> list[Resource]:
    listing = aws.pages(Call("sagemaker", "ListModels", {"NameContains": stem_of(name)}), "Models")
    return [
        Resource(
            kind="model",
            name=one["ModelName"],
            arn=one["ModelArn"],
            delete=Call("sagemaker", "DeleteModel", {"ModelName": one["ModelName"]}),
        )
        for one in listing
        if _is_of(aws, name, one["ModelName"], one["ModelArn"])
    ]


def _is_of(aws: Aws, endpoint: str, name: str, arn: str) -> bool:
    """The beginning of the name saves a call for each thing of others; the tag decides."""
    return name.startswith(f"{stem_of(endpoint)}-") and tags_at(aws, arn).get(TAG) == endpoint
