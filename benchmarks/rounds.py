"""Collects what the rounds of a benchmark gave."""

from collections.abc import Iterable
from typing import Any

from loraplex.measuring.samples import spread


def over_rounds(values: Iterable[float]) -> dict[str, Any]:
    """Return the median of the rounds, the lowest and the highest, as a report holds them."""
    found = spread(values)
    assert found is not None, "no round was measured"
    return found
