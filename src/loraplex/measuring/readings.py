"""Readings of a server's metrics in Prometheus' text format, and what two of them say about the time between."""

import math
from collections import defaultdict
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Samples = list[tuple[Mapping[str, str], float]]


class Reading:
    """The metrics of a server at one time."""

    def __init__(self, text: str, at_s: float) -> None:
        """at_s: when the text was read, on any clock that all readings share. Raises ValueError for other text."""
        self.at_s = at_s
        self._samples: dict[str, Samples] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                self._samples[one.name].append((one.labels, one.value))

    def samples(self, name: str, **labels: str) -> Samples:
        """Return the samples of a metric that have these labels, among others."""
        wanted = labels.items()
        return [(found, value) for found, value in self._samples.get(name, ()) if found.items() >= wanted]

    def sum(self, name: str, **labels: str) -> float:
        return math.fsum(value for _, value in self.samples(name, **labels))

    def per_second(self, before: "Reading", name: str, **labels: str) -> float:
        """Return how much a counter has grown since `before`, per second. A server that was restarted begins at 0."""
        grown = self.sum(name, **labels) - before.sum(name, **labels)
        return max(0.0, grown) / max(self.at_s - before.at_s, 1e-9)

    def percentile(self, before: "Reading", name: str, share: float, **labels: str) -> float | None:
        """Return a percentile of a histogram's values since `before`, or None where there are none. It is interpolated
        in its bucket; beyond the last one it is that one's lower bound.

        share:  0.5 for the median, 0.99 for the 99th percentile.
        """
        buckets = sorted(
            (float(found["le"]), value - before.sum(f"{name}_bucket", **found))
            for found, value in self.samples(f"{name}_bucket", **labels)
        )
        total = buckets[-1][1] if buckets else 0.0
        if total <= 0:
            return None
        low, num_below = 0.0, 0.0
        for high, num in buckets:
            if num >= share * total:
                part = (share * total - num_below) / (num - num_below) if num > num_below else 1.0
                return low if high == math.inf else low + (high - low) * part
            low, num_below = high, num
        return low
