"""The table of verdicts that `loraplex classify` prints. It fits the terminal: a name is never cut, and a bar stands on
one line with its label and its number."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraplex.types import ClassifyResult, Verdict

MOST_BARS = 8  # of a verdict
SHORT_LABEL = 12  # characters of a label beside its bar, where there is little room
# Whether versions are shown, characters of a bar, and whether labels are cut: the first that fits is printed.
FORMS = ((True, 10, False), (False, 10, False), (False, 5, False), (False, 5, True))


def print_verdicts(console: Console, result: ClassifyResult) -> None:
    """Print a line for each label of each verdict, then errors, warnings and timings."""
    if isinstance(console.file, io.TextIOWrapper):  # a warning may have letters that the terminal has not
        console.file.reconfigure(errors="backslashreplace")
    console.print(_fitting(console, result.verdicts))
    for verdict in result.verdicts:
        if verdict.error is not None:
            text = f"error: {verdict.classifier}: {verdict.error.message} ({verdict.error.remedy})"
            console.print(text, style="red", markup=False)
    names: dict[str, list[str]] = {}  # of the classifiers that give a warning
    for verdict in result.verdicts:
        for warning in verdict.warnings or ():
            names.setdefault(warning, []).append(verdict.classifier)
    for warning, warned in names.items():
        who = "" if len(warned) == len(result.verdicts) else f"{', '.join(warned)}: "
        console.print(f"warning: {who}{warning}", style="yellow", markup=False)
    usage, timings = result.usage, result.timings
    console.print(
        f"{usage.computed_tokens} tokens in {timings.total_ms:.0f} ms "
        f"(tokenize {timings.tokenize_ms:.1f}, wait {timings.queue_ms:.1f}, compute {timings.compute_ms:.1f})"
    )


def _fitting(console: Console, verdicts: Sequence[Verdict]) -> Table:
    wide = console.options.update(width=10_000)
    for has_versions, num_bar, is_cut in FORMS:
        table = _table(verdicts, has_versions, num_bar, is_cut, encoding=console.encoding)
        if console.measure(table, options=wide).maximum <= console.width:
            break
    return table  # the last one where none fits: names and labels then go over several lines


def _table(verdicts: Sequence[Verdict], has_versions: bool, num_bar: int, is_cut: bool, *, encoding: str) -> Table:
    bars = [_bars(one, num_bar, is_cut, encoding=encoding) for one in verdicts]
    table = Table()
    table.add_column("classifier", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("confidence" if num_bar == FORMS[0][1] else "conf.", justify="right", no_wrap=True)
    table.add_column("scores", no_wrap=True)  # only the columns before it give way
    if has_versions:
        table.add_column("adapter version", no_wrap=True)
    for verdict, lines in zip(verdicts, bars, strict=True):
        label, confidence = "", ""
        if verdict.skipped_by is not None:
            label = "[dim]skipped[/]"
        elif verdict.error is not None or verdict.label is None or verdict.confidence is None:
            label = "[red]error[/]"
        else:
            level = "" if verdict.score is None else f" ({verdict.score:.2f})"
            label = escape(f"{_writable(verdict.label, encoding)}{' (abstained)' if verdict.abstained else ''}{level}")
            confidence = f"{verdict.confidence:.3f}"
        row = [escape(_writable(verdict.classifier, encoding)), label, confidence, escape("\n".join(lines))]
        if has_versions:
            row.append(verdict.adapter.version if verdict.adapter else "")
        table.add_row(*row)
    return table


def _bars(verdict: Verdict, num_bar: int, is_cut: bool, *, encoding: str) -> list[str]:
    """Return a line for each label, with its score as a bar. Of many labels, the likeliest."""
    if verdict.skipped_by is not None:
        return [f"by {verdict.skipped_by}"]
    if verdict.error is not None:
        return [verdict.error.code]
    scores = verdict.scores or {}
    shown = sorted(scores, key=scores.__getitem__, reverse=True)[:MOST_BARS] if len(scores) > MOST_BARS else [*scores]
    full, empty, more = ("█", "░", "…") if encoding.startswith("utf") else ("#", ".", "...")
    names = [
        one if len(one) <= SHORT_LABEL or not is_cut else one[: SHORT_LABEL - len(more)] + more
        for one in (_writable(" ".join(label.split()), encoding) for label in shown)
    ]
    width = max(map(len, names), default=0)
    lines = []
    for name, label in zip(names, shown, strict=True):
        length = round(scores[label] * num_bar)
        lines.append(f"{name:<{width}} {full * length}{empty * (num_bar - length)} {scores[label]:.3f}")
    return [*lines, f"{more} {len(scores) - len(shown)} more"] if len(scores) > len(shown) else lines


def _writable(text: str, encoding: str) -> str:
    """Return the text with an escape for each letter that the terminal has not."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
