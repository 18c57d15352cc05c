"""report.html: the report as one page, with plots. It needs no network and no script."""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from loraplex.bench import plots
from loraplex.bench.sections import Section, measured_of, sections

NO_PLOTS = "The plots are left out, because matplotlib is not installed: `pip install 'loraplex[bench]'`."
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --faint: #d0d7de; --band: #f6f8fa;
  --system0: #0b6bcb; --system1: #c4541a; --system2: #8a6d00; --system3: #1a7f4b; --system4: #8250df;
  --system5: #b0307a;
  --system6: #3b7a86; --system7: #6e6e6e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e3e6ea; --soft: #9aa4af; --faint: #3a424b;
  --band: #1c2127; --system0: #4f9cf0; --system1: #ea8450; --system2: #cfa72c; --system3: #46b37d; --system4: #a98bf0;
  --system5: #e070ab; --system6: #67acb8; --system7: #a0a0a0; } }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--faint); }
p, li { max-width: 46rem; }
.notice { border-left: 4px solid var(--system1); padding-left: .75rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .875em; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .75rem; white-space: pre-wrap; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 400; vertical-align: top; white-space: nowrap; }
td span { white-space: nowrap; }
.dense { font-size: .75rem; }
.dense tbody th { white-space: normal; min-width: 11rem; }
.words th, .words td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.plot { width: 100%; max-width: 46rem; height: auto; display: block; }
@page { size: A4 landscape; margin: 12mm; }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --faint: #bbb; }
  body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; } .dense { font-size: 6.5pt; }
  .dense th, .dense td { padding: .1rem .2rem; }
  .dense tbody th { min-width: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


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
DENSE = 8  # columns; a table with more of them is set in small type


def html(report: Mapping[str, Any]) -> str:
    """Return the page. Without matplotlib it has no plots, and says so."""
    found = {one.title: one for one in sections(report)}
    measured = measured_of(report)
    has_plots = importlib.util.find_spec("matplotlib") is not None
    parts = [_section(found.pop(""), level=1)]
    if measured and not has_plots:
        parts.append(f'<p class="notice">{_inline(NO_PLOTS)}</p>')
    for name in ORDER:
        title, draw = PLOTS.get(name, (name, None))
        plot = ""
        if draw is not None and measured and has_plots and (name not in ("turns", "costs") or title in found):
            plot = f"<figure>{draw(measured)}</figure>"
        if plot or title in found:
            parts.append(_section(found.pop(title, Section(title=title)), plot))
    last = found.pop("To repeat it")
    assert not found, f"sections without a place: {list(found)}"
    parts += [_section(Section(title="Machine and settings"), _settings(report)), _section(last)]
    title = f"{report['data']['file']}: benchmark"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )


def _section(one: Section, plot: str = "", level: int = 2) -> str:
    parts = [f"<h{level}>{escape(one.title or 'Benchmark')}</h{level}>"]
    parts += [f"<p>{_inline(text)}</p>" for text in one.texts]
    parts += [plot] if plot else []
    if one.table is not None:
        parts.append(_table(*one.table))
    if one.points:
        parts.append(f"<ul>{''.join(f'<li>{_inline(point)}</li>' for point in one.points)}</ul>")
    if one.code:
        parts.append(f"<pre>$ {escape(one.code)}</pre>")
    return f"<section>\n{chr(10).join(parts)}\n</section>"


def _inline(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    kind = kind or ("dense" if len(head) > DENSE else "")
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>\n' for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="wide"><table class="{kind}">{thead}<tbody>\n{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """Return a cell, whose spread stays on one line."""
    marked = re.sub(r"([(][0-9.,e+-]+[)])", r"<span>\1</span>", escape(text))
    return f"<td>{marked}</td>"


def _settings(report: Mapping[str, Any]) -> str:
    """Return all that is known of the machine, the systems and the options, as tables."""
    about = {key: value for key, value in report["about"].items() if key not in ("settings", "command", "versions")}
    systems = {
        name: {key: one[key] for key in ("state", "versions", "engine", "facts") if one.get(key)}
        for name, one in report["systems"].items()
    }
    groups = (about, report["about"]["versions"], report["data"], report["about"]["settings"], systems)
    return "\n".join(_table((), [[str(key), _value(value)] for key, value in one.items()], "words") for one in groups)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
