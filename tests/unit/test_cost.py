"""What classifiers cost: the article's bill to the cent, instances by capacity, and where another way costs less."""

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.amounts import usd
from loraplex.cli.main import app
from loraplex.costs.cost import Cost, Demand, per_thousand_conversations
from loraplex.hardware.prices import read_prices

ARTICLE = Decimal("1.515")
DOCS = Path(__file__).parents[2] / "docs"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["cost", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def cost(usd_per_hour: Decimal = ARTICLE, **demand: Any) -> Cost:
    return Cost(demand=Demand(**demand), usd_per_hour=usd_per_hour)


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """What cost reads of a report of bench, and some of what it does not."""
    spread = {"median": 7.0, "low": 6.8, "high": 7.1, "rounds": 5}
    return {
        "format": 1,
        "kind": "bench",
        "about": {"device": "a CPU", "cores": 2, "dtype": "bfloat16", "started": "2026-11-28T12:00:00+00:00"},
        "data": {"file": "dev.jsonl", "classifiers": [f"c{i}" for i in range(16)]},
        "systems": {
            "native": {"state": "measured", "saturation": {"reached": True, "conversations_per_s": spread, "at": "…"}},
            "peft": {"state": "measured", "saturation": {"reached": False, "conversations_per_s": None, "at": "…"}},
            "vllm": {"state": "skipped: vllm is not installed"},
        },
        "samples": {"columns": [], "rows": []},
    }


def written(report: object, folder: Path) -> str:
    path = folder / "report.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return str(path)


def test_the_articles_bill() -> None:
    bill = cost(classifiers=16)
    assert bill.per_month(bill.num_separate) == Decimal("17452.80")
    assert bill.per_month(bill.num_together) == Decimal("1090.80")
    assert (bill.saved, bill.saved_share) == (Decimal("16362.00"), Decimal("0.9375"))
    output = run("--classifiers", "16", "--instance", "ml.g5.2xlarge")
    assert "$17,452.80" in (DOCS / "article.md").read_text() and "$1,090.80" in (DOCS / "article.md").read_text()
    for figure in ("$17,452.80", "$1,090.80", "$16,362.00", "93.75 %", "$1.515 an hour"):
        assert figure in output


def test_a_month_may_have_730_hours() -> None:
    assert "$1,105.95" in run("--hours", "730")


@pytest.mark.parametrize(
    ("rate", "together", "separate"),
    [("0.000001", 1, 16), ("4.9", 1, 16), ("4.91", 2, 16), ("73.5", 15, 16), ("78.4", 16, 16), ("78.41", 17, 32)],
)
def test_instances_at_a_rate(rate: str, together: int, separate: int) -> None:
    """Of 7 calls/s, 30 % stay free."""
    bill = cost(rate=Decimal(rate), capacity=Decimal(7))
    assert (bill.num_together, bill.num_separate) == (together, separate)
    assert bill.separate_break_even == Decimal("73.5")


def test_without_headroom_the_instances_are_full() -> None:
    assert cost(rate=Decimal(14), capacity=Decimal(7), headroom=Decimal(0)).num_together == 2


def test_1000_conversations() -> None:
    assert per_thousand_conversations(Decimal("3.6"), 1) == 1
    assert per_thousand_conversations(ARTICLE, 0.5) == pytest.approx(Decimal("0.8417"), abs=Decimal("0.0001"))
    half_busy = cost(rate=Decimal(2), utilisation=Decimal(50))
    assert half_busy.per_thousand(1) == per_thousand_conversations(ARTICLE, 1)
    assert cost().per_thousand(1) is None


def test_a_hosted_api_by_both_ways_to_count() -> None:
    once, each = cost(tokens=500, classifiers=16, rate=Decimal(2)).offers(read_prices().hosted)
    assert (once.usd_each * 1000, each.usd_each * 1000) == (Decimal("0.05"), Decimal("0.8"))
    assert (once.usd_per_month, each.usd_per_month) == (Decimal("259.2"), Decimal("4147.2"))
    # At its break-even rate, an instance's 1,000 conversations cost the same.
    for offer in (once, each):
        assert per_thousand_conversations(ARTICLE, offer.break_even) == pytest.approx(offer.usd_each * 1000)
    assert once.is_reachable is None


def test_a_rate_without_a_capacity_leads_to_no_conclusion() -> None:
    output = run("--rate", "1000000")
    assert "How many instances this rate takes is not known" in output and "than one endpoint for all" not in output
    assert [line.split()[-3:] for line in output.splitlines() if "endpoint for" in line][:2] == [["?"] * 3] * 2
    found = json.loads(run("--rate", "1000000", "--json"))
    assert found["together"]["instances"] is found["saved"]["usd_per_month"] is None


def test_an_endpoint_of_one_classifier_may_be_less_fast() -> None:
    """With activated LoRA one classifier's endpoint computes the whole conversation."""
    assert cost(rate=Decimal(200), capacity=Decimal(7)).num_separate == 48
    output = run("--rate", "200", "--capacity", "7", "--separate-capacity", "10")
    assert cost(rate=Decimal(200), capacity=Decimal(7), separate_capacity=Decimal(10)).num_separate == 16 * 29
    assert " 464 " in output and "used for 7.00 calls/s, by --separate-capacity" in output
    assert "counted as 16 times as fast" in run("--rate", "200", "--capacity", "7")


def test_one_classifier_and_small_amounts() -> None:
    assert run("--classifiers", "1").startswith("1 classifier on")
    assert [usd(Decimal(one)) for one in ("0", "0.0000042", "1.4e-26")] == ["$0.00", "$0.0000042", "below $0.000001"]


def test_where_a_hosted_api_costs_less_it_is_said() -> None:
    unknown = run()
    assert "costs less than an instance that answers fewer than 8.42 calls/s on average" in unknown
    assert "nobody has said how many calls/s it answers" in unknown
    slow = run("--rate", "2", "--capacity", "7")
    assert "tokens counted once: costs less at any rate. An instance would need 8.42 calls/s" in slow
    assert "and is used for 4.90 at most. At the given rate it costs less than one endpoint for all." in slow
    assert "costs less than an instance below 0.53 calls/s on average, and more above. At the given rate it" in slow
    fast = run("--rate", "20", "--capacity", "30")
    assert "costs less than an instance below 8.42 calls/s" in fast
    assert "At the given rate it costs no less than one endpoint for all." in fast


def test_json_has_all_that_the_table_has() -> None:
    found = json.loads(run("--rate", "2", "--utilisation", "40", "--capacity", "7", "--json"))
    assert (found["kind"], found["format"], found["usable_per_s"]) == ("cost", 1, 4.9)
    assert found["instance"] == {
        "name": "ml.g5.2xlarge",
        "usd_per_hour": 1.515,
        "read": "2026-09-27",
        "source": "https://aws.amazon.com/sagemaker/ai/pricing/",
    }
    assert found["separate"]["usd_per_month"] == 17452.8 and found["together"]["usd_per_month"] == 1090.8
    assert found["saved"] == {"usd_per_month": 16362.0, "share": 0.9375}
    assert found["conversations_per_month"] == 0.8 * 720 * 3600
    assert [one["usd_per_month"] for one in found["hosted"]] == [103.68, 1658.88]
    assert [one["is_reachable"] for one in found["hosted"]] == [False, True]


def test_hosted_prices_count_the_tokens_of_the_report(report: dict[str, Any], tmp_path: Path) -> None:
    rates = {"tokens_asked_per_s": {"median": 29_760.0}, "verdicts_per_s": {"median": 160.0}}
    report["systems"]["native"]["loads"] = [rates]
    path = written(report, tmp_path)
    assert "186 tokens" in run("--bench", path)
    assert "300 tokens" in run("--bench", path, "--tokens", "300")


def test_the_capacity_of_a_report(report: dict[str, Any], tmp_path: Path) -> None:
    output = run("--rate", "20", "--bench", written(report, tmp_path))
    assert "One instance answers 7.00 calls/s (6.80 to 7.10): native did, on a CPU, 2 cores, bfloat16" in output
    assert "true of that machine only. If it was no ml.g5.2xlarge, measure there." in output
    assert "as if it answered as much as another machine (a CPU)" in output.splitlines()[0]
    own = run("--rate", "20", "--instance", "ml.m5.xlarge", "--bench", written(report, tmp_path))
    assert "another machine" not in own and "interrupted" not in own
    assert "was interrupted" in run("--bench", written(report | {"cut_short": True}, tmp_path))
    found = json.loads(run("--rate", "20", "--bench", written(report, tmp_path), "--json"))
    assert found["together"]["instances"] == 5 and found["capacity"]["machine"] == "a CPU, 2 cores, bfloat16"


def test_the_number_of_classifiers_is_the_reports(report: dict[str, Any], tmp_path: Path) -> None:
    report["data"]["classifiers"] = ["a", "b"]
    assert run("--bench", written(report, tmp_path)).startswith("2 classifiers on")
    output = run("--classifiers", "16", "--bench", written(report, tmp_path), code=1)
    assert "--classifiers 16: is not what" in output and "report.json asked: 2" in output


def planned(folder: Path, *arguments: str) -> str:
    plan = CliRunner().invoke(app, ["plan", "--model", "mistral-7b-v0.3", "--json", *arguments])
    return written(plan.stdout, folder)


def test_the_capacity_of_a_plan(tmp_path: Path) -> None:
    output = run("--rate", "1", "--plan", planned(tmp_path, "--gpu", "a10g"))
    # Article: 0.62 calls/s with plain adapters are the limit of an A10G; 65 to 75 % of it are expected.
    assert "One instance would answer 0.40 to 0.46 calls/s, by a plan for NVIDIA A10G, bfloat16, plain" in output
    assert "Nobody has measured it; the lower figure counts." in output and "another machine" not in output
    assert re.search(r"one endpoint for all +4 ", output)  # 1 / (0.7 * 0.40)
    found = json.loads(run("--rate", "1", "--plan", planned(tmp_path, "--gpu", "a10g"), "--json"))
    assert found["capacity"]["computed"] and found["together"]["instances"] == 4
    assert "another machine (NVIDIA H100" in run("--plan", planned(tmp_path, "--gpu", "h100"))


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (("--gpu", "a10g", "--count", "4"), "is a plan for 4 x NVIDIA A10G; ml.g5.2xlarge has 1", "--count 1"),
        (("--gpu", "a10g", "--dtype", "float32", "--adapters", "1"), "does not fit", "--fit"),
        (
            ("--gpu", "h100", "--dtype", "float32"),
            "computes in float32",
            "bfloat16",
        ),
    ],
)
def test_a_plan_that_does_not_know_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str, remedy: str
) -> None:
    output = run("--plan", planned(tmp_path, *arguments), code=1)
    assert message in output and remedy in output
    assert "is a report of kind 'plan'" in run("--bench", planned(tmp_path, *arguments), code=1)


