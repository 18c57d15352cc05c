"""Writes a cost in words for people, and as JSON for programs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from loraplex.amounts import counted, per_second, percent, usd
from loraplex.costs.capacity import Capacity
from loraplex.costs.cost import Cost, Offer
from loraplex.hardware.devices import find_device
from loraplex.hardware.instances import instances
from loraplex.hardware.prices import HostedPrice, InstancePrice

COUNTED = {"once": "tokens counted once", "each": "tokens counted for each question"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A cost with where its figures come from.

    capacity:  the measured or planned one; None where it was given, or is not known.
    """

    instance: str
    price: InstancePrice
    cost: Cost
    capacity: Capacity | None
    hosted: Mapping[str, HostedPrice]

    def offers(self) -> Iterator[Offer]:
        return self.cost.offers(self.hosted)

    def title(self) -> str:
        demand = self.cost.demand
        title = f"{counted(demand.classifiers, 'classifier')} on {self.instance}, {demand.hours} hours a month"
        if self.is_of_another_machine and self.capacity is not None:
            title += f", as if it answered as much as another machine ({self.capacity.device})"
        return title

    @property
    def is_of_another_machine(self) -> bool:
        """Whether the capacity is that of a device that the instance does not have."""
        known = instances().get(self.instance.lower())
        if self.capacity is None or known is None:
            return False
        return find_device(self.capacity.device) is not known.device

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield what is paid for, its instances, its price a month, and its price for 1,000 conversations."""
        cost = self.cost
        for what, number in (
            ("an endpoint for each classifier", cost.num_separate),
            ("one endpoint for all", cost.num_together),
        ):
            yield (
                what,
                "?" if number is None else f"{number:,}",
                usd(cost.per_month(number)),
                usd(cost.per_thousand(number)),
            )
        share = cost.saved_share
        yield "saved", "", usd(cost.saved) if share is None else f"{usd(cost.saved)} ({percent(share)})", ""
        for one in self.offers():
            yield f"{title(one)}, {COUNTED[one.counts]}", "", usd(one.usd_per_month), usd(one.usd_each * 1000)

    def sentences(self) -> Iterator[str]:
        """Yield what the figures rest on, and where another way costs less."""
        yield f"{self.instance}: ${self.price.usd_per_hour} an hour{sourced(self.price)}."
        yield from self._about_the_capacity()
        yield self._about_separate_endpoints()
        for one in self.offers():
            yield f"{title(one)}, {COUNTED[one.counts]}: {self._where_cheaper(one)}"
        for name, price in self.hosted.items():
            yield (
                f"{price.title or name}: {usd(price.usd_per_million_input_tokens)} for a million input tokens"
                f"{sourced(price)}, {self.cost.demand.tokens} tokens a conversation. Ask which way it counts."
            )
        yield "Left out: the tokens of a hosted API's questions, discounts, storage and traffic."

    def _about_the_capacity(self) -> Iterator[str]:
        demand = self.cost.demand
        if demand.rate is not None and demand.utilisation != 100:
            yield f"{demand.rate} calls/s at the busiest time are {per_second(demand.average)} on average."
        if (found := self.capacity) is not None and found.is_computed:
            yield (
                f"One instance would answer {per_second(found.low)} to {per_second(found.high)} calls/s, by a plan for "
                f"{found.machine} ({found.source}). Nobody has measured it; the lower figure counts."
            )
        elif found is not None:
            yield (
                f"One instance answers {per_second(found.median)} calls/s ({per_second(found.low)} to "
                f"{per_second(found.high)}): {found.system} did, on {found.machine}, on "
                f"{found.started[:10]} ({found.source}). This is true of that machine only. "
                f"If it was no {self.instance}, measure there."
            )
            if found.is_cut_short:
                yield "The run of this report was interrupted, so its figures rest on fewer slices."
        elif demand.capacity is not None:
            yield f"One instance answers {demand.capacity} calls/s, as given with --capacity."
        elif demand.rate is not None:
            yield (
                "How many instances this rate takes is not known, because nobody has said how many calls/s one "
                "answers. Measure there with `loraplex bench`, and give its report with --bench, or give --capacity."
            )
        else:
            yield (
                "One instance is counted for each endpoint, because nobody has said how many calls/s it answers. "
                "Measure there with `loraplex bench`, and give its report with --bench."
            )
        if demand.usable is not None:
            usable = per_second(demand.usable)
            yield f"{demand.headroom} % of this stay free, so an instance is used for {usable} calls/s."

    def _about_separate_endpoints(self) -> str:
        break_even = self.cost.separate_break_even
        what = "Separate endpoints never cost less than one for all, because each has an instance of its own."
        if not break_even:
            return what
        demand = self.cost.demand
        what += f" Above {per_second(break_even)} calls/s they may cost the same."
        if demand.separate_capacity is not None:
            return f"{what} One is used for {per_second(demand.separate_usable)} calls/s, by --separate-capacity."
        return (
            f"{what} One with one classifier is counted as {demand.classifiers} times as fast, as plain adapters are. "
            "With activated LoRA it computes the whole conversation, too, and is less fast: give --separate-capacity."
        )

    def _where_cheaper(self, offer: Offer) -> str:
        demand, break_even = self.cost.demand, f"{per_second(offer.break_even)} calls/s on average"
        if offer.is_reachable is None or demand.usable is None:
            found = f"costs less than an instance that answers fewer than {break_even}, and more than a busier one."
        elif offer.is_reachable:
            found = f"costs less than an instance below {break_even}, and more above."
        else:
            most = per_second(demand.usable * demand.utilisation / 100)
            found = f"costs less at any rate. An instance would need {break_even}, and is used for {most} at most."
        together = self.cost.per_month(self.cost.num_together)
        if offer.usd_per_month is None or together is None:
            return found
        is_less = offer.usd_per_month < together
        return f"{found} At the given rate it costs {'less' if is_less else 'no less'} than one endpoint for all."

    def as_json(self) -> dict[str, Any]:
        cost, demand, found = self.cost, self.cost.demand, self.capacity
        average = demand.average
        return {
            "format": 1,
            "kind": "cost",
            "instance": {"name": self.instance, **self.price.model_dump(mode="json", exclude={"usd_per_hour"})}
            | {"usd_per_hour": float(self.price.usd_per_hour)},
            "demand": {name: number(value) for name, value in demand},
            "conversations_per_month": None if average is None else number(average * 3600 * demand.hours),
            "capacity": None
            if found is None
            else {
                "conversations_per_s": {
                    "median": number(found.median),
                    "low": number(found.low),
                    "high": number(found.high),
                },
                "system": found.system,
                "computed": found.is_computed,
                "machine": found.machine,
                "started": found.started,
                "source": str(found.source),
            },
            "usable_per_s": number(demand.usable),
            "separate": self._way(cost.num_separate) | {"break_even_per_s": number(cost.separate_break_even)},
            "together": self._way(cost.num_together),
            "saved": {"usd_per_month": number(cost.saved), "share": number(cost.saved_share)},
            "hosted": [
                {
                    "name": one.name,
                    "title": title(one),
                    "counts": one.counts,
                    "usd_per_million_input_tokens": number(one.price.usd_per_million_input_tokens),
                    "read": one.price.read,
                    "source": one.price.source,
                    "usd_per_month": number(one.usd_per_month),
                    "usd_per_thousand_conversations": number(one.usd_each * 1000),
                    "break_even_per_s": number(one.break_even),
                    "is_reachable": one.is_reachable,
                }
                for one in self.offers()
            ],
            "notes": list(self.sentences()),
        }

    def _way(self, num_instances: int | None) -> dict[str, Any]:
        return {
            "instances": num_instances,
            "usd_per_month": number(self.cost.per_month(num_instances)),
            "usd_per_thousand_conversations": number(self.cost.per_thousand(num_instances)),
        }


def sourced(price: InstancePrice | HostedPrice) -> str:
    """Return when and where a price was read, in brackets; empty where the file does not say."""
    found = ", ".join(part for part in (price.read, price.source) if part)
    return f" ({found})" if found else ""


def title(offer: Offer) -> str:
    return offer.price.title or offer.name


def number(value: Decimal | int | None) -> float | int | None:
    """Return a number for JSON. Amounts to a millionth survive."""
    return float(value) if isinstance(value, Decimal) else value
