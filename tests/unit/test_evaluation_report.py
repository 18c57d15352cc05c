"""Verdicts by classifier, the report, and the page: nothing from outside is markup."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

from loraplex.bundle import AdapterSource
from loraplex.errors import ConfigurationError, QueueFullError, UnknownClassifierError
from loraplex.evaluation.asking import UNLABELLED, Outcome, Question, plan, sample
from loraplex.evaluation.judged import Judged, judge
from loraplex.evaluation.page import HOLDS_TEXTS, html
from loraplex.evaluation.plots import roc
from loraplex.evaluation.report import remarks, report, rows
from loraplex.labelled import Labelled
from loraplex.measuring.files import sha256
from loraplex.types import ClassifyResult, ErrorInfo, Message, Timings, Usage, Verdict

HOSTILE = "<script>alert('x')</script>\"&`$^$_"
DATA = Path("data.jsonl")
LABELS = ("yes", "no")
TOO_LONG = ErrorInfo(code="input_too_long", message=HOSTILE, remedy="shorten it")


def row(line: int, text: str = "Customer: hello", **labels: Any) -> Labelled:
    return Labelled(line=line, input=text, labels=labels)


def said(name: str, yes: float, labels: tuple[str, ...] = LABELS, *, abstained: bool = False) -> Verdict:
    rest = (1 - yes) / (len(labels) - 1)
    scores = {label: yes if label == labels[0] else rest for label in labels}
    label = max(scores, key=scores.__getitem__)
    return Verdict(classifier=name, label=label, confidence=scores[label], scores=scores, abstained=abstained)


def answer(*verdicts: Verdict) -> ClassifyResult:
    return ClassifyResult(id="1", verdicts=verdicts, usage=Usage(), timings=Timings())


def judged(pairs: list[tuple[bool, float]], labels: tuple[str, ...] = LABELS, text: str = "Customer: hi") -> Judged:
    questions = [
        Question(row=row(line, text, done=labels[not truth]), classifiers=("done",))
        for line, (truth, _) in enumerate(pairs, 1)
    ]
    outcomes = [answer(said("done", yes, labels)) for _, yes in pairs]
    found, _ = judge(questions, outcomes, {}, DATA)
    return found["done"]


def a_report(found: Mapping[str, Judged], tmp_path: Path, **more: Any) -> dict[str, Any]:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    about = {"started": "2026-11-28", "command": HOSTILE, "versions": {"torch": "2.13"}}
    questions = (Question(row=row(1), classifiers=("done",)),)
    planned = plan([row(1, done=True, other=True)], {"done": True, "idle": True}, (), data)
    assert planned.questions[0].classifiers == questions[0].classifiers
    options: dict[str, Any] = {"source": HOSTILE, "data": data, "seconds": 2.0, "about": about}
    return report(found, planned, ["verbatim"], **options | more)


def test_a_classifier_is_asked_where_it_has_a_label() -> None:
    data = [row(1, done=True), row(2), row(3, done=False, calm="yes"), row(4, stranger=True)]
    found = plan(data, {"done": True, "calm": True, "idle": True, "verbatim": False}, (), DATA)
    assert [(one.row.line, one.classifiers) for one in found.questions] == [(1, ("done",)), (3, ("done", "calm"))]
    assert found.left_out["idle"] == UNLABELLED == found.left_out["verbatim"] and found.unknown == {"stranger": 1}
    some = plan(data, {"done": True, "calm": True}, ("calm",), DATA)
    assert [one.classifiers for one in some.questions] == [("calm",)] and not some.left_out


def test_nothing_to_ask_and_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownClassifierError, match=r"'doen' \(did you mean done for doen\? Or use one of: done"):
        plan([row(1, done=True)], {"done": True}, ("doen",), DATA)
    with pytest.raises(ConfigurationError, match="labels for 'other', and asked can be 'done'"):
        plan([row(1, other=True)], {"done": True}, (), DATA)
    with pytest.raises(ConfigurationError, match=r"did you mean done for doen\?"):
        plan([row(1, doen=True)], {"done": True}, (), DATA)
    with pytest.raises(ConfigurationError, match="can be asked for"):
        plan([row(1, verbatim=True)], {"verbatim": False}, (), DATA)
    for num in (0, 3):
        with pytest.raises(ConfigurationError, match=f"--conversations {num}"):
            sample((row(1), row(2)), num, DATA)


def test_a_sample_keeps_the_order_and_is_always_the_same() -> None:
    data = tuple(row(line) for line in range(100))
    lines = [one.line for one in sample(data, 10, DATA)]
    assert lines == sorted(lines) and lines == [one.line for one in sample(data, 10, DATA)] and max(lines) > 50


def test_verdicts_are_sorted_and_failures_are_kept() -> None:
    questions = [
        Question(row=row(1, done=True, calm=False), classifiers=("done", "calm")),
        Question(row=row(2, done={"yes": 0.3, "no": 0.7}), classifiers=("done",)),
        Question(row=row(3, done=False), classifiers=("done",)),
    ]
    outcomes: list[Outcome] = [
        answer(said("done", 0.9), Verdict(classifier="calm", error=TOO_LONG)),
        answer(said("done", 0.8, abstained=True)),
        QueueFullError("full", remedy="later"),
    ]
    found, without = judge(questions, outcomes, {"calm": LABELS}, DATA)
    done, calm = found["done"], found["calm"]
    assert (done.truth, done.answered, done.labels) == ((0, 1), [0, 0], LABELS) and not without
    assert [(one.line, error.code) for one, error in done.failed] == [(3, "queue_full")]
    assert calm.rows == () and calm.figures().num_failed == 1 and calm.figures().accuracy.value is None
    assert done.figures().coverage.value == 0.5


def test_verdicts_without_scores_have_no_figures() -> None:
    verdict = Verdict(classifier="verbatim", label=" a", confidence=0.1)
    found, without = judge([Question(row=row(1, verbatim="a"), classifiers=("verbatim",))], [answer(verdict)], {}, DATA)
    assert not found and without == ["verbatim"]


def test_labels_that_the_verdicts_lack_are_an_error_with_the_line() -> None:
    question = Question(row=row(7, done="maybe"), classifiers=("done",))
    with pytest.raises(ConfigurationError, match=r"line 7: label 'maybe' of 'done'"):
        judge([question], [answer(said("done", 0.9))], {}, DATA)


def test_the_report_has_plain_figures_and_their_intervals(tmp_path: Path) -> None:
    one = judged([(True, 0.9), (True, 0.4), (False, 0.2), (False, 0.3)])
    failed = ((row(8), TOO_LONG), (row(9), TOO_LONG))
    other = Judged(labels=(), rows=(), verdicts=(), truth=(), failed=failed)
    found = a_report({"done": one, "calm": other}, tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures = found["classifiers"]["done"]
    assert (figures["n"], figures["accuracy"], figures["f1"], figures["auc"]) == (4, 0.75, pytest.approx(2 / 3), 1.0)
    assert figures["confusion"] == [[1, 1], [0, 2]] and figures["intervals"]["f1"][0] < 2 / 3
    assert found["mean"]["accuracy"] == 0.75 and (found["mean"]["n"], found["mean"]["failed"]) == (4, 2)
    assert found["verdicts_per_s"] == 2.0 and len(found["data"]["sha256"]) == 64
    assert [line[0] for line in rows(found, ("f1",))] == ["done", "calm", "mean"]
    assert rows(found, ("f1",))[0][5].startswith("0.667 (") and rows(found, ())[1][1:3] == ["0", "-"]
    told = "\n".join(remarks(found))
    assert "calm: 2 times not answered, input_too_long (line 8" in told and "no figures (verbatim): it has no" in told
    assert "no figures (idle): no conversation" in told and "labels for other (1 conversation), and no" in told
    assert rows(found, (), ("f1", "n"))[1:] == [["calm", "-", "0"], ["mean", "0.667", "4"]]


def test_remarks_are_few(tmp_path: Path) -> None:
    names = {f"task{number}": True for number in range(16)}
    planned = plan([row(1, task0=True, tsak1=True, stranger=True)], names, (), DATA)
    found = {
        "classifiers": {"task0": {"failures": []}},
        "left_out": planned.left_out,
        "unknown_labels": planned.unknown,
    }
    warning, rest = remarks(found | {"trained_on_data": []})
    assert warning.startswith("warning: the data has labels for stranger (1 conversation), tsak1 (1 conversation), and")
    assert warning.endswith("; did you mean task1 for tsak1?")
    assert rest == f"no figures (task1, task2, task3, task4, task5, … (15 in all)): {UNLABELLED}"


def test_a_file_that_was_trained_on_is_told(tmp_path: Path) -> None:
    from loraplex.cli.eval import _trained_on

    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    for name, digest in (("done", sha256(data)), ("calm", "0"), ("own", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps({"data": {"sha256": digest}} if digest else []))
    sources = [
        AdapterSource(name=name, path=tmp_path / name, contract=None) for name in ("done", "calm", "own", "bare")
    ]
    assert _trained_on(data, sources) == ["done"]
    found = {"done": judged([(True, 0.9), (False, 0.1)])}
    assert "done learned from this very file" in " ".join(remarks(a_report(found, tmp_path, trained=["done"])))
    assert "learned from" not in " ".join(remarks(a_report(found, tmp_path)))


class Page(HTMLParser):
    """All tags and all text that a reader sees. Every element that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self._open = "", [""]
        self.feed(page)
        self.close()
        assert self._open == [""]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""


