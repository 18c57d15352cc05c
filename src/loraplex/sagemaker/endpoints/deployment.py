"""What an endpoint should be, and the calls that make it so. Names are derived from the content, so that running
twice makes nothing twice."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex.errors import ConfigurationError, quoted
from loraplex.sagemaker.endpoints.calls import Call

TAG = "loraplex:endpoint"
VARIANT = "AllTraffic"
ARCHIVE = ".tar.gz"
METRICS_PATH = "/metrics"
CUDA_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"  # the only one whose driver runs the CUDA 13.0 of our image
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+")
VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
OBJECT = re.compile(r"s3://[^/\s]+/\S+")
FOLDER = re.compile(r"s3://[^/\s]+(/\S*)?")
HASH_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """An endpoint with one model. Raises ConfigurationError for what AWS would refuse only after minutes.

    model_data:       an archive (`….tar.gz`) or a folder (`…/`) on S3.
    ami:              the version of the machines' AMI. None: CUDA_AMI for machines with a GPU, else AWS's default.
    startup_timeout:  seconds, 60 to 3600, for the download and, again, for the container's start.
    components:       the model is a base inference component, beside which adapters can be components.
    memory_mb, accelerators:  what a copy of the base component reserves of its machine.
    max_instances:    with components: the machines that AWS may add for more copies.
    volume_kms_key:   encrypts the machine's volume. kms_key: encrypts what the endpoint writes to S3.
    metrics:          AWS scrapes the server's /metrics.
    """

    name: str
    role: str
    image: str
    model_data: str
    instance_type: str = "ml.g5.2xlarge"
    instances: int = 1
    ami: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    volume_gb: int | None = None
    startup_timeout: int = 900
    components: bool = False
    memory_mb: int = 1024
    accelerators: int = 1
    max_instances: int | None = None
    async_output: str | None = None
    data_capture: str | None = None
    capture_percent: int = 100
    kms_key: str | None = None
    volume_kms_key: str | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    metrics: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        longest = 63 - (len("-base") if self.components else 0)
        check("NAME", self.name, NAME.fullmatch(self.name) and len(self.name) <= longest, NAME_RULE.format(longest))
        check("--role", self.role, ROLE.fullmatch(self.role), "arn:aws:iam::123456789012:role/NAME")
        is_image = re.fullmatch(r"\S{1,255}", self.image) and "://" not in self.image
        check("--image", self.image, is_image, "123456789012.dkr.ecr.REGION.amazonaws.com/NAME:TAG, without https://")
        is_data = OBJECT.fullmatch(self.model_data) and self.model_data.endswith((ARCHIVE, "/"))
        check("--model-data", self.model_data, is_data, f"s3://BUCKET/NAME{ARCHIVE}, or s3://BUCKET/FOLDER/ with a '/'")
        check("--instance-type", self.instance_type, self.instance_type.startswith("ml."), "one as ml.g5.2xlarge")
        check("--instances", self.instances, self.instances >= 1, "1 or more")
        check("--startup-timeout", self.startup_timeout, 60 <= self.startup_timeout <= 3600, "60 to 3600 seconds")
        check("--volume-size", self.volume_gb, self.volume_gb is None or 1 <= self.volume_gb <= 512, "1 to 512 GB")
        check("--memory", self.memory_mb, self.memory_mb >= 128, "128 MB or more")
        check("--accelerators", self.accelerators, self.accelerators >= 0, "0 or more")
        check("--capture-percent", self.capture_percent, 0 <= self.capture_percent <= 100, "0 to 100")
        if self.max_instances is not None:
            is_more = self.components and self.max_instances >= self.instances
            rule = "a number not below --instances, beside --inference-components; for other endpoints: autoscale"
            check("--max-instances", self.max_instances, is_more, rule)
        for option, url in (("--async-output", self.async_output), ("--data-capture", self.data_capture)):
            check(option, url, url is None or FOLDER.fullmatch(url), "s3://BUCKET/FOLDER")
        for name, value in self.env.items():
            check("--env", name, VARIABLE.fullmatch(name), "NAME=VALUE, with a name of letters, digits and '_'")
            check(f"--env {name}", f"{len(value)} characters", len(value) <= 1024, "at most 1024 characters")
        for key in self.tags:
            is_ours = key.lower().startswith(("aws:", "loraplex:"))
            check("--tag", key, key and not is_ours, "KEY=VALUE; keys with aws: and loraplex: are reserved")
        is_vpc = bool(self.subnets) == bool(self.security_groups)
        check("--subnet", list(self.subnets), is_vpc, "--subnet and --security-group together")

    # Names

    @property
    def model_name(self) -> str:
        content = (self.image, self.model_data, self.role, dict(self.env), self._vpc(), self.metrics)
        return _derived(self.name, "model", content)

    @property
    def config_name(self) -> str:
        content: tuple[object, ...] = (
            *(
                self.instance_type,
                self.instances,
                self.ami or default_ami(self.instance_type),
                self.volume_gb,
                self.volume_kms_key,
                self.kms_key,
            ),
            *(self.async_output, self.data_capture, self.data_capture and self.capture_percent, self.metrics),
        )
        if self.components:
            content += ("components", self.max_instances, self.role, self._vpc())
        else:
            content += (self.model_name, self.startup_timeout)
        return _derived(self.name, "config", content)

    @property
    def component_name(self) -> str:
        """The base inference component's name."""
        return base_component(self.name)

    # Calls

    def create_model(self) -> Call:
        container: dict[str, Any] = {"Image": self.image}
        if self.model_data.endswith("/"):
            source = {"S3Uri": self.model_data, "S3DataType": "S3Prefix", "CompressionType": "None"}
            container["ModelDataSource"] = {"S3DataSource": source}
        else:
            container["ModelDataUrl"] = self.model_data
        if self.env:
            container["Environment"] = dict(self.env)
        if self.metrics:
            container["ContainerMetricsConfig"] = {"MetricsEndpoints": [{"MetricsEndpointPath": METRICS_PATH}]}
        parameters = {
            "ModelName": self.model_name,
            "ExecutionRoleArn": self.role,
            "PrimaryContainer": container,
            **self._vpc(),
            "Tags": self.all_tags(),
        }
        return Call("sagemaker", "CreateModel", parameters)

    def create_config(self) -> Call:
        variant: dict[str, Any] = {
            "VariantName": VARIANT,
            "InstanceType": self.instance_type,
            "InitialInstanceCount": self.instances,
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }
        if ami := self.ami or default_ami(self.instance_type):
            variant["InferenceAmiVersion"] = ami
        if self.volume_gb is not None:
            variant["VolumeSizeInGB"] = self.volume_gb
        if not self.components:
            variant |= {"ModelName": self.model_name, "InitialVariantWeight": 1.0, **self._timeouts()}
        elif self.max_instances is not None:
            limits = {"MinInstanceCount": self.instances, "MaxInstanceCount": self.max_instances}
            variant["ManagedInstanceScaling"] = {"Status": "ENABLED", **limits}
        parameters: dict[str, Any] = {"EndpointConfigName": self.config_name, "ProductionVariants": [variant]}
        if self.components:
            parameters |= {"ExecutionRoleArn": self.role, **self._vpc()}
        key = {} if self.kms_key is None else {"KmsKeyId": self.kms_key}
        if self.volume_kms_key is not None:
            parameters["KmsKeyId"] = self.volume_kms_key
        if self.async_output is not None:
            parameters["AsyncInferenceConfig"] = {"OutputConfig": {"S3OutputPath": self.async_output, **key}}
        if self.data_capture is not None:
            parameters["DataCaptureConfig"] = {
                "EnableCapture": True,
                "InitialSamplingPercentage": self.capture_percent,
                "DestinationS3Uri": self.data_capture,
                "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
                **key,
            }
        parameters["MetricsConfig"] = {"EnableDetailedObservability": self.metrics}  # AWS's default is True
        return Call("sagemaker", "CreateEndpointConfig", {**parameters, "Tags": self.all_tags()})

    def create_endpoint(self) -> Call:
        names = {"EndpointName": self.name, "EndpointConfigName": self.config_name}
        return Call("sagemaker", "CreateEndpoint", {**names, "Tags": self.all_tags()})

    def component_specification(self) -> dict[str, Any]:
        needs: dict[str, Any] = {"MinMemoryRequiredInMb": self.memory_mb}
        if self.accelerators:
            needs["NumberOfAcceleratorDevicesRequired"] = self.accelerators
        return {
            "ModelName": self.model_name,
            "StartupParameters": self._timeouts(),
            "ComputeResourceRequirements": needs,
        }

    def create_component(self) -> Call:
        parameters = {
            "InferenceComponentName": self.component_name,
            "EndpointName": self.name,
            "VariantName": VARIANT,
            "Specification": self.component_specification(),
            "RuntimeConfig": {"CopyCount": 1},
            "Tags": self.all_tags(),
        }
        return Call("sagemaker", "CreateInferenceComponent", parameters)

    def all_tags(self) -> list[dict[str, str]]:
        return tags_of(self.name, self.tags)

    def _timeouts(self) -> dict[str, int]:
        return {
            "ModelDataDownloadTimeoutInSeconds": self.startup_timeout,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.startup_timeout,
        }

    def _vpc(self) -> dict[str, Any]:
        vpc = {"SecurityGroupIds": sorted(self.security_groups), "Subnets": sorted(self.subnets)}
        return {"VpcConfig": vpc} if self.subnets else {}


