"""Endpoints on SageMaker: made, changed and deleted, in an account that moto and `aws.py` simulate."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

import aws
from aws import DATA, IMAGE, ROLE, Account
from loraplex.cli.main import app
from loraplex.errors import ConfigurationError
from loraplex.sagemaker.endpoints import waiting
from loraplex.sagemaker.endpoints.aws import Aws, AwsError
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import TAG, Deployment
from loraplex.sagemaker.endpoints.endpoint import read_deployment
from loraplex.sagemaker.endpoints.remedies import remedy_of
from loraplex.sagemaker.endpoints.resources import known_endpoint

DEPLOY = ("deploy", "support", "--role", ROLE, "--image", IMAGE, "--model-data", DATA)
COMPONENTS = (*DEPLOY, "--inference-components")
OTHER_DATA = DATA.replace("/1/", "/2/")
URL = "s3://models/isFraud/1/adapter.tar.gz"
ARN = f"arn:aws:sagemaker:{aws.REGION}:{aws.ACCOUNT}"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    monkeypatch.setattr(waiting, "POLL_S", 0.0)
    with aws.account() as found:
        yield found


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call fails the test. Quicker than an account."""

    def run(_: Aws, call: Call) -> None:
        pytest.fail(f"{call.action} is called")

    monkeypatch.setattr(Aws, "run", run)


