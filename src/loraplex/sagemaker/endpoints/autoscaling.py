"""Scales an endpoint by its concurrent requests, through Application Auto Scaling."""

from dataclasses import dataclass
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import VARIANT

NAMESPACE = "application-autoscaling"
POLICY = "loraplex-concurrent-requests"


@dataclass(frozen=True)
class ScaledResource:
    """A variant or a component to scale, and AWS's metric of its concurrent requests, which comes every 10 seconds."""

    resource: str
    dimension: str
    metric: str

    def place(self) -> dict[str, Any]:
        return {"ServiceNamespace": "sagemaker", "ResourceId": self.resource, "ScalableDimension": self.dimension}


def variant_target(endpoint: str) -> ScaledResource:
    """The instances of an endpoint without components."""
    return ScaledResource(
        f"endpoint/{endpoint}/variant/{VARIANT}",
        "sagemaker:variant:DesiredInstanceCount",
        "SageMakerVariantConcurrentRequestsPerModelHighResolution",
    )


def component_target(component: str) -> ScaledResource:
    """The copies of a base inference component."""
    return ScaledResource(
        f"inference-component/{component}",
        "sagemaker:inference-component:DesiredCopyCount",
        "SageMakerInferenceComponentConcurrentRequestsPerCopyHighResolution",
    )


def autoscaling_calls(
    scaled: ScaledResource,
    *,
    least: int,
    most: int,
    concurrency: float,
    scale_in_s: int = 300,
    scale_out_s: int = 60,
) -> list[Call]:
    """Return the calls that keep `concurrency` requests in flight for each instance or copy. Made twice, they change
    nothing.

    least, most:  instances or copies. scale_in_s, scale_out_s: seconds between two changes. Raises
    ConfigurationError."""
    if not 1 <= least <= most:
        raise ConfigurationError(
            "--min, --max",
            f"{least} to {most} is not possible",
            remedy="use 1 <= --min <= --max; at 0 AWS counts no requests, and the endpoint never comes back",
        )
    if not concurrency > 0:
        raise ConfigurationError(
            "--target-concurrency", f"{concurrency:g} is not above 0", remedy="use a number above 0"
        )
    place = scaled.place()
    limits = {"MinCapacity": least, "MaxCapacity": most}
    tracking = {
        "TargetValue": concurrency,
        "PredefinedMetricSpecification": {"PredefinedMetricType": scaled.metric},
        "ScaleInCooldown": scale_in_s,
        "ScaleOutCooldown": scale_out_s,
    }
    policy = {
        "PolicyName": POLICY,
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": tracking,
    }
    return [
        Call(NAMESPACE, "RegisterScalableTarget", {**place, **limits}),
        Call(NAMESPACE, "PutScalingPolicy", {**place, **policy}),
    ]
