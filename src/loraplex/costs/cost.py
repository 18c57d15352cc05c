"""Compares what classifiers cost: an endpoint for each, one for all, and hosted APIs. Money is exact: Decimal."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from loraplex.config import MOST
from loraplex.hardware.prices import HostedPrice
from loraplex.problems import NumbersAreNoBooleans

HOUR_S = 3600
Rate = Annotated[Decimal, Field(ge=Decimal("0.000001"), le=MOST)]
Counts = Literal["once", "each"]
COUNTS: tuple[Counts, ...] = ("once", "each")


def per_thousand_conversations(usd_per_hour: Decimal, conversations_per_s: Decimal | float) -> Decimal:
    """Return what 1,000 conversations cost in USD on a machine that answers so many of them all the time."""
    return usd_per_hour * 1000 / (HOUR_S * Decimal(str(conversations_per_s)))


class Demand(NumbersAreNoBooleans):
    """What is asked for. A call asks all classifiers about one conversation.

    tokens:       of a conversation.
    hours:        that the machines run in a month.
    rate:         calls/s at the busiest time; None where it is not known.
    utilisation:  the average rate, in percent of `rate`.
    headroom:     percent of an instance's capacity that stay free at the busiest time.
    capacity:     calls/s that one instance answers at most; None where it is not known.
    separate_capacity:  calls/s that an instance with one classifier answers at most. None: each classifier does its
                  share of the work, so `capacity` times the number of classifiers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classifiers: int = Field(16, ge=1, le=MOST)
    tokens: int = Field(500, ge=1, le=MOST)
    hours: Decimal = Field(Decimal(720), gt=0, le=744)
    rate: Rate | None = None
    utilisation: Decimal = Field(Decimal(100), gt=0, le=100)
    headroom: Decimal = Field(Decimal(30), ge=0, lt=100)
    capacity: Rate | None = None
    separate_capacity: Rate | None = None

    @property
    def usable(self) -> Decimal | None:
        """Calls/s for which one instance is used."""
        return self._without_headroom(self.capacity)

    @property
    def separate_usable(self) -> Decimal | None:
        """Calls/s for which an instance with one classifier is used."""
        if self.separate_capacity is None and self.capacity is not None:
            return self._without_headroom(self.capacity * self.classifiers)
        return self._without_headroom(self.separate_capacity)

    def _without_headroom(self, capacity: Decimal | None) -> Decimal | None:
        return None if capacity is None else capacity * (100 - self.headroom) / 100

    @property
    def average(self) -> Decimal | None:
        """Calls/s on average."""
        return None if self.rate is None else self.rate * self.utilisation / 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A hosted API's price for the demand.

    counts:         how often it counts a conversation's tokens: once, or once for each question. Its questions' own
                    tokens are left out.
    usd_each:       for one conversation.
    usd_per_month:  at the average rate; None where it is not known.
    break_even:     conversations/s on average above which an instance costs less.
    is_reachable:   whether an instance can answer so many; None where its capacity is not known.
    """

    name: str
    price: HostedPrice
    counts: Counts
    usd_each: Decimal
    usd_per_month: Decimal | None
    break_even: Decimal
    is_reachable: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the demand costs on instances of one kind."""

    demand: Demand
    usd_per_hour: Decimal

    @property
    def num_together(self) -> int | None:
        """Instances that answer all classifiers; None where the capacity for the given rate is not known."""
        return self._instances(self.demand.usable)

    @property
    def num_separate(self) -> int | None:
        """Instances where each classifier has an endpoint; None where the capacity for the given rate is not known."""
        each = self._instances(self.demand.separate_usable)
        return None if each is None else self.demand.classifiers * each

    def _instances(self, usable: Decimal | None) -> int | None:
        """One where no rate is given: the price of endpoints that carry what they can."""
        rate = self.demand.rate
        if rate is None:
            return 1
        return None if usable is None else math.ceil(rate / usable)

    def per_month(self, num_instances: int | None) -> Decimal | None:
        return None if num_instances is None else num_instances * self.usd_per_hour * self.demand.hours

    def per_thousand(self, num_instances: int | None) -> Decimal | None:
        """Return what 1,000 conversations cost at the average rate; None where it is not known."""
        average = self.demand.average
        if average is None or num_instances is None:
            return None
        return per_thousand_conversations(num_instances * self.usd_per_hour, average)

    @property
    def saved(self) -> Decimal | None:
        separate, together = self.per_month(self.num_separate), self.per_month(self.num_together)
        return None if separate is None or together is None else separate - together

    @property
    def saved_share(self) -> Decimal | None:
        separate, saved = self.per_month(self.num_separate), self.saved
        return None if separate is None or saved is None else saved / separate

    @property
    def separate_break_even(self) -> Decimal | None:
        """Calls/s up to which separate endpoints cost more, and above which they may cost the same; None where the
        capacity is not known. They never cost less, because none can have less than one instance."""
        usable = self.demand.usable
        return None if usable is None else usable * (self.demand.classifiers - 1)

    def offers(self, hosted: Mapping[str, HostedPrice]) -> Iterator[Offer]:
        """Yield what each hosted API costs, by both ways to count."""
        demand = self.demand
        average, usable = demand.average, demand.usable
        for (name, price), counts in itertools.product(hosted.items(), COUNTS):
            times = demand.classifiers if counts == "each" else 1
            each = price.usd_per_million_input_tokens * demand.tokens * times / 1_000_000
            break_even = self.usd_per_hour / (HOUR_S * each)
            yield Offer(
                name=name,
                price=price,
                counts=counts,
                usd_each=each,
                usd_per_month=None if average is None else each * average * HOUR_S * demand.hours,
                break_even=break_even,
                is_reachable=None if usable is None else break_even < usable * demand.utilisation / 100,
            )
