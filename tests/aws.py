"""An account on AWS: moto, with what moto lacks, every call checked against AWS's own model of it, and failures on
demand."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import boto3
from botocore.config import Config
from botocore.exceptions import NoRegionError
from moto import mock_aws
from moto.applicationautoscaling.models import ScalableDimensionValueSet
from moto.sagemaker.models import FakeEndpointConfig, SageMakerModelBackend, sagemaker_backends

ACCOUNT, REGION = "123456789012", "us-east-1"
BUCKET = "models"
DATA = f"s3://{BUCKET}/support/1/model.tar.gz"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/loraplex"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/loraplex:1"


class NoComponent(Exception):
    """A request to an endpoint with components names none."""


class Account:
    """calls: (service, operation, parameters) of all calls. failing: operation -> (code, message)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.failing: dict[str, tuple[str, str]] = {}
        self.components: dict[str, dict[str, Any]] = {}
        self.component_tags: dict[str, Any] = {}
        self.statuses: list[str] = []  # the next ones of the endpoint; the last one stays
        self.reason = ""
        self.filled: dict[str, Any] = {}  # defaults that AWS fills into a config's variant
        self.metrics: dict[str, Any] = {}  # config -> its MetricsConfig
        self.component_statuses: dict[str, list[str]] = {}  # as `statuses`, by component
        self.is_rolling_back = False

    def changes(self) -> list[str]:
        """The operations that change something, in their order, and no others."""
        return [name for _, name, _ in self.calls if not name.startswith(("Describe", "List", "Head", "Filter"))]

    def sent(self, operation: str) -> dict[str, Any]:
        """The parameters of the only call of this operation."""
        [parameters] = [parameters for _, name, parameters in self.calls if name == operation]
        return parameters

    def resources(self) -> set[str]:
        """ARNs or names of all that exists."""
        sagemaker, scaling = boto3.client("sagemaker", REGION), boto3.client("application-autoscaling", REGION)
        calls, self.calls = self.calls, []
        failing, self.failing = self.failing, {}
        found = {one["EndpointArn"] for one in sagemaker.list_endpoints()["Endpoints"]}
        found |= {one["EndpointConfigArn"] for one in sagemaker.list_endpoint_configs()["EndpointConfigs"]}
        found |= {one["ModelArn"] for one in sagemaker.list_models()["Models"]}
        targets = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        found |= {one["ScalableTargetARN"] for one in targets}
        policies = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        found |= {one["PolicyARN"] for one in policies}
        found |= {one["AlarmArn"] for one in boto3.client("cloudwatch", REGION).describe_alarms()["MetricAlarms"]}
        self.calls, self.failing = calls, failing
        return found | set(self.components)

    # Hooks of botocore

    def note(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.calls.append((model.service_model.service_name, model.name, params))
        if model.name == "CreateEndpointConfig":
            self.metrics[params["EndpointConfigName"]] = params.get("MetricsConfig")
        if model.input_shape is not None:
            check(params, model.input_shape, model.name)

    def answer(self, model: Any, **_: Any) -> Any:
        given = self.calls[-1][2]
        if model.name in self.failing:
            return refusal(*self.failing[model.name])
        answer = getattr(self, f"_do_{model.name}", None)
        if answer is None:
            return None
        try:
            return mock.Mock(status_code=200), answer(given)
        except NoComponent:
            message = (
                "Inference Component Name header is required for endpoints to which you plan to deploy inference "
                "components. Please include Inference Component Name header or consider using SageMaker models."
            )
            return refusal("ValidationError", message)
        except KeyError as error:
            return refusal("ValidationException", f'Could not find inference component "{error.args[0]}".')

    def set_status(self, parsed: dict[str, Any], **_: Any) -> None:
        if "EndpointStatus" in parsed and self.statuses:
            parsed["EndpointStatus"] = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            parsed["FailureReason"] = self.reason

    def fill_in(self, parsed: dict[str, Any], **_: Any) -> None:
        """A config as AWS describes it, with its defaults."""
        if "ProductionVariants" in parsed:
            parsed["ProductionVariants"][0] = {**self.filled, **parsed["ProductionVariants"][0]}
            given = self.metrics.get(parsed["EndpointConfigName"]) or {}
            parsed["MetricsConfig"] = {"EnableDetailedObservability": True, **given}

    # What moto does not implement

    def _do_UpdateEndpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        endpoint = sagemaker_backends[ACCOUNT][REGION].endpoints[given["EndpointName"]]
        if "DeploymentConfig" in given:
            check_batch(given["DeploymentConfig"], endpoint.production_variants[0]["CurrentInstanceCount"])
        if not self.is_rolling_back:
            endpoint.endpoint_config_name = given["EndpointConfigName"]
        return {}

    def _do_CreateInferenceComponent(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["InferenceComponentName"]
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:inference-component/{name}"
        more: dict[str, Any] = {"InferenceComponentArn": arn, "InferenceComponentStatus": "InService"}
        if "RuntimeConfig" in given:
            more["RuntimeConfig"] = {"CurrentCopyCount": given["RuntimeConfig"]["CopyCount"]}
        self.components[name] = {**given, **more}
        return {"InferenceComponentArn": arn}

    def _do_UpdateInferenceComponent(self, given: dict[str, Any]) -> dict[str, Any]:
        if "DeploymentConfig" in given:
            runtime = self.components[given["InferenceComponentName"]]["RuntimeConfig"]
            check_batch(given["DeploymentConfig"], runtime["CurrentCopyCount"])
        if not self.is_rolling_back:
            self.components[given["InferenceComponentName"]]["Specification"] = given["Specification"]
        return {}

    def _do_DescribeInferenceComponent(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["InferenceComponentName"]
        statuses = self.component_statuses.get(name) or ["InService"]
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        self.components[name]["InferenceComponentStatus"] = status
        return self.components[name]

    def _do_DeleteInferenceComponent(self, given: dict[str, Any]) -> dict[str, Any]:
        status = self.components[given["InferenceComponentName"]]["InferenceComponentStatus"]
        assert status in ("InService", "Failed"), f"a component is deleted while it is {status}"
        del self.components[given["InferenceComponentName"]]
        return {}

    def _do_ListInferenceComponents(self, given: dict[str, Any]) -> dict[str, Any]:
        endpoint = given["EndpointNameEquals"]
        for name in self.components:
            self._do_DescribeInferenceComponent({"InferenceComponentName": name})
        return {"InferenceComponents": [one for one in self.components.values() if one["EndpointName"] == endpoint]}

    def _do_InvokeEndpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("InferenceComponentName")
        if name is None and self.components:
            raise NoComponent
        return {"Body": io.BytesIO(json.dumps({"component": name}).encode())}

    def _do_InvokeEndpointAsync(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"OutputLocation": "s3://models/answers/1.out"}

    def _do_DeleteEndpoint(self, given: dict[str, Any]) -> Any:
        assert not any(one["EndpointName"] == given["EndpointName"] for one in self.components.values())
        sagemaker_backends[ACCOUNT][REGION].delete_endpoint(given["EndpointName"])
        return {}


def refusal(code: str, message: str) -> tuple[Any, dict[str, Any]]:
    return mock.Mock(status_code=400), {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {}}


def check_batch(deployment: dict[str, Any], count: int) -> None:
    """AWS replaces 5 to 50 % of the instances or copies at once."""
    if policy := deployment.get("RollingUpdatePolicy"):
        value = policy["MaximumBatchSize"]["Value"]
        assert 0.05 * count <= value <= 0.5 * count, f"a batch of {value} of {count}"


def check(value: Any, shape: Any, where: str) -> None:
    """Compare a value with AWS's model in what botocore leaves to AWS: patterns, choices and lengths."""
    if shape.type_name == "structure":
        for key, item in value.items():
            check(item, shape.members[key], f"{where}.{key}")
    elif shape.type_name in ("list", "map"):
        assert shape.metadata.get("min", 0) <= len(value) <= shape.metadata.get("max", len(value)), where
        for item in value.values() if shape.type_name == "map" else value:
            check(item, shape.value if shape.type_name == "map" else shape.member, where)
    elif shape.type_name == "string":
        pattern = shape.metadata.get("pattern", "").replace(r"\p{L}\p{Z}\p{N}", r"\w\s")
        pattern = "" if r"\u" in pattern or r"\p" in pattern else pattern  # Java's classes of characters
        assert not pattern or re.fullmatch(pattern, value, re.DOTALL), f"{where}: {value!r} is not {pattern}"
        assert not shape.enum or value in shape.enum, f"{where}: {value!r} is none of {shape.enum}"
        assert shape.metadata.get("min", 0) <= len(value) <= shape.metadata.get("max", len(value)), where
    elif shape.type_name in ("integer", "float", "double"):
        assert shape.metadata.get("min", value) <= value <= shape.metadata.get("max", value), f"{where}: {value}"


_clients: dict[Any, Any] = {}  # kept for all tests, because reading AWS's models takes long
_current: Account


def connected(session: Any, service: str, region: str | None = None, **options: Any) -> Any:
    """A client whose calls the current account sees."""
    region = region or session.region_name
    if region is None:
        raise NoRegionError
    key = (service, region, session.get_credentials() is None)
    if key not in _clients:
        options["config"] = Config(retries={"total_max_attempts": 1})
        client = _clients[key] = _make(session, service, region, **options)
        events = client.meta.events
        events.register("provide-client-params.*.*", lambda **given: _current.note(**given))
        events.register("before-call.*.*", lambda **given: _current.answer(**given))
        events.register("after-call.sagemaker.DescribeEndpointConfig", lambda **given: _current.fill_in(**given))
        events.register("after-call.sagemaker.DescribeEndpoint", lambda **given: _current.set_status(**given))
    return _clients[key]


_make = boto3.session.Session.client


@contextmanager
def account() -> Iterator[Account]:
    """boto3 in this process reaches only this account, in which there is a bucket with model data."""
    global _current
    found = _current = Account()
    dimensions = [*ScalableDimensionValueSet, SimpleNamespace(value="sagemaker:inference-component:DesiredCopyCount")]
    environment = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": REGION}
    with (
        mock.patch.dict("os.environ", environment),
        mock_aws(),
        # Its list of machines is old, and it does not know variants without a model.
        mock.patch.object(FakeEndpointConfig, "validate_instance_type"),
        mock.patch.object(SageMakerModelBackend, "validate_production_variants"),
        mock.patch("moto.applicationautoscaling.models.ScalableDimensionValueSet", dimensions),
        mock.patch("moto.applicationautoscaling.responses.ScalableDimensionValueSet", dimensions),
        mock.patch.object(boto3.session.Session, "client", connected),
    ):
        s3 = boto3.client("s3", REGION)
        s3.create_bucket(Bucket=BUCKET)
        data = ("support/1/model.tar.gz", "support/2/model.tar.gz", "folder/config.json")
        for key in (*data, "isFraud/1/adapter.tar.gz", "isFraud/2/adapter.tar.gz"):
            s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
        found.calls.clear()
        yield found
