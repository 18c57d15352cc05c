"""Plots as SVG, to be put into a page. Colours are the page's: CSS variables, for light and dark."""

import importlib.util
import io
import re
from html import escape
from typing import Any

INK, FAINT = "#000101", "#000102"  # stand for the page's colours until the SVG is written
COLOURS = tuple(f"#0002{index:02x}" for index in range(8))
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--system{index})" for index, colour in enumerate(COLOURS)
}
WIDTH = 7.2  # inches
NO_PLOTS = "The plots are left out, because matplotlib is not installed: `pip install 'loraplex[bench]'`."


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def figure(height: float, columns: int = 1) -> Any:
    """Return a figure and its axes: a list where there are several columns. No display is asked for.

    height:  in inches. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, in the page's font
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.patch.set_visible(False)
        one.set_axisbelow(True)
        one.tick_params(which="both", colors=INK, labelsize=9, width=0.5, length=3, pad=3)
        for text in (one.xaxis.label, one.yaxis.label):
            text.set(color=INK, fontsize=9)
        for side, spine in one.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set(color=FAINT, linewidth=0.8)
    return drawn, axes if columns > 1 else axes[0]


def svg(drawn: Any, title: str) -> str:
    """Return the figure as an element of a page: no file's head, no ids that another plot has too, no fixed colours."""
    import matplotlib

    drawn.patch.set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        drawn.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    found = file.getvalue()[file.getvalue().index("<svg") :]
    found = re.sub(r' id="[\w.]+_\d+"', "", found)
    found = re.sub(r"<style.*?</style>", "", found, flags=re.DOTALL)
    found = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", found)
    for colour, variable in VARIABLES.items():
        found = found.replace(colour, variable)
    return found.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" class="plot" ', 1).strip()