def run(*arguments: str, code: int = 0, stdin: str = "") -> str:
    """The output of `loraplex sagemaker …`."""
    result = CliRunner().invoke(app, ["sagemaker", *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def lines_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


# Deploying


def test_deploying_twice_makes_nothing_twice(account: Account) -> None:
    output = run(*DEPLOY)
    made = account.resources()
    assert account.changes() == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert len(made) == 3 and all(f" {arn}\n" in output for arn in made)
    for operation in account.changes():
        assert {"Key": TAG, "Value": "support"} in account.sent(operation)["Tags"]
    account.calls.clear()
    assert "exists with these settings" in run(*DEPLOY)
    assert account.resources() == made and account.changes() == []


def test_what_is_half_made_is_completed(account: Account) -> None:
    account.failing = {"CreateEndpoint": ("ThrottlingException", "Rate exceeded")}
    output = run(*DEPLOY, code=1)
    assert "sagemaker:CreateEndpoint: ThrottlingException: Rate exceeded" in output
    assert f"{ARN}:model/support-" in output and "loraplex sagemaker delete support" in output
    account.failing, account.calls = {}, []
    run(*DEPLOY)
    assert account.changes() == ["CreateEndpoint"]


FULL = Deployment(
    name="support",
    role=ROLE,
    image=IMAGE,
    model_data="s3://models/folder/",
    instance_type="ml.m5.xlarge",
    instances=2,
    ami="al2-ami-sagemaker-inference-gpu-3-1",
    env={"LORAPLEX_DTYPE": "bfloat16", "HF_TOKEN": "hf_secret"},
    volume_gb=100,
    startup_timeout=1200,
    async_output="s3://models/answers",
    data_capture="s3://models/captured",
    capture_percent=20,
    kms_key="11111111-2222-3333-4444-555555555555",
    volume_kms_key="alias/volumes",
    subnets=("subnet-b", "subnet-a"),
    security_groups=("sg-1",),
    metrics=True,
    tags={"team": "support desk"},
)


@pytest.mark.parametrize("components", [False, True], ids=["model", "components"])
def test_aws_takes_every_option(components: bool) -> None:
    """The account compares each call with AWS's model."""
    wanted = replace(FULL, components=components, max_instances=4 if components else None)
    creates = [wanted.create_model(), wanted.create_config(), wanted.create_endpoint(), wanted.create_component()]
    for call in creates if components else creates[:3]:
        model = boto3.client("sagemaker", aws.REGION).meta.service_model.operation_model(call.operation)
        aws.check(call.parameters, model.input_shape, call.operation)
    [variant] = wanted.create_config().parameters["ProductionVariants"]
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    holder = creates[3].parameters["Specification"]["StartupParameters"] if components else variant
    assert holder["ContainerStartupHealthCheckTimeoutInSeconds"] == 1200
    assert holder["ModelDataDownloadTimeoutInSeconds"] == 1200


def test_the_command_passes_every_option_on(account: Account) -> None:
    options = (
        *("--instance-type", "ml.m5.xlarge", "--instances", "2", "--ami", str(FULL.ami)),
        *("--env", "LORAPLEX_DTYPE=bfloat16"),
        *("--env", "HF_TOKEN=hf_secret", "--volume-size", "100", "--startup-timeout", "1200", "--async-output"),
        *("s3://models/answers", "--data-capture", "s3://models/captured", "--capture-percent", "20", "--kms-key"),
        *(str(FULL.kms_key), "--volume-kms-key", "alias/volumes", "--subnet", "subnet-a", "--subnet", "subnet-b"),
        *("--security-group", "sg-1", "--metrics", "--tag", "team=support desk"),
    )
    output = run(*DEPLOY[:-1], FULL.model_data, *options, "--dry-run")
    shown = [(line["operation"], line["parameters"]) for line in lines_of(output)]
    calls = [FULL.create_model(), FULL.create_config(), FULL.create_endpoint()]
    assert shown == [(call.method, json.loads(call.to_json())["parameters"]) for call in calls]
    assert "hf_secret" not in output and '"HF_TOKEN": "***"' in output


def test_what_aws_describes_is_what_was_deployed(account: Account) -> None:
    run(
        *COMPONENTS,
        "--max-instances",
        "3",
        "--accelerators",
        "0",
        "--env",
        "A=b=c",
        "--tag",
        "team=x",
        "--ami",
        str(FULL.ami),
    )
    at = Aws(region=aws.REGION)
    found = read_deployment(at, known_endpoint(at, "support"))
    assert found == Deployment(
        name="support",
        role=ROLE,
        image=IMAGE,
        model_data=DATA,
        ami=FULL.ami,
        env={"A": "b=c"},
        components=True,
        max_instances=3,
        accelerators=0,
        tags={"team": "x"},
    )


def test_machines_with_a_gpu_get_the_driver_for_the_images_cuda(account: Account) -> None:
    run(*DEPLOY)
    run("update", "support", "--instance-type", "ml.m5.xlarge")
    run("update", "support", "--instance-type", "ml.p4d.24xlarge")
    run("update", "support", "--ami", "al2-ami-sagemaker-inference-gpu-3-1")
    configs = [sent["ProductionVariants"] for _, name, sent in account.calls if name == "CreateEndpointConfig"]
    newest = "al2023-ami-sagemaker-inference-gpu-4-1"
    amis = [variant.get("InferenceAmiVersion") for [variant] in configs]
    assert amis == [newest, None, newest, "al2-ami-sagemaker-inference-gpu-3-1"]


def test_a_variable_may_come_from_the_environment(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run(*DEPLOY, "--env", "HF_TOKEN")
    assert account.sent("CreateModel")["PrimaryContainer"]["Environment"] == {"HF_TOKEN": "hf_secret"}
    assert "'NO_SUCH' is not NAME=VALUE" in run(*DEPLOY, "--env", "NO_SUCH", code=2)


@pytest.mark.parametrize("option", ["NAME", "--role", "--image", "--model-data"])
def test_nothing_is_made_without_a_name_a_role_an_image_and_model_data(no_account: None, option: str) -> None:
    arguments = list(DEPLOY)
    at = 1 if option == "NAME" else arguments.index(option)
    del arguments[at : at + (1 if option == "NAME" else 2)]
    run(*arguments, code=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("NAME", "under_score"),
        ("NAME", "x" * 64),
        ("--role", "loraplex"),
        ("--image", "https://registry/image"),
        ("--model-data", "s3://models/folder"),
        ("--model-data", "model.tar.gz"),
        ("--instance-type", "g5.2xlarge"),
        ("--instances", "0"),
        ("--startup-timeout", "10"),
        ("--startup-timeout", "4000"),
        ("--volume-size", "1000"),
        ("--async-output", "bucket/answers"),
        ("--max-instances", "4"),
        ("--env", "A B=c"),
        ("--tag", "aws:x=y"),
        ("--subnet", "subnet-1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_call(no_account: None, option: str, value: str) -> None:
    arguments = list(DEPLOY)
    if option == "NAME":
        arguments[1] = value
    elif option in arguments:
        arguments[arguments.index(option) + 1] = value
    else:
        arguments += [option, value]
    output = run(*arguments, code=1)
    assert option in output and "remedy: use " in output


def test_model_data_that_is_missing_or_elsewhere_is_refused(account: Account) -> None:
    for url, text in (
        ("s3://models/nothing.tar.gz", "does not exist"),
        ("s3://no-such-bucket/model.tar.gz", "does not exist"),
        ("s3://models/no/folder/", "holds no objects"),
    ):
        output = run(*DEPLOY[:-1], url, code=1)
        assert f"{url}: {text}" in output and "loraplex sagemaker pack" in output
    boto3.client("s3", "eu-west-1").create_bucket(
        Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    account.calls.clear()
    output = run(*DEPLOY[:-1], "s3://far/model.tar.gz", code=1)
    assert "is in eu-west-1, and the endpoint would be in us-east-1" in output and "--region eu-west-1" in output
    assert account.changes() == []


def test_model_data_that_only_the_role_may_read_is_no_mistake(account: Account) -> None:
    account.failing = {"HeadBucket": ("403", "Forbidden")}
    assert "was not checked" in run(*DEPLOY)
    assert len(account.resources()) == 3


def test_an_endpoint_that_exists_is_not_changed_by_deploy(account: Account) -> None:
    run(*DEPLOY)
    account.calls.clear()
    output = run(*DEPLOY, "--instances", "2", code=1)
    assert "exists with other settings" in output and "loraplex sagemaker update support" in output
    assert "what update has no option for: loraplex sagemaker delete support, and deploy again" in output
    account.statuses = ["Failed"]
    output = run(*DEPLOY, "--instances", "2", code=1)
    assert "Failed" in output and "loraplex sagemaker delete support" in output, "AWS does not update it"
    account.statuses = []
    boto3.client("sagemaker", aws.REGION).delete_tags(ResourceArn=f"{ARN}:endpoint/support", TagKeys=[TAG])
    account.calls.clear()
    for arguments in (DEPLOY, ("delete", "support", "--yes"), ("update", "support", "--instances", "2")):
        output = run(*arguments, code=1)
        assert "was not made by loraplex" in output and TAG not in output
    assert account.changes() == []


@pytest.mark.parametrize("options", [("--memory", "2048"), ("--env", "A=1"), ("--startup-timeout", "600")])
def test_a_base_component_that_exists_is_not_changed_by_deploy(account: Account, options: tuple[str, str]) -> None:
    run(*COMPONENTS)
    account.calls.clear()
    run(*COMPONENTS)
    assert "exists with other settings" in run(*COMPONENTS, *options, code=1)
    assert account.changes() == []


def test_every_setting_has_a_part_in_the_names() -> None:
    """Else a change of it alone would be no change."""
    base = replace(FULL, async_output=None, data_capture="s3://models/b", subnets=("a",), metrics=False)
    others: dict[str, Any] = {
        **{"name": "other", "role": f"{ROLE}2", "image": f"{IMAGE}2", "model_data": DATA, "instances": 3},
        **{"instance_type": "ml.m5.large", "env": {"A": "1"}, "volume_gb": 200, "startup_timeout": 600},
        **{"ami": None},
        **{"async_output": "s3://models/a", "data_capture": "s3://models/c", "capture_percent": 30},
        **{"kms_key": "alias/a", "volume_kms_key": "alias/b", "subnets": ("c",), "security_groups": ("sg-2",)},
        **{"metrics": True, "components": True},
    }
    changed = {field: replace(base, **{field: value}).config_name for field, value in others.items()}
    assert len({base.config_name, *changed.values()}) == len(changed) + 1
    component = replace(base, components=True)
    assert replace(component, max_instances=5).config_name != component.config_name
    assert set(others) == set(Deployment.__dataclass_fields__) - {"tags", "max_instances", "memory_mb", "accelerators"}


def test_an_endpoint_that_is_being_made_is_waited_for(account: Account) -> None:
    run(*DEPLOY, "--no-wait")
    account.statuses = ["Creating", "Creating", "Creating", "InService"]
    account.calls.clear()
    output = run(*DEPLOY)
    assert re.search(r"\d s  endpoint support: Creating\n.*\d s  endpoint support: InService\n", output)
    assert output.count("Creating") == 1 and account.changes() == []
    account.statuses = ["SystemUpdating", "SystemUpdating", "RollingBack", "Updating", "InService"]
    output = run(*DEPLOY)
    assert re.findall(r"support: (\w+)", output) == ["SystemUpdating", "RollingBack", "Updating", "InService"]
    account.statuses = ["Deleting"]
    assert "is being deleted" in run(*DEPLOY, code=1)


REASON = (
    "The primary container for production variant AllTraffic did not pass the ping health check. Please check "
    "CloudWatch logs for this endpoint."
)


def test_a_failed_endpoint_shows_its_reason_and_its_log(account: Account) -> None:
    logs = boto3.client("logs", aws.REGION)
    group = "/aws/sagemaker/Endpoints/support"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="AllTraffic/i-1")
    now = int(time.time() * 1000)
    events = [{"timestamp": now - 1000 + i, "message": f"line {i}"} for i in range(30)]
    logs.put_log_events(logGroupName=group, logStreamName="AllTraffic/i-1", logEvents=events)
    account.statuses, account.reason = ["Creating", "Failed"], REASON
    output = run(*DEPLOY, code=1)
    assert f"endpoint support: Failed: {REASON}" in output and "line 29" in output and "line 5" not in output
    assert "raise --startup-timeout; then loraplex sagemaker delete support, and deploy again" in output
    assert f"{ARN}:endpoint/support" in output
    assert "Failed" in run(*DEPLOY, code=1), "a failed endpoint cannot be repaired"
    assert REASON in run("status", "support")
    run("delete", "support", "--yes")
    assert account.resources() == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_endpoint_and_says_how_to_go_on(
    account: Account, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    account.statuses = ["Creating"]

    def interrupt(_: float) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(time, "sleep", interrupt)
    output = run(*DEPLOY, code=130)
    assert f"{ARN}:endpoint/support" in output
    assert "loraplex sagemaker status support" in output and "loraplex sagemaker delete support" in output
    assert len(account.resources()) == 3


# Deleting


@pytest.mark.parametrize(
    "operation",
    [
        *("CreateModel", "CreateEndpointConfig", "CreateEndpoint", "CreateInferenceComponent"),
        *("DescribeEndpoint", "DescribeInferenceComponent", "HeadObject"),
    ],
)
def test_a_failed_deploy_leaves_nothing_that_delete_does_not_find(account: Account, operation: str) -> None:
    account.failing = {operation: ("ServiceUnavailable", "later")}
    output = run(*COMPONENTS, code=1)
    left = account.resources()
    named = [arn for arn in left if f" {arn}\n" in output or arn in account.components]
    assert sorted(named) == sorted(left), "what was made is listed"
    account.failing = {}
    run("delete", "support", "--yes")
    assert account.resources() == set()
    account.calls.clear()
    run("delete", "support", "--yes")
    assert account.changes() == []


def test_delete_deletes_all_in_an_order_that_aws_allows(account: Account) -> None:
    run(*COMPONENTS)
    for name in ("isFraud", "aaa", "zzz"):
        run("adapter", "add", "support", name, URL)
    run("autoscale", "support", "--max", "4", "--target-concurrency", "8")
    run("update", "support", "--model-data", OTHER_DATA, "--make-alarms")
    account.calls.clear()
    assert "Delete all of this?" in run("delete", "support", code=1, stdin="n\n")
    assert account.changes() == []
    shown = [line["operation"] for line in lines_of(run("delete", "support", "--dry-run"))]
    assert account.changes() == []
    run("delete", "support", stdin="y\n")
    assert account.resources() == set()
    assert [Call("", one, {}).method for one in account.changes()] == shown
    names = [name for name in shown if name != "delete_inference_component"]
    assert names == [
        *("delete_scaling_policy", "deregister_scalable_target", "delete_endpoint"),
        *("delete_alarms", "delete_alarms", "delete_endpoint_config", "delete_model"),
    ]
    assert list(account.components) == []


def test_delete_goes_on_after_an_error_and_lists_what_is_left(account: Account) -> None:
    run(*DEPLOY)
    run("autoscale", "support", "--max", "4", "--target-concurrency", "8")
    before = account.resources()
    account.failing = {
        "DeleteEndpoint": ("AccessDeniedException", "not authorized to perform: sagemaker:DeleteEndpoint"),
        "DeleteScalingPolicy": ("ThrottlingException", "Rate exceeded"),
    }
    output = run("delete", "support", "--yes", code=1)
    left = account.resources()
    assert len(before - left) == 1, "the scalable target is gone"
    assert all(arn in output for arn in left), "the config and the model of an endpoint that lives are kept, and listed"
    assert "allow sagemaker:DeleteEndpoint" in output and "loraplex sagemaker delete support" in output
    account.failing = {"ListModels": ("AccessDeniedException", "not authorized to perform: sagemaker:ListModels")}
    assert "not looked up: sagemaker:ListModels" in run("delete", "support", "--yes", code=1)
    account.failing = {}
    run("delete", "support", "--yes")
    assert account.resources() == set()


def test_delete_waits_for_an_endpoint_that_is_being_made(account: Account) -> None:
    run(*DEPLOY, "--no-wait")
    account.statuses = ["Creating", "Creating", "Creating", "Failed"]
    output = run("delete", "support", "--yes")
    assert "is Creating: AWS deletes it only when that is over" in output
    assert account.resources() == set()


def test_delete_waits_for_components_that_are_being_made_or_changed(account: Account) -> None:
    run(*COMPONENTS)
    run("adapter", "add", "support", "isFraud", URL)
    account.component_statuses = {
        "support-base": ["Updating", "Updating", "InService"],
        "isFraud": ["Creating", "Creating", "Failed"],
    }
    output = run("delete", "support", "--yes")
    assert "adapter isFraud is Creating: AWS deletes it only when that is over" in output
    assert account.resources() == set()


def test_an_endpoint_whose_component_is_left_is_kept(account: Account) -> None:
    run(*COMPONENTS)
    account.failing = {"DeleteInferenceComponent": ("ThrottlingException", "Rate exceeded")}
    account.calls.clear()
    output = run("delete", "support", "--yes", code=1)
    assert account.changes() == ["DeleteInferenceComponent"]
    assert all(arn in output for arn in account.resources() if arn != "support-base")
    assert "its component support-base is left" in output
    account.failing = {}
    run("delete", "support", "--yes")
    assert account.resources() == set()


def test_an_endpoint_with_the_same_beginning_keeps_what_it_has(account: Account) -> None:
    first, second = "x" * 60, "x" * 61
    run(*("deploy", first, *DEPLOY[2:]))
    kept = account.resources()
    run(*("deploy", second, *DEPLOY[2:]))
    run("delete", second, "--yes")
    assert account.resources() == kept
    assert first in run("status", first) and second not in run("status", first)


def test_status_shows_each_thing_with_its_arn(account: Account) -> None:
    run(*COMPONENTS)
    run("adapter", "add", "support", "isFraud", URL)
    run("autoscale", "support", "--max", "4", "--target-concurrency", "8")
    found = json.loads(run("status", "support", "--json"))
    kinds = [one["kind"] for one in found["resources"]]
    assert sorted(kinds) == sorted(
        ("endpoint", "base component", "adapter", "scaling policy", "scalable target", "config", "model")
    )
    assert all(one["arn"].startswith("arn:aws:") for one in found["resources"]) and not found["problems"]
    table = run("status", "support").replace("\n", " ")
    assert all(one["name"] in table and one["state"] in table for one in found["resources"])
    assert "nothing of it is left" in run("status", "other", code=1)


# Updating


def test_an_update_changes_what_is_given_and_deletes_what_was_replaced(account: Account) -> None:
    run(*DEPLOY, "--env", "A=1", "--env", "B=2", "--instances", "4")
    before = account.resources()
    account.calls.clear()
    run("update", "support", "--model-data", OTHER_DATA, "--env", "A=3", "--unset-env", "B")
    assert account.changes() == [
        *("CreateModel", "CreateEndpointConfig", "UpdateEndpoint", "DeleteEndpointConfig", "DeleteModel")
    ]
    container = account.sent("CreateModel")["PrimaryContainer"]
    assert container == {"Image": IMAGE, "ModelDataUrl": OTHER_DATA, "Environment": {"A": "3"}}
    sent = account.sent("UpdateEndpoint")
    assert sent["RetainAllVariantProperties"] is True and "ExcludeRetainedVariantProperties" not in sent
    policy = {"MaximumBatchSize": {"Type": "INSTANCE_COUNT", "Value": 1}, "WaitIntervalInSeconds": 120}
    assert sent["DeploymentConfig"] == {"RollingUpdatePolicy": policy}
    after = account.resources()
    assert len(after) == 3 and len(after & before) == 1
    account.calls.clear()
    assert "nothing is changed" in run("update", "support", "--model-data", OTHER_DATA)
    assert account.changes() == [] and account.resources() == after


@pytest.mark.parametrize("arguments", [DEPLOY, COMPONENTS], ids=["model", "components"])
def test_defaults_that_aws_fills_in_are_no_change(account: Account, arguments: tuple[str, ...]) -> None:
    run(*arguments)
    assert account.sent("CreateEndpointConfig")["MetricsConfig"] == {"EnableDetailedObservability": False}
    before = account.resources()
    account.filled = {"VolumeSizeInGB": 30, "VariantName": "AllTraffic"}
    account.calls.clear()
    assert "nothing is changed" in run("update", "support", "--image", IMAGE)
    assert account.changes() == [] and account.resources() == before
    run("update", "support", "--instances", "2")
    [config] = [sent for _, name, sent in account.calls if name == "CreateEndpointConfig"]
    assert config["ProductionVariants"][0]["VolumeSizeInGB"] == 30
    assert len(account.resources()) == len(before), "the old config is deleted, and nothing that is used"
    assert "nothing is changed" in run("update", "support", "--instances", "2")


def test_a_config_and_a_model_of_other_names_are_kept_while_they_are_used(account: Account) -> None:
    """As where an older version derived the names otherwise."""
    run(*COMPONENTS)
    sagemaker = boto3.client("sagemaker", aws.REGION)
    tags = [{"Key": TAG, "Value": "support"}]
    sent = account.sent("CreateModel")
    sagemaker.create_model(**{**sent, "ModelName": "support-old", "Tags": tags})
    sagemaker.delete_model(ModelName=sent["ModelName"])
    account.components["support-base"]["Specification"]["ModelName"] = "support-old"
    run("update", "support", "--instances", "2")
    assert f"{ARN}:model/support-old" in account.resources()
    assert len(account.resources()) == 4


def test_an_update_with_alarms_is_rolled_back_by_them(account: Account) -> None:
    run(*DEPLOY)
    before = account.resources()
    account.calls.clear()
    account.is_rolling_back, account.statuses = True, ["InService", "Updating", "RollingBack", "InService"]
    output = run("update", "support", "--image", f"{IMAGE}2", "--alarm", "mine", "--make-alarms", code=1)
    assert "the update was rolled back, and the endpoint serves as before" in output
    sent = account.sent("UpdateEndpoint")["DeploymentConfig"]
    names = ["mine", "loraplex/support/Invocation5XXErrors", "loraplex/support/ModelLatency"]
    assert sent["AutoRollbackConfiguration"] == {"Alarms": [{"AlarmName": name} for name in names]}
    assert "BlueGreenUpdatePolicy" in sent and "RollingUpdatePolicy" not in sent, "one instance is not divided"
    alarms = {arn for arn in account.resources() if ":alarm:" in arn}
    assert account.resources() - alarms == before and len(alarms) == 2
    account.is_rolling_back, account.statuses = False, []
    run("update", "support", "--image", f"{IMAGE}2", "--make-alarms")
    assert {arn for arn in account.resources() if ":alarm:" in arn} == alarms, "they are not made twice"


@pytest.mark.parametrize("options", [("--model-data", OTHER_DATA), ("--startup-timeout", "600")])
def test_a_base_component_that_aws_rolls_back_is_an_error(account: Account, options: tuple[str, ...]) -> None:
    run(*COMPONENTS)
    before = account.resources()
    account.is_rolling_back = True
    output = run("update", "support", *options, code=1)
    assert "component support-base: the update was rolled back" in output
    assert account.resources() == before, "the new model is deleted, and the old one is kept"


def test_an_adapter_that_aws_rolls_back_is_an_error(account: Account) -> None:
    run(*COMPONENTS)
    run("adapter", "add", "support", "isFraud", URL)
    account.is_rolling_back = True
    output = run("adapter", "add", "support", "isFraud", URL.replace("/1/", "/2/"), code=1)
    assert "component isFraud: the update was rolled back" in output


def test_what_a_failed_update_leaves_is_listed_and_goes_with_the_next(account: Account) -> None:
    run(*DEPLOY)
    before = account.resources()
    account.failing = {"UpdateEndpoint": ("ResourceLimitExceeded", "limit 'ml.g5.2xlarge for endpoint usage' is 1")}
    output = run("update", "support", "--model-data", OTHER_DATA, code=1)
    left = account.resources() - before
    assert len(left) == 2 and all(f" {arn}\n" in output for arn in left)
    assert "sagemaker delete" not in output and "loraplex sagemaker update support" in output
    account.failing = {}
    run("update", "support")
    assert account.resources() == before


def test_what_the_user_sets_is_not_retained(account: Account) -> None:
    run(*DEPLOY)
    run("update", "support", "--instances", "3", "--instance-type", "ml.g6.2xlarge")
    sent = account.sent("UpdateEndpoint")
    assert sent["ExcludeRetainedVariantProperties"] == [{"VariantPropertyType": "DesiredInstanceCount"}]
    [_, variant] = [sent["ProductionVariants"][0] for _, name, sent in account.calls if name == "CreateEndpointConfig"]
    assert (variant["InitialInstanceCount"], variant["InstanceType"]) == (3, "ml.g6.2xlarge")


def test_a_base_component_is_updated_in_place(account: Account) -> None:
    run(*COMPONENTS)
    run("adapter", "add", "support", "isFraud", URL)
    before = account.resources()
    account.calls.clear()
    output = run("update", "support", "--model-data", OTHER_DATA, "--alarm", "mine")
    assert "support-base has one copy: AWS watches no alarms" in output
    assert account.changes() == ["CreateModel", "UpdateInferenceComponent", "DeleteModel"]
    sent = account.sent("UpdateInferenceComponent")
    assert sent["Specification"]["ModelName"] == account.sent("CreateModel")["ModelName"]
    assert "DeploymentConfig" not in sent, "one copy is not divided"
    assert len(before - account.resources()) == 1
    account.calls.clear()
    run("update", "support", "--instances", "2")
    assert account.changes() == ["CreateEndpointConfig", "UpdateEndpoint", "DeleteEndpointConfig"]
    account.components["support-base"]["RuntimeConfig"] = {"CurrentCopyCount": 9}
    account.calls.clear()
    assert "watches no alarms" not in run("update", "support", "--image", f"{IMAGE}2", "--alarm", "mine")
    assert account.sent("UpdateInferenceComponent")["DeploymentConfig"] == {
        "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "mine"}]},
        "RollingUpdatePolicy": {
            "MaximumBatchSize": {"Type": "COPY_COUNT", "Value": 2},
            "WaitIntervalInSeconds": 120,
        },
    }


@pytest.mark.parametrize(
    ("arguments", "options", "rule"),
    [
        ((*DEPLOY, "--instances", "4"), ("--batch", "3"), "use 1 to 2"),
        ((*DEPLOY, "--instances", "41"), ("--batch", "2"), "use 3 to 20"),
        (DEPLOY, ("--batch", "2"), "use 1 to 1"),
        (DEPLOY, ("--batch", "0"), "use 1 to 1"),
        (COMPONENTS, ("--batch", "2"), "use 1 to 1"),
        (DEPLOY, ("--bake", "3601"), "use 0 to 3600 seconds"),
        (DEPLOY, ("--bake", "-1"), "use 0 to 3600 seconds"),
    ],
)
def test_a_batch_or_a_bake_that_aws_would_refuse_changes_nothing(
    account: Account, arguments: tuple[str, ...], options: tuple[str, str], rule: str
) -> None:
    run(*arguments)
    account.calls.clear()
    output = run("update", "support", "--image", f"{IMAGE}2", "--make-alarms", *options, code=1)
    assert options[0] in output and rule in output
    assert account.changes() == []


@pytest.mark.parametrize("num_instances", [1, 2, 3, 5, 41])
def test_the_default_batch_is_one_that_aws_takes(account: Account, num_instances: int) -> None:
    """The account checks it."""
    run(*DEPLOY, "--instances", str(num_instances))
    run("update", "support", "--image", f"{IMAGE}2")
    assert ("RollingUpdatePolicy" in account.sent("UpdateEndpoint")["DeploymentConfig"]) == (num_instances > 1)


@pytest.mark.parametrize("kind", ["serverless", "pipeline", "variants", "name", "package"])
def test_an_endpoint_of_another_kind_is_an_error(account: Account, kind: str) -> None:
    """It has our tag, as where the user set it."""
    sagemaker = boto3.client("sagemaker", aws.REGION)
    container = {"Image": IMAGE, "ModelDataUrl": DATA}
    if kind == "package":
        container = {"ModelPackageName": f"{ARN}:model-package/x"}
    containers = {"Containers": [container, container]} if kind == "pipeline" else {"PrimaryContainer": container}
    sagemaker.create_model(ModelName="theirs", ExecutionRoleArn=ROLE, **containers)
    machine = {"InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
    if kind == "serverless":
        machine = {"ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 1}}
    names = {"variants": ["a", "b"], "name": ["blue"]}.get(kind, ["AllTraffic"])
    variants = [{"VariantName": name, "ModelName": "theirs", **machine} for name in names]
    sagemaker.create_endpoint_config(EndpointConfigName="theirs", ProductionVariants=variants)
    tags = [{"Key": TAG, "Value": "support"}]
    sagemaker.create_endpoint(EndpointName="support", EndpointConfigName="theirs", Tags=tags)
    account.calls.clear()
    output = run("update", "support", "--instances", "2", code=1)
    assert "endpoint support: is not such as loraplex sagemaker deploy makes" in output
    assert account.changes() == []


def test_an_update_without_waiting_deletes_nothing(account: Account) -> None:
    run(*DEPLOY)
    account.calls.clear()
    run("update", "support", "--model-data", OTHER_DATA, "--no-wait")
    assert account.changes() == ["CreateModel", "CreateEndpointConfig", "UpdateEndpoint"]
    run("update", "support", "--instances", "2")
    assert len(account.resources()) == 3, "the next update does"


def test_without_waiting_a_component_comes_with_the_next_call(account: Account) -> None:
    assert "run this command again" in run(*COMPONENTS, "--no-wait")
    assert not account.components
    run(*COMPONENTS)
    assert list(account.components) == ["support-base"]
    change = ("update", "support", "--instances", "2", "--model-data", OTHER_DATA)
    account.calls.clear()
    assert "run this command again" in run(*change, "--no-wait")
    assert account.changes() == ["CreateModel", "CreateEndpointConfig", "UpdateEndpoint"]
    run(*change)
    assert len(account.resources()) == 4


def test_an_update_that_fails_or_is_not_possible_changes_nothing(account: Account) -> None:
    assert "does not exist in us-east-1" in run("update", "support", "--instances", "2", code=1)
    run(*DEPLOY)
    account.calls.clear()
    shown = [line["operation"] for line in lines_of(run("update", "support", "--instances", "2", "--dry-run"))]
    assert shown == ["create_endpoint_config", "update_endpoint", "delete_endpoint_config"]
    for status in ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"):
        account.statuses = [status]
        assert f"cannot be changed while it is {status}" in run("update", "support", "--instances", "2", code=1)
    account.statuses = ["Failed"]
    assert "loraplex sagemaker delete support" in run("update", "support", "--instances", "2", code=1)
    assert account.changes() == []


# Autoscaling, adapters, logs


def test_autoscaling_is_set_once_and_ended(account: Account) -> None:
    run(*DEPLOY)
    before = account.resources()
    arguments = ("autoscale", "support", "--min", "1", "--max", "4", "--target-concurrency", "8")
    for _ in range(2):
        run(*arguments)
        assert len(account.resources() - before) == 2
    [policy, _] = [sent for _, name, sent in account.calls if name == "PutScalingPolicy"]
    assert policy == {
        "ServiceNamespace": "sagemaker",
        "ResourceId": "endpoint/support/variant/AllTraffic",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
        "PolicyName": "loraplex-concurrent-requests",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": 8.0,
            "PredefinedMetricSpecification": {
                "PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"
            },
            "ScaleInCooldown": 300,
            "ScaleOutCooldown": 60,
        },
    }
    shown = [line["operation"] for line in lines_of(run("autoscale", "support", "--off", "--dry-run"))]
    assert shown == ["delete_scaling_policy", "deregister_scalable_target"]
    for _ in range(2):
        run("autoscale", "support", "--off")
        assert account.resources() == before


def test_a_base_component_scales_its_copies(account: Account) -> None:
    run(*COMPONENTS)
    run("autoscale", "support", "--min", "1", "--max", "2", "--target-concurrency", "4")
    sent = account.sent("RegisterScalableTarget")
    place = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": "inference-component/support-base",
        "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount",
    }
    assert sent == {**place, "MinCapacity": 1, "MaxCapacity": 2}
    assert account.sent("PutScalingPolicy") == {
        **place,
        "PolicyName": "loraplex-concurrent-requests",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": 4.0,
            "PredefinedMetricSpecification": {
                "PredefinedMetricType": "SageMakerInferenceComponentConcurrentRequestsPerCopyHighResolution"
            },
            "ScaleInCooldown": 300,
            "ScaleOutCooldown": 60,
        },
    }
    output = run("autoscale", "support", "--min", "0", "--max", "2", "--target-concurrency", "4", code=1)
    assert "1 <= --min" in output and "never comes back" in output


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--min", "5", "--max", "4", "--target-concurrency", "8"), 1, "5 to 4 is not possible"),
        (("--min", "0", "--max", "4", "--target-concurrency", "8"), 1, "1 <= --min"),
        (("--max", "4", "--target-concurrency", "0"), 1, "not above 0"),
        (("--max", "4"), 2, "give both"),
        (("--off", "--max", "4"), 2, "--off alone"),
        ((), 2, "or --off"),
    ],
)
def test_autoscaling_that_cannot_be_is_refused(
    account: Account, options: tuple[str, ...], code: int, text: str
) -> None:
    run(*DEPLOY)
    account.calls.clear()
    assert text in run("autoscale", "support", *options, code=code)
    assert account.changes() == []


def test_adapters_are_components_of_the_base(account: Account) -> None:
    run(*COMPONENTS)
    account.calls.clear()
    output = run("adapter", "add", "support", "isFraud", URL)
    assert "invoke support --component isFraud" in output
    sent = account.sent("CreateInferenceComponent")
    assert sent["Specification"] == {
        "BaseInferenceComponentName": "support-base",
        "Container": {"ArtifactUrl": URL},
    }
    assert (sent["InferenceComponentName"], sent["EndpointName"]) == ("isFraud", "support")
    account.calls.clear()
    run("adapter", "add", "support", "isFraud", URL)
    assert account.changes() == []
    run("adapter", "add", "support", "isFraud", URL.replace("/1/", "/2/"))
    assert account.changes() == ["UpdateInferenceComponent"]
    account.calls.clear()
    for _ in range(2):
        run("adapter", "remove", "support", "isFraud")
    assert account.changes() == ["DeleteInferenceComponent"] and list(account.components) == ["support-base"]


def test_an_adapter_that_cannot_be_added_or_removed_is_refused(account: Account) -> None:
    run(*DEPLOY)
    assert "--inference-components" in run("adapter", "add", "support", "isFraud", URL, code=1)
    run(*("deploy", "other", *COMPONENTS[2:]))
    run("adapter", "add", "other", "isFraud", URL)
    run("delete", "support", "--yes")
    run(*COMPONENTS)
    account.calls.clear()
    assert "belongs to endpoint other" in run("adapter", "add", "support", "isFraud", URL, code=1)
    assert "not an adapter of support" in run("adapter", "remove", "support", "isFraud", code=1)
    assert "not an adapter of support" in run("adapter", "remove", "support", "support-base", code=1)
    assert "belongs to endpoint support" in run("adapter", "add", "support", "support-base", URL, code=1)
    assert ".tar.gz" in run("adapter", "add", "support", "isDone", "s3://models/isDone/", code=1)
    assert "'a_b'" in run("adapter", "add", "support", "a_b", URL, code=1)
    assert "does not exist" in run("adapter", "add", "support", "isDone", "s3://models/no/adapter.tar.gz", code=1)
    assert account.changes() == []
    account.failing = {"CreateInferenceComponent": ("ResourceLimitExceeded", "The service limit 'Copies' is 10")}
    assert "raise the quota 'Copies'" in run("adapter", "add", "support", "isDone", URL, code=1)


def test_the_log_is_followed_without_repeating(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "logs:FilterLogEvents: ResourceNotFoundException" in run("logs", "support", code=1)
    logs, group = boto3.client("logs", aws.REGION), "/aws/sagemaker/Endpoints/support"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="AllTraffic/i-1")

    def write(text: str) -> None:
        now = int(time.time() * 1000)
        event = {"timestamp": now, "message": text}
        logs.put_log_events(logGroupName=group, logStreamName="AllTraffic/i-1", logEvents=[event])

    write("first")
    turns = iter(range(2))

    def sleep(_: float) -> None:
        if next(turns, None) is None:
            raise KeyboardInterrupt
        write("second")

    monkeypatch.setattr(time, "sleep", sleep)
    output = run("logs", "support", "--follow")
    assert [line.split(" ", 1)[1] for line in output.splitlines()] == ["i-1 first", "i-1 second", "i-1 second"]


def test_a_request_that_names_no_component_goes_to_the_base(account: Account) -> None:
    output = run(*COMPONENTS)
    assert "ask it: loraplex sagemaker invoke support --text …" in output
    assert json.loads(run("invoke", "support", "--text", "hello")) == {"component": "support-base"}
    assert json.loads(run("invoke", "support", "--text", "hello", "--component", "isFraud")) == {"component": "isFraud"}
    account.components.clear()
    account.calls.clear()
    assert json.loads(run("invoke", "support", "--text", "hello")) == {"component": None}
    assert len(account.calls) == 1, "and it takes no other right than to invoke"
    account.failing = {"InvokeEndpoint": ("ValidationError", "Endpoint support of account 1 not found.")}
    account.calls.clear()
    assert "not found" in run("invoke", "support", "--text", "hello", code=1)
    assert len(account.calls) == 1


def test_a_request_to_an_asynchronous_endpoint_says_where_the_answer_will_be(account: Account) -> None:
    output = run("invoke", "support", "--input", "s3://models/body.json")
    assert output == "s3://models/answers/1.out\n"
    assert account.sent("InvokeEndpointAsync")["InputLocation"] == "s3://models/body.json"


# Errors


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        ("ExpiredTokenException", "The security token included in the request is expired", "renew the credentials"),
        ("UnrecognizedClientException", "The security token included in the request is invalid", "AWS_PROFILE"),
        (
            "AccessDeniedException",
            "User: arn:aws:iam::1:user/x is not authorized to perform: sagemaker:CreateModel on resource: y",
            "allow sagemaker:CreateModel",
        ),
        (
            "AccessDeniedException",
            "User: arn:aws:iam::1:user/x is not authorized to perform: iam:PassRole on resource: role",
            "allow iam:PassRole on the role of --role",
        ),
        (
            "ValidationException",
            "Could not assume role arn:aws:iam::123456789012:role/x. Please ensure that the role exists and allows "
            "principal 'sagemaker.amazonaws.com' to assume the role.",
            "check --role",
        ),
        (
            "ResourceLimitExceeded",
            "The account-level service limit 'ml.g5.2xlarge for endpoint usage' is 0 Instances, with current "
            "utilization of 0 Instances and a request delta of 1 Instances.",
            "raise the quota 'ml.g5.2xlarge for endpoint usage'",
        ),
        ("ValidationException", "Could not access model data at s3://a/b.tar.gz.", "check the s3:// URL"),
        ("ValidationException", "Requested image 1.dkr.ecr.us-east-1.amazonaws.com/x:1 not found.", "check --image"),
        ("ValidationException", "Cannot update in-progress endpoint", "wait until"),
        ("ThrottlingException", "Rate exceeded", "try again later"),
        ("", "Unable to provision: InsufficientInstanceCapacity", "use another --instance-type"),
        ("", REASON, "raise --startup-timeout"),
        ("SomethingNew", "nobody knows", "change what the message names"),
    ],
)
def test_every_answer_of_aws_has_a_remedy(code: str, message: str, remedy: str) -> None:
    assert remedy in remedy_of(code, message)


def test_an_error_names_the_call_the_code_and_the_remedy(account: Account) -> None:
    message = "The account-level service limit 'ml.g5.2xlarge for endpoint usage' is 0 Instances"
    account.failing = {"CreateEndpoint": ("ResourceLimitExceeded", message)}
    output = run(*DEPLOY, code=1)
    assert f"error configuration_error: sagemaker:CreateEndpoint: ResourceLimitExceeded: {message}" in output
    assert "remedy: raise the quota 'ml.g5.2xlarge for endpoint usage'" in output


def test_credentials_region_and_profile_that_are_missing(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert "aws configure list-profiles" in run(*DEPLOY, "--profile", "nobody", code=1)
    with monkeypatch.context() as without:
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            without.delenv(name, raising=False)
        assert "--region" in run(*DEPLOY, code=1)
    with monkeypatch.context() as without:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"):
            without.delenv(name, raising=False)
        output = run(*DEPLOY, code=1)
        assert "sagemaker:DescribeEndpoint: NoCredentials" in output and "set AWS_PROFILE" in output
    assert account.changes() == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_an_aws_that_is_not_there_is_our_error(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in (
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "x"),
        ("MAX_ATTEMPTS", "1"),
        ("ENDPOINT_URL", url),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(ConfigurationError, match="sagemaker:DescribeEndpoint") as caught:
        Aws(region=aws.REGION, attempts=1).run(Call("sagemaker", "DescribeEndpoint", {"EndpointName": "x"}))
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


def test_without_boto3_only_a_dry_run_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("boto3", "botocore", "botocore.config", "botocore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'loraplex[aws]'" in run(*DEPLOY, code=1)
    assert len(lines_of(run(*DEPLOY, "--dry-run"))) == 3
    assert len(lines_of(run(*COMPONENTS, "--dry-run"))) == 4


@pytest.mark.parametrize(
    ("operation", "code", "message", "is_missing"),
    [
        ("DescribeModel", "ValidationException", 'Could not find model "arn:aws:sagemaker:x".', True),
        ("DeleteEndpoint", "ValidationException", 'Could not find endpoint "arn:aws:sagemaker:x".', True),
        ("DeregisterScalableTarget", "ObjectNotFoundException", "No scalable target found for service", True),
        ("DeleteAlarms", "ResourceNotFound", "Unknown alarm: not found", True),
        ("ListTags", "ResourceNotFoundException", "Resource does not exist", True),
        ("HeadObject", "404", "Not Found", True),
        ("ListObjectsV2", "NoSuchBucket", "The specified bucket does not exist", True),
        ("CreateModel", "ValidationException", "Could not find model data at s3://a/b.tar.gz.", False),
        ("DescribeModel", "ValidationException", "1 validation error detected", False),
        ("DescribeEndpoint", "SSOTokenLoad", "Error loading SSO Token: Token for x does not exist", False),
        ("DescribeEndpoint", "ProfileNotFound", "The config profile (x) could not be found, does not exist", False),
        ("DescribeEndpoint", "AccessDeniedException", "The role does not exist", False),
    ],
)
def test_only_an_answer_of_aws_to_a_look_or_a_delete_means_missing(
    operation: str, code: str, message: str, is_missing: bool
) -> None:
    assert AwsError(Call("sagemaker", operation, {}), code, message).is_missing is is_missing


# Alarms


@pytest.mark.parametrize(
    ("arguments", "dimensions"),
    [
        (
            DEPLOY,
            [{"Name": "EndpointName", "Value": "support"}, {"Name": "VariantName", "Value": "AllTraffic"}],
        ),
        (COMPONENTS, [{"Name": "InferenceComponentName", "Value": "support-base"}]),
    ],
    ids=["model", "components"],
)
def test_both_alarms_are_what_aws_is_told(
    account: Account, arguments: tuple[str, ...], dimensions: list[dict[str, str]]
) -> None:
    run(*arguments)
    options = ("--make-alarms", "--max-errors", "7", "--max-latency", "2.5")
    run("update", "support", "--image", f"{IMAGE}2", *options)
    common = {
        "AlarmDescription": "Made by loraplex sagemaker update --make-alarms",
        "Namespace": "AWS/SageMaker",
        "Dimensions": dimensions,
        "Period": 60,
        "EvaluationPeriods": 1,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "notBreaching",
        "Tags": [{"Key": TAG, "Value": "support"}],
    }
    errors = {"MetricName": "Invocation5XXErrors", "Statistic": "Sum", "Threshold": 7.0}
    latency = {"MetricName": "ModelLatency", "Statistic": "Average", "Threshold": 2_500_000.0}
    assert [sent for _, name, sent in account.calls if name == "PutMetricAlarm"] == [
        {"AlarmName": f"loraplex/support/{metric['MetricName']}", **metric, **common} for metric in (errors, latency)
    ]


# Rights

ROOT = Path(__file__).parents[2]
# Rights that AWS asks for behind a call: to tag, to hand a role on, to scale, and by another name than the call's.
BEHIND = {
    *("sagemaker:AddTags", "cloudwatch:TagResource", "iam:PassRole", "iam:CreateServiceLinkedRole"),
    *("sagemaker:UpdateEndpointWeightsAndCapacities", "sagemaker:UpdateInferenceComponentRuntimeConfig"),
    *("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"),  # pack
}
OTHER_NAMES = {"s3:HeadBucket": "s3:ListBucket", "s3:ListObjectsV2": "s3:ListBucket", "s3:HeadObject": "s3:GetObject"}


def actions(path: Path) -> set[str]:
    found = set()
    for statement in json.loads(path.read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        one = statement["Action"]
        found |= {one} if isinstance(one, str) else set(one)
    return found


def test_the_users_policy_names_exactly_the_rights_that_the_code_needs() -> None:
    constants = {"NAMESPACE": "application-autoscaling", "RUNTIME": "sagemaker-runtime"}
    called = set()
    for path in (ROOT / "src/loraplex/sagemaker").rglob("*.py"):
        for service, operation in re.findall(r'Call\(\s*("[\w-]+"|[A-Z]+),\s*"([A-Z]\w+)"', path.read_text()):
            called.add(Call(constants.get(service, service.strip('"')), operation, {}).action)
    needed = {OTHER_NAMES.get(one, one) for one in called} | BEHIND
    assert len(called) > 25
    assert actions(ROOT / "docs/sagemaker-user-policy.json") == needed


def test_the_roles_policy_lets_the_container_run() -> None:
    found = actions(ROOT / "docs/sagemaker-role-policy.json")
    assert {"s3:GetObject", "ecr:BatchGetImage", "logs:PutLogEvents"} <= found
