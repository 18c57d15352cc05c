"""The dated data: complete, sourced, and equal to what others count."""

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from loraplex.errors import ConfigurationError
from loraplex.hardware.bases import known_base, known_bases
from loraplex.hardware.devices import device, devices, find_device
from loraplex.hardware.instances import instance, instances
from loraplex.hardware.prices import read_prices
from loraplex.model.loader import read_config
from loraplex.planning.base_shape import shape_of

DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?")


SMALLEST = {  # model type -> the smallest such base, which transformers builds fast
    str(base.config["model_type"]): name
    for name, base in sorted(known_bases().items(), key=lambda one: -one[1].parameters)
}


@pytest.mark.parametrize("name", known_bases())
def test_a_shape_has_the_parameters_that_its_publisher_counts(name: str) -> None:
    base = known_bases()[name]
    config = read_config(Path(name), values=base.config)
    assert shape_of(config, Path(name)).sizes.num_weights == base.parameters


@pytest.mark.parametrize("name", SMALLEST.values())
def test_a_shape_has_the_parameters_that_transformers_counts(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = known_bases()[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base.config))
    assert sum(one.numel() for one in model.parameters()) == base.parameters


def test_a_base_has_several_names() -> None:
    names = ("qwen3-8b", "Qwen/Qwen3-8B", "qwen/qwen3-8b-base", "Qwen3-8B")
    assert {known_base(name).name for name in names} == {"qwen3-8b"}


def test_a_name_leads_to_one_base() -> None:
    ids = [one for base in known_bases().values() for one in base.hub]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("look_up", "name", "hint"),
    [
        (known_base, "qwen3-7b", "'qwen3-8b'"),
        (device, "h100-sxm", "'h100'"),
        (instance, "ml.g5.3xlarge", "'ml.g5.2xlarge'"),
        (read_prices().of, "ml.g5.3xlarge", "'ml.g5.2xlarge'"),
        (device, "zzz", "'a100', 'a100-80gb', 'a10g'"),
    ],
)
def test_an_unknown_name_gets_those_that_are_like_it(look_up: Callable[[str], object], name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match="is unknown") as refused:
        look_up(name)
    assert repr(name) in refused.value.message and hint in refused.value.remedy


def test_the_rates_are_dense() -> None:
    """NVIDIA's sheets print sparse rates, which are twice as much, in large letters."""
    rates = {name: one.bf16_tflops for name, one in devices().items()}
    assert rates == {
        "a10g": 70, "l4": 121, "l40s": 362, "a100": 312, "a100-80gb": 312, "h100": 989, "h200": 989,
    }  # fmt: skip
    assert (device("A10G").bytes_per_s, device("a10g").flops_per_s) == (600e9, 70e12)
    for one in devices().values():
        assert DATE.fullmatch(one.read) and one.sheet.startswith("https://") and one.read_at


def test_a_device_is_found_by_its_drivers_name() -> None:
    assert find_device("NVIDIA A100-SXM4-80GB") is device("a100-80gb")
    assert find_device("NVIDIA L4") is device("l4") and find_device("NVIDIA L40S") is device("l40s")
    assert find_device("NVIDIA L40") is None and find_device("AMD EPYC") is None


def test_instances_are_those_of_sagemaker_and_ec2() -> None:
    import boto3

    shapes = boto3.client("sagemaker", region_name="us-east-1").meta.service_model
    offered = shapes.shape_for("ProductionVariantInstanceType").enum
    assert {name for name, one in instances().items() if one.is_sagemaker} <= set(offered)
    article = instance("ml.g5.2xlarge")
    assert article.device is device("a10g") and article.num_devices == 1
    assert instance("g5.2xlarge").device is article.device and not instance("g5.2xlarge").is_sagemaker
    assert instance("c7i.4xlarge").device is None
    for one in instances().values():
        assert (one.device is None) == (one.num_devices == 0)


def test_prices_have_a_date_and_a_source() -> None:
    prices = read_prices()
    for one in prices.instances.values():
        assert DATE.fullmatch(one.read) and one.source.startswith("https://")
    for api in prices.hosted.values():
        assert DATE.fullmatch(api.read) and api.source.startswith("https://") and api.title
    assert set(prices.instances) <= set(instances())
    article = prices.of("ml.g5.2xlarge")
    assert article is not None and article.usd_per_hour == Decimal("1.515")


def test_a_price_that_nobody_gave_is_unknown() -> None:
    assert read_prices().of("ml.g5.4xlarge") is None


def test_a_users_file_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(
        "instances:\n  ml.g5.2xlarge: {usd_per_hour: 1.1}\n  our-server: {usd_per_hour: 0.3, source: bill}\n"
        "hosted:\n  ours: {usd_per_million_input_tokens: 0.05}\n"
    )
    prices = read_prices(file)
    ours, server, other = (prices.of(name) for name in ("ml.g5.2xlarge", "our-server", "ml.g6.2xlarge"))
    assert ours is not None and (ours.usd_per_hour, ours.source, ours.read) == (Decimal("1.1"), str(file), "")
    assert server is not None and server.source == "bill"
    assert other is not None and other.usd_per_hour == Decimal("1.222")
    assert set(prices.hosted) == {"decisions", "ours"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instance: {}", "unknown key 'instance'; did you mean instances?"),
        ("instances: {a: {usd_per_hours: 1}}", "unknown key 'instances.a.usd_per_hours'; did you mean usd_per_hour?"),
        ("instances: {a: 1.5}", "key 'instances.a': 1.5 is not keys and values"),
        ("instances: {a: {usd_per_hour: cheap}}", "key 'instances.a.usd_per_hour': 'cheap' is not a number"),
        ("instances: {a: {usd_per_hour: true}}", "key 'instances.a.usd_per_hour': true is not a number"),
        ("instances: {a: {usd_per_hour: 0}}", "key 'instances.a.usd_per_hour': 0 is not above 0"),
        ("instances: {a: {usd_per_hour: .nan}}", "is not a finite number"),
        ("instances: {a: {}}", "key 'instances.a.usd_per_hour': is missing"),
        ("- 1", "holds a list, not keys and values"),
    ],
)
def test_a_wrong_price_file_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        read_prices(file)
    assert str(file) in refused.value.message and message in refused.value.message


def test_a_missing_price_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml"):
        read_prices(tmp_path / "none.yaml")