@pytest.mark.parametrize(
    ("system", "message", "remedy"),
    [
        ("peft", "does not know how much 'peft' can answer, because the run did not reach saturation", "--sweep"),
        ("vllm", "did not measure 'vllm': skipped: vllm is not installed", "--sweep"),
        ("other", "has no system 'other'", "use one of 'native', 'peft', 'vllm'"),
    ],
)
def test_a_report_that_does_not_know_is_refused(
    report: dict[str, Any], tmp_path: Path, system: str, message: str, remedy: str
) -> None:
    output = run("--bench", written(report, tmp_path), "--system", system, code=1)
    assert message in output and remedy in output


def test_a_report_whose_figures_are_in_no_order_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    report["systems"]["native"]["saturation"]["conversations_per_s"]["low"] = 9.0
    assert '"low": 9.0' in run("--bench", written(report, tmp_path), code=1)


def test_a_report_of_turns_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    report["data"]["turns"] = True
    assert "was measured with --turns" in run("--bench", written(report, tmp_path), code=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "cost", "format": 1}', "is a report of kind 'cost'"),
        ('{"tokens_per_s": 3}', "is JSON, but no report of `loraplex bench`"),
        ("[]", "is JSON, but no report of `loraplex bench`"),
        ("# Results", "is no report: "),
        ('{"kind": "bench", "format": 2}', "has format 2; this version reads 1"),
        ('{"kind": "bench", "format": 1, "systems": {}}', "key 'about': is missing"),
    ],
)
def test_another_file_is_named_for_what_it_is(tmp_path: Path, content: str, message: str) -> None:
    assert message in run("--bench", written(content, tmp_path), code=1)


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (("--instance", "ml.g5.3xlarge"), "instance 'ml.g5.3xlarge': is unknown", "'ml.g5.2xlarge'"),
        (("--instance", "ml.g5.4xlarge"), "--instance ml.g5.4xlarge: its price is not known", "--prices FILE"),
        (("--rate", "often"), "--rate often: is not a number", "give a number"),
        (("--rate", "0"), "--rate 0: is below 0.000001", ""),
        (("--rate", "1e400"), "--rate 1e400: is above 1000000000", ""),
        (("--rate", "nan"), "--rate nan: is not a finite number", ""),
        (("--classifiers", "1.5"), "--classifiers 1.5: is not a whole number", ""),
        (("--classifiers", "0"), "--classifiers 0: is below 1", ""),
        (("--rate", "1", "--utilisation", "101"), "--utilisation 101: is above 100", ""),
        (("--capacity", "1", "--headroom", "100"), "--headroom 100: is not below 100", ""),
        (("--hours", "800"), "--hours 800: is above 744", ""),
        (("--prices", "none.yaml"), "none.yaml: ", ""),
        (("--bench", "none.json"), "none.json: is no report", "`loraplex bench`"),
        (("--plan", "none.json"), "none.json: is no report", "`loraplex plan … --json`"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], message: str, remedy: str) -> None:
    output = run(*arguments, code=1)
    assert message in output and remedy in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--utilisation", "40"),
        ("--headroom", "10"),
        ("--bench", "a.json", "--capacity", "3"),
        ("--plan", "a.json", "--capacity", "3"),
    ],
)
def test_options_without_effect_are_refused(arguments: tuple[str, ...]) -> None:
    assert arguments[-2] in run(*arguments, code=2)


