"""What an evaluation found, as JSON and as the rows of a table."""

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.amounts import counted
from loraplex.evaluation.asking import NO_LABELS, Plan
from loraplex.evaluation.figures import NUMBERS, Figure, Figures
from loraplex.evaluation.judged import Judged
from loraplex.evaluation.quality import mean_of
from loraplex.labelled import Labelled
from loraplex.measuring.files import sha256
from loraplex.problems import similar
from loraplex.types import ErrorInfo

FORMAT = 1
MOST_LINES = 20  # of failed questions of one kind
MOST_NAMES = 5  # in a remark
HEAD = {
    "n": "n",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auc": "AUC",
    "brier": "Brier",
    "ece": "ECE",
    "coverage": "let through",
    "wrong_above_gate": "wrong of these",
}


def report(
    judged: Mapping[str, Judged],
    plan: Plan,
    without: Seq[str],
    *,
    source: str,
    data: Path,
    seconds: float,
    about: Mapping[str, Any],
    trained: Seq[str] = (),
) -> dict[str, Any]:
    """Return the report of an evaluation.

    trained:  classifiers that were trained on this data.
    without:  classifiers whose verdicts have no scores.
    source:   the bundle or the server that was asked.
    seconds:  from the first question to the last answer.
    """
    figures = {name: one.figures() for name, one in judged.items()}
    num = sum(one.n for one in figures.values())
    return {
        "format": FORMAT,
        "kind": "eval",
        "source": source,
        **classifiers_json(judged, figures),
        "left_out": {**plan.left_out, **dict.fromkeys(without, NO_LABELS)},
        "unknown_labels": dict(plan.unknown),
        "data": {"file": data.name, "sha256": sha256(data), "conversations": len(plan.questions)},
        "trained_on_data": list(trained),
        "verdicts": num,
        "seconds": seconds,
        "verdicts_per_s": num / seconds,
        "about": dict(about),
    }


def classifiers_json(judged: Mapping[str, Judged], figures: Mapping[str, Figures]) -> dict[str, Any]:
    """Return the part of a report that has the figures: of each classifier, and their means."""
    return {
        "classifiers": {
            name: figures_json(one) | {"failures": _failures(judged[name].failed)} for name, one in figures.items()
        },
        "mean": {name: mean_of(number(one, name) for one in figures.values()) for name in NUMBERS}
        | {"n": sum(one.n for one in figures.values()), "failed": sum(one.num_failed for one in figures.values())},
    }


def figures_json(found: Figures) -> dict[str, Any]:
    """Return a classifier's figures. `intervals` has [low, high] of those that have an interval."""
    every = {name: getattr(found, name) for name in NUMBERS}
    return {
        "n": found.n,
        "failed": found.num_failed,
        **{name: number(found, name) for name in NUMBERS},
        "intervals": {
            name: [one.low, one.high] for name, one in every.items() if isinstance(one, Figure) and one.low is not None
        },
        "labels": list(found.labels),
        "confusion": [list(row) for row in found.confusion],
    }


def number(found: Figures, name: str) -> float | None:
    """Return a figure's value."""
    one = getattr(found, name)
    value: float | None = one.value if isinstance(one, Figure) else one
    return value


def _failures(failed: Seq[tuple[Labelled, ErrorInfo]]) -> list[dict[str, Any]]:
    """Return the reasons for questions that were not answered: one entry for each code, with its first message."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for row, error in failed:
        groups.setdefault(error.code, []).append((row.line, error.message))
    return [
        {"code": code, "num": len(found), "message": found[0][1], "lines": [line for line, _ in found[:MOST_LINES]]}
        for code, found in groups.items()
    ]


def rows(report: Mapping[str, Any], intervals: Collection[str], shown: Iterable[str] = HEAD) -> list[list[str]]:
    """Return the table's rows: a classifier in each, and their means in the last where there are several.

    intervals:  the figures whose interval is shown.
    shown:      the table's columns, keys of HEAD."""
    shown = list(shown)
    found = [[name, *_cells(one, intervals, shown)] for name, one in report["classifiers"].items()]
    return found + ([["mean", *_cells(report["mean"], (), shown)]] if len(found) > 1 else [])


def _cells(one: Mapping[str, Any], intervals: Collection[str], shown: Iterable[str]) -> list[str]:
    bounds = one.get("intervals", {})
    return [
        f"{one['n']:,}" if name == "n" else cell(one[name], bounds.get(name) if name in intervals else None)
        for name in shown
    ]


def cell(value: float | None, bounds: Seq[float] | None = None) -> str:
    """Return a figure with its interval, as "0.932 (0.901-0.955)"; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({bounds[0]:.3f}-{bounds[1]:.3f})" if bounds else "")


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know beside the table: names that no classifier has, classifiers that learned from the
    data, what failed, and what was left out."""
    lines = stranger_lines(report["unknown_labels"], [*report["classifiers"], *report["left_out"]])
    if report["trained_on_data"]:
        lines.append(
            f"warning: {_some(report['trained_on_data'])} learned from this very file: the figures are too good"
        )
    lines += [
        f"{name}: {_times(one['num'])} not answered, {one['code']} (line {one['lines'][0]}: {one['message']})"
        for name, found in report["classifiers"].items()
        for one in found["failures"]
    ]
    return lines + left_out_lines(report["left_out"], "no figures")


def stranger_lines(unknown: Mapping[str, int], known: Seq[str]) -> list[str]:
    """Return a warning about names in the data that no classifier has. unknown: name -> conversations with a label."""
    if not unknown:
        return []
    told = _some([f"{name} ({counted(num, 'conversation')})" for name, num in unknown.items()])
    hint = similar(unknown, known)
    return [f"warning: the data has labels for {told}, and no classifier has this name{'; ' if hint else ''}{hint}"]


def left_out_lines(left_out: Mapping[str, str], what: str) -> list[str]:
    """Return a line for each reason, with the classifiers that it holds for. what: what they lack."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return [f"{what} ({_some(of)}): {why}" for why, of in names.items()]


def _some(names: Seq[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _times(num: int) -> str:
    return "once" if num == 1 else f"{num:,} times"
