"""CloudWatch alarms that end an update and bring the old endpoint back."""

from typing import Any

from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import VARIANT, base_component, tags_of

ERRORS, LATENCY = "Invocation5XXErrors", "ModelLatency"
PERIOD_S = 60


def alarm_name(endpoint: str, metric: str) -> str:
    return f"loraplex/{endpoint}/{metric}"


def alarm_names(endpoint: str) -> list[str]:
    return [alarm_name(endpoint, metric) for metric in (ERRORS, LATENCY)]


def alarm_calls(endpoint: str, *, has_components: bool, max_errors: int, max_latency_s: float) -> list[Call]:
    """Return the calls that make both alarms, or set them again.

    max_errors:     answers with a status from 500 on, in a minute.
    max_latency_s:  seconds that the container takes on average, in a minute."""
    dimensions = [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": VARIANT}]
    if has_components:
        dimensions = [{"Name": "InferenceComponentName", "Value": base_component(endpoint)}]
    measured: dict[str, dict[str, Any]] = {
        ERRORS: {"Statistic": "Sum", "Threshold": float(max_errors)},
        LATENCY: {"Statistic": "Average", "Threshold": max_latency_s * 1e6},  # AWS measures microseconds
    }
    return [
        Call(
            "cloudwatch",
            "PutMetricAlarm",
            {
                "AlarmName": alarm_name(endpoint, metric),
                "AlarmDescription": "Made by loraplex sagemaker update --make-alarms",
                "Namespace": "AWS/SageMaker",
                "MetricName": metric,
                "Dimensions": dimensions,
                "Period": PERIOD_S,
                "EvaluationPeriods": 1,
                "ComparisonOperator": "GreaterThanThreshold",
                "TreatMissingData": "notBreaching",
                **how,
                "Tags": tags_of(endpoint, {}),
            },
        )
        for metric, how in measured.items()
    ]
