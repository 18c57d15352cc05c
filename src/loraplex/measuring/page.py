"""A report as one HTML page. It needs no network and no script, and what comes from outside is text."""

import re
from collections.abc import Sequence
from html import escape

from loraplex.measuring.section import Section

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
.notice { border-left: 4px solid var(--system1); padding-left: .75rem; font-weight: 600; }
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
DENSE = 8  # columns; a table with more of them is set in small type


def page(title: str, parts: Sequence[str]) -> str:
    """Return the page. parts: its elements, in order."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )


def section(one: Section, element: str = "", level: int = 2) -> str:
    """Return a section. element: HTML between its texts and its table, such as a plot; level: of its heading."""
    parts = [f"<h{level}>{escape(one.title)}</h{level}>", *(f"<p>{inline(text)}</p>" for text in one.texts)]
    parts += [element] if element else []
    if one.table is not None:
        parts.append(table(*one.table))
    if one.points:
        parts.append(f"<ul>{''.join(f'<li>{inline(point)}</li>' for point in one.points)}</ul>")
    if one.code:
        parts.append(f"<pre>$ {escape(one.code)}</pre>")
    return f"<section>\n{chr(10).join(parts)}\n</section>"


def notice(text: str) -> str:
    """Return a line that nobody overlooks."""
    return f'<p class="notice">{inline(text)}</p>'


def inline(text: str) -> str:
    """Return text as HTML; what stands in `backquotes` is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table whose first column names the row. kind: words, whose columns are no figures."""
    kind = kind or ("dense" if len(head) > DENSE else "")
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>\n' for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="wide"><table class="{kind}">{thead}<tbody>\n{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """Return a cell, whose spread stays on one line."""
    marked = re.sub(r"([(][0-9.,e+-]+[)])", r"<span>\1</span>", escape(text))
    return f"<td>{marked}</td>"
