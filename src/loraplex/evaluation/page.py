"""The HTML report of an evaluation: one file, without scripts and without a network. It holds texts."""

from collections.abc import Mapping
from html import escape
from typing import Any

from loraplex.amounts import counted
from loraplex.errors import shortened
from loraplex.evaluation.judged import Judged
from loraplex.evaluation.plots import plots
from loraplex.evaluation.report import HEAD, cell, remarks, rows
from loraplex.labelled import said_in
from loraplex.measuring.page import notice, page, section, table
from loraplex.measuring.section import Section
from loraplex.measuring.svg import COLOURS, NO_PLOTS, can_draw

MOST_MISTAKES = 5  # of each classifier
MOST_TEXT = 4000  # characters of a conversation; its end is kept, which decides most labels
INTERVALS = ("accuracy", "f1", "auc", "wrong_above_gate")  # those that fit on a page; --json has all
HOLDS_TEXTS = "This file holds the texts of conversations. Treat it as you treat the conversations themselves."
WORDS = (
    "In parentheses stands the interval that holds the true value in 95 of 100 samples. Precision, recall, F1 and AUC "
    "are of the contract's first label; with more than two labels they are the mean over the labels. Brier and ECE are "
    "the better the lower they are. `let through` is the share of verdicts that `abstain_below` does not mark, and "
    "`wrong of these` the share of wrong labels among them."
)


def html(report: Mapping[str, Any], judged: Mapping[str, Judged]) -> str:
    """Return the page. Without matplotlib it has no plots, and says so."""
    data, about = report["data"], report["about"]
    has_plots = can_draw()
    head = Section(
        title="Evaluation",
        texts=[
            f"{counted(data['conversations'], 'conversation')} of `{data['file']}` and "
            f"{counted(len(judged), 'classifier')} of `{report['source']}`: {counted(report['verdicts'], 'verdict')}, "
            f"{report['verdicts_per_s']:.1f} a second. "
            f"{about['started']}.",
            WORDS,
        ],
        table=(("classifier", *HEAD.values()), rows(report, INTERVALS)),
        points=remarks(report),
    )
    parts = [notice(HOLDS_TEXTS), section(head, level=1), *([] if has_plots else [notice(NO_PLOTS)])]
    parts += [_classifier(name, one, report["classifiers"][name], has_plots) for name, one in judged.items()]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts.append(
        section(
            Section(
                title="To repeat it",
                texts=[f"{versions}; data SHA-256 `{data['sha256']}`."],
                code=about["command"],
            )
        )
    )
    return page(f"{data['file']}: evaluation", parts)


def _classifier(name: str, one: Judged, figures: Mapping[str, Any], has_plots: bool) -> str:
    if not one.rows:
        return section(Section(title=name, texts=["It answered nothing."]))
    plot = f"<figure>{plots(name, one)}{_caption(one)}</figure>" if has_plots else ""
    head = ("right label", *(f"answered {label}" for label in one.labels))
    counts = [
        [label, *(f"{num:,}" for num in row)] for label, row in zip(one.labels, figures["confusion"], strict=True)
    ]
    text = f"F1 {cell(figures['f1'], figures['intervals'].get('f1'))}, AUC {cell(figures['auc'])}."
    return section(Section(title=name, texts=[text]), f"{plot}{table(head, counts)}{_mistakes(one)}")


def _caption(one: Judged) -> str:
    """Say what the plots show, with the colours of the labels."""
    left, middle, right = (
        ("are 80 % of the conversations with a score of 0.8 labelled so?", "ROC curve", "scores")
        if len(one.labels) == 2
        else ("is the answered label right as often as its score says?", "a ROC curve for each label", "its scores")
    )
    of = (one.labels[0], f"not {one.labels[0]}") if len(one.labels) == 2 else ("right", "wrong")
    shown = ", ".join(f"{_mark(index)} {escape(label)}" for index, label in enumerate(of))
    curves = ", ".join(f"{_mark(index)} {escape(label)}" for index, label in enumerate(one.labels[: len(COLOURS)]))
    named = "" if len(one.labels) == 2 else f" ({curves})"
    about = f"Scores of {escape(repr(one.labels[0]))}. " if len(one.labels) == 2 else "Scores of the answered label. "
    return (
        f"<figcaption>{about}Left: {left} Large points stand for many. Middle: {middle}{named}. "
        f"Right: {right}, {shown}.</figcaption>"
    )


def _mark(index: int) -> str:
    return f'<span style="color:var(--system{index})">■</span>'


def _mistakes(one: Judged) -> str:
    """Return the wrong answers that were given most surely, with the conversations."""
    wrong = [
        (verdict.confidence or 0.0, row, verdict, one.labels[right])
        for row, verdict, right, said in zip(one.rows, one.verdicts, one.truth, one.answered, strict=True)
        if right != said
    ]
    found = sorted(wrong, key=lambda pair: (-pair[0], pair[1].line))[:MOST_MISTAKES]
    if not found:
        return "<p>It made no mistake.</p>"
    items = "".join(
        f"<details><summary>Line {row.line}: answered {escape(shortened(str(verdict.label)))} with {sure:.3f}, "
        f"labelled {escape(shortened(label))}</summary><pre>{escape(_text(said_in(row)))}</pre></details>\n"
        for sure, row, verdict, label in found
    )
    return f"<p>The worst of {len(wrong):,} mistakes, the surest first:</p>\n{items}"


def _text(said: str) -> str:
    return said if len(said) <= MOST_TEXT else f"… ({len(said) - MOST_TEXT:,} characters before)\n{said[-MOST_TEXT:]}"
