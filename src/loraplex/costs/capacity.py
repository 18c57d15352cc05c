"""How many conversations a machine answers at most, from a report of `loraplex bench` that found out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex.config import validate
from loraplex.errors import ConfigurationError, listed, quoted

FORMAT, KIND = 1, "bench"
GIVE = {"bench": "the report.json of `loraplex bench`", "plan": "what `loraplex plan … --json` prints"}
MEASURE = "measure with `loraplex bench BUNDLE --data FILE --sweep --out DIR`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Says what a system answered at saturation, or would answer by a plan.

    is_computed:        whether nobody measured it.
    median, low, high:  conversations/s, each judged by all classifiers. A plan's median is its low.
    device:             where it was measured, as the driver calls it.
    machine:            device, cores and number format.
    started:            when.
    is_cut_short:       whether the run was interrupted.
    prompt_tokens:      tokens of a conversation with one question, on average; None where the report does not say.
    """

    source: Path
    system: str
    num_classifiers: int
    median: Decimal
    low: Decimal
    high: Decimal
    device: str
    machine: str
    started: str
    is_cut_short: bool
    prompt_tokens: int | None
    is_computed: bool = False


class Part(BaseModel):
    """A part of a report, of which the other keys do not matter."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Spread(Part):
    median: Decimal = Field(gt=0)
    low: Decimal
    high: Decimal

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"low {self.low}, median {self.median} and high {self.high} are in no order")
        return self


class _Saturation(Part):
    reached: bool
    conversations_per_s: _Spread | None = None


class _Rate(Part):
    median: float = Field(gt=0)


class _Load(Part):
    tokens_asked_per_s: _Rate | None = None
    verdicts_per_s: _Rate | None = None


class _System(Part):
    state: str
    loads: tuple[_Load, ...] = ()
    saturation: _Saturation | None = None


class _About(Part):
    device: str
    started: str
    cores: int | None = None
    dtype: str | None = None


class _Data(Part):
    classifiers: tuple[str, ...] = Field(min_length=1)
    turns: bool = False


class _Report(Part):
    about: _About
    data: _Data
    cut_short: bool = False
    systems: dict[str, _System]


def read_capacity(file: Path, system: str) -> Capacity:
    """Return the capacity of one system of a report. Raises ConfigurationError for another file, and for a report whose
    run did not reach saturation: it only knows rates that the system answered, not the highest one."""
    report = validate(_Report, read_report(file, KIND), file)
    if report.data.turns:
        what = "was measured with --turns, so that a conversation is several calls, and not one"
        raise ConfigurationError(file, what, remedy=f"{MEASURE}, without --turns")
    found = report.systems.get(system)
    if found is None:
        raise ConfigurationError(
            file, f"has no system {quoted(system)}", remedy=f"use one of {listed(sorted(report.systems))}: --system"
        )
    if found.state != "measured":
        raise ConfigurationError(file, f"did not measure {quoted(system)}: {found.state}", remedy=MEASURE)
    saturation = found.saturation
    if saturation is None or not saturation.reached or saturation.conversations_per_s is None:
        reason = f"does not know how much {quoted(system)} can answer, because the run did not reach saturation"
        raise ConfigurationError(file, reason, remedy=MEASURE)
    about, spread = report.about, saturation.conversations_per_s
    cores = None if about.cores is None else f"{about.cores} cores"
    return Capacity(
        source=file,
        system=system,
        num_classifiers=len(report.data.classifiers),
        median=spread.median,
        low=spread.low,
        high=spread.high,
        machine=", ".join(part for part in (about.device, cores, about.dtype) if part),
        device=about.device,
        started=about.started,
        is_cut_short=report.cut_short,
        prompt_tokens=_prompt_tokens(found.loads),
    )


def _prompt_tokens(loads: tuple[_Load, ...]) -> int | None:
    for load in loads:
        if load.tokens_asked_per_s is not None and load.verdicts_per_s is not None:
            return max(1, round(load.tokens_asked_per_s.median / load.verdicts_per_s.median))
    return None


def read_report(file: Path, wanted: str) -> Mapping[str, Any]:
    """Return a report of this format. The error for another file says what the file is. wanted: `bench` or `plan`."""
    remedy = f"give {GIVE[wanted]}"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:  # also UnicodeDecodeError
        raise ConfigurationError(file, f"is no report: {exc}", remedy=remedy) from None
    found: dict[str, Any] = report if isinstance(report, dict) else {}
    kind = found.get("kind")
    if kind != wanted:
        what = f"is a report of kind {quoted(kind)}" if kind else f"is JSON, but no report of `loraplex {wanted}`"
        raise ConfigurationError(file, what, remedy=remedy)
    if found.get("format") != FORMAT:
        what = f"has format {quoted(found.get('format'))}; this version reads {FORMAT}"
        raise ConfigurationError(file, what, remedy=f"run `loraplex {wanted}` of this version again")
    return found
