"""How many conversations an instance would answer, from a plan: computed, and measured by nobody."""

from decimal import Decimal
from pathlib import Path

from loraplex.config import validate
from loraplex.costs.capacity import Capacity, Part, read_report
from loraplex.errors import ConfigurationError
from loraplex.hardware.instances import instances

KIND = "plan"


class _Target(Part):
    name: str
    count: int


class _Traffic(Part):
    classifiers: int
    conversation_tokens: int
    suffix_tokens: int


class _Adapters(Part):
    share_the_conversation: bool


class _Case(Part):
    shared: bool
    is_next_turn: bool
    expected_per_s: tuple[Decimal, Decimal] | None


class _Plan(Part):
    base: str
    dtype: str
    fits: bool
    target: _Target
    traffic: _Traffic
    adapters: _Adapters
    time: tuple[_Case, ...]


def read_planned(file: Path, instance: str) -> Capacity:
    """Return what an instance would answer by the JSON of `loraplex plan`. Its lower end counts as the capacity. Raises
    ConfigurationError for another file, for a plan that does not fit or has no times, and for one of more or fewer
    devices than the instance has."""
    plan = validate(_Plan, read_report(file, KIND), file)
    if not plan.fits:
        raise ConfigurationError(file, "is a plan that does not fit", remedy="plan with --fit, or for a larger device")
    known = instances().get(instance.lower())
    has = None if known is None else max(1, known.num_devices)
    if has is not None and plan.target.count != has:
        raise ConfigurationError(
            file,
            f"is a plan for {plan.target.count} x {plan.target.name}; {instance} has {has}",
            remedy=f"plan with --count {has}",
        )
    shares = plan.adapters.share_the_conversation
    [case] = [one for one in plan.time if one.shared == shares and not one.is_next_turn]
    if case.expected_per_s is None:
        raise ConfigurationError(
            file,
            f"does not say how fast {plan.target.name} computes in {plan.dtype}",
            remedy="plan for a GPU in bfloat16, or a bundle on this machine with --measure",
        )
    low, high = case.expected_per_s
    return Capacity(
        source=file,
        system="the plan",
        is_computed=True,
        num_classifiers=plan.traffic.classifiers,
        median=low,
        low=low,
        high=high,
        device=plan.target.name,
        machine=f"{plan.target.name}, {plan.dtype}, {'aLoRA' if shares else 'plain'} adapters on {plan.base}",
        started="",
        is_cut_short=False,
        prompt_tokens=plan.traffic.conversation_tokens + plan.traffic.suffix_tokens,
    )
