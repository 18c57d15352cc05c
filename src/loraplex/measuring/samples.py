"""Turns samples into figures: percentiles, and a median with its spread."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest of the values that at least `share` of them do not exceed; None where there are none.

    share:  0.5 for the median, 0.99 for the 99th percentile.
    """
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Holds the median of some rounds, beside the lowest and the highest of them."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Return the spread of the rounds that have a value; None where none has one."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(median=statistics.median(found), low=min(found), high=max(found), rounds=len(found))


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Return `Spread.of` the values as a report holds it; None where no round has a value."""
    found = Spread.of(values)
    return None if found is None else asdict(found)