NAME_RULE = "letters, digits and '-', at most {} characters, with a letter or digit at both ends"


def check(option: str, value: object, is_right: object, rule: str) -> None:
    """Raise ConfigurationError unless the option's value is right. rule: what is possible."""
    if not is_right:
        raise ConfigurationError(option, f"{quoted(value)} is not possible", remedy=f"use {rule}")


def _derived(name: str, kind: str, content: object) -> str:
    """Return a name of at most 63 characters that begins with `stem_of(name)`."""
    digest = hashlib.sha256(json.dumps([name, kind, content], sort_keys=True).encode()).hexdigest()
    return f"{stem_of(name)}-{digest[:HASH_CHARACTERS]}"


def stem_of(name: str) -> str:
    """Return the beginning of the names of the endpoint's models and configs. Other endpoints may share it."""
    return name[: 63 - 1 - HASH_CHARACTERS]


def default_ami(instance_type: str) -> str | None:
    return CUDA_AMI if instance_type.startswith(("ml.g", "ml.p")) else None


def base_component(endpoint: str) -> str:
    return f"{endpoint}-base"


def tags_of(endpoint: str, tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the tags of all that belongs to an endpoint, in AWS's form."""
    return [{"Key": key, "Value": value} for key, value in {**tags, TAG: endpoint}.items()]


def from_described(
    endpoint: str,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    component: Mapping[str, Any] | None,
    tags: Mapping[str, str],
) -> Deployment:
    """Return the deployment that AWS describes: the reverse of the calls above.

    component:  what DescribeInferenceComponent says of the base component; None where the endpoint has none. Raises
    ConfigurationError where Loraplex cannot have made the endpoint."""
    variant, container = config["ProductionVariants"][0], model.get("PrimaryContainer") or {}
    names = [one["VariantName"] for one in config["ProductionVariants"]]
    if names != [VARIANT] or "InstanceType" not in variant or "Image" not in container:
        raise ConfigurationError(
            f"endpoint {endpoint}",
            f"is not such as loraplex sagemaker deploy makes: one variant {VARIANT} of machines, one image",
            remedy="choose another name; change and delete that endpoint with what made it",
        )
    vpc, capture = model.get("VpcConfig") or {}, config.get("DataCaptureConfig") or {}
    output = (config.get("AsyncInferenceConfig") or {}).get("OutputConfig") or {}
    startup: Mapping[str, Any] = variant
    needs: Mapping[str, Any] = {}
    if component is not None:
        startup = component["Specification"].get("StartupParameters") or {}
        needs = component["Specification"].get("ComputeResourceRequirements") or {}
    ami = variant.get("InferenceAmiVersion")
    source = (container.get("ModelDataSource") or {}).get("S3DataSource") or {}
    return Deployment(
        name=endpoint,
        role=model["ExecutionRoleArn"],
        image=container["Image"],
        model_data=container.get("ModelDataUrl") or source.get("S3Uri") or "",
        instance_type=variant["InstanceType"],
        instances=variant["InitialInstanceCount"],
        ami=None if ami == default_ami(variant["InstanceType"]) else ami,  # the default follows the machine
        env=container.get("Environment") or {},
        volume_gb=variant.get("VolumeSizeInGB"),
        startup_timeout=startup.get("ContainerStartupHealthCheckTimeoutInSeconds", 900),
        components=component is not None,
        memory_mb=int(needs.get("MinMemoryRequiredInMb", 1024)),
        accelerators=int(needs.get("NumberOfAcceleratorDevicesRequired", 0 if needs else 1)),
        max_instances=(variant.get("ManagedInstanceScaling") or {}).get("MaxInstanceCount"),
        async_output=output.get("S3OutputPath"),
        data_capture=capture.get("DestinationS3Uri"),
        capture_percent=capture.get("InitialSamplingPercentage", 100),
        kms_key=output.get("KmsKeyId") or capture.get("KmsKeyId"),
        volume_kms_key=config.get("KmsKeyId"),
        subnets=tuple(vpc.get("Subnets") or ()),
        security_groups=tuple(vpc.get("SecurityGroupIds") or ()),
        metrics=bool((config.get("MetricsConfig") or {}).get("EnableDetailedObservability")),
        tags={key: value for key, value in tags.items() if not key.startswith(("aws:", "loraplex:"))},
    )
