"""Turns samples into figures: percentiles, a median with its spread, and the interval of a share."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


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


def wilson(part: int, whole: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share `part / whole`. It holds for small samples and extreme shares, too."""
    share = part / whole
    centre = (share + Z * Z / (2 * whole)) / (1 + Z * Z / whole)
    half = Z / (1 + Z * Z / whole) * math.sqrt(share * (1 - share) / whole + Z * Z / (4 * whole * whole))
    return max(0.0, centre - half), min(1.0, centre + half)
