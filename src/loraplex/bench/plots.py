"""The report's plots."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from loraplex.amounts import usd
from loraplex.bench.cells import number
from loraplex.bench.sections import NAMES, main_load
from loraplex.bench.thousand import costs_of
from loraplex.measuring.svg import COLOURS, FAINT, INK, figure, svg

HEIGHT, BAR = 3.4, 0.42  # inches

Measured = Mapping[str, Any]


def latency(measured: Measured) -> str:
    """p50 and p99 against what was offered, or against what was answered where only closed loops ran."""
    drawn, axes = figure(HEIGHT)
    for index, (name, one) in enumerate(measured.items()):
        opened = [load for load in one["loads"] if load["kind"] == "open" and load["offered_per_s"]]
        loads = opened or [load for load in one["loads"] if load["conversations_per_s"]]
        points = sorted(
            (load["offered_per_s"] if opened else load["conversations_per_s"]["median"], load["latency_ms"])
            for load in loads
            if load["latency_ms"]["p50"] is not None
        )
        at = [rate for rate, _ in points]
        for share, line in (("p50", "-"), ("p99", "--")):
            values = [(found[share] or {}).get("median", math.nan) for _, found in points]
            label = NAMES.get(name, name) if share == "p50" else None
            axes.plot(at, values, line, marker="o", markersize=3.5, linewidth=1.4, color=COLOURS[index], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    is_open = any(load["kind"] == "open" for one in measured.values() for load in one["loads"])
    axes.set_xlabel(f"conversations a second, {'offered' if is_open else 'answered'}")
    axes.set_ylabel("latency of a request, ms\np50: line, p99: dashes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(lambda value, _: "" if f"{value:.0e}"[0] not in "25" else _plain(value, _))
    axes.grid(True, which="major", color=FAINT, linewidth=0.5)
    drawn.legend(loc="outside upper left", ncols=len(measured), frameon=False, labelcolor=INK)
    return svg(drawn, "Latency against load")


def throughput(measured: Measured) -> str:
    """Conversations a second of each system, with the lowest and the highest slice."""
    found = {name: one["saturation"]["conversations_per_s"] for name, one in measured.items()}
    return _bars(found, "conversations a second, all verdicts of each", number)


def limit(measured: Measured) -> str:
    """The share of the machine's own rate of matrix products that each system reached."""
    shares = {name: main_load(one)["share_of_gemm_rate"] for name, one in measured.items()}
    found = {name: None if share is None else 100 * share for name, share in shares.items()}
    return _bars(
        _exact(found), "% of the rate of this base's matrix products", lambda value: f"{value:.0f} %", most=100.0
    )


def turns(measured: Measured) -> str:
    """The latency of each turn, and the share of its tokens that was not computed."""
    drawn, [left, right] = figure(HEIGHT - 0.4, columns=2)
    for index, (name, one) in enumerate(measured.items()):
        style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "color": COLOURS[index]}
        numbers = [turn["turn"] for turn in one["turns"]]
        p50 = [turn["latency_ms"]["p50"]["median"] for turn in one["turns"]]
        left.plot(numbers, p50, label=NAMES.get(name, name), **style)
        right.plot(numbers, [100 * (turn["cached_share"] or 0.0) for turn in one["turns"]], **style)
    left.set_ylim(bottom=0)
    right.set_ylim(-2, 102)
    left.set_ylabel("p50 of a turn, ms")
    right.set_ylabel("tokens not computed, %")
    for axes in (left, right):
        axes.set_xlabel("turn")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, axis="y", color=FAINT, linewidth=0.5)
    drawn.legend(loc="outside upper left", ncols=len(measured), frameon=False, labelcolor=INK)
    return svg(drawn, "Turn by turn")


def costs(measured: Measured) -> str:
    """What 1,000 conversations cost at a dollar an hour."""
    known = costs_of(measured)
    found = {name: float(known[name]) if name in known else None for name in measured}
    return _bars(_exact(found), "USD for 1,000 conversations, at $1 an hour", lambda value: usd(Decimal(str(value))))


def _exact(values: Mapping[str, float | None]) -> dict[str, Mapping[str, float] | None]:
    return {name: None if one is None else {"median": one, "low": one, "high": one} for name, one in values.items()}


def _bars(
    found: Mapping[str, Mapping[str, float] | None], label: str, text: Callable[[float], str], most: float | None = None
) -> str:
    known = {name: one for name, one in found.items() if one is not None}
    drawn, axes = figure(0.75 + BAR * max(1, len(known)))
    names, colours = list(found), dict(zip(found, COLOURS, strict=False))
    top = most or 1.18 * max((one["high"] for one in known.values()), default=1.0)
    for row, (name, one) in enumerate(known.items()):
        axes.barh(row, one["median"], height=0.62, color=colours[name])
        if one["high"] > one["low"]:
            axes.hlines(row, one["low"], one["high"], color=INK, linewidth=1.0)
            axes.vlines([one["low"], one["high"]], row - 0.12, row + 0.12, color=INK, linewidth=1.0)
        end = max(one["high"], one["median"])
        inside = end > 0.85 * top
        axes.text(
            end + (-0.012 if inside else 0.012) * top,
            row,
            text(one["median"]),
            va="center",
            ha="right" if inside else "left",
            color="#ffffff" if inside else INK,
            fontsize=9,
        )
    assert len(names) <= len(COLOURS), "a colour for each system"
    axes.set_yticks(range(len(known)), [NAMES.get(name, name) for name in known])
    axes.invert_yaxis()
    axes.set_xlim(0, top)
    axes.set_xlabel(label)
    axes.grid(True, axis="x", color=FAINT, linewidth=0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    return svg(drawn, label)


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
