"""Makes and updates endpoints."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.alarms import alarm_calls, alarm_names
from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.data import check_data
from loraplex.sagemaker.endpoints.deployment import Deployment, base_component, check, from_described
from loraplex.sagemaker.endpoints.resources import (
    describe_component,
    describe_config,
    describe_endpoint,
    find_endpoint,
    inventory,
    known_endpoint,
    tags_at,
)
from loraplex.sagemaker.endpoints.waiting import (
    BUSY,
    Report,
    endpoint_failure,
    rolled_back,
    wait_for_component,
    wait_for_endpoint,
)


def describe_model(name: str) -> Call:
    return Call("sagemaker", "DescribeModel", {"ModelName": name})


def deploy(aws: Aws, wanted: Deployment, *, wait: bool, report: Report) -> None:
    """Make the endpoint, with its model and config; make what is missing of it where it is half-made.

    Raises ConfigurationError where an endpoint of the name exists with other settings, and AwsError."""
    name = wanted.name
    found = find_endpoint(aws, name)
    if found is not None:
        _check_same(aws, wanted, found)
    elif not aws.is_dry and (warning := check_data(aws, wanted.model_data)):
        report(warning)
    _ensure(aws, describe_model(wanted.model_name), wanted.create_model())
    _ensure(aws, describe_config(wanted.config_name), wanted.create_config())
    if found is None:
        aws.run(wanted.create_endpoint())
    else:
        report(f"endpoint {name} exists with these settings")
    if aws.is_dry:
        if wanted.components:
            aws.run(wanted.create_component())
        return
    if wait:
        wait_for_endpoint(aws, name, report)
    if not wanted.components:
        return
    if not wait:
        report(f"when endpoint {name} is in service, run this command again: it makes the base component")
        return
    _ensure(aws, describe_component(wanted.component_name), wanted.create_component())
    again = f"then loraplex sagemaker delete {name}, and deploy again"
    wait_for_component(aws, wanted.component_name, report, again=again)


def _ensure(aws: Aws, describe: Call, create: Call) -> None:
    if aws.find(describe) is None:
        aws.run(create)


def _check_same(aws: Aws, wanted: Deployment, found: Mapping[str, Any]) -> None:
    """Raise ConfigurationError unless the endpoint that exists is the wanted one and can still come into service."""
    name, status = wanted.name, found["EndpointStatus"]
    if status == "Deleting":
        remedy = "wait until loraplex sagemaker status finds no endpoint, and deploy again"
        raise ConfigurationError(f"endpoint {name}", "is being deleted", remedy=remedy)
    if status not in ("InService", *BUSY):
        raise endpoint_failure(aws, name, found)
    is_same = found["EndpointConfigName"] == wanted.config_name
    if is_same and wanted.components and aws.find(describe_component(wanted.component_name)) is not None:
        is_same = read_deployment(aws, found).component_specification() == wanted.component_specification()
    if not is_same:
        raise ConfigurationError(
            f"endpoint {name}",
            "exists with other settings",
            remedy=f"change it: loraplex sagemaker update {name} …; what update has no option for: loraplex sagemaker "
            f"delete {name}, and deploy again; or choose another name",
        )


def read_deployment(aws: Aws, endpoint: Mapping[str, Any]) -> Deployment:
    """Return what the endpoint is now. Raises AwsError where its config or model was deleted by hand."""
    config, component, model = _described(aws, endpoint)
    tags = tags_at(aws, endpoint["EndpointArn"])
    return from_described(endpoint["EndpointName"], config, aws.run(describe_model(model)), component, tags)


def _described(aws: Aws, endpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """Return the endpoint's config, its base component, and its model's name."""
    config = aws.run(describe_config(endpoint["EndpointConfigName"]))
    component, model = None, config["ProductionVariants"][0].get("ModelName")
    if model is None:
        component = aws.run(describe_component(base_component(endpoint["EndpointName"])))
        model = component["Specification"]["ModelName"]
    return config, component, model


def _in_use(aws: Aws, name: str) -> tuple[str, str]:
    """Return the names of the config and the model that the endpoint has now."""
    endpoint = aws.run(describe_endpoint(name))
    return endpoint["EndpointConfigName"], _described(aws, endpoint)[2]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How an update replaces instances.

    alarms:       names of CloudWatch alarms; one that goes off brings the old endpoint back.
    make_alarms:  make Loraplex's own two alarms, and use them too.
    batch:        instances that are replaced at once; by default a quarter, at least one.
    bake_s:       seconds for which the alarms are watched after each batch.
    """

    alarms: tuple[str, ...] = ()
    make_alarms: bool = False
    max_errors: int = 5
    max_latency_s: float = 5.0
    batch: int | None = None
    bake_s: int = 120

    def check(self, count: int) -> None:
        """Raise ConfigurationError for what AWS would refuse. count: instances, or copies of the base component."""
        check("--bake", self.bake_s, 0 <= self.bake_s <= 3600, "0 to 3600 seconds")
        least, most = math.ceil(count / 20), max(1, count // 2)
        rule = f"{least} to {most}: AWS replaces 5 to 50 % of {count} at once"
        check("--batch", self.batch, self.batch is None or least <= self.batch <= most, rule)

    def has_alarms(self) -> bool:
        return bool(self.alarms) or self.make_alarms

    def policy(self, name: str, num_instances: int, unit: str) -> dict[str, Any]:
        """Return the DeploymentConfig. AWS replaces 5 to 50 % at once: a single instance gets a second one beside it,
        which takes all requests, before the first is stopped."""
        names = [*self.alarms, *(alarm_names(name) if self.make_alarms else ())]
        policy: dict[str, Any] = {}
        if names:
            policy["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": one} for one in dict.fromkeys(names)]}
        if num_instances < 2:
            routing = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": self.bake_s}
            policy["BlueGreenUpdatePolicy"] = {
                "TrafficRoutingConfiguration": routing,
                "TerminationWaitInSeconds": self.bake_s,
            }
        else:
            batch = {"Type": unit, "Value": self.batch or max(1, num_instances // 4)}
            policy["RollingUpdatePolicy"] = {"MaximumBatchSize": batch, "WaitIntervalInSeconds": self.bake_s}
        return policy


def update(
    aws: Aws,
    name: str,
    changes: Mapping[str, Any],
    rollout: Rollout,
    *,
    wait: bool,
    report: Report,
    set_env: Mapping[str, str] | None = None,
    unset_env: Collection[str] = (),
) -> bool:
    """Change the endpoint without a pause, and return whether anything was to change.

    changes:  fields of Deployment. What is no longer used is deleted after success. Raises ConfigurationError where the
    endpoint is missing, busy or failed, and where AWS rolled the update back."""
    found = known_endpoint(aws, name)
    _check_free(aws, name, found)
    current = read_deployment(aws, found)
    env = {key: value for key, value in {**current.env, **(set_env or {})}.items() if key not in unset_env}
    wanted = replace(current, **changes, env=env)
    if "model_data" in changes and (warning := check_data(aws, wanted.model_data)):
        report(warning)
    count = _count(aws, current, found)
    rollout.check(count)
    if rollout.make_alarms:
        for call in alarm_calls(
            name,
            has_components=wanted.components,
            max_errors=rollout.max_errors,
            max_latency_s=rollout.max_latency_s,
        ):
            aws.run(call)
    # Both as AWS describes them: a default that AWS filled in, or a name that was derived otherwise, is no change.
    is_other_config = wanted.config_name != current.config_name
    is_other_component = wanted.components and (wanted.component_specification() != current.component_specification())
    if not is_other_config and not is_other_component:
        _prune(aws, name, _in_use(aws, name), report)  # what a failed update left
        return False
    is_other_model = is_other_component if wanted.components else is_other_config
    if is_other_model:
        _ensure(aws, describe_model(wanted.model_name), wanted.create_model())
    if is_other_config:
        _ensure(aws, describe_config(wanted.config_name), wanted.create_config())
        aws.run(_update_endpoint(wanted, count, changes, rollout))
        if wait and not aws.is_dry:
            after = wait_for_endpoint(aws, name, report)
            if after["EndpointConfigName"] != wanted.config_name:
                _prune(aws, name, _in_use(aws, name), report)
                raise rolled_back(f"endpoint {name}", after)
        elif is_other_component and not aws.is_dry:
            report(f"when endpoint {name} is in service, run this command again: it updates the base component")
            return True
    if is_other_component:
        if count == 1 and rollout.has_alarms():
            report(f"{wanted.component_name} has one copy: AWS watches no alarms while it replaces a single copy")
        aws.run(_update_component(wanted, count, rollout))
        if wait and not aws.is_dry:
            wait_for_component(aws, wanted.component_name, report, again="then update again")
            component = aws.run(describe_component(wanted.component_name))
            model = component["Specification"]["ModelName"]
            specification = read_deployment(aws, known_endpoint(aws, name)).component_specification()
            if {**specification, "ModelName": model} != wanted.component_specification():
                _prune(aws, name, _in_use(aws, name), report)
                raise rolled_back(f"component {wanted.component_name}", component)
    if wait or aws.is_dry:
        config, model = _in_use(aws, name)
        if aws.is_dry:  # what it would use
            config = wanted.config_name if is_other_config else config
            model = wanted.model_name if is_other_model else model
        _prune(aws, name, (config, model), report)
    return True


def _count(aws: Aws, current: Deployment, found: Mapping[str, Any]) -> int:
    """Return how many copies of the base component, or else instances, there are now."""
    if current.components:
        component = aws.run(describe_component(current.component_name))
        return (component.get("RuntimeConfig") or {}).get("CurrentCopyCount") or 1
    return found["ProductionVariants"][0].get("CurrentInstanceCount") or 1


def _check_free(aws: Aws, name: str, found: Mapping[str, Any]) -> None:
    status = found["EndpointStatus"]
    if status in (*BUSY, "Deleting"):
        remedy = "wait until loraplex sagemaker status shows InService, and run the command again"
        raise ConfigurationError(f"endpoint {name}", f"cannot be changed while it is {status}", remedy=remedy)
    if status != "InService":
        raise endpoint_failure(aws, name, found)


def _update_endpoint(wanted: Deployment, num_instances: int, changes: Mapping[str, Any], rollout: Rollout) -> Call:
    """The call keeps what autoscaling chose, unless the user says otherwise."""
    parameters: dict[str, Any] = {
        "EndpointName": wanted.name,
        "EndpointConfigName": wanted.config_name,
        "RetainAllVariantProperties": True,
    }
    if "instances" in changes:
        parameters["ExcludeRetainedVariantProperties"] = [{"VariantPropertyType": "DesiredInstanceCount"}]
    if not wanted.components:  # a component has a rollout of its own
        parameters["DeploymentConfig"] = rollout.policy(wanted.name, num_instances, "INSTANCE_COUNT")
    return Call("sagemaker", "UpdateEndpoint", parameters)


def _update_component(wanted: Deployment, num_copies: int, rollout: Rollout) -> Call:
    parameters: dict[str, Any] = {
        "InferenceComponentName": wanted.component_name,
        "Specification": wanted.component_specification(),
    }
    if num_copies > 1:  # one copy is 100 %, and AWS takes 5 to 50 %
        parameters["DeploymentConfig"] = rollout.policy(wanted.name, num_copies, "COPY_COUNT")
    return Call("sagemaker", "UpdateInferenceComponent", parameters)


def _prune(aws: Aws, name: str, used: tuple[str, str], report: Report) -> None:
    """Delete the endpoint's configs and models that are not used. What cannot be deleted is told: `delete` finds it."""
    found = inventory(aws, name)
    for one in (*found.of("config"), *found.of("model")):
        if one.name not in used:
            try:
                aws.run(one.delete)
            except AwsError as error:
                report(f"{one.kind} {one.name} is left: {error}")
