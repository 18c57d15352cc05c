"""report.html: every figure is the JSON's, nothing from outside is markup, and the page stands alone."""

import importlib.util
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from loraplex.bench.cells import latency, spread_text
from loraplex.bench.html import html
from loraplex.bench.markdown import markdown
from loraplex.bench.sections import _busy, load_name

HOSTILE = "<script>alert('x')</script>\"&|`$^$"
VOID = {"meta", "br", "img", "hr", "link", "input"}


MANY = {"n": 1234, "max": 1e5, "at_least": None}


def about(value: float, more: float = 1.1) -> dict[str, Any]:
    return {"median": value, "low": value / more, "high": value * more, "rounds": 5}


def a_load(kind: str, rate: float, p50: float, **more: Any) -> dict[str, Any]:
    latency = {"p50": about(p50), "p90": about(2 * p50), "p99": about(3.3 * p50), **MANY}
    errors = {HOSTILE: 2} if kind == "open" else {}
    return {
        "kind": kind,
        "slices": 5,
        "conversations": 1236,
        "requests": {"ok": 1234, "refused": 0, "failed": 2, "timeout": 0, "errors": errors},
        "excluded": {"ok": 7, "refused": 0, "failed": 0, "timeout": 0, "errors": {}},
        "latency_ms": latency,
        "all_verdicts_ms": latency,
        "requests_per_s": about(rate),
        "conversations_per_s": about(rate),
        "verdicts_per_s": about(16 * rate),
        "tokens_asked_per_s": about(4000 * rate),
        "tokens_computed_per_s": about(1500 * rate),
        "http_adds_ms": about(1.6),
        "busy_cores": {"client": about(0.9), "system": about(1.5), "others": about(0.05)},
        "share_of_gemm_rate": min(0.01 * rate, 1.0),
        "floor": {"flop_per_conversation": 4.2e9, "weights_bytes": 1.1e7},
        **more,
    }


def a_system(rate: float, *, turns: bool = True) -> dict[str, Any]:
    shares = (0.25, 0.5, 0.75, 1.0, 1.25)
    opened = [
        a_load("open", rate * share, 300 / rate * (1 + share**4), offered_per_s=rate * share, share_of_capacity=share)
        for share in shares
    ]
    return {
        "state": "measured",
        "versions": {"loraplex": "0.1.0", HOSTILE: HOSTILE},
        "transport": "http",
        "url": None,
        "engine": {"dtype": "float32"},
        "shares_prefix": False,
        "memory": {"peak_rss_bytes": 900_000_000, "starting_rss_bytes": 800_000_000, "peak_device_bytes": None},
        "loads": [
            a_load("closed", 0.8 * rate, 700 / rate, concurrency=1),
            a_load("closed", rate, 2500 / rate, concurrency=8),
            *opened,
        ],
        "saturation": {
            "reached": True,
            "conversations_per_s": about(rate),
            "at": "open, much offered (1.25x the capacity)",
            "why": HOSTILE,
        },
        "goodput_at_2x": about(0.97),
        "quality": {
            "classifiers": {HOSTILE: {"n": 300, "positives": 0, "accuracy": 0.913, "f1": None}},
            "mean": {"n": 300, "positives": 120, "accuracy": 0.913, "f1": 0.871},
        },
        "agreement": {
            "with": "peft",
            "verdicts": 4800,
            "labels_equal": 4799,
            "difference_mean": 1e-7,
            "difference_max": 3e-6,
        },
        "turns": [
            {
                "turn": turn,
                "conversations": 40,
                "latency_ms": {
                    name: about(share * turn * 300 / rate) for name, share in (("p50", 1), ("p90", 2), ("p99", 3))
                }
                | MANY,
                "tokens_asked": 4000.0 + turn,
                "tokens_computed": 1500.0 + turn,
                "cached_share": 0.15 * (turn - 1),
            }
            for turn in range(1, 6)
        ]
        if turns
        else [],
    }


def a_report(**systems: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "bench",
        "cut_short": False,
        "about": {
            "started": "2026-11-28T12:00:00+00:00",
            "command": f"loraplex bench bundle --data {HOSTILE}",
            "device": "a processor avx512f",
            "processor": "a processor avx512f",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 2**34,
            "dtype": "float32",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0"},
            "commit": "0123456789ab+",
            "settings": {"transport": "http", "asking": "together", "bundle": HOSTILE},
            "seed": 0,
        },
        "data": {"file": HOSTILE, "sha256": "00ff", "conversations": 300, "turns": False}
        | {"classifiers": [HOSTILE], "labelled": {HOSTILE: 300}},
        "limits": {"gemm_flops_per_s": about(9e10), "bytes_per_s": about(1.4e10)},
        "systems": systems
        or {
            "native": a_system(21.0),
            "peft": a_system(8.0),
            "peft-mixed": a_system(7.4),
            "vllm": {"state": f"skipped: {HOSTILE}"},
        },
        "samples": {"columns": [], "rows": []},
    }


