"""report.html: the report as one page, with plots. It needs no network and no script."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loraplex.bench import plots
from loraplex.bench.sections import measured_of, sections
from loraplex.measuring.page import notice, page, section, table
from loraplex.measuring.section import Section
from loraplex.measuring.svg import NO_PLOTS, can_draw

PLOTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "latency": ("Latency against load", plots.latency),
    "throughput": ("Throughput", plots.throughput),
    "costs": ("Cost of 1,000 conversations", plots.costs),
    "turns": ("Turn by turn", plots.turns),
    "limit": ("The machine's limit", plots.limit),
}
# The order of the page: plots by their keys, and sections by their titles.
ORDER = (
    *("In short", "The article's table", "latency", "throughput", "Saturation", "costs", "turns", "limit"),
    *("Right and wrong", "Agreement", "Memory", "All loads", "What is not in the tables"),
)


def html(report: Mapping[str, Any]) -> str:
    """Return the page. Without matplotlib it has no plots, and says so."""
    found = {one.title: one for one in sections(report)}
    measured = measured_of(report)
    has_plots = can_draw()
    parts = [section(replace(found.pop(""), title="Benchmark"), level=1)]
    if measured and not has_plots:
        parts.append(notice(NO_PLOTS))
    for name in ORDER:
        title, draw = PLOTS.get(name, (name, None))
        plot = ""
        if draw is not None and measured and has_plots and (name not in ("turns", "costs") or title in found):
            plot = f"<figure>{draw(measured)}</figure>"
        if plot or title in found:
            parts.append(section(found.pop(title, Section(title=title)), plot))
    last = found.pop("To repeat it")
    assert not found, f"sections without a place: {list(found)}"
    parts += [section(Section(title="Machine and settings"), _settings(report)), section(last)]
    return page(f"{report['data']['file']}: benchmark", parts)


def _settings(report: Mapping[str, Any]) -> str:
    """Return all that is known of the machine, the systems and the options, as tables."""
    about = {key: value for key, value in report["about"].items() if key not in ("settings", "command", "versions")}
    systems = {
        name: {key: one[key] for key in ("state", "versions", "engine", "facts") if one.get(key)}
        for name, one in report["systems"].items()
    }
    groups = (about, report["about"]["versions"], report["data"], report["about"]["settings"], systems)
    return "\n".join(table((), [[str(key), _value(value)] for key, value in one.items()], "words") for one in groups)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