LONG = "Agent: x\n" * 2000 + HOSTILE


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    draw = numpy.random.default_rng(0)
    pairs = [(bool(draw.random() < 0.5), float(draw.random())) for _ in range(40)]
    found = {
        "two": judged(pairs, text=LONG),
        "hostile": judged(pairs, (HOSTILE, "_no$"), text=HOSTILE),
        "many": judged(pairs, ("a", "b", "c")),
        "right": judged([(True, 0.9), (False, 0.1)]),
        "silent": Judged(labels=(), rows=(), verdicts=(), truth=(), failed=((row(8), TOO_LONG),)),
    }
    return html(a_report(found, tmp_path_factory.mktemp("page")), found)


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    seen = Page(page)
    assert seen.tags.count("svg") == 4 and not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    for name, value in seen.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href") or "url(" in (value or ""):
            assert value is not None and (value.startswith("#") or "url(#" in value), (name, value)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    svgs = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert not set(re.findall("#[0-9a-f]{6}", " ".join(svgs))), "colours are the page's"


def test_the_page_says_that_it_holds_texts_and_shows_the_worst_mistakes(page: str) -> None:
    seen = Page(page)
    assert HOLDS_TEXTS in seen.text[:300] and seen.text.count(HOSTILE) >= 8
    assert "It made no mistake." in seen.text and "It answered nothing." in seen.text
    assert seen.tags.count("details") == 15 and "characters before)" in seen.text
    sure = [float(one) for one in re.findall(r"with (0\.\d+), labelled", seen.text)]
    assert sure[:5] == sorted(sure[:5], reverse=True)


def test_a_message_is_a_line_of_a_mistakes_text(tmp_path: Path) -> None:
    messages = (Message(role="user", content="hello"), Message(role="assistant", content="bye"))
    asked = Question(row=Labelled(line=3, input=messages, labels={"done": "no"}), classifiers=("done",))
    found, _ = judge([asked], [answer(said("done", 0.9))], {}, DATA)
    assert "user: hello\nassistant: bye" in html(a_report(found, tmp_path), found)


def test_without_matplotlib_the_page_says_how_to_get_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {"done": judged([(True, 0.9), (False, 0.6)])}
    plain = Page(html(a_report(found, tmp_path), found))
    assert "svg" not in plain.tags and "pip install 'loraplex[bench]'" in plain.text


def test_a_roc_curve_is_scikit_learns() -> None:
    from sklearn.metrics import roc_curve

    draw = numpy.random.default_rng(3)
    is_right, scores = draw.random(150) < 0.4, draw.random(150).round(2)
    alarms, found = roc(scores, is_right)
    expected = roc_curve(is_right, scores, drop_intermediate=False)
    assert numpy.allclose(alarms, expected[0]) and numpy.allclose(found, expected[1])
    assert len(roc(scores, numpy.zeros(150, dtype=bool))[0]) == 0
