"""Gates: a classifier runs only if another one says so. This module knows no service."""

from collections.abc import Callable, Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field

from loraplex.errors import BundleError, listed
from loraplex.problems import NumbersAreNoBooleans
from loraplex.types import Verdict


class Gate(NumbersAreNoBooleans):
    """When a classifier runs: where `classifier` gives `label` a probability of `at_least` so much.

    classifier:  a classifier or a route.
    label:       one of its labels. A space at its ends does not matter.
    at_least:    above 0, and 1 at most. It is compared with the calibrated probability; the `threshold` and
                 `abstain_below` of the gate's contract change nothing here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classifier: str
    label: str
    at_least: float = Field(gt=0, le=1)

    def opens(self, verdict: Verdict) -> bool | None:
        """Return whether the gate's verdict lets the classifier run. None: the verdict gives no probability of the
        label, because the gate failed or has other labels now."""
        if verdict.skipped_by is not None:
            return False
        for label, score in (verdict.scores or {}).items():
            if label.strip() == self.label.strip():
                return score >= self.at_least
        return None


class ClassifierSettings(BaseModel):
    """Holds what `loraplex.yaml` says about a classifier or a route."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: Gate


def check_gates(
    gates: Mapping[str, Gate], knows: Callable[[str], bool], labels_of: Callable[[str], Mapping[str, tuple[str, ...]]]
) -> None:
    """Raise BundleError where a gate of `loraplex.yaml` names nobody, or a label that does not exist, or where gates
    wait for each other.

    labels_of:  a classifier's or a route's name -> the labels of each adapter that may answer, as far as they are
                known."""
    for name, gate in gates.items():
        source = f"loraplex.yaml, classifiers.{name}"
        for one, where in ((name, source), (gate.classifier, f"{source}.when.classifier")):
            if not knows(one):
                remedy = "use a classifier of the bundle, or a route of loraplex.yaml"
                raise BundleError(where, f"there is no classifier or route {one!r}", remedy=remedy)
        for adapter, labels in labels_of(gate.classifier).items():
            if gate.label.strip() not in map(str.strip, labels):
                problem = f"{gate.label!r} is no label of {adapter!r}"
                raise BundleError(f"{source}.when.label", problem, remedy=f"use one of: {listed(labels)}")
        waiting = [name]
        while waiting[-1] in gates:
            waiting.append(gates[waiting[-1]].classifier)
            if waiting[-1] in waiting[:-1]:
                problem = f"these wait for each other: {' -> '.join(waiting)}"
                raise BundleError(f"{source}.when", problem, remedy="let one of them run always")


def in_passes(names: Iterable[str], gates: Mapping[str, Gate]) -> list[list[str]]:
    """Return the names, and the gates that they need, in passes. A gate's pass comes before those of the names that
    wait for it; there are as many passes as the longest chain of gates has names."""
    passes: dict[str, int] = {}  # name -> number of its pass

    def place(name: str) -> int:
        if name not in passes:
            passes[name] = place(gates[name].classifier) + 1 if name in gates else 0
        return passes[name]

    last = max(map(place, names), default=0)
    return [[name for name, number in passes.items() if number == one] for one in range(last + 1)]
