"""What machines and hosted APIs cost. Prices are data: the package's, and those of a user's file, which go first."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from loraplex.config import read_yaml, validate
from loraplex.errors import ConfigurationError
from loraplex.hardware.data import Data, Date, package_file, unknown
from loraplex.hardware.instances import instances

Usd = Annotated[Decimal, Field(gt=0, le=1_000_000)]


class InstancePrice(Data):
    """What an instance costs for each hour, as its source said on a day."""

    usd_per_hour: Usd
    read: Date = ""
    source: str = ""


class HostedPrice(Data):
    """What a hosted API costs for each million tokens that it is sent."""

    usd_per_million_input_tokens: Usd
    title: str = ""
    read: Date = ""
    source: str = ""


Price = TypeVar("Price", InstancePrice, HostedPrice)


class Prices(Data):
    """The contents of a price file."""

    instances: Mapping[str, InstancePrice] = Field(default_factory=dict)
    hosted: Mapping[str, HostedPrice] = Field(default_factory=dict)

    def of(self, name: str) -> InstancePrice | None:
        """Return the price of an instance; None where nobody knows it. Raises ConfigurationError for an instance that
        is in no file."""
        if found := self.instances.get(name) or self.instances.get(name.lower()):
            return found
        if name.lower() in instances():
            return None
        remedy = "give the price of a machine of your own with --prices"
        raise unknown("instance", name, {*self.instances, *instances()}, remedy)


def read_prices(file: Path | None = None) -> Prices:
    """Return the package's prices. Those in a user's file replace them; a source that the file does not name is the
    file. Raises ConfigurationError for a file that cannot be read, with its wrong key."""
    known = _read(package_file("prices.yaml"))
    if file is None:
        return known
    given = _read(file)
    return Prices(
        instances={**known.instances, **_sourced(given.instances, file)},
        hosted={**known.hosted, **_sourced(given.hosted, file)},
    )


def _read(file: Path) -> Prices:
    return validate(Prices, read_yaml(file, ConfigurationError), file)


def _sourced(prices: Mapping[str, Price], file: Path) -> dict[str, Price]:
    return {name: one if one.source else one.model_copy(update={"source": str(file)}) for name, one in prices.items()}