def test_prices_of_ones_own(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("instances: {our-server: {usd_per_hour: 0.25}}")
    output = run("--instance", "our-server", "--prices", str(prices))
    assert "$180.00" in output and f"$0.25 an hour ({prices})" in output
    prices.write_text("instances: {our-server: {usd_an_hour: 0.25}}")
    assert "unknown key 'instances.our-server.usd_an_hour'" in run("--prices", str(prices), code=1)


def test_the_title_of_an_api_is_shown_as_it_is(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("hosted: {decisions: {usd_per_million_input_tokens: 0.0005, title: '[bold]ours[/]'}}")
    output = run("--prices", str(prices))
    assert "[bold]ours[/], tokens counted once" in output and "$0.00025" in output


def test_the_page_shows_what_the_command_prints() -> None:
    page = (DOCS / "cost.md").read_text()
    shown = re.findall(r"```console\n\$ loraplex cost (.*?)\n```\n+```text\n(.*?)```", page, re.S)
    assert len(shown) == 2
    for arguments, output in shown:
        assert run(*arguments.split()).split() == output.split()
    rows = re.findall(r"^\| `(ml\S+)` \(\w+\) \| \$(\S+) \| (\S+) calls/s \| (\S+) calls/s \|$", page, re.M)
    assert len(rows) == 3
    for instance, price, once, each in rows:
        output = run("--instance", instance)
        assert f"${price} an hour" in output
        assert all(f"fewer than {number} calls/s" in output for number in (once, each))
