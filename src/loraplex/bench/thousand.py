"""What 1,000 conversations cost at the rates of a report."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from loraplex.costs.cost import per_thousand_conversations
from loraplex.hardware.devices import find_device
from loraplex.hardware.instances import instances
from loraplex.hardware.prices import read_prices


def costs_of(measured: Mapping[str, Any], usd_per_hour: Decimal = Decimal(1)) -> dict[str, Decimal]:
    """Return what 1,000 conversations cost with each system, on a machine of this price."""
    rates = {name: one["saturation"]["conversations_per_s"] for name, one in measured.items()}
    return {
        name: per_thousand_conversations(usd_per_hour, rate["median"])
        for name, rate in rates.items()
        if rate and rate["median"]
    }


def rents(device: str) -> list[tuple[str, Decimal]]:
    """Return the cheapest of Amazon's instances with one such device, in EC2 and in SageMaker, with their prices."""
    prices, known_device, found = read_prices(), find_device(device), []
    for is_sagemaker in (False, True):
        known = [
            (price.usd_per_hour, one.name)
            for one in instances().values()
            if one.is_sagemaker == is_sagemaker and one.num_devices == 1 and one.device is known_device
            if (price := prices.of(one.name))
        ]
        found += [(name, price) for price, name in sorted(known)[:1]]
    return found