class Page(HTMLParser):
    """Tables by the heading above them, and all text that a reader sees. Every element that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self._heading = ""
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2"):
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("h1", "h2"):
            self._heading += data
        if "td" in self._open or "th" in self._open:
            self.tables[self._heading][-1][-1] += data


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return a_report()


@pytest.fixture(scope="module")
def text(report: dict[str, Any]) -> str:
    return html(report)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a page's time."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))


def test_every_figure_of_the_page_is_the_jsons(report: dict[str, Any], page: Page) -> None:
    measured = {name: one for name, one in report["systems"].items() if "loads" in one}
    loads = {row[0]: row[1:] for row in page.tables["All loads"]}
    for title, one in (("Loraplex", measured["native"]), ("PEFT", measured["peft"])):
        for load in one["loads"]:
            row = loads[f"{title}, {load_name(load)}"]
            assert row[:4] == ["1,234", "0", "2", "0"]
            assert row[4:7] == [spread_text(load["latency_ms"][name]) for name in ("p50", "p90", "p99")]
            assert row[8:11] == [
                spread_text(load[f"{name}_per_s"]) for name in ("requests", "conversations", "verdicts")
            ]
    article = page.tables["The article's table"]
    closed = [one["loads"][1] for one in measured.values()]
    assert article[1][3:] == [f"{spread_text(load['latency_ms']['p50'])} ms" for load in closed]
    assert article[3][3:] == [f"{spread_text(load['requests_per_s'])}/s" for load in closed]
    dollars = [row[1] for row in page.tables["Cost of 1,000 conversations"][1:]]
    assert dollars == ["$0.0132", "$0.0347", "$0.0375"]  # 1000 / 3600 / 21, 8, 7.4
    turns = page.tables["Turn by turn"]
    assert [row[2] for row in turns[1:6]] == [
        spread_text(one["latency_ms"]["p50"]) for one in measured["native"]["turns"]
    ]
    assert [row[5] for row in turns[1:6]] == [
        f"{one['cached_share']:.0%}"[:-1] + " %" for one in measured["native"]["turns"]
    ]
    assert [row[3] for row in page.tables["The machine's limit"][1:]] == ["21 %", "8 %", "7 %"]
    quality = [row[1] for row in page.tables["Right and wrong"][1:]]
    assert quality == ["0.913, -, 300 (0)", "0.913, 0.871, 300 (120)"]
    settings = {row[0]: row[1] for row in page.tables["Machine and settings"]}
    assert (settings["cores"], settings["sha256"], settings["torch"]) == ("2", "00ff", "2.13.0")
    assert settings["bundle"] == HOSTILE


def test_a_busy_client_is_told(page: Page) -> None:
    assert "PEFT, closed, 8 clients: the client was busy with 0.90 of its one core" in page.text
    assert "other processes were busy" not in page.text
    assert "with 0.11 of the machine's cores" in "".join(_busy({"client": None, "others": about(0.11)}, 2))


def test_the_summary_compares_and_tells_sharing_from_speed(page: Page) -> None:
    assert "Loraplex answers 21 (19.1-23.1) conversations a second here" in page.text
    assert "PEFT answers 8 (7.27-8.8): Loraplex answers 2.62 times as many (speed 2.62, sharing 1)." in page.text


@pytest.mark.usefixtures("no_plots")
def test_a_device_for_rent_has_its_price(report: dict[str, Any]) -> None:
    rented = {**report, "about": report["about"] | {"device": "NVIDIA L4"}}
    head, ours, *_ = Page(html(rented)).tables["Cost of 1,000 conversations"]
    assert head[2] == "g6.xlarge, $0.8048 an hour" and head[3].startswith("ml.g6.")
    assert ours[1:3] == ["$0.0132", "$0.0106"]


@pytest.mark.usefixtures("no_plots")
def test_llama_cpp_without_adapters_is_told(report: dict[str, Any]) -> None:
    facts = {"adapters": False, "no_adapters": HOSTILE, "labels_asked_again": 7, "prompts_as": "text"}
    llamacpp = a_system(2.0) | {"quality": {"classifiers": {}, "mean": None}, "agreement": None, "facts": facts}
    found = a_report(native=a_system(3.0), llamacpp=llamacpp)
    assert f"llama.cpp has no adapters ({HOSTILE})" in Page(html(found)).text
    assert "llama.cpp was asked 7 times more" in markdown(found)


@pytest.mark.usefixtures("no_plots")
def test_a_percentile_of_few_is_their_largest_and_what_was_given_up_is_a_bound() -> None:
    found = {"p50": about(40.0), "p90": about(900.0), "p99": None, "n": 48, "max": 1234.5, "at_least": 900.0}
    told = [latency(found, name) for name in ("p50", "p90", "p99")]
    assert told == ["40 (36.4-44)", "≥ 900 (818-990)", "≥ 1,234, max of 48"]
    load = a_load("closed", 3.0, 100.0, concurrency=4) | {"latency_ms": found}
    page = Page(html(a_report(native={**a_system(3.0, turns=False), "loads": [load]})))
    assert page.tables["The article's table"][2][3] == "≥ 1,234 ms, max of 48"


def test_the_bars_are_labelled_with_their_figures(page: Page) -> None:
    assert {"21", "8", "7.4", "21 %", "8 %", "7 %"} <= set(re.split(r"\s*\n\s*", page.text))


def test_what_came_from_outside_is_text(page: Page) -> None:
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 8
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_no_network_and_no_script(text: str, page: Page) -> None:
    assert page.tags.count("svg") == 5 and not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href") or "url(" in (value or ""):
            assert value is not None and (value.startswith("#") or "url(#" in value), (name, value)
    assert "@import" not in text and "url(" not in text.split("</style>")[0]


def test_ids_are_used_once_and_references_lead_to_one(page: Page) -> None:
    ids = [value for name, value in page.attributes if name == "id"]
    used = [value[1:] for name, value in page.attributes if name == "xlink:href" and value]
    used += [found for name, value in page.attributes for found in re.findall(r"url\(#(.*?)\)", value or "")]
    assert len(ids) == len(set(ids)) and set(used) <= set(ids)


def test_colours_are_the_pages(text: str) -> None:
    svgs = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert set(re.findall("#[0-9a-f]{6}", " ".join(svgs))) <= {"#ffffff"}  # on a bar


def test_the_same_report_makes_the_same_page(report: dict[str, Any], text: str) -> None:
    assert html(report) == text


@pytest.mark.usefixtures("no_plots")
def test_without_matplotlib_the_page_says_how_to_get_the_plots(report: dict[str, Any], page: Page) -> None:
    plain = Page(html(report))
    assert "svg" not in plain.tags and "pip install 'loraplex[bench]'" in plain.text
    assert plain.tables["All loads"] == page.tables["All loads"]


@pytest.mark.parametrize(
    "systems",
    [
        {"vllm": {"state": "skipped: vllm is not installed"}},
        {"native": {**a_system(3.0, turns=False), "loads": [a_load("closed", 3.0, 100.0, concurrency=4)]}},
        {"native": {"state": "failed: it ended", "url": None, "versions": {}, "engine": None}, "peft": a_system(1e-3)},
    ],
    ids=["nothing measured", "one closed loop", "one failed"],
)
def test_a_page_of_little(systems: dict[str, Any]) -> None:
    report = a_report(**systems)
    page = Page(html(report))
    assert ("svg" in page.tags) == any("loads" in one for one in systems.values())
    assert all(one["state"] in page.text for one in systems.values() if one["state"] != "measured")


def test_an_open_loop_that_answered_nothing_has_a_page() -> None:
    none = {**dict.fromkeys(("p50", "p90", "p99", "max", "at_least")), "n": 0}
    load = a_load("open", 3.0, 100.0, offered_per_s=3.0, share_of_capacity=None) | {
        "latency_ms": none,
        "share_of_gemm_rate": None,
    }
    load |= {name: None for name in load if name.endswith("_per_s") and name != "offered_per_s"} | {
        "all_verdicts_ms": none
    }
    system = a_system(3.0) | {"loads": [load], "quality": {"classifiers": {}, "mean": None}, "agreement": None}
    system["saturation"] = {"reached": False, "conversations_per_s": None, "at": None, "why": None}
    Page(html(a_report(native=system, peft=a_system(2.0))))


def test_markdown_and_page_have_the_same_tables(report: dict[str, Any], page: Page) -> None:
    text = markdown(report)
    for title, rows in page.tables.items():
        for row in rows if title != "Machine and settings" else ():
            cells = [cell.replace("|", "\\|").replace("<", "&lt;") for cell in row]
            assert f"| {' | '.join(cells)} |" in text
